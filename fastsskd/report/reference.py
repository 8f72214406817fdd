"""Reference curves: a run's metrics thinned to a small table a stage, to lay beside those of another run.

A folder of them holds ``reference.json``, the settings they belong to, and ``STAGE.csv`` of each stage.
"""

from __future__ import annotations

import csv
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastsskd.errors import InputError
from fastsskd.report.data import RunData

ABOUT = "reference.json"
ROWS = 60
"""Of a stage's table, each the mean of as many lines as it takes."""
OF_THE_MACHINE = {"stage", "clips", "seconds", "wait", "clips_per_second", "headroom", "mfu"}
SECTIONS = ("mask", "model", "loss", "ssl", "distill", "augment", "optim", "recipe")
"""Of the configuration: what the curves depend on, besides the clips, their length and the batch."""


@dataclass(frozen=True)
class Reference:
    """Curves to compare with: ``settings`` by ``section.key``, and the lines of each stage by its name."""

    folder: Path
    settings: dict[str, Any]
    stages: dict[str, list[dict[str, float]]]


def settings_of(run: RunData) -> dict[str, Any]:
    """What a run's curves depend on, by ``section.key``."""
    found = {f"{section}.{key}": value for section in SECTIONS for key, value in run.settings.get(section, {}).items()}
    found["data.seconds"] = run.settings.get("data", {}).get("seconds")
    found["train_batch_size"] = run.deepspeed.get("train_batch_size")
    found["Multi-SSL clips"], found["training clips"] = run.counts["num_ssl"], run.counts["num_train"]
    return found


def save(run: RunData, folder: Path) -> list[Path]:
    """Write a run's curves into ``folder``; returns the files."""
    folder.mkdir(parents=True, exist_ok=True)
    about = {"settings": settings_of(run), "seed": run.settings.get("run", {}).get("seed")}
    about["versions"] = run.result.get("versions", {})
    files = [folder / ABOUT]
    files[0].write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    for stage in run.stages:
        rows = thinned(stage.lines)
        if rows:
            files.append(folder / f"{stage.name}.csv")
            names = list(dict.fromkeys(name for row in rows for name in row))
            with open(files[-1], "w", encoding="utf-8", newline="") as file:
                writer = csv.DictWriter(file, names, restval="", lineterminator="\n")
                writer.writeheader()
                writer.writerows({name: f"{value:.4g}" for name, value in row.items()} for row in rows)
    return files


def thinned(lines: list[dict[str, Any]]) -> list[dict[str, float]]:
    """At most ``ROWS`` lines, each the mean of neighbours; without what tells of the machine alone."""
    every = -(-len(lines) // ROWS)
    rows = []
    for begin in range(0, len(lines), max(every, 1)):
        own = lines[begin : begin + every]
        row = {}
        for name in dict.fromkeys(name for line in own for name in line if name not in OF_THE_MACHINE):
            values = [line[name] for line in own if isinstance(line.get(name), (int, float))]
            if values:
                row[name] = sum(values) / len(values)
        rows.append(row)
    return rows


def load(folder: str | Path) -> Reference:
    """Read what :func:`save` wrote.

    Raises:
        InputError: there is no such thing, or it is damaged.
    """
    folder = Path(folder)
    try:
        settings = json.loads((folder / ABOUT).read_text(encoding="utf-8"))["settings"]
        stages = {file.stem: _read(file) for file in sorted(folder.glob("*.csv"))}
    except FileNotFoundError:
        raise InputError(f"reference {folder}: no {ABOUT} there; benchmarks/reference.py RUN makes one") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"reference {folder}: damaged ({error}); make it again with benchmarks/reference.py") from None
    return Reference(folder, settings, stages)


def _read(file: Path) -> list[dict[str, float]]:
    with open(file, encoding="utf-8", newline="") as opened:
        rows = [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(opened)]
    if not all("epoch" in row for row in rows):
        raise ValueError(f"{file.name}: a row without an epoch")
    return rows


def differences(reference: Reference, run: RunData) -> list[str]:
    """What the two do not share, such as ``"ssl.epochs 8 (reference: 20)"``."""
    own = settings_of(run)
    names = [name for name in reference.settings if own.get(name) != reference.settings[name]]
    return [f"{name} {json.dumps(own.get(name))} (reference: {json.dumps(reference.settings[name])})" for name in names]
