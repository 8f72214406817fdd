"""Classification metrics: class probabilities and labels in, numbers out."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from scipy.stats import norm
from sklearn.metrics import average_precision_score, roc_auc_score

NAMES = ("accuracy", "top5", "mAP", "AUC", "d_prime")
"""Of the metrics of a whole set, in the order in which they are shown."""


def classification_metrics(probs: np.ndarray, labels: np.ndarray, classes: tuple[str, ...]) -> dict[str, Any]:
    """Metrics over a whole evaluation set, each clip once.

    Args:
        probs: ``(n, C)`` class probabilities.
        labels: ``(n,)`` int64 class ids from 0, or ``(n, C)`` multi-hot.
        classes: names of the C classes.

    Returns:
        ``mAP``: unweighted mean over classes of sklearn's average precision; ``AUC``: of the area under the ROC;
        ``d_prime``: ``sqrt(2)`` times the normal quantile of the mean AUC (AudioSet's convention); ``accuracy`` and
        ``top5`` for single-label sets (None otherwise); ``num_clips``; ``num_classes`` with at least one positive and
        one negative clip, over which the means are taken; ``per_class``: a dictionary for each class.

    Raises:
        ValueError: an id that is no class, such as the -1 of an unlabelled clip.
    """
    single = labels.ndim == 1
    if single and len(labels) and not 0 <= labels.min() <= labels.max() < len(classes):
        raise ValueError(f"labels from {labels.min()} to {labels.max()}: expected 0 to {len(classes) - 1}")
    truth = np.eye(len(classes), dtype=np.int8)[labels] if single else (labels > 0.5).astype(np.int8)
    per_class = {name: _one_class(truth[:, c], probs[:, c]) for c, name in enumerate(classes)}
    if single:
        hit = probs.argmax(axis=1) == labels
        for c, name in enumerate(classes):
            own = labels == c
            per_class[name]["accuracy"] = float(hit[own].mean()) if own.any() else None
    rated = [row for row in per_class.values() if row["AP"] is not None]
    auc = _mean([row["AUC"] for row in rated])
    rank_of_truth = (probs > probs[np.arange(len(labels)), labels][:, None]).sum(axis=1) if single else None
    return {
        "accuracy": float(hit.mean()) if single else None,
        "top5": float((rank_of_truth < 5).mean()) if single and len(classes) > 5 else None,
        "mAP": _mean([row["AP"] for row in rated]),
        "AUC": auc,
        "d_prime": d_prime(auc),
        "num_clips": len(labels),
        "num_classes": len(rated),
        "per_class": per_class,
    }


def d_prime(auc: float | None) -> float | None:
    """AudioSet's d': the separation of two unit normals with this area under the ROC. None where it is not finite."""
    return None if auc is None or not 0.0 < auc < 1.0 else float(math.sqrt(2.0) * norm.ppf(auc))


def _one_class(truth: np.ndarray, score: np.ndarray) -> dict[str, float | int | None]:
    """Average precision, AUC and d', None where the class has no positive or no negative clip."""
    positives = int(truth.sum())
    if positives in (0, len(truth)):
        return {"AP": None, "AUC": None, "d_prime": None, "num_clips": positives}
    auc = float(roc_auc_score(truth, score))
    return {
        "AP": float(average_precision_score(truth, score)),
        "AUC": auc,
        "d_prime": d_prime(auc),
        "num_clips": positives,
    }


def _mean(values: list[float]) -> float | None:
    return float(np.mean(values)) if values else None
