"""Health of a pre-training against definitions written out, and what it makes of runs that learn nothing."""

import json
import math
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch

from fastsskd import health, losses
from fastsskd.config import LossConfig, MaskConfig
from fastsskd.patches import patchify
from fastsskd.pretrain import Pretrain
from fastsskd.views import make_views

GRID = (3, 8)


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape).astype(np.float32))


# --------------------------------------------------------------------------------------------------------- features


def test_effective_rank_is_roy_and_vetterli_s():
    features = draw(12, 5).numpy().astype(np.float64)
    # The singular values of centred features are the roots of the scatter matrix's eigenvalues.
    scatter = (features - features.mean(0)).T @ (features - features.mean(0))
    values = np.sqrt(np.linalg.eigvalsh(scatter))
    share = values / values.sum()
    expected = math.exp(-sum(p * math.log(p) for p in share))
    assert health.effective_rank(torch.from_numpy(features)) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("used", [1, 2, 5])
def test_effective_rank_counts_dimensions_used_alike(used):
    basis = np.linalg.qr(np.random.default_rng(1).standard_normal((8, 8)))[0]
    features = np.concatenate([np.eye(used), -np.eye(used)]) @ basis[:used] + 3.0
    assert health.effective_rank(torch.from_numpy(features)) == pytest.approx(used, rel=1e-6)


def test_equal_features_have_rank_zero():
    assert health.effective_rank(torch.ones(6, 4)) == 0.0
    found = health.of_features(torch.full((6, 4), 0.3))
    assert found["effective_rank"] == 0.0 and found["feature_spread"] == pytest.approx(0, abs=1e-6)
    assert found["rank_limit"] == 4


def test_features_that_cannot_tell_tell_nothing():
    assert health.of_features(None) == health.of_features(torch.ones(1, 4)) == {}
    assert health.of_features(torch.tensor([[1.0, math.nan], [1.0, 2.0]])) == {}


# --------------------------------------------------------------------------------------------------------- contrast


def test_contrast_accuracy_counts_clips_that_find_their_own_pair():
    raw = torch.eye(4)
    pred = torch.stack([raw[0], raw[2], raw[2], raw[3] + 0.9 * raw[0]])  # the second one is nearest to the third
    logits, own = losses.contrast_logits(pred, losses.gather_keys([raw], None)[0], 0.1)
    assert health.contrast_accuracy(logits, own).item() == 0.75
    assert health.contrast_chance(logits).item() == 0.25


def test_clips_that_another_rank_left_out_are_no_candidates():
    logits = torch.tensor([[0.3, 0.1, -math.inf, -math.inf, 0.2]])
    assert health.contrast_chance(logits).item() == pytest.approx(1 / 3)


# --------------------------------------------------------------------------------------------------- reconstruction


def spectrograms(clips: int = 4) -> torch.Tensor:
    """Clips with a mean and a slope over mel bins of their own, ``(B, N, 256)``."""
    frames, bins = GRID[0] * 16, GRID[1] * 16
    loud, slope = draw(clips, seed=1)[:, None, None], draw(clips, seed=2)[:, None, None] / bins
    return patchify(draw(clips, frames, bins, seed=3) * 0.3 + loud + slope * torch.arange(bins) + 1.0)


def by_hand(target, weight, mask):
    """Formula 2 of two predictions, written out on ``(T, F)`` pictures with numpy."""
    from fastsskd.patches import unpatchify

    x = unpatchify(target, GRID).double().numpy()
    ones = torch.ones_like(target)
    w = ones if weight is None else weight[..., None] * ones
    m = ones if mask is None else mask.to(ones.dtype)
    w, m = (unpatchify(v, GRID).double().numpy() for v in (w, m))
    mean, positions = [], []
    for b in range(len(x)):
        pixels = m[b].sum()
        own = (w * m * x)[b].sum() / (w * m)[b].sum()
        mean.append((w[b] * m[b] * (x[b] - own) ** 2).sum() / pixels)
        others = [k for k in range(len(x)) if k != b]
        spectrum = (w * m * x)[others].sum(axis=(0, 1)) / (w * m)[others].sum(axis=(0, 1))
        positions.append((w[b] * m[b] * (x[b] - spectrum) ** 2).sum() / pixels)
    return np.mean(mean), np.mean(positions)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_baselines_are_formula_2_of_the_two_predictions(weighted, masked):
    target = spectrograms()
    weight = torch.from_numpy(np.random.default_rng(5).random(target.shape[:2])).float() if weighted else None
    mask = draw(*target.shape, seed=6) > 0 if masked else None
    found = health.restore_baselines(target, GRID, weight, mask)
    for own, expected in zip(found, by_hand(target, weight, mask), strict=True):
        assert own.item() == pytest.approx(expected, rel=1e-4)


