"""The model's LayerNorm: in bf16 on a CPU nearer to float64 than torch's, gradients included; elsewhere torch's own."""

import pytest
import torch
from torch import nn

from fastsskd import layer_norm
from fastsskd.layer_norm import LayerNorm
from fastsskd.model import build_model


def made(kind: type[nn.LayerNorm], width: int, dtype: torch.dtype) -> nn.LayerNorm:
    torch.manual_seed(0)
    module = kind(width, eps=1e-6)
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    return module.bfloat16().to(dtype)  # of the same, rounded, weights


@pytest.mark.parametrize("shape", [(3, 20, 24), (1000, 24), (24,), (2, 3, 4, 24), (0, 24), (2, 0, 24)], ids=str)
def test_values_and_gradients_are_those_of_float64(shape):
    x, grad = torch.randn(shape).bfloat16(), torch.randn(shape).bfloat16()
    found = []
    for module in (made(LayerNorm, 24, torch.bfloat16), made(nn.LayerNorm, 24, torch.float64)):
        leaf = x.to(module.weight.dtype, copy=True).requires_grad_()
        out = module(leaf)
        out.backward(grad.to(out.dtype))
        found.append([out.detach(), leaf.grad, module.weight.grad, module.bias.grad])
    for ours, wanted in zip(*found, strict=True):
        assert ours.shape == wanted.shape and ours.dtype == torch.bfloat16
        torch.testing.assert_close(ours.double(), wanted, rtol=2**-8, atol=2**-6)
        assert (ours.double() - wanted).norm() <= 2**-8 * wanted.norm()


def test_which_way_is_taken(monkeypatch):
    taken, apply = [], layer_norm.OnePass.apply
    monkeypatch.setattr(layer_norm.OnePass, "apply", lambda *given: taken.append(len(given)) or apply(*given))
    ours, x = made(LayerNorm, 8, torch.bfloat16), torch.randn(2, 8)
    ours(x.bfloat16())
    assert len(taken) == 1
    with torch.no_grad():
        ours(x.bfloat16())
    ours.float()(x)
    assert len(taken) == 1


def test_a_compiler_sees_torchs():
    ours, torchs = made(LayerNorm, 8, torch.bfloat16), made(nn.LayerNorm, 8, torch.bfloat16)
    x = torch.randn(2, 8).bfloat16()
    assert torch.equal(torch.compile(ours, backend="eager", fullgraph=True)(x), torchs(x))


def test_only_gradients_that_are_asked_for():
    ours = made(LayerNorm, 8, torch.bfloat16)
    ours.weight.requires_grad_(False)
    ours(torch.randn(2, 8).bfloat16()).sum().backward()
    assert ours.weight.grad is None and torch.equal(ours.bias.grad, torch.full((8,), 2.0).bfloat16())


def test_all_norms_of_the_model():
    model = build_model("nano", 5, seconds=1.0)
    assert {type(module) for module in model.modules() if isinstance(module, nn.LayerNorm)} == {LayerNorm}
    assert "blocks.0.norm1.weight" in model.state_dict()
