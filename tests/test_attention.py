"""The blocks' attention against a naive one in float32, and its gradients against those of plain matrix products."""

import pytest
import timm.layers
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastsskd import attention
from fastsskd.attention import Attention, CPUAttention


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


def with_gradient(function, qkv, grad, dtype):
    qkv = qkv.to(dtype).requires_grad_()
    out = function(qkv)
    out.backward(grad.to(dtype))
    return out.detach().float(), qkv.grad.float()


@given(
    b=st.integers(1, 5),
    n=st.integers(1, 17),
    heads=st.integers(1, 3),
    d=st.sampled_from([1, 8, 16]),
    at_a_time=st.sampled_from([0, 300, 1000, 1 << 22]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_values_and_gradients_are_the_naive_ones(b, n, heads, d, at_a_time, dtype):
    generator = torch.Generator().manual_seed(b + 10 * n + 1000 * d)
    qkv = torch.randn(b, n, 3 * heads * d, generator=generator).bfloat16().float()
    grad = torch.randn(b, n, heads * d, generator=generator).bfloat16().float()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "AT_A_TIME", at_a_time)
        own = with_gradient(lambda x: CPUAttention.apply(x, heads), qkv, grad, dtype)
    expected = with_gradient(lambda x: naive(x, heads), qkv, grad, torch.float32)
    for value, wanted in zip(own, expected, strict=True):
        tolerance = 1e-5 if dtype == torch.float32 else 0.02
        assert (value - wanted).norm() <= tolerance * (1 + wanted.norm())


@pytest.mark.parametrize("at_a_time", [0, 1 << 22], ids=["anew", "kept"])
def test_in_16_bits_no_less_exact_than_plain_matrix_products(at_a_time, monkeypatch):
    monkeypatch.setattr(attention, "AT_A_TIME", at_a_time)
    torch.manual_seed(0)
    own, plain = (kind(64, 4, qkv_bias=True).bfloat16() for kind in (Attention, timm.layers.Attention))
    plain.load_state_dict(own.state_dict())
    plain.fused_attn = False
    x, grad = torch.randn(3, 40, 64), torch.randn(3, 40, 64)
    exact = with_gradient(own.float(), x.bfloat16(), grad.bfloat16(), torch.float32)
    ours, others = (with_gradient(module.bfloat16(), x, grad, torch.bfloat16) for module in (own, plain))
    for value, other, wanted in zip(ours, others, exact, strict=True):
        assert (value - wanted).norm() <= 1.1 * (other - wanted).norm() < 0.02 * wanted.norm()


def test_which_way_is_taken(monkeypatch):
    """Ours in bf16 on a CPU with a gradient; timm's fused one otherwise, and where a mask is given."""
    taken = []
    monkeypatch.setattr(CPUAttention, "apply", lambda qkv, heads: taken.append("ours") or qkv[..., :8])
    plain = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        torch.nn.functional, "scaled_dot_product_attention", lambda *a, **o: taken.append("torch's") or plain(*a, **o)
    )
    layer, x = Attention(8, 2), torch.randn(2, 3, 8)
    layer(x)
    layer.bfloat16()
    layer(x.bfloat16())
    layer(x.bfloat16(), attn_mask=torch.ones(3, 3, dtype=torch.bool))
    with torch.no_grad():
        layer(x.bfloat16())
    assert taken == ["torch's", "ours", "torch's", "torch's"]


def test_what_is_kept():
    """The probabilities of a few clips, and else nothing but qkv."""
    for clips, kept in ((1, 2), (9, 1)):
        qkv = torch.randn(clips, 512, 3 * 2 * 8, dtype=torch.bfloat16, requires_grad=True)
        out = CPUAttention.apply(qkv, 2)
        assert sum(tensor is not None for tensor in out.grad_fn.saved_tensors) == kept