def test_the_loss_of_predicting_the_mean_is_the_first_baseline():
    target = spectrograms()
    weight = torch.from_numpy(np.random.default_rng(5).random(target.shape[:2])).float()
    mean = (weight[..., None] * target).sum((1, 2)) / (weight.sum(1) * 256)
    loss = losses.restore(mean[:, None, None].expand_as(target), target, weight)
    assert loss.item() == pytest.approx(health.restore_baselines(target, GRID, weight)[0].item(), rel=1e-4)


def test_clips_with_the_same_spectrum_are_explained_by_positions():
    shape = torch.linspace(-2, 2, GRID[1] * 16).expand(5, GRID[0] * 16, -1)
    variance, positions = health.restore_baselines(patchify(shape + 0.1 * draw(*shape.shape)), GRID)
    shares = health.with_shares({"restore_inter": 0.5, "variance_inter": variance, "positions_inter": positions})
    assert variance.item() == pytest.approx(4 / 3, rel=0.05) and shares["positions_inter"] > 0.98


def test_one_clip_alone_and_silence_have_finite_baselines():
    for target in (spectrograms(1), torch.zeros(2, 24, 256)):
        assert all(value.isfinite() for value in health.restore_baselines(target, GRID))
        nothing = torch.zeros_like(target, dtype=torch.bool)
        assert all(value == 0 for value in health.restore_baselines(target, GRID, mask=nothing))


def test_shares_replace_the_baselines():
    metrics = {"loss": 2.0, "restore_intra": 0.2, "variance_intra": 0.8, "positions_intra": 0.6, "mse_inter": 1.0}
    shares = health.with_shares(metrics)
    assert shares == {
        "loss": 2.0,
        "restore_intra": 0.2,
        "mse_inter": 1.0,
        "explained_intra": pytest.approx(0.75),
        "positions_intra": pytest.approx(0.25),
    }
    assert health.with_shares({"loss": 1.0, "label": 1.0}) == {"loss": 1.0, "label": 1.0}
    assert "explained_intra" not in health.with_shares({**metrics, "variance_intra": 0.0})  # silence has none


# ----------------------------------------------------------------------------------------------------------- a step


@pytest.mark.parametrize("target", ["spectrogram", "res_raw"])
@pytest.mark.parametrize("on", ["all", "masked"])
def test_a_step_reports_the_health_of_its_own_views(make_model, make_batch, target, on):
    model, batch, loss = make_model(), make_batch(), LossConfig(restore_target=target, restore_on=on)
    module = Pretrain(model, loss, MaskConfig())
    _, metrics = module(batch)
    views = make_views(batch, MaskConfig())
    raw = model.features(views.raw)
    pixels = views.raw if target == "spectrogram" else model.decode(raw)
    hidden = {"intra": views.intra_mask, "inter": views.inter_mask[..., None].expand_as(views.intra_mask)}
    for view, features in (
        ("intra", model.features(views.intra)),
        ("inter", model.features_inter(views.raw, views.ids_keep)),
    ):
        mask = hidden[view] if on == "masked" else None
        expected = health.restore_baselines(pixels, model.grid_size, views.weight, mask)
        for name, value in zip(("variance", "positions"), expected, strict=True):
            assert metrics[f"{name}_{view}"].item() == pytest.approx(value.item(), rel=1e-4)
        similar = torch.nn.functional.cosine_similarity(features.mean(1)[:, None], raw.mean(1)[None], dim=-1)
        hits = sum(int(similar[b].argmax()) == b for b in range(len(similar)))
        assert metrics[f"contrast_accuracy_{view}"].item() == pytest.approx(hits / len(similar))
    assert metrics["contrast_chance"].item() == pytest.approx(1 / 5)
    torch.testing.assert_close(module.pooled, raw.mean(1).detach(), rtol=1e-5, atol=1e-6)


