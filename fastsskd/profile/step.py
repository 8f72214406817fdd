"""What each part of a step costs: masks, views or teacher, forward, backward, optimizer, communication."""

from __future__ import annotations

import contextlib
import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from fastsskd import distributed
from fastsskd.augment import augment
from fastsskd.batch import Batch
from fastsskd.errors import InputError
from fastsskd.profile.job import Job
from fastsskd.profile.silence import silence
from fastsskd.profile.stats import Interval, median_interval
from fastsskd.views import draw_masks, make_views

LEAST, MOST = 3, 200
"""Repetitions of each part."""


@dataclass
class Clock:
    """Wall and processor seconds of something that was done again and again."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)

    def time(self, do: Callable[[], Any], device: torch.device) -> Any:
        _settle(device)
        wall, cpu = time.perf_counter(), time.process_time()
        result = do()
        _settle(device)
        self.wall.append(time.perf_counter() - wall)
        self.cpu.append(time.process_time() - cpu)
        return result

    @property
    def seconds(self) -> float:
        return statistics.median(self.wall)

    @property
    def cpu_seconds(self) -> float:
        return statistics.median(self.cpu)


def _settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def parts(job: Job, batch: Batch, seconds: float) -> dict[str, tuple[float, float]]:
    """Wall and processor seconds that each part of a step adds for a clip, on this rank.

    ``forward`` is without what the module prepares, which is timed by itself. Every rank takes as many steps.
    """
    prepare = _preparations(job, batch)
    clocks = {name: Clock() for name in prepare}
    for name, do in prepare.items():
        _repeat(clocks[name], do, job.device, seconds / 4 / len(prepare))
    passes = {name: Clock() for name in ("forward", "backward", "optimizer")}
    rounds = _agreed_rounds(job, batch, seconds * 3 / 4)
    for _ in range(rounds):
        step(job, batch, passes)
    found = {name: (clock.seconds, clock.cpu_seconds) for name, clock in clocks.items()}
    if "views" in found:  # which make the masks
        found["views"] = _less(found["views"], found["masks"])
    forward = (passes["forward"].seconds, passes["forward"].cpu_seconds)
    for inside in found.values():
        forward = _less(forward, inside)
    found |= {"forward": forward}
    found |= {name: (passes[name].seconds, passes[name].cpu_seconds) for name in ("backward", "optimizer")}
    shared = {"optimizer": len(batch) * job.sizes.accumulation}
    return {name: tuple(value / shared.get(name, len(batch)) for value in pair) for name, pair in found.items()}


def _less(whole: tuple[float, float], part: tuple[float, float]) -> tuple[float, float]:
    return max(whole[0] - part[0], 0.0), max(whole[1] - part[1], 0.0)


def _preparations(job: Job, batch: Batch) -> dict[str, Callable[[], Any]]:
    """What happens inside a module before the model."""
    module, made = job.module, {}
    if job.stage.kind == "ssl":
        if job.config.augment.ssl:
            made["augmentation"] = lambda: module.vary(batch)
        made["masks"] = lambda: draw_masks(batch, job.config.mask)
        made["views"] = lambda: make_views(batch, job.config.mask)
        return made
    if job.needs_waveform:
        made["teacher"] = lambda: module.teach(batch.waveform)
    made["augmentation"] = lambda: augment(batch.fbank, batch.seed, job.config.augment, module.num_frames)
    return made


@torch.no_grad()
def _repeat(clock: Clock, do: Callable[[], Any], device: torch.device, seconds: float) -> None:
    do()
    end = time.perf_counter() + seconds
    while len(clock.wall) < LEAST or (time.perf_counter() < end and len(clock.wall) < MOST):
        clock.time(do, device)


def _agreed_rounds(job: Job, batch: Batch, seconds: float) -> int:
    """How many steps fit into ``seconds`` on the slowest rank."""
    begin = time.perf_counter()
    step(job, batch, {})
    _settle(job.device)
    took = max(took for (took,) in distributed.gather_objects((time.perf_counter() - begin,)))
    return max(LEAST, min(round(seconds / max(took, 1e-4)), MOST))


def step(job: Job, batch: Batch, clocks: dict[str, Clock]) -> None:
    """One optimizer step on the same batch, its three parts timed by ``clocks`` if there are any."""
    engine, device = job.engine, job.device
    for number in range(1, job.sizes.accumulation + 1):
        if job.sizes.accumulation > 1:
            engine.set_gradient_accumulation_boundary(number == job.sizes.accumulation)
        if not clocks:
            loss, _ = engine(batch)
            engine.backward(loss)
            engine.step()
            continue
        loss, _ = clocks["forward"].time(lambda: engine(batch), device)
        clocks["backward"].time(lambda loss=loss: engine.backward(loss), device)
        if number == job.sizes.accumulation:
            clocks["optimizer"].time(engine.step, device)
        else:
            engine.step()


@dataclass(frozen=True)
class Alone:
    """Steps with and without communication.

    Attributes:
        together: seconds of a step as it is, on this rank.
        alone: the same when nothing is sent.
    """

    together: Interval
    alone: Interval


def communication(job: Job, batch: Batch, seconds: float) -> Alone | None:
    """Steps in turn with and without collectives; None with one rank, which has nobody to talk to."""
    if distributed.world_size() == 1:
        return None
    rounds = max(_agreed_rounds(job, batch, seconds / 2) // 2, LEAST)
    together, alone = Clock(), Clock()
    for turn in range(4):
        for _ in range(rounds // 2 + 1):
            if turn % 2:
                with silence():
                    alone.time(lambda: step(job, batch, {}), job.device)
            else:
                together.time(lambda: step(job, batch, {}), job.device)
        distributed.barrier()  # who was faster alone waits here, and not in the next step
    return Alone(median_interval(together.wall[1:]), median_interval(alone.wall[1:]))


def save_trace(job: Job, batches: Any, path: Path | None, steps: int = 6) -> None:
    """A few steps of the whole in torch's profiler, as a file for Perfetto; with a GPU the ranges are NVTX's too.

    Args:
        path: None = this rank writes nothing.

    Raises:
        InputError: the file cannot be written.
    """
    from torch.profiler import ProfilerActivity, profile

    os.environ.setdefault("KINETO_LOG_LEVEL", "5")  # without a GPU it would complain that there is none
    on_gpu = job.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    batches = iter(batches)
    for _ in range(2):
        next(batches)
    with profile(activities=activities, acc_events=True) as profiler:
        for _ in range(steps):
            with _named("data", on_gpu):
                batch = next(batches)
            with _named("forward", on_gpu):
                loss, _ = job.engine(batch)
            with _named("backward", on_gpu):
                job.engine.backward(loss)
            with _named("optimizer", on_gpu):
                job.engine.step()
    if path is None:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(path))
    except (OSError, RuntimeError) as error:
        raise InputError(f"--trace {path}: cannot be written ({error}); choose another file") from None


@contextlib.contextmanager
def _named(name: str, on_gpu: bool) -> Iterator[None]:
    """A stretch of time that torch's profiler, and NVIDIA's, show by name."""
    with torch.profiler.record_function(name), torch.cuda.nvtx.range(name) if on_gpu else contextlib.nullcontext():
        yield
