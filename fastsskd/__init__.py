"""fastsskd: audio self-supervision and distillation (ACM-SSKD) around a loader that never makes a GPU wait."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from fastsskd.api import Model

__version__ = "0.1.0"


def load(path: str | Path | Sequence[str | Path], device: str | None = None, workers: int = 0) -> Model:
    """A trained model, ready to classify and to embed.

        model = fastsskd.load("runs/mine/checkpoints/iter2-distill")
        model.classify("a.wav")  # class and score, the likeliest first
        model.embed("a.wav")     # (D,) float32

    Args:
        path: model file or its folder; several are one model, the mean of their probabilities.
        device: ``"cpu"``, ``"cuda"``, ``"cuda:N"``; None = a GPU if there is one.
        workers: threads that read; 0 = all cores.

    Returns:
        :class:`fastsskd.api.Model`.

    Raises:
        fastsskd.errors.InputError: not a model of ours, or several of different classes.
    """
    from fastsskd import api  # torch waits until it is needed

    return api.load(path, device, workers)
