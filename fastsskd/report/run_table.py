"""What a finished run shows: a table for the terminal, and a plot and a page in its folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastsskd import durable
from fastsskd.errors import InputError
from fastsskd.health import VIEWS
from fastsskd.report.data import read_run
from fastsskd.report.page import page
from fastsskd.run_folder import clip_counts, read_metrics
from fastsskd.text_table import aligned

PAGE = "report.html"


def show(path: Path, result: dict[str, Any]) -> str:
    """Draw the loss curves of the run at ``path``, write its page, and return its table as text."""
    from fastsskd.figures import loss_curves

    lines = read_metrics(path)
    if lines:
        loss_curves(lines, path / "plots" / "losses.png")
    text = table(path, result)
    try:
        return f"{text}\nThe whole report: {write_page(page(read_run(path)), path / PAGE)}"
    except Exception as error:  # the run is complete: nothing about its page may spoil that
        return f"{text}\n{PAGE} could not be written: {error!r}"


def write_page(text: str, file: Path) -> Path:
    """Write a report's page, whole or not at all.

    Raises:
        InputError: it cannot be written there.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        durable.write_text(file, text)
    except OSError as error:
        raise InputError(f"{file}: cannot be written: {error.strerror}; choose another place with --out") from None
    return file


def table(path: Path, result: dict[str, Any]) -> str:
    """One row a stage: loss, metrics on the evaluation set, speed, share of time waiting; then each stage's terms and
    the health of its pre-training."""
    named = [("teacher", result["teacher"])] if result["teacher"] else []
    for iteration in result["iterations"]:
        kinds = [kind for kind in ("ssl", "distill") if kind in iteration]
        named += [(f"iter{iteration['iteration']}-{kind}", iteration[kind]) for kind in kinds]
    rows = [("stage", "loss", "accuracy", "mAP", "clips/s", "wait %")]
    for name, stage in named:
        loss = stage.get("losses", {}).get("loss")
        rows.append((name, "" if loss is None else f"{loss:.3f}", *_scores(stage["metrics"]), *_speed(stage)))
    if result["ensemble"]:
        rows.append(("ensemble", "", *_scores(result["ensemble"]), "", ""))
    text = aligned(rows)
    terms = [(name, _terms(stage.get("losses", {}))) for name, stage in named]
    text += ["", "Terms of the loss, mean of the last epoch:", *aligned(terms), ""]
    healths = [(name, _health(stage["health"])) for name, stage in named if stage.get("health")]
    if healths:
        text += ["Health of Multi-SSL, last epoch:", *aligned(healths), ""]
    text.append(f"{clip_counts(result)}{_chance(result['metrics'])}; see {path}/result.json")
    return "\n".join(text + _skipped(path, result["skipped"]))


def _skipped(path: Path, skipped: dict[str, str]) -> list[str]:
    """Every clip that was left out, with its reason; the first 20 of many."""
    if not skipped:
        return []
    text = [f"{len(skipped)} clip(s) could not be used and were left out:"]
    text += [f"  {key}: {reason}" for key, reason in list(skipped.items())[:20]]
    return text if len(skipped) <= 20 else [*text, f"  ... all of them in {path}/skipped.tsv"]


def _terms(losses: dict[str, float]) -> str:
    return "  ".join(f"{name} {value:.3f}" for name, value in losses.items() if name != "loss")


def _health(health: dict[str, float]) -> str:
    """In words; a pair of numbers is of the intra and the inter view."""
    parts = []
    if "effective_rank" in health:
        parts.append(f"effective rank {health['effective_rank']:.1f} of {health['rank_limit']:.0f}")
    for title, name in (("own pair found", "contrast_accuracy"), ("variance explained", "explained")):
        shares = [f"{100 * health[f'{name}_{view}']:.0f} %" for view in VIEWS if f"{name}_{view}" in health]
        parts += [f"{title} {' / '.join(shares)}"] if shares else []
    return ", ".join(parts)


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
