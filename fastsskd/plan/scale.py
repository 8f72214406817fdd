"""Time, communication and loading of a training step at N GPUs: numbers in, numbers out.

A step takes what its operations take at the share of the card's peak that is assumed, or what was measured; then the
part of the communication that does not hide behind the backward pass. The loader works beside it, and the slower of
the two counts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fastsskd import ds_config
from fastsskd.config import Config
from fastsskd.ds_config import BatchSizes
from fastsskd.errors import UsageError
from fastsskd.hardware import Gpu
from fastsskd.model import SIZES
from fastsskd.plan import memory
from fastsskd.plan.cost import ASSUMED, StageCost, StageWork
from fastsskd.plan.loader import LoaderCost
from fastsskd.plan.memory import Memory, Zero, zero_of


@dataclass(frozen=True)
class Job:
    """What is planned.

    Attributes:
        tree: the DeepSpeed JSON. work, cost: by kind of stage.
        gpu: the card. on_gpu: False for a machine without one, whose loader shares the cores with training.
        base: bytes a process holds besides. beside: seconds that loading a clip adds to a step, where it was measured.
    """

    config: Config
    tree: dict[str, Any]
    gpu: Gpu
    work: Mapping[str, StageWork]
    cost: Mapping[str, StageCost]
    loader: LoaderCost
    gpus_per_node: int = 8
    on_gpu: bool = True
    base: float = 0.0
    beside: float | None = None


@dataclass(frozen=True)
class StepPlan:
    """One kind of stage at one number of GPUs; seconds are of an optimizer step.

    Attributes:
        compute, exposed, loader: of the model; of communication that hides behind nothing; of the node's cores.
        bound: ``"compute"``, ``"communication"`` or ``"loader"``, whichever is the longest.
        sent: bytes each GPU sends. cores, disk: each node's loader needs, to keep up; disk in bytes a second.
        hours: of one such stage, without evaluation and checkpoints.
    """

    kind: str
    seconds: float
    compute: float
    exposed: float
    loader: float
    bound: str
    clips_per_second: float
    sent: float
    cores: float
    disk: float
    hours: float


@dataclass(frozen=True)
class Plan:
    """A job at one number of GPUs.

    Attributes:
        grown: the total batch is larger than the file's, which cannot be split over so many.
        memory: by ZeRO stage, of the hungriest stage of the run; None where the precision is refused.
        sent: bytes each GPU sends in a Multi-SSL (or else labelled) step, by ZeRO stage.
        largest_micro: clips of the largest micro-batch that fits, 0 for none.
        hours: of one iteration; ``teacher_hours`` of the stage that is trained once, before the first.
    """

    gpus: int
    sizes: BatchSizes
    grown: bool
    memory: dict[int, Memory | None]
    sent: dict[int, float | None]
    largest_micro: int
    stages: dict[str, StepPlan]
    hours: float
    teacher_hours: float


def split_batch(tree: dict[str, Any], gpus: int) -> tuple[BatchSizes, bool]:
    """Batch sizes at ``gpus``, and whether the total had to grow.

    The file's total stays as long as it can be split evenly, if need be into smaller micro-batches than the file's;
    beyond, every GPU keeps the file's micro-batch (or 8 clips) and the total grows.
    """
    try:
        return ds_config.batch_sizes(tree, gpus), False
    except UsageError:
        total, micro = tree.get("train_batch_size"), tree.get("train_micro_batch_size_per_gpu")
        if isinstance(total, int) and total % gpus == 0:
            most, each = micro if isinstance(micro, int) else total, total // gpus
            micro = max(m for m in range(1, min(most, each) + 1) if each % m == 0)
            return BatchSizes(total, micro, each // micro), False
        if not isinstance(total, int) and not isinstance(micro, int):
            raise
        micro = micro if isinstance(micro, int) else ASSUMED.micro
        return BatchSizes(micro * gpus, micro, 1), True


def sent(zero: Zero, trained: int, sizes: BatchSizes, ranks: int) -> tuple[float, float]:
    """Bytes that each rank sends in a step for gradients and for weights, around a ring.

    What DeepSpeed 0.19.8 does, as tests/test_plan_memory.py counts: stages 0 to 2 all-reduce the gradients, where a
    reduce-scatter would do at 1 and 2; stage 2 reduces every micro-batch, and stage 3 gathers for every one.
    """
    whole = trained * zero.element * (ranks - 1) / ranks
    if zero.stage == 0:
        return 2.0 * whole, 0.0
    if zero.stage == 3:
        return whole * sizes.accumulation, whole * sizes.accumulation * (1.0 if zero.keeps_gathered else 2.0)
    return 2.0 * whole * (sizes.accumulation if zero.stage == 2 else 1), whole


def contrast_sent(config: Config, sizes: BatchSizes, ranks: int) -> float:
    """Bytes each rank sends in a step so that every rank has all clips' pooled features (Formulas 8 and 9)."""
    if not config.loss.contrasts:
        return 0.0
    own = sizes.micro * sizes.accumulation * (SIZES[config.model.size].embed_dim + 1) * 4.0
    return own * (ranks - 1) * (2.0 if config.loss.raw_gradient else 1.0)


def transfer_seconds(job: Job, data: float, ranks: int, collectives: float) -> float:
    """Of collectives that send ``data`` bytes from each rank; a node's adapters carry what leaves it once."""
    if ranks == 1:
        return 0.0
    inside = ranks <= job.gpus_per_node
    rate = job.gpu.link if inside else min(job.gpu.link, job.gpu.network)
    return data / (rate * ASSUMED.bus) + collectives * math.log2(ranks) * ASSUMED.latency


