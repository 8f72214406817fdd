"""Which of a teacher's scores stand for the data set's classes."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from fastsskd.errors import InputError


def load_class_map(path: str | Path) -> dict[str, str]:
    """Read a JSON file ``{"class of the data set": "class of the teacher", ...}``; an empty path is an empty map.

    Raises:
        InputError: absent, or not such a file.
    """
    if not path:
        return {}
    try:
        names = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise InputError(f"distill.class_map {path}: cannot be read ({reason})") from None
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise InputError(f'distill.class_map {path}: expected {{"class of the data set": "class of the teacher", ...}}')
    return names


def load_class_list(path: str | Path) -> dict[str, str]:
    """Read AudioSet's ``class_labels_indices.csv`` or one like it: ``{"/m/09x0r": "Speech", ...}`` in its order.

    Raises:
        InputError: absent, or not a table with the columns index, mid and display_name that numbers the classes.
    """
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            rows = sorted((int(row["index"]), row["mid"], row["display_name"]) for row in csv.DictReader(file))
    except OSError as error:
        raise InputError(f"class list {path}: cannot be read ({error.strerror})") from None
    except (ValueError, TypeError, KeyError, csv.Error):
        rows = []
    names = {mid: name for _, mid, name in rows}
    numbered = [place for place, _, _ in rows] == list(range(len(rows)))
    if not rows or not numbered or not len(set(names.values())) == len(names) == len(rows) or None in names.values():
        raise InputError(
            f"class list {path}: expected index,mid,display_name, as in class_labels_indices.csv, each class once and "
            "numbered from 0"
        )
    return names


def why_features_only(classes: Sequence[str], teacher: Sequence[str], names: Mapping[str, str]) -> str:
    """In words, why :func:`teacher_columns` is None."""
    if not teacher:
        return "it does not name its classes; distill.teacher_classes can"
    lacking = [name for name in classes if names.get(name, name) not in teacher]
    more = f" and {len(lacking) - 1} more" if len(lacking) > 1 else ""
    return f"its {len(teacher)} classes lack {lacking[0]!r}{more} of the data set's; distill.class_map can name them"


def teacher_columns(classes: Sequence[str], teacher: Sequence[str], names: Mapping[str, str]) -> list[int] | None:
    """The teacher's column of each class, by ``names`` or else by the same name; None if one is not to be found.

    Raises:
        InputError: the map names a class that the data set or the teacher does not have.
    """
    for own, other in names.items():
        if own not in classes or other not in teacher:
            side, name = ("data set", own) if own not in classes else ("teacher", other)
            raise InputError(f"distill.class_map: the {side} has no class {name!r}; correct the map")
    place = {name: column for column, name in enumerate(teacher)}
    columns = [place.get(names.get(name, name)) for name in classes]
    return None if None in columns else columns
