"""The four runs of a profile: the training loop itself on a synthetic batch, on cached ones, on the loader; and the
loader alone.

What differs between two of them is what the other has not, so that no part has to be timed in the midst of the rest
(differential profiling, as in DS-Analyzer).
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

import fastsskd_kernels as kernels
from fastsskd import distributed
from fastsskd.batch import Batch
from fastsskd.engine import StagePlan, Stopped, train_stage
from fastsskd.errors import InputError
from fastsskd.loader import Loader
from fastsskd.patches import num_input_frames
from fastsskd.profile.job import Job
from fastsskd.profile.stats import Interval, median_interval

WINDOW = 0.15
"""Seconds over which speed is counted at least: a loader gives its batches in bursts."""
LEAST = 4  # steps of a run that count, or windows and one, however long they take
CACHED = 4  # batches of real clips that are trained on again and again


@dataclass
class Trace:
    """What one rank saw of one kind of run, over all its rounds.

    Attributes:
        windows: clips of this rank and seconds, of each stretch of at least :data:`WINDOW` seconds.
        steps: begin, seconds waited for data, seconds of the rest, of each optimizer step of the steady state.
        first: seconds until the first batch, of each round.
        memory: of each round, clips so far and bytes of this process at each window's end.
    """

    windows: list[tuple[int, float]] = field(default_factory=list)
    steps: list[tuple[float, float, float]] = field(default_factory=list)
    first: list[float] = field(default_factory=list)
    memory: list[list[tuple[int, int]]] = field(default_factory=list)

    def rate(self) -> Interval:
        """Clips a second of this rank."""
        return median_interval([clips / seconds for clips, seconds in self.windows])

    def append(self, other: Trace) -> None:
        """Another round."""
        for name in ("windows", "steps", "first", "memory"):
            getattr(self, name).extend(getattr(other, name))


class Source:
    """What the training loop gets its batches from; notes how long each took to get.

    Args:
        batches: iterated anew for each epoch.
    """

    def __init__(self, batches: Iterable[Batch]):
        self._batches = batches
        self.waited, self.clips, self.first = 0.0, 0, math.nan

    def __iter__(self) -> Iterator[Batch]:
        batches, begin = iter(self._batches), time.perf_counter()
        while True:
            batch = next(batches, None)
            if batch is None:
                return
            waited = time.perf_counter() - begin
            self.first = waited if math.isnan(self.first) else self.first
            self.waited, self.clips = self.waited + waited, self.clips + len(batch)
            yield batch
            begin = time.perf_counter()


class _Recorder:
    """Called after each step; fills a :class:`Trace`. It stands where a run's stop flag would, too.

    Args:
        warm_up: steps that do not count; but no more than half of ``seconds`` goes to them.
    """

    def __init__(self, source: Source, device: torch.device, warm_up: int, seconds: float):
        self.source, self.device, self.trace = source, device, Trace(memory=[[]])
        now = time.perf_counter()
        self._warm_up, self._half, self._end = warm_up, now + seconds / 2, now + seconds
        self._at = self._window = time.perf_counter()
        self._waited, self._clips, self._steady = 0.0, 0, False

    @property
    def set(self) -> bool:
        """Time is over, and enough steps were counted; the next one is the last."""
        return time.perf_counter() >= self._end and len(self.trace.steps) >= LEAST - 1

    def on_step(self, step: int, stopping: bool) -> None:
        now = time.perf_counter()
        if not self._steady:
            self._steady = step >= self._warm_up or now > self._half
            now = self._settle()
            self._window, self._clips = now, self.source.clips
        else:
            waited = self.source.waited - self._waited
            self.trace.steps.append((self._at, waited, max(now - self._at - waited, 0.0)))
            if now - self._window >= WINDOW or stopping:
                now = self._settle()
                self.trace.windows.append((self.source.clips - self._clips, now - self._window))
                self.trace.memory[0].append((self.source.clips, memory_used()))
                self._window, self._clips = now, self.source.clips
        self._at, self._waited = now, self.source.waited

    def _settle(self) -> float:
        """Wait until the device has done what it was given; the time then."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def train(job: Job, batches: Iterable[Batch], seconds: float, warm_up: int = 1) -> Trace:
    """The training loop on ``batches`` for about ``seconds``; every rank takes the same number of steps."""
    source = Source(batches)
    recorder = _Recorder(source, job.device, warm_up, seconds)
    plan = StagePlan(
        name="profile",
        total_steps=2**31,
        steps_per_epoch=2**31,
        warmup_steps=0,
        peak_lr=1e-6,  # the weights hardly move, whatever is trained on
        schedule="constant",
        accumulation=job.sizes.accumulation,
        seed=0,
        log_every=2**31,
    )
    hooks = {"stop": recorder, "on_step": recorder.on_step, "prepare": job.parts.ahead(job.engine)}
    try:
        train_stage(job.engine, source, plan, **hooks)
    except Stopped:
        recorder.trace.first.append(source.first)
    return recorder.trace


