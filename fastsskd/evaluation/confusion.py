"""Which classes are taken for which: counts, the pairs most often confused, and a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fastsskd.errors import InputError

MAX_DRAWN = 60
"""Classes in a picture; of more, those with the most clips taken for another, or another's for them."""


def confusion_matrix(probs: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """``(C, C)`` int64: clips of class ``i`` (row) for which class ``j`` is the likeliest.

    Args:
        probs: ``(n, C)``.
        labels: ``(n,)`` class ids.
    """
    c = probs.shape[1]
    return np.bincount(labels * c + probs.argmax(axis=1), minlength=c * c).reshape(c, c)


def most_confused(matrix: np.ndarray, classes: Sequence[str], most: int = 10) -> list[dict[str, Any]]:
    """The pairs with the most clips: ``true``, ``taken_for``, ``clips``, and their ``share`` of the true class."""
    wrong = matrix - np.diag(np.diag(matrix))
    order = np.argsort(-wrong, axis=None, kind="stable")[:most]
    pairs = [divmod(int(place), len(classes)) for place in order]
    return [
        {
            "true": classes[i],
            "taken_for": classes[j],
            "clips": int(wrong[i, j]),
            "share": float(wrong[i, j] / matrix[i].sum()),
        }
        for i, j in pairs
        if wrong[i, j]
    ]


def draw(matrix: np.ndarray, classes: Sequence[str], path: str | Path) -> None:
    """Draw the matrix: a row a true class, coloured by the share of its clips, the number of clips in each cell.

    Raises:
        InputError: ``path`` has an ending that is no picture's, or cannot be written.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shown = _to_draw(matrix)
    part, names, all_clips = matrix[np.ix_(shown, shown)], [classes[i] for i in shown], matrix.sum(axis=1)[shown]
    share = part / np.maximum(all_clips, 1)[:, None]
    size = max(4.5, 0.26 * len(shown) + 2.2)
    figure, axis = plt.subplots(figsize=(size + 0.8, size), layout="constrained")
    image = axis.imshow(share, cmap="Blues", vmin=0.0, vmax=1.0)
    axis.set_xticks(range(len(shown)), names, rotation=90, fontsize=8)
    axis.set_yticks(range(len(shown)), [f"{name} ({n})" for name, n in zip(names, all_clips, strict=True)], fontsize=8)
    for i, j in np.argwhere(part):
        colour = "white" if share[i, j] > 0.5 else "black"
        axis.text(j, i, part[i, j], ha="center", va="center", fontsize=8 if part.max() < 100 else 6, color=colour)
    left_out = f"; {len(shown)} of {len(classes)} classes" if len(shown) < len(classes) else ""
    accuracy = np.trace(matrix) / max(matrix.sum(), 1)
    axis.set_title(f"accuracy {accuracy:.3f} on {matrix.sum()} clips{left_out}", fontsize=10)
    axis.set(xlabel="taken for", ylabel="true class (clips)")
    figure.colorbar(image, ax=axis, label="share of the true class", shrink=0.6, pad=0.02)
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=110)
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be written ({error}); name a .png, .svg or .pdf file") from None
    finally:
        plt.close(figure)


def _to_draw(matrix: np.ndarray) -> np.ndarray:
    """Ids of the classes to draw, in order."""
    if len(matrix) <= MAX_DRAWN:
        return np.arange(len(matrix))
    wrong = matrix.sum(axis=0) + matrix.sum(axis=1) - 2 * np.diag(matrix)
    return np.sort(np.argsort(-wrong, kind="stable")[:MAX_DRAWN])
