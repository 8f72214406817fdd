"""Passes over a training step's bf16 numbers on a CPU, where torch takes two or three for one.

There the memory sets the pace: the gradient of GELU and the sum of its columns, which is the bias's gradient, are one
reading of the same numbers. Torch's operations in float64 are the truth. As many threads work as torch has; how many
they are changes no digit.
"""

from functools import cache

import numpy as np
import torch
from torch import Tensor

from fastsskd_kernels import bf16_cpu
from fastsskd_kernels.torch_arrays import bits, use_torchs_threads


def column_sums(x: Tensor) -> Tensor:
    """Sum over the rows, added in float32: ``(R, C)`` bf16 on a CPU -> ``(C,)`` bf16.

    Raises:
        ValueError: here and below, another shape, dtype or device.
    """
    rows = bits("x", x, 2)
    sums = _per_part(rows)
    use_torchs_threads()
    bf16_cpu.column_sums(rows, sums)
    return _total(sums)


def gelu_gradient(grad: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient of GELU (exact, by the error function), and its ``column_sums``.

    A bf16 number has 65536 values: the slope at each is a table of torch's own, so the digits are torch's.

    Args:
        grad, x: ``(R, C)`` bf16 on a CPU, the gradient of GELU's output and GELU's input.

    Returns:
        ``(R, C)`` and ``(C,)`` bf16.
    """
    rows, out = bits("x", x, 2), _empty(x)
    sums = _per_part(rows)
    use_torchs_threads()
    bf16_cpu.times_slope(bits("grad", grad, 2, x.shape), rows, _gelu_slope(), bits("out", out, 2), sums)
    return out, _total(sums)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Each row with mean 0 and variance 1, times weight, plus bias.

    Args:
        x: ``(R, C)`` bf16 on a CPU.
        weight, bias: ``(C,)`` bf16.
        eps: added to the variance, the population's.

    Returns:
        ``(R, C)`` bf16; mean and inverse standard deviation of each row, ``(R,)`` float32. Torch keeps the two in bf16,
        and works its gradient out with them.
    """
    rows, out = bits("x", x, 2), _empty(x)
    mean, rstd = x.new_empty(2, len(x), dtype=torch.float32)
    by_column = [bits(name, value, 1, x.shape[1:]) for name, value in (("weight", weight), ("bias", bias))]
    use_torchs_threads()
    bf16_cpu.layer_norm_rows(rows, *by_column, np.float32(eps), bits("out", out, 2), mean.numpy(), rstd.numpy())
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
    rows, out = bits("x", x, 2), _empty(x)
    for_weight, for_bias = _per_part(rows), _per_part(rows)
    given = bits("grad", grad, 2, x.shape), rows, bits("weight", weight, 1, x.shape[1:]), mean.numpy(), rstd.numpy()
    use_torchs_threads()
    bf16_cpu.layer_norm_back_rows(*given, bits("out", out, 2), for_weight, for_bias)
    return out, _total(for_weight), _total(for_bias)


def _empty(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _per_part(rows: np.ndarray) -> np.ndarray:
    return np.empty((bf16_cpu.PARTS, rows.shape[1]), np.float32)


def _total(sums: np.ndarray) -> Tensor:
    return torch.from_numpy(sums.sum(0)).bfloat16()


@cache
def _gelu_slope() -> np.ndarray:
    """(65536,) float32, of each bf16 number in the order of its bits."""
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16).float()
    return torch.ops.aten.gelu_backward(torch.ones_like(every), every).numpy()
