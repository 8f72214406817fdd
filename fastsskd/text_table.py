"""Tables of plain text."""

from __future__ import annotations

from collections.abc import Sequence


def aligned(rows: Sequence[Sequence[str]], *, right: bool = False) -> list[str]:
    """A line a row, its cells as wide as the widest of their column; ``right``: flush right, as numbers are read."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    place = str.rjust if right else str.ljust
    return ["  ".join(place(cell, width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