def exposed_seconds(job: Job, work: StageWork, zero: Zero, sizes: BatchSizes, ranks: int, compute: float) -> float:
    """Communication of a step that does not hide behind its backward passes."""
    trained = work.parameters.trained
    gradients, weights = sent(zero, trained, sizes, ranks)
    number = math.ceil(trained / zero.bucket)
    passes = sizes.accumulation if zero.stage >= 2 else 1
    reduce = transfer_seconds(job, gradients, ranks, number * passes)
    # Stage 3 gathers block by block.
    blocks = SIZES[job.config.model.size].depth * passes if zero.stage == 3 else number
    gather = transfer_seconds(job, weights, ranks, blocks if weights else 0)
    contrast = 0.0
    if work.kind == "ssl" and (data := contrast_sent(job.config, sizes, ranks)):
        contrast = transfer_seconds(job, data, ranks, 2 * sizes.accumulation if job.config.loss.raw_gradient else 1)
    if not zero.overlap:
        return reduce + gather + contrast
    backward = 2.0 / 3.0 * compute * passes / sizes.accumulation
    if zero.stage == 3:
        return max(0.0, reduce + gather - ASSUMED.hidden * compute) + contrast
    return max(0.0, reduce - ASSUMED.hidden * backward) + gather + contrast


def step_plan(job: Job, work: StageWork, sizes: BatchSizes, ranks: int) -> StepPlan:
    """A step of one kind of stage at ``ranks`` GPUs."""
    zero, cost = zero_of(job.tree), job.cost[work.kind]
    on_node = min(ranks, job.gpus_per_node)
    own = work.parameters.trained / (ranks if zero.stage else 1)
    adam = ASSUMED.adam_bytes * own / job.gpu.bandwidth if job.gpu.bandwidth and not cost.step else 0.0
    compute = cost.seconds(sizes) + adam
    exposed = exposed_seconds(job, work, zero, sizes, ranks, compute)
    clips_on_node = sizes.total / ranks * on_node
    loader = clips_on_node * job.loader.seconds / job.gpu.cores
    seconds = max(compute + exposed, loader)
    if not job.on_gpu:  # the model and the loader use the same cores
        loader = loader * ASSUMED.sharing if job.beside is None else clips_on_node * job.beside
        seconds = compute + exposed + loader
    parts = {"compute": compute, "communication": exposed, "loader": loader}
    bound = max(parts, key=parts.get)
    if job.on_gpu and loader <= compute + exposed:
        bound = "compute" if compute >= exposed else "communication"
    steps = work.epochs * (work.clips // sizes.total)
    contrast = contrast_sent(job.config, sizes, ranks) if work.kind == "ssl" else 0.0
    return StepPlan(
        kind=work.kind,
        seconds=seconds,
        compute=compute,
        exposed=exposed,
        loader=loader,
        bound=bound,
        clips_per_second=sizes.total / seconds,
        sent=sum(sent(zero, work.parameters.trained, sizes, ranks)) + contrast,
        cores=clips_on_node * job.loader.seconds / seconds,
        disk=clips_on_node * job.loader.bytes / seconds,
        hours=steps * seconds / 3600.0,
    )


def memory_at(job: Job, zero: Zero, ranks: int, sizes: BatchSizes) -> Memory:
    """Of the hungriest stage."""
    found = []
    for work in job.work.values():
        # A step holds its micro-batches from the beginning, and in Multi-SSL what was seen looking ahead.
        waiting = (sizes.accumulation - 1) * sizes.micro * work.batch
        if work.kind == "ssl" and sizes.accumulation > 1:
            waiting += sizes.accumulation * sizes.micro * memory.ahead_bytes(job.config, zero.element)
        clips = (work.clip, work.batch, waiting)
        found.append(memory.memory(work.parameters, zero, ranks, sizes.micro, *clips, on_gpu=job.on_gpu))
    return max(found, key=lambda one: one.total)


def plan_at(job: Job, gpus: int) -> Plan:
    """The job at one number of GPUs."""
    sizes, grown = split_batch(job.tree, gpus)
    half = ds_config.precision(job.tree) != "fp32"
    first = next(iter(job.work.values()))
    by_stage, volume = {}, {}
    for stage in range(4):
        refused = stage == 0 and half  # ds_config.py says why
        zero = zero_of(job.tree, stage)
        by_stage[stage] = None if refused else memory_at(job, zero, gpus, sizes)
        volume[stage] = None if refused else sum(sent(zero, first.parameters.trained, sizes, gpus))
    own = zero_of(job.tree)

    def fits(micro: int) -> bool:
        return memory_at(job, own, gpus, BatchSizes(micro * gpus, micro, 1)).total + job.base <= job.gpu.memory

    stages = {kind: step_plan(job, work, sizes, gpus) for kind, work in job.work.items()}
    return Plan(
        gpus=gpus,
        sizes=sizes,
        grown=grown,
        memory=by_stage,
        sent=volume,
        largest_micro=memory.largest(fits),
        stages=stages,
        hours=sum(stage.hours for kind, stage in stages.items() if kind != "teacher"),
        teacher_hours=stages["teacher"].hours if "teacher" in stages else 0.0,
    )
