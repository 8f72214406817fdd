"""Which of a teacher's scores stand for the data set's classes."""

from __future__ import annotations

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
