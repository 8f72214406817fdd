"""Multi-SSL against Formulas 2-10 computed apart, one pass a view; and who gets a gradient."""

import dataclasses
import math

import numpy as np
import pytest
import torch

from fastsskd.config import LossConfig, MaskConfig
from fastsskd.pretrain import Pretrain
from fastsskd.views import cloned, make_views

TERMS = [f"{kind}_{view}" for kind in ("restore", "mse", "kl", "contrast") for view in ("intra", "inter")]
OFF = dict.fromkeys(TERMS, False)


def names(terms) -> set[str]:
    """What a step reports when these terms are on: each with the health of its view."""
    health = {
        f"{kind}_{t.split('_')[1]}" for t in terms if t.startswith("restore") for kind in ("variance", "positions")
    }
    health |= {f"contrast_accuracy_{t.split('_')[1]}" for t in terms if t.startswith("contrast")}
    chance = {"contrast_chance"} if any(t.startswith("contrast") for t in terms) else set()
    return {*terms, "feature_std"} | health | chance


MASK = MaskConfig()


def paper_weight(hog: torch.Tensor) -> torch.Tensor:
    """(B, N) -> the factor of Formula 2, 1 / e^((x - mu)^2 / sigma^2), by hand."""
    rows = []
    for clip in hog.double().numpy():
        mu, variance = clip.mean(), ((clip - clip.mean()) ** 2).mean()
        rows.append(1.0 / np.exp((clip - mu) ** 2 / variance))
    return torch.from_numpy(np.stack(rows)).float()


def paper_terms(model, batch, loss: LossConfig) -> dict[str, torch.Tensor]:
    """All eight terms with their graph, each view in a pass of its own, each formula spelled out."""
    views = make_views(batch, MASK)
    raw = model.features(views.raw)
    if not loss.raw_gradient:
        raw = raw.detach()
    features = {"intra": model.features(views.intra), "inter": model.features_inter(views.raw, views.ids_keep)}
    target = model.decode(raw) if loss.restore_target == "res_raw" else views.raw
    if not loss.raw_gradient:
        target = target.detach()
    hidden = {"intra": views.intra_mask, "inter": views.inter_mask[..., None] & torch.ones_like(views.intra_mask)}
    terms = {}
    for name, pre in features.items():
        error = (model.decode(pre) - target) ** 2
        if loss.hog_weight:
            error = error * paper_weight(batch.hog)[:, :, None]
        clips = [e[m].mean() for e, m in zip(error, hidden[name], strict=True)]
        terms[f"restore_{name}"] = torch.stack(clips).mean() if loss.restore_on == "masked" else error.mean()
        terms[f"mse_{name}"] = ((pre - raw) ** 2).mean()
        p, q = raw.softmax(-1), pre.softmax(-1)
        terms[f"kl_{name}"] = (p * (p / q).log()).sum(-1).mean()
        a, b = pre.mean(1), raw.mean(1)
        cosine = (a @ b.T) / (a.norm(dim=1)[:, None] * b.norm(dim=1)[None, :])
        odds = (cosine / loss.tau).exp()
        terms[f"contrast_{name}"] = -(odds.diagonal() / odds.sum(1)).log().mean()
    return terms


@pytest.mark.parametrize("raw_gradient", [False, True])
@pytest.mark.parametrize("restore_target", ["spectrogram", "res_raw"])
def test_clones_are_the_mean_over_as_many_masks(make_model, make_batch, raw_gradient, restore_target):
    """Losses and gradients are those of a step for each round of masks, which have the raw view's pass in common."""
    loss, batch, model = (
        LossConfig(raw_gradient=raw_gradient, restore_target=restore_target),
        make_batch(),
        make_model(),
    )
    rounds = [dataclasses.replace(batch, seed=seed) for seed in cloned(batch, 3).seed.chunk(3)]
    means = [Pretrain(model, loss, MASK)(own) for own in rounds]
    (sum(total for total, _ in means) / 3).backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    total, metrics = Pretrain(model, loss, dataclasses.replace(MASK, clones=3))(batch)
    total.backward()
    assert total.item() == pytest.approx(sum(total.item() for total, _ in means) / 3, rel=1e-5)
    for name in (*TERMS, "feature_std", "contrast_accuracy_intra", "contrast_chance", "variance_inter"):
        assert metrics[name].item() == pytest.approx(sum(m[name].item() for _, m in means) / 3, rel=1e-4), name
    for name, p in model.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(p.grad, expected[name], rtol=1e-3, atol=1e-5)


