"""Answers to windows -> what a recording is: its likeliest classes, those of each window, and events with times."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fastsskd.audio.info import BadClip
from fastsskd.inference.listen import Heard
from fastsskd.inference.sources import Source


@dataclass(frozen=True)
class Window:
    """A window's likeliest classes; ``start`` and ``end`` in seconds."""

    start: float
    end: float
    top: list[tuple[str, float]]


@dataclass(frozen=True)
class Event:
    """A class whose score reaches the threshold in neighbouring windows; ``score`` is its highest in them."""

    name: str
    start: float
    end: float
    score: float


@dataclass(frozen=True, eq=False)
class Prediction(Sequence):
    """What a recording is. As a sequence it is ``top``.

    Attributes:
        name: of the recording.
        seconds: heard of it.
        top: class and score of the likeliest, best first; a score is the mean over the windows.
        probs: ``(C,)`` float32, the scores of all classes.
        windows: if there are more than one.
        events: with a threshold; in the order in which they begin.
        goes_on: the recording is longer, and was heard in part.
    """

    name: str
    seconds: float
    top: list[tuple[str, float]]
    probs: np.ndarray = field(repr=False)
    windows: list[Window] = field(repr=False)
    events: list[Event] = field(repr=False)
    goes_on: bool = False

    def __len__(self) -> int:
        return len(self.top)

    def __getitem__(self, place: Any) -> Any:
        return self.top[place]

    def to_dict(self, threshold: float | None = None) -> dict[str, Any]:
        """Plain values for JSON; ``windows`` and ``events`` only where there are some to speak of."""
        said: dict[str, Any] = {"path": self.name, "seconds": round(self.seconds, 4), "top": _plain(self.top)}
        if self.windows:
            said["windows"] = [
                {"start": round(w.start, 4), "end": round(w.end, 4), "top": _plain(w.top)} for w in self.windows
            ]
        if threshold is not None:
            said["events"] = [
                {"class": e.name, "start": round(e.start, 4), "end": round(e.end, 4), "score": e.score}
                for e in self.events
            ]
        return said


def _plain(top: list[tuple[str, float]]) -> list[dict[str, Any]]:
    return [{"class": name, "score": score} for name, score in top]


class Choice:
    """Which classes of a row of scores are worth saying.

    Args:
        classes: names in the order of the scores.
        top_k: at most so many.
        threshold: only those with at least this score; None = any.
    """

    def __init__(self, classes: Sequence[str], top_k: int, threshold: float | None = None):
        self.classes, self.top_k, self.threshold = tuple(classes), top_k, threshold

    def best(self, probs: np.ndarray) -> list[tuple[str, float]]:
        """``(C,)`` scores -> names and scores, best first; of equal ones the first class."""
        order = np.argsort(-probs, kind="stable")[: self.top_k]
        floor = -np.inf if self.threshold is None else self.threshold
        return [(self.classes[c], float(probs[c])) for c in order if probs[c] >= floor]


class _Summary:
    """A recording's answer while its windows come."""

    def __init__(self, choice: Choice):
        self._choice, self._sum, self._count = choice, np.zeros(len(choice.classes), np.float64), 0
        self._windows: list[Window] = []
        self._open: dict[int, Event] = {}
        self._events: list[Event] = []

    def add(self, start: float, end: float, probs: np.ndarray) -> None:
        self._sum += probs
        self._count += 1
        self._windows.append(Window(start, end, self._choice.best(probs)))
        if self._choice.threshold is None:
            return
        for c in np.flatnonzero(probs >= self._choice.threshold).tolist():
            event = Event(self._choice.classes[c], start, end, float(probs[c]))
            before = self._open.get(c)
            if before is not None and start <= before.end:
                event = Event(event.name, before.start, end, max(before.score, event.score))
            elif before is not None:
                self._events.append(before)
            self._open[c] = event

    def finish(self, name: str, seconds: float, goes_on: bool) -> Prediction:
        probs = (self._sum / self._count).astype(np.float32)
        events = sorted([*self._events, *self._open.values()], key=lambda event: (event.start, event.name))
        windows = self._windows if self._count > 1 else []
        return Prediction(name, seconds, self._choice.best(probs), probs, windows, events, goes_on)


def predict(answers: Iterable[Heard], choice: Choice) -> Iterator[tuple[Source, Prediction | BadClip]]:
    """What each recording is, or why it could not be used; in their order.

    Args:
        answers: of a listener, class scores.
        choice: which classes to say.
    """
    summary = _Summary(choice)
    for heard in answers:
        if isinstance(heard.answer, np.ndarray):
            summary.add(heard.start, heard.end, heard.answer)
            continue
        yield heard.source, _finish(summary, heard)
        summary = _Summary(choice)


def _finish(summary: _Summary, heard: Heard) -> Prediction | BadClip:
    if isinstance(heard.answer, BadClip):
        return heard.answer
    return summary.finish(heard.source.name, heard.end, heard.goes_on)
