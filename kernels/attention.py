"""Self-attention of bf16 numbers on a CPU with a matrix unit (AMX), and its gradient.

A head of a clip at a time: scores, softmax and the product with the values follow each other while the numbers are in a
core's cache, and scores are never rounded. Plain products in float64 are the truth
(tests/test_attention_kernel.py); how far it is ahead of torch's, benchmarks/matrix_unit.py says.
"""

import math

import numpy as np
import torch
from torch import Tensor

from fastsskd_kernels import attention_cpu, tiles
from fastsskd_kernels.product_cpu import SQUARE
from fastsskd_kernels.tiles import SIDE
from fastsskd_kernels.torch_arrays import bits, use_torchs_threads


def fits(tokens: int, width: int) -> bool:
    """Whether :func:`attention` can take so many tokens and heads so wide, here."""
    return not (tokens % SIDE or width % SIDE) and tokens > 0 and tiles.available()


@torch.library.custom_op("fastsskd::attention", mutates_args=())
def attention(qkv: Tensor, keep: bool) -> tuple[Tensor, Tensor]:
    """``softmax(q k' / sqrt(D)) v``. Has no gradient of its own; see :func:`attention_gradient`.

    Args:
        qkv: ``(B, N, 3, H, D)`` bf16 on a CPU; N and D multiples of 32.
        keep: whether the probabilities are asked for.

    Returns:
        ``(B, N, H, D)`` bf16, and the probabilities ``(B, H, N, N)`` bf16, or nothing, ``(0,)``.

    Raises:
        ValueError: here and below, another shape, dtype or device, or no matrix unit.
    """
    numbers = _checked(qkv)
    b, n, _, heads, d = qkv.shape
    threads = use_torchs_threads()
    out, probs = _bf16(b, n, heads, d), _bf16(b, heads, n, n) if keep else _bf16(threads, 1, n, n)
    scale = np.float32(math.log2(math.e) / math.sqrt(d))
    room = _rooms(threads, n, d)
    attention_cpu.forward(numbers, scale, keep, _numbers(probs), room, *_small(d), _numbers(out))
    return out, probs if keep else _bf16(0)


@torch.library.custom_op("fastsskd::attention_gradient", mutates_args=())
def attention_gradient(grad: Tensor, qkv: Tensor, probs: Tensor) -> Tensor:
    """The gradient of ``qkv``, ``(B, N, 3, H, D)`` bf16.

    ``dv = p' do``; ``ds`` from ``dp = do v'`` through the softmax; ``dq = ds k``, ``dk = ds' q``, over ``sqrt(D)``.

    Args:
        grad: ``(B, N, H, D)`` bf16, the gradient of the output.
        qkv, probs: as :func:`attention` had and gave them.
    """
    numbers = _checked(qkv)
    b, n, _, heads, d = qkv.shape
    above, p = bits("grad", grad, 4, (b, n, heads, d)), bits("probs", probs, 4, (b, heads, n, n))
    threads, out = use_torchs_threads(), _bf16(*qkv.shape)
    scale, slopes = np.float32(1 / math.sqrt(d)), _numbers(_bf16(threads, n, n))
    room = _rooms(threads, n, d)
    attention_cpu.backward(above, numbers, scale, p, room, slopes, *_small(d), _numbers(out))
    return out


@attention.register_fake
def _(qkv: Tensor, keep: bool) -> tuple[Tensor, Tensor]:
    b, n, _, heads, d = qkv.shape
    return qkv.new_empty(b, n, heads, d), qkv.new_empty((b, heads, n, n) if keep else (0,))


@attention_gradient.register_fake
def _(grad: Tensor, qkv: Tensor, probs: Tensor) -> Tensor:
    return torch.empty_like(qkv, memory_format=torch.contiguous_format)


def _checked(qkv: Tensor) -> np.ndarray:
    numbers = bits("qkv", qkv, 5)
    if qkv.shape[1] == 0 or qkv.shape[2] != 3 or qkv.shape[1] % SIDE or qkv.shape[4] % SIDE:
        raise ValueError(f"qkv: expected (B, N, 3, H, D), N and D multiples of {SIDE}, got {tuple(qkv.shape)}")
    if not tiles.available():
        raise ValueError("no matrix unit for bf16 numbers (AMX) that this process may use; take torch's attention")
    return numbers


def _rooms(threads: int, n: int, d: int) -> tuple[np.ndarray, ...]:
    """Each thread's, as ``attention_cpu.forward`` has them."""
    packed, block = _bf16(threads, attention_cpu.PACKED, n * d), _bf16(threads, SIDE * max(n, d))
    scores, square = torch.empty(threads, SIDE, n), torch.empty(threads, SQUARE)
    return _numbers(packed), _numbers(block), scores.numpy(), square.numpy()


def _small(d: int) -> tuple[np.ndarray, np.ndarray]:
    """No bias, and the first ticket."""
    return np.zeros(d, np.float32), np.zeros(1, np.int64)


def _bf16(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.bfloat16)


def _numbers(x: Tensor) -> np.ndarray:
    return bits("made here", x, x.ndim)
