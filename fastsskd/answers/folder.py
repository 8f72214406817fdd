"""The folder that ``fastsskd teach`` fills: one process at a time, one teacher and one list of clips for ever.

What is in it, ``stored_answers.py`` says, which reads it.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from fastsskd import durable, manifest
from fastsskd.answers import scores as stored_scores
from fastsskd.answers.row_file import RowFile
from fastsskd.answers.stored import (
    ABOUT,
    BAD,
    CLASSES,
    CLIPS,
    DONE,
    FEATURES,
    REJECTED,
    SCORES,
    STORED,
    VERSION,
    read_about,
)
from fastsskd.clip_table import Manifest
from fastsskd.errors import InputError

_OWN = {ABOUT, CLIPS, FEATURES, SCORES, CLASSES, DONE, REJECTED}
_OTHER = {"teacher": "teacher", "clips": "clips", "classes": "classes", "columns": "classes of the teacher"}


class AnswerFolder:
    """Made, or taken up again; :meth:`open` gives one.

    A place is ``crop * N + clip``. What :meth:`put` writes counts once :meth:`commit` has it on the disk.

    Args:
        out: the folder.
        about: the contents of ``teach.json``.

    Attributes:
        done: ``(K, N)`` uint8 state of each crop of each clip.
    """

    def __init__(self, out: Path, about: dict[str, Any]):
        self.out = out
        self._tables = {name: RowFile(out / name, writable=True) for name in _tables(about)}
        self.done = self._tables[DONE].read_all()[:, :, 0]
        self._fresh: list[tuple[np.ndarray, int]] = []

    @staticmethod
    @contextlib.contextmanager
    def open(out: Path, identity: dict[str, Any], facts: dict[str, Any], clips: Manifest) -> Iterator[AnswerFolder]:
        """The folder, which nobody else may write to meanwhile.

        Args:
            identity: what must be the same each time: ``crops``, ``top_k``, ``classes`` and whatever else the answers
                depend on.
            facts: other fields of ``teach.json``, ``num_clips`` and ``embed_dim`` among them.
            clips: what is taught.

        Raises:
            InputError: it belongs to other answers, another program or a running process. OSError: it cannot be
                written.
        """
        out.mkdir(parents=True, exist_ok=True)
        lock = os.open(out, os.O_RDONLY)
        try:
            if not durable.lock(lock):
                raise InputError(f"{out}: another `fastsskd teach` is writing there; wait for it")
            about = {"version": VERSION, **identity, **facts}
            if not (out / ABOUT).exists():
                _create(out, about, clips)
            _refuse_other_use(out, read_about(out, str(out)), identity)
            folder = AnswerFolder(out, about)
            try:
                yield folder
            finally:
                for table in folder._tables.values():
                    table.close()
        finally:
            os.close(lock)

    def put(self, places: np.ndarray, features: np.ndarray, scores: np.ndarray | None, best: np.ndarray | None) -> None:
        """Write answers to increasing ``places``: ``(b, D)``, and what ``stored_scores.encode`` gave if there are any.

        Raises:
            OSError: the disk is full or fails.
        """
        for name, values in ((FEATURES, features), (SCORES, scores), (CLASSES, best)):
            if values is not None:
                self._tables[name].write(places, values)
        self._fresh.append((places, STORED))

    def refuse(self, places: np.ndarray) -> None:
        """There will be no answer for ``places``, in increasing order."""
        self._fresh.append((places, BAD))

    def commit(self) -> None:
        """Have on the disk what was written since the last time, and then that it is there."""
        for name, table in self._tables.items():
            if name != DONE:
                table.sync()
        for places, state in self._fresh:
            self.done.reshape(-1)[places] = state
            self._tables[DONE].write(places, np.full((len(places), 1), state))
        self._tables[DONE].sync()
        self._fresh.clear()

    def bytes_per_crop(self) -> int:
        """On the disk, of the arrays."""
        return sum(table.row_bytes for table in self._tables.values())


def _tables(about: dict[str, Any]) -> dict[str, tuple[int, type]]:
    """Name, width and type of each array."""
    top_k, num_classes = about["top_k"], len(about["classes"])
    tables = {FEATURES: (about["embed_dim"], np.float16), DONE: (1, np.uint8)}
    if num_classes:
        tables[SCORES] = stored_scores.width(top_k, num_classes), np.float16
    if top_k < num_classes:
        tables[CLASSES] = top_k, np.int16
    return tables


def _create(out: Path, about: dict[str, Any], clips: Manifest) -> None:
    """Everything is there and empty, then ``teach.json``; a process that was killed before has left what can go."""
    foreign = [path.name for path in out.iterdir() if path.name not in _OWN and not path.name.startswith(".")]
    if foreign:
        raise InputError(f"{out}: holds other files, such as {foreign[0]}; choose another folder")
    (out / REJECTED).unlink(missing_ok=True)
    manifest.save(clips, out / CLIPS)
    durable.sync(out / CLIPS)
    for name, (width, dtype) in _tables(about).items():
        RowFile.create(out / name, (about["crops"], about["num_clips"], width), dtype)
    durable.write_text(out / ABOUT, json.dumps(about, indent=1, ensure_ascii=False) + "\n")
    durable.sync(out)


def _refuse_other_use(out: Path, about: dict[str, Any], identity: dict[str, Any]) -> None:
    for name, value in identity.items():
        if about.get(name) == value:
            continue
        if name in _OTHER:
            raise InputError(f"{out}: was begun with other {_OTHER[name]}; choose another folder")
        raise InputError(
            f"{out}: was begun with {name} = {about.get(name)}, now it is {value}; use the same options, or another "
            "folder"
        )
