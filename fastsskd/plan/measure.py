"""Costs of this machine: a few real steps of the configured model in small batches, and of the loader on its clips."""

from __future__ import annotations

import dataclasses
import itertools
import os
import statistics
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import fastsskd_kernels as kernels
from fastsskd import distributed, ds_config, hardware
from fastsskd.bad_steps import SkippingAdamW
from fastsskd.batch import Batch
from fastsskd.config import Config
from fastsskd.distill import Distill
from fastsskd.errors import InputError
from fastsskd.loader import Loader
from fastsskd.manifest import Manifest
from fastsskd.model import build_model
from fastsskd.patches import num_input_frames
from fastsskd.plan import memory
from fastsskd.plan.cost import StageCost, StageWork
from fastsskd.plan.measured import Measured
from fastsskd.pretrain import Pretrain
from fastsskd.schedule import build_optimizer
from fastsskd.stage_parts import varied
from fastsskd.teachers.ensemble import Ensemble
from fastsskd.teachers.ours import OwnTeacher
from fastsskd.weights import ModelInfo

ROUNDS, SECONDS = 5, 3.0
"""Each thing is timed for as many rounds and as long as that, whichever is more."""
_LARGEST = 64  # clips of a measured micro-batch
_SLOW = 4  # the same without a GPU, for models of more than _BIG parameters
_BIG = 10_000_000


@dataclass(frozen=True)
class _Setting:
    """What all measured stages have in common."""

    config: Config
    tree: dict[str, Any]
    classes: int
    multi_label: bool
    device: torch.device


