"""Recordings -> a model's answers to their windows, in order, in bounded memory.

    sources -> read, resample, cut, features (threads, a few recordings ahead) -> batches of windows -> answer

A recording that cannot be used ends with its reason, and the others are still heard.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

import fastsskd_kernels as kernels
from fastsskd.audio.info import SAMPLE_RATE, BadClip
from fastsskd.inference.sources import Source
from fastsskd.inference.windows import SMALLEST_REST, Cut, seconds
from fastsskd.patches import num_input_frames
from fastsskd.weights import ModelInfo

PART = 8
"""Windows that a thread makes ready at a time."""


@dataclass(frozen=True)
class Ear:
    """What a model takes: clips of one length, looped where they are shorter, and their normalised features."""

    num_samples: int
    num_frames: int
    mean: float
    std: float

    @classmethod
    def of(cls, info: ModelInfo) -> Ear:
        return cls(round(info.seconds * SAMPLE_RATE), num_input_frames(info.seconds), info.mean, info.std)

    def clip(self, windows: Sequence[np.ndarray]) -> Tensor:
        """Windows of any length -> ``(n, num_samples)``: their beginning, or a loop, as in evaluation."""
        return torch.from_numpy(np.stack([kernels.crop_or_loop(window, self.num_samples) for window in windows]))

    def features(self, clips: Tensor) -> Tensor:
        """``(n, num_samples)`` -> ``(n, T, F)`` normalised fbank."""
        return kernels.features(clips, num_frames=self.num_frames, mean=self.mean, std=self.std)[0]


@dataclass(frozen=True)
class Heard:
    """One window's answer, or the end of a recording.

    Attributes:
        source: the recording.
        start, end: of the window, in seconds; at the end of a recording, of what was heard of it.
        answer: the window's row of what the model answered; a ``BadClip`` where the recording ends because it is bad;
            None where it ends.
        goes_on: at the end, the recording was heard in part.
    """

    source: Source
    start: float
    end: float
    answer: np.ndarray | BadClip | None
    goes_on: bool = False

    @property
    def ends(self) -> bool:
        """Whether this is the end of a recording."""
        return not isinstance(self.answer, np.ndarray)


@dataclass(frozen=True)
class _Part:
    """A few windows of a recording, and after the last of them what ended it."""

    source: Source
    times: list[tuple[float, float]]
    inputs: list[Tensor]
    ended: Heard | None = None


class _Counted:
    """Blocks, and how many samples were in those that were taken."""

    def __init__(self, blocks: Iterator[np.ndarray]):
        self._blocks, self.total = blocks, 0

    def __iter__(self) -> Iterator[np.ndarray]:
        return self

    def __next__(self) -> np.ndarray:
        block = next(self._blocks)
        self.total += len(block)
        return block


class Listener:
    """Hears recordings.

    Args:
        ears: what the models take, one entry a kind of input.
        answer: ``(n, T, F)`` features, one tensor an ear -> ``(n, ...)`` rows, n up to ``batch_size``.
        cut: the windows.
        device: where ``answer`` wants its features.
        batch_size: most windows in a call of ``answer``.
        workers: threads that read.
    """

    def __init__(
        self,
        ears: Sequence[Ear],
        answer: Callable[[list[Tensor]], np.ndarray],
        cut: Cut,
        *,
        device: str = "cpu",
        batch_size: int = 32,
        workers: int = 1,
    ):
        self._ears, self._answer, self._cut = list(ears), answer, cut
        self._device, self._batch_size, self._workers = torch.device(device), batch_size, workers

    def listen(self, sources: Iterable[Source]) -> Iterator[Heard]:
        """The answers to each recording's windows, then its end; recordings in their order."""
        held: list[_Part] = []
        for part in self._parts(iter(sources)):
            held.append(part)
            if sum(len(p.times) for p in held) >= self._batch_size:
                yield from self._answers(held)
                held = []
        yield from self._answers(held)

    def _answers(self, parts: list[_Part]) -> Iterator[Heard]:
        rows: list[np.ndarray] = []
        with_windows = [part.inputs for part in parts if part.times]
        if with_windows:
            columns = [torch.cat(column).split(self._batch_size) for column in zip(*with_windows, strict=True)]
            for inputs in zip(*columns, strict=True):
                rows.extend(self._answer(self._on_device(inputs)))
        answers = iter(rows)
        for part in parts:
            for start, end in part.times:
                yield Heard(part.source, start, end, next(answers))
            if part.ended:
                yield part.ended

    def _on_device(self, inputs: Iterable[Tensor]) -> list[Tensor]:
        """Features; a GPU gets samples and makes its own."""
        if self._device.type == "cpu":
            return list(inputs)
        return [ear.features(clips.to(self._device)) for ear, clips in zip(self._ears, inputs, strict=True)]

    def _parts(self, sources: Iterator[Source]) -> Iterator[_Part]:
        """The recordings' parts in order; each thread has a part ready and works on the next."""
        ahead: deque[tuple[Iterator[_Part], Future[_Part]]] = deque()
        pool = ThreadPoolExecutor(self._workers, thread_name_prefix="fastsskd-listen")
        try:
            while True:
                while len(ahead) < 2 * self._workers + 1 and (source := next(sources, None)) is not None:
                    reading = self._read(source)
                    ahead.append((reading, pool.submit(next, reading)))
                if not ahead:
                    return
                reading, future = ahead[0]
                part = future.result()
                if part.ended:
                    ahead.popleft()
                else:
                    ahead[0] = (reading, pool.submit(next, reading))
                yield part
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    # The rest runs in the threads.

    def _read(self, source: Source) -> Iterator[_Part]:
        """Parts of a recording; the last one has ``ended``."""
        blocks, last = _Counted(source.open()), 0
        try:
            held: list[tuple[int, np.ndarray]] = []
            for window in self._cut.windows(blocks):
                held.append(window)
                last = window[0] + len(window[1])
                if len(held) == min(PART, self._batch_size):
                    yield self._part(source, held)
                    held = []
            goes_on = blocks.total - last >= SMALLEST_REST * self._cut.length
            yield self._part(source, held, Heard(source, 0.0, seconds(last), None, goes_on))
        except BadClip as bad:
            yield _Part(source, [], [], Heard(source, 0.0, seconds(last), BadClip(str(bad))))
        except OSError as error:
            reason = BadClip(f"cannot be read: {error.strerror or error}")
            yield _Part(source, [], [], Heard(source, 0.0, seconds(last), reason))

    def _part(self, source: Source, windows: list[tuple[int, np.ndarray]], ended: Heard | None = None) -> _Part:
        if not windows:
            return _Part(source, [], [], ended)
        times = [(seconds(start), seconds(start + len(samples))) for start, samples in windows]
        clips = [ear.clip([samples for _, samples in windows]) for ear in self._ears]
        if self._device.type == "cpu":
            clips = [ear.features(clip) for ear, clip in zip(self._ears, clips, strict=True)]
        return _Part(source, times, clips, ended)
