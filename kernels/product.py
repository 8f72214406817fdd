"""Products of bf16 matrices on a CPU with a matrix unit (Intel's AMX), as a training step has them.

oneDNN's, which are torch's, give each core the same share, so that the slower core sets the pace where neighbours share
a processor; and a weight's gradient, which adds up over thousands of tokens, they do more slowly than the rest.
Here each thread takes the next rows when it has done its own, factors that lie by columns are turned while they are
packed, and the result goes past the cache, straight to memory. Torch's product is the truth (tests/test_product.py);
how far ours is ahead, benchmarks/matrix_unit.py says.
"""

import numpy as np
import torch
from torch import Tensor

from fastsskd_kernels import product_cpu, tiles
from fastsskd_kernels.product_cpu import BLOCK, DEEPEST, SQUARE
from fastsskd_kernels.tiles import SIDE
from fastsskd_kernels.torch_arrays import bits, use_torchs_threads

LEAST = 1 << 30
"""Multiplications of a product that is worth its preparation."""


def fits(m: int, k: int, n: int) -> bool:
    """Whether :func:`product` can take ``(m, k)`` by ``(k, n)`` here, and is quicker than torch's."""
    return not (m % SIDE or k % SIDE or n % SIDE) and m * k * n >= LEAST and tiles.available()


@torch.library.custom_op("fastsskd::product", mutates_args=())
def product(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """``a b + bias``: added up in float32, rounded once. Has no gradient of its own.

    An operation of torch's, so that its profiler knows it. On any number of threads the digits are the same.

    Args:
        a, b: ``(M, K)`` and ``(K, N)`` bf16 on a CPU, all three multiples of 32; by rows or by columns, which costs
            nothing.
        bias: ``(N,)`` bf16.

    Returns:
        ``(M, N)`` bf16.

    Raises:
        ValueError: another shape, dtype or device, or no matrix unit.
    """
    (m, k), (inner, n) = a.shape, b.shape
    if k != inner or m % SIDE or k % SIDE or n % SIDE:
        raise ValueError(f"a, b: expected (M, K) and (K, N), multiples of {SIDE}, got {(m, k)} and {(inner, n)}")
    if not tiles.available():
        raise ValueError("no matrix unit for bf16 numbers (AMX) that this process may use; multiply with torch's @")
    threads, chunks, depth = use_torchs_threads(), -(-k // DEEPEST), min(k, DEEPEST)
    out, packed, blocks = (
        torch.empty(shape, dtype=torch.bfloat16) for shape in ((m, n), (n * depth,), (threads, BLOCK * depth))
    )
    squares, sums = torch.empty(threads, SQUARE), torch.empty((m, n) if chunks > 1 else (0, 0))
    plus = np.zeros(n, np.float32) if bias is None else _float32(bits("bias", bias, 1, (n,)))
    product_cpu.multiply(
        *_factor("a", a),
        *_factor("b", b),
        plus,
        k,
        *(bits(name, room, room.ndim) for name, room in (("packed", packed), ("blocks", blocks))),
        squares.numpy(),
        sums.numpy(),
        np.zeros(chunks, np.int64),
        bits("out", out, 2),
    )
    return out


@product.register_fake
def _(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    return a.new_empty(a.shape[0], b.shape[1])


def _factor(name: str, x: Tensor) -> tuple[np.ndarray, int, bool]:
    """Its numbers, how many lie from one row to the next, or column, and whether it lies by rows."""
    by_rows = x.stride(1) == 1
    numbers = bits(name, x if by_rows else x.t(), 2)
    return numbers.reshape(-1), numbers.shape[1], by_rows


def _float32(numbers: np.ndarray) -> np.ndarray:
    return (numbers.astype(np.uint32) << 16).view(np.float32)
