"""How far chance in the choice of clips reaches: bootstrap intervals of metrics."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from scipy.stats import norm

from fastsskd_kernels.ranking import resampled_average_precision

LEVEL = 0.95
_BLOCK = 1 << 27  # most counts at a time, of a byte each


def bootstrap(probs: np.ndarray, labels: np.ndarray, *, resamples: int = 1000, seed: int = 0) -> dict[str, Any]:
    """Bias-corrected percentile intervals over resamples of the clips, drawn with replacement (Efron, 1981).

    They say how the numbers would vary with other clips of the same kind, if each were a draw of its own; not how they
    vary with another training. A class without a clip in a resample is left out of that resample's mean.

    A clip that was drawn twice stands beside itself in the ranking, which raises a class's average precision where it
    has few clips: without the correction the interval may lie above the mAP itself.

    Args:
        probs: ``(n, C)`` class probabilities.
        labels: ``(n,)`` class ids, or ``(n, C)`` multi-hot.
        resamples: how many.
        seed: of the draws.

    Returns:
        ``level``, ``resamples``, ``seed``; ``mAP`` and, of single labels, ``accuracy``: ``[low, high]``, or None.
    """
    single, n = labels.ndim == 1, len(labels)
    truth = labels[:, None] == np.arange(probs.shape[1]) if single else labels > 0.5
    hit = probs.argmax(axis=1) == labels if single else np.zeros(n, bool)
    random = np.random.default_rng(seed)
    accuracy, precision, once = [], [], np.ones((n, 1), np.uint8)
    for begin in range(0, resamples, max(_BLOCK // n, 1)):
        size = min(resamples - begin, max(_BLOCK // n, 1))
        counts = np.empty((n, size), np.uint8)  # a clip is drawn once on average, more than 255 times never
        for column in counts.T:
            column[:] = np.bincount(random.integers(0, n, n), minlength=n)
        accuracy.append(counts[hit].sum(axis=0, dtype=np.int64) / n)
        precision.append(_mean_precision(probs, truth, counts))
    return {
        "level": LEVEL,
        "resamples": resamples,
        "seed": seed,
        "accuracy": _range(np.concatenate(accuracy), hit.mean()) if single else None,
        "mAP": _range(np.concatenate(precision), _mean_precision(probs, truth, once)[0]),
    }


def _mean_precision(probs: np.ndarray, truth: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """``(R,)`` mAP of each resample, over the classes that can be rated at all; NaN where it has none of them."""
    number = truth.sum(axis=0)
    rated = np.flatnonzero((number > 0) & (number < len(truth)))
    total, classes = np.zeros(counts.shape[1]), np.zeros(counts.shape[1])

    def one(c: int) -> np.ndarray:
        return resampled_average_precision(probs[:, c], truth[:, c], counts)

    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        for values in pool.map(one, rated):
            total += np.nan_to_num(values)
            classes += np.isfinite(values)
    with np.errstate(invalid="ignore"):
        return total / classes


def _range(values: np.ndarray, found: float) -> list[float] | None:
    """The interval of a metric that is ``found`` on the clips and ``values`` on their resamples."""
    values = values[np.isfinite(values)]
    if not len(values):
        return None
    below = np.mean(values < found) + 0.5 * np.mean(values == found)
    bias = norm.ppf(np.clip(below, 0.5 / len(values), 1.0 - 0.5 / len(values)))
    reach = norm.ppf(0.5 + LEVEL / 2)
    return np.quantile(values, norm.cdf(2.0 * bias + np.array([-reach, reach]))).tolist()
