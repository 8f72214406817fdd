"""From a command's arguments to what is planned: the stages, the card, the clips, and what they cost."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import torch

from fastsskd import config as configuration
from fastsskd import ds_config, hardware, weights
from fastsskd.attention import fused_attention
from fastsskd.config import Config
from fastsskd.errors import InputError, UsageError
from fastsskd.hardware import GPUS, Gpu
from fastsskd.loader import open_manifest
from fastsskd.manifest import Manifest, split
from fastsskd.plan import cost as plan_cost
from fastsskd.plan import loader as plan_loader
from fastsskd.plan import measured as plan_measured
from fastsskd.plan import scale as plan
from fastsskd.plan.cost import StageWork
from fastsskd.plan.measured import Measured
from fastsskd.plan.scale import Job
from fastsskd.stages import plan_stages

GPU_COUNTS = (1, 8, 64, 512, 4096)
AUDIOSET_CLIPS, AUDIOSET_CLASSES = 2_000_000, 527
PAPER_GPUS, PAPER_BATCH, PAPER_HOURS = 32, 256, 28.0
"""Appendix A: "We use 32 V100 GPUs ... AudioSet-2M ... the batch size is 256 ... The total training time for each
iteration is approximately 28 h, which includes multidimensional self-supervision and distillation"."""


@dataclasses.dataclass(frozen=True)
class Clips:
    """How many clips each kind of stage trains on, of how many classes; the manifest, if there is one."""

    ssl: int
    labelled: int
    classes: int
    manifest: Manifest | None = None


def count_clips(config: Config, clips: int | None, manifest: str | None) -> Clips:
    """The training clips of a manifest, split as a run splits it; or ``clips``, or AudioSet-2M's."""
    most = config.data.max_train
    if manifest is None:
        number = clips or AUDIOSET_CLIPS
        return Clips(number, min(number, most or number), AUDIOSET_CLASSES)
    data = config.data
    table = open_manifest(manifest)
    train = table
    if not data.eval_manifest:
        options = {"train_folds": data.train_folds, "eval_folds": data.eval_folds, "eval_share": data.eval_share}
        train, _ = split(table, **options, seed=config.run.seed)
    ssl = len(open_manifest(data.ssl_manifest)) if data.ssl_manifest else len(train)
    return Clips(ssl, min(len(train), most or len(train)), max(len(table.classes), 1), train)


def teacher_sizes(config: Config) -> tuple[str, ...]:
    """Sizes of the teachers of the last labelled stage.

    A teacher that is no file of ours, or is not here, counts as one of the base size.
    """
    stages = plan_stages(config)
    wanted = [stage.teacher for stage in stages if stage.kind == "distill" and stage.teacher is not None]
    if not wanted:
        return ()
    if wanted[-1] in {stage.name for stage in stages}:
        return (config.model.size,)
    return tuple(_size_of(path) for path in ([wanted[-1]] if isinstance(wanted[-1], str) else wanted[-1]))


def _size_of(path: str) -> str:
    if Path(path).exists() and weights.is_model_file(path):
        return weights.read_model_file(weights.model_file(path))[1].size
    return "base"


def works(config: Config, tree: dict[str, Any], clips: Clips, on_gpu: bool = True) -> dict[str, StageWork]:
    """Each kind of stage of the run, in its order."""
    device = torch.device("cuda" if on_gpu else "cpu")
    fused = fused_attention(device, torch.bfloat16 if ds_config.precision(tree) == "bf16" else torch.float32)
    element = 4 if ds_config.precision(tree) == "fp32" else 2
    teachers = teacher_sizes(config)
    found = {}
    for kind in dict.fromkeys(stage.kind for stage in plan_stages(config)):
        number = clips.ssl if kind == "ssl" else clips.labelled
        own = teachers if kind == "distill" else ()
        found[kind] = plan_cost.work_of(config, kind, element, clips.classes, own, number, fused=fused)
    return dict(sorted(found.items(), key=lambda item: ("ssl", "distill", "teacher").index(item[0])))


def choose_gpu(name: str | None, precision: str) -> Gpu:
    """The card ``name``; without one a V100 for fp16, which others do not need, and an A100 otherwise.

    Raises:
        UsageError: unknown, or without the ds_config's precision.
    """
    name = name or ("V100-32" if precision == "fp16" else "A100-80")
    if name not in GPUS:
        raise UsageError(f"--gpu {name}: not one of {', '.join(GPUS)}, this")
    if precision == "bf16" and not GPUS[name].has_bf16:
        raise UsageError(f"--gpu {name}: has no bf16; use a ds_config with fp16 (launch/ds_config_v100.json)")
    return GPUS[name]


