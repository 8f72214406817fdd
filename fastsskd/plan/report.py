"""A plan as tables for the terminal and as plain values for JSON, with everything that it takes for granted."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from fastsskd import ds_config
from fastsskd.config import Config
from fastsskd.hardware import GPUS
from fastsskd.plan import job as plan_job
from fastsskd.plan import loader as plan_loader
from fastsskd.plan import memory
from fastsskd.plan.cost import ASSUMED
from fastsskd.plan.job import PAPER_BATCH, PAPER_GPUS, PAPER_HOURS, Clips
from fastsskd.plan.loader import SOURCES, LoaderCost
from fastsskd.plan.measured import Measured
from fastsskd.plan.scale import Job, Plan, plan_at
from fastsskd.text_table import aligned

PAPER_TREE = {
    "train_batch_size": PAPER_BATCH,
    "fp16": {"enabled": True},
    "zero_optimization": {"stage": 2, "overlap_comm": True, "reduce_bucket_size": 50_000_000},
}

_BUSY = 0.2  # a wider spread of timings says that something else ran


@dataclasses.dataclass(frozen=True)
class Paper:
    """The paper's own point as this plan has it: hours of an iteration, and clips a second of its two stages."""

    hours: float
    epochs: dict[str, int]
    clips_per_second: dict[str, float]
    gigabytes: float


def paper_point(config: Config) -> Paper:
    """32 V100s, AudioSet-2M, batch 256, a teacher of the base size; epochs are the configuration's."""
    config = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, size="base"),
        data=dataclasses.replace(config.data, seconds=10.0),
        distill=dataclasses.replace(config.distill, teacher="previous"),
        recipe=dataclasses.replace(config.recipe, stages=("ssl", "distill"), iterations=3),
    )
    clips = Clips(plan_job.AUDIOSET_CLIPS, plan_job.AUDIOSET_CLIPS, plan_job.AUDIOSET_CLASSES)
    found = plan_at(plan_job.job(config, PAPER_TREE, clips, GPUS["V100-32"]), PAPER_GPUS)
    return Paper(
        hours=found.hours,
        epochs={"ssl": config.ssl.epochs, "distill": config.distill.epochs},
        clips_per_second={kind: stage.clips_per_second for kind, stage in found.stages.items()},
        gigabytes=found.memory[2].total / 1e9,
    )


def to_dict(job: Job, plans: Sequence[Plan], paper: Paper, measured: Measured | None) -> dict[str, Any]:
    """Everything, for JSON; bytes and seconds."""
    return {
        "gpu": dataclasses.asdict(job.gpu),
        "stages": {kind: dataclasses.asdict(work) for kind, work in job.work.items()},
        "cost": {kind: dataclasses.asdict(cost) for kind, cost in job.cost.items()},
        "loader": dataclasses.asdict(job.loader),
        "plans": [_plan_to_dict(job, one) for one in plans],
        "paper": {**dataclasses.asdict(paper), "its_hours": PAPER_HOURS, "gpus": PAPER_GPUS, "batch": PAPER_BATCH},
        "assumptions": assumptions(job, measured),
        "measured": None if measured is None else dataclasses.asdict(measured),
    }


def _plan_to_dict(job: Job, one: Plan) -> dict[str, Any]:
    found = dataclasses.asdict(one)
    for stage, parts in one.memory.items():
        if parts is not None:
            found["memory"][stage]["total"] = parts.total + job.base
    return found


def table(job: Job, plans: Sequence[Plan], paper: Paper, measured: Measured | None) -> str:
    """Everything, to read."""
    parts = [_head(job), _memory(job, plans), _parts(job, plans[-1]), _steps(plans), _sent(plans), _loader(job, plans)]
    parts += [_paper(paper), ["Taken for granted:", *(f"- {line}" for line in assumptions(job, measured))]]
    return "\n\n".join("\n".join(lines) for lines in parts)


def _head(job: Job) -> list[str]:
    config, work = job.config, job.work
    number = next(iter(work.values())).parameters.model / 1e6
    stage, precision = ds_config.zero_stage(job.tree), ds_config.precision(job.tree)
    gpu = f"{job.gpu.name} ({job.gpu.memory / 1e9:.0f} GB, {job.gpus_per_node} a node)"
    lines = [
        f"{config.model.size}, {number:.1f} M parameters, {config.data.seconds:g} s, {precision}, ZeRO-{stage}, {gpu}"
    ]
    for kind, one in work.items():
        frozen = f", teacher of {one.parameters.teacher / 1e6:.1f} M" if one.parameters.teacher else ""
        lines.append(f"{kind}: {one.clips:,} clips, {one.epochs} epochs{frozen}")
    return lines


