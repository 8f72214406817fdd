"""What a run's folder tells: everything a report shows, read from files that may be missing, stale or cut short."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fastsskd import config
from fastsskd.errors import InputError
from fastsskd.evaluation import score_file
from fastsskd.evaluation.confusion import confusion_matrix, most_confused
from fastsskd.evaluation.score_file import ClipScores
from fastsskd.health import Watch
from fastsskd.run_folder import BAD_STEPS, COUNTS, METRICS, PROGRESS, RESULT, read_lines, read_metrics

HARDEST = 20
"""Clips that are shown as the hardest."""


@dataclass(frozen=True)
class StageData:
    """One stage as far as it has come.

    Attributes:
        name: such as ``"iter1-ssl"``.
        lines: its lines of metrics.jsonl.
        summary: losses and health of its last epoch, speed, waiting, seconds; empty before it has ended.
        metrics: of its evaluation; None without one.
        problems: sentences, each with the step at which it began.
        pictures: files, in the order of the epochs.
        scores: of every clip of the evaluation set, if the run kept them.
        done: it was trained and, where that belongs to it, evaluated.
    """

    name: str
    lines: list[dict[str, Any]]
    summary: dict[str, Any]
    metrics: dict[str, Any] | None
    problems: list[tuple[int, str]]
    pictures: list[Path]
    scores: ClipScores | None
    done: bool

    @property
    def is_ssl(self) -> bool:
        return self.name.endswith("-ssl")


@dataclass(frozen=True)
class RunData:
    """A run.

    Attributes:
        status: ``"complete"``, ``"stopped"``, ``"failed"``, or ``"unfinished"``: going on, or killed.
        reason: why it stopped or failed; of an unfinished one, when it was last heard of.
        result: result.json; empty if there is none.
        settings: config.toml as nested dictionaries; ``changed``: the fields that differ from their defaults.
        deepspeed: ds_config.json.
        skipped: reasons of the clips that were left out; ``bad_steps``: lines of bad_steps.jsonl.
    """

    path: Path
    status: str
    reason: str
    stages: list[StageData]
    result: dict[str, Any]
    settings: dict[str, Any]
    changed: dict[str, Any]
    deepspeed: dict[str, Any]
    skipped: dict[str, str]
    bad_steps: list[dict[str, Any]]
    counts: dict[str, int | None]
    unreadable: list[str] = field(default_factory=list)

    @property
    def last_evaluated(self) -> StageData | None:
        return next((stage for stage in reversed(self.stages) if stage.metrics), None)


def is_run(path: Path) -> bool:
    return (path / "config.toml").exists() or (path / METRICS).exists()


def read_run(path: str | Path) -> RunData:
    """Read the run at ``path``, whatever state it is in; files that cannot be read are named in ``unreadable``.

    Raises:
        InputError: it is no run's folder.
    """
    path = Path(path)
    if not path.is_dir():
        raise InputError(f"run {path}: no such folder; give the folder of a run (run.out)")
    if not is_run(path):
        raise InputError(f"run {path}: not the folder of a run: it has neither config.toml nor {METRICS}")
    unreadable: list[str] = []
    result, progress, deepspeed = (_json(path / name, unreadable) for name in (RESULT, PROGRESS, "ds_config.json"))
    settings = _settings(path / "config.toml", unreadable)
    status, reason = _status(path, result)
    return RunData(
        path=path,
        status=status,
        reason=reason,
        stages=_stages(path, progress, settings, unreadable),
        result=result,
        settings=settings,
        changed=_changed(settings),
        deepspeed=deepspeed,
        skipped=_skipped(path, result, progress),
        bad_steps=read_lines(path / BAD_STEPS),
        counts={name: progress.get(name) for name in COUNTS},
        unreadable=unreadable,
    )


def _json(file: Path, unreadable: list[str]) -> dict[str, Any]:
    if not file.exists():
        return {}
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        return found if isinstance(found, dict) else {}
    except (OSError, ValueError) as error:
        unreadable.append(f"{file.name}: {error}")
        return {}


def _settings(file: Path, unreadable: list[str]) -> dict[str, Any]:
    """The TOML as it is: a run of another version may have fields that are unknown here."""
    if not file.exists():
        return {}
    try:
        return config.tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        unreadable.append(f"{file.name}: {error}")
        return {}


def _changed(settings: dict[str, Any]) -> dict[str, Any]:
    """``section.key`` -> value of what differs from today's defaults."""
    defaults = json.loads(json.dumps(config.to_dict(config.Config())))
    return {
        f"{section}.{key}": value
        for section, fields in settings.items()
        if isinstance(fields, dict)
        for key, value in fields.items()
        if key not in defaults.get(section, {}) or value != defaults[section][key]
    }


def _status(path: Path, result: dict[str, Any]) -> tuple[str, str]:
    if result.get("status"):
        return result["status"], result.get("reason", "")
    file = path / METRICS if (path / METRICS).exists() else path / "config.toml"
    ago = max(0.0, time.time() - file.stat().st_mtime)
    return "unfinished", f"going on, or killed: it last wrote {duration(ago)} ago"


