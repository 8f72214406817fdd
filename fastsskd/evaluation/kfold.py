"""Cross-validation: a training for each fold and seed, and what they say together.

OUT holds a folder and a log of each training, ``foldK-seedS``, and ``kfold.json``.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fastsskd import durable
from fastsskd.config import Config
from fastsskd.config import load as load_config
from fastsskd.errors import InputError, UsageError
from fastsskd.evaluation import score_file
from fastsskd.evaluation.metrics import NAMES, classification_metrics
from fastsskd.loader import open_manifest
from fastsskd.many_runs import Job, run_many
from fastsskd.text_table import aligned

RESULT = "kfold.json"
WEIGHTS = {
    "last": "those of the last epoch",
    "average": "the mean of the last epochs'",
    "best": "best epoch, chosen on the evaluation fold: optimistic",
}


def cross_validate(
    *,
    config: str | Path,
    ds_config: str | Path,
    launcher: str | Path,
    overrides: Sequence[str] = (),
    folds: Sequence[int] = (),
    seeds: Sequence[int] = (0,),
    **how: Any,
) -> dict[str, Any]:
    """Train once for each fold and seed, and write ``kfold.json`` in ``run.out``; the same call goes on where it ended.

    Each training is evaluated on one fold and trained on the others: on all others of the manifest, or on those of
    ``data.train_folds`` if the configuration names some; folds that it leaves out are left out here too.

    Args:
        config, ds_config, launcher: see :func:`~fastsskd.many_runs.run_many`.
        overrides: ``section.key=value``, of all trainings.
        folds: to evaluate on, one after the other; empty = all that there are.
        seeds: of ``run.seed``; each is a training of every fold.
        how: ``parallel``, ``threads`` and ``keep`` of :func:`~fastsskd.many_runs.run_many`.

    Returns:
        The contents of ``kfold.json``, see :func:`summary`.

    Raises:
        InputError: no folds, a fold that is not there, a training that failed.
        UsageError: a configuration that names the evaluation clips in another way; a seed or fold twice.
    """
    settings = load_config(config, list(overrides))
    jobs = plan(settings, [text for text in overrides if not _sets(text, "run.out")], folds, seeds)
    out = Path(settings.run.out)
    files = {"config": config, "ds_config": ds_config, "launcher": launcher}
    results = run_many([job for job, _, _ in jobs], **files, out=out, **how)
    runs = {(fold, seed): (results[job.name], out / job.name) for job, fold, seed in jobs}
    average = f"; their moving average, {settings.distill.ema} a step" if settings.distill.ema else ""
    found = {**summary(runs), "weights": WEIGHTS[settings.distill.select] + average}
    durable.write_text(out / RESULT, json.dumps(found, indent=1))
    return found


def _sets(text: str, name: str) -> bool:
    return text.partition("=")[0].strip() == name


def plan(
    settings: Config, overrides: Sequence[str], folds: Sequence[int], seeds: Sequence[int]
) -> list[tuple[Job, int, int]]:
    """The jobs, each with its fold and seed; all folds of a seed before the next seed."""
    data = settings.data
    if data.eval_manifest:
        raise UsageError("data.eval_manifest is set: k-fold evaluates on the folds of data.manifest; leave it empty")
    if "distill" not in settings.recipe.stages:
        raise UsageError(
            "recipe.stages has no distill: there is nothing to evaluate; see `fastsskd probe` for features"
        )
    for name, values in (("fold", folds), ("seed", seeds)):
        if len(set(values)) < len(values):
            raise UsageError(f"a {name} is named twice: name each once")
    if not data.manifest:
        raise InputError("data.manifest is not set; see `fastsskd index --help`, then --set data.manifest=M")
    present = sorted(int(fold) for fold in np.unique(open_manifest(data.manifest).folds) if fold > 0)
    used = sorted(data.train_folds) or present
    unknown = sorted({*used, *folds} - set(present))
    if unknown or len(present) < 2:
        there = ", ".join(map(str, present)) or "none"
        problem = f"no clip is in fold {unknown[0]}" if unknown else "k-fold needs two folds or more"
        raise InputError(f"{data.manifest}: {problem}; its folds are {there}")
    jobs = []
    for seed in seeds:
        for fold in folds or used:
            train = [other for other in used if other != fold]
            own = (f"data.eval_folds=[{fold}]", f"data.train_folds={train}", f"run.seed={seed}")
            jobs.append((Job(f"fold{fold}-seed{seed}", (*overrides, *own)), fold, seed))
    return jobs


def summary(runs: dict[tuple[int, int], tuple[dict[str, Any], Path]]) -> dict[str, Any]:
    """What the runs say together.

    Args:
        runs: ``result.json`` and folder of each, by fold and seed; all folds with all seeds.

    Returns:
        ``folds``, ``seeds``; ``rows``, for each stage that was evaluated and for the ensemble of the iterations: of
        each metric the ``mean`` over all runs, ``std_folds`` and ``std_seeds`` (of the folds' means over seeds, and
        of the seeds' means over folds; n - 1 below the line; None of one), and each fold's and seed's mean;
        ``over_first`` and ``over_before``, see :func:`paired`, over the first row and the one before; ``pooled``, the
        metrics of all folds' clips as one set, mean over seeds; ``num_clips``, ``num_classes`` of that set. ``runs``:
        each run's own metrics, the name of its folder, and clips left out.
    """
    folds, seeds = (sorted({key[side] for key in runs}) for side in (0, 1))
    metrics = {key: metrics_by_stage(result) for key, (result, _) in runs.items()}
    names = list(next(iter(metrics.values())))
    rows = {}
    for name, before in zip(names, [None, *names], strict=False):
        rows[name] = {metric: _row(metrics, name, before, names[0], metric) for metric in NAMES}
        pooled = [_pooled([runs[fold, seed][1] for fold in folds], name) for seed in seeds]
        rows[name]["pooled"] = {metric: _mean([own[metric] for own in pooled]) for metric in NAMES}
        rows[name] |= {"num_clips": pooled[0]["num_clips"], "num_classes": pooled[0]["num_classes"]}
    each = [
        {
            "fold": fold,
            "seed": seed,
            "folder": folder.name,
            "metrics": {name: _short(own) for name, own in metrics[fold, seed].items()},
            "num_train": result["num_train"],
            "skipped": result["skipped"],
        }
        for (fold, seed), (result, folder) in runs.items()
    ]
    return {"folds": folds, "seeds": seeds, "rows": rows, "runs": each}


def metrics_by_stage(result: dict[str, Any]) -> dict[str, dict[str, Any] | None]:
    """The metrics in a ``result.json`` by their stage, ``"ensemble"`` among them; None where it has none."""
    found = {"teacher": result["teacher"]["metrics"]} if result["teacher"] else {}
    for iteration in result["iterations"]:
        found[f"iter{iteration['iteration']}-distill"] = iteration["metrics"]
    return found | ({"ensemble": result["ensemble"]} if result["ensemble"] else {})


def _short(metrics: dict[str, Any]) -> dict[str, Any]:
    return {name: metrics[name] for name in (*NAMES, "num_clips", "num_classes")}


def _row(metrics: dict[tuple[int, int], Any], name: str, before: str | None, first: str, metric: str) -> Any:
    """One metric of a stage: mean, spread and gains; None where a run has none."""

    def of_runs(stage: str) -> dict[tuple[int, int], float]:
        values = {key: own[stage] and own[stage][metric] for key, own in metrics.items()}
        return {key: value for key, value in values.items() if value is not None}

    own = of_runs(name)
    if len(own) < len(metrics):
        return None
    over_first, over_before = (paired(own, of_runs(other)) if before else None for other in (first, before))
    return {**_spread(own), "over_first": over_first, "over_before": over_before}


def _spread(values: dict[tuple[int, int], float]) -> dict[str, Any]:
    folds, seeds = (sorted({key[side] for key in values}) for side in (0, 1))
    table = np.array([[values[fold, seed] for seed in seeds] for fold in folds])
    of_folds, of_seeds = table.mean(axis=1), table.mean(axis=0)
    return {
        "mean": float(table.mean()),
        "std_folds": _std(of_folds),
        "std_seeds": _std(of_seeds),
        "folds": dict(zip(map(str, folds), of_folds.tolist(), strict=True)),
        "seeds": dict(zip(map(str, seeds), of_seeds.tolist(), strict=True)),
    }


def paired(own: dict[Any, float], other: dict[Any, float]) -> dict[str, Any] | None:
    """What ``own`` is above ``other``, from the trainings that both have, by fold and seed.

    Returns:
        ``mean`` of the differences, their ``standard_error`` (None of a single one), how many are above zero
        (``better``) and how many there are (``pairs``); None without a pair.
    """
    gains = np.array([value - other[key] for key, value in own.items() if key in other])
    if not len(gains):
        return None
    spread = _std(gains)
    return {
        "mean": float(gains.mean()),
        "standard_error": None if spread is None else spread / len(gains) ** 0.5,
        "better": int((gains > 0).sum()),
        "pairs": len(gains),
    }


def gain(found: dict[str, Any] | None) -> str:
    """:func:`paired` in words, such as ``"+0.012 ± 0.005"``; empty without a pair."""
    if found is None:
        return ""
    error = "" if found["standard_error"] is None else f" ± {found['standard_error']:.3f}"
    return f"{found['mean']:+.3f}{error}"


def _std(values: np.ndarray) -> float | None:
    return float(values.std(ddof=1)) if len(values) > 1 else None


def _mean(values: list[float | None]) -> float | None:
    return None if None in values else float(np.mean(values))


def _pooled(folders: list[Path], name: str) -> dict[str, Any]:
    """Metrics of all folds' evaluation clips, each with the scores of the model that was not trained on it."""
    scores = score_file.pooled([score_file.load(score_file.of_stage(folder, name)) for folder in folders])
    return classification_metrics(scores.probs, scores.label, scores.classes)


def table(found: dict[str, Any]) -> str:
    """The table of ``kfold.json``: a row a stage, a column a fold, then mean, spreads, pooled clips and gains."""
    rows = found["rows"]
    names = ("accuracy", "mAP") if any(row["accuracy"] for row in rows.values()) else ("mAP", "AUC", "d_prime")
    text = []
    for metric in names:
        folds = [f"fold {fold}" for fold in found["folds"]]
        lines = [(metric, *folds, "mean", "std folds", "std seeds", "pooled", "over the row above", "over the first")]
        for name, row in rows.items():
            own = row[metric] or {"folds": {}}
            numbers = [own["folds"].get(str(fold)) for fold in found["folds"]]
            numbers += [own.get(what) for what in ("mean", "std_folds", "std_seeds")] + [row["pooled"][metric]]
            gains = [gain(own.get(what)) or "-" for what in ("over_before", "over_first")]
            lines.append((name, *("-" if number is None else f"{number:.4f}" for number in numbers), *gains))
        text += [*aligned(lines), ""]
    row = next(iter(rows.values()))
    seeds = f"{len(found['seeds'])} seed{'s' if len(found['seeds']) > 1 else ''}"
    text.append(f"{row['num_clips']} clips, {row['num_classes']} classes; {len(found['folds'])} folds, {seeds}")
    skipped = len({key for run in found["runs"] for key in run["skipped"]})
    text += ["gains: mean and standard error over pairs of the same fold and seed"] if len(rows) > 1 else []
    text += [f"{skipped} clip(s) left out, see result.json of the runs"] if skipped else []
    text.append(f"weights: {found['weights']}")
    return "\n".join(text)
