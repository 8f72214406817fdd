"""The Python API: ``fastsskd.load`` gives a model that classifies and embeds.

import fastsskd
model = fastsskd.load("runs/mine/checkpoints/iter2-distill")
model.classify("a.wav")                  # [("dog", 0.93), ...]
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastsskd.audio.info import SAMPLE_RATE, BadClip
from fastsskd.distributed import cores_per_rank
from fastsskd.errors import InputError, UsageError
from fastsskd.inference.embed import embed
from fastsskd.inference.listen import Listener
from fastsskd.inference.loaded import LEVELS, Loaded
from fastsskd.inference.predict import Choice, predict
from fastsskd.inference.sources import Recording, Samples, Source
from fastsskd.inference.windows import Cut


class Model:
    """A loaded model, or several of the same classes as one (mean of their probabilities).

    Args:
        paths: model files, or the folders they lie in.
        device: ``"cpu"``, ``"cuda"``, ``"cuda:N"``; None = a GPU if there is one.
        workers: threads that read; 0 = all cores.

    Attributes:
        classes: names in the order of the scores; empty for a model without a head.
        multi_label: scores are independent of each other, rather than adding up to 1.
        seconds: length of a window, as in training.
        sample_rate: Hz of what the features are made from; input may have any rate.
        mean, std: normalisation of the features, ``(x - mean) / (2 * std)``.
        licence: of the weights; "" = none was given.
        embed_dim: D of the features.

    Raises:
        InputError: a file that is not a model of ours, or models of different classes.
    """

    sample_rate = SAMPLE_RATE

    def __init__(self, paths: Sequence[str | Path], device: str | None = None, workers: int = 0):
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.loaded, self._device, self._workers = Loaded(paths, device), device, workers or cores_per_rank()
        info = self.loaded.infos[0]
        self.classes, self.multi_label, self.licence = info.classes, info.multi_label, info.licence
        self.mean, self.std, self.embed_dim = info.mean, info.std, self.loaded.models[0].embed_dim
        self.seconds = max(each.seconds for each in self.loaded.infos)

    def __repr__(self) -> str:
        files = ", ".join(self.loaded.paths)
        return f"Model({files}: {len(self.classes)} classes, {self.seconds:g} s, {self.embed_dim} features)"

    def classify(
        self,
        source: Any,
        sample_rate: int | None = None,
        *,
        top_k: int = 5,
        threshold: float | None = None,
        window: float | None = None,
        hop: float | None = None,
        batch_size: int = 32,
    ) -> Any:
        """The likeliest classes of a recording, or of each of several.

        As in evaluation a recording shorter than :attr:`seconds` is looped, and of a longer one the beginning is heard,
        unless ``window``, ``hop`` or ``threshold`` ask for all of it.

        Args:
            source: a path, samples ``(S,)`` or ``(S, channels)`` with ``sample_rate``, or a list of either.
            sample_rate: Hz of samples.
            top_k: at most so many classes.
            threshold: only classes with at least this score, and ``events``.
            window, hop: seconds, see :meth:`fastsskd.inference.loaded.Loaded.cut`.
            batch_size: windows heard at a time.

        Returns:
            A :class:`~fastsskd.inference.predict.Prediction`, which is a list of (class, score), best first; or a
            list of them.

        Raises:
            InputError: a recording that cannot be used, or a model without classes.
        """
        self.loaded.require_head()
        cut = self.loaded.cut(window, hop, whole=threshold is not None)
        listener = self._listener(self.loaded.probabilities, cut, batch_size)
        answers = predict(listener.listen(_sources(source, sample_rate)), Choice(self.classes, top_k, threshold))
        predictions = list(_good(answers))
        return predictions if _is_several(source) else predictions[0]

    def embed(
        self,
        source: Any,
        sample_rate: int | None = None,
        *,
        level: str = "clip",
        window: float | None = None,
        hop: float | None = None,
        batch_size: int = 32,
    ) -> Any:
        """Features of a recording, or of each of several.

        Args:
            source, sample_rate, window, hop, batch_size: as in :meth:`classify`.
            level: one of :data:`~fastsskd.inference.loaded.LEVELS`.

        Returns:
            float32: ``(D,)`` of a clip; ``(W, D)``, ``(W, T, D)``, ``(W, N, D)`` of its W windows, their frames or
            patches. Of a list ``(n, D)`` of clips, else a list.

        Raises:
            InputError: a recording that cannot be used. UsageError: no such level, or several models.
        """
        if level not in LEVELS:
            raise UsageError(f"level {level!r} is not one of {', '.join(LEVELS)}")
        if len(self.loaded.models) > 1:
            raise UsageError("several models have no features in common; load one of them to embed")
        cut = self.loaded.cut(window, hop, whole=level == "window")
        listener = self._listener(partial(self.loaded.embedding, level=level), cut, batch_size)
        answers = embed(listener.listen(_sources(source, sample_rate)), level)
        rows = [features.rows[0] if level == "clip" else features.rows for features in _good(answers)]
        if not _is_several(source):
            return rows[0]
        return np.stack(rows) if level == "clip" else rows

    def _listener(self, answer: Any, cut: Cut, batch_size: int) -> Listener:
        ears, device, workers = self.loaded.ears, self._device, self._workers
        return Listener(ears, answer, cut, device=device, batch_size=batch_size, workers=workers)


def load(path: str | Path | Sequence[str | Path], device: str | None = None, workers: int = 0) -> Model:
    """A model ready for use: see :class:`Model`. Several paths are one model, the mean of their probabilities."""
    return Model([path] if isinstance(path, (str, Path)) else list(path), device, workers)


def _is_several(source: Any) -> bool:
    return not isinstance(source, (str, Path)) and not hasattr(source, "__array__")


def _sources(source: Any, sample_rate: int | None) -> list[Source]:
    return [_source(item, sample_rate) for item in (source if _is_several(source) else [source])]


def _source(item: Any, sample_rate: int | None) -> Source:
    if not hasattr(item, "__array__"):
        return Recording(str(item), Path(item))
    if sample_rate is None:
        raise UsageError("samples need their sampling rate: model.classify(samples, sample_rate=44100)")
    return Samples("samples", np.asarray(item), sample_rate)


def _good(answers: Iterable[tuple[Source, Any]]) -> Iterator[Any]:
    for source, answer in answers:
        if isinstance(answer, BadClip):
            raise InputError(f"{source.name}: {answer}")
        yield answer