TWO_RANKS = """
    import json, sys
    import torch, torch.distributed as dist
    from fastsskd import health, losses
    rank = int(sys.argv[1])
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=sys.argv[2], rank=rank, world_size=2)
    own = slice(0, 4) if rank == 0 else slice(4, 7)   # one clip of the second rank could not be used
    generator = torch.Generator().manual_seed(0)
    pred, raw = torch.randn(7, 6, generator=generator), torch.randn(7, 6, generator=generator)
    pred = 0.7 * raw + pred
    logits, mine = losses.contrast_logits(pred[own], losses.gather_keys([raw[own]], 4)[0], 0.1)
    hits = health.contrast_accuracy(logits, mine) * len(mine)
    dist.all_reduce(hits)
    found = {"accuracy": hits.item() / 7, "chance": health.contrast_chance(logits).item()}
    print(json.dumps(found | health.of_features(raw[own])))
    if rank == 0:
        print(json.dumps(health.of_features(None)))
    else:
        health.of_features(None)
    dist.barrier()
    dist.destroy_process_group()
"""


def test_two_ranks_see_the_health_of_one(tmp_path):
    script = tmp_path / "rank.py"
    script.write_text(textwrap.dedent(TWO_RANKS), encoding="utf-8")
    command = [sys.executable, str(script)]
    meeting = f"file://{tmp_path}/meeting"
    ranks = [subprocess.Popen([*command, str(rank), meeting], stdout=subprocess.PIPE, text=True) for rank in (0, 1)]
    first, second = (process.communicate(timeout=120)[0].splitlines() for process in ranks)
    generator = torch.Generator().manual_seed(0)
    pred, raw = torch.randn(7, 6, generator=generator), torch.randn(7, 6, generator=generator)
    logits, own = losses.contrast_logits(0.7 * raw + pred, losses.gather_keys([raw], None)[0], 0.1)
    expected = health.of_features(raw)
    expected |= {"accuracy": health.contrast_accuracy(logits, own).item(), "chance": pytest.approx(1 / 7)}
    assert 0 < expected["accuracy"] < 1
    for lines in (first, second):
        found = json.loads(lines[0])
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert found[name] == (pytest.approx(value, rel=1e-5) if isinstance(value, float) else value), name
    assert json.loads(first[1]) == {}


# ----------------------------------------------------------------------------------------------------- plain words

WELL = {
    "step": 2000,
    "effective_rank": 12.0,
    "rank_limit": 23.0,
    "feature_spread": 0.4,
    "explained_intra": 0.9,
    "explained_inter": 0.5,
    "positions_intra": 0.2,
    "positions_inter": 0.2,
    "contrast_accuracy_intra": 0.9,
    "contrast_accuracy_inter": 0.3,
    "contrast_chance": 1 / 24,
}
ILL = {
    "effective rank 1.2 of 23": {"effective_rank": 1.2},
    "all clips get the same ones but for 0.2 %": {"feature_spread": 0.002},
    "inter view no better than each clip's mean after 2000 steps (-1 % of": {"explained_inter": -0.01},
    "intra view no better than the mean spectrum after 2000 steps (10 % of": {"explained_intra": 0.1},
    "contrast of the inter view at chance after 2000 steps: 5 % of the clips": {"contrast_accuracy_inter": 0.05},
}


def test_a_healthy_line_and_a_labelled_stage_s_are_not_remarked_on():
    assert health.problems(WELL, 20) == {}
    assert health.problems({"step": 500, "loss": 1.0, "label": 1.0}, 20) == {}


@pytest.mark.parametrize("words", ILL)
def test_each_illness_is_named(words):
    (text,) = health.problems({**WELL, **ILL[words]}, 20).values()
    assert words in text


def test_nothing_is_expected_of_the_first_steps_but_that_features_differ():
    untrained = {**WELL, "explained_inter": -0.3, "contrast_accuracy_intra": 0.04, "step": 219}
    assert health.problems(untrained, 20) == {}
    assert len(health.problems({**untrained, "step": 220}, 20)) == 2
    spectrum = {**WELL, "explained_inter": 0.1, "step": 1019}
    assert health.problems(spectrum, 20) == {}
    assert len(health.problems({**spectrum, "step": 1020}, 20)) == 1
    assert "collapse" in health.problems({**untrained, "effective_rank": 1.0}, 20)


def test_a_handful_of_clips_is_no_contrast_and_no_collapse():
    few = {**WELL, "rank_limit": 3.0, "effective_rank": 1.0, "contrast_chance": 0.5, "contrast_accuracy_inter": 0.5}
    assert health.problems(few, 20) == {}


def test_a_problem_is_said_once_and_again_when_it_comes_back():
    watch, ill = health.Watch(), {**WELL, "effective_rank": 1.2}
    said = [len(watch.see(line, 20)) for line in (WELL, ill, WELL, ill, ill, ill, ill, WELL, ill, ill)]
    assert said == [0, 0, 0, 0, 1, 0, 0, 0, 0, 1]
