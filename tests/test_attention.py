"""The blocks' attention against a naive one in float32, and bit for bit against timm's plain matrix products."""

import pytest
import timm.layers
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastsskd import attention
from fastsskd.attention import Attention, MatrixProducts


def naive(qkv, heads):
    """One clip and head after the other."""
    b, n, width = qkv.shape
    d = width // 3 // heads
    rows = []
    for clip in qkv.view(b, n, 3, heads, d):
        out = []
        for head in range(heads):
            q, k, v = clip[:, 0, head], clip[:, 1, head], clip[:, 2, head]
            out.append((q @ k.T / d**0.5).softmax(dim=1) @ v)
        rows.append(torch.cat(out, dim=1))
    return torch.stack(rows)


def with_gradient(function, x, grad, dtype):
    x = x.to(dtype).requires_grad_()
    out = function(x)
    out.backward(grad.to(dtype))
    return out.detach().float(), x.grad.float()


@given(
    b=st.integers(1, 5),
    n=st.integers(1, 17),
    heads=st.integers(1, 3),
    d=st.sampled_from([1, 8, 16]),
    at_a_time=st.sampled_from([0, 300, 1000, 1 << 22]),
)
def test_values_and_gradients_are_the_naive_ones(b, n, heads, d, at_a_time):
    generator = torch.Generator().manual_seed(b + 10 * n + 1000 * d)
    qkv = torch.randn(b, n, 3 * heads * d, generator=generator)
    grad = torch.randn(b, n, heads * d, generator=generator)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "AT_A_TIME", at_a_time)
        own = with_gradient(lambda x: MatrixProducts.apply(x, heads), qkv, grad, torch.float32)
    expected = with_gradient(lambda x: naive(x, heads), qkv, grad, torch.float32)
    for value, wanted in zip(own, expected, strict=True):
        assert (value - wanted).norm() <= 1e-5 * (1 + wanted.norm())


@pytest.mark.parametrize("at_a_time", [0, 2 * 4 * 40 * 40, 1 << 22], ids=["one clip", "two clips", "all clips"])
def test_the_same_digits_as_plain_products_of_all_clips(at_a_time, monkeypatch):
    """In bf16, where training takes this way: another number of clips at a time is no other run."""
    monkeypatch.setattr(attention, "AT_A_TIME", at_a_time)
    torch.manual_seed(0)
    own, plain = (kind(64, 4, qkv_bias=True).bfloat16() for kind in (Attention, timm.layers.Attention))
    plain.load_state_dict(own.state_dict())
    plain.fused_attn = False
    x, grad = torch.randn(3, 40, 64), torch.randn(3, 40, 64)
    ours, others = (with_gradient(module, x, grad, torch.bfloat16) for module in (own, plain))
    for value, other in zip(ours, others, strict=True):
        assert torch.equal(value, other)
    weights = zip(own.parameters(), plain.parameters(), strict=True)
    assert all(torch.equal(a.grad, b.grad) for a, b in weights)


def test_which_way_is_taken(monkeypatch):
    """Products in bf16 on a CPU with a gradient; timm's fused way otherwise, and where a mask is given."""
    taken = []
    monkeypatch.setattr(MatrixProducts, "apply", lambda qkv, heads: taken.append("products") or qkv[..., :8])
    fused = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        torch.nn.functional, "scaled_dot_product_attention", lambda *a, **o: taken.append("fused") or fused(*a, **o)
    )
    layer, x = Attention(8, 2), torch.randn(2, 3, 8)
    layer(x)
    layer.bfloat16()
    layer(x.bfloat16())
    layer(x.bfloat16(), attn_mask=torch.ones(3, 3, dtype=torch.bool))
    with torch.no_grad():
        layer(x.bfloat16())
    assert taken == ["fused", "products", "fused", "fused"]


def test_what_is_kept():
    """q, k and v, the probabilities, and nothing else."""
    qkv = torch.randn(3, 16, 3 * 2 * 8, dtype=torch.bfloat16, requires_grad=True)
    out = MatrixProducts.apply(qkv, 2)
    assert [tuple(tensor.shape) for tensor in out.grad_fn.saved_tensors] == [(3, 3, 2, 16, 8), (3, 2, 16, 16)]
