"""Metrics against counting by hand and against scikit-learn."""

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, roc_auc_score, top_k_accuracy_score

from fastsskd.evaluation.metrics import classification_metrics, d_prime


def naive_average_precision(truth, score) -> float:
    """The sum over thresholds of precision times the recall gained."""
    total, found = 0.0, 0
    for threshold in sorted(set(score.tolist()), reverse=True):
        chosen = score >= threshold
        hits = int(truth[chosen].sum())
        total += (hits - found) / truth.sum() * hits / chosen.sum()
        found = hits
    return total


def naive_auc(truth, score) -> float:
    """The share of pairs of a positive and a negative clip that are in the right order; a tie is half."""
    wins = 0.0
    for positive in score[truth == 1]:
        for negative in score[truth == 0]:
            wins += 1.0 if positive > negative else 0.5 if positive == negative else 0.0
    return wins / ((truth == 1).sum() * (truth == 0).sum())


def normal_cdf(x: float) -> float:
    return 0.5 * (1 + math.erf(x / math.sqrt(2)))


def case(seed: int, num_clips=40, num_classes=7, multi_label=False, ties=False):
    random = np.random.default_rng(seed)
    probs = random.dirichlet(np.ones(num_classes), num_clips).astype(np.float32)
    if ties:
        probs = np.round(probs, 1)
    if multi_label:
        labels = (random.random((num_clips, num_classes)) < 0.3).astype(np.float32)
    else:
        labels = random.permutation(np.arange(num_clips) % num_classes)
    return probs, labels, tuple(f"class{c}" for c in range(num_classes))


def multi_hot(labels, num_classes: int) -> np.ndarray:
    if labels.ndim == 2:
        return labels.astype(int)
    return np.array([[int(label == c) for c in range(num_classes)] for label in labels])


@pytest.mark.parametrize("multi_label", [False, True])
@pytest.mark.parametrize("ties", [False, True])
def test_map_auc_and_d_prime_are_means_over_classes(multi_label, ties):
    probs, labels, classes = case(1, multi_label=multi_label, ties=ties)
    metrics = classification_metrics(probs, labels, classes)
    truth = multi_hot(labels, len(classes))
    precision = [naive_average_precision(truth[:, c], probs[:, c]) for c in range(len(classes))]
    area = [naive_auc(truth[:, c], probs[:, c]) for c in range(len(classes))]
    assert metrics["mAP"] == pytest.approx(np.mean(precision))
    assert metrics["mAP"] == pytest.approx(average_precision_score(truth, probs, average="macro"))
    assert metrics["AUC"] == pytest.approx(np.mean(area))
    assert metrics["AUC"] == pytest.approx(roc_auc_score(truth, probs, average="macro"))
    assert normal_cdf(metrics["d_prime"] / math.sqrt(2)) == pytest.approx(np.mean(area))
    assert metrics["num_clips"] == 40 and metrics["num_classes"] == len(classes)
    for c, name in enumerate(classes):
        row = metrics["per_class"][name]
        assert row["AP"] == pytest.approx(precision[c]) and row["AUC"] == pytest.approx(area[c])
        assert row["num_clips"] == truth[:, c].sum()
        if 0.0 < area[c] < 1.0:
            assert normal_cdf(row["d_prime"] / math.sqrt(2)) == pytest.approx(area[c])


def test_accuracy_and_top5_of_single_labels():
    probs, labels, classes = case(2)
    metrics = classification_metrics(probs, labels, classes)
    ranking = [sorted(range(7), key=lambda c, row=row: -row[c]) for row in probs]
    assert metrics["accuracy"] == np.mean([order[0] == label for order, label in zip(ranking, labels, strict=True)])
    assert metrics["top5"] == np.mean([label in order[:5] for order, label in zip(ranking, labels, strict=True)])
    assert metrics["top5"] == pytest.approx(top_k_accuracy_score(labels, probs, k=5))
    for c, name in enumerate(classes):
        own = [order[0] == c for order, label in zip(ranking, labels, strict=True) if label == c]
        assert metrics["per_class"][name]["accuracy"] == pytest.approx(np.mean(own))


