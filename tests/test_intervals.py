"""Bootstrap intervals: each resample's numbers against scikit-learn, and how often the interval holds the truth."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score

from fastsskd.evaluation import intervals
from fastsskd.evaluation.intervals import bootstrap
from fastsskd_kernels.ranking import resampled_average_precision


@given(seed=st.integers(0, 10_000), n=st.integers(1, 30), places=st.integers(0, 2))
def test_average_precision_of_resamples_is_scikit_learns(seed, n, places):
    """Which knows how often a clip counts as its weight; few decimals make ties."""
    random = np.random.default_rng(seed)
    score, truth = random.random(n).astype(np.float32).round(places), random.random(n) < 0.4
    counts = np.stack([np.bincount(random.integers(0, n, n), minlength=n) for _ in range(6)], axis=1).astype(np.uint8)
    found = resampled_average_precision(score, truth, counts)
    for r, value in enumerate(found):
        if counts[truth, r].sum():
            assert value == pytest.approx(average_precision_score(truth, score, sample_weight=counts[:, r]))
        else:
            assert np.isnan(value)


def test_average_precision_by_hand():
    """Ranking a B c, where a counts twice and c once: 2/2 of 2 of 3, then 3/4 of the third; without c 1."""
    counts = np.array([[2, 1, 1], [1, 3, 0]], np.uint8).T
    found = resampled_average_precision(np.array([0.9, 0.5, 0.1]), np.array([True, False, True]), counts)
    assert found == pytest.approx([2 / 3 + 1 / 3 * 3 / 4, 1.0])


def case(seed, n=60, c=4, multi_label=False):
    random = np.random.default_rng(seed)
    labels = np.arange(n) % c
    probs = random.normal(size=(n, c))
    probs[np.arange(n), labels] += 1.5
    return probs, np.eye(c)[labels] if multi_label else labels


def test_the_accuracy_s_interval_is_the_binomial_s():
    """Of n clips of which a share p is right, the standard error is sqrt(p (1 - p) / n)."""
    n, right = 400, 300
    probs = np.eye(2)[np.where(np.arange(n) < right, 0, 1)]
    low, high = bootstrap(probs, np.zeros(n, np.int64), resamples=4000)["accuracy"]
    error = (0.75 * 0.25 / n) ** 0.5
    assert [low, high] == pytest.approx([0.75 - 1.96 * error, 0.75 + 1.96 * error], abs=0.15 * error)


@pytest.mark.parametrize("multi_label", [False, True])
def test_the_interval_is_about_the_metric_and_repeatable(multi_label):
    probs, labels = case(1, multi_label=multi_label)
    first = bootstrap(probs, labels, resamples=300)
    truth = labels if multi_label else np.eye(4)[labels]
    low, high = first["mAP"]
    assert low < average_precision_score(truth, probs, average="macro") < high and high - low < 0.3
    assert (first["accuracy"] is None) == multi_label
    assert bootstrap(probs, labels, resamples=300) == first
    assert bootstrap(probs, labels, resamples=300, seed=1) != first
    assert {name: first[name] for name in ("level", "resamples", "seed")} == {
        "level": 0.95,
        "resamples": 300,
        "seed": 0,
    }


def test_it_holds_the_truth_about_as_often_as_it_says():
    truth = np.mean([average_precision_score(np.eye(4)[y], p, average="macro") for p, y in (case(9, 20_000),)])
    held = 0
    for seed in range(100):
        low, high = bootstrap(*case(seed, 200), resamples=200)["mAP"]
        held += low <= truth <= high
    assert held >= 85


def test_blocks_of_resamples_are_one_draw(monkeypatch):
    whole = bootstrap(*case(2), resamples=50)
    monkeypatch.setattr(intervals, "_BLOCK", 7 * 60)
    assert bootstrap(*case(2), resamples=50) == whole


@pytest.mark.parametrize("right", [0, 1])
def test_nothing_varies_where_all_are_right_or_all_wrong(right):
    interval = bootstrap(np.eye(2)[np.arange(20) % 2], (np.arange(20) + 1 - right) % 2, resamples=50)
    assert interval["accuracy"] == [right, right]


def test_a_single_class_has_no_interval_of_mean_precision():
    assert bootstrap(np.full((5, 2), 0.5), np.zeros(5, np.int64), resamples=20)["mAP"] is None
