"""Class probabilities of every clip in one ``.npz`` file: what the metrics of a stage were computed from.

Arrays: ``key`` (n,) the clips' names, ``label`` (n,) class ids or (n, C) multi-hot, ``probs`` (n, C) float32,
``classes`` (C,) their names. Read with ``numpy.load``; nothing in it is pickled.
"""

from __future__ import annotations

import os
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fastsskd.errors import InputError

FOLDER = "scores"
"""In a run's folder: ``scores/<stage>.npz`` of each stage that was evaluated, and ``scores/ensemble.npz``."""


def of_stage(run: Path, stage: str) -> Path:
    """The file of a stage in a run's folder."""
    return run / FOLDER / f"{stage}.npz"


@dataclass(frozen=True)
class ClipScores:
    """Class probabilities ``probs (n, C)`` of clips, their keys, labels ``(n,)`` or ``(n, C)``, the classes' names."""

    key: np.ndarray
    label: np.ndarray
    probs: np.ndarray
    classes: tuple[str, ...]


def save(path: str | Path, scores: ClipScores) -> None:
    """Write the file; it appears whole or not at all.

    Raises:
        OSError: it cannot be written there.
    """
    path = Path(path)
    label = scores.label.astype(np.int64 if scores.label.ndim == 1 else np.uint8)
    columns = {"key": scores.key.astype(str), "label": label, "probs": scores.probs.astype(np.float32)}
    temporary = path.with_name(f".{path.name}.tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(temporary, "wb") as file:
        np.savez_compressed(file, **columns, classes=np.array(scores.classes, str))
    os.replace(temporary, path)


def load(path: str | Path) -> ClipScores:
    """Read what :func:`save` wrote.

    Raises:
        InputError: no such file, or not such a file.
    """
    path = Path(path)
    try:
        with np.load(path, allow_pickle=False) as file:
            scores = ClipScores(file["key"], file["label"], file["probs"], tuple(file["classes"].tolist()))
    except FileNotFoundError:
        raise InputError(f"scores {path}: no such file; an evaluation writes it") from None
    except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
        raise InputError(f"scores {path}: not a file of scores, or damaged ({error})") from None
    n, c = len(scores.key), len(scores.classes)
    if scores.probs.shape != (n, c) or scores.label.shape not in ((n,), (n, c)):
        raise InputError(f"scores {path}: {n} keys, {c} classes, but probabilities of {scores.probs.shape}")
    return scores


def pooled(parts: list[ClipScores]) -> ClipScores:
    """The clips of several files as one, such as those of all folds.

    Raises:
        InputError: files of other classes, or a clip that is in two of them.
    """
    first = parts[0]
    for part in parts[1:]:
        if part.classes != first.classes or part.label.ndim != first.label.ndim:
            raise InputError("scores of different classes cannot be pooled; evaluate models of the same classes")
    key, label, probs = (np.concatenate([getattr(part, name) for part in parts]) for name in ("key", "label", "probs"))
    names, counts = np.unique(key, return_counts=True)
    if (counts > 1).any():
        raise InputError(f"scores: clip {names[counts > 1][0]} is in two of the files that were to be pooled")
    return ClipScores(key, label, probs, first.classes)