def paper_total(terms: dict[str, torch.Tensor], loss: LossConfig) -> torch.Tensor:
    """Formula 10."""
    t = {name: value if getattr(loss, name) else 0.0 * value for name, value in terms.items()}
    restore, mse = t["restore_intra"] + t["restore_inter"], t["mse_intra"] + t["mse_inter"]
    kl, contrast = t["kl_intra"] + t["kl_inter"], t["contrast_intra"] + t["contrast_inter"]
    return loss.alpha * (loss.restore_scale * restore + mse) + loss.beta * kl + contrast


def used_model(make_model):
    """A small model whose weights are not as small as fresh ones, so that every term has something to say."""
    model = make_model()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model


OPTIONS = {
    "defaults": LossConfig(),
    "weights": LossConfig(alpha=0.7, beta=0.3, tau=0.2, restore_scale=20.0),
    "no_hog_weight": LossConfig(hog_weight=False),
    "masked_only": LossConfig(restore_on="masked"),
    "res_raw": LossConfig(restore_target="res_raw"),
    "raw_gradient": LossConfig(raw_gradient=True),
    "res_raw_with_gradient": LossConfig(restore_target="res_raw", raw_gradient=True, alpha=0.7, beta=0.3),
    "masked_without_weight": LossConfig(restore_on="masked", hog_weight=False, alpha=2.0),
}


@pytest.mark.parametrize("option", OPTIONS)
def test_loss_terms_and_every_gradient_are_the_paper_s(make_model, make_batch, option):
    loss, batch = OPTIONS[option], make_batch()
    model, twin = used_model(make_model), used_model(make_model)
    total, metrics = Pretrain(model, loss, MASK)(batch)
    total.backward()
    terms = paper_terms(twin, batch, loss)
    expected = paper_total(terms, loss)
    expected.backward()
    assert set(metrics) == names(TERMS)
    for name in TERMS:
        assert metrics[name].item() == pytest.approx(terms[name].item(), rel=1e-4), name
        assert metrics[name].item() > 0
    assert total.item() == pytest.approx(expected.item(), rel=1e-5)
    for (name, own), (_, other) in zip(model.named_parameters(), twin.named_parameters(), strict=True):
        if name.startswith("head."):
            assert own.grad is None and not own.requires_grad
        else:
            torch.testing.assert_close(own.grad, other.grad, rtol=2e-3, atol=2e-6, msg=lambda m, n=name: f"{n}: {m}")


def test_the_options_differ_from_each_other(make_model, make_batch):
    """Otherwise the comparison above could not tell one from another."""
    totals = [Pretrain(used_model(make_model), loss, MASK)(make_batch())[0].item() for loss in OPTIONS.values()]
    same = {"raw_gradient": "defaults"}  # a matter of gradients alone
    distinct = {round(total, 6) for name, total in zip(OPTIONS, totals, strict=True) if name not in same}
    assert len(distinct) == len(OPTIONS) - len(same)


@pytest.mark.parametrize("term", TERMS)
def test_each_term_stands_alone_with_its_own_weight(make_model, make_batch, term):
    loss = LossConfig(**{**OFF, term: True}, alpha=0.7, beta=0.3)
    batch, model = make_batch(), used_model(make_model)
    total, metrics = Pretrain(model, loss, MASK)(batch)
    total.backward()
    assert set(metrics) == names([term])
    expected = paper_terms(used_model(make_model), batch, loss)[term].item()
    weight = {"restore": 0.7, "mse": 0.7, "kl": 0.3, "contrast": 1.0}[term.split("_")[0]]
    assert total.item() == pytest.approx(weight * expected, rel=1e-4)
    # Only the inter view goes through the MAE module, and only reconstruction through the decoder.
    assert (model.mae.mask_token.grad.abs().sum() > 0) == term.endswith("inter")
    decoded = model.decoder[0].weight.grad
    assert (decoded is not None and bool(decoded.abs().sum() > 0)) == term.startswith("restore")


