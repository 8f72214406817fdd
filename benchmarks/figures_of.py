"""What the result files of the benchmarks say, as one flat list: what makes two runs comparable."""

from __future__ import annotations

import statistics
from dataclasses import dataclass


@dataclass(frozen=True)
class Figure:
    """One measured number.

    Attributes:
        value: its median.
        low, high: the range of its samples; equal to ``value`` where only one was taken.
        unit: such as ``"clips/s"``.
        more_is_better: whether a larger one is the better.
    """

    value: float
    low: float
    high: float
    unit: str
    more_is_better: bool


def figures_of(name: str, result: dict) -> dict[str, Figure]:
    """The figures of one benchmark's result, by a name that stays the same from run to run."""
    return READERS[name](result) if name in READERS else {}


def of_samples(samples: list[float], unit: str, more_is_better: bool) -> Figure:
    return Figure(statistics.median(samples), min(samples), max(samples), unit, more_is_better)


def _kernels(result: dict) -> dict[str, Figure]:
    found = {}
    for table in ("fbank", "hog", "fused", "threads", "masks"):
        for row, cell in result.get(table, {}).items():
            median, best = cell["median_ms"], cell["best_ms"]
            # Only the best sample is kept: the other side is taken to lie as far from the median.
            found[f"{table}: {row}"] = Figure(median, best, 2 * median - best, "ms", False)
    return found


def _throughput(result: dict) -> dict[str, Figure]:
    found = {}
    for row in result.get("rows", ()):
        name = f"{row['title']} on {row['source']}, {row['workers']} workers"
        low, high = row["range"]
        found[name] = Figure(row["clips_per_s"], low, high, "clips/s", True)
        found[f"{name}: CPU"] = Figure(row["cpu_s_per_1000"], *2 * [row["cpu_s_per_1000"]], "ms/clip", False)
    return found


def _train_step(result: dict) -> dict[str, Figure]:
    rows = {**result.get("rows", {}), **{f"labelled: {k}": v for k, v in result.get("labelled", {}).items()}}
    return {name: of_samples(row["seconds"], "s", False) for name, row in rows.items() if row["seconds"]}


def _teach(result: dict) -> dict[str, Figure]:
    return {name: of_samples(samples, "s", False) for name, samples in result.get("seconds", {}).items()}


def _plan(result: dict) -> dict[str, Figure]:
    found = {}
    for row in result.get("rows", ()):
        value, memory = abs(row["percent"]), row["what"] == "bytes"
        what = "peak memory" if memory else row["what"]
        found[f"{row['size']}, batch {row['batch']}, {what}: error"] = Figure(value, value, value, "%", False)
    return found


def _scale(result: dict) -> dict[str, Figure]:
    return {
        f"{row['kind']}, {row['ranks']} ranks, {run}": of_samples(samples, "clips/s", True)
        for row in result.get("rows", ())
        for run, samples in row["samples"].items()
    }


READERS = {
    "kernels": _kernels,
    "throughput": _throughput,
    "train_step": _train_step,
    "train_step_gpu": _train_step,
    "teach": _teach,
    "plan": _plan,
    "scale": _scale,
}


def compare(old: dict[str, Figure], new: dict[str, Figure], noise: float = 0.05) -> list[dict]:
    """Every figure that both have, and whether it has changed by more than its samples and ``noise`` can explain.

    Returns:
        Rows ``name``, ``unit``, ``old``, ``new``, ``change`` (0.1 = a tenth more), ``verdict``: ``"better"``,
        ``"worse"`` where the ranges of the samples lie apart and the medians by more than ``noise``; else ``"same"``.
    """
    rows = []
    for name in [name for name in old if name in new]:
        a, b = old[name], new[name]
        change = b.value / a.value - 1.0 if a.value else 0.0
        apart = b.low > a.high or b.high < a.low
        verdict = "same"
        if apart and abs(change) > noise:
            verdict = "better" if (change > 0) == b.more_is_better else "worse"
        row = {"name": name, "unit": b.unit, "old": a.value, "new": b.value, "change": change, "verdict": verdict}
        rows.append(row)
    return rows
