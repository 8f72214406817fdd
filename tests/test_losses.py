"""Each formula against the paper's sum, written as loops over plain numbers."""

import json
import math
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fastsskd_kernels as kernels
from fastsskd import losses


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape).astype(np.float32))


# ------------------------------------------------------------------------------------- the formulas, one number a time


def naive_weight(x: list[float]) -> list[float]:
    """The factor of Formula 2, 1 / e^((x - mu)^2 / sigma^2), of one clip's patches."""
    mu = sum(x) / len(x)
    variance = sum((value - mu) ** 2 for value in x) / len(x)
    return [1.0 / math.exp((value - mu) ** 2 / variance) for value in x]


def naive_restore(pred, target, weight=None, mask=None) -> float:
    clips = []
    for b in range(len(pred)):
        total, count = 0.0, 0
        for n, p in np.ndindex(*pred.shape[1:]):
            if mask is None or mask[b, n, p]:
                factor = 1.0 if weight is None else float(weight[b, n])
                total += factor * (float(pred[b, n, p]) - float(target[b, n, p])) ** 2
                count += 1
        clips.append(total / count)
    return sum(clips) / len(clips)


def naive_softmax(row) -> list[float]:
    exponentials = [math.exp(float(value)) for value in row]
    return [value / sum(exponentials) for value in exponentials]


def naive_kl(pred, raw) -> float:
    total = 0.0
    for b, n in np.ndindex(*pred.shape[:2]):
        p, q = naive_softmax(raw[b, n]), naive_softmax(pred[b, n])
        total += sum(p_d * math.log(p_d / q_d) for p_d, q_d in zip(p, q, strict=True))
    return total / (pred.shape[0] * pred.shape[1])


def naive_cosine(a, b) -> float:
    dot = sum(float(x) * float(y) for x, y in zip(a, b, strict=True))
    return dot / math.sqrt(sum(float(x) ** 2 for x in a)) / math.sqrt(sum(float(y) ** 2 for y in b))


def naive_contrast(pred, raw, tau: float) -> float:
    total = 0.0
    for b in range(len(pred)):
        row = [math.exp(naive_cosine(pred[b], raw[k]) / tau) for k in range(len(raw))]
        total -= math.log(row[b] / sum(row))
    return total / len(pred)


# ---------------------------------------------------------------------------------------------------- reconstruction


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_restore_is_formula_2(weighted, masked):
    pred, target = draw(2, 5, 7), draw(2, 5, 7, seed=1)
    weight = draw(2, 5, seed=2).abs() if weighted else None
    mask = draw(2, 5, 7, seed=3) > 0.3 if masked else None
    expected = naive_restore(pred, target, weight, mask)
    assert losses.restore(pred, target, weight, mask).item() == pytest.approx(expected, rel=1e-5)


def test_restore_with_the_weight_of_the_patches_own_gradients():
    pred, target, x = draw(3, 6, 4), draw(3, 6, 4, seed=1), draw(3, 6, seed=2).abs()
    weight = np.array([naive_weight([float(value) for value in clip]) for clip in x])
    expected = naive_restore(pred, target, weight)
    assert losses.restore(pred, target, kernels.patch_weight(x)).item() == pytest.approx(expected, rel=1e-5)


def test_a_patch_of_weight_zero_costs_nothing_and_gets_no_gradient():
    pred, target, weight = draw(1, 2, 3).requires_grad_(), draw(1, 2, 3, seed=1), torch.tensor([[0.0, 1.0]])
    losses.restore(pred, target, weight).backward()
    assert (pred.grad[0, 0] == 0).all()
    torch.testing.assert_close(pred.grad[0, 1], 2 * (pred - target).detach()[0, 1] / 6)


def test_restore_with_nothing_masked_is_zero_and_so_is_its_gradient():
    pred = draw(1, 2, 3).requires_grad_()
    loss = losses.restore(pred, draw(1, 2, 3, seed=1), None, torch.zeros(1, 2, 3, dtype=torch.bool))
    loss.backward()
    assert loss.item() == 0.0 and (pred.grad == 0).all()


# ----------------------------------------------------------------------------------------------------------- features