def test_multi_label_sets_have_no_accuracy_and_few_classes_no_top5():
    metrics = classification_metrics(*case(3, multi_label=True))
    assert metrics["accuracy"] is None and metrics["top5"] is None
    assert "accuracy" not in metrics["per_class"]["class0"]
    assert classification_metrics(*case(3, num_classes=5))["top5"] is None


@given(seed=st.integers(0, 1000), multi_label=st.booleans())
def test_the_order_of_the_clips_does_not_matter(seed, multi_label):
    probs, labels, classes = case(seed, num_clips=15, num_classes=3, multi_label=multi_label, ties=True)
    order = np.random.default_rng(seed).permutation(15)
    first, second = (classification_metrics(probs[o], labels[o], classes) for o in (np.arange(15), order))
    for name in ("mAP", "AUC", "d_prime", "accuracy"):
        assert first[name] == (None if second[name] is None else pytest.approx(second[name]))


# -------------------------------------------------------------------------------------------------------------- edges


def test_a_class_without_clips_is_left_out_of_the_means():
    probs, labels, classes = case(4, num_classes=4)
    labels = np.where(labels == 2, 1, labels)
    metrics = classification_metrics(probs, labels, classes)
    assert metrics["per_class"]["class2"] == {
        **dict.fromkeys(("AP", "AUC", "d_prime", "accuracy")),
        "num_clips": 0,
    }
    assert metrics["num_classes"] == 3
    kept = [metrics["per_class"][name]["AP"] for name in ("class0", "class1", "class3")]
    assert metrics["mAP"] == pytest.approx(np.mean(kept))


def test_a_class_that_every_clip_has_is_left_out_too():
    probs, labels, classes = case(5, num_classes=3, multi_label=True)
    labels[:, 1] = 1.0
    metrics = classification_metrics(probs, labels, classes)
    assert metrics["per_class"]["class1"]["AP"] is None and metrics["per_class"]["class1"]["num_clips"] == 40
    assert metrics["num_classes"] == 2


@pytest.mark.parametrize("label", [-1, 3])
def test_an_unlabelled_clip_never_counts_as_another_class(label):
    with pytest.raises(ValueError, match="expected 0 to 2"):
        classification_metrics(np.eye(3), np.array([0, 1, label]), ("a", "b", "c"))


def test_nothing_to_tell_apart_gives_none_not_nan():
    metrics = classification_metrics(np.full((3, 2), 0.5), np.array([0, 0, 0]), ("a", "b"))
    assert metrics["mAP"] is metrics["AUC"] is metrics["d_prime"] is None
    assert metrics["num_classes"] == 0 and metrics["accuracy"] == 1.0


@pytest.mark.parametrize("sign", [1, -1])
def test_a_perfect_and_a_reversed_ranking_can_be_written_as_json(sign):
    """Their d' would be infinite, which JSON has no word for."""
    labels = np.array([0, 1, 0, 1])
    score = sign * np.array([0.1, 0.9, 0.2, 0.8])
    metrics = classification_metrics(np.stack([-score, score], axis=1), labels, ("a", "b"))
    assert metrics["AUC"] == (1.0 if sign == 1 else 0.0)
    assert metrics["d_prime"] is None
    assert json.loads(json.dumps(metrics, allow_nan=False)) == metrics


def test_d_prime_is_audioset_s():
    """AudioSet's paper and AST list AUC 0.959 as d' 2.452 and 0.973 as 2.725; chance is 0."""
    assert d_prime(0.5) == pytest.approx(0.0)
    assert d_prime(0.959) == pytest.approx(2.46, abs=0.01)
    assert d_prime(None) is None
