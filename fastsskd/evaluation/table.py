"""What an evaluation tells people: a table."""

from __future__ import annotations

from typing import Any

from fastsskd.evaluation.metrics import NAMES


def table(metrics: dict[str, Any]) -> str:
    """The totals with their intervals, the pairs of classes most often confused, then one line a class."""
    lines, interval = [], metrics["interval"] or {}
    for name in NAMES:
        if metrics[name] is not None:
            lines.append(f"{name:<10} {metrics[name]:.4f}{_interval(interval, name)}")
    lines.append(
        f"on {metrics['num_clips']} clips, {metrics['num_classes']} classes; {len(metrics['skipped'])} left out"
    )
    lines += _how(metrics)
    if metrics["confused"]:
        pairs = [f"{pair['true']} for {pair['taken_for']} ({pair['clips']})" for pair in metrics["confused"][:3]]
        lines.append(f"taken for another: {', '.join(pairs)}")
    width = max(len(name) for name in metrics["per_class"])
    lines.append(f"{'class':<{width}}  clips      AP     AUC      d'  accuracy")
    for name, row in metrics["per_class"].items():
        numbers = [_number(row.get(column)) for column in ("AP", "AUC", "d_prime", "accuracy")]
        ranks = "  ".join(f"{number:>6}" for number in numbers[:3])
        lines.append(f"{name:<{width}}  {row['num_clips']:>5}  {ranks}  {numbers[3]:>8}")
    return "\n".join(lines)


def _interval(interval: dict[str, Any], name: str) -> str:
    if not interval.get(name):
        return ""
    low, high = interval[name]
    return f"  [{low:.4f}, {high:.4f}] {100 * interval['level']:.0f} % over clips"


def _how(metrics: dict[str, Any]) -> list[str]:
    """Whatever is not the plain way: one model, the beginning of each clip."""
    lines, number = [], len(metrics["checkpoints"])
    if number > 1:
        what = "weights" if metrics["average_weights"] else "class probabilities"
        lines.append(f"mean of the {what} of {number} checkpoints")
    if metrics["crops"] > 1:
        once = metrics["heard_once"]
        note = f"; {once} of {metrics['num_clips']}, not longer than the model's length, heard once" if once else ""
        lines.append(f"mean over {metrics['crops']} crops of each clip{note}")
    return lines


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
