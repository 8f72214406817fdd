"""Torch's bf16 numbers, and its number of threads, as numba takes them."""

from collections.abc import Sequence

import numba
import numpy as np
import torch
from torch import Tensor


def bits(name: str, x: Tensor, dimensions: int, shape: Sequence[int] | None = None) -> np.ndarray:
    """A tensor's bf16 numbers as uint16; the same memory where they are contiguous.

    Raises:
        ValueError: another shape, dtype or device.
    """
    if x.dtype != torch.bfloat16 or x.device.type != "cpu" or x.ndim != dimensions or shape not in (None, x.shape):
        wanted = tuple(shape) if shape is not None else f"of {dimensions} dimensions"
        raise ValueError(f"{name}: expected bfloat16 {wanted} on a CPU, got {x.dtype} {tuple(x.shape)} on {x.device}")
    return x.detach().contiguous().view(torch.uint16).numpy()


def use_torchs_threads() -> int:
    """numba takes every core by itself; ranks share a machine. Returns how many work."""
    threads = min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS)
    numba.set_num_threads(threads)
    return threads
