"""Products on the matrix unit against float64 and torch's own."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fastsskd.linear import Linear
from fastsskd_kernels import product as module
from fastsskd_kernels import product_cpu, tiles
from fastsskd_kernels.product import fits, product

needs_tiles = pytest.mark.skipif(not tiles.available(), reason="a processor without a matrix unit for bf16 (AMX)")
side = st.integers(1, 7).map(lambda count: 32 * count)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def laid(x: Tensor, by: str) -> Tensor:
    """The same numbers, elsewhere in memory."""
    if by == "columns":
        return x.t().contiguous().t()
    return x if by == "rows" else x.repeat_interleave(2, 1)[:, ::2]


def assert_right(found: Tensor, a: Tensor, b: Tensor, bias: Tensor | None) -> None:
    wanted = a.double() @ b.double() + (0.0 if bias is None else bias.double())
    assert found.dtype == torch.bfloat16 and found.is_contiguous() and found.shape == wanted.shape
    # Rounded once: half a unit in the last place, and what sums in float32 lose where large terms cancel.
    lost = 2**-22 * (a.double().abs() @ b.double().abs())
    assert ((found.double() - wanted).abs() <= 2**-8 * wanted.abs() + lost).all()


@needs_tiles
@given(
    sizes=st.tuples(side, side, side),
    by=st.tuples(*[st.sampled_from(["rows", "columns", "neither"])] * 2),
    biased=st.booleans(),
    seed=st.integers(0, 9),
)
def test_values(sizes, by, biased, seed):
    m, k, n = sizes
    a, b = laid(normal(seed, m, k), by[0]), laid(normal(seed + 10, k, n), by[1])
    bias = normal(seed + 20, n) if biased else None
    assert_right(product(a, b, bias), a, b, bias)


@needs_tiles
@pytest.mark.parametrize("k", [product_cpu.DEEPEST, product_cpu.DEEPEST + 32, 3 * product_cpu.DEEPEST - 64])
@pytest.mark.parametrize("by", ["rows", "columns"])
def test_long_sums_in_parts(k, by):
    """As a weight's gradient over the tokens of a batch; rows and columns that do not fill the last block."""
    a, b, bias = laid(normal(0, product_cpu.BLOCK + 32, k), by), laid(normal(1, k, 160), by), normal(2, 160)
    assert_right(product(a, b, bias), a, b, bias)


@needs_tiles
def test_same_digits_on_any_number_of_threads_and_in_any_layout():
    a, b, before, found = normal(0, 320, 4096), normal(1, 4096, 96), torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found += [product(laid(a, by), laid(b, by)) for by in ("rows", "columns")]
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(value, found[0]) for value in found)


@needs_tiles
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_number_stays_in_sight(bad):
    a, b = normal(0, 64, 64), normal(1, 64, 64)
    a[37, 5] = bad
    found = product(a, b)
    assert not found[37].isfinite().any()
    assert found[:37].isfinite().all() and found[38:].isfinite().all()


@needs_tiles
def test_what_does_not_fit_is_refused(monkeypatch):
    a, b = normal(0, 64, 32), normal(1, 32, 96)
    for wrong in (
        lambda: product(a[:63], b),
        lambda: product(a, b[:, :95]),
        lambda: product(a[:, :31], b[:31]),
        lambda: product(a, b.t()),
        lambda: product(a.float(), b),
        lambda: product(a, b, normal(2, 95)),
        lambda: product(a, b, torch.zeros(96)),
    ):
        with pytest.raises(ValueError, match=r"expected .*, got "):
            wrong()
    monkeypatch.setattr(tiles, "available", lambda: False)
    with pytest.raises(ValueError, match=r"no matrix unit .* multiply with torch's @"):
        product(a, b)
    assert not fits(8192, 768, 768)


@needs_tiles
def test_which_products_fit():
    assert fits(4096, 768, 768) and fits(768, 4096, 3072)
    assert not fits(4095, 768, 768) and not fits(4096, 768, 527) and not fits(32, 32, 32)


@needs_tiles
def test_an_operation_of_torchs():
    torch.library.opcheck(product, (normal(0, 64, 32), normal(1, 32, 96), normal(2, 96)))
    options = {"activities": [torch.profiler.ProfilerActivity.CPU], "record_shapes": True, "acc_events": True}
    with torch.profiler.profile(**options) as profile:
        product(normal(0, 64, 32), normal(1, 32, 96))
    found = [event.input_shapes for event in profile.events() if event.name == "fastsskd::product"]
    assert found == [[[64, 32], [32, 96], []]]


@needs_tiles
def test_linear_maps_take_it(monkeypatch):
    """Values and gradients are those of torch's products, but for the last place."""
    layer, x, grad, found = Linear(64, 96).bfloat16(), normal(0, 4, 40, 64), normal(1, 4, 40, 96), []
    for least in (1, module.LEAST):
        with monkeypatch.context() as patch:
            patch.setattr(module, "LEAST", least)
            leaf = x.clone().requires_grad_()
            out = layer(leaf)
            found.append([out.detach(), *torch.autograd.grad(out, [leaf, layer.weight, layer.bias], grad)])
            with torch.no_grad():
                assert torch.equal(layer(x), out)
    for ours, torchs in zip(*found, strict=True):
        assert ours.shape == torchs.shape
        torch.testing.assert_close(ours, torchs, rtol=2**-7, atol=2**-7)
