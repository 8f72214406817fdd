"""Parts of a report's page about an evaluation: its classes, what was taken for what, the hardest clips."""

from __future__ import annotations

from typing import Any

from fastsskd.evaluation.score_file import ClipScores
from fastsskd.report.charts import confusion
from fastsskd.report.data import by_class, confused, hardest
from fastsskd.report.html import details, note, section, table

FOLDED = 24
"""Classes from which their table shows the worst and the best alone, and all of them when it is opened."""
SHOWN = 10
MAX_DRAWN = 60
"""Classes of the largest matrix that is drawn."""


def classes(name: str, metrics: dict[str, Any]) -> str:
    """A row a class, the worst first; ``metrics`` are :func:`fastsskd.evaluation.metrics.classification_metrics`."""
    found = by_class(metrics)
    columns = [column for column in ("AP", "AUC", "accuracy") if any(column in row for _, row in found)]
    header = ("class", "clips", *columns)
    rows = [(title, row["num_clips"], *(row.get(column) for column in columns)) for title, row in found]
    if len(rows) <= FOLDED:
        inside = table(header, rows)
    else:
        best = [row for row in rows if row[2] is not None][-SHOWN:][::-1]
        inside = (
            f'<div class="columns"><div><h3>Worst</h3>{table(header, rows[:SHOWN])}</div>'
            f"<div><h3>Best</h3>{table(header, best)}</div></div>"
            + details(f"All {len(rows)} classes", table(header, rows))
        )
    return section(f"Classes, {name}", note("Worst average precision first."), inside)


def mistakes(name: str, scores: ClipScores | None) -> str:
    """Confusion of clips with one label each, and the hardest clips; nothing without scores."""
    if scores is None:
        return ""
    return section(f"Mistakes, {name}", *_confusion(scores), _hardest(scores))


def _confusion(scores: ClipScores) -> list[str]:
    found = confused(scores)
    if found is None:
        return []
    matrix, pairs = found
    parts = []
    if len(matrix) <= MAX_DRAWN:
        parts = [note("A row for each true class, a column for what its clips were taken for.")]
        parts.append(confusion(matrix, scores.classes))
    rows = [(pair["true"], pair["taken_for"], pair["clips"], f"{100 * pair['share']:.0f}") for pair in pairs]
    header = ("true class", "taken for", "clips", "% of the class")
    return [*parts, details("Classes most often confused", table(header, rows, (0, 1)), True) if rows else ""]


def _hardest(scores: ClipScores) -> str:
    rows = [
        (clip["key"], ", ".join(clip["labels"]), clip["prob"], clip["guessed"], clip["guessed_prob"])
        for clip in hardest(scores)
    ]
    header = ("clip", "labels", "their probability", "likeliest class", "its probability")
    return details("Hardest clips", table(header, rows, (0, 1, 3)), True)
