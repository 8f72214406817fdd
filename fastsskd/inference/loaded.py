"""Checkpoints ready for use: one model, or several of the same classes as one, and what they answer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastsskd.audio.info import SAMPLE_RATE
from fastsskd.errors import InputError, UsageError
from fastsskd.inference.listen import Ear
from fastsskd.inference.windows import Cut
from fastsskd.model import ACM
from fastsskd.patches import patchify
from fastsskd.weights import ModelInfo, load_model

LEVELS = ("clip", "window", "frame", "patch")
"""Of features: one vector a recording (the mean over its windows), a window, a time step of 160 ms (the mean over its
frequencies), or a patch."""


class Loaded:
    """Models of the same classes.

    Args:
        paths: model files or their folders.
        device: ``"cpu"``, ``"cuda"`` or ``"cuda:N"``.

    Attributes:
        models, infos: of each path.

    Raises:
        InputError: a file that is not a model of ours, or models of different classes.
    """

    def __init__(self, paths: Sequence[str | Path], device: str = "cpu"):
        loaded = [load_model(path, device) for path in paths]
        self.paths = [str(path) for path in paths]
        self.models: list[ACM] = [model for model, _ in loaded]
        self.infos: list[ModelInfo] = [info for _, info in loaded]
        self.device, first = device, self.infos[0]
        for path, info in zip(self.paths, self.infos, strict=True):
            if info.classes != first.classes or info.multi_label != first.multi_label:
                raise InputError(f"checkpoint {path}: other classes than {self.paths[0]}; several models need the same")

    @property
    def ears(self) -> list[Ear]:
        """What each model takes, each kind of input once."""
        return list(dict.fromkeys(Ear.of(info) for info in self.infos))

    def untrained(self) -> list[str]:
        """Paths of models whose class head is as it was drawn: those of a first Multi-SSL stage."""
        biases = [model.state_dict().get("head.1.bias") for model in self.models]
        return [path for path, bias in zip(self.paths, biases, strict=True) if bias is not None and not bias.any()]

    def require_head(self) -> None:
        """Raises InputError for models without classes."""
        if not self.infos[0].classes:
            raise InputError(
                f"checkpoint {self.paths[0]}: has no class head, so it predicts nothing; use a model from a distill "
                "stage, or `fastsskd embed` for features"
            )

    def cut(self, window: float | None = None, hop: float | None = None, whole: bool = False) -> Cut:
        """Windows as the user wants them.

        Args:
            window: seconds; default: what the models were trained on, of several the longest.
            hop: seconds from one window to the next; 0 = the first window only, which is what `fastsskd evaluate`
                hears of a long clip. Default: 0; or, with a window of the user's or ``whole``, a window, of several
                models the shortest one's.
            whole: hear recordings from end to end.

        Raises:
            UsageError: a window that is longer than what the models hear, or shorter than a frame.
        """
        longest, shortest = (of(info.seconds for info in self.infos) for of in (max, min))
        whole, window = whole or window is not None, longest if window is None else window
        if not 0.025 <= window <= longest:
            raise UsageError(f"window {window:g}: choose 0.025 to {longest:g} s, the length the model was trained on")
        if hop is None:
            hop = min(window, shortest) if whole else 0.0
        if hop != 0.0 and not 0.01 <= hop < float("inf"):
            raise UsageError(f"hop {hop:g}: choose at least 0.01 s, or 0 for the first window only")
        return Cut(round(window * SAMPLE_RATE), round(hop * SAMPLE_RATE))

    @torch.no_grad()
    def probabilities(self, features: list[Tensor]) -> np.ndarray:
        """Features, one tensor an ear -> ``(n, C)`` float32, the mean of the models' class probabilities."""
        by_ear = dict(zip(self.ears, features, strict=True))
        probs = []
        for model, info in zip(self.models, self.infos, strict=True):
            logits = model(by_ear[Ear.of(info)])[0].float()
            probs.append((logits.sigmoid() if info.multi_label else logits.softmax(dim=-1)).cpu().numpy())
        return sum(probs) / len(probs)

    @torch.no_grad()
    def embedding(self, features: list[Tensor], level: str) -> np.ndarray:
        """The first model's features, float32: ``(n, D)``, or ``(n, T, D)`` of frames, or ``(n, N, D)`` of patches."""
        model = self.models[0]
        tokens = model.features(patchify(features[0]))
        if level == "frame":
            tokens = tokens.unflatten(1, model.grid_size).mean(dim=2)
        elif level != "patch":
            tokens = tokens.mean(dim=1)
        return tokens.float().cpu().numpy()
