"""``fastsskd teach``: a teacher hears every clip once, a few crops of each, and its answers are stored.

Pass after pass over the clips, one crop of each a pass. Answers are written as they come; every ``BLOCK`` crops they
are brought to the disk, and only then are these crops marked as done. So a job that was killed costs a block at most.
"""

from __future__ import annotations

import shlex
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastsskd import __version__, durable, skip_log
from fastsskd.answers import scores as stored_scores
from fastsskd.answers.folder import AnswerFolder
from fastsskd.answers.stored import BAD, NOT_YET, REJECTED, STORED, Crops, read_rejected
from fastsskd.audio.info import SAMPLE_RATE
from fastsskd.class_map import load_class_map, teacher_columns, why_features_only
from fastsskd.errors import InputError
from fastsskd.foreign import checkpoint_file
from fastsskd.loader import Loader
from fastsskd.manifest import Manifest
from fastsskd.pack.report import Progress, top_reasons
from fastsskd.teachers import Teacher, ask, load_teacher

BLOCK = 2048
"""Crops between two times that the answers are brought to the disk."""
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
NOT_FINITE = "the teacher's answer is not finite, or too large for 16 bits"


@dataclass(frozen=True)
class Options:
    """What the answers depend on, besides the clips.

    Attributes:
        teacher: checkpoints, see :func:`~fastsskd.teachers.load_teacher`; several are one teacher.
        crops: K, crops of each clip.
        top_k: classes stored of each crop, the likeliest; all if there are not more.
        seconds: length of a crop.
        seed: of the crops.
        precision: what the teacher multiplies in, a key of ``PRECISIONS``.
        teacher_classes, class_map: as the fields of that name of the TOML's [distill].
    """

    teacher: tuple[str, ...]
    crops: int = 1
    top_k: int = 20
    seconds: float = 10.0
    seed: int = 0
    precision: str = "fp32"
    teacher_classes: str = ""
    class_map: str = ""

    def command(self, source: str, out: Path) -> str:
        """The command that these options are from."""
        words = ["fastsskd", "teach"]
        for name, value in asdict(self).items():
            for each in value if name == "teacher" else [value] * (value != getattr(Options, name, None)):
                words += [f"--{name}", str(each)]
        return shlex.join([*words, source, "--out", str(out)])


def teach(
    clips: Manifest,
    out: str | Path,
    options: Options,
    *,
    source: str,
    device: str,
    batch_size: int,
    workers: int = 0,
    quiet: bool = False,
) -> dict[str, Any]:
    """Store a teacher's answers for all crops, or go on where a killed job has stopped.

    Bad clips, and those whose answer is not a number, are named in ``rejected.tsv``; the same command tries them again.

    Args:
        clips: the manifest.
        out: folder to fill, see ``stored_answers.py``.
        source: where the manifest is from, for the command that goes on.
        device: of the teacher, ``"cpu"`` or ``"cuda"``.
        batch_size: clips that the teacher hears at a time.
        workers: of the loader, 0 = all cores.
        quiet: no progress on stderr.

    Returns:
        ``clips``, ``crops``; ``stored`` crops and ``bad`` clips; ``bytes`` of the folder, and
        ``bytes_per_million_clips`` of the arrays; ``crops_per_second`` and ``seconds`` of this run.

    Raises:
        InputError: the teacher does not fit, no clip can be heard, the disk is full, the job was interrupted, or the
            folder belongs to another one. What is stored stays.
    """
    out = Path(out)
    listener = _Listener(clips, options, device)
    facts = {
        "num_clips": len(clips),
        "embed_dim": listener.teacher.embed_dim,
        "command": options.command(source, out),
        "files": list(options.teacher),
        "versions": {"fastsskd": __version__, "torch": torch.__version__},
    }
    begin, folder = time.monotonic(), None
    try:
        with AnswerFolder.open(out, listener.identity(), facts, clips) as folder:
            before = int((folder.done == STORED).sum())
            (out / REJECTED).unlink(missing_ok=True)  # its clips are tried again
            _hear_all(listener, folder, batch_size, workers, quiet)
            result = _result(folder, before, time.monotonic() - begin)
    except (KeyboardInterrupt, OSError) as error:
        reason = f"cannot be written ({error.strerror or error})" if isinstance(error, OSError) else "interrupted"
        if folder is None:
            raise InputError(f"{out}: {reason}; choose a folder you can write to") from None
        there = f"{(folder.done != NOT_YET).sum()} of {folder.done.size} crops are done"
        raise InputError(f"{out}: {reason}: {there}; run the same command again to go on") from None
    if not result["stored"]:
        (_, reason), *_ = (line.split(maxsplit=1) for line in top_reasons(read_rejected(out).values()))
        raise InputError(
            f"{out}: none of {len(clips)} clips can be heard, most often because: {reason}; see {out / REJECTED}"
        )
    return result