def load(batches: Loader, device: torch.device, seconds: float) -> Trace:
    """The loader alone, as fast as it can; each rank for itself, all at the same time."""
    distributed.barrier()
    source, trace = Source(endless(batches)), Trace()
    end = time.perf_counter() + seconds
    window, clips = time.perf_counter(), 0
    for count, batch in enumerate(source):
        now = time.perf_counter()
        if batch.fbank.is_cuda and (now - window >= WINDOW or now > end):
            torch.cuda.synchronize(device)
            now = time.perf_counter()
        if count < 2:  # what lies between two batches of the steady state is counted
            window, clips = now, source.clips
        elif now - window >= WINDOW:
            trace.windows.append((source.clips - clips, now - window))
            window, clips = now, source.clips
        if now > end and len(trace.windows) >= LEAST - 1:
            break
    trace.first.append(source.first)
    return trace


def endless(loader: Loader) -> Iterator[Batch]:
    """Epoch after epoch of the loader's batches.

    Raises:
        InputError: not one clip of an epoch can be used.
    """
    while True:
        used = 0
        for batch in loader:
            used += len(batch)
            yield batch
        if not used:
            raise InputError(f"not one of {len(loader.manifest)} clips can be used; see `fastsskd check`")


def real_batches(job: Job, number: int = CACHED) -> list[Batch]:
    """Whole batches of real clips, in memory."""
    found, loader = [], job.loader()
    for batch in endless(loader):
        if len(batch) == job.sizes.micro or (found and len(found) < number):
            found.append(_copy(batch))
        if len(found) >= number or (loader.epoch and found):
            break
    loader.close()
    return found[:1] + [batch for batch in found[1:] if len(batch) == len(found[0])]


def synthetic_batch(job: Job, like: Batch) -> Batch:
    """Noise in place of clips, in the shapes of a real batch."""
    noise = torch.randn(len(like), job.config.num_samples, generator=torch.Generator().manual_seed(0)) * 0.1
    fbank, hog = kernels.features(noise, num_frames=num_input_frames(job.config.data.seconds))
    waveform = None if like.waveform is None else noise
    return dataclasses.replace(like, fbank=fbank, hog=hog, waveform=waveform).to(job.device)


def _copy(batch: Batch) -> Batch:
    """The batch in memory of its own: the loader would use its memory again."""
    changes = {
        column.name: getattr(batch, column.name).clone()
        for column in dataclasses.fields(batch)
        if isinstance(getattr(batch, column.name), torch.Tensor)
    }
    return dataclasses.replace(batch, **changes)


def memory_used() -> int:
    """Bytes of this process in memory; 0 where the system does not tell."""
    file = Path("/proc/self/statm")
    return int(file.read_text().split()[1]) * 4096 if file.exists() else 0


def four_runs(job: Job, batches: list[Batch], seconds: float, rounds: int) -> tuple[dict[str, Trace], dict[str, str]]:
    """All four, in turn, ``rounds`` times: what drifts, drifts for all of them.

    Returns:
        This rank's ``"synthetic"``, ``"cached"``, ``"loader"`` and ``"end_to_end"``; the clips left out, and why.
    """
    noise = [synthetic_batch(job, batches[0])]
    share = seconds / rounds / 4.5
    traces: dict[str, Trace] = {name: Trace() for name in ("synthetic", "cached", "loader", "end_to_end")}
    bad: dict[str, str] = {}
    for _ in range(rounds):
        traces["synthetic"].append(train(job, noise, share * 0.75))
        traces["cached"].append(train(job, batches, share))
        for name in ("loader", "end_to_end"):
            with contextlib.closing(job.loader()) as loader:
                if name == "loader":
                    traces[name].append(load(loader, job.device, share))
                else:
                    traces[name].append(end_to_end(job, loader, share * 1.75))
                bad.update(loader.skipped)
    return traces, bad


def end_to_end(job: Job, loader: Loader, seconds: float) -> Trace:
    """Training as it is; it counts once the batches made ahead are there, or used up, and the pace is the run's."""
    return train(job, endless(loader), seconds, warm_up=loader.prefetch + 2)