def _memory(job: Job, plans: Sequence[Plan]) -> list[str]:
    rows = [("GPUs", "batch = GPUs x micro x accumulation", *(f"ZeRO-{s}" for s in range(4)), "largest micro")]
    for one in plans:
        sizes = one.sizes
        batch = f"{sizes.total}{'*' if one.grown else ''} = {one.gpus} x {sizes.micro} x {sizes.accumulation}"
        cells = []
        for parts in one.memory.values():
            total = None if parts is None else parts.total + job.base
            cells.append("refused" if total is None else f"{total / 1e9:.2f}{'!' if total > job.gpu.memory else ''}")
        rows.append((str(one.gpus), batch, *cells, str(one.largest_micro)))
    notes = ["* the file's batch cannot be split over so many: it grows, and the learning rate is yours to tune"]
    marked = [note for note in notes if any(one.grown for one in plans)]
    if any("!" in cell for row in rows for cell in row):
        marked.append("! does not fit: a smaller train_micro_batch_size_per_gpu, see the last column, or checkpointing")
    return [f"GB on one GPU (of {job.gpu.memory / 1e9:.0f}), by ZeRO stage:", *aligned(rows, right=True), *marked]


def _parts(job: Job, one: Plan) -> list[str]:
    stage = ds_config.zero_stage(job.tree)
    parts = dataclasses.asdict(one.memory[stage])
    text = ", ".join(f"{name} {value / 1e9:.2f}" for name, value in parts.items() if value >= 5e6)
    return [f"of which, ZeRO-{stage}, {one.gpus} GPU(s): {text}"]


def _steps(plans: Sequence[Plan]) -> list[str]:
    rows = [
        ("GPUs", "stage", "step ms", "compute", "exposed comm.", "loader", "bound", "clips/s", "hours", "iteration h")
    ]
    for one in plans:
        for kind, step in one.stages.items():
            cells = [f"{1e3 * value:.3g}" for value in (step.seconds, step.compute, step.exposed, step.loader)]
            whole = f"{one.hours:.3g}" if kind == next(iter(one.stages)) else ""
            hours = f"{step.hours:.3g}" if step.hours else "no batch"  # fewer clips than that
            rows.append((str(one.gpus), kind, *cells, step.bound, f"{step.clips_per_second:.4g}", hours, whole))
    return ["A step, and the hours of a stage and of an iteration:", *aligned(rows, right=True)]


def _sent(plans: Sequence[Plan]) -> list[str]:
    rows = [("GPUs", *(f"ZeRO-{stage}" for stage in range(4)), *(f"{kind}, in all" for kind in plans[0].stages))]
    for one in plans:
        cells = ["refused" if value is None else f"{value / 1e6:.0f}" for value in one.sent.values()]
        rows.append((str(one.gpus), *cells, *(f"{step.sent / 1e6:.0f}" for step in one.stages.values())))
    first = next(iter(plans[0].stages))
    title = f"MB that each GPU sends in a step: gradients and weights of {first}; with the contrast's features:"
    return [title, *aligned(rows, right=True)]


def _loader(job: Job, plans: Sequence[Plan]) -> list[str]:
    known = sources(job)
    rows = [("GPUs", "clips/s", *(f"cores, {SOURCES[k]}" for k in known), *(f"MB/s, {SOURCES[k]}" for k in known))]
    for one in plans:
        nodes = max(one.gpus / job.gpus_per_node, 1.0)
        rate = max(step.clips_per_second for step in one.stages.values()) / nodes
        cores = [f"{rate * cost.seconds:.1f}" for cost in known.values()]
        disk = [f"{rate * cost.bytes / 1e6:.0f}" for cost in known.values()]
        rows.append((str(one.gpus), f"{rate:.0f}", *cores, *disk))
    chosen = SOURCES[job.loader.source]
    title = f"Each node's loader, at the fastest stage (of {job.gpu.cores} cores; planned with {chosen}):"
    return [title, *aligned(rows, right=True)]


