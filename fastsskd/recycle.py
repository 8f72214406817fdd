"""Memory for batches, used again when nobody holds the last batch any more.

A large new array is new pages: the kernel clears each on its first touch, which costs as much as half the features of
the clip that goes there. The allocator keeps no freed block of that size.
"""

from __future__ import annotations

import math
import weakref

import numpy as np
import torch
from torch import Tensor

LINE = 64
"""Bytes of a cache line, which are also those of the widest vector."""


class Recycler:
    """Gives out float32 tensors on the CPU; one that is forgotten, with all its views, lends its memory to the next."""

    def __init__(self):
        self._free: dict[int, list[np.ndarray]] = {}

    def empty(self, *shape: int) -> Tensor:
        """An uninitialised tensor."""
        size = math.prod(shape)
        free = self._free.setdefault(size, [])
        try:
            memory = free.pop()  # atomic: other threads do the same
        except IndexError:
            memory = _aligned(size)
        loan = _Loan(memory)
        weakref.finalize(loan, free.append, memory).atexit = False
        return torch.from_numpy(np.asarray(loan)).view(shape)


def _aligned(size: int) -> np.ndarray:
    """New float32 memory that begins where a cache line does, which NumPy's own does not."""
    memory = np.empty(size + LINE // 4, np.float32)
    return memory[-memory.ctypes.data % LINE // 4 :][:size]


class _Loan:
    """Stands between the memory and the tensor, which keeps it alive."""

    def __init__(self, memory: np.ndarray):
        self.__array_interface__ = memory.__array_interface__
