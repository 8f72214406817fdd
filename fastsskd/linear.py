"""Linear maps of the model: torch's, but for bf16 on a CPU, where each pass over the numbers costs time.

There torch copies the bias into each row of the result and lets the product add to it; oneDNN can add it to the sums
before they are rounded and written. In the backward pass torch reads what it has written once more for the bias's
gradient, and slowly; ours is a sum beside GELU's gradient, or one quick reading. The digits are the same; what a step
gains, with layer_norm.py, is the row "linear maps, GELU and norms as torch's" of benchmarks/train_step.py.
"""

from __future__ import annotations

from typing import Any

import timm.layers
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fastsskd_kernels import bf16
from fastsskd_kernels.product import fits, product


class Linear(nn.Linear):
    """torch's linear map, its weights and its values, by the faster way."""

    def forward(self, x: Tensor) -> Tensor:
        """``(..., D)`` -> ``(..., C)``."""
        if not self._takes(x):
            return super().forward(x)
        if torch.is_grad_enabled():
            return OneProduct.apply(x, self.weight, self.bias)
        return _product(x, self.weight, self.bias)

    def _takes(self, x: Tensor) -> bool:
        """Whether this is a case for :class:`OneProduct`. A compiler merges products and sums by itself."""
        ours = x.dtype == self.weight.dtype == torch.bfloat16
        if not ours or x.device.type != "cpu" or self.bias is None or torch.compiler.is_compiling():
            return False
        return _onednn_multiplies_bf16()


class LinearGelu(Linear):
    """A linear map and GELU behind it."""

    def forward(self, x: Tensor) -> Tensor:
        """``(..., D)`` -> ``(..., C)``."""
        if torch.is_grad_enabled() and self._takes(x):
            return ProductGelu.apply(x, self.weight, self.bias)
        return nn.functional.gelu(super().forward(x))


class Mlp(timm.layers.Mlp):
    """timm's with GELU: its weights and its values."""

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        self.fc1.__class__ = LinearGelu
        self.act = nn.Identity()


def use_one_product(model: nn.Module) -> None:
    """Make each of the model's linear maps a :class:`Linear`, those that timm builds included."""
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = Linear


class OneProduct(torch.autograd.Function):
    """``x w' + b`` of bf16 numbers on a CPU; the gradients are torch's own products."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        grad = _rows(grad)
        for_bias = bf16.column_sums(grad) if ctx.needs_input_grad[2] else None
        return *_product_gradients(ctx, grad, x, weight), for_bias


class ProductGelu(torch.autograd.Function):
    """``gelu(x w' + b)``, likewise; keeps what GELU was given."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        linear = _product(x, weight, bias)
        ctx.save_for_backward(x, weight, linear)
        return nn.functional.gelu(linear)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight, linear = ctx.saved_tensors
        grad, for_bias = bf16.gelu_gradient(_rows(grad), _rows(linear))
        return *_product_gradients(ctx, grad, x, weight), for_bias


def _product(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    rows = _rows(x)
    if fits(*rows.shape, len(weight)):
        return product(rows, weight.t(), bias).view(*x.shape[:-1], len(weight))
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def _product_gradients(ctx: Any, grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Of x and of the weight, where they are asked for; ``grad`` is ``(R, C)``."""
    for_x, for_weight, _ = ctx.needs_input_grad
    rows = _rows(x)
    multiply = product if fits(*grad.shape, rows.shape[1]) else torch.mm
    return multiply(grad, weight).view(x.shape) if for_x else None, multiply(grad.t(), rows) if for_weight else None


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _onednn_multiplies_bf16() -> bool:
    """Whether this torch has oneDNN and the processor its bf16 products."""
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
