"""Attention on the matrix unit, and its gradient, against plain products in float64."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fastsskd.attention import Attention, MatrixProducts, MatrixUnit
from fastsskd_kernels import attention_cpu, simd, tiles
from fastsskd_kernels.attention import attention, attention_gradient, fits
from fastsskd_kernels.compile import njit

needs_tiles = pytest.mark.skipif(not tiles.available(), reason="a processor without a matrix unit for bf16 (AMX)")


def normal(seed: int, *shape: int, scale: float = 1.0) -> Tensor:
    return (scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))).bfloat16()


def of_doubles(qkv: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Values, the gradient and the probabilities."""
    leaf = qkv.double().requires_grad_()
    q, k, v = leaf.permute(2, 0, 3, 1, 4)
    probs = (q @ k.transpose(2, 3) / q.shape[3] ** 0.5).softmax(3)
    out = (probs @ v).transpose(1, 2)
    out.backward(grad.double())
    return out.detach(), leaf.grad, probs.detach()


def error(found: Tensor, wanted: Tensor) -> float:
    """Of the length of ``wanted``."""
    assert found.dtype == torch.bfloat16 and found.is_contiguous() and found.shape == wanted.shape
    return float((found.double() - wanted).norm() / wanted.norm())


@needs_tiles
@given(
    b=st.integers(1, 3),
    n=st.sampled_from([32, 64, 160]),
    heads=st.integers(1, 3),
    d=st.sampled_from([32, 64, 96]),
    scale=st.sampled_from([0.1, 1.0, 4.0]),
    seed=st.integers(0, 9),
)
def test_values_and_gradients(b, n, heads, d, scale, seed):
    qkv, grad = normal(seed, b, n, 3, heads, d, scale=scale), normal(seed + 10, b, n, heads, d)
    out, probs = attention(qkv, True)
    found = out, attention_gradient(grad, qkv, probs), probs
    wanted = of_doubles(qkv, grad)
    for value, right, most in zip(found, wanted, (0.004, 0.006, 0.003), strict=True):
        assert error(value, right) < most
    alone, nothing = attention(qkv, False)
    assert torch.equal(alone, out) and nothing.numel() == 0


@needs_tiles
def test_more_exact_than_plain_products():
    """Which round the scores."""
    qkv, grad = normal(0, 2, 128, 3, 2, 64), normal(1, 2, 128, 2, 64)
    wanted, errors = of_doubles(qkv, grad)[:2], []
    for function in (MatrixUnit.apply, lambda x: MatrixProducts.apply(x.flatten(2), 2).unflatten(2, (2, 64))):
        leaf = qkv.clone().requires_grad_()
        out = function(leaf)
        out.backward(grad)
        errors.append([error(value, right) for value, right in zip((out.detach(), leaf.grad), wanted, strict=True)])
    assert all(ours < 0.8 * products for ours, products in zip(*errors, strict=True))


@needs_tiles
def test_same_digits_on_any_number_of_threads_and_in_any_layout():
    qkv, grad, before, found = normal(0, 3, 64, 3, 2, 32), normal(1, 3, 64, 2, 32), torch.get_num_threads(), []
    elsewhere = qkv.transpose(0, 1).contiguous().transpose(0, 1), grad.repeat_interleave(2, 3)[..., ::2]
    try:
        for threads, (x, above) in zip((1, 2), ((qkv, grad), elsewhere), strict=True):
            torch.set_num_threads(threads)
            out, probs = attention(x, True)
            found.append((out, probs, attention_gradient(above, x, probs)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))


@needs_tiles
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_number_stays_in_sight(bad):
    """In its clip and head, and nowhere else."""
    qkv, grad = normal(0, 2, 64, 3, 2, 32), normal(1, 2, 64, 2, 32)
    qkv[1, 40, 1, 0, 3] = bad
    out, probs = attention(qkv, True)
    gradient = attention_gradient(grad, qkv, probs)
    wanted = of_doubles(qkv, grad)
    assert torch.equal(out.isfinite(), wanted[0].isfinite()) and not out[1, :, 0].isfinite().all()
    assert torch.equal(gradient.isfinite(), wanted[1].isfinite()) and not gradient[1, :, 0, 0].isfinite().all()
    assert out[0].isfinite().all() and gradient[0].isfinite().all() and gradient[1, :, :, 1].isfinite().all()


