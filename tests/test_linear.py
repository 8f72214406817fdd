"""The model's linear maps: in bf16 on a CPU the same digits as torch's, gradients included; elsewhere torch's own."""

import pytest
import torch
from torch import nn

from fastsskd import linear
from fastsskd.linear import Linear, LinearGelu, Mlp, use_one_product
from fastsskd.model import build_model

needs_bf16 = pytest.mark.skipif(not linear._onednn_multiplies_bf16(), reason="a processor without bf16 products")


def both(width: int, out: int) -> tuple[nn.Linear, nn.Linear]:
    """Torch's map and ours, of the same weights."""
    torch.manual_seed(0)
    torchs, ours = nn.Linear(width, out).bfloat16(), nn.Linear(width, out).bfloat16()
    ours.load_state_dict(torchs.state_dict())
    use_one_product(ours)
    assert type(ours) is Linear
    return torchs, ours


@needs_bf16
@pytest.mark.parametrize("shape", [(3, 20, 24), (20, 24), (24,), (2, 3, 4, 24), (0, 24), (2, 0, 24)], ids=str)
def test_values_and_gradients_are_torchs(shape):
    inputs = [torch.randn(shape).bfloat16().requires_grad_()]
    inputs.append(inputs[0].detach().clone().requires_grad_())
    grad, found = torch.randn(*shape[:-1], 40).bfloat16(), []
    for module, x in zip(both(24, 40), inputs, strict=True):
        out = module(x)
        out.backward(grad)
        found.append([out.detach(), x.grad, module.weight.grad, module.bias.grad])
    for torchs, ours in zip(*found, strict=True):
        assert torchs.shape == ours.shape and torchs.dtype == ours.dtype
        # The same digits where both are oneDNN's products; another library may round a last place otherwise.
        torch.testing.assert_close(ours, torchs, rtol=2**-7, atol=2**-7)


@needs_bf16
@pytest.mark.parametrize("shape", [(3, 20, 24), (20, 24), (24,), (0, 24)], ids=str)
def test_with_gelu_behind_it(shape):
    (torchs, ours), grad, found = both(24, 40), torch.randn(*shape[:-1], 40).bfloat16(), []
    ours.__class__ = LinearGelu
    values = torch.randn(shape).bfloat16()
    for module in (nn.Sequential(torchs, nn.GELU()), ours):
        x = values.clone().requires_grad_()
        out = module(x)
        out.backward(grad)
        found.append([out.detach(), x.grad, *(p.grad for p in module.parameters())])
        with torch.no_grad():
            assert torch.equal(module(values), out)
    for theirs, own in zip(*found, strict=True):
        assert theirs.shape == own.shape and theirs.dtype == own.dtype
        torch.testing.assert_close(own, theirs, rtol=2**-7, atol=2**-7)
    assert torch.equal(ours.float()(values.float()), nn.functional.gelu(torchs.float()(values.float())))


@needs_bf16
def test_a_step_of_the_model(monkeypatch):
    """Loss and all gradients of a model's features and decoder, through views that are not contiguous too."""

    def step(own: bool) -> list[torch.Tensor]:
        with monkeypatch.context() as patch:
            patch.setattr(linear, "_onednn_multiplies_bf16", lambda: own)
            model = build_model("nano", 5, seconds=1.0).bfloat16()
            patches = torch.randn(3, 256, model.num_patches, generator=torch.Generator().manual_seed(1))
            patches = patches.bfloat16().transpose(1, 2)
            loss = model.decode(model.features(patches)).float().square().mean()
            loss.backward()
        return [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]

    ours, torchs = step(True), step(False)
    assert len(ours) == len(torchs) > 20
    for a, b in zip(ours, torchs, strict=True):
        torch.testing.assert_close(a, b, rtol=2**-6, atol=2**-8)


@needs_bf16
def test_which_way_is_taken(monkeypatch):
    taken, product = [], linear._product
    monkeypatch.setattr(linear, "_product", lambda *given: taken.append(torch.is_grad_enabled()) or product(*given))
    _, ours = both(8, 4)
    x = torch.randn(2, 8)
    ours(x.bfloat16())
    with torch.no_grad():
        ours(x.bfloat16())
    assert len(taken) == 2
    ours.float()(x)
    without = nn.Linear(8, 4, bias=False).bfloat16()
    use_one_product(without)
    without(x.bfloat16())
    monkeypatch.setattr(linear, "_onednn_multiplies_bf16", lambda: False)
    ours.bfloat16()(x.bfloat16())
    assert len(taken) == 2


def test_a_compiler_sees_torchs():
    """Without a break of its graph: torch.compile cannot lower the product of ours with weights that change."""
    torchs, ours = both(8, 4)
    x = torch.randn(2, 8).bfloat16()
    assert torch.equal(torch.compile(ours, backend="eager", fullgraph=True)(x), torchs(x))


@needs_bf16
def test_only_gradients_that_are_asked_for():
    """A frozen weight has none, and neither has an input without a graph: the patches."""
    _, ours = both(8, 4)
    ours.weight.requires_grad_(False)
    ours(torch.randn(2, 8).bfloat16()).sum().backward()
    assert ours.weight.grad is None and torch.equal(ours.bias.grad, torch.full((4,), 2.0).bfloat16())


def test_all_linear_maps_of_the_model():
    """timm's in the blocks too; names and values of the weights are as before."""
    model = build_model("nano", 5, seconds=1.0, pooling="attentive")
    kinds = {type(module) for module in model.modules() if isinstance(module, nn.Linear)}
    assert kinds == {Linear, LinearGelu}
    assert all(type(block.mlp) is Mlp for block in [*model.blocks, *model.mae.blocks])
    assert {"blocks.0.attn.qkv.weight", "blocks.0.mlp.fc1.weight"} < set(model.state_dict())
