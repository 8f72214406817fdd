"""The curves of a stage: which numbers of metrics.jsonl share a drawing, in which colours."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from fastsskd import health
from fastsskd.report.charts import GREY, Series, line_chart
from fastsskd.report.data import StageData
from fastsskd.run_folder import LINE_FIELDS

BLACK, BLUE, ORANGE, GREEN, RED, PURPLE, BROWN = (
    "#1c2024", "#2166ac", "#d97706", "#1f8a5b", "#c0392b", "#7b4fa3", "#7a5a3a",
)  # fmt: skip
PALE = "#d3d7de"
_KINDS = {"restore": BLUE, "mse": ORANGE, "kl": GREEN, "contrast": PURPLE}
LEAST_EXPLAINED = -20.0
"""Per cent; the first steps are far below, and would flatten all that follows. A curve that stays below is drawn."""
_OTHERS = (BLUE, ORANGE, GREEN, PURPLE, RED, BROWN)


def stage_charts(stage: StageData, reference: Sequence[dict[str, Any]] = ()) -> list[str]:
    """Loss and terms; the health of Multi-SSL; gradient norm, learning rate, speed and waiting.

    Args:
        reference: lines of another run's stage, drawn broad and pale behind the total loss, the gradient norm, and the
            health of the harder view.
    """
    lines = stage.lines
    charts = [line_chart("Loss and its terms", _behind(reference, "loss") + _losses(lines), unit="loss", log=True)]
    if stage.is_ssl:
        charts += _health(lines, reference)
    norm = [*_behind(reference, "grad_norm"), _one(lines, "grad_norm", PURPLE)]
    charts += [
        line_chart("Gradient norm, before clipping", norm, unit="norm", log=True),
        line_chart("Learning rate", [_one(lines, "lr", BROWN)], unit="learning rate", from_zero=True),
        line_chart("Speed", [_one(lines, "clips_per_second", BLUE)], unit="clips / s", from_zero=True),
        line_chart("Use of the machine's peak", [_one(lines, "mfu", GREEN, 100.0)], unit="MFU, %", from_zero=True),
        line_chart("Loader's headroom", [_one(lines, "headroom", ORANGE, 100.0)], unit="% faster", from_zero=True),
        line_chart("Waiting for data", [_one(lines, "wait", RED, 100.0)], unit="% of the time", from_zero=True),
    ]
    return [chart for chart in charts if chart]


def _one(
    lines: Sequence[dict[str, Any]], name: str, colour: str, factor: float = 1.0, title: str = "", **looks: Any
) -> Series:
    values = [line.get(name) for line in lines]
    y = [None if value is None else factor * value for value in values]
    return Series(title or name, [line["epoch"] for line in lines], y, colour, **looks)


def _behind(reference: Sequence[dict[str, Any]], name: str, factor: float = 1.0) -> list[Series]:
    if not any(name in line for line in reference):
        return []
    return [_one(reference, name, PALE, factor, f"reference: {name.replace('_', ' ')}", width=5.0)]


def _losses(lines: list[dict[str, Any]]) -> list[Series]:
    names = dict.fromkeys(name for line in lines for name in line)
    known = LINE_FIELDS | {"loss", *health.NAMES}
    terms = [name for name in names if name not in known and _is_number(lines, name)]
    series = [_one(lines, "loss", BLACK, title="total", width=2.4)]
    others = iter(_OTHERS * 4)
    for name in terms:
        kind, _, view = name.rpartition("_")
        if view in health.VIEWS and kind in _KINDS:
            series.append(_one(lines, name, _KINDS[kind], title=name.replace("_", " "), dashed=view == "inter"))
        elif len(terms) > 1:  # a single term is the total
            series.append(_one(lines, name, next(others), title=name.replace("_", " ")))
    return series


def _is_number(lines: list[dict[str, Any]], name: str) -> bool:
    return all(isinstance(line.get(name, 0.0), (int, float)) for line in lines)


def _health(lines: list[dict[str, Any]], reference: Sequence[dict[str, Any]]) -> list[str]:
    def pair(name: str, colour: str, title: str) -> list[Series]:
        looks = {"intra": False, "inter": True}
        own = [(view, dashed) for view, dashed in looks.items() if any(f"{name}_{view}" in line for line in lines)]
        return [_one(lines, f"{name}_{view}", colour, 100.0, f"{title}, {view}", dashed=d) for view, d in own]

    accuracy = _behind(reference, "contrast_accuracy_inter", 100.0) + pair(
        "contrast_accuracy", PURPLE, "own pair found"
    )
    chance = [_one(lines, "contrast_chance", GREY, 100.0, "by guessing", width=1.2)] if accuracy else []
    rank = [*_behind(reference, "effective_rank"), _one(lines, "effective_rank", GREEN, title="effective rank")]
    rank.append(_one(lines, "rank_limit", GREY, title="the most a batch allows", width=1.2))
    spread = [_one(lines, "feature_spread", ORANGE, 100.0, "spread")]
    explained = _behind(reference, "explained_inter", 100.0) + pair("explained", BLUE, "explained")
    explained += pair("positions", GREY, "by positions alone")
    last = [100.0 * lines[-1][name] for name in ("explained_intra", "explained_inter") if lines and name in lines[-1]]
    lowest = LEAST_EXPLAINED if min(last, default=0.0) >= LEAST_EXPLAINED else -math.inf
    return [
        line_chart("Reconstruction: variance explained", explained, unit="% of the variance", lowest=lowest),
        line_chart(
            "Contrast: clips that find their own pair", accuracy + chance, unit="% of the clips", from_zero=True
        ),
        line_chart("Effective rank of the clips' features", rank, unit="dimensions", from_zero=True),
        line_chart("Difference between clips' features", spread, unit="% of their size", from_zero=True),
    ]
