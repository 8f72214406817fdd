"""The three views: what they hide, how much of it, and that only a clip's own seed decides."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fastsskd_kernels as kernels
from fastsskd.batch import Batch
from fastsskd.config import MaskConfig
from fastsskd.views import make_views


def fields(views) -> dict[str, torch.Tensor]:
    return {f.name: getattr(views, f.name) for f in dataclasses.fields(views)}


def repeated(batch: Batch, clip: int, count: int) -> Batch:
    """One clip ``count`` times, each time with another seed."""
    seeds = torch.from_numpy(kernels.derive_seeds(5, 0, np.arange(count)))
    return Batch(
        batch.fbank[clip : clip + 1, :16].expand(count, -1, -1),
        batch.hog[clip : clip + 1, :8].expand(count, -1),
        batch.label[clip : clip + 1].expand(count),
        [f"{i}" for i in range(count)],
        torch.arange(count),
        seeds,
    )


def test_raw_is_every_patch_of_the_spectrogram_time_first(make_batch):
    batch = make_batch()
    raw = make_views(batch, MaskConfig()).raw
    assert raw.shape == (5, 6 * 8, 256)
    for t, f in np.ndindex(6, 8):
        square = batch.fbank[:, 16 * t : 16 * t + 16, 16 * f : 16 * f + 16]
        assert torch.equal(raw[:, 8 * t + f], square.reshape(5, 256))


def test_permuting_the_batch_permutes_the_views(make_batch):
    order = [3, 0, 4, 1, 2]
    views, permuted = make_views(make_batch(), MaskConfig()), make_views(make_batch(order), MaskConfig())
    for name, value in fields(views).items():
        assert torch.equal(value[order], getattr(permuted, name)), name


def test_a_clip_s_views_do_not_depend_on_the_clips_around_it(make_batch):
    together = make_views(make_batch(), MaskConfig())
    alone = make_views(make_batch([2]), MaskConfig())
    for name, value in fields(together).items():
        assert torch.equal(value[2:3], getattr(alone, name)), name


def test_clones_are_further_masks_of_the_same_clips(make_batch):
    """The first round is that of no clones; a clip's others are its own as well, whatever is around it."""
    views = make_views(make_batch(), MaskConfig(clones=3))
    rounds = [{name: value[5 * i : 5 * i + 5] for name, value in fields(views).items()} for i in range(3)]
    first, alone = fields(make_views(make_batch(), MaskConfig())), make_views(make_batch([2]), MaskConfig(clones=3))
    for name, value in first.items():
        assert len(getattr(views, name)) == 15 and torch.equal(rounds[0][name], value), name
        assert torch.equal(getattr(views, name)[2::5], getattr(alone, name)), name
    for name in ("raw", "weight"):
        assert torch.equal(rounds[1][name], first[name]) and torch.equal(rounds[2][name], first[name])
    for name in ("inter_mask", "intra_mask"):
        for a, b in ((0, 1), (0, 2), (1, 2)):
            assert all(not torch.equal(x, y) for x, y in zip(rounds[a][name], rounds[b][name], strict=True)), name


def test_masks_come_from_the_seeds_and_the_patch_weights_alone(make_batch):
    batch, other = make_batch(), make_batch(range(10, 15))
    first = make_views(batch, MaskConfig())
    second = make_views(dataclasses.replace(other, seed=batch.seed, hog=batch.hog), MaskConfig())
    for name in ("intra_mask", "inter_mask", "ids_keep", "weight"):
        assert torch.equal(getattr(first, name), getattr(second, name)), name
    assert not torch.equal(first.raw, second.raw)
    uniform = MaskConfig(inter_sampling="uniform")
    same = make_views(batch, uniform), make_views(dataclasses.replace(other, seed=batch.seed), uniform)
    assert torch.equal(same[0].inter_mask, same[1].inter_mask)


def test_another_epoch_gives_other_masks(make_batch):
    first, second = (make_views(make_batch(epoch=epoch), MaskConfig()) for epoch in (0, 1))
    for clip in range(5):
        assert not torch.equal(first.inter_mask[clip], second.inter_mask[clip])
        assert not torch.equal(first.intra_mask[clip], second.intra_mask[clip])


def test_views_leave_the_global_random_state_alone(make_batch):
    batch = make_batch()
    torch.manual_seed(1)
    first, state = make_views(batch, MaskConfig()), torch.get_rng_state()
    torch.manual_seed(2)
    second = make_views(batch, MaskConfig())
    assert all(torch.equal(value, getattr(second, name)) for name, value in fields(first).items())
    torch.manual_seed(1)
    assert torch.equal(state, torch.get_rng_state())


# -------------------------------------------------------------------------------------------------- inter-patch view


@pytest.mark.parametrize("ratio", [0.45, 0.55, 0.65, 0.75, 0.85])
@pytest.mark.parametrize("seconds", [0.96, 5.0])
def test_exactly_the_ratio_is_masked_in_every_clip(make_batch, ratio, seconds):
    batch = make_batch([0, 1, 2], seconds=seconds)
    views = make_views(batch, MaskConfig(inter_ratio=ratio))
    n = views.raw.shape[1]
    assert (views.inter_mask.sum(1) == round(ratio * n)).all()
    assert views.ids_keep.shape == (3, n - round(ratio * n))


@given(ratio=st.floats(0.01, 0.99), first=st.integers(0, 1000))
def test_the_visible_patches_are_those_not_masked_in_order(make_batch, ratio, first):
    views = make_views(make_batch([first, first + 1]), MaskConfig(inter_ratio=ratio))
    for clip in range(2):
        expected = [n for n in range(48) if not views.inter_mask[clip, n]]
        assert views.ids_keep[clip].tolist() == expected


