"""The report of a cross-validation: what its folds say together."""

from __future__ import annotations

import json
from html import escape
from pathlib import Path
from typing import Any

from fastsskd.errors import InputError
from fastsskd.evaluation import score_file
from fastsskd.evaluation.kfold import RESULT, gain
from fastsskd.evaluation.metrics import NAMES, classification_metrics
from fastsskd.evaluation.score_file import ClipScores
from fastsskd.report.html import document, note, section, table
from fastsskd.report.scores import classes, mistakes

_TITLES = {"d_prime": "d'"}


def is_folds(path: Path) -> bool:
    return (path / RESULT).exists()


def read_folds(path: Path) -> dict[str, Any]:
    """``kfold.json``.

    Raises:
        InputError: it is damaged.
    """
    try:
        found = json.loads((path / RESULT).read_text(encoding="utf-8"))
        if {"folds", "seeds", "rows", "runs"} <= found.keys():
            return found
        problem = "it lacks folds, seeds, rows or runs"
    except (OSError, ValueError, AttributeError) as error:
        problem = str(error)
    raise InputError(f"{path / RESULT}: not a cross-validation's result ({problem}); run launch/kfold.py again")


def folds_page(path: Path, found: dict[str, Any]) -> str:
    """The whole page."""
    last = next(name for name in reversed(found["rows"]) if name != "ensemble")
    parts = [_head(path, found), *(_metric(found, metric) for metric in NAMES), _runs(found)]
    scores = _pooled(path, found, last)
    if scores is not None:
        title = f"{last}, clips of all folds"
        parts += [classes(title, classification_metrics(scores.probs, scores.label, scores.classes))]
        parts += [mistakes(title, scores)]
    return document(f"{path.resolve().name}: fastsskd cross-validation", parts)


def _head(path: Path, found: dict[str, Any]) -> str:
    row = next(iter(found["rows"].values()))
    text = f"{len(found['folds'])} folds, {len(found['seeds'])} seed(s), {row['num_clips']} clips, "
    text += f"{row['num_classes']} classes; weights: {found.get('weights', 'not noted')}"
    skipped = {key for run in found["runs"] for key in run["skipped"]}
    problem = f'<p class="problem">{len(skipped)} clip(s) could not be used.</p>' if skipped else ""
    return f"<header><h1>{escape(str(path))}</h1>{note(text)}{problem}</header>"


def _metric(found: dict[str, Any], metric: str) -> str:
    """A row a stage, a column a fold; nothing if no stage has this metric."""
    rows = []
    for name, row in found["rows"].items():
        own = row.get(metric)
        if own is not None:
            spread = [own.get(what) for what in ("mean", "std_folds", "std_seeds")]
            folds = [own["folds"].get(str(fold)) for fold in found["folds"]]
            gains = [gain(own.get(what)) or None for what in ("over_before", "over_first")]
            rows.append((name, *spread, row["pooled"].get(metric), *gains, *folds))
    if not rows:
        return ""
    header = ("stage", "mean", "std of folds", "std of seeds", "clips of all folds as one")
    gains = ("over the row above", "over the first")
    columns = (*header, *gains, *(f"fold {k}" for k in found["folds"]))
    return section(_TITLES.get(metric, metric), table(columns, rows))


def _runs(found: dict[str, Any]) -> str:
    rows = [(run["fold"], run["seed"], run["folder"], run["num_train"], len(run["skipped"])) for run in found["runs"]]
    return section(
        "Trainings",
        note("Each has a report of its own: fastsskd report FOLDER."),
        table(("fold", "seed", "folder", "training clips", "left out"), rows, (2,)),
    )


def _pooled(path: Path, found: dict[str, Any], stage: str) -> ClipScores | None:
    """Scores of all folds' clips, each by the model that was not trained on it, of the first seed; None if not kept."""
    seed = found["seeds"][0]
    folders = [path / run["folder"] for run in found["runs"] if run["seed"] == seed]
    files = [score_file.of_stage(folder, stage) for folder in folders]
    try:
        return score_file.pooled([score_file.load(file) for file in files])
    except InputError:
        return None
