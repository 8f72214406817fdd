"""Self-attention of the blocks: torch's fused one, but for bf16 on a CPU, where training has its own.

There the backward pass of torch's fused attention takes two to four times as long as plain products do, with 128 to 512
tokens. With a matrix unit attention is a kernel of ours, in half of that time (benchmarks/matrix_unit.py). Without one
it is plain products. They write the probabilities, 100 MB a block for 16 clips of the base model, and read them twice;
a clip at a time, what one product has written is still in the cache for the next.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import timm.layers
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastsskd_kernels.attention import attention, attention_gradient, fits

AT_A_TIME = 1 << 22
"""Probabilities that are worked on at a time: 8 MB in bf16, a clip of the base model."""


def fused_attention(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether torch's fused attention is the faster one in training, which keeps no probabilities."""
    return device.type != "cpu" or dtype != torch.bfloat16


class Attention(timm.layers.Attention):
    """timm's attention, its weights and its values, by the faster way."""

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        self.fused_attn = True  # whatever timm's environment variable says

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, **options: Any) -> Tensor:
        """``(B, N, D)`` tokens -> ``(B, N, D)``. A mask, which no block here is given, is for timm's way alone."""
        masked = attn_mask is not None or any(options.values())
        if masked or fused_attention(x.device, x.dtype):
            return super().forward(x, attn_mask, **options)
        wanted = torch.is_grad_enabled()
        if not torch.compiler.is_compiling() and fits(x.shape[1], self.head_dim):
            qkv = self.qkv(x).unflatten(2, (3, self.num_heads, self.head_dim))
            return self.proj((MatrixUnit.apply(qkv) if wanted else attention(qkv, False)[0]).flatten(2))
        if not wanted:
            return super().forward(x)
        return self.proj(MatrixProducts.apply(self.qkv(x), self.num_heads))


class MatrixUnit(torch.autograd.Function):
    """:func:`fastsskd_kernels.attention.attention` and its gradient: ``(B, N, 3, H, d)`` to ``(B, N, H, d)``."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor) -> Tensor:
        out, probs = attention(qkv, True)
        ctx.save_for_backward(qkv, probs)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return attention_gradient(grad, *ctx.saved_tensors)


class MatrixProducts(torch.autograd.Function):
    """``softmax(q k' / sqrt(d)) v`` from ``(B, N, 3 H d)``, as ``qkv`` gives them, to ``(B, N, H d)``.

    The values and gradients are, bit for bit, those of the same products of all clips at once.
    """

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, heads: int) -> Tensor:
        b, n, width = qkv.shape
        d = width // (3 * heads)
        parts, probs = qkv.new_empty(3, b, heads, n, d), qkv.new_empty(b, heads, n, n)
        out = qkv.new_empty(b, n, heads, d)
        for clips in _slices(b, heads * n * n):
            parts[:, clips] = qkv[clips].unflatten(2, (3, heads, d)).permute(2, 0, 3, 1, 4)
            q, k, v = parts[:, clips].flatten(1, 2)
            q *= d**-0.5
            p = probs[clips].flatten(0, 1)
            torch.softmax(torch.bmm(q, k.transpose(1, 2)), dim=-1, out=p)
            out[clips] = _by_token(torch.bmm(p, v), heads)
        ctx.save_for_backward(parts, probs)
        return out.flatten(2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        """``dv = p' do``; ``ds`` from ``dp = do v'`` through the softmax; ``dq = ds k``; ``dk = ds' q``, scaled."""
        parts, probs = ctx.saved_tensors
        _, b, heads, n, d = parts.shape
        grads = grad.new_empty(b, n, 3, heads, d)
        for clips in _slices(b, heads * n * n):
            q, k, v = parts[:, clips].flatten(1, 2)
            p = probs[clips].flatten(0, 1)
            do = grad[clips].unflatten(2, (heads, d)).transpose(1, 2).flatten(0, 1)
            dv = torch.bmm(p.transpose(1, 2), do)
            ds = torch.ops.aten._softmax_backward_data(torch.bmm(do, v.transpose(1, 2)), p, -1, p.dtype)
            dq, dk = torch.bmm(ds, k).mul_(d**-0.5), torch.bmm(ds.transpose(1, 2), q)
            for which, value in enumerate((dq, dk, dv)):
                grads[clips, :, which] = _by_token(value, heads)
        return grads.flatten(2), None


def _slices(clips: int, probabilities: int) -> Iterator[slice]:
    """Of as many clips at a time as have :data:`AT_A_TIME` probabilities, one at least."""
    step = max(1, AT_A_TIME // probabilities)
    return (slice(i, min(i + step, clips)) for i in range(0, clips, step))


def _by_token(values: Tensor, heads: int) -> Tensor:
    """``(B H, N, d)`` -> ``(B, N, H, d)``, a view."""
    return values.unflatten(0, (-1, heads)).transpose(1, 2)
