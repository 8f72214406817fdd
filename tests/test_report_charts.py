"""Curves: every point where it belongs, and numbers that cannot be drawn left out."""

import math
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastsskd.report import charts
from fastsskd.report.charts import Series, line_chart

PLOT_X, PLOT_Y = (58, 390), (202, 10)  # pixels of the axes' ends


def points(svg: str) -> list[list[tuple[float, float]]]:
    """Of each curve, in pixels."""
    paths = re.findall(r'<path d="([^"]*)"', svg)
    return [[tuple(map(float, pair)) for pair in re.findall(r"[ML](\S+?) ([\d.]+)", path)] for path in paths]


def labels(svg: str) -> list[str]:
    return re.findall(r"<text[^>]*>([^<]*)</text>", svg)


def test_points_lie_where_their_values_say():
    svg = line_chart("t", [Series("a", [0, 5, 10], [0.0, 2.0, 4.0], "red")], unit="u")
    (curve,) = points(svg)
    room = 0.05 * 4 / (4 * 1.1) * 192  # a twentieth of the range is left free at both ends
    expected = [(58, 202 - room), (224, 106), (390, 10 + room)]
    assert [(x, y) for x, y in curve] == [pytest.approx(point, abs=0.1) for point in expected]


def test_a_logarithmic_axis_gives_each_decade_the_same_room():
    svg = line_chart("t", [Series("a", [0, 1, 2], [1.0, 10.0, 100.0], "red")], unit="u", log=True)
    low, middle, high = (y for _, y in points(svg)[0])
    assert low - middle == pytest.approx(middle - high, abs=0.2) and low > middle
    assert {"1", "10", "100"} <= set(labels(svg))


def test_what_cannot_be_drawn_is_a_gap():
    y = [1.0, None, 2.0, math.nan, math.inf, 3.0, 4.0, -1.0, 0.0]
    svg = line_chart("t", [Series("a", range(9), y, "red")], unit="u", log=True)
    assert len(points(svg)[0]) == 4
    assert re.search(r'd="([^"]*)"', svg).group(1).count("M") == 3
    assert len(points(line_chart("t", [Series("a", range(9), y, "red")], unit="u", lowest=2.0))[0]) == 3


def test_nothing_to_draw_is_no_figure():
    assert line_chart("t", [], unit="u") == ""
    assert line_chart("t", [Series("a", [1, 2], [None, math.nan], "red")], unit="u") == ""
    assert line_chart("t", [Series("a", [1], [-1.0], "red")], unit="u", log=True) == ""


def test_the_axis_can_begin_at_zero():
    plain, zero = (line_chart("t", [Series("a", [0, 1], [90.0, 100.0], "r")], unit="u", from_zero=z) for z in (0, 1))
    assert points(zero)[0][0][1] < 60 < 150 < points(plain)[0][0][1]


def test_many_points_become_means_of_neighbours():
    y = np.random.default_rng(0).random(1000)
    (curve,) = points(line_chart("t", [Series("a", range(1000), y.tolist(), "red")], unit="u"))
    assert len(curve) == charts.MAX_POINTS
    means = y.reshape(200, 5).mean(axis=1)
    assert np.corrcoef(means, [-py for _, py in curve])[0, 1] > 0.999


def test_names_are_text_and_several_curves_have_a_legend():
    one = Series("<a&b>", [0, 1], [0.0, 1.0], "red", dashed=True)
    svg = line_chart("<t>", [one, one], unit="<u>")
    assert "<a&b>" not in svg and "<t>" not in svg and "<u>" not in svg
    assert svg.count("&lt;a&amp;b&gt;</span>") == 2 and svg.count("stroke-dasharray") == 4
    assert "<span>" not in line_chart("t", [one], unit="u")


@given(
    st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=8),
    st.booleans(),
)
def test_every_curve_stays_in_its_frame_with_sensible_ticks(y, log):
    y = [10 ** (value / 2e5) for value in y] if log else y
    svg = line_chart("t", [Series("a", range(len(y)), y, "red")], unit="u", log=log)
    for px, py in points(svg)[0]:
        assert 57.9 <= px <= 390.1 and 9.9 <= py <= 202.1
    ticks = [float(v) for v in re.findall(r'<line class="grid"[^>]*y1="([\d.]+)"', svg)]
    assert 1 <= len(ticks) <= 10 and all(9.9 <= tick <= 202.1 for tick in ticks)
    assert ticks == sorted(ticks, reverse=True)


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0"), (0.05, "0.05"), (20.0, "20"), (2e-5, "2e-5"), (30000, "3e4"), (-0.25, "-0.25")]
)
def test_ticks_are_short(value, text):
    assert charts.short(value) == text


def test_the_matrix_counts_rows_of_true_classes():
    svg = charts.confusion([[3, 1], [0, 4]], ["cat", "dog & co"])
    assert "1 of 4 clips of cat taken for dog &amp; co" in svg and "4 of 4 clips of dog &amp; co" in svg
    shown = [text for text in labels(svg) if text.isdigit()]
    assert shown == ["3", "1", "4"]  # nothing is written where nothing was confused
