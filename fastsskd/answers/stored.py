"""A teacher's answers, stored once by ``fastsskd teach`` and replayed in training, where the teacher is not needed.

teach.json      what was asked of whom; written last when the folder is made, which is then this teacher's for ever
clips.manifest  the clips, N of them
features.npy    (K, N, D) float16: clip features, for each of K crops of a clip
scores.npy      (K, N, k + 1 or C) float16: class scores, see ``stored_scores.py``; absent if the teacher has none
classes.npy     (K, N, k) int16: which classes those are; absent if they are all
done.npy        (K, N, 1) uint8: 0 = not yet, 1 = stored, 2 = the clip is bad
rejected.tsv    key and reason of the bad ones
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import torch
from torch import Tensor

import fastsskd_kernels as kernels
from fastsskd import manifest
from fastsskd.answers import scores as stored_scores
from fastsskd.answers.row_file import RowFile
from fastsskd.clip_table import Manifest, one_chunk
from fastsskd.errors import InputError

VERSION = 1
ABOUT, CLIPS, REJECTED = "teach.json", "clips.manifest", "rejected.tsv"
FEATURES, SCORES, CLASSES, DONE = "features.npy", "scores.npy", "classes.npy", "done.npy"
NOT_YET, STORED, BAD = 0, 1, 2
_FIELDS = {"crops": int, "seed": int, "seconds": float, "top_k": int, "classes": list, "multi_label": bool}
_FIELDS |= {"num_clips": int, "embed_dim": int, "command": str}


class Crops:
    """Which crop of a clip an epoch hears, where it is one of a few: crop ``epoch mod number``, again and again.

    Where it lies follows from ``hash(seed, epoch mod number, rows[clip])`` instead of the clip's seed of the epoch.
    That seed stays what it was, so masks, mixing and augmentation differ from epoch to epoch as ever.

    Args:
        seed: of the crops.
        number: K, crops a clip.
        rows: ``(n,)`` int64, for each clip of the loader its number among those that the crops were chosen for.
    """

    def __init__(self, seed: int, number: int, rows: np.ndarray):
        self.seed, self.number, self.rows = seed, number, rows

    def seeds(self, epoch: int, index: np.ndarray) -> np.ndarray:
        """``(b,)`` int64: what the crops' places in some clips are drawn from."""
        return kernels.derive_seeds(self.seed, epoch % self.number, self.rows[index])

    def answers(self, epoch: int, index: np.ndarray) -> tuple[Tensor | None, Tensor | None]:
        """What is known of the teacher's class probabilities ``(b, C)`` and clip features ``(b, D)`` for the crops."""
        return None, None