def test_feature_mse_is_formula_4():
    pred, raw = draw(2, 3, 5), draw(2, 3, 5, seed=1)
    assert losses.feature_mse(pred, raw).item() == pytest.approx(naive_restore(pred, raw), rel=1e-5)


def test_feature_kl_is_formula_5_with_its_log():
    pred, raw = draw(2, 3, 5), draw(2, 3, 5, seed=1)
    assert losses.feature_kl(pred, raw).item() == pytest.approx(naive_kl(pred, raw), rel=1e-5)
    assert naive_kl(pred, raw) != pytest.approx(naive_kl(raw, pred), rel=1e-2)  # so the order above is tested too


@given(seed=st.integers(0, 10**6), shift=st.floats(-50, 50))
def test_feature_kl_is_never_negative_and_ignores_what_a_softmax_ignores(seed, shift):
    pred, raw = draw(2, 3, 8, seed=seed), draw(2, 3, 8, seed=seed + 1)
    value = losses.feature_kl(pred, raw).item()
    assert value > 0
    assert losses.feature_kl(pred + shift, raw).item() == pytest.approx(value, abs=1e-4)
    assert losses.feature_kl(raw, raw).item() == pytest.approx(0, abs=1e-6)


# ----------------------------------------------------------------------------------------------------------- contrast


@pytest.mark.parametrize("tau", [0.05, 0.1, 1.0])
def test_contrast_is_formula_8_with_its_minus_sign(tau):
    pred, raw = draw(4, 6), draw(4, 6, seed=1)
    assert losses.contrast(pred, raw, tau).item() == pytest.approx(naive_contrast(pred, raw, tau), rel=1e-4)
    # The sum in the denominator runs over the raw view's clips, not over the masked view's: the order matters.
    assert naive_contrast(pred, raw, tau) != pytest.approx(naive_contrast(raw, pred, tau), rel=1e-3)


def test_contrast_rewards_the_clip_s_own_partner():
    raw = draw(6, 16)
    own, other = losses.contrast(raw, raw, 0.1), losses.contrast(raw, raw.roll(1, 0), 0.1)
    assert 0 < own.item() < math.log(6) < other.item()


def test_contrast_is_cosine_so_length_does_not_matter():
    pred, raw = draw(4, 6), draw(4, 6, seed=1)
    scaled = losses.contrast(pred * torch.tensor([[1.0], [5.0], [0.1], [30.0]]), 7 * raw, 0.1)
    torch.testing.assert_close(scaled, losses.contrast(pred, raw, 0.1))


def test_contrast_of_one_clip_or_of_zero_features_is_finite():
    assert losses.contrast(draw(1, 6), draw(1, 6, seed=1), 0.1).item() == 0.0
    silent = torch.zeros(3, 6, requires_grad=True)
    loss = losses.contrast(silent, torch.zeros(3, 6), 0.1)
    loss.backward()
    assert loss.item() == pytest.approx(math.log(3)) and silent.grad.isfinite().all()


TWO_RANKS = """
    import json, sys
    import torch, torch.distributed as dist
    from fastsskd import losses

    rank, store, out = int(sys.argv[1]), sys.argv[2], sys.argv[3]
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    generator = torch.Generator().manual_seed(0)
    pred, raw = torch.randn(5, 6, generator=generator), torch.randn(5, 6, generator=generator)
    own = slice(0, 3) if rank == 0 else slice(3, 5)
    pred, raw = pred[own].clone().requires_grad_(), raw[own].clone().requires_grad_()
    loss = losses.contrast(pred, raw, 0.2, slots=3)
    (loss * len(pred) * 2 / 5).backward()
    parts = (slice(0, 2), slice(2, 3)) if rank == 0 else (slice(0, 1), slice(1, 2))
    keys = losses.gather_keys([raw[part].detach() for part in parts], 2)
    cut = [losses.info_nce(*losses.contrast_logits(pred[p], k, 0.2)) * len(pred[p]) for p, k in zip(parts, keys)]
    found = {"loss": loss.item(), "pred": pred.grad.tolist(), "raw": raw.grad.tolist(), "cut": float(sum(cut))}
    with open(f"{out}.{rank}", "w") as file:
        json.dump(found, file)
    dist.barrier()
    dist.destroy_process_group()
"""


