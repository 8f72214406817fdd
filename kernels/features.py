"""Waveform to what the model and the masks need, in one call: the normalised fbank and each patch's mean gradient."""

import math

import numpy as np
import torch

from fastsskd_kernels.backend import resolve_backend
from fastsskd_kernels.compile import njit
from fastsskd_kernels.fbank import check_waveform, fbank_torch, numpy_waveform
from fastsskd_kernels.fbank_cpu import block_memory, fbank_block, make_plan
from fastsskd_kernels.hog import hog_patch_mean_torch
from fastsskd_kernels.hog_cpu import band_mean
from fastsskd_kernels.kaldi import num_frames as count_frames
from fastsskd_kernels.simd import LANES, VECTOR_BYTES, fence, load, splat, store_past_cache

AUDIOSET_MEAN = -4.2677393
AUDIOSET_STD = 4.5689974


def padded_frames(num_samples: int, sample_rate: int = 16000, patch: int = 16) -> int:
    """Frames of the model's input: those of the clip rounded up to two patches. 10 s give 1024 and 5 s give 512."""
    frames = count_frames(num_samples, sample_rate)
    return frames + -frames % (2 * patch)


def pad_frames(fbank: torch.Tensor, length: int, mode: str = "zero") -> torch.Tensor:
    """Append frames.

    Args:
        fbank: (B, T, F), T >= 1.
        length: frames wanted, at least T.
        mode: ``"zero"``, for the model's input, before normalisation (AST's convention); or ``"repeat"`` of the last
            frame, for gradients, where zeros would draw an edge.

    Returns:
        (B, length, F); ``fbank`` itself where nothing is missing.

    Raises:
        ValueError: wrong shape or mode, or more than ``length`` frames.
    """
    if fbank.ndim != 3 or fbank.shape[1] < 1 or fbank.shape[1] > length:
        raise ValueError(f"fbank: expected (B, T, F) with 1 <= T <= {length} frames, got {tuple(fbank.shape)}")
    if mode not in ("zero", "repeat"):
        raise ValueError(f"mode={mode!r}: expected 'zero' or 'repeat'")
    missing = length - fbank.shape[1]
    if missing == 0:
        return fbank
    if mode == "zero":
        return torch.nn.functional.pad(fbank, (0, 0, 0, missing))
    return torch.cat([fbank, fbank[:, -1:].expand(-1, missing, -1)], dim=1)


