"""Passes over a training step's bf16 numbers on a CPU, where torch takes two or three for one.

There the memory sets the pace: the gradient of GELU and the sum of its columns, which is the bias's gradient, are one
reading of the same numbers. Torch's operations in float64 are the truth. As many threads work as torch has; how many
they are changes no digit.
"""

from functools import cache

import numba
import numpy as np
import torch
from torch import Tensor

from fastsskd_kernels import bf16_cpu


def column_sums(x: Tensor) -> Tensor:
    """Sum over the rows, added in float32: ``(R, C)`` bf16 on a CPU -> ``(C,)`` bf16."""
    bits = _bits(x)
    sums = _per_part(bits)
    _use_torchs_threads()
    bf16_cpu.column_sums(bits, sums)
    return _total(sums)


def gelu_gradient(grad: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient of GELU (exact, by the error function), and its ``column_sums``.

    A bf16 number has 65536 values: the slope at each is a table of torch's own, so the digits are torch's.

    Args:
        grad, x: ``(R, C)`` bf16 on a CPU, the gradient of GELU's output and GELU's input.

    Returns:
        ``(R, C)`` and ``(C,)`` bf16.
    """
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    bits = _bits(x)
    sums = _per_part(bits)
    _use_torchs_threads()
    bf16_cpu.times_slope(_bits(grad), bits, _gelu_slope(), _bits(out), sums)
    return out, _total(sums)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Each row with mean 0 and variance 1, times weight, plus bias.

    Args:
        x: ``(R, C)`` bf16 on a CPU.
        weight, bias: ``(C,)`` bf16.
        eps: added to the variance, the population's.

    Returns:
        ``(R, C)`` bf16; mean and inverse standard deviation of each row, ``(R,)`` float32. Torch keeps the two in bf16,
        which costs its gradient three digits of the float32 it is worked out in.
    """
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    mean, rstd = x.new_empty(2, len(x), dtype=torch.float32)
    _use_torchs_threads()
    bf16_cpu.layer_norm_rows(
        _bits(x), _bits(weight), _bits(bias), np.float32(eps), _bits(out), mean.numpy(), rstd.numpy()
    )
    return out, mean, rstd


def layer_norm_gradient(
    grad: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of :func:`layer_norm`.

    Args:
        grad: ``(R, C)`` bf16, the gradient of the output.
        x, weight: as there.
        mean, rstd: what it gave.

    Returns:
        The gradients of x ``(R, C)``, weight and bias ``(C,)``, all bf16.
    """
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    bits = _bits(x)
    for_weight, for_bias = _per_part(bits), _per_part(bits)
    _use_torchs_threads()
    bf16_cpu.layer_norm_back_rows(
        _bits(grad), bits, _bits(weight), mean.numpy(), rstd.numpy(), _bits(out), for_weight, for_bias
    )
    return out, _total(for_weight), _total(for_bias)


def _bits(x: Tensor) -> np.ndarray:
    """A tensor's bf16 numbers as uint16; the same memory where they are contiguous."""
    return x.detach().contiguous().view(torch.uint16).numpy()


def _per_part(bits: np.ndarray) -> np.ndarray:
    return np.empty((bf16_cpu.PARTS, bits.shape[1]), np.float32)


def _total(sums: np.ndarray) -> Tensor:
    return torch.from_numpy(sums.sum(0)).bfloat16()


def _use_torchs_threads() -> None:
    """numba takes every core by itself; ranks share a machine."""
    numba.set_num_threads(min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS))


@cache
def _gelu_slope() -> np.ndarray:
    """(65536,) float32, of each bf16 number in the order of its bits."""
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16).float()
    return torch.ops.aten.gelu_backward(torch.ones_like(every), every).numpy()
