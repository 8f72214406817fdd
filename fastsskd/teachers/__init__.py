"""Teachers: one file a kind, one protocol.

    teacher = load_teacher(path)
    scores, features = teacher(waveform)      # (B, S) float32 at 16 kHz -> (B, C), (B, D)

A teacher computes its own features from the waveform, is frozen, and says what its scores are (``score_kind``).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from torch import Tensor

from fastsskd.errors import InputError, UsageError
from fastsskd.teachers import ours


class Teacher(Protocol):
    """What distillation needs of a teacher.

    Attributes:
        classes: names in the order of the scores.
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


KINDS: dict[str, Callable[[Path], Teacher]] = {"ours": ours.load}


def load_teacher(path: str | Path, *, kind: str = "auto") -> Teacher:
    """Load a frozen teacher from a checkpoint.

    Args:
        path: a model of ours: its ``.safetensors`` file or the folder that holds it.
        kind: ``"auto"`` or a key of :data:`KINDS`.

    Raises:
        InputError: no such checkpoint, or not one of a known kind.
        UsageError: unknown ``kind``.
    """
    if kind != "auto" and kind not in KINDS:
        raise UsageError(f"teacher kind {kind!r} is not one of auto, {', '.join(KINDS)}")
    path = Path(path)
    if not path.exists():
        raise InputError(f"teacher {path}: no such file or folder; give a checkpoint of ours (.../model.safetensors)")
    return KINDS["ours" if kind == "auto" else kind](path)
