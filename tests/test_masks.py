"""Masks: exact counts, the distributions of the paper, and noise that belongs to the clip."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

import fastsskd_kernels as kernels
from fastsskd_kernels import random as noise

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
UNLIKELY = 1e-4  # draws below are fixed by their seeds: a test that passes once passes always


def seeds_of(count, start=0):
    return torch.arange(start, start + count)


# --------------------------------------------------------------------------------------------------------- random


def test_mixing_is_splitmix64():
    """Published outputs of splitmix64 for the state 1234567, in each of the three arithmetics."""
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    states = [(1234567 + (i + 1) * noise.GAMMA) & noise.MASK64 for i in range(4)]
    assert [noise._mix_int(state) for state in states] == published
    assert noise._mix_numpy(np.array(states, np.uint64)).tolist() == published
    signed = torch.tensor([noise._signed(state) for state in states])
    assert noise._mix_torch(signed).tolist() == [noise._signed(word) for word in published]


@settings(deadline=None)
@given(st.integers(-(2**63), 2**63 - 1), st.integers(0, 2**40), st.lists(st.integers(-(2**63), 2**63 - 1), max_size=5))
def test_array_of_seeds_equals_one_by_one(seed, epoch, index):
    expected = [noise.derive_seed(seed, epoch, i) for i in index]
    result = kernels.derive_seeds(seed, epoch, np.array(index, np.int64))
    assert result.dtype == np.int64 and result.tolist() == expected


def test_seeds_differ_by_every_part_and_its_place():
    parts = [(0,), (1,), (0, 0), (0, 1), (1, 0), (0, 0, 0), (5, 7), (7, 5), (-1,)]
    assert len({kernels.derive_seed(*p) for p in parts}) == len(parts)
    assert len(np.unique(kernels.derive_seeds(1, 2, np.arange(100_000)))) == 100_000


@settings(deadline=None, max_examples=50)
@given(st.integers(-(2**63), 2**63 - 1), st.integers(1, 20), st.integers(0, 1000))
def test_uniform_is_the_documented_hash(seed, n, stream):
    key = noise._mix_int((seed + noise.derive_seed(stream)) & noise.MASK64)
    words = [noise._mix_int((key + (i + 1) * noise.GAMMA) & noise.MASK64) for i in range(n)]
    result = kernels.uniform(torch.tensor([seed]), n, stream=stream)
    assert result.dtype == torch.float32 and result[0].tolist() == [(w >> 40) / 2**24 for w in words]
    assert noise.uniform64(torch.tensor([seed]), n, stream=stream)[0].tolist() == [(w >> 11) / 2**53 for w in words]


def test_uniform_is_uniform_and_neighbouring_seeds_are_unrelated():
    values = kernels.uniform(seeds_of(2000), 100, stream=7)
    assert values.min() >= 0.0 and values.max() < 1.0
    assert chisquare(torch.histc(values, 64, 0, 1)).pvalue > UNLIKELY
    other = kernels.uniform(seeds_of(2000), 100, stream=8)
    for pair in ((values[:-1], values[1:]), (values[:, :-1], values[:, 1:]), (values, other)):
        correlation = torch.corrcoef(torch.stack([p.flatten() for p in pair]))[0, 1]
        assert abs(correlation) < 4 / np.sqrt(pair[0].numel())


@pytest.mark.parametrize("wrong", [torch.zeros(3), torch.zeros(3, 1).long(), torch.tensor(3)])
def test_uniform_wants_int64_seeds(wrong):
    with pytest.raises(ValueError, match="seeds: expected int64"):
        kernels.uniform(wrong, 2, stream=1)


# ------------------------------------------------------------------------------------------------------ Formula 1


def test_weight_is_formula_1():
    x = torch.rand(3, 64, generator=torch.Generator().manual_seed(0)) * 5
    exact = x.double()
    squared = (exact - exact.mean(1, keepdim=True)) ** 2 / exact.var(1, correction=0, keepdim=True)
    torch.testing.assert_close(kernels.patch_weight(x).double(), torch.exp(-squared), rtol=1e-5, atol=0)
    printed = torch.exp(squared) / torch.exp(squared).amax(1, keepdim=True)
    torch.testing.assert_close(kernels.patch_weight(x, form="printed").double(), printed, rtol=1e-5, atol=0)


@settings(deadline=None)
@given(st.integers(1, 600), st.floats(-30, 30), st.floats(0, 1e3), st.sampled_from(["gaussian", "printed"]))
def test_weight_stays_in_its_range(patches, outlier, level, form):
    x = torch.full((1, patches), level)
    x[0, 0] += outlier
    weight = kernels.patch_weight(x, form=form)
    assert weight.shape == x.shape and weight.dtype == torch.float32
    assert ((weight > 0) & (weight <= 1)).all()


@pytest.mark.parametrize("form", ["gaussian", "printed"])
@pytest.mark.parametrize("level", [0.0, 1e-30, 0.1, 12345.678])
def test_a_flat_clip_weighs_ones(level, form):
    x = torch.full((2, 512), level)
    x[1] = torch.arange(512)
    weight = kernels.patch_weight(x, form=form)
    assert (weight[0] == 1).all() and weight[1].unique().numel() > 100


def test_weight_of_a_bad_clip_is_nan_and_of_the_others_unharmed():
    x = torch.rand(3, 16, generator=torch.Generator().manual_seed(0))
    expected = kernels.patch_weight(x)
    expected[:2] = torch.nan
    x[0, 3], x[1, 5] = torch.nan, torch.inf
    torch.testing.assert_close(kernels.patch_weight(x), expected, equal_nan=True)


@pytest.mark.parametrize(
    ("x", "form"), [(torch.zeros(4), "gaussian"), (torch.zeros(1, 4).int(), "gaussian"), (torch.zeros(1, 4), "other")]
)
def test_weight_refuses(x, form):
    with pytest.raises(ValueError):
        kernels.patch_weight(x, form=form)


# ---------------------------------------------------------------------------------------------------- inter-patch


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 4), st.integers(1, 600), st.floats(0, 1), st.integers(0, 2**40), st.booleans())
def test_exactly_the_rounded_share_is_masked(batch, patches, ratio, seed, flat):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.ones(batch, patches) if flat else kernels.patch_weight(torch.rand(batch, patches))
    mask = kernels.inter_patch_mask(weight, ratio, generator=generator)
    assert mask.dtype == torch.bool and mask.shape == weight.shape
    assert mask.sum(1).tolist() == [round(ratio * patches)] * batch


@pytest.mark.parametrize("form", ["gaussian", "printed", None])
def test_one_patch_is_drawn_with_the_frequencies_of_formula_1(form):
    x = torch.linspace(0, 1, 12)[None] ** 2
    weight = kernels.patch_weight(x, form=form) if form else torch.ones(1, 12)
    draws = 40_000
    mask = kernels.inter_patch_mask(weight.expand(draws, -1), 1 / 12, generator=seeds_of(draws))
    expected = (weight / weight.sum())[0].double().numpy() * draws
    assert chisquare(mask.sum(0).numpy(), expected * (draws / expected.sum())).pvalue > UNLIKELY


def test_two_patches_are_drawn_one_after_the_other():
    """Without replacement: P(i) = p_i + sum over j of p_j p_i / (1 - p_j)."""
    weight, draws = torch.tensor([[1.0, 0.5, 0.25, 0.2, 0.05]]), 40_000
    p = (weight / weight.sum())[0].double()
    second = p * ((p / (1 - p)).sum() - p / (1 - p))
    mask = kernels.inter_patch_mask(weight.expand(draws, -1), 0.4, generator=seeds_of(draws, 10**6))
    frequency, expected = mask.double().mean(0), p + second
    deviation = (frequency - expected) / (expected * (1 - expected) / draws).sqrt()
    assert deviation.abs().max() < 4.0


def test_tiny_weights_are_masked_last():
    weight = torch.ones(200, 8)
    weight[:, 3] = 1e-30
    mask = kernels.inter_patch_mask(weight, 7 / 8, generator=seeds_of(200))
    assert not mask[:, 3].any()


@pytest.mark.parametrize("draw", ["inter", "intra"])
def test_a_mask_belongs_to_its_clip(draw):
    weight = kernels.patch_weight(torch.rand(6, 32, generator=torch.Generator().manual_seed(0)))

    def masks(seeds, rows):
        if draw == "inter":
            return kernels.inter_patch_mask(weight[rows], 0.75, generator=seeds)
        return kernels.intra_patch_mask(len(rows), (8, 4), generator=seeds)

    seeds, rows = seeds_of(6), torch.arange(6)
    together = masks(seeds, rows)
    order = torch.tensor([4, 0, 5, 2, 1, 3])
    assert torch.equal(masks(seeds[order], order), together[order])
    assert torch.equal(torch.cat([masks(seeds[i : i + 1], rows[i : i + 1]) for i in range(6)]), together)
    assert not torch.equal(masks(seeds + 1000, rows), together)
    # A generator is nothing but a source of seeds, and is advanced by them.
    generator, twin = torch.Generator().manual_seed(3), torch.Generator().manual_seed(3)
    first, second = masks(generator, rows), masks(generator, rows)
    assert torch.equal(masks(twin, rows), first) and torch.equal(masks(twin, rows), second)
    assert not torch.equal(first, second)
    assert torch.equal(masks(noise.clip_seeds(torch.Generator().manual_seed(3), 6, torch.device("cpu")), rows), first)


@pytest.mark.parametrize(
    ("weight", "ratio", "generator"),
    [
        (torch.ones(4), 0.5, seeds_of(4)),
        (torch.ones(2, 4).long(), 0.5, seeds_of(2)),
        (torch.ones(2, 4), 1.5, seeds_of(2)),
        (torch.ones(2, 4), float("nan"), seeds_of(2)),
        (torch.ones(2, 4), 0.5, seeds_of(3)),
        (torch.ones(2, 4), 0.5, torch.zeros(2)),
        (torch.ones(2, 4), 0.5, 17),
    ],
)
def test_inter_patch_mask_refuses(weight, ratio, generator):
    with pytest.raises(ValueError) as error:
        kernels.inter_patch_mask(weight, ratio, generator=generator)
    assert "\n" not in str(error.value)


# ---------------------------------------------------------------------------------------------------- intra-patch


def bands(mask, patch):
    """(B, T, F) -> per touched patch (clip, kind, time start, time width, freq start, freq width).

    Fails unless each patch is the union of at most one band of whole rows and one of whole columns.
    """
    batch, frames, bins = mask.shape
    cells = mask.reshape(batch, frames // patch, patch, bins // patch, patch).transpose(2, 3).reshape(-1, patch, patch)
    found = []
    for number in cells.any(2).any(1).nonzero()[:, 0].tolist():
        cell = cells[number]
        runs = []
        for line in (cell.all(1), cell.all(0)):
            places = line.nonzero()[:, 0].tolist()
            assert places == list(range(places[0], places[0] + len(places))) if places else True
            runs.append((places[0] if places else -1, len(places)))
        (row, height), (column, width) = runs
        union = torch.zeros(patch, patch, dtype=torch.bool)
        union[row : row + height if height else row] = True
        union[:, column : column + width if width else column] = True
        assert torch.equal(cell, union) and height + width > 0
        kind = "both" if height and width else "time" if height else "freq"
        found.append((number // (cells.shape[0] // batch), kind, row, height, column, width))
    return found


def test_intra_patch_mask_is_figure_3():
    clips, patches = 1500, 32
    mask = kernels.intra_patch_mask(clips, (8, 4), generator=seeds_of(clips))
    assert mask.shape == (clips, 128, 64) and mask.dtype == torch.bool
    found = bands(mask, 16)

    touched = np.bincount([clip for clip, *_ in found], minlength=clips)
    assert touched.max() <= patches // 2
    assert chisquare(np.bincount(touched, minlength=17)).pvalue > UNLIKELY

    kinds = [sum(kind == wanted for _, kind, *_ in found) for wanted in ("time", "freq", "both")]
    assert chisquare(kinds, np.array([0.3, 0.3, 0.4]) * len(found)).pvalue > UNLIKELY

    for first, width in ((2, 3), (4, 5)):
        runs = [(f[first], f[width]) for f in found if f[width]]
        widths = np.bincount([w for _, w in runs])
        assert len(widths) == 5 and chisquare(widths[1:]).pvalue > UNLIKELY
        for w in range(1, 5):
            starts = np.bincount([s for s, run in runs if run == w], minlength=17 - w)
            assert len(starts) == 17 - w and chisquare(starts).pvalue > UNLIKELY


def test_every_patch_is_touched_equally_often():
    mask = kernels.intra_patch_mask(3000, (4, 2), patch=4, generator=seeds_of(3000))
    cells = mask.reshape(3000, 4, 4, 2, 4).transpose(2, 3).reshape(3000, 8, 16).any(2)
    assert chisquare(cells.sum(0)).pvalue > UNLIKELY


@settings(deadline=None, max_examples=40)
@given(
    batch=st.integers(1, 3),
    grid=st.tuples(st.integers(1, 6), st.integers(1, 4)),
    patch=st.sampled_from([1, 2, 4, 8, 10, 16, 24]),
    max_share=st.floats(0, 1),
    max_width=st.floats(0.01, 1),
    p_time=st.floats(0, 1),
    seed=st.integers(0, 2**40),
)
def test_intra_options_hold_for_any_shape(batch, grid, patch, max_share, max_width, p_time, seed):
    options = {"max_share": max_share, "max_width": max_width}
    probabilities = {"p_time": p_time, "p_freq": 1 - p_time, "p_both": 0.0}
    generator = torch.Generator().manual_seed(seed)
    mask = kernels.intra_patch_mask(batch, grid, patch=patch, generator=generator, **options, **probabilities)
    assert mask.shape == (batch, grid[0] * patch, grid[1] * patch) and mask.is_contiguous()
    generator = torch.Generator().manual_seed(seed)
    arguments = {"patch": patch, "generator": generator, **options, **probabilities, "backend": "torch"}
    assert torch.equal(mask, kernels.intra_patch_mask(batch, grid, **arguments))
    cells = mask.reshape(batch, grid[0], patch, grid[1], patch).transpose(2, 3).reshape(batch, -1, patch, patch)
    assert cells.any(3).any(2).sum(1).max() <= int(max_share * grid[0] * grid[1])
    assert cells.sum((2, 3)).max() <= max(1, int(max_width * patch)) * patch


@pytest.mark.parametrize(
    "wrong",
    [
        {"batch": 0},
        {"grid_size": (0, 4)},
        {"patch": 0},
        {"max_share": 1.1},
        {"max_width": 0.0},
        {"p_time": 0.5},
        {"p_time": -0.1, "p_both": 0.8},
        {"generator": None},
    ],
)
def test_intra_patch_mask_refuses(wrong):
    arguments = {"batch": 2, "grid_size": (4, 4), "generator": seeds_of(2)} | wrong
    with pytest.raises(ValueError):
        kernels.intra_patch_mask(arguments.pop("batch"), arguments.pop("grid_size"), **arguments)


def test_masks_need_no_value_on_the_host():
    """On the meta device there are no values: any ``.item()`` or data-dependent shape would raise."""
    seeds = torch.zeros(2, dtype=torch.int64, device="meta")
    weight = kernels.patch_weight(torch.zeros(2, 512, device="meta"))
    assert kernels.inter_patch_mask(weight, 0.75, generator=seeds).shape == (2, 512)
    assert kernels.intra_patch_mask(2, (64, 8), generator=seeds).shape == (2, 1024, 128)


@pytest.mark.gpu
@gpu
def test_gpu_draws_the_same_bits_without_synchronising():
    seeds, weight = seeds_of(8), kernels.patch_weight(torch.rand(8, 512, generator=torch.Generator().manual_seed(0)))
    on_gpu = seeds.cuda(), weight.cuda()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        uniform = kernels.uniform(on_gpu[0], 100, stream=5)
        inter = kernels.inter_patch_mask(on_gpu[1], 0.75, generator=on_gpu[0])
        intra = kernels.intra_patch_mask(8, (64, 8), generator=on_gpu[0])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(uniform.cpu(), kernels.uniform(seeds, 100, stream=5))
    assert torch.equal(inter.cpu(), kernels.inter_patch_mask(weight, 0.75, generator=seeds))
    assert torch.equal(intra.cpu(), kernels.intra_patch_mask(8, (64, 8), generator=seeds))
