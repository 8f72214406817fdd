"""Average precision of a class over many resamples of the same clips: sorted once, all resamples side by side."""

import numpy as np

from fastsskd_kernels.compile import njit


def resampled_average_precision(score: np.ndarray, truth: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """The average precision of one class where clip ``i`` counts ``counts[i, r]`` times.

    The sum over thresholds of the precision times the recall gained; clips of the same score share a threshold.

    Args:
        score: ``(n,)`` of the class.
        truth: ``(n,)`` bool, which clips have it.
        counts: ``(n, R)`` uint8.

    Returns:
        ``(R,)`` float64, NaN where a resample has no clip of the class.
    """
    order = np.argsort(-score, kind="stable")
    ordered = score[order]
    ends_tie = np.append(ordered[1:] != ordered[:-1], True)
    out = np.empty(counts.shape[1])
    _average_precision(np.ascontiguousarray(counts), order, ends_tie, truth[order], out)
    return out


@njit
def _average_precision(counts, order, ends_tie, truth, out):
    resamples = len(out)
    seen = np.zeros(resamples, np.int32)
    hits, hits_before = np.zeros(resamples, np.int32), np.zeros(resamples, np.int32)
    out[:] = 0.0
    left, is_gain = truth.sum(), False
    for place in range(len(order)):
        row = counts[order[place]]
        for r in range(resamples):
            seen[r] += row[r]
        if truth[place]:
            left, is_gain = left - 1, True
            for r in range(resamples):
                hits[r] += row[r]
        if is_gain and ends_tie[place]:
            for r in range(resamples):
                if hits[r] > hits_before[r]:
                    out[r] += (hits[r] - hits_before[r]) * (hits[r] / seen[r])
                    hits_before[r] = hits[r]
            is_gain = False
            if left == 0:
                break
    for r in range(resamples):
        out[r] = out[r] / hits[r] if hits[r] else np.nan