class StoredAnswers(Crops):
    """A folder that ``fastsskd teach`` has filled, opened for the clips that are trained on.

    Args:
        folder: as the command was given it.
        clips: all of the stored ones or some, in any order.
        seconds: length of the crops in training.

    Attributes:
        manifest: ``clips``, where those without an answer are marked bad.
        classes: those that there are probabilities of: the clips' own, or none.
        embed_dim: width D of the features.

    Raises:
        InputError: not such a folder; of other clips, classes or lengths; damaged; or not complete.
    """

    def __init__(self, folder: str | Path, clips: Manifest, seconds: float):
        self.folder, self._where = Path(folder), f"distill.stored {folder}"
        self.about = about = read_about(self.folder, self._where)
        super().__init__(about["seed"], about["crops"], self._rows_of(clips))
        self.classes, self.multi_label = tuple(about["classes"]), about["multi_label"]
        self.embed_dim, self.num_stored = about["embed_dim"], about["num_clips"]
        self._check_fits(clips, seconds)
        self._features = self._table(FEATURES, self.embed_dim)
        self._scores = self._best = None
        if self.classes:
            self._scores = self._table(SCORES, stored_scores.width(about["top_k"], len(self.classes)))
        if about["top_k"] < len(self.classes):
            self._best = self._table(CLASSES, about["top_k"])
        self.manifest = self._without_bad(clips)

    def answers(self, epoch: int, index: np.ndarray) -> tuple[Tensor | None, Tensor]:
        """``(b, C)`` float32 probabilities, None if the teacher has none, and ``(b, D)`` float32 features.

        Raises:
            InputError: a file cannot be read any more.
        """
        places = epoch % self.number * self.num_stored + self.rows[index]
        features = torch.from_numpy(self._features.read(places).astype(np.float32))
        if self._scores is None:
            return None, features
        best = None if self._best is None else self._best.read(places)
        return stored_scores.decode(self._scores.read(places), best, len(self.classes), self.multi_label), features

    def _rows_of(self, clips: Manifest) -> np.ndarray:
        """``(n,)`` the number of each clip among the stored ones."""
        stored, wanted = manifest.load(self.folder / CLIPS), clips.materialise()
        rows = pc.index_in(one_chunk(wanted["key"]), value_set=one_chunk(stored.table["key"]))
        again = "run `fastsskd teach` on the manifest that is trained on, into another folder"
        if rows.null_count:
            first = clips.key(pc.index(pc.is_null(rows), True).as_py())
            raise InputError(
                f"{self._where}: has no answers for {rows.null_count} of {len(clips)} clips, such as {first!r}; {again}"
            )
        same = pc.equal(one_chunk(stored.table["path"]).take(rows), one_chunk(wanted["path"]))
        if not pc.all(same).as_py():
            first = pc.index(same, False).as_py()
            was = stored.file_name(rows[first].as_py())
            raise InputError(
                f"{self._where}: {clips.key(first)!r} was the file {was}, here it is {clips.file_name(first)}; {again}"
            )
        return rows.to_numpy().astype(np.int64)

    def _check_fits(self, clips: Manifest, seconds: float) -> None:
        heard = self.about["seconds"]
        if heard != seconds:
            raise InputError(
                f"{self._where}: the teacher heard {heard:g} s of a clip, data.seconds is {seconds:g}; make them equal"
            )
        if self.classes and (self.classes, self.multi_label) != (clips.classes, clips.multi_label):
            theirs, own = (
                f"{len(classes)} {'multi-label ' if many else ''}classes ({', '.join(classes[:3])}, ...)"
                for classes, many in ((self.classes, self.multi_label), (clips.classes, clips.multi_label))
            )
            raise InputError(
                f"{self._where}: has scores of {theirs}, the clips have {own}; run `fastsskd teach` on the manifest "
                "that is trained on, into another folder"
            )

    def _table(self, name: str, width: int) -> RowFile:
        """One of the arrays, of the shape that it should have."""
        table, expected = RowFile(self.folder / name), (self.number, self.num_stored, width)
        if table.shape != expected:
            raise InputError(f"{table.path}: its shape is {table.shape}, expected {expected}; it is of another folder")
        return table

    def _without_bad(self, clips: Manifest) -> Manifest:
        """The clips; one of which a crop could not be heard is marked bad, with the reason."""
        done = self._table(DONE, 1).read_all()[:, self.rows, 0]
        missing = int((done == NOT_YET).sum())
        if missing:
            raise InputError(
                f"{self._where}: {missing} of {done.size} answers are not there yet; complete it with "
                f"`{self.about['command']}`"
            )
        bad = np.flatnonzero((done == BAD).any(axis=0)).tolist()
        reasons = read_rejected(self.folder) if bad else {}
        words = {i: reasons.get(" ".join(clips.key(i).split()), "bad when it was heard") for i in bad}
        return clips.mark({i: f"has no stored answer: {why}" for i, why in words.items()}) if bad else clips


def read_about(folder: Path, where: str) -> dict[str, Any]:
    """The contents of ``teach.json``.

    Raises:
        InputError: there is none, or it is damaged or of another version; ``where`` begins the line.
    """
    file, again = folder / ABOUT, "run `fastsskd teach` into another folder"
    try:
        about = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{where}: has no {ABOUT}; give a folder that `fastsskd teach` has filled") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "not JSON"
        raise InputError(f"{file}: cannot be read ({reason}); {again}") from None
    if isinstance(about, dict) and about.get("version", VERSION) != VERSION:
        raise InputError(
            f"{file}: of version {about['version']}, not {VERSION}; run `fastsskd teach` into another folder"
        )
    if not isinstance(about, dict) or any(type(about.get(name)) is not kind for name, kind in _FIELDS.items()):
        raise InputError(f"{file}: damaged; {again}")
    return about


def read_rejected(folder: Path) -> dict[str, str]:
    """Reason by key of the bad clips, as far as they are named."""
    file = folder / REJECTED
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    return dict(line.split("\t", 1) for line in lines if "\t" in line)
