"""Band-limited resampling of the crop that training draws, and of nothing else of the clip.

Output sample n is a dot product of the input around ``n * rate_in / rate_out`` with one row of a table of a windowed
sinc: one row for each of the positions an output can have between two inputs. Taps lie in memory in the order of the
samples, so a dot product is a handful of SIMD multiply-adds.

This is here because DALI's own resampler (2.4.0) has no low-pass below the new Nyquist frequency: a 12 kHz tone at
44.1 kHz comes out of its 16 kHz output at full level, folded to 4 kHz.
"""

import functools
import math

import numpy as np

from fastsskd_kernels.compile import njit, njit_reordered
from fastsskd_kernels.crop import copy_scaled, crop_or_loop, crop_start, full_scale

ZERO_CROSSINGS = 40
"""Of the sinc on either side: the transition from passing to stopping is 12 % of the lower Nyquist frequency wide."""
CUTOFF = 0.94
"""Middle of the transition, as a share of the lower of the two Nyquist frequencies."""
KAISER_BETA = 7.86
"""80 dB in the stop band."""
MAX_PHASES = 2048
"""Rates without a small ratio use the nearest of this many positions, 1 / 4096 of a sample off: 62 dB at Nyquist."""


@functools.lru_cache(maxsize=32)
def resample_table(rate_in: int, rate_out: int = 16000) -> tuple[np.ndarray, int, int]:
    """The filter for one pair of rates.

    Args:
        rate_in, rate_out: Hz.

    Returns:
        ``(P, 2J + 1)`` float32 table, and the ratio in lowest terms: ``up`` outputs for ``down`` inputs. Row r is
        for an output that lies r / P of a sample behind input q; it multiplies inputs q - J to q + J and sums to 1.
    """
    divisor = math.gcd(rate_in, rate_out)
    up, down = rate_out // divisor, rate_in // divisor
    if up == down:
        return np.ones((1, 1), np.float32), 1, 1
    width = ZERO_CROSSINGS * max(1.0, down / up)  # input samples on either side
    taps = math.ceil(width)
    phases = min(up, MAX_PHASES)
    time = np.arange(phases)[:, None] / phases - np.arange(-taps, taps + 1)[None, :]
    cutoff = CUTOFF * min(1.0, up / down)
    inside = np.clip(1.0 - (time / width) ** 2, 0.0, None)
    table = np.sinc(cutoff * time) * np.i0(KAISER_BETA * np.sqrt(inside)) * (np.abs(time) <= width)
    return (table / table.sum(axis=1, keepdims=True)).astype(np.float32), up, down


@njit
def resampled_length(length: int, up: int, down: int) -> int:
    """Samples of a whole clip at the new rate: every output that lies before the clip's end."""
    return -(-length * up // down)


def crop_inputs_range(
    length: int, rate_in: int, num_samples: int, position: float, rate_out: int = 16000
) -> tuple[int, int]:
    """Which samples of a clip its crop or loop is made from; the others need not be read.

    Args:
        length: samples of the clip, at ``rate_in`` Hz.
        num_samples: length of the crop, at ``rate_out`` Hz.
        position: in [0, 1), see ``crop_start``.

    Returns:
        First sample and the one after the last, the filter's reach included. All of a clip that is looped.
    """
    table, up, down = resample_table(rate_in, rate_out)
    resampled = resampled_length(length, up, down)
    if resampled < num_samples:
        return 0, length
    start, taps = crop_start(position, resampled, num_samples), table.shape[1] // 2
    last = (start + num_samples - 1) * down // up
    return max(start * down // up - taps, 0), min(last + taps + 2, length)  # 2: the next input may be nearer


def resample_crop_or_loop(
    waveform: np.ndarray,
    rate_in: int,
    num_samples: int,
    position: float = 0.0,
    rate_out: int = 16000,
    *,
    begin: int = 0,
    length: int | None = None,
    out: np.ndarray | None = None,
) -> np.ndarray:
    """A crop of a clip at another rate, or the clip rotated and tiled where it is shorter.

    The same as resampling the whole clip and then taking ``crop_or_loop`` from ``crop_start(position, ...)``.

    Args:
        waveform: (S,) float32 or int16, mono: the clip, or the part of it that ``crop_inputs_range`` tells.
        rate_in, rate_out: Hz.
        num_samples: length of the result.
        position: in [0, 1), see ``crop_start``.
        begin: place of ``waveform[0]`` in the clip.
        length: samples of the whole clip; by default ``waveform`` is all of it.
        out: (num_samples,) float32 to write into.

    Returns:
        (num_samples,) float32: ``out``, or a new array.

    Raises:
        ValueError: an empty clip.
    """
    if waveform.ndim != 1 or not len(waveform):
        raise ValueError(f"waveform: expected (S,) with S >= 1, got {waveform.shape}")
    out = np.empty(num_samples, np.float32) if out is None else out
    table, up, down = resample_table(rate_in, rate_out)
    if waveform.dtype != np.int16:
        waveform = np.ascontiguousarray(waveform, np.float32)
    elif up != down:
        waveform = crop_or_loop(waveform, len(waveform))  # once, and not for each of a sample's many products
    length = len(waveform) if length is None else length
    _resample_crop(out, waveform, full_scale(waveform), begin, length, table, up, down, position)
    return out


@njit
def _resample_crop(out, waveform, scale, begin, length, table, up, down, position):
    """Fill ``out`` with the crop or loop that ``position`` stands for of a clip whose samples from ``begin`` on are
    ``waveform``."""
    length = resampled_length(length, up, down)
    start = crop_start(position, length, out.size)
    once = min(length, out.size)  # a short clip is computed once and then repeated
    head = min(once, length - start)
    _resample(out[:head], waveform, scale, begin, table, up, down, start)
    _resample(out[head:once], waveform, scale, begin, table, up, down, 0)
    for i in range(once, out.size):
        out[i] = out[i - once]


@njit_reordered
def _resample(out, waveform, scale, begin, table, up, down, first):
    """Outputs ``first``, ``first + 1``, ... of the whole clip at the new rate; outside of ``waveform`` it is zero."""
    if up == down:
        copy_scaled(waveform[first - begin : first - begin + out.size], scale, out)
        return
    rows, width = table.shape
    taps = width // 2
    q, phase = first * down // up, first * down % up  # input sample, and how many up-ths of a sample behind it
    for i in range(out.size):
        row, center = phase, q
        if rows < up:  # the nearest of the table's positions, which may be the next input's first
            row = (phase * rows + up // 2) // up
            if row == rows:
                row, center = 0, q + 1
        low = center - taps - begin
        left, right = max(low, 0), min(low + width, waveform.size)
        # Slices, because an index that could be negative keeps the loop from using SIMD lanes.
        samples, weights = waveform[left:right], table[row, left - low : right - low]
        total = np.float32(0.0)
        for j in range(len(samples)):
            total += np.float32(samples[j]) * weights[j]
        out[i] = total
        # Steps instead of a division per sample.
        q, phase = q + down // up, phase + down % up
        if phase >= up:
            q, phase = q + 1, phase - up