class _Listener:
    """A teacher that is asked for the scores of the clips' classes.

    Args:
        clips, options, device: as :func:`teach` has them.

    Raises:
        InputError: the teacher cannot be loaded, or cannot hear clips of this length.
    """

    def __init__(self, clips: Manifest, options: Options, device: str):
        self.clips, self.options, self.device = clips, options, device
        kind = {"classes": options.teacher_classes, "multi_label": clips.multi_label}
        self.teacher: Teacher = load_teacher(options.teacher, **kind).to(device)
        names = load_class_map(options.class_map)
        columns = teacher_columns(clips.classes, self.teacher.classes, names) if clips.classes else None
        self.columns = None if columns is None else torch.tensor(columns, device=device)
        self.classes = () if columns is None else clips.classes
        self.top_k = min(options.top_k, len(self.classes))
        self.teacher(torch.zeros(1, round(options.seconds * SAMPLE_RATE), device=device))  # raises if it is too long
        if columns is None:
            why = why_features_only(clips.classes, self.teacher.classes, names) if clips.classes else "no labels"
            print(f"features only are stored: {why}", file=sys.stderr)

    def identity(self) -> dict[str, Any]:
        """What the answers depend on."""
        return {
            "teacher": [durable.sha256(checkpoint_file(path)) for path in self.options.teacher],
            "clips": self.clips.fingerprint(),
            "classes": list(self.classes),
            "columns": None if self.columns is None else self.columns.tolist(),
            "multi_label": self.clips.multi_label,
            "top_k": self.top_k,
            **{name: getattr(self.options, name) for name in ("crops", "seconds", "seed", "precision")},
        }

    def answer(self, waveform: Tensor) -> tuple[np.ndarray, np.ndarray | None, np.ndarray | None]:
        """``(B, S)`` waveform -> features ``(B, D)`` float16, and what ``stored_scores.encode`` makes of the scores."""
        dtype = PRECISIONS[self.options.precision]
        probs, features = ask(self.teacher, waveform, self.columns, self.clips.multi_label, dtype)
        with np.errstate(over="ignore"):
            features = features.cpu().numpy().astype(np.float16)
        if not self.classes:
            return features, None, None
        return features, *stored_scores.encode(probs, self.top_k)


def _hear_all(listener: _Listener, folder: AnswerFolder, batch_size: int, workers: int, quiet: bool) -> None:
    """Every crop that is not stored yet."""
    options, clips = listener.options, listener.clips
    progress = Progress(folder.done.size, int((folder.done == STORED).sum()), "crops", quiet)
    try:
        for crop in range(options.crops):
            todo = np.flatnonzero(folder.done[crop] != STORED)
            if not len(todo):
                continue
            loader = Loader(
                clips.select(todo),
                batch_size=batch_size,
                seconds=options.seconds,
                device=listener.device,
                workers=workers,
                waveform=True,
                crops=Crops(options.seed, options.crops, todo),
                skip_log=folder.out / REJECTED,
            )
            loader.epoch = crop
            try:
                _hear(listener, folder, loader, crop * len(clips) + todo, progress)
            finally:
                loader.close()
    except KeyboardInterrupt:
        folder.commit()
        raise
    finally:
        progress.end()


def _hear(listener: _Listener, folder: AnswerFolder, loader: Loader, places: np.ndarray, progress: Progress) -> None:
    """One pass: the clips of ``loader``, whose answers belong to ``places``."""
    begin = committed = 0
    for batch in loader:
        good = places[batch.index.numpy()]
        if len(batch):
            features, scores, best = listener.answer(batch.waveform)
            finite = np.isfinite(features).all(axis=1)
            finite &= True if scores is None else np.isfinite(scores).all(axis=1)
            unheard = [key for key, is_finite in zip(batch.key, finite, strict=True) if not is_finite]
            if unheard:
                skip_log.append(folder.out / REJECTED, dict.fromkeys(unheard, NOT_FINITE))
            good = good[finite]
            folder.put(good, *(None if part is None else part[finite] for part in (features, scores, best)))
        bad = np.setdiff1d(places[begin : loader.position], good)
        if len(bad):
            folder.refuse(bad)
        begin = loader.position
        for size in [folder.bytes_per_crop()] * len(good) + [None] * len(bad):
            progress.clip(size)
        if begin - committed >= BLOCK or begin == len(places):
            folder.commit()
            committed = begin


def _result(folder: AnswerFolder, before: int, seconds: float) -> dict[str, Any]:
    crops, clips = folder.done.shape
    stored = int((folder.done == STORED).sum())
    return {
        "out": str(folder.out),
        "clips": clips,
        "crops": crops,
        "stored": stored,
        "bad": int((folder.done == BAD).any(axis=0).sum()),
        "bytes": sum(path.stat().st_size for path in folder.out.iterdir()),
        "bytes_per_million_clips": 1_000_000 * crops * folder.bytes_per_crop(),
        "crops_per_second": (stored - before) / seconds,
        "seconds": seconds,
    }
