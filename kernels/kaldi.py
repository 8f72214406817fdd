"""The numbers of Kaldi's filter banks: frame geometry, windows and mel triangles.

25 ms frames every 10 ms, only where a whole frame fits; pre-emphasis 0.97; zero padding to a power of two; triangles
from 20 Hz to Nyquist on Kaldi's mel scale; float32 epsilon as floor of the log.
"""

import math

import torch

FRAME_LENGTH_MS = 25.0
FRAME_SHIFT_MS = 10.0
PREEMPHASIS = 0.97
LOW_FREQ_HZ = 20.0
LOG_FLOOR = float(torch.finfo(torch.float32).eps)
WINDOWS = ("hanning", "povey")


def frame_samples(sample_rate: int) -> tuple[int, int, int]:
    """Samples per frame, per shift, and per padded frame (the FFT's size) at a sampling rate in Hz."""
    length = int(sample_rate * FRAME_LENGTH_MS * 0.001)
    shift = int(sample_rate * FRAME_SHIFT_MS * 0.001)
    return length, shift, 1 << (length - 1).bit_length()


def num_frames(num_samples: int, sample_rate: int = 16000) -> int:
    """Frames of a clip: 998 for 10 s at 16 kHz, 0 where not one frame fits."""
    length, shift, _ = frame_samples(sample_rate)
    return 0 if num_samples < length else 1 + (num_samples - length) // shift


def window_values(window: str, length: int) -> torch.Tensor:
    """(length,) float32: the symmetric Hann window, or Kaldi's povey window, which is Hann to the power 0.85."""
    hann = torch.hann_window(length, periodic=False, dtype=torch.float32, device="cpu")
    return hann.pow(0.85) if window == "povey" else hann


def mel_banks(num_mel_bins: int, padded: int, sample_rate: int) -> torch.Tensor:
    """Kaldi's triangular filters over the FFT bins below Nyquist.

    Computed in float32 step by step as torchaudio does: the slopes of narrow filters magnify the rounding of their
    edges to 1e-5, and teachers were trained on those very numbers. A filter narrower than a bin may be all zero.

    Returns:
        (num_mel_bins, padded / 2) float32.
    """
    low = _mel(LOW_FREQ_HZ)
    step = (_mel(0.5 * sample_rate) - low) / (num_mel_bins + 1)
    index = torch.arange(num_mel_bins, device="cpu").unsqueeze(1)
    left, center, right = low + index * step, low + (index + 1.0) * step, low + (index + 2.0) * step
    hertz = (sample_rate / padded) * torch.arange(padded // 2, device="cpu")
    mel = (1127.0 * (1.0 + hertz / 700.0).log()).unsqueeze(0)
    rising, falling = (mel - left) / (center - left), (right - mel) / (right - center)
    return torch.minimum(rising, falling).clamp(min=0.0)


def _mel(hertz: float) -> float:
    return 1127.0 * math.log(1.0 + hertz / 700.0)
