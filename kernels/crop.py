"""Bring a clip to the length that training draws: a crop of a long one, a loop of a short one.

Both are one rule: sample i of the result is sample (start + i) mod length of the clip. For a clip that is long enough,
start leaves room and nothing wraps; a shorter one is rotated to its start and tiled.
"""

import numpy as np

from fastsskd_kernels.compile import njit

INT16_SCALE = 1.0 / 32768.0  # int16 full scale -> [-1, 1)


@njit
def crop_start(position: float, length: int, num_samples: int) -> int:
    """Where a draw begins.

    Args:
        position: a uniform number in [0, 1), for instance of ``random.uniform``; 0 in evaluation.
        length: samples in the clip, at least 1.
        num_samples: samples wanted.

    Returns:
        Start in samples: each crop that fits is equally likely; a short clip may start anywhere.
    """
    choices = length - num_samples + 1 if length >= num_samples else length
    return min(int(position * choices), choices - 1)


def crop_or_loop_reference(waveform: np.ndarray, num_samples: int, start: int) -> np.ndarray:
    """The truth for ``crop_or_loop``, in NumPy and without checks."""
    scale = INT16_SCALE if waveform.dtype == np.int16 else 1.0
    places = (start + np.arange(num_samples)) % len(waveform)
    return waveform[places].astype(np.float32) * np.float32(scale)


def crop_or_loop(
    waveform: np.ndarray, num_samples: int, start: int = 0, *, out: np.ndarray | None = None
) -> np.ndarray:
    """Copy ``num_samples`` samples of a mono clip from ``start``, looping a clip that is shorter.

    Runs without the GIL. An int16 clip (a slice of a memory-mapped shard) is scaled to [-1, 1) on the way, because a
    conversion as a step of its own costs more than the copy.

    Args:
        waveform: (S,) float32, or int16.
        num_samples: length of the result, at least 1.
        start: first sample; 0 <= start < S, and start <= S - num_samples where the clip is long enough.
        out: (num_samples,) float32 to write into.

    Returns:
        (num_samples,) float32: ``out``, or a new array.

    Raises:
        ValueError: an empty clip, another shape or dtype, or a start outside the clip.
    """
    if waveform.ndim != 1 or waveform.dtype not in (np.float32, np.int16):
        found = f"{waveform.dtype} {waveform.shape}"
        raise ValueError(f"waveform: expected mono float32 or int16 of shape (S,), got {found}")
    length = len(waveform)
    if length == 0 or num_samples < 1:
        raise ValueError(f"cannot cut {num_samples} samples from a clip of {length}: both must be at least 1")
    if not 0 <= start <= (length - num_samples if length >= num_samples else length - 1):
        raise ValueError(f"start={start} leaves no {num_samples} samples in a clip of {length}")
    if out is None:
        out = np.empty(num_samples, np.float32)
    elif out.shape != (num_samples,) or out.dtype != np.float32:
        raise ValueError(f"out: expected float32 of shape ({num_samples},), got {out.dtype} {out.shape}")
    _copy_looped(waveform, full_scale(waveform), start, out)
    return out


def downmix(samples: np.ndarray) -> np.ndarray:
    """Mean of the channels.

    Channel by channel: NumPy's own mean over so short an axis takes twenty times as long.

    Args:
        samples: (S, channels) float32, or int16, which is scaled to [-1, 1).

    Returns:
        (S,) float32.
    """
    mono = np.zeros(len(samples), np.float32)
    for channel in samples.T:
        mono += channel
    mono *= np.float32(full_scale(samples) / samples.shape[1])
    return mono


def full_scale(samples: np.ndarray) -> np.float32:
    """What brings the samples to [-1, 1): float32 is there, int16 is not."""
    return np.float32(INT16_SCALE if samples.dtype == np.int16 else 1.0)


@njit
def _copy_looped(waveform, scale, start, out):
    """Copy run by run: no modulo per sample, and each run is a loop that vectorises."""
    done = 0
    while done < out.size:
        run = min(out.size - done, waveform.size - start)
        copy_scaled(waveform[start : start + run], scale, out[done : done + run])
        done += run
        start = 0


@njit
def copy_scaled(samples, scale, out):
    """``samples * scale`` as float32; both of one length."""
    for i in range(len(out)):
        out[i] = np.float32(samples[i]) * scale
