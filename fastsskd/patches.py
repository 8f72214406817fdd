"""The grid of patches that a spectrogram is cut into, and how long a spectrogram is.

Shapes: a spectrogram is ``(B, T, F)``, frames by mel bins; its patches are ``(B, N, 256)``, time-major, so patch
``n = t * grid_f + f``.
"""

from torch import Tensor

PATCH = 16  # frames, and mel bins, of a patch's side
NUM_MEL_BINS = 128


def num_input_frames(seconds: float) -> int:
    """Frames of the model's input for a crop of ``seconds``: 10 ms frames, padded to the next multiple of 32.

    This gives the field's 1024 for 10 s (998 frames) and 512 for 5 s (498).
    """
    frames = 1 + (round(seconds * 16000) - 400) // 160
    return -(-frames // 32) * 32


def patchify(spectrogram: Tensor) -> Tensor:
    """``(B, T, F)`` -> ``(B, N, 256)``, time-major; inside a patch, frames then mel bins."""
    b, t, f = spectrogram.shape
    x = spectrogram.reshape(b, t // PATCH, PATCH, f // PATCH, PATCH)
    return x.transpose(2, 3).reshape(b, (t // PATCH) * (f // PATCH), PATCH * PATCH)


def unpatchify(patches: Tensor, grid_size: tuple[int, int]) -> Tensor:
    """``(B, N, 256)`` -> ``(B, T, F)``: the inverse of :func:`patchify`."""
    b = patches.shape[0]
    x = patches.reshape(b, grid_size[0], grid_size[1], PATCH, PATCH).transpose(2, 3)
    return x.reshape(b, grid_size[0] * PATCH, grid_size[1] * PATCH)
