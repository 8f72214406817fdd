"""Answers to windows -> a recording's features: one vector, or those of its windows, frames or patches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from fastsskd.audio.info import BadClip
from fastsskd.inference.listen import Heard
from fastsskd.inference.sources import Source
from fastsskd.patches import PATCH

STEP_SECONDS = PATCH * 0.01
"""From one frame of features to the next: a patch is 16 frames of 10 ms."""


@dataclass(frozen=True)
class Features:
    """Features of a recording.

    Attributes:
        rows: ``(1, D)`` of a clip; ``(W, D)``, ``(W, T, D)`` or ``(W, N, D)`` of its W windows; float32.
        times: start and end of each row, in seconds.
        goes_on: the recording is longer, and was heard in part.
    """

    rows: np.ndarray
    times: list[tuple[float, float]]
    goes_on: bool = False


def embed(answers: Iterable[Heard], level: str) -> Iterator[tuple[Source, Features | BadClip]]:
    """Each recording's features, or why it could not be used; in their order.

    The clip feature of a recording of several windows is the mean of theirs. Other levels keep a recording's windows
    in memory until it ends.

    Args:
        answers: of a listener, features of this level.
        level: see :data:`fastsskd.inference.loaded.LEVELS`.
    """
    rows: list[np.ndarray] = []
    times: list[tuple[float, float]] = []
    total, count = np.zeros(1), 0
    for heard in answers:
        if isinstance(heard.answer, np.ndarray):
            if level == "clip":
                total, count = total + heard.answer.astype(np.float64), count + 1
            else:
                rows.append(heard.answer)
                times.append((heard.start, heard.end))
            continue
        if isinstance(heard.answer, BadClip):
            yield heard.source, heard.answer
        elif level == "clip":
            mean = (total / count).astype(np.float32)[None]
            yield heard.source, Features(mean, [(heard.start, heard.end)], heard.goes_on)
        else:
            yield heard.source, Features(np.stack(rows), times, heard.goes_on)
        rows, times, total, count = [], [], np.zeros(1), 0
