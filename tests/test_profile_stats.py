"""Medians, their intervals, waits and slopes, against numbers that are known by other means."""

import math

import numpy as np
import pytest

from fastsskd.profile.stats import READY, Interval, median_interval, number, slope, together, waits


def test_the_interval_holds_the_true_median_95_times_in_100():
    """Of a skewed distribution, whose mean is elsewhere."""
    random, hits = np.random.default_rng(0), 0
    for _ in range(2000):
        found = median_interval(random.exponential(size=15).tolist())
        hits += found.low <= math.log(2) <= found.high
    assert 0.95 <= hits / 2000 <= 0.99  # 15 values allow 96.5 %


@pytest.mark.parametrize(("count", "left_out"), [(1, 0), (5, 0), (6, 0), (9, 1), (15, 3), (30, 9), (100, 39)])
def test_order_statistics_are_those_of_the_tables(count, left_out):
    """Ranks of the sign test's 95 % interval, as printed in textbooks."""
    found = median_interval([float(value) for value in range(count)])
    assert (found.low, found.high) == (left_out, count - 1 - left_out)


def test_large_samples_use_the_normal_approximation():
    exact, near = (median_interval(np.linspace(0, 1, count).tolist()) for count in (999, 1001))
    assert near.low == pytest.approx(exact.low, abs=0.003) and near.high == pytest.approx(exact.high, abs=0.003)


def test_nothing_measured_is_nan():
    found = median_interval([])
    assert math.isnan(found.value) and math.isnan(found.low)


def test_an_outlier_moves_nothing():
    values = [100.0] * 20 + [1.0]
    assert median_interval(values) == Interval(100.0, 100.0, 100.0)


def test_rates_of_ranks_add_up():
    assert together([Interval(2, 1, 3), Interval(20, 10, 30)]) == Interval(22, 11, 33)
    assert Interval(2, 1, 3).times(2) == Interval(4, 2, 6)


def test_waits():
    found = waits([0.0] * 97 + [1.0, 2.0, 3.0], whole=100.0)
    assert found.p50 == 0 and found.max == 3.0 and found.share == pytest.approx(0.06)
    assert found.p99 == pytest.approx(np.quantile([0.0] * 97 + [1, 2, 3], 0.99))
    assert found.ready == 0.97
    assert waits([], 1.0).ready == 1.0


def test_ready_is_a_millisecond_or_a_hundredth_of_a_step():
    fast = waits([2e-3] * 10, whole=10 * 50e-3)
    assert fast.limit == READY and fast.ready == 0
    slow = waits([2e-3] * 10, whole=10 * 1.0)
    assert slow.limit == pytest.approx(0.01) and slow.ready == 1


def test_a_slope_survives_odd_points():
    x = np.arange(40.0)
    y = 3.0 * x + 5.0
    y[[3, 17, 30]] = 1e6
    line = list(zip(x, y, strict=True))
    assert slope([line]) == pytest.approx(3.0)
    assert slope([[(1.0, 1.0), (1.0, 2.0)]]) == 0.0 and slope([[], []]) == 0.0 and slope([]) == 0.0


def test_a_slope_is_not_what_lies_between_two_lines():
    flat = [[(float(x), height) for x in range(10)] for height in (0.0, 1e6, 2e6)]
    assert slope(flat) == 0.0
    rising = [[(x, y + 2.0 * x) for x, y in line] for line in flat]
    assert slope(rising) == pytest.approx(2.0)


@pytest.mark.parametrize(
    ("value", "text"),
    [(123.4, "123"), (12.34, "12.3"), (1.234, "1.23"), (0.01234, "0.0123"), (0, "0"), (98765.4, "98765")],
)
def test_three_digits(value, text):
    assert number(value) == text