def test_the_weight_is_a_gaussian_of_the_patch_s_gradient(make_batch):
    batch = make_batch()
    weight = make_views(batch, MaskConfig()).weight
    for b, clip in enumerate(batch.hog.tolist()):
        mu = sum(clip) / len(clip)
        variance = sum((x - mu) ** 2 for x in clip) / len(clip)
        expected = [math.exp(-((x - mu) ** 2) / variance) for x in clip]
        assert weight[b].tolist() == pytest.approx(expected, rel=1e-3, abs=1e-12)


def chi_square(counts: np.ndarray, probability: np.ndarray) -> float:
    """Pearson's statistic, over the places expected at least five times."""
    expected = counts.sum() * probability
    often = expected >= 5
    return float(((counts - expected)[often] ** 2 / expected[often]).sum())


@pytest.mark.parametrize(
    ("sampling", "form", "power"), [("hog", "gaussian", 1.0), ("hog", "printed", -1.0), ("uniform", "gaussian", 0.0)]
)
def test_the_first_patch_masked_is_drawn_in_proportion_to_its_weight(make_batch, sampling, form, power):
    """One of eight patches is masked, so the probabilities are exact: w / sum(w)."""
    batch = repeated(make_batch(), 0, 4000)
    config = MaskConfig(inter_ratio=0.125, inter_sampling=sampling, hog_form=form)
    counts = make_views(batch, config).inter_mask.sum(0).numpy()
    weight = kernels.patch_weight(batch.hog[:1])[0].double().numpy() ** power
    assert counts.sum() == 4000
    assert chi_square(counts, weight / weight.sum()) < 30  # 7 degrees of freedom: 1e-4
    assert chi_square(counts, np.roll(weight, 1) / weight.sum()) > 100 or power == 0.0


def test_formula_1_as_printed_changes_the_draw_and_not_the_weight_of_formula_2(make_batch):
    batch = make_batch()
    gaussian, printed = (make_views(batch, MaskConfig(hog_form=form)) for form in ("gaussian", "printed"))
    assert not torch.equal(gaussian.inter_mask, printed.inter_mask)
    assert torch.equal(gaussian.weight, printed.weight)


# -------------------------------------------------------------------------------------------------- intra-patch view


def test_masked_pixels_are_zero_and_the_others_untouched(make_batch):
    views = make_views(make_batch(), MaskConfig())
    assert views.intra_mask.any() and (views.intra[views.intra_mask] == 0).all()
    assert torch.equal(views.intra[~views.intra_mask], views.raw[~views.intra_mask])


def runs(line: torch.Tensor) -> list[int]:
    """Lengths of the runs of True."""
    text = "".join("1" if value else " " for value in line.tolist())
    return [len(run) for run in text.split()]


def kind_of(square: torch.Tensor) -> str:
    """How a 16 x 16 patch is masked; fails on anything but one band along time, one along frequency, or both."""
    frames, bins = square.all(dim=1), square.all(dim=0)
    assert torch.equal(square, frames[:, None] | bins[None, :])
    for line in (frames, bins):
        assert runs(line) in ([], [1], [2], [3], [4])
    return {(True, False): "time", (False, True): "frequency", (True, True): "both", (False, False): "none"}[
        bool(frames.any()), bool(bins.any())
    ]


def test_a_touched_patch_has_a_time_band_a_frequency_band_or_both(make_batch):
    views = make_views(repeated(make_batch(), 0, 400), MaskConfig())
    kinds = [[kind_of(square.reshape(16, 16)) for square in clip] for clip in views.intra_mask]
    touched = [sum(kind != "none" for kind in clip) for clip in kinds]
    assert max(touched) == 4 and min(touched) == 0  # at most half of the eight
    counts = {kind: sum(clip.count(kind) for clip in kinds) for kind in ("time", "frequency", "both")}
    observed = np.array(list(counts.values()))
    assert chi_square(observed, np.array([0.3, 0.3, 0.4])) < 18.4  # 2 degrees of freedom: 1e-4


@pytest.mark.parametrize(
    ("p_time", "p_freq", "kind"), [(1.0, 0.0, "time"), (0.0, 1.0, "frequency"), (0.0, 0.0, "both")]
)
def test_the_probabilities_choose_the_kind_of_band(make_batch, p_time, p_freq, kind):
    views = make_views(make_batch(), MaskConfig(intra_p_time=p_time, intra_p_freq=p_freq))
    kinds = {kind_of(square.reshape(16, 16)) for clip in views.intra_mask for square in clip}
    assert kinds == {kind, "none"}


def test_shares_and_widths_are_options(make_batch):
    batch = make_batch()
    none = make_views(batch, MaskConfig(intra_max_share=0.0))
    assert not none.intra_mask.any() and torch.equal(none.intra, none.raw)
    narrow = make_views(
        batch, MaskConfig(intra_max_share=1.0, intra_max_width=0.0625, intra_p_time=1.0, intra_p_freq=0.0)
    )
    assert set(narrow.intra_mask.sum(2).unique().tolist()) == {0, 16}


# ------------------------------------------------------------------------------------------------------------ silence


def test_a_flat_clip_has_equal_weights_and_finite_views(make_batch):
    batch = make_batch([0, 1])
    flat = dataclasses.replace(batch, fbank=torch.full_like(batch.fbank, -1.2), hog=torch.zeros_like(batch.hog))
    for form in ("gaussian", "printed"):
        views = make_views(flat, MaskConfig(hog_form=form))
        assert (views.weight == 1).all()
        assert (views.inter_mask.sum(1) == 36).all()
        assert all(value.isfinite().all() for value in fields(views).values())


def test_views_never_make_the_host_wait(make_batch, no_waiting):
    batch = make_batch()
    with no_waiting():
        make_views(batch, MaskConfig())
