"""What the result files of the benchmarks say, as one flat list: what makes two runs comparable."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Figure:
    """One measured number.

    Attributes:
        value: its median.
        low, high: the range of its samples; equal to ``value`` where only one was taken.
        unit: such as ``"clips/s"``.
        more_is_better: whether a larger one is the better.
        ours: False for what a change of this project cannot move: if it moves, the machine did it.
    """

    value: float
    low: float
    high: float
    unit: str
    more_is_better: bool
    ours: bool = True

    def on_a_machine(self, faster: float) -> Figure:
        """What it would be on a machine that is so many times as fast."""
        factor = faster if self.more_is_better else 1.0 / faster
        return replace(self, value=self.value * factor, low=self.low * factor, high=self.high * factor)


OTHER_KERNELS = ("MKL", "torchaudio", "DALI", "NumPy", "skimage")
"""How the rows of ``kernels.py`` begin that run other libraries' code."""
ENOUGH = 3
"""Figures of others that tell what the machine did."""


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
            ours = not row.startswith(OTHER_KERNELS)
            found[f"{table}: {row}"] = Figure(median, best, 2 * median - best, "ms", False, ours)
    return found


def _throughput(result: dict) -> dict[str, Figure]:
    found = {}
    for row in result.get("rows", ()):
        name = f"{row['title']} on {row['source']}, {row['workers']} workers"
        (low, high), ours = row["range"], row["kind"] == "ours" or row["title"].endswith(", ours")
        rate, cpu = row["clips_per_s"], row["cpu_s_per_1000"]
        found[name] = Figure(rate, low, high, "clips/s", True, ours)
        # Only the median is kept of the CPU time: it is taken to vary as the rate did.
        found[f"{name}: CPU"] = Figure(cpu, cpu * rate / high, cpu * rate / low, "ms/clip", False, ours)
    return found


def _train_step(result: dict) -> dict[str, Figure]:
    rows = {**result.get("rows", {}), **{f"labelled: {k}": v for k, v in result.get("labelled", {}).items()}}
    return {name: of_samples(row["seconds"], "s", False) for name, row in rows.items() if row["seconds"]}


def _matrix_unit(result: dict) -> dict[str, Figure]:
    found = {}
    for name, row in result.get("rows", {}).items():
        for side in ("ours", "torch"):
            median, spared = row[side]["median_ms"], row[side]["spared_ms"]
            # As of the kernels: of the slow ones nothing is kept.
            found[f"{name}, {side}"] = Figure(median, spared, 2 * median - spared, "ms", False, side == "ours")
    return found


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


def _scenarios(result: dict) -> dict[str, Figure]:
    return {row["name"]: of_samples(row["samples"], "clips/s", True) for row in result.get("rows", ())}


def _live(result: dict) -> dict[str, Figure]:
    return {name: of_samples([1e6 * row["seconds"]], "us", False) for name, row in result.get("rows", {}).items()}


READERS = {
    "kernels": _kernels,
    "throughput": _throughput,
    "train_step": _train_step,
    "train_step_gpu": _train_step,
    "matrix_unit": _matrix_unit,
    "teach": _teach,
    "plan": _plan,
    "scale": _scale,
    "scenarios": _scenarios,
    "live": _live,
}


def machine_speed(old: dict[str, Figure], new: dict[str, Figure]) -> float:
    """How much faster the machine was for the new figures: what the others' gained in the median; 1.0 = cannot tell."""
    both = [name for name in old if name in new and not new[name].ours and old[name].value and new[name].value]
    gains = [new[name].value / old[name].value for name in both]
    gains = [gain if new[name].more_is_better else 1.0 / gain for name, gain in zip(both, gains, strict=True)]
    return statistics.median(gains) if len(gains) >= ENOUGH else 1.0


def compare(old: dict[str, Figure], new: dict[str, Figure], noise: float = 0.05) -> list[dict]:
    """Every figure of one benchmark that both runs have, and whether it has changed by more than the machine's speed,
    its samples and ``noise`` can explain.

    Returns:
        Rows ``name``, ``unit``, ``old``, ``new``; ``machine``, its speed, see :func:`machine_speed`; ``change`` beside
        that (0.1 = a tenth more); ``verdict``: ``"better"``, ``"worse"`` where the ranges of the samples lie apart and
        the medians by more than ``noise``; else ``"same"``.
    """
    rows, faster = [], machine_speed(old, new)
    for name in [name for name in old if name in new]:
        a, b = old[name].on_a_machine(faster), new[name]
        change = b.value / a.value - 1.0 if a.value else 0.0
        apart = b.low > a.high or b.high < a.low
        verdict = "same"
        if apart and abs(change) > noise:
            verdict = "better" if (change > 0) == b.more_is_better else "worse"
        row = {"name": name, "unit": b.unit, "old": old[name].value, "new": b.value, "change": change}
        rows.append(row | {"verdict": verdict, "machine": faster})
    return rows