def this_machine(measured: Measured) -> Gpu:
    """The machine that was measured: one card or CPU a node, 10 Gb/s between them, unless it is a card we know."""
    known = hardware.find(measured.device) if measured.on_gpu else None
    own = {"name": measured.device, "memory": measured.memory, "cores": measured.cores}
    if known is not None:
        return dataclasses.replace(known, **own)
    slow = 1.25e9
    nothing = {"matrix16": 0.0, "matrix32": 0.0, "bandwidth": 0.0, "share": 0.0}
    return Gpu(**own, **nothing, link=slow, network=slow, has_bf16=True, source="measured; links: assumed, 10 Gb/s")


def job(
    config: Config,
    tree: dict[str, Any],
    clips: Clips,
    gpu: Gpu,
    measured: Measured | None = None,
    gpus_per_node: int = 8,
) -> Job:
    """What :func:`fastsskd.plan.scale.plan_at` takes.

    Raises:
        UsageError: the costs were measured with another model, clip length or precision.
    """
    on_gpu = measured is None or measured.on_gpu
    precision, work = ds_config.precision(tree), works(config, tree, clips, on_gpu)
    known = plan_loader.costs(on_gpu, config.data.seconds)
    loader = known["packed"] if clips.manifest is None else plan_loader.cost_of(clips.manifest, known)
    if measured is None:
        teachers = teacher_sizes(config)
        cost = {
            kind: plan_cost.cost_from_flops(
                gpu, config, kind, precision, clips.classes, teachers if kind == "distill" else ()
            )
            for kind in work
        }
        return Job(config, tree, gpu, work, cost, loader, gpus_per_node)
    for name, wanted in (("size", config.model.size), ("seconds", config.data.seconds), ("precision", precision)):
        if getattr(measured, name) != wanted:
            raise UsageError(f"--measured: with {name} {getattr(measured, name)}, the plan has {wanted}; measure anew")
    if missing := set(work) - set(measured.stages):
        raise InputError(f"--measured: has no cost of the stage {min(missing)}; measure with this --config")
    if measured.loader_seconds is not None:
        loader = dataclasses.replace(loader, seconds=measured.loader_seconds, origin="measured")
    return Job(config, tree, gpu, work, measured.stages, loader, gpus_per_node, on_gpu, measured.base, measured.beside)


def from_arguments(args: argparse.Namespace) -> tuple[Job, Measured | None]:
    """The job of `fastsskd plan`'s arguments, and what was measured for it.

    Raises:
        InputError: a file is absent or damaged. UsageError: arguments that contradict each other.
    """
    config, tree = configuration.load(args.config, args.set), ds_config.load(args.ds_config)
    if args.epochs:
        ssl, distill = (dataclasses.replace(part, epochs=args.epochs) for part in (config.ssl, config.distill))
        config = dataclasses.replace(config, ssl=ssl, distill=distill)
    if args.gpu == "this" and args.measured:
        raise UsageError("--gpu this and --measured: measure, or give what was measured")
    measured = plan_measured.load(args.measured) if args.measured else None
    clips = count_clips(config, args.clips, args.manifest)
    if args.gpu == "this":
        measured = _measure(config, tree, clips)
    if measured is None or args.gpu not in (None, "this"):
        gpu = choose_gpu(args.gpu, ds_config.precision(tree))
    else:
        gpu = this_machine(measured)
    per_node = args.gpus_per_node or (8 if gpu.matrix16 else 1)
    return job(config, tree, clips, gpu, measured, per_node), measured


def _measure(config: Config, tree: dict[str, Any], clips: Clips) -> Measured:
    from fastsskd.plan import measure as plan_measure

    on_gpu = torch.cuda.is_available()
    ds_config.check_device(tree, "cuda" if on_gpu else "cpu")
    sizes, _ = plan.split_batch(tree, 1)
    return plan_measure.measure(
        config,
        tree,
        works(config, tree, clips, on_gpu),
        clips.classes,
        teacher_sizes(config),
        sizes.micro,
        clips.manifest,
    )