@pytest.mark.parametrize("term", TERMS)
def test_each_term_can_be_left_out(make_model, make_batch, term):
    loss = LossConfig(**{term: False}, alpha=0.7, beta=0.3)
    total, metrics = Pretrain(used_model(make_model), loss, MASK)(make_batch())
    assert set(metrics) == names({*TERMS} - {term})
    expected = paper_total(paper_terms(used_model(make_model), make_batch(), loss), loss)
    assert total.item() == pytest.approx(expected.item(), rel=1e-5)


# ---------------------------------------------------------------------------------------------------------- gradients


def gradients(make_model, batch, loss: LossConfig) -> dict[str, torch.Tensor]:
    model = used_model(make_model)
    Pretrain(model, loss, MASK)(batch)[0].backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("term", ["mse_intra", "mse_inter", "kl_intra", "contrast_inter"])
def test_the_raw_view_gets_a_gradient_only_if_asked(make_model, make_batch, term):
    loss = LossConfig(**{**OFF, term: True})
    fixed = gradients(make_model, make_batch(), loss)
    moving = gradients(make_model, make_batch(), dataclasses.replace(loss, raw_gradient=True))
    assert not torch.allclose(fixed["patch_embed.weight"], moving["patch_embed.weight"], rtol=0.1, atol=1e-7)


def test_the_raw_view_has_no_graph_unless_asked(make_model, make_batch):
    views = make_views(make_batch(), MASK)
    for wanted in (False, True):
        module = Pretrain(make_model(), LossConfig(raw_gradient=wanted), MASK)
        assert module._features(views)[0].requires_grad is wanted


def test_every_part_but_the_class_head_learns(make_model, make_batch):
    model = used_model(make_model)
    found = gradients(make_model, make_batch(), LossConfig())
    for name, _ in model.named_parameters():
        assert (name in found) is (not name.startswith("head.")), name
        if name in found:
            assert (found[name] != 0).any(), name


def test_a_head_frozen_for_ssl_and_the_rest_thawed_after_labels(make_model):
    """The same weights go from stage to stage: what the last stage froze must learn again."""
    model = make_model(pooling="attentive")
    model.requires_grad_(False)
    Pretrain(model, LossConfig(), MASK)
    assert {name for name, p in model.named_parameters() if not p.requires_grad} == {
        name for name, _ in model.named_parameters() if name.startswith(("head.", "pool."))
    }
    Pretrain(make_model(num_classes=0), LossConfig(), MASK)  # a set without labels has no head to freeze


# ------------------------------------------------------------------------------------------------------------- conduct


