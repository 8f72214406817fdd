"""Kaldi log-mel filter banks, batched: what ``torchaudio.compliance.kaldi.fbank`` computes for one clip.

Per frame: DC removal, pre-emphasis, window, power spectrum, mel triangles, natural log. No dither, no energy.
"""

import functools

import numpy as np
import torch

from fastsskd_kernels import fbank_cpu
from fastsskd_kernels.backend import resolve_backend
from fastsskd_kernels.crop import INT16_SCALE
from fastsskd_kernels.kaldi import LOG_FLOOR, PREEMPHASIS, WINDOWS, frame_samples, mel_banks, num_frames, window_values


def fbank(
    waveform: torch.Tensor,
    *,
    sample_rate: int = 16000,
    num_mel_bins: int = 128,
    window: str = "hanning",
    backend: str = "auto",
) -> torch.Tensor:
    """Log-mel features of a batch of mono clips, not normalised.

    Args:
        waveform: (B, S) float32, S at least one frame (400 samples at 16 kHz); or int16, which is scaled to [-1, 1).
            AST takes [-1, 1); BEATs takes float32 times 2^15.
        sample_rate: Hz, at least 1000.
        num_mel_bins: M.
        window: ``"hanning"`` (AST) or ``"povey"`` (Kaldi's default, BEATs).
        backend: ``"auto"``, ``"torch"`` or ``"numba"``; see ``resolve_backend``.

    Returns:
        (B, T, M) float32, T = ``num_frames(S, sample_rate)``, at least log(float32 epsilon) = -15.94. A frame with
        a NaN or infinite sample is NaN in every bin and the other frames are unharmed: a result, not an error, because
        an error would make a GPU wait for the host.

    Raises:
        ValueError: wrong shape, dtype, sampling rate, window or backend, or a clip shorter than one frame.
    """
    check_waveform(waveform, sample_rate, num_mel_bins, window)
    if resolve_backend(backend, waveform) == "numba":
        frames = num_frames(waveform.shape[1], sample_rate)
        out = waveform.new_empty(waveform.shape[0], frames, num_mel_bins, dtype=torch.float32)
        plan = fbank_cpu.make_plan(sample_rate, num_mel_bins, window)
        fbank_cpu.fbank_batch(*numpy_waveform(waveform), frames, plan, out.numpy())
        return out
    return fbank_torch(waveform, sample_rate, num_mel_bins, window)


def check_waveform(waveform: torch.Tensor, sample_rate: int, num_mel_bins: int, window: str) -> None:
    """Raise a ValueError of one line for anything that ``fbank`` does not take."""
    if waveform.ndim != 2 or waveform.shape[0] < 1 or waveform.dtype not in (torch.float32, torch.int16):
        raise ValueError(
            f"waveform: expected float32 or int16 (B >= 1, S), got {waveform.dtype} {tuple(waveform.shape)}"
        )
    if waveform.requires_grad:
        raise ValueError("waveform: no gradient passes through the features; pass waveform.detach()")
    if window not in WINDOWS:
        raise ValueError(f"window={window!r}: expected one of {', '.join(WINDOWS)}")
    if sample_rate < 1000 or num_mel_bins < 1:
        raise ValueError(f"sample_rate={sample_rate}, num_mel_bins={num_mel_bins}: expected >= 1000 Hz and >= 1 bin")
    length = frame_samples(sample_rate)[0]
    if waveform.shape[1] < length:
        raise ValueError(
            f"waveform: {waveform.shape[1]} samples are shorter than one frame ({length} samples at {sample_rate} Hz)"
        )


def numpy_waveform(waveform: torch.Tensor) -> tuple[np.ndarray, np.float32]:
    """A CPU waveform for the compiled functions, which convert int16 on the way: (B, S) array and factor."""
    scale = INT16_SCALE if waveform.dtype == torch.int16 else 1.0
    return waveform.contiguous().numpy(), np.float32(scale)


# ---------------------------------------------------------------------------------------------- reference, any device


def fbank_torch(waveform: torch.Tensor, sample_rate: int, num_mel_bins: int, window: str) -> torch.Tensor:
    """The truth for ``fbank``, without host synchronisation.

    On a GPU each line costs the memory that it reads and writes. Hence the results written in place or straight into
    the next buffer, here and below.
    """
    if waveform.dtype == torch.int16:
        waveform = waveform * INT16_SCALE
    length, shift, padded = frame_samples(sample_rate)
    taper = _on_device(window_values, waveform.device, window, length)
    banks = _on_device(mel_banks, waveform.device, num_mel_bins, padded, sample_rate)

    frames = waveform.unfold(1, length, shift)
    frames = frames - frames.mean(-1, keepdim=True)
    # Window times (x[n] - 0.97 x[n-1]). The first sample has nothing before it, and a window that is zero there.
    tapered = frames.new_empty(*frames.shape[:2], padded)
    tapered[..., 0] = frames[..., 0]
    # In two steps, as in torchaudio: sub's alpha would round once instead of twice, and move quiet bins by 0.01.
    torch.mul(frames[..., :-1], -PREEMPHASIS, out=tapered[..., 1:length])
    tapered[..., 1:length].add_(frames[..., 1:])
    tapered[..., :length].mul_(taper)
    tapered[..., length:] = 0.0
    # Kaldi's triangles end below Nyquist. float64 is out of reach of autocast and TF32, which would cost three digits.
    magnitude = torch.fft.rfft(tapered)[..., :-1].abs()
    power = torch.mul(magnitude, magnitude, out=torch.empty_like(magnitude, dtype=torch.float64))
    mel = power @ banks.double().T
    return mel.float().clamp_(min=LOG_FLOOR).log_()


@functools.lru_cache(maxsize=64)
def _on_device(table, device: torch.device, *args) -> torch.Tensor:
    """A constant table, computed on the CPU once and kept on each device that asks: no upload per call."""
    with torch.inference_mode(False), torch.no_grad():
        return table(*args).to(device)