def features(
    waveform: torch.Tensor,
    *,
    sample_rate: int = 16000,
    num_mel_bins: int = 128,
    window: str = "hanning",
    num_frames: int | None = None,
    mean: float = AUDIOSET_MEAN,
    std: float = AUDIOSET_STD,
    patch: int = 16,
    backend: str = "auto",
    out: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The model's input and the patches' mean gradients, from a batch of mono clips.

    ``backend="torch"`` composes ``fbank``, ``hog_patch_mean`` and ``pad_frames``, on any device. ``backend="numba"``
    does the same per clip while the clip is in cache, and without the GIL: call it from as many threads as there are
    cores.

    Args:
        waveform: (B, S) float32, or int16, which is scaled to [-1, 1).
        sample_rate: Hz.
        num_mel_bins: F, a multiple of ``patch``.
        window: ``"hanning"`` or ``"povey"``.
        num_frames: T of the result, a multiple of ``patch``, at least the frames of the clip; by default
            ``padded_frames(S, sample_rate, patch)``, which is 1024 for 10 s.
        mean, std: of the data set; the result is ``(fbank - mean) / (2 * std)``.
        patch: side of a patch in pixels.
        backend: ``"auto"``, ``"torch"`` or ``"numba"``; see ``resolve_backend``.
        out: contiguous tensors to write both results into, for instance a slice of a pinned batch: fresh memory for
            every clip can cost as much as the computation.

    Returns:
        fbank: (B, num_frames, F) float32, zero-padded before normalisation.
        hog: (B, N) float32, N = num_frames / patch * F / patch, time-major; from the un-normalised fbank with its last
            frame repeated. A NaN or infinite sample makes its frames NaN in ``fbank`` and its patches NaN in ``hog``:
            ``hog.isfinite().all(1)`` finds such clips without reading the spectrogram.

    Raises:
        ValueError: as ``fbank``; or num_frames, num_mel_bins, patch, std or out that do not fit.
    """
    check_waveform(waveform, sample_rate, num_mel_bins, window)
    frames = count_frames(waveform.shape[1], sample_rate)
    if num_frames is None:
        num_frames = padded_frames(waveform.shape[1], sample_rate, patch)
    shapes = clip_shapes(frames, num_frames, num_mel_bins, patch)
    if not std > 0.0:
        raise ValueError(f"std={std}: expected more than 0")
    fbank, hog = outputs(out, waveform.shape[0], waveform.device, *shapes)
    factor = 0.5 / std
    if resolve_backend(backend, waveform) == "numba":
        plan, (samples, scale) = make_plan(sample_rate, num_mel_bins, window), numpy_waveform(waveform)
        norm = np.float32(mean), np.float32(factor)
        features_batch(samples, scale, frames, plan, norm, patch, fbank.numpy(), hog.numpy())
    else:
        spectrogram = fbank_torch(waveform, sample_rate, num_mel_bins, window)
        hog.copy_(hog_patch_mean_torch(pad_frames(spectrogram, num_frames, "repeat"), patch))
        fbank[:, :frames] = spectrogram.sub_(mean).mul_(factor)
        fbank[:, frames:] = -mean * factor  # zero before normalisation
    return fbank, hog


def clip_shapes(frames: int, num_frames: int, num_mel_bins: int, patch: int) -> tuple[tuple[int, ...], ...]:
    """Shapes of a clip's fbank and hog; a ValueError unless it fits the wanted frames and both sides are patches."""
    if patch < 1 or num_mel_bins % patch or num_frames % patch:
        raise ValueError(f"num_frames={num_frames}, num_mel_bins={num_mel_bins}: expected multiples of patch={patch}")
    if num_frames < frames:
        raise ValueError(f"num_frames={num_frames}: the clip has {frames} frames; crop the waveform first")
    return (num_frames, num_mel_bins), ((num_frames // patch) * (num_mel_bins // patch),)


def outputs(out: tuple | None, count: int, device: torch.device, *shapes: tuple[int, ...]) -> list[torch.Tensor]:
    """The caller's tensors, checked, or new ones: float32 on the device, for each shape of a clip one of ``count``."""
    shapes = [(count, *shape) for shape in shapes]
    if out is None:
        return [torch.empty(shape, dtype=torch.float32, device=device) for shape in shapes]
    for tensor, shape in zip(out, shapes, strict=True):
        fits = tensor.shape == shape and tensor.dtype == torch.float32 and tensor.device == device
        if not (fits and tensor.is_contiguous()):
            found = f"{tensor.dtype} {tuple(tensor.shape)} on {tensor.device}"
            raise ValueError(f"out: expected contiguous float32 {shape} on {device}, got {found}")
    return list(out)


@njit
def features_batch(waveform, scale, frames, plan, norm, patch, fbank, hog):
    """Log-mel, its patch means, padding and normalisation of each clip, band of patches by band of patches.

    The latest rows of the log-mel lie in memory that serves every clip and stays in cache; the result goes past it. A
    band's gradients need the rows beside it, so a band waits for the next.
    """
    work, tile, mel = block_memory(plan, fbank.shape[2])
    kept = 4 * LANES * patch // math.gcd(LANES, patch)  # rows: whole blocks, whole bands, and more than one of each
    raw, column_sum = np.empty((kept, fbank.shape[2]), np.float32), np.empty((1, fbank.shape[2]), np.float32)
    for b in range(fbank.shape[0]):
        for start in range(0, frames, LANES):
            end, at = min(start + LANES, frames), start % kept
            fbank_block(waveform[b, start * plan.shift :], scale, plan, work, tile, mel, raw[at : at + end - start])
            for band in range(max(start - 1, 0) // patch, (end - 1) // patch):  # those whose next row is there now
                band_mean(raw, frames, patch, band, column_sum, hog[b])
                normalise(raw, band * patch % kept, norm, fbank[b, band * patch : (band + 1) * patch])
        last = (frames - 1) // patch
        for band in range(last, fbank.shape[1] // patch):
            band_mean(raw, frames, patch, band, column_sum, hog[b])
        normalise(raw, last * patch % kept, norm, fbank[b, last * patch : frames])
        fbank[b, frames:] = (np.float32(0.0) - norm[0]) * norm[1]
    fence()


@njit
def normalise(fbank, first, norm, out):
    """out = (rows of fbank from the first on - mean) * factor, where norm = (mean, factor)."""
    mean, factor = norm
    if out.shape[1] % LANES == 0 and out.ctypes.data % VECTOR_BYTES == 0:
        for t in range(out.shape[0]):
            for f in range(0, out.shape[1], LANES):
                store_past_cache(out, t, f, (load(fbank, first + t, f) - splat(mean)) * splat(factor))
        return
    for t in range(out.shape[0]):
        for f in range(out.shape[1]):
            out[t, f] = (fbank[first + t, f] - mean) * factor