def _stages(path: Path, progress: dict[str, Any], settings: dict[str, Any], unreadable: list[str]) -> list[StageData]:
    """The stages that left something, in the order in which they ran."""
    done = progress.get("stages", {})
    lines = [line for line in read_metrics(path) if {"stage", "step", "epoch"} <= line.keys()]
    names = list(dict.fromkeys([*done, *(line["stage"] for line in lines)]))
    names.sort(key=_order)
    stages = []
    for name in names:
        own = [line for line in lines if line["stage"] == name]
        summary = done.get(name, {})
        scores = None
        file = score_file.of_stage(path, name)
        if file.exists():
            try:
                scores = score_file.load(file)
            except InputError as error:
                unreadable.append(str(error))
        pictures = sorted((path / "plots").glob(f"{name}-views-epoch*.png"))
        pictures += [file for file in [path / "plots" / f"{name}-views.png"] if file.exists()]
        problems = _problems(own, settings) if name.endswith("-ssl") else []
        numbers = {key: value for key, value in summary.items() if key != "metrics"}
        metrics = summary.get("metrics")
        stages.append(StageData(name, own, numbers, metrics, problems, pictures, scores, name in done))
    return stages


def _order(name: str) -> tuple[int, int]:
    """The teacher, then iteration after iteration, Multi-SSL before labels."""
    number, _, kind = name.removeprefix("iter").partition("-")
    return (int(number), kind != "ssl") if number.isdigit() else (0, 0)


def _problems(lines: list[dict[str, Any]], settings: dict[str, Any]) -> list[tuple[int, str]]:
    """What the run's own watch said, from its lines."""
    watch, found = Watch(), []
    for line in lines:
        per_epoch = line["step"] / line["epoch"] if line.get("epoch") else 0.0
        warmup = round(settings.get("ssl", {}).get("warmup_epochs", 1.0) * per_epoch)
        found += [(line["step"], text) for text in watch.see(line, warmup)]
    return found


def _skipped(path: Path, result: dict[str, Any], progress: dict[str, Any]) -> dict[str, str]:
    skipped = {**progress.get("skipped", {}), **(result.get("skipped") or {})}
    file = path / "skipped.tsv"
    for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else ():
        key, _, reason = line.partition("\t")
        skipped.setdefault(key, reason)
    return skipped


def duration(seconds: float) -> str:
    """``45 s``, ``12 min``, ``3.5 h``, ``4 days``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 172800 else f"{seconds / 86400:.0f} days"


# ------------------------------------------------------------------------------------------------ from clips' scores


def hardest(scores: ClipScores, most: int = HARDEST) -> list[dict[str, Any]]:
    """The clips whose labels got the lowest probability: ``key``, ``labels``, their ``prob``, what was ``guessed``.

    Of several labels the mean probability counts. Clips without a label are left out.
    """
    single = scores.label.ndim == 1
    hot = np.eye(len(scores.classes))[scores.label] if single else scores.label.astype(np.float64)
    labelled = np.flatnonzero(hot.sum(axis=1) > 0)
    prob = (hot[labelled] * scores.probs[labelled]).sum(axis=1) / hot[labelled].sum(axis=1)
    found = []
    for row in np.argsort(prob, kind="stable")[:most]:
        clip = labelled[row]
        guess = int(scores.probs[clip].argmax())
        found.append(
            {
                "key": str(scores.key[clip]),
                "labels": [scores.classes[c] for c in np.flatnonzero(hot[clip])],
                "prob": float(prob[row]),
                "guessed": scores.classes[guess],
                "guessed_prob": float(scores.probs[clip, guess]),
            }
        )
    return found


def confused(scores: ClipScores) -> tuple[list[list[int]], list[dict[str, Any]]] | None:
    """Confusion matrix and the pairs most often confused; None for clips with several labels."""
    if scores.label.ndim != 1:
        return None
    matrix = confusion_matrix(scores.probs, scores.label)
    return matrix.tolist(), most_confused(matrix, scores.classes)


def numbers(run: RunData) -> dict[str, Any]:
    """The report's numbers for programs: ``fastsskd report --json``."""
    last = run.last_evaluated
    return {
        "run": str(run.path),
        "status": run.status,
        "reason": run.reason,
        **run.counts,
        "stages": [
            {
                "name": stage.name,
                "done": stage.done,
                "step": stage.lines[-1]["step"] if stage.lines else None,
                "epoch": stage.lines[-1]["epoch"] if stage.lines else None,
                **stage.summary,
                "metrics": stage.metrics,
                "problems": [{"step": step, "problem": text} for step, text in stage.problems],
            }
            for stage in run.stages
        ],
        "ensemble": run.result.get("ensemble"),
        "hardest": hardest(last.scores) if last and last.scores else [],
        "confused": (confused(last.scores) or ([], []))[1] if last and last.scores else [],
        "changed": run.changed,
        "skipped": run.skipped,
        "bad_steps": run.bad_steps,
        "seed": run.settings.get("run", {}).get("seed"),
        "versions": run.result.get("versions", {}),
    }


def by_class(metrics: dict[str, Any]) -> Sequence[tuple[str, dict[str, Any]]]:
    """``(class, its metrics)``, the worst average precision first; classes that could not be rated last."""
    rows = metrics["per_class"].items()
    return sorted(rows, key=lambda row: (row[1].get("AP") is None, row[1].get("AP") or 0.0))