def measure(
    config: Config,
    tree: dict[str, Any],
    work: Mapping[str, StageWork],
    classes: int,
    teachers: tuple[str, ...],
    micro: int,
    clips: Manifest | None,
) -> Measured:
    """Time the stages of a run on this machine, one rank, and the loader if there are clips.

    Args:
        work: the stages. classes: of the head. teachers: sizes of models of ours, for the distill stage.
        micro: clips of the micro-batch that will be planned: a half and the whole of it are measured; on a card, whose
            memory the whole may not fit into, a quarter and a half.
    """
    on_gpu = torch.cuda.is_available()
    distributed.start("cuda" if on_gpu else "cpu")
    from fastsskd import recipe  # noqa: F401  what a run imports is part of its memory

    device, multi_label = torch.device("cuda" if on_gpu else "cpu"), clips is not None and clips.multi_label
    setting = _Setting(config, tree, classes, multi_label, device)
    loader = None if clips is None else loader_seconds(clips, config, device)
    most = _LARGEST if on_gpu or work[next(iter(work))].parameters.model < _BIG else _SLOW
    # A clip of a larger micro-batch costs less: where memory is no question, the size itself is timed.
    large = max(min(micro // 2 if on_gpu else micro, most), 2)
    stages, held, spread = {}, 0.0, 0.0
    for kind, stage in work.items():
        own_teachers = teachers if kind == "distill" else ()
        stages[kind], differed = _stage_cost(setting, kind, own_teachers, (large // 2, large))
        zero = memory.zero_of(tree)
        count = memory.memory(stage.parameters, zero, 1, large, stage.clip, stage.batch, on_gpu=on_gpu)
        held, spread = max(held, count.total), max(spread, differed)
    last = list(work)[-1]
    own_teachers = teachers if last == "distill" else ()
    beside = None
    if clips is not None and not on_gpu:
        beside = _loading_beside(setting, last, own_teachers, large, clips)
    return Measured(
        device=torch.cuda.get_device_name() if on_gpu else f"{hardware.cpu_name()}, {os.cpu_count()} cores",
        on_gpu=on_gpu,
        cores=distributed.cores_per_rank(),
        memory=float(torch.cuda.get_device_properties(0).total_memory if on_gpu else _machine_memory()),
        size=config.model.size,
        seconds=config.data.seconds,
        precision=ds_config.precision(tree),
        base=0.0 if on_gpu else max(_peak_memory() - held, 0.0),
        loader_seconds=loader,
        beside=beside,
        spread=spread,
        stages=stages,
    )


def _make_batch(setting: _Setting, size: int) -> Batch:
    """Clips of noise with everything a step needs."""
    noise = torch.randn(size, setting.config.num_samples, generator=torch.Generator().manual_seed(0)) * 0.1
    fbank, hog = kernels.features(noise, num_frames=num_input_frames(setting.config.data.seconds))
    index = torch.arange(size)
    seeds = torch.from_numpy(kernels.derive_seeds(0, 0, index.numpy()))
    label = torch.zeros(size, setting.classes) if setting.multi_label else index % setting.classes
    return Batch(fbank, hog, label, [str(i) for i in range(size)], index, seeds, noise).to(setting.device)


def _stage_cost(
    setting: _Setting, kind: str, teachers: tuple[str, ...], sizes: tuple[int, int]
) -> tuple[StageCost, float]:
    """A line through two sizes of the micro-batch, and the optimizer's step; the spread of the times.

    The sizes take turns: a machine that is faster for some seconds is so for both, and a clip's cost comes from pairs.
    """
    engine = _engine(setting, kind, teachers, sizes[1])
    batches = [_make_batch(setting, size) for size in sizes]
    forward: list[list[float]] = [[], []]
    steps = []
    for round_ in _rounds():
        for times, batch in zip(forward, batches, strict=True):
            passes, step = _timed_step(engine, batch)
            if round_:  # the first one allocates
                times.append(passes)
                steps.append(step)
    engine.destroy()
    large = statistics.median(forward[1])
    more = statistics.median(b - a for a, b in zip(*forward, strict=True))
    clip = more / (sizes[1] - sizes[0]) if more > 0.0 else large / sizes[1]
    spread = max(_spread(times) for times in forward)
    return StageCost(clip, max(large - clip * sizes[1], 0.0), statistics.median(steps)), spread


def _loading_beside(setting: _Setting, kind: str, teachers: tuple[str, ...], size: int, clips: Manifest) -> float:
    """Seconds that each clip adds to steps of ``size`` clips when a loader makes them at the same time."""
    engine, data = _engine(setting, kind, teachers, size), setting.config.data
    options = {"workers": data.workers, "prefetch": data.prefetch, "waveform": bool(teachers)}
    loader = Loader(clips, batch_size=size, seconds=data.seconds, train=True, **options)
    batches = _endless(loader)
    for _ in range(loader.prefetch + 2):  # uses up the batches made ahead
        batch = next(batches)
        _timed_step(engine, batch)
    together = []
    for _ in _rounds():
        begin = time.perf_counter()
        _timed_step(engine, next(batches))
        together.append(time.perf_counter() - begin)
    loader.close()
    alone = [sum(_timed_step(engine, batch)) for _ in _rounds()]
    engine.destroy()
    return max(statistics.median(together) - statistics.median(alone), 0.0) / size


def _endless(loader: Loader) -> Iterator[Batch]:
    """Epoch after epoch of the batches in which a clip could be used.

    Raises:
        InputError: there is none in an epoch.
    """
    while True:
        used = 0
        for batch in loader:
            used += len(batch)
            if len(batch):
                yield batch
        if not used:
            raise InputError(f"not one of {len(loader.manifest)} clips can be used; see `fastsskd check`")


def _spread(times: list[float]) -> float:
    """Between the quartiles, as a share of the median."""
    low, middle, high = statistics.quantiles(times, n=4)
    return (high - low) / middle


def _rounds() -> Iterator[int]:
    """Numbers from 0 until enough was timed."""
    begin = time.perf_counter()
    for number in itertools.count():
        if number > ROUNDS and time.perf_counter() - begin > SECONDS:
            return
        yield number


def _timed_step(engine: Any, batch: Batch) -> tuple[float, float]:
    """Seconds of the forward and backward pass, and of the optimizer."""

    def now() -> float:
        if batch.fbank.is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    begin = now()
    loss, _ = engine(batch)
    engine.backward(loss)
    middle = now()
    engine.step()
    return middle - begin, now() - middle


def _engine(setting: _Setting, kind: str, teachers: tuple[str, ...], micro: int) -> Any:
    """As a run has it, on one rank and without accumulation."""
    import deepspeed

    tree, module = setting.tree, _module(setting, kind, teachers, micro)
    own = {k: v for k, v in tree.items() if k not in ("train_micro_batch_size_per_gpu", "tensorboard", "wandb")}
    own |= {"train_batch_size": micro, "gradient_accumulation_steps": 1}
    kind = torch.optim.AdamW if ds_config.zero_stage(tree) else SkippingAdamW
    optimizer = build_optimizer(module, setting.config.ssl, setting.config.optim, kind)
    resolved = ds_config.resolve(own, 1, Path())
    engine, *_ = deepspeed.initialize(model=module.to(setting.device), optimizer=optimizer, config=resolved)
    engine.train()
    return engine


def _module(setting: _Setting, kind: str, teachers: tuple[str, ...], slots: int) -> torch.nn.Module:
    config, model = setting.config, setting.config.model
    options = {"seconds": config.data.seconds, "attention": model.attention, "pooling": model.pooling}
    options["activation_checkpointing"] = model.activation_checkpointing
    if kind == "ssl":
        plain = build_model(model.size, setting.classes, **options)
        return Pretrain(plain, config.loss, config.mask, slots, **varied(config))
    names = tuple(str(number) for number in range(setting.classes))
    return Distill(
        build_model(model.size, setting.classes, drop_path=model.drop_path, **options),
        classes=names,
        multi_label=setting.multi_label,
        distill=config.distill if teachers else dataclasses.replace(config.distill, labels=True),
        augmentation=config.augment,
        data=config.data,
        num_frames=kernels.num_frames(config.num_samples),
        teacher=_teacher(setting, names, teachers).to(setting.device) if teachers else None,
    )


def _teacher(setting: _Setting, classes: tuple[str, ...], sizes: tuple[str, ...]) -> torch.nn.Module:
    """Models of ours with fresh weights, which take as long as trained ones."""
    data, members = setting.config.data, []
    for size in sizes:
        info = ModelInfo(size, classes, setting.multi_label, data.seconds, data.mean, data.std)
        members.append(OwnTeacher(build_model(size, len(classes), seconds=data.seconds), info))
    return members[0] if len(members) == 1 else Ensemble(members, sizes, multi_label=setting.multi_label)


def loader_seconds(clips: Manifest, config: Config, device: torch.device, most: int = 512) -> float:
    """CPU seconds of a clip of these, read, decoded and (without a GPU) made into features."""
    loader = Loader(clips, batch_size=8, seconds=config.data.seconds, train=True, device=device, workers=1, prefetch=2)
    batches, done = _endless(loader), 0
    for _ in range(4):  # starts the worker, which may have to compile
        next(batches)
    begin = time.process_time()
    while done < most and time.process_time() - begin < 10.0:
        done += len(next(batches))
    spent = time.process_time() - begin
    loader.close()
    return spent / done


def _machine_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _peak_memory() -> int:
    """Bytes of this process at its largest."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
