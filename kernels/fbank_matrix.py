"""The filter banks as two matrix products, for runtimes that have no FFT."""

import math

import torch

from fastsskd_kernels.kaldi import LOG_FLOOR, PREEMPHASIS, frame_samples, mel_banks, window_values


def fbank_matrices(
    num_mel_bins: int = 128, sample_rate: int = 16000, window: str = "hanning"
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """What ``fbank`` does to a frame, as matrices: all but the square and the log is linear.

    ``log(max(((x @ spectrum) ** 2, real and imaginary parts added) @ banks, floor))`` is the features of a frame ``x``.

    Args:
        num_mel_bins: M.
        sample_rate: Hz.
        window: ``"hanning"`` or ``"povey"``.

    Returns:
        spectrum: (L, 2K) float64, L the samples of a frame; K real parts, then K imaginary parts, of the bins below
            Nyquist, after DC removal, pre-emphasis, window and padding.
        banks: (K, M) float64, the mel triangles.
        floor: below which the log is cut off.
    """
    length, _, padded = frame_samples(sample_rate)
    ones = torch.ones(length, dtype=torch.float64, device="cpu")
    centred = torch.diag(ones) - 1.0 / length
    emphasis = torch.diag(ones) - PREEMPHASIS * torch.diag(ones[1:], 1)
    taper = window_values(window, length).double()
    turns = torch.outer(torch.arange(length, device="cpu"), torch.arange(padded // 2, device="cpu")) % padded
    angle = turns.double() * (2.0 * math.pi / padded)
    fourier = torch.cat([angle.cos(), -angle.sin()], dim=1)
    spectrum = centred @ emphasis @ (taper.unsqueeze(1) * fourier)
    return spectrum, mel_banks(num_mel_bins, padded, sample_rate).double().T.contiguous(), LOG_FLOOR
