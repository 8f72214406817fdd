"""Numbers with what they are worth: medians over windows of time, and intervals that come from their order alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

CONFIDENCE = 0.95
READY, READY_SHARE = 1e-3, 0.01
"""A batch was ready if it took no more than so many seconds to get, or this share of a step."""


@dataclass(frozen=True)
class Interval:
    """A median and where it lies with 95 % confidence."""

    value: float
    low: float
    high: float

    def times(self, factor: float) -> Interval:
        return Interval(self.value * factor, self.low * factor, self.high * factor)

    def __str__(self) -> str:
        return f"{number(self.value)} ({number(self.low)} to {number(self.high)})"


def median_interval(values: Sequence[float]) -> Interval:
    """The median and its interval between two order statistics; nothing is taken for granted of the distribution.

    Of fewer than six values, which cannot give 95 %, the interval is all they span: 94 % for five, 75 % for three.
    """
    if not values:
        return Interval(math.nan, math.nan, math.nan)
    ordered = sorted(values)
    skipped = _skipped(len(ordered))
    return Interval(float(np.median(ordered)), ordered[skipped], ordered[-1 - skipped])


def _skipped(count: int) -> int:
    """How many values may be left out at either end: the largest k with P(fewer than k + 1 of n below) <= 2.5 %."""
    tail, term, k = 0.0, 0.5**count if count < 1000 else 0.0, -1
    if count >= 1000:  # the normal approximation
        return max(math.floor(count / 2 - 0.98 * math.sqrt(count)) - 1, 0)
    while tail + term <= (1.0 - CONFIDENCE) / 2:
        tail += term
        k += 1
        term *= (count - k) / (k + 1)
    return max(k, 0)


def together(ranks: Sequence[Interval]) -> Interval:
    """The sum over ranks."""
    return Interval(sum(r.value for r in ranks), sum(r.low for r in ranks), sum(r.high for r in ranks))


@dataclass(frozen=True)
class Waits:
    """How long steps waited for their data, in seconds.

    Attributes:
        ready: share of the batches that were there when they were asked for (:data:`READY`).
        share: of the time that was spent waiting.
        limit: seconds up to which a batch counts as ready.
    """

    p50: float
    p95: float
    p99: float
    max: float
    ready: float
    share: float
    limit: float = READY


def waits(seconds: Sequence[float], whole: float) -> Waits:
    """Of single waits that were part of ``whole`` seconds."""
    if not seconds:
        return Waits(0.0, 0.0, 0.0, 0.0, 1.0, 0.0)
    limit = max(READY, READY_SHARE * whole / len(seconds))
    points = (float(np.quantile(seconds, q)) for q in (0.5, 0.95, 0.99, 1.0))
    ready = sum(wait <= limit for wait in seconds) / len(seconds)
    return Waits(*points, ready, min(sum(seconds) / max(whole, 1e-9), 1.0), limit)


def slope(lines: Sequence[Sequence[tuple[float, float]]]) -> float:
    """That the lines of points ``(x, y)`` have in common, by Theil and Sen: the median over pairs of points.

    A few odd points do not move it. Pairs are of one line, so that lines may lie at different heights.
    """
    slopes = []
    for line in lines:
        x, y = np.asarray(line, float).reshape(-1, 2).T
        first, second = np.triu_indices(len(x), 1)
        apart = x[second] != x[first]
        slopes.append((y[second] - y[first])[apart] / (x[second] - x[first])[apart])
    found = np.concatenate(slopes) if slopes else np.empty(0)
    return float(np.median(found)) if len(found) else 0.0


def number(value: float) -> str:
    """Three digits, or more before the point."""
    if not math.isfinite(value):
        return "-"
    digits = max(0, 2 - math.floor(math.log10(abs(value)))) if value else 0
    return f"{value:.{min(digits, 6)}f}"
