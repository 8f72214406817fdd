"""Histogram of oriented gradients of a spectrogram, and the mean gradient of each patch (the x of Formula 1).

The spectrogram is read as an image whose rows are frames and whose columns are mel bins. Gradients and bins are those
of ``skimage.feature.hog``: central differences (not halved), zero along an axis at its border; unsigned orientations
from 0 to 180 degrees, 0 being a gradient along frequency and 90 along time; a cell's histogram is the mean over its
pixels of the magnitude that fell into each bin. No block normalisation: Formula 1 needs the strength of a patch.
"""

import math

import numpy as np
import torch

from fastsskd_kernels import hog_cpu
from fastsskd_kernels.backend import resolve_backend


def hog(fbank: torch.Tensor, *, orientations: int = 9, cell: int = 16, backend: str = "auto") -> torch.Tensor:
    """Un-normalised HOG histogram of every cell.

    Frames that do not fill a cell are completed by repeating the last frame, as for ``hog_patch_mean``.

    Args:
        fbank: (B, T, F) float32, T >= 1, F a multiple of ``cell``.
        orientations: bins over 180 degrees.
        cell: side of a cell in pixels.
        backend: ``"auto"``, ``"torch"`` or ``"numba"``; see ``resolve_backend``.

    Returns:
        (B, N, orientations) float32, N = ceil(T / cell) * F / cell, time-major: cell n is at frame (n // (F / cell)) *
        cell. The sum over orientations is the cell's mean gradient magnitude. A cell that meets a NaN or infinity is
        NaN in every bin.

    Raises:
        ValueError: wrong shape, dtype, cell, orientations or backend.
    """
    _check(fbank, cell)
    if orientations < 1:
        raise ValueError(f"orientations={orientations}: expected at least 1")
    if resolve_backend(backend, fbank) == "numba":
        angle = np.pi * np.arange(1, orientations) / orientations
        edges = np.stack([np.cos(angle), np.sin(angle)], axis=1)
        out = fbank.new_empty(fbank.shape[0], _cells(fbank, cell), orientations)
        hog_cpu.hog_batch(fbank.contiguous().numpy(), edges, cell, out.numpy())
        return out
    return hog_torch(fbank, orientations, cell)


def hog_patch_mean(fbank: torch.Tensor, *, patch: int = 16, backend: str = "auto") -> torch.Tensor:
    """Mean gradient magnitude of every patch: the x of Formula 1.

    Args:
        fbank: (B, T, F) float32, un-normalised, T >= 1, F a multiple of ``patch``. Where T is not a multiple, the last
            frame is repeated: zeros would draw an edge that dominates the statistics of the clip.
        patch: side of a patch in pixels.
        backend: ``"auto"``, ``"torch"`` or ``"numba"``; see ``resolve_backend``.

    Returns:
        (B, N) float32, N = ceil(T / patch) * F / patch, time-major; equal to ``hog(...)`` summed over orientations.
        NaN where the patch meets a NaN or infinity.

    Raises:
        ValueError: wrong shape, dtype, patch or backend.
    """
    _check(fbank, patch)
    if resolve_backend(backend, fbank) == "numba":
        out = fbank.new_empty(fbank.shape[0], _cells(fbank, patch))
        hog_cpu.patch_mean_batch(fbank.contiguous().numpy(), fbank.shape[1], patch, out.numpy())
        return out
    return hog_patch_mean_torch(fbank, patch)


def _check(fbank: torch.Tensor, cell: int) -> None:
    if fbank.ndim != 3 or fbank.dtype != torch.float32:
        raise ValueError(f"fbank: expected float32 (B, T, F), got {fbank.dtype} {tuple(fbank.shape)}")
    if fbank.requires_grad:
        raise ValueError("fbank: no gradient passes through its gradients; pass fbank.detach()")
    if fbank.shape[1] < 1:
        raise ValueError("fbank: expected at least one frame, got none")
    if cell < 1 or fbank.shape[2] < 1 or fbank.shape[2] % cell:
        raise ValueError(f"fbank: {fbank.shape[2]} mel bins are not a multiple of the {cell}-pixel patch or cell")


def _cells(fbank: torch.Tensor, cell: int) -> int:
    """Cells of one clip, incomplete rows of cells counted."""
    return -(-fbank.shape[1] // cell) * (fbank.shape[2] // cell)


# ---------------------------------------------------------------------------------------------- reference, any device


def hog_torch(fbank: torch.Tensor, orientations: int, cell: int) -> torch.Tensor:
    """The truth for ``hog``.

    The bin of a pixel is the number of bin edges that its direction has passed. "Passed" is the sign of a cross
    product, which spares the arc tangent and is exact: float32 gradients times float64 edges cannot round across one.
    """
    along_time, along_freq = _gradients(_repeat_to_multiple(fbank, cell))
    magnitude = torch.hypot(along_time, along_freq)

    # Unsigned: fold every direction into [0, 180) degrees. A gradient along frequency alone is 0, whatever its sign.
    along_freq = torch.where(along_time == 0, along_freq.abs(), along_freq * along_time.sign()).double()
    along_time = along_time.abs().double()
    passed = torch.zeros_like(magnitude, dtype=torch.int64)
    for edge in range(1, orientations):
        angle = math.pi * edge / orientations
        passed += along_time * math.cos(angle) - along_freq * math.sin(angle) >= 0

    histogram = [_cell_mean(torch.where(passed == b, magnitude, 0.0), cell) for b in range(orientations)]
    histogram = torch.stack(histogram, dim=-1)
    finite = histogram.sum(-1, keepdim=True).isfinite()
    return torch.where(finite, histogram, torch.nan)


def hog_patch_mean_torch(fbank: torch.Tensor, patch: int) -> torch.Tensor:
    """The truth for ``hog_patch_mean``."""
    mean = _cell_mean(torch.hypot(*_gradients(_repeat_to_multiple(fbank, patch))), patch)
    return torch.where(mean.isfinite(), mean, torch.nan)


def _repeat_to_multiple(fbank: torch.Tensor, cell: int) -> torch.Tensor:
    """(B, T, F) -> (B, ceil(T / cell) * cell, F): the last frame repeated."""
    missing = -fbank.shape[1] % cell
    if missing == 0:
        return fbank
    return torch.cat([fbank, fbank[:, -1:].expand(-1, missing, -1)], dim=1)


def _gradients(image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Central differences along time and along frequency, each zero at its own border."""
    along_time, along_freq = torch.empty_like(image), torch.empty_like(image)
    torch.sub(image[:, 2:], image[:, :-2], out=along_time[:, 1:-1])
    torch.sub(image[:, :, 2:], image[:, :, :-2], out=along_freq[:, :, 1:-1])
    along_time[:, :1] = along_time[:, -1:] = 0.0
    along_freq[:, :, :1] = along_freq[:, :, -1:] = 0.0
    return along_time, along_freq


def _cell_mean(image: torch.Tensor, cell: int) -> torch.Tensor:
    """(B, T, F) -> (B, N), cells time-major."""
    batch, frames, bins = image.shape
    cells = image.reshape(batch, frames // cell, cell, bins // cell, cell)
    return cells.mean((2, 4)).reshape(batch, -1)
