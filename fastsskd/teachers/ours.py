"""A model trained by this trainer, as a teacher."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

import fastsskd_kernels as kernels
from fastsskd.errors import InputError
from fastsskd.weights import ModelInfo, load_model


class OwnTeacher(nn.Module):
    """Wraps a classifier of ours behind the teacher protocol; features are its AVG-pooled clip features."""

    score_kind = "logits"

    def __init__(self, model: nn.Module, info: ModelInfo):
        super().__init__()
        self.model, self.info = model.eval().requires_grad_(False), info
        self.classes, self.embed_dim = tuple(info.classes), model.embed_dim

    @torch.no_grad()
    def forward(self, waveform: Tensor) -> tuple[Tensor, Tensor]:
        """``(B, S)`` waveform at 16 kHz -> logits ``(B, C)`` and clip features ``(B, D)``, float32.

        Raises:
            InputError: clips longer than those the teacher was trained on; shorter ones are padded.
        """
        frames = self.model.grid_size[0] * 16
        if kernels.num_frames(waveform.shape[1]) > frames:
            heard, seconds = waveform.shape[1] / 16000, self.info.seconds
            raise InputError(
                f"teacher: trained on clips of {seconds:g} s, it cannot hear {heard:g} s; lower data.seconds to that, "
                "or use a teacher of longer clips"
            )
        fbank, _ = kernels.features(waveform.float(), num_frames=frames, mean=self.info.mean, std=self.info.std)
        logits, clip = self.model(fbank)
        return logits.float(), clip.float()

    def train(self, mode: bool = True) -> OwnTeacher:
        """Stays in evaluation mode: a teacher inside a module being trained must not start to drop blocks."""
        return super().train(False)


def load(path: Path) -> OwnTeacher:
    """Load ``model.safetensors`` (or its folder).

    Raises:
        InputError: not a model of ours, or one without a class head.
    """
    model, info = load_model(path)
    if model.head is None:
        raise InputError(f"teacher {path}: has no class head; use a model from a distill stage")
    return OwnTeacher(model, info)
