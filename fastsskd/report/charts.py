"""Drawings of a report as inline SVG: curves and a matrix of counts. Numbers in, text out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 400, 240
LEFT, RIGHT, TOP, BOTTOM = 58, 10, 10, 38
MAX_POINTS = 200
GREY = "#8a8f98"


@dataclass(frozen=True)
class Series:
    """A curve: its name, its points (y None or not finite = a gap), and its looks."""

    name: str
    x: Sequence[float]
    y: Sequence[float | None]
    colour: str
    dashed: bool = False
    width: float = 1.6


def line_chart(
    title: str,
    series: Sequence[Series],
    *,
    unit: str,
    x_unit: str = "epoch",
    log: bool = False,
    lowest: float = -math.inf,
    from_zero: bool = False,
) -> str:
    """A figure with title, axes, curves and legend; empty text if there is nothing to draw.

    Args:
        unit, x_unit: labels of the axes.
        log: logarithmic y axis; what is not positive is left out then.
        lowest: what is below is left out.
        from_zero: the y axis begins at 0, so that heights can be compared.
    """
    series = [_thinned(_drawable(one, 1e-300 if log else lowest)) for one in series]
    series = [one for one in series if len(one.x)]
    if not series:
        return ""
    x_axis = _Axis([x for one in series for x in one.x], LEFT, WIDTH - RIGHT)
    values = [y for one in series for y in one.y if y is not None] + [0.0] * from_zero
    y_axis = _Axis(values, HEIGHT - BOTTOM, TOP, log, room=0.05)
    parts = [*_y_axis(y_axis, unit), *_x_axis(x_axis, x_unit)]
    parts += [_curve(one, x_axis, y_axis) for one in series]
    svg = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">' + "".join(parts) + "</svg>"
    legend = "".join(_legend(one) for one in series) if len(series) > 1 else ""
    return f'<figure class="chart"><figcaption>{escape(title)}</figcaption>{svg}<p class="legend">{legend}</p></figure>'


def confusion(matrix: Sequence[Sequence[int]], names: Sequence[str]) -> str:
    """A square of counts, a row for each true class, coloured by the share of the row."""
    cell, label = 22, 6.2 * max(len(name) for name in names) + 12
    size = label + cell * len(names) + 4
    parts = []
    for i, (name, row) in enumerate(zip(names, matrix, strict=True)):
        y, total = label + cell * i, max(sum(row), 1)
        parts.append(f'<text x="{label - 6:.0f}" y="{y + 15:.0f}" text-anchor="end">{escape(name)}</text>')
        parts.append(f'<text transform="translate({y + 15:.0f} {label - 6:.0f}) rotate(-90)">{escape(name)}</text>')
        for j, count in enumerate(row):
            share = count / total
            colour = f"rgb({round(255 - 222 * share)},{round(255 - 153 * share)},{round(255 - 83 * share)})"
            x = label + cell * j
            ink = "#fff" if share > 0.5 else "#1c2024"
            what = escape(f"{count} of {total} clips of {name} taken for {names[j]}")
            parts.append(
                f'<g><title>{what}</title><rect x="{x:.0f}" y="{y:.0f}" width="{cell}" height="{cell}" fill="{colour}" '
                f'stroke="#d9dce1" stroke-width="0.5"/>'
                + (
                    f'<text x="{x + cell / 2:.0f}" y="{y + 15:.0f}" text-anchor="middle" fill="{ink}">{count}</text>'
                    if count
                    else ""
                )
                + "</g>"
            )
    return (
        f'<div class="wide"><svg class="matrix" viewBox="0 0 {size:.0f} {size:.0f}" style="width:{size:.0f}px" '
        f'role="img" aria-label="confusion matrix">{"".join(parts)}</svg></div>'
    )


class _Axis:
    """Values to pixels.

    Args:
        values: what must fit on it.
        begin, end: pixels of its two ends.
        log: logarithmic.
        room: space beyond the values, as a share of the axis.
    """

    def __init__(self, values: Sequence[float], begin: float, end: float, log: bool = False, room: float = 0.0):
        self.begin, self.end, self.log = begin, end, log
        low, high = self._scale(min(values)), self._scale(max(values))
        room *= high - low
        if high == low:
            room = 0.1 if log else 0.1 * abs(high) or 1.0
        self.low, self.high = low - room, high + room
        self.ticks = _log_ticks(10**self.low, 10**self.high) if log else _ticks(self.low, self.high)

    def _scale(self, value: float) -> float:
        return math.log10(value) if self.log else value

    def __call__(self, value: float) -> float:
        share = (self._scale(value) - self.low) / (self.high - self.low)
        return self.begin + share * (self.end - self.begin)


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers from ``low`` to ``high``, three to seven of them."""
    raw = (high - low) / 6
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= raw * 0.999)
    return [k * step for k in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten from ``low`` to ``high``; powers alone if there are many, any numbers if few."""
    powers = [10.0**k for k in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)]
    ticks = [factor * power for power in powers for factor in (1, 2, 5) if low <= factor * power <= high]
    if len(ticks) > 8:
        ticks = [power for power in powers if low <= power <= high]
        ticks = ticks[:: -(-len(ticks) // 8)]
    return ticks if len(ticks) > 2 else _ticks(low, high)


def _drawable(series: Series, lowest: float) -> Series:
    def fits(y: float | None) -> bool:
        return y is not None and math.isfinite(y) and y >= lowest

    points = [(x, y if fits(y) else None) for x, y in zip(series.x, series.y, strict=True)]
    if all(y is None for _, y in points):
        points = []
    return Series(series.name, [x for x, _ in points], [y for _, y in points], *_looks(series))


def _looks(series: Series) -> tuple[str, bool, float]:
    return series.colour, series.dashed, series.width


def _thinned(series: Series) -> Series:
    """At most ``MAX_POINTS``: means of as many neighbours as it takes."""
    every = -(-len(series.x) // MAX_POINTS)
    if every <= 1:
        return series
    x, y = [], []
    for begin in range(0, len(series.x), every):
        own = [value for value in series.y[begin : begin + every] if value is not None]
        x.append(sum(series.x[begin : begin + every]) / len(series.x[begin : begin + every]))
        y.append(sum(own) / len(own) if own else None)
    return Series(series.name, x, y, *_looks(series))


def _curve(series: Series, x_axis: _Axis, y_axis: _Axis) -> str:
    pieces, pen = [], "M"
    for x, y in zip(series.x, series.y, strict=True):
        if y is None:
            pen = "M"
            continue
        pieces.append(f"{pen}{x_axis(x):.1f} {y_axis(y):.1f}")
        pen = "L"
    if len(pieces) == 1:  # a point alone would not be seen
        pieces.append("h0.1")
    dash = ' stroke-dasharray="5 3"' if series.dashed else ""
    return (
        f'<path d="{"".join(pieces)}" fill="none" stroke="{series.colour}" stroke-width="{series.width}"'
        f' stroke-linecap="round" stroke-linejoin="round"{dash}><title>{escape(series.name)}</title></path>'
    )


def _y_axis(axis: _Axis, unit: str) -> list[str]:
    parts = []
    for tick in axis.ticks:
        y = axis(tick)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 5}" y="{y + 4:.1f}" text-anchor="end">{short(tick)}</text>')
    middle = (TOP + HEIGHT - BOTTOM) / 2
    parts.append(f'<text transform="translate(11 {middle}) rotate(-90)" text-anchor="middle">{escape(unit)}</text>')
    return parts


def _x_axis(axis: _Axis, unit: str) -> list[str]:
    base = HEIGHT - BOTTOM
    parts = [f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{base}" y2="{base}"/>']
    for tick in axis.ticks:
        parts.append(f'<text x="{axis(tick):.1f}" y="{base + 15}" text-anchor="middle">{short(tick)}</text>')
    parts.append(f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 6}" text-anchor="middle">{escape(unit)}</text>')
    return parts


def _legend(series: Series) -> str:
    dash = ' stroke-dasharray="5 3"' if series.dashed else ""
    return (
        f'<span><svg viewBox="0 0 22 8"><line x1="1" x2="21" y1="4" y2="4" stroke="{series.colour}" '
        f'stroke-width="{max(series.width, 2)}"{dash}/></svg>{escape(series.name)}</span>'
    )


def short(value: float) -> str:
    """A tick's label: ``0.05``, ``20``, ``3e4``, ``2e-5``."""
    if value == 0 or abs(value) < 1e-15:
        return "0"
    if abs(value) >= 10000 or abs(value) < 0.001:
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{mantissa.removesuffix('.0')}e{int(exponent)}"
    return f"{value:.4g}"
