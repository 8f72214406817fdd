"""Costs of this machine: a few real steps of the configured model in small batches, and of the loader on its clips."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import platform
import statistics
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import fastsskd_kernels as kernels
from fastsskd import distributed, ds_config
from fastsskd import plan_memory as memory
from fastsskd.bad_steps import SkippingAdamW
from fastsskd.batch import Batch
from fastsskd.config import Config
from fastsskd.distill import Distill
from fastsskd.errors import InputError
from fastsskd.loader import Loader
from fastsskd.manifest import Manifest
from fastsskd.model import build_model
from fastsskd.patches import num_input_frames
from fastsskd.plan_cost import StageCost, StageWork
from fastsskd.pretrain import Pretrain
from fastsskd.schedule import build_optimizer
from fastsskd.teachers.ensemble import Ensemble
from fastsskd.teachers.ours import OwnTeacher
from fastsskd.weights import ModelInfo

ROUNDS, SECONDS = 5, 4.0
"""Each stage is timed for as many rounds and as long as that, whichever is more."""
_LARGEST = 64  # clips of a measured micro-batch
_SLOW = 4  # the same without a GPU, for models of more than _BIG parameters
_BIG = 10_000_000


@dataclass(frozen=True)
class Measured:
    """What was measured, with the settings it belongs to.

    Attributes:
        device: name. cores: of the machine. memory: bytes of the GPU, or else of the machine.
        size, seconds, precision: model, clip length and arithmetic of the steps.
        base: bytes a process holds besides the plan's count, without a GPU.
        loader_seconds: CPU seconds of a clip; None = not measured.
        beside: seconds that loading a clip adds to a step, without a GPU: the model's threads wait for each other, and
            the loader takes their cores one by one; None = not measured.
        spread: of the timings of one step between their quartiles, as a share of their median, at the worst.
        stages: by kind, see :class:`~fastsskd.plan_cost.StageCost`.
    """

    device: str
    on_gpu: bool
    cores: int
    memory: float
    size: str
    seconds: float
    precision: str
    base: float
    loader_seconds: float | None
    beside: float | None
    spread: float
    stages: Mapping[str, StageCost]


def load(path: str | Path) -> Measured:
    """Read the costs that ``fastsskd plan --gpu this --json`` printed.

    Raises:
        InputError: absent, or something else.
    """
    try:
        tree = json.loads(Path(path).read_text(encoding="utf-8"))
        tree = tree.get("measured") or tree
        stages = {kind: StageCost(**{k: float(v) for k, v in cost.items()}) for kind, cost in tree["stages"].items()}
        found = Measured(**{**tree, "stages": stages})
        numbers = [found.cores, found.memory, found.base, found.seconds, found.spread]
        numbers += [value for value in (found.loader_seconds, found.beside) if value is not None]
        numbers += [value for cost in stages.values() for value in asdict(cost).values()]
        if not stages or min(float(number) for number in numbers) < 0 or found.cores < 1:
            raise ValueError("a figure is missing or negative")
        return found
    except OSError as error:
        raise InputError(
            f"--measured {path}: {error.strerror}; make it with `fastsskd plan --gpu this --json`"
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"--measured {path}: not what `fastsskd plan --gpu this --json` printed ({str(error)[:80]}); make it anew"
        ) from None


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
        micro: clips of the micro-batch that will be planned: a quarter and a half of it are measured.
    """
    on_gpu = torch.cuda.is_available()
    distributed.start("cuda" if on_gpu else "cpu")
    from fastsskd import recipe  # noqa: F401  what a run imports is part of its memory

    device = torch.device("cuda" if on_gpu else "cpu")
    loader = None if clips is None else loader_seconds(clips, config, device)
    most = _LARGEST if on_gpu or work[next(iter(work))].parameters.model < _BIG else _SLOW
    large = max(min(micro // 2, most), 2)
    stages, held, spread = {}, 0.0, 0.0
    for kind, stage in work.items():
        own_teachers = teachers if kind == "distill" else ()
        stages[kind], differed = _stage_cost(config, tree, kind, classes, own_teachers, (large // 2, large), device)
        zero = memory.zero_of(tree)
        count = memory.memory(stage.parameters, zero, 1, large, stage.clip, stage.batch, on_gpu=on_gpu)
        held, spread = max(held, count.total), max(spread, differed)
    last = list(work)[-1]
    own_teachers = teachers if last == "distill" else ()
    beside = None
    if clips is not None and not on_gpu:
        beside = _loading_beside(config, tree, last, classes, own_teachers, large, clips)
    return Measured(
        device=torch.cuda.get_device_name() if on_gpu else f"{_cpu_name()}, {os.cpu_count()} cores",
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


def make_batch(size: int, seconds: float, classes: int, multi_label: bool = False) -> Batch:
    """Clips of noise with everything a step needs."""
    noise = torch.randn(size, round(seconds * 16000), generator=torch.Generator().manual_seed(0)) * 0.1
    fbank, hog = kernels.features(noise, num_frames=num_input_frames(seconds))
    index = torch.arange(size)
    seeds = torch.from_numpy(kernels.derive_seeds(0, 0, index.numpy()))
    label = torch.zeros(size, classes) if multi_label else index % classes
    return Batch(fbank, hog, label, [str(i) for i in range(size)], index, seeds, noise)


def _stage_cost(
    config: Config,
    tree: dict[str, Any],
    kind: str,
    classes: int,
    teachers: tuple[str, ...],
    sizes: tuple[int, int],
    device: torch.device,
) -> tuple[StageCost, float]:
    """A line through the medians at two sizes of the micro-batch, and the optimizer's step; the spread of the times."""
    module = _module(config, kind, classes, teachers, sizes[1], device)
    engine = _engine(module, config, tree, sizes[1], device)
    batches = [make_batch(size, config.data.seconds, classes).to(device) for size in sizes]
    forward: list[list[float]] = [[], []]
    steps = []
    for round_ in _rounds():
        for place, batch in enumerate(batches):
            passes, step = _timed_step(engine, batch, device)
            if round_:  # the first one allocates
                forward[place].append(passes)
                steps.append(step)
    small, large = (statistics.median(times) for times in forward)
    clip = max(large - small, 0.0) / (sizes[1] - sizes[0])
    if clip == 0.0:
        clip = large / sizes[1]
    engine.destroy()
    spread = max(_spread(times) for times in forward)
    return StageCost(clip, max(large - clip * sizes[1], 0.0), statistics.median(steps)), spread


def _loading_beside(
    config: Config,
    tree: dict[str, Any],
    kind: str,
    classes: int,
    teachers: tuple[str, ...],
    size: int,
    clips: Manifest,
) -> float:
    """Seconds that each clip adds to steps of ``size`` clips when a loader makes them at the same time."""
    device = torch.device("cpu")
    engine = _engine(_module(config, kind, classes, teachers, size, device), config, tree, size, device)
    options = {"workers": config.data.workers, "prefetch": config.data.prefetch, "waveform": bool(teachers)}
    loader = Loader(clips, batch_size=size, seconds=config.data.seconds, train=True, **options)
    if not len(loader):
        raise InputError(f"{len(clips)} clips are too few to measure a batch of {size}; give --clips instead")
    batches = (batch for _ in itertools.count() for batch in loader)
    for _ in range(loader.prefetch + 2):  # uses up the batches made ahead
        batch = next(batches)
        _timed_step(engine, batch, device)
    together = []
    for _ in _rounds():
        begin = time.perf_counter()
        _timed_step(engine, next(batches), device)
        together.append(time.perf_counter() - begin)
    loader.close()
    alone = [sum(_timed_step(engine, batch, device)) for _ in _rounds()]
    engine.destroy()
    return max(statistics.median(together) - statistics.median(alone), 0.0) / size


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


def _timed_step(engine: Any, batch: Batch, device: torch.device) -> tuple[float, float]:
    """Seconds of the forward and backward pass, and of the optimizer."""

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    begin = now()
    loss, _ = engine(batch)
    engine.backward(loss)
    middle = now()
    engine.step()
    return middle - begin, now() - middle


def _engine(module: torch.nn.Module, config: Config, tree: dict[str, Any], micro: int, device: torch.device) -> Any:
    """As a run has it, on one rank and without accumulation."""
    import deepspeed

    own = {k: v for k, v in tree.items() if k not in ("train_micro_batch_size_per_gpu", "tensorboard", "wandb")}
    own |= {"train_batch_size": micro, "gradient_accumulation_steps": 1}
    resolved = ds_config.resolve(own, 1, Path())
    optimizer = build_optimizer(module, config.ssl, config.optim)
    if ds_config.zero_stage(tree) == 0:
        optimizer = SkippingAdamW(optimizer.param_groups)
    engine, *_ = deepspeed.initialize(model=module.to(device), optimizer=optimizer, config=resolved)
    engine.train()
    return engine


def _module(
    config: Config, kind: str, classes: int, teachers: tuple[str, ...], slots: int, device: torch.device
) -> torch.nn.Module:
    options = {"seconds": config.data.seconds, "activation_checkpointing": config.model.activation_checkpointing}
    if kind == "ssl":
        return Pretrain(build_model(config.model.size, classes, **options), config.loss, config.mask, slots)
    names = tuple(str(number) for number in range(classes))
    teacher = _teacher(config, names, teachers) if teachers else None
    return Distill(
        build_model(config.model.size, classes, drop_path=config.model.drop_path, **options),
        classes=names,
        multi_label=False,
        distill=config.distill if teachers else dataclasses.replace(config.distill, labels=True),
        augmentation=config.augment,
        data=config.data,
        num_frames=kernels.num_frames(config.num_samples),
        teacher=None if teacher is None else teacher.to(device),
    )


def _teacher(config: Config, classes: tuple[str, ...], sizes: tuple[str, ...]) -> torch.nn.Module:
    """Models of ours with fresh weights, which take as long as trained ones."""
    data, members = config.data, []
    for size in sizes:
        info = ModelInfo(size, classes, False, data.seconds, data.mean, data.std)
        members.append(OwnTeacher(build_model(size, len(classes), seconds=data.seconds), info))
    return members[0] if len(members) == 1 else Ensemble(members, sizes, multi_label=False)


def loader_seconds(clips: Manifest, config: Config, device: torch.device, most: int = 512) -> float:
    """CPU seconds of a clip of these, read, decoded and (without a GPU) made into features."""
    loader = Loader(clips, batch_size=8, seconds=config.data.seconds, train=True, device=device, workers=1, prefetch=2)
    batches, done = iter(loader), 0
    for _ in range(4):  # starts the worker, which may have to compile
        next(batches, None)
    begin = time.process_time()
    for batch in batches:
        done += len(batch)
        if done >= most or time.process_time() - begin > 10.0:
            break
    spent = time.process_time() - begin
    loader.close()
    if not done:
        raise InputError(f"{len(clips)} clips are too few to measure the loader on; give --clips instead of --manifest")
    return spent / done


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    found = (line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    return next(found, platform.processor() or platform.machine())


def _machine_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _peak_memory() -> int:
    """Bytes of this process at its largest."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