def test_two_views_in_one_pass_are_two_passes(make_model, make_batch):
    model, views = used_model(make_model), make_views(make_batch(), MASK)
    raw, intra, inter = Pretrain(model, LossConfig(), MASK)._features(views)
    torch.testing.assert_close(raw, model.features(views.raw), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(intra, model.features(views.intra), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(inter, model.features_inter(views.raw, views.ids_keep), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(intra, inter, atol=1e-2)


def test_the_loss_does_not_depend_on_the_order_of_the_clips(make_model, make_batch):
    module = Pretrain(used_model(make_model), LossConfig(), MASK)
    total, metrics = module(make_batch())
    permuted, others = module(make_batch([3, 0, 4, 1, 2]))
    assert permuted.item() == pytest.approx(total.item(), rel=1e-5)
    for name in metrics:
        assert others[name].item() == pytest.approx(metrics[name].item(), rel=1e-4), name


def test_clips_are_varied_before_they_are_seen(make_model, make_batch):
    def louder(batch):
        return dataclasses.replace(batch, fbank=batch.fbank + 1.0, hog=batch.hog.flip(1))

    model = used_model(make_model)
    plain, varied = Pretrain(model, LossConfig(), MASK), Pretrain(model, LossConfig(), MASK, vary=louder)
    parts, expected = (
        [make_batch([0, 1, 2]), make_batch([3, 4])],
        [louder(make_batch([0, 1, 2])), louder(make_batch([3, 4]))],
    )
    for batch, other in zip(parts, expected, strict=True):
        assert varied(batch)[0] == plain(other)[0]
    for batch, other in zip(varied(parts), plain(expected), strict=True):  # looked at ahead, and not varied twice
        assert torch.equal(batch.fbank, other.fbank) and varied(batch)[0] == plain(other)[0]


@pytest.mark.parametrize("option", [{}, {"restore_target": "res_raw"}, {"restore_on": "masked"}])
def test_micro_batches_that_know_of_each_other_are_one_batch(make_model, make_batch, option):
    """Losses and gradients, with the contrast's negatives from all of them; not so without looking ahead."""
    model = make_model()
    module = Pretrain(model, LossConfig(**option), MASK)
    parts = [make_batch([0, 1]), make_batch([2]), make_batch([3, 4])]

    def summed(batches):
        model.zero_grad()
        total = sum(module(batch)[0] * len(batch) / 5 for batch in batches)
        total.backward()
        return total.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]

    (whole, gradients), (cut, others) = summed([make_batch([0, 1, 2, 3, 4])]), summed(module(parts))
    torch.testing.assert_close(cut, whole, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(others, gradients, rtol=1e-3, atol=1e-5)
    assert summed(parts)[0] < whole - 0.1  # fewer to be mistaken for


def test_looking_ahead_is_for_a_contrast_with_fixed_keys(make_model):
    off = {"contrast_intra": False, "contrast_inter": False}
    for option, expected in (({}, True), ({"raw_gradient": True}, False), (off, False)):
        assert Pretrain(make_model(), LossConfig(**option), MASK).looks_ahead is expected


def test_metrics_are_detached_and_feature_std_tells_of_collapse(make_model, make_batch):
    module = Pretrain(used_model(make_model), LossConfig(), MASK)
    total, metrics = module(make_batch())
    assert total.requires_grad and not any(value.requires_grad for value in metrics.values())
    clips = module.model.features(make_views(make_batch(), MASK).raw).mean(1).detach().numpy()
    assert metrics["feature_std"].item() == pytest.approx(clips.std(axis=0).mean(), rel=1e-4)
    assert module(make_batch([1, 1, 1]))[1]["feature_std"].item() == pytest.approx(0, abs=1e-6)


def test_one_clip_alone_and_silence_are_finite(make_model, make_batch):
    batch = make_batch([0])
    silence = dataclasses.replace(batch, fbank=torch.full_like(batch.fbank, -1.3), hog=torch.zeros_like(batch.hog))
    for clip in (batch, silence):
        model = make_model()
        total, metrics = Pretrain(model, LossConfig(), MASK)(clip)
        total.backward()
        assert metrics["contrast_intra"] == metrics["contrast_inter"] == 0
        assert math.isfinite(total.item())
        assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


def test_a_16_bit_model_has_float32_losses(make_model, make_batch):
    model = used_model(make_model)
    full, _ = Pretrain(model, LossConfig(), MASK)(make_batch())
    total, metrics = Pretrain(model.bfloat16(), LossConfig(), MASK)(make_batch())
    assert total.dtype == torch.float32 and all(value.dtype == torch.float32 for value in metrics.values())
    assert total.item() == pytest.approx(full.item(), rel=0.05)


def test_a_step_never_makes_the_host_wait(make_model, make_batch, no_waiting):
    module, batch = Pretrain(make_model(), LossConfig(), MASK), make_batch()
    with no_waiting():
        module(batch)[0].backward()
