"""Linear maps of the model: torch's, but for bf16 on a CPU, where the bias is added inside the product.

There torch copies the bias into each row of the result and lets the product add to it; oneDNN can add it to the sums
before they are rounded and written. The digits are the same; what a step gains is the row "linear maps as torch's" of
benchmarks/train_step.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


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
        bf16 = x.dtype == self.weight.dtype == torch.bfloat16
        if not bf16 or x.device.type != "cpu" or self.bias is None or torch.compiler.is_compiling():
            return False
        return _onednn_multiplies_bf16()


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
        for_x, for_weight, for_bias = ctx.needs_input_grad
        rows = grad.reshape(-1, grad.shape[-1])
        return (
            grad @ weight if for_x else None,
            rows.t() @ x.reshape(-1, x.shape[-1]) if for_weight else None,
            rows.sum(0) if for_bias else None,
        )


def _product(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def _onednn_multiplies_bf16() -> bool:
    """Whether this torch has oneDNN and the processor its bf16 products."""
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