@needs_tiles
def test_what_does_not_fit_is_refused(monkeypatch):
    qkv, grad = normal(0, 1, 32, 3, 2, 32), normal(1, 1, 32, 2, 32)
    _, probs = attention(qkv, True)
    for wrong in (
        lambda: attention(qkv.float(), True),
        lambda: attention(qkv[:, :31], True),
        lambda: attention(qkv[:, :0], True),
        lambda: attention(qkv[:, :, :2], True),
        lambda: attention(qkv.flatten(2), True),
        lambda: attention(qkv[..., :16], False),
        lambda: attention_gradient(grad[:, :, :1], qkv, probs),
        lambda: attention_gradient(grad, qkv, probs[:, :1]),
    ):
        with pytest.raises(ValueError, match=r"expected .*, got "):
            wrong()
    monkeypatch.setattr(tiles, "available", lambda: False)
    for wrong in (lambda: attention(qkv, True), lambda: attention_gradient(grad, qkv, probs)):
        with pytest.raises(ValueError, match=r"no matrix unit .* take torch's attention"):
            wrong()


@needs_tiles
def test_operations_of_torchs():
    qkv, grad = normal(0, 1, 32, 3, 2, 32), normal(1, 1, 32, 2, 32)
    for keep in (True, False):
        torch.library.opcheck(attention, (qkv, keep))
    torch.library.opcheck(attention_gradient, (grad, qkv, attention(qkv, True)[1]))


@needs_tiles
def test_the_blocks_attention_takes_it(monkeypatch):
    """With a gradient and without; with a bad width, in float32 and in a compiler's graph not."""
    x, layer, narrow, taken = normal(0, 2, 64, 64), Attention(64, 2).bfloat16(), Attention(64, 4).bfloat16(), []
    apply = MatrixUnit.apply
    monkeypatch.setattr(MatrixUnit, "apply", lambda qkv: taken.append(qkv.shape) or apply(qkv))
    out = layer(x)
    with torch.no_grad():
        assert torch.equal(layer(x), out)
    assert taken == [(2, 64, 3, 2, 32)]
    narrow(x)
    layer(x[:, :63])
    torch.compile(layer, backend="eager", fullgraph=True)(x)
    layer.float()(x.float())
    assert len(taken) == 1 and fits(64, 32) and not fits(64, 16) and not fits(63, 32) and not fits(0, 32)


@njit
def powers(x, out):
    for row in range(x.shape[0]):
        for i in range(0, x.shape[1], simd.LANES):
            simd.store(out, row, i, simd.power_of_2(simd.load(x, row, i)))


def test_powers_of_2():
    x = np.concatenate([np.linspace(-126, 127, 4001), np.arange(-126, 128), [0.5, -0.5]]).astype(np.float32)
    x = np.resize(x, (1, len(x) // simd.LANES * simd.LANES))
    found = np.empty_like(x)
    powers(x, found)
    assert np.abs(found / np.exp2(x.astype(np.float64)) - 1).max() < 4e-6
    whole = x == np.round(x)
    assert np.array_equal(found[whole], np.ldexp(np.float32(1), x[whole].astype(int)))
    x[0, :4] = -127, -1e30, -np.inf, np.nan
    powers(x, found)
    assert (found[0, :3] == np.float32(2.0**-126)).all() and np.isnan(found[0, 3])


@njit
def reduced(x, rounded, back):
    top = simd.largest(simd.load(x, 0, 0), simd.load(x, 1, 0))
    simd.store_bf16(rounded, 0, 0, top)
    simd.store(back, 0, 0, simd.load_bf16(rounded, 0, 0))
    return simd.largest_of(top), simd.sum_of(top)


def test_lanes_of_bf16_and_over_lanes():
    x = np.random.default_rng(0).normal(size=(2, simd.LANES)).astype(np.float32)
    rounded, back = np.zeros((1, simd.LANES), np.uint16), np.zeros((1, simd.LANES), np.float32)
    top, total = reduced(x, rounded, back)
    assert top == x.max() and total == pytest.approx(x.max(0).sum(), rel=1e-6)
    wanted = torch.from_numpy(x.max(0)).bfloat16()
    assert torch.equal(torch.from_numpy(rounded[0]).view(torch.bfloat16), wanted)
    assert np.array_equal(back[0], wanted.float().numpy())


def test_softmax_of_a_row():
    """In float32 at any machine: the matrix unit is not asked."""
    scores = np.random.default_rng(0).normal(size=(2, 96)).astype(np.float32) * 8
    scores[1, 5] = 300
    out, wanted = np.zeros((3, 96), np.uint16), torch.from_numpy(scores).double().mul(0.5).softmax(1)
    for row in range(2):
        attention_cpu.softmax(scores, row, np.float32(0.5 * np.log2(np.e)), out, row + 1)
    found = torch.from_numpy(out[1:]).view(torch.bfloat16).double()
    assert ((found - wanted).abs() <= 2**-8 * wanted + 1e-30).all()
