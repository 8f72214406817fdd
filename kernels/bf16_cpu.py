"""The numba passes of ``bf16``: each reads its rows once, in float32 lanes, and keeps what it sums per column.

numpy has no bf16: its numbers come as uint16, the upper half of a float32. Rows are cut into the same parts on any
number of threads, so sums have the same digits on all of them.
"""

import numpy as np
from numba import prange

from fastsskd_kernels.compile import inlined, njit_parallel, njit_reordered

PARTS = 64


@inlined
def widen(bits):
    """bf16 -> float32, exactly."""
    return np.uint32(np.uint32(bits) << np.uint32(16)).view(np.float32)


@inlined
def narrow(value):
    """float32 -> bf16: the nearest one, of two the even one.

    A NaN stays one: those of bf16 numbers and of arithmetic have a zero in their lowest bits, which adding cannot carry
    over.
    """
    bits = np.float32(value).view(np.uint32)
    odd = (bits >> np.uint32(16)) & np.uint32(1)
    return np.uint16((bits + np.uint32(0x7FFF) + odd) >> np.uint32(16))


@inlined
def part_rows(part, rows):
    """First row of a part, and the row after its last."""
    size = (rows + PARTS - 1) // PARTS
    return min(rows, part * size), min(rows, (part + 1) * size)


@njit_parallel
def column_sums(x, out):
    """x (R, C) bf16 -> out (PARTS, C) float32, the sums of each part's rows."""
    for part in prange(PARTS):
        first, end = part_rows(part, x.shape[0])
        total = np.zeros(x.shape[1], np.float32)
        for row in range(first, end):
            for column in range(x.shape[1]):
                total[column] += widen(x[row, column])
        out[part] = total


@njit_parallel
def times_slope(grad, x, slope, out, sums):
    """out = grad * slope[x], all (R, C) bf16 but slope, (65536,) float32; sums as ``column_sums`` of out."""
    for part in prange(PARTS):
        first, end = part_rows(part, x.shape[0])
        total = np.zeros(x.shape[1], np.float32)
        for row in range(first, end):
            for column in range(x.shape[1]):
                value = narrow(widen(grad[row, column]) * slope[x[row, column]])
                out[row, column] = value
                total[column] += widen(value)
        sums[part] = total


@njit_parallel
def layer_norm_rows(x, weight, bias, eps, out, mean, rstd):
    """x (R, C), weight and bias (C,), out (R, C) bf16; mean and rstd (R,) float32 are of x's rows."""
    for part in prange(PARTS):
        first, end = part_rows(part, x.shape[0])
        for row in range(first, end):
            mean[row], rstd[row] = layer_norm_row(x[row], weight, bias, eps, out[row])


@njit_reordered
def layer_norm_row(x, weight, bias, eps, out):
    size = np.float32(x.size)
    total = np.float32(0.0)
    for i in range(x.size):
        total += widen(x[i])
    mean = total / size
    squares = np.float32(0.0)
    for i in range(x.size):
        apart = widen(x[i]) - mean
        squares += apart * apart
    rstd = np.float32(1.0) / np.sqrt(squares / size + eps)
    for i in range(x.size):
        out[i] = narrow((widen(x[i]) - mean) * rstd * widen(weight[i]) + widen(bias[i]))
    return mean, rstd


@njit_parallel
def layer_norm_back_rows(grad, x, weight, mean, rstd, out, for_weight, for_bias):
    """Gradients of ``layer_norm_rows``: out (R, C) bf16 that of x; for_weight, for_bias (PARTS, C) float32."""
    for part in prange(PARTS):
        first, end = part_rows(part, x.shape[0])
        for_weight[part] = np.float32(0.0)
        for_bias[part] = np.float32(0.0)
        for row in range(first, end):
            layer_norm_back_row(
                grad[row], x[row], weight, mean[row], rstd[row], out[row], for_weight[part], for_bias[part]
            )


@njit_reordered
def layer_norm_back_row(grad, x, weight, mean, rstd, out, for_weight, for_bias):
    """With ``h`` the normalised x and ``g = grad weight``: ``rstd (g - mean(g) - h mean(g h))``."""
    of_g, of_gh = np.float32(0.0), np.float32(0.0)
    for i in range(x.size):
        h = (widen(x[i]) - mean) * rstd
        g = widen(grad[i]) * widen(weight[i])
        of_g += g
        of_gh += g * h
        for_weight[i] += widen(grad[i]) * h
        for_bias[i] += widen(grad[i])
    of_g /= np.float32(x.size)
    of_gh /= np.float32(x.size)
    for i in range(x.size):
        h = (widen(x[i]) - mean) * rstd
        out[i] = narrow(rstd * (widen(grad[i]) * widen(weight[i]) - of_g - h * of_gh))
