"""What a finished run shows: a table for the terminal and the plots in its folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastsskd.run_folder import read_metrics


def show(path: Path, result: dict[str, Any]) -> str:
    """Draw the loss curves of the run at ``path`` and return its table as text."""
    from fastsskd.figures import loss_curves

    lines = read_metrics(path)
    if lines:
        loss_curves(lines, path / "plots" / "losses.png")
    return table(path, result)


def table(path: Path, result: dict[str, Any]) -> str:
    """One row a stage: last epoch's losses, metrics on the evaluation set, speed, share of time waiting for data."""
    rows = [("stage", "loss terms (mean of the last epoch)", "accuracy", "mAP", "clips/s", "wait %")]
    named = [("teacher", result["teacher"])] if result["teacher"] else []
    for iteration in result["iterations"]:
        named += [
            (f"iter{iteration['iteration']}-{kind}", iteration[kind])
            for kind in ("ssl", "distill")
            if kind in iteration
        ]
    for name, stage in named:
        rows.append((name, _losses(stage.get("losses", {})), *_scores(stage["metrics"]), *_speed(stage)))
    if result["ensemble"]:
        rows.append(("ensemble", "", *_scores(result["ensemble"]), "", ""))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    text.insert(1, "-" * sum(widths, 2 * len(widths) - 2))
    chance = _chance(result["metrics"])
    text.append(
        f"{result['num_train']} training clips, {result['num_eval']} for evaluation{chance}; see {path}/result.json"
    )
    if result["skipped"]:
        text.append(f"{len(result['skipped'])} clip(s) could not be used and were left out:")
        text += [f"  {key}: {reason}" for key, reason in list(result["skipped"].items())[:20]]
        if len(result["skipped"]) > 20:
            text.append(f"  ... all of them in {path}/result.json")
    return "\n".join(text)


def _losses(losses: dict[str, float]) -> str:
    return "  ".join(f"{name} {value:.3f}" for name, value in losses.items())


def _scores(metrics: dict[str, Any] | None) -> tuple[str, str]:
    if metrics is None:
        return "", ""
    return tuple("-" if metrics[name] is None else f"{metrics[name]:.3f}" for name in ("accuracy", "mAP"))


def _speed(stage: dict[str, Any]) -> tuple[str, str]:
    return (f"{stage['clips_per_second']:.1f}", f"{100 * stage['wait']:.1f}") if "wait" in stage else ("", "")


def _chance(metrics: dict[str, Any] | None) -> str:
    if metrics is None or metrics["accuracy"] is None:
        return ""
    return f"; chance is {1 / len(metrics['per_class']):.3f}"
