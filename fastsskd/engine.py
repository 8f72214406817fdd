"""The training loop of one stage, over a DeepSpeed engine or anything else with ``backward`` and ``step``."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastsskd import distributed
from fastsskd.alive import Launcher
from fastsskd.bad_steps import BadStep, BadSteps, Forward, GradientWatch
from fastsskd.batch import Batch
from fastsskd.errors import SharedError
from fastsskd.loader import Loader
from fastsskd.schedule import learning_rate, set_learning_rate
from fastsskd_kernels import derive_seed


class Stopped(Exception):
    """The run was asked to stop (SIGTERM, Ctrl-C, end of the launcher) and every rank saved the same step."""


class StopFlag:
    """Set by SIGTERM and SIGINT, and when the launcher has ended; a second SIGINT kills at once."""

    def __init__(self):
        self._signalled, self._launcher = False, Launcher()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._handle)

    @property
    def set(self) -> bool:
        return self._signalled or self._launcher.gone()

    def _handle(self, number: int, frame: Any) -> None:
        self._signalled = True
        signal.signal(signal.SIGINT, signal.default_int_handler)


@dataclass(frozen=True)
class StagePlan:
    """What the loop needs to know of a stage.

    Attributes:
        name: such as ``"iter1-ssl"``.
        total_steps, steps_per_epoch, warmup_steps: in optimizer steps.
        peak_lr, schedule: see :func:`fastsskd.schedule.learning_rate`.
        accumulation: micro-batches per optimizer step.
        seed: of draws that a module makes from torch's generator; ours make none.
        log_every: optimizer steps between two calls of ``on_log``.
        max_bad_steps: steps in a row with a loss or gradient that is not finite, at which the run ends.
        clip_flops, peak_flops: operations of a clip, and those that all ranks could do in a second; 0 = not known.
    """

    name: str
    total_steps: int
    steps_per_epoch: int
    warmup_steps: int
    peak_lr: float
    schedule: str
    accumulation: int
    seed: int
    log_every: int
    max_bad_steps: int = 5
    clip_flops: float = 0.0
    peak_flops: float = 0.0


@dataclass(frozen=True)
class Log:
    """Means since the last log.

    Attributes:
        step: optimizer steps done in this stage.
        metrics: ``loss`` and its parts.
        lr, grad_norm: of the last step; the norm is before clipping and NaN where the engine does not tell.
        clips: clips trained on, over all ranks.
        seconds: wall time.
        wait: share of it that this rank waited for data.
        headroom: how much faster the slowest rank's loader could have gone, 1 = twice as fast: what its workers were
            idle. NaN where the loader does not tell.
        mfu: model FLOPs utilisation, the share of the machine's peak that the model's products had; NaN = not known.
    """

    step: int
    metrics: dict[str, float]
    lr: float
    grad_norm: float
    clips: int
    seconds: float
    wait: float
    headroom: float = math.nan
    mfu: float = math.nan


def train_stage(
    engine: Any,
    loader: Loader,
    plan: StagePlan,
    *,
    start_step: int = 0,
    stop: StopFlag | None = None,
    prepare: Callable[[list[Batch]], list[Batch]] = lambda batches: batches,
    on_log: Callable[[Log], None] = lambda log: None,
    on_step: Callable[[int, bool], None] = lambda step, stopping: None,
    on_bad: Callable[[BadStep], None] = lambda bad: None,
    watch: GradientWatch | None = None,
) -> None:
    """Train from ``start_step`` to the end of the stage.

    Args:
        engine: ``engine(batch) -> (loss, metrics)``, ``engine.backward(loss)``, ``engine.step()``.
        loader: at the cursor that belongs to ``start_step``.
        prepare: what becomes of a step's micro-batches that have clips on every rank, before the first is trained on.
        on_log: called every ``plan.log_every`` steps.
        on_step: called after each optimizer step with the number done and whether the run is stopping; saves.
        on_bad: called with each step that was skipped because something was not finite.
        watch: tells which clips' gradients were not.

    Raises:
        Stopped: after ``on_step`` of the step at which all ranks agreed to stop.
        InputError: too many bad steps in a row.
    """
    engine.train()
    batches = _forever(loader)
    meter = _Meter(plan, loader)
    bad_steps = BadSteps(plan.name, plan.max_bad_steps, on_bad)
    for step in range(start_step, plan.total_steps):
        lr = learning_rate(step, plan.total_steps, plan.warmup_steps, plan.peak_lr, plan.schedule)
        set_learning_rate(engine.optimizer, lr)
        # The model's own draws are a function of the step: a resumed run repeats them without saved generator states.
        torch.manual_seed(derive_seed(plan.seed, step, distributed.rank()))
        micro_batches = [meter.wait(batches) for _ in range(plan.accumulation)]
        weights, clips, stopping = _agree(micro_batches, stop is not None and stop.set)
        used = [(batch, weight) for batch, weight in zip(micro_batches, weights, strict=True) if weight > 0]
        prepared = prepare([batch for batch, _ in used]) if used else []
        forwards = _step(engine, prepared, [weight for _, weight in used], plan.accumulation, watch)
        meter.add(bad_steps.after(step + 1, forwards, engine.optimizer), clips)
        if meter.due(step + 1) or step + 1 == plan.total_steps or stopping:
            on_log(meter.log(step + 1, lr, _grad_norm(engine)))
        on_step(step + 1, stopping)
        if stopping:
            raise Stopped(f"{plan.name}: stopped after step {step + 1}")


def _forever(loader: Loader):
    while True:
        yield from loader


def _agree(micro_batches: list[Batch], stop: bool) -> tuple[list[float], int, bool]:
    """What every rank must know before the step.

    Returns:
        The weight of each micro-batch's loss here, such that the step averages over all good clips of the global batch
        (0 = skipped: some rank has none left of it); the clips of the step over all ranks; whether any rank stops.
    """
    own = [*(len(batch) for batch in micro_batches), int(stop)]
    ranks = distributed.gather_numbers(own)
    counts = [[numbers[m] for numbers in ranks] for m in range(len(micro_batches))]
    used = [min(count) > 0 for count in counts]
    total = sum(sum(count) for count, use in zip(counts, used, strict=True) if use)
    # DeepSpeed averages over ranks and divides by the accumulation steps.
    scale = len(ranks) * len(micro_batches) / max(total, 1)
    weights = [own[m] * scale if use else 0.0 for m, use in enumerate(used)]
    return weights, total, any(numbers[-1] for numbers in ranks)


def _step(
    engine: Any, batches: list[Batch], weights: list[float], accumulation: int, watch: GradientWatch | None
) -> list[Forward]:
    """Forward and backward of the micro-batches that have clips on every rank, then the optimizer."""
    forwards = []
    for number, (batch, weight) in enumerate(zip(batches, weights, strict=True), 1):
        if accumulation > 1:
            engine.set_gradient_accumulation_boundary(number == len(batches))
        loss, metrics = engine(batch)
        # 0 x loss is 0, or NaN if the loss is not finite; then the gradients are too, and every rank skips the step.
        engine.backward(loss * (0.0 * loss.detach() + weight))
        _optimize(engine)
        values = {"loss": loss.detach(), **metrics}
        forwards.append(Forward(batch, values, weight / accumulation, watch.take() if watch else ()))
    return forwards


def _optimize(engine: Any) -> None:
    try:
        engine.step()
    except Exception as error:  # DeepSpeed's is as bare as that
        if "loss scale already at minimum" not in str(error):
            raise
        raise SharedError(
            "fp16: the gradients overflow even at the smallest loss scale (fp16.min_loss_scale); lower the learning "
            "rate, or use bf16 or fp32; --resume continues from the last checkpoint"
        ) from None


def _grad_norm(engine: Any) -> float:
    norm = getattr(engine, "get_global_grad_norm", lambda: None)()
    return math.nan if norm is None else float(norm)


class _Meter:
    """Sums between two logs; the losses stay on the device until the log."""

    def __init__(self, plan: StagePlan, loader: Loader):
        self.plan, self.loader = plan, loader
        self._reset()

    def _reset(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.weight, self.clips, self.waited = 0.0, 0, 0.0
        self.begin, self.busy = time.perf_counter(), getattr(self.loader, "busy", None)

    def wait(self, batches: Any) -> Batch:
        begin = time.perf_counter()
        batch = next(batches)
        self.waited += time.perf_counter() - begin
        return batch

    def add(self, forwards: list[Forward], clips: int) -> None:
        """Count a step: what this rank's micro-batches gave, and the clips of all ranks."""
        for forward in forwards:
            for name, value in forward.values.items():
                value = value.float() * forward.weight
                self.sums[name] = self.sums[name] + value if name in self.sums else value
            self.weight += forward.weight
        self.clips += clips

    def due(self, step: int) -> bool:
        return step % self.plan.log_every == 0

    def log(self, step: int, lr: float, grad_norm: float) -> Log:
        """Close the interval; the means are over all ranks. This waits for the device and for the other ranks."""
        own = ({name: float(value) for name, value in self.sums.items()}, self.weight, self._headroom())
        everyone = distributed.gather_objects(own)
        ranks = [rank for rank in everyone if rank[0]]
        weight = max(sum(rank[1] for rank in ranks), 1e-9)
        names = ranks[0][0] if ranks else ()
        metrics = {name: sum(rank[0][name] for rank in ranks) / weight for name in names}
        seconds = max(time.perf_counter() - self.begin, 1e-9)
        headroom, peak = min(rank[2] for rank in everyone), self.plan.peak_flops
        mfu = self.clips * self.plan.clip_flops / (seconds * peak) if peak else math.nan
        log = Log(step, metrics, lr, grad_norm, self.clips, seconds, self.waited / seconds, headroom, mfu)
        self._reset()
        return log

    def _headroom(self) -> float:
        """Of this rank's loader: it could have worked all the time in all its threads."""
        if self.busy is None:
            return math.nan
        worked = self.loader.busy - self.busy
        could = (time.perf_counter() - self.begin) * self.loader.workers
        return max(could / max(worked, 1e-9) - 1.0, 0.0)
