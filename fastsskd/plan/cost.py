"""What a stage of a run costs one GPU: its parameters, and seconds counted from its operations.

Every number that nobody measured is named in :data:`ASSUMED` or :mod:`fastsskd.hardware`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fastsskd import flops
from fastsskd.config import Config
from fastsskd.ds_config import BatchSizes
from fastsskd.hardware import Gpu
from fastsskd.model import SIZES, build_model
from fastsskd.plan import memory
from fastsskd.plan.memory import Parameters


@dataclass(frozen=True)
class Assumed:
    """What is taken for granted where nothing was measured.

    Attributes:
        share32: of the float32 peak that float32 products reach.
        launch: seconds the host needs to start one GPU kernel. kernels_block: kernels of a block, forward and backward.
        kernels_forward: forward alone. kernels_more: of everything else in a micro-batch.
        adam_bytes: memory traffic of AdamW, clipping and casting, for each trained parameter of the rank.
        bus: of the links' bandwidth that a collective reaches. latency: seconds of one hop of one collective.
        hidden: of the backward pass that communication can hide behind, when ``overlap_comm`` is on.
        sharing: without a GPU, by how much more than its share of the cores the loader's CPU time delays a step.
        micro: clips of a micro-batch where the file's batch cannot be split: the paper's 256 on 32.
    """

    share32: float = 0.7
    launch: float = 6e-6
    kernels_block: int = 45
    kernels_forward: int = 14
    kernels_more: int = 1200
    adam_bytes: float = 44.0
    bus: float = 0.8
    latency: float = 20e-6
    hidden: float = 0.9
    sharing: float = 1.7
    micro: int = 8


ASSUMED = Assumed()


@dataclass(frozen=True)
class StageCost:
    """Seconds on one GPU: for each clip, for each micro-batch besides, for each optimizer step besides.

    ``floor`` is the least that a micro-batch takes, however small: the host's time to start its kernels.
    """

    clip: float
    micro_batch: float
    step: float
    floor: float = 0.0

    def seconds(self, sizes: BatchSizes) -> float:
        """Of one optimizer step."""
        return sizes.accumulation * max(self.micro_batch + sizes.micro * self.clip, self.floor) + self.step


@dataclass(frozen=True)
class StageWork:
    """One kind of stage of a run.

    Attributes:
        kind: ``"ssl"``, ``"distill"`` or ``"teacher"`` (labels only).
        parameters: see :class:`~fastsskd.plan.memory.Parameters`.
        clip: bytes for each clip that are kept, and that come and go. batch: of a clip in a batch of the loader.
        epochs, clips: of one such stage.
    """

    kind: str
    parameters: Parameters
    clip: tuple[float, float]
    batch: float
    epochs: int
    clips: int


def parameters(config: Config, kind: str, classes: int, teachers: tuple[str, ...]) -> Parameters:
    """Parameters of a stage; ``teachers`` are sizes of our own models."""
    with torch.device("meta"):
        options = {"seconds": config.data.seconds, "pooling": config.model.pooling}
        parts = build_model(config.model.size, classes, **options).num_parameters()
    labelled = kind != "ssl"
    trained = parts.total - (parts["mae"] + parts["decoder"] if labelled else parts["head"])
    if labelled and config.distill.frozen:
        trained = parts["head"]
    own = SIZES[config.model.size].embed_dim
    width = sum(SIZES[teacher].embed_dim for teacher in teachers) or own  # several give their features side by side
    joined = own * width + width if width != own else 0  # the linear map between features of different widths
    frozen = 0
    for size in teachers:
        with torch.device("meta"):
            frozen += build_model(size, classes, seconds=config.data.seconds).num_parameters().total
    averaged = trained + joined if labelled and config.distill.ema else 0
    return Parameters(parts.total + joined, trained + joined, frozen, averaged)


def work_of(
    config: Config, kind: str, element: int, classes: int, teachers: tuple[str, ...], clips: int, *, fused: bool = True
) -> StageWork:
    """A kind of stage; of the machine it depends on the attention alone, which may be ``fused``."""
    return StageWork(
        kind=kind,
        parameters=parameters(config, kind, classes, teachers),
        clip=memory.stage_bytes(kind, config, element, classes, fused=fused),
        batch=memory.batch_bytes(config.data.seconds, waveform=bool(teachers)),
        epochs=(config.ssl if kind == "ssl" else config.distill).epochs,
        clips=clips,
    )


def cost_from_flops(
    gpu: Gpu, config: Config, kind: str, precision: str, classes: int, teachers: tuple[str, ...]
) -> StageCost:
    """A stage's cost on a card that was not measured."""
    size, seconds = SIZES[config.model.size], config.data.seconds
    forward = [SIZES[teacher].depth for teacher in teachers]
    if kind == "ssl":
        mask, raw_gradient = config.mask, config.loss.raw_gradient
        options = {"inter_ratio": mask.inter_ratio, "clones": mask.clones, "raw_gradient": raw_gradient}
        work, views = flops.pretrain_step(size, seconds, **options).total, 2 * mask.clones + raw_gradient
        forward += [] if raw_gradient else [size.depth]
    else:
        head = {"frozen": config.distill.frozen, "pooling": config.model.pooling}
        work, views = flops.distill_step(size, classes, seconds, **head).total, int(not config.distill.frozen)
        work += sum(flops.distill_step(size, classes, seconds, teacher=teacher).teacher for teacher in teachers)
    if config.model.activation_checkpointing:  # the blocks' forward pass a second time
        work += views * flops.blocks(flops.num_tokens(seconds), size.embed_dim, size.depth)
    rate = gpu.matrix32 * ASSUMED.share32 if precision == "fp32" else gpu.matrix16 * gpu.share
    kernels = size.depth * ASSUMED.kernels_block + sum(forward) * ASSUMED.kernels_forward + ASSUMED.kernels_more
    return StageCost(work / rate, 0.0, 0.0, floor=kernels * ASSUMED.launch)