def test_two_ranks_of_unequal_size_contrast_against_the_global_batch(tmp_path):
    """Losses and gradients of 3 + 2 clips on two ranks are those of 5 clips on one, keys' gradients included."""
    command = [sys.executable, "-c", textwrap.dedent(TWO_RANKS)]
    files = [str(tmp_path / "store"), str(tmp_path / "out")]
    processes = [subprocess.Popen([*command, str(rank), *files], stderr=subprocess.PIPE) for rank in (0, 1)]
    errors = [process.communicate(timeout=240)[1].decode() for process in processes]
    assert all(process.returncode == 0 for process in processes), "\n".join(errors)
    ranks = [json.loads((tmp_path / f"out.{rank}").read_text()) for rank in (0, 1)]

    generator = torch.Generator().manual_seed(0)
    pred = torch.randn(5, 6, generator=generator).requires_grad_()
    raw = torch.randn(5, 6, generator=generator).requires_grad_()
    whole = losses.contrast(pred, raw, 0.2)
    whole.backward()
    assert (3 * ranks[0]["loss"] + 2 * ranks[1]["loss"]) / 5 == pytest.approx(whole.item(), rel=1e-5)
    assert (ranks[0]["cut"] + ranks[1]["cut"]) / 5 == pytest.approx(whole.item(), rel=1e-5)  # in micro-batches
    for name, gradient in (("pred", pred.grad), ("raw", raw.grad)):
        both = torch.tensor(ranks[0][name] + ranks[1][name]) / 2  # the engine averages over ranks
        torch.testing.assert_close(both, gradient, rtol=1e-4, atol=1e-6)


# ------------------------------------------------------------------------------------------- labels and distillation


def test_label_cross_entropy_is_formula_11_on_soft_targets():
    logits, target = draw(3, 4), torch.from_numpy(np.random.default_rng(1).dirichlet(np.ones(4), 3))
    expected = 0.0
    for b in range(3):
        probs = naive_softmax(logits[b])
        expected -= sum(float(target[b, c]) * math.log(probs[c]) for c in range(4)) / 3
    assert losses.label_cross_entropy(logits, target, False).item() == pytest.approx(expected, rel=1e-5)


def test_multi_label_cross_entropy_is_binary_per_class():
    logits, target = draw(3, 4), torch.from_numpy(np.random.default_rng(1).random((3, 4)))
    expected = 0.0
    for b, c in np.ndindex(3, 4):
        prob, true = 1 / (1 + math.exp(-float(logits[b, c]))), float(target[b, c])
        expected -= (true * math.log(prob) + (1 - true) * math.log(1 - prob)) / 12
    assert losses.label_cross_entropy(logits, target, True).item() == pytest.approx(expected, rel=1e-5)


def test_regression_is_formula_12():
    student, teacher = draw(3, 5), draw(3, 5, seed=1)
    expected = sum((float(student[b, d]) - float(teacher[b, d])) ** 2 for b, d in np.ndindex(3, 5)) / 15
    assert losses.regression(student, teacher).item() == pytest.approx(expected, rel=1e-5)


def test_losses_of_a_16_bit_model_are_float32_numbers():
    a, b = draw(4, 6).bfloat16(), draw(4, 6, seed=1).bfloat16()
    target = draw(4, 6, seed=2).softmax(-1)
    pairs = [
        (losses.restore(a[None], b[None]), losses.restore(a.float()[None], b.float()[None])),
        (losses.feature_mse(a, b), losses.feature_mse(a.float(), b.float())),
        (losses.feature_kl(a, b), losses.feature_kl(a.float(), b.float())),
        (losses.contrast(a, b, 0.1), losses.contrast(a.float(), b.float(), 0.1)),
        (losses.regression(a, b), losses.regression(a.float(), b.float())),
        (losses.label_cross_entropy(a, target, True), losses.label_cross_entropy(a.float(), target, True)),
        (losses.label_cross_entropy(a, target, False), losses.label_cross_entropy(a.float(), target, False)),
    ]
    for rounded, full in pairs:
        assert rounded.dtype == torch.float32 and rounded.item() == full.item()
