"""The passes over bf16 numbers on a CPU against torch's own, and against float64 where torch's are not exact."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from fastsskd_kernels import bf16, bf16_cpu

EVERY = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16)
sizes = {"rows": st.integers(0, 200), "columns": st.integers(1, 70), "seed": st.integers(0, 9)}


def normal(seed: int, *shape: int, scale: float = 1.0) -> Tensor:
    return (scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))).bfloat16()


def error(found: Tensor, wanted: Tensor) -> float:
    """Of the length of ``wanted``."""
    return float((found.double() - wanted).norm() / wanted.norm())


def test_widening_is_exact_and_narrowing_rounds_as_torch():
    values = torch.cat([EVERY.float(), torch.randn(2000) * 10.0 ** torch.randint(-38, 38, (2000,))])
    # Ties, and their neighbours on both sides.
    ties = (EVERY.view(torch.uint16).to(torch.int32) << 16) | 0x8000
    values = torch.cat([values, *((ties[::7] + near).view(torch.float32) for near in (-1, 0, 1))])
    values = values[~values.isnan()]
    found = np.array([bf16_cpu.narrow(value) for value in values.numpy()], np.uint16)
    assert torch.equal(torch.from_numpy(found).view(torch.bfloat16), values.bfloat16())
    for bits in (0, 1, 0x3F80, 0x7F80, 0xFF80, 0x8001):
        assert bf16_cpu.widen(np.uint16(bits)) == torch.tensor(bits).to(torch.uint16).view(torch.bfloat16).float()


@given(**sizes)
def test_column_sums(rows, columns, seed):
    x = normal(seed, rows, columns)
    found = bf16.column_sums(x)
    assert found.dtype == torch.bfloat16 and found.shape == (columns,)
    torch.testing.assert_close(found.double(), x.double().sum(0), rtol=2**-8, atol=1e-4)


@given(**sizes)
def test_gelu_gradient_has_torchs_digits(rows, columns, seed):
    x, grad = normal(seed, rows, columns, scale=3.0), normal(seed + 10, rows, columns, scale=1e-3)
    found, sums = bf16.gelu_gradient(grad, x)
    # Of the vector unit the digits are torch's own; the last columns of a row torch works out by itself.
    torch.testing.assert_close(found, torch.ops.aten.gelu_backward(grad, x), rtol=2**-7, atol=1e-9)
    torch.testing.assert_close(sums.double(), found.double().sum(0), rtol=2**-8, atol=1e-7)


def test_gelu_gradient_at_every_number():
    """Infinities and NaNs included."""
    x = EVERY.view(256, 256)
    for grad in (torch.ones_like(x), normal(0, 256, 256)):
        found, _ = bf16.gelu_gradient(grad, x)
        torch.testing.assert_close(found, torch.ops.aten.gelu_backward(grad, x), rtol=2**-7, atol=0, equal_nan=True)


def layer_norm_of_doubles(x: Tensor, weight: Tensor, bias: Tensor, grad: Tensor) -> list[Tensor]:
    """Values, and the gradients of the three."""
    leaves = [value.double().requires_grad_() for value in (x, weight, bias)]
    out = functional.layer_norm(leaves[0], weight.shape, *leaves[1:], 1e-6)
    out.backward(grad.double())
    return [out.detach(), *(leaf.grad for leaf in leaves)]


@given(rows=st.integers(1, 200), columns=st.integers(2, 70), seed=st.integers(0, 9), offset=st.sampled_from([0, 3]))
def test_layer_norm(rows, columns, seed, offset):
    x, grad = normal(seed, rows, columns) + offset, normal(seed + 10, rows, columns)
    weight, bias = normal(seed + 20, columns), normal(seed + 30, columns)
    out, mean, rstd = bf16.layer_norm(x, weight, bias, 1e-6)
    found = [out, *bf16.layer_norm_gradient(grad, x, weight, mean, rstd)]
    for value, wanted in zip(found, layer_norm_of_doubles(x, weight, bias, grad), strict=True):
        assert value.dtype == torch.bfloat16 and value.shape == wanted.shape
        # Half a unit in the last place of the largest, as each value is rounded once.
        assert (value.double() - wanted).abs().max() <= 2**-8 * wanted.abs().max() + 1e-4


def test_layer_norm_of_many_rows_adds_in_float32():
    """The tokens of 16 clips: torch adds their gradients in bf16 and is off by 7 % of the length."""
    x, grad, weight, bias = normal(0, 8192, 96), normal(1, 8192, 96), normal(2, 96), normal(3, 96)
    out, mean, rstd = bf16.layer_norm(x, weight, bias, 1e-6)
    found = [out, *bf16.layer_norm_gradient(grad, x, weight, mean, rstd)]
    for value, wanted in zip(found, layer_norm_of_doubles(x, weight, bias, grad), strict=True):
        assert error(value, wanted) < 0.003


def everything(x: Tensor, grad: Tensor, weight: Tensor) -> list[Tensor]:
    out, mean, rstd = bf16.layer_norm(x, weight, weight, 1e-6)
    gradients = bf16.layer_norm_gradient(grad, x, weight, mean, rstd)
    return [bf16.column_sums(x), *bf16.gelu_gradient(grad, x), out, mean, rstd, *gradients]


def test_same_digits_on_any_number_of_threads_and_in_any_layout():
    x, grad, weight = normal(0, 150, 48), normal(1, 150, 48), normal(2, 48)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = everything(x, grad, weight)
        torch.set_num_threads(2)
        two = everything(x.t().contiguous().t(), grad.repeat(1, 2)[:, :48], weight.repeat_interleave(2)[::2])
    finally:
        torch.set_num_threads(before)
    for a, b in zip(one, two, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_number_stays_in_sight(bad):
    x, grad, weight = normal(0, 70, 8), normal(1, 70, 8), normal(2, 8)
    x[66, 3] = bad
    sums, slope, slope_sums, out, _, _, for_x, for_weight, _ = everything(x, grad, weight)
    assert not sums[3].isfinite() and sums[:3].isfinite().all()
    assert out[66].isnan().all() and out[:66].isfinite().all()
    assert for_x[66].isnan().all() and for_x[:66].isfinite().all() and for_weight.isnan().all()
    if bad != bad:
        assert slope[66, 3].isnan() and slope_sums[3].isnan()


def test_what_does_not_fit_is_refused():
    """Before numba, which reads what lies behind an array."""
    x, column = normal(0, 5, 8), normal(0, 8)
    for wrong in (
        lambda: bf16.column_sums(x.float()),
        lambda: bf16.column_sums(column),
        lambda: bf16.gelu_gradient(x[:4], x),
        lambda: bf16.layer_norm(x, column[:7], column, 1e-6),
        lambda: bf16.layer_norm(x, column, column.float(), 1e-6),
        lambda: bf16.layer_norm_gradient(x, x, column[:7], torch.zeros(5), torch.ones(5)),
    ):
        with pytest.raises(ValueError, match=r"expected bfloat16 .* on a CPU, got torch"):
            wrong()
