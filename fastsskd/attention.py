"""Self-attention of the blocks: torch's fused one, and in bf16 on a CPU with a backward pass of our own.

There torch's fused backward pass takes longer than plain matrix products do, and plain products keep the probabilities,
100 MB a block of 16 clips of the base model, which do not fit into the cache. Here the forward pass is torch's, and the
backward pass works the probabilities out anew, of a few clips at a time (benchmarks/train_step.py). The few of a small
model are kept.
"""

from __future__ import annotations

from typing import Any

import timm.layers
import torch
import torch.nn.functional as F
from torch import Tensor

AT_A_TIME = 1 << 22
"""Probabilities that the backward pass holds at a time: 8 MB in bf16, of one clip of the base model."""


class Attention(timm.layers.Attention):
    """timm's attention, with the same weights and the faster way to the same gradients."""

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        self.fused_attn = True  # whatever timm's environment variable says

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, **options: Any) -> Tensor:
        """``(B, N, D)`` tokens -> ``(B, N, D)``; the way of our own knows no mask, and none is asked for here."""
        masked = attn_mask is not None or any(options.values())
        if x.dtype == torch.bfloat16 and x.device.type == "cpu" and torch.is_grad_enabled() and not masked:
            return self.proj(CPUAttention.apply(self.qkv(x), self.num_heads))
        return super().forward(x, attn_mask, **options)


class CPUAttention(torch.autograd.Function):
    """``softmax(q k' / sqrt(d)) v``, from ``(B, N, 3 H d)``, as timm's ``qkv`` gives them, to ``(B, N, H d)``."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, heads: int) -> Tensor:
        b, n, _ = qkv.shape
        ctx.heads, ctx.clips = heads, max(1, AT_A_TIME // (heads * n * n))
        if b > ctx.clips:
            probs, out = None, F.scaled_dot_product_attention(*_split(qkv, heads))
        else:
            q, k, v = _scaled(qkv, heads)
            probs = torch.bmm(q, k.transpose(1, 2)).softmax(dim=-1)
            out = torch.bmm(probs, v).unflatten(0, (b, heads))
        ctx.save_for_backward(qkv, probs)
        return out.transpose(1, 2).flatten(2)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        qkv, probs = ctx.saved_tensors
        grads = torch.empty_like(qkv)
        for parts in zip(*(x.split(ctx.clips) for x in (grad, qkv, grads)), strict=True):
            _backward(*parts, ctx.heads, probs)
        return grads, None


def _backward(grad: Tensor, qkv: Tensor, into: Tensor, heads: int, probs: Tensor | None) -> None:
    """Write the gradient of some clips' ``qkv`` into ``into``: ``dv = p' do``, ``ds`` from ``dp = do v'`` through the
    softmax, ``dq = ds k``, ``dk = ds' q``, where ``q`` is scaled."""
    q, k, v = _scaled(qkv, heads)
    grad = grad.unflatten(2, (heads, -1)).transpose(1, 2).flatten(0, 1)
    if probs is None:
        probs = torch.bmm(q, k.transpose(1, 2)).softmax(dim=-1)
    dv = torch.bmm(probs.transpose(1, 2), grad)
    ds = torch.ops.aten._softmax_backward_data(torch.bmm(grad, v.transpose(1, 2)), probs, -1, qkv.dtype)
    dq, dk = torch.bmm(ds, k).mul_(q.shape[-1] ** -0.5), torch.bmm(ds.transpose(1, 2), q)
    for target, value in zip(_split(into, heads), (dq, dk, dv), strict=True):
        target.copy_(value.view_as(target))


def _split(qkv: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Views of q, k and v, ``(B, H, N, d)`` each."""
    return qkv.unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)


def _scaled(qkv: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """q divided by the root of its width, k and v, ``(B H, N, d)`` each."""
    q, k, v = (x.flatten(0, 1).contiguous() for x in _split(qkv, heads))  # of one clip flatten makes no copy, bmm would
    return q * q.shape[-1] ** -0.5, k, v