def sources(job: Job) -> Mapping[str, LoaderCost]:
    """Cost of every kind of file, the planned one's as planned."""
    return plan_loader.costs(job.on_gpu, job.config.data.seconds) | {job.loader.source: job.loader}


def _paper(paper: Paper) -> list[str]:
    epochs, rates = paper.epochs, paper.clips_per_second
    share = PAPER_HOURS / paper.hours
    return [
        f"The paper: {PAPER_GPUS} V100s, AudioSet-2M, batch {PAPER_BATCH}, about {PAPER_HOURS:g} h an iteration, "
        "Multi-SSL and distillation together.",
        f"This plan for the same cards, clips and batch: {paper.hours:.1f} h with {epochs['ssl']} + "
        f"{epochs['distill']} epochs ({rates['ssl']:.0f} and {rates['distill']:.0f} clips/s, "
        f"{paper.gigabytes:.1f} GB a card).",
        f"{PAPER_HOURS:g} h would be {share:.2f} times these epochs. The paper gives neither epochs nor precision, nor "
        "the kind of V100, network or teacher: the hours are not comparable; cards, batch, clips, model size are.",
    ]


def assumptions(job: Job, measured: Measured | None) -> list[str]:
    """What nobody measured, or what was and how."""
    a, loader = ASSUMED, job.loader
    lines = _card(job) if measured is None else _measured(job, measured)
    lines += [
        "every GPU holds the teachers in float32; they multiply in the run's precision, and those that are not files "
        "of ours count as models of the base size",
        f"collectives reach {a.bus:.0%} of the links, {1e6 * a.latency:g} us a hop of a tree; with overlap_comm "
        f"{a.hidden:.0%} of the backward pass hides them",
        "DeepSpeed 0.19 all-reduces gradients at stages 1 and 2 too: 3 times the weights a step, not 2",
        f"{memory.FRAGMENTATION:.0%} lost to the allocator; {memory.BATCHES_AHEAD} batches ahead; "
        + (f"{memory.CONTEXT / 1e9:g} GB for CUDA and its libraries" if job.on_gpu else "no CUDA context"),
        "weights kept for distill.select = best or average lie in the host's memory, not the GPU's",
        f"loader: {1e3 * loader.seconds:.2f} ms of a core and {loader.bytes / 1e3:.0f} kB a clip "
        f"({SOURCES[loader.source]}; {loader.origin})",
        "hours are of training alone: no evaluation, checkpoints, start; an epoch drops its last partial batch",
    ]
    if not job.on_gpu:
        how = f"{ASSUMED.sharing:g} times its share of the cores" if job.beside is None else "measured"
        lines.append(f"without a GPU, loading delays the step, whose cores it uses: {how}")
    return lines


def _card(job: Job) -> list[str]:
    gpu, a = job.gpu, ASSUMED
    return [
        f"{gpu.name}: {gpu.matrix16 / 1e12:g} TFLOP/s in 16 bits, of which the model reaches {gpu.share:.0%}: an "
        "estimate",
        f"{gpu.matrix32 / 1e12:g} TFLOP/s in float32 ({a.share32:.0%}), memory {gpu.bandwidth / 1e9:g} GB/s, "
        f"links {gpu.link / 1e9:g} GB/s in a node, {gpu.network / 1e9:g} out of it; {gpu.source}",
        f"the host starts a kernel in {1e6 * a.launch:g} us, {a.kernels_block} kernels a block: a micro-batch takes no "
        "less than that",
        f"AdamW moves {a.adam_bytes:g} bytes of memory a parameter",
    ]


def _measured(job: Job, measured: Measured) -> list[str]:
    gpu = job.gpu
    lines = [
        f"seconds: measured on {measured.device} in small micro-batches, extended in a straight line; half of the "
        f"timings of a step lie within {measured.spread:.0%}"
        + ("; it was busy: measure again" if measured.spread > _BUSY else ""),
        f"{gpu.memory / 1e9:.0f} GB, links {gpu.link / 1e9:g} GB/s in a node, {gpu.network / 1e9:g} out of it; "
        f"{gpu.source}",
    ]
    if not job.on_gpu:
        lines.append(f"a process holds {measured.base / 1e9:.2f} GB besides, at that size")
    return lines
