"""Teachers: one file a kind, one protocol.

    teacher = load_teacher(path)
    scores, features = teacher(waveform)      # (B, S) float32 at 16 kHz -> (B, C), (B, D)

A teacher computes its own features from the waveform, is frozen, and says what its scores are (``score_kind``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from fastsskd.class_map import load_class_list
from fastsskd.errors import InputError, UsageError
from fastsskd.foreign import checkpoint_file, load_checkpoint, recognise, weights_in
from fastsskd.teachers import ast, audiomae, beats, ours
from fastsskd.teachers.ensemble import Ensemble, probabilities
from fastsskd.weights import is_model_file


class Teacher(Protocol):
    """What distillation needs of a teacher.

    Attributes:
        classes: names in the order of the scores; empty where the checkpoint names none.
        score_kind: ``"logits"`` or ``"probs"``.
        embed_dim: width D of the features.
    """

    classes: tuple[str, ...]
    score_kind: str
    embed_dim: int

    def __call__(self, waveform: Tensor) -> tuple[Tensor, Tensor]:
        """``(B, S)`` waveform at 16 kHz -> scores ``(B, C)``, clip features ``(B, D)``; no gradient."""
        ...

    def to(self, *args, **kwargs) -> Teacher: ...


KINDS: dict[str, Callable[[Mapping[str, Any], Path], Teacher]] = {
    "ast": ast.from_checkpoint,
    "audiomae": audiomae.from_checkpoint,
    "beats": beats.from_checkpoint,
}
"""Of other projects: from what a checkpoint file holds, and its path."""


def load_teacher(
    path: str | Path | Sequence[str | Path], *, kind: str = "auto", classes: str | Path = "", multi_label: bool = True
) -> Teacher:
    """Load a frozen teacher from a checkpoint, or several as one from a list of them.

    Args:
        path: a file of weights, or the folder that holds one; or a list, see :class:`Ensemble`.
        kind: ``"ours"``, a key of :data:`KINDS`, or ``"auto"``: told from the names of the weights.
        classes: a ``class_labels_indices.csv``: names the outputs of a teacher whose checkpoint does not, and replaces
            ids such as ``/m/09x0r``.
        multi_label: of an ensemble only: its members' logits become probabilities by a sigmoid, not a softmax.

    Raises:
        InputError: no such checkpoint, not one of a known kind, or of another kind than ``kind``.
        UsageError: unknown ``kind``, or an empty list.
    """
    if kind not in ("auto", "ours", *KINDS):
        raise UsageError(f"teacher kind {kind!r} is not one of auto, ours, {', '.join(KINDS)}")
    names = load_class_list(classes) if classes else {}
    if isinstance(path, (str, Path)):
        return _load_one(path, kind, names, classes)
    if not path:
        raise UsageError("teacher: an empty list of checkpoints")
    members = [_load_one(each, kind, names, classes) for each in path]
    return members[0] if len(members) == 1 else Ensemble(members, [str(each) for each in path], multi_label)


@torch.no_grad()
def ask(
    teacher: Teacher, waveform: Tensor, columns: Tensor | None, multi_label: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """A teacher's class probabilities and clip features, float32.

    Args:
        waveform: ``(B, S)`` at 16 kHz.
        columns: of its scores, those of the data set's classes; None = all.
        multi_label: probabilities are per class, else a distribution over the columns.
        dtype: what it multiplies in.
    """
    with torch.autocast(waveform.device.type, dtype=dtype, enabled=dtype != torch.float32):
        scores, features = teacher(waveform)
    scores, features = scores.float(), features.float()
    if columns is not None:
        scores = scores[:, columns]  # before the softmax, which is then over the data set's classes
    return probabilities(scores, teacher.score_kind, multi_label), features


def describe(teacher: Teacher) -> str:
    """What a teacher gives, in words."""
    if isinstance(teacher, Ensemble):
        members = "; ".join(describe(member) for member in teacher.members)
        return f"{len(teacher.classes) or 'no'} classes that {len(teacher.members)} teachers share ({members})"
    return f"{len(teacher.classes) or 'no'} named classes, features of {teacher.embed_dim}"


def _load_one(path: str | Path, kind: str, names: Mapping[str, str], list_path: str | Path) -> Teacher:
    if not Path(path).exists():
        raise InputError(
            f"teacher {path}: no such file or folder; give a model.safetensors of ours, or the downloaded checkpoint "
            f"of another one ({', '.join(KINDS)})"
        )
    file = checkpoint_file(path)
    if kind in ("auto", "ours") and is_model_file(file):
        teacher = ours.load(file)
    else:
        checkpoint = load_checkpoint(file)
        found, words = recognise(weights_in(checkpoint))
        if found not in KINDS or kind not in ("auto", found):
            wanted = f"kind {kind!r}" if kind != "auto" else f"ours (a run's model.safetensors), {', '.join(KINDS)}"
            raise InputError(f"teacher {file}: looks like {words}; expected {wanted}")
        teacher = KINDS[found](checkpoint, file)
    if names:
        teacher.classes = _named(teacher, names, list_path)
    return teacher


def _named(teacher: Teacher, names: Mapping[str, str], list_path: str | Path) -> tuple[str, ...]:
    """The classes of a teacher by a list of them: all where it names none, else its ids by what the list calls them."""
    if teacher.classes:
        return tuple(names.get(name, name) for name in teacher.classes)
    number = teacher(torch.zeros(1, 4000))[0].shape[1]  # of a quarter second of silence
    if number and number != len(names):
        raise InputError(f"class list {list_path}: has {len(names)} classes, the teacher has {number} outputs")
    return tuple(names.values()) if number else ()
