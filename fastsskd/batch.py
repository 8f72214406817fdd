"""What the loader gives and everything after it takes."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """One batch of ``B`` clips; ``B`` is smaller than the batch size where clips were left out.

    Attributes:
        fbank: ``(B, T, F)`` float32, normalised, zero-padded before normalisation.
        hog: ``(B, N)`` float32, mean gradient magnitude of each patch, the x of Formula 1.
        label: ``(B,)`` int64, -1 = unlabelled; or ``(B, C)`` float32 multi-hot for a multi-label set.
        key: the clips' names.
        index: ``(B,)`` int64, rows of the manifest.
        seed: ``(B,)`` int64, one random seed a clip and epoch, for its masks.
        waveform: ``(B, S)`` float32 at 16 kHz, the same crops, if asked for.
        teacher_probs: ``(B, C)`` float32, a teacher's class probabilities for the same crops, if they are stored.
        teacher_features: ``(B, D)`` float32, its clip features, likewise.
        raw_features, keys: of a step that is looked through ahead, see :meth:`fastsskd.pretrain.Pretrain.look_ahead`.
    """

    fbank: Tensor
    hog: Tensor
    label: Tensor
    key: list[str]
    index: Tensor
    seed: Tensor
    waveform: Tensor | None = None
    teacher_probs: Tensor | None = None
    teacher_features: Tensor | None = None
    raw_features: Tensor | None = None
    keys: Any = None

    def __len__(self) -> int:
        return len(self.key)

    def to(self, device: torch.device | str) -> Batch:
        """The batch with every tensor on ``device``."""
        columns = {f.name: getattr(self, f.name) for f in fields(self)}
        moved: dict[str, Any] = {k: v.to(device) for k, v in columns.items() if isinstance(v, Tensor)}
        return replace(self, **moved)
