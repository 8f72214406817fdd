"""Bytes on one GPU at each ZeRO stage: weights, gradients, optimizer, activations, DeepSpeed's buffers.

Activations are counted tensor by tensor, as autograd keeps them for the backward pass; tests/test_plan_memory.py holds
that against what torch really saves. What DeepSpeed keeps is read from version 0.19.8.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fastsskd import ds_config
from fastsskd.config import Config, LossConfig
from fastsskd.flops import PIXELS, num_tokens
from fastsskd.model import SIZES, Size

BATCHES_AHEAD = 4
"""Batches that the loader keeps ready; on a GPU they lie in its memory."""
CONTEXT = 1.0e9
"""Of a GPU: CUDA context, libraries' workspaces, NCCL's buffers. An assumption."""
FRAGMENTATION = 0.05
"""Share of what tensors need that the allocator holds in addition. An assumption."""
BUCKET = 500_000_000
"""Elements of DeepSpeed's buckets, where the ds_config says nothing."""


@dataclass(frozen=True)
class Parameters:
    """Numbers of parameters of a stage.

    Attributes:
        model: all of the student's.
        trained: those of them that are trained.
        teacher: the teacher's.
        averaged: those of the trained ones that have a moving average.
    """

    model: int
    trained: int
    teacher: int = 0
    averaged: int = 0


@dataclass(frozen=True)
class Zero:
    """What of the ds_config concerns memory and communication.

    Attributes:
        stage: ZeRO stage.
        element: bytes of a weight: 4 in fp32, 2 in 16 bits.
        bucket: elements of a reduce bucket.
        overlap: communication goes on beside the backward pass; it takes a second bucket.
        contiguous: gradients are copied into the bucket.
        keeps_gathered: ZeRO-3 gathers the weights once for a forward and backward pass, not once for each.
    """

    stage: int
    element: int
    bucket: int = BUCKET
    overlap: bool = False
    contiguous: bool = True
    keeps_gathered: bool = True


def zero_of(tree: dict[str, Any], stage: int | None = None) -> Zero:
    """What the ds_config says of ZeRO, or would with another stage, with DeepSpeed's defaults."""
    own = tree.get("zero_optimization", {})
    stage = ds_config.zero_stage(tree) if stage is None else stage
    limits = (own.get("stage3_max_reuse_distance", 1e9), own.get("stage3_max_live_parameters", 1e9))
    overlap = own.get("overlap_comm")
    return Zero(
        stage=stage,
        element=4 if ds_config.precision(tree) == "fp32" else 2,
        bucket=int(own.get("reduce_bucket_size", BUCKET)),
        overlap=(stage == 3) if overlap is None else bool(overlap) and stage > 0,
        contiguous=bool(own.get("contiguous_gradients", True)),
        keeps_gathered=min(float(limit) for limit in limits) >= 1e8,
    )


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU, at the peak of a step."""

    weights: float
    gradients: float
    optimizer: float
    teacher: float
    activations: float
    workspace: float
    buckets: float
    batches: float
    context: float

    @property
    def total(self) -> float:
        tensors = self.weights + self.gradients + self.optimizer + self.teacher
        tensors += self.activations + self.workspace + self.buckets + self.batches
        return tensors * (1.0 + FRAGMENTATION) + self.context


def block_bytes(tokens: float, dim: int, heads: int, element: int) -> float:
    """What one transformer block keeps for its backward pass.

    In units of ``tokens x dim``: the inputs of the two norms, of qkv, of the projection (attention's output) and of the
    MLP (5), q, k and v (3), the MLP's hidden layer before and after GELU (8); and the fused attention's log-sum-exp in
    float32 and the norms' two statistics for each token.
    """
    return tokens * (16.0 * dim * element + 4.0 * heads + 4.0 * element)


def blocks_bytes(tokens: float, dim: int, depth: int, heads: int, element: int, checkpointing: bool = False) -> float:
    """What ``depth`` blocks keep; with activation checkpointing their inputs alone."""
    if checkpointing:
        return tokens * dim * depth * element
    return depth * block_bytes(tokens, dim, heads, element)


def probabilities_bytes(size: Size, n: int, passes: int, visible: int, element: int) -> tuple[float, float]:
    """What attention keeps where it is not fused, for each clip: its probabilities in place of the log-sum-exp.

    Args:
        n, passes: tokens of a view, and views that pass the AFT with a graph.
        visible: tokens that the MAE module sees; 0 where it takes no part.

    Returns:
        Of all blocks of the AFT, and of the MAE module's.
    """

    def of_blocks(tokens: int, depth: int, heads: int) -> float:
        return depth * heads * tokens * (tokens * element - 4.0)

    aft = passes * of_blocks(n, size.depth, size.num_heads)
    return aft, of_blocks(visible, size.mae_depth, size.mae_heads)


def simam_bytes(tokens: float, dim: int, depth: int) -> float:
    """What SimAM keeps in ``depth`` blocks: its input, distance from the mean, that squared, and the sigmoid."""
    return tokens * dim * depth * 4 * 4.0


def pretrain_bytes(
    size: Size,
    seconds: float,
    element: int,
    loss: LossConfig,
    *,
    inter_ratio: float = 0.75,
    clones: int = 1,
    checkpointing: bool = False,
) -> float:
    """What a Multi-SSL step keeps for the backward pass, for each clip of the micro-batch."""
    n, dim = num_tokens(seconds), size.embed_dim
    visible = clones * (n - round(inter_ratio * n))
    passes = 2 * clones + loss.raw_gradient
    kept = passes * n * PIXELS * element  # the patches, input of the embedding
    if loss.raw_gradient:
        kept -= n * PIXELS * element  # the raw and the inter view embed the same patches
    kept += 2 * 8.0 * visible + visible * (2 * size.mae_dim + dim) * element  # indices; reduce, norm, expand
    kept += blocks_bytes(visible, size.mae_dim, size.mae_depth, size.mae_heads, element)
    kept += blocks_bytes(passes * n, dim, size.depth, size.num_heads, element, checkpointing)
    kept += passes * n * (dim + 2) * element  # input of the last norm
    return kept + clones * _losses_bytes(n, dim, element, loss)


def _losses_bytes(n: int, dim: int, element: int, loss: LossConfig) -> float:
    """Decoder and losses of both masked views; the losses are in float32."""
    views = ("intra", "inter")
    number = {kind: sum(getattr(loss, f"{kind}_{view}") for view in views) for kind in ("restore", "mse", "kl")}
    copies = 2.0 if element == 2 else 0.0  # the float32 copies of 16-bit features
    kept = number["restore"] * n * (6.0 * dim * element + PIXELS * 4.0)
    kept += number["mse"] * n * dim * 4.0 * copies
    kept += number["kl"] * n * dim * 4.0 * (3.0 if loss.raw_gradient else 2.0)
    if any(number.values()):
        kept += 2.0 * n * dim * element  # features of the two views: input of the decoder, and in fp32 of the MSE
    return kept + (n * dim * element if number["mse"] or number["kl"] else 0.0)  # the raw view's


def distill_bytes(
    size: Size,
    seconds: float,
    element: int,
    num_classes: int,
    *,
    checkpointing: bool = False,
    frozen: bool = False,
    pooling: str = "mean",
) -> float:
    """What a step of the labelled stage keeps for the backward pass, for each clip of the micro-batch."""
    n, dim = num_tokens(seconds), size.embed_dim
    kept = 2.0 * dim * element + 3.0 * 4.0 * num_classes
    if not frozen:
        kept += n * PIXELS * element + blocks_bytes(n, dim, size.depth, size.num_heads, element, checkpointing)
        kept += n * (dim + 2) * element
    if pooling == "attentive":  # the features, keys and values; query, pooled and projected; log-sum-exp
        kept += 3.0 * n * dim * element + 2.0 * dim * element + 4.0 * size.num_heads
    return kept


def workspace_bytes(size: Size, tokens: float, element: int, checkpointing: bool) -> float:
    """What comes and goes in the backward pass: the gradients of an MLP's two hidden tensors and of the residual; with
    activation checkpointing also one block computed anew."""
    moving = tokens * size.embed_dim * element * (2 * 4.0 + 2.0)
    again = block_bytes(tokens, size.embed_dim, size.num_heads, element) if checkpointing else 0.0
    return moving + again


def stage_bytes(
    kind: str, config: Config, element: int, num_classes: int, *, fused: bool = True
) -> tuple[float, float]:
    """Bytes for each clip of a micro-batch of a stage (``"ssl"``, ``"distill"``, ``"teacher"``): kept, workspace.

    The workspace includes what a step holds besides: the views of a Multi-SSL step in float32 with their masks.
    ``fused`` is attention's, see :func:`fastsskd.attention.fused_attention`.
    """
    kept, workspace = _stage_bytes(kind, config, element, num_classes)
    if fused or (kind != "ssl" and config.distill.frozen):
        return kept, workspace
    size, n, mask = SIZES[config.model.size], num_tokens(config.data.seconds), config.mask
    passes, visible = 1, 0
    if kind == "ssl":
        passes, visible = 2 * mask.clones + config.loss.raw_gradient, n - round(mask.inter_ratio * n)
    aft, mae = probabilities_bytes(size, n, passes, visible, element)
    mae *= mask.clones
    if config.model.activation_checkpointing:  # of one block at a time
        return kept + mae, workspace + aft / size.depth
    return kept + mae + aft, workspace


def _stage_bytes(kind: str, config: Config, element: int, num_classes: int) -> tuple[float, float]:
    """With fused attention."""
    size, seconds = SIZES[config.model.size], config.data.seconds
    n, again = num_tokens(seconds), config.model.activation_checkpointing
    clones = config.mask.clones
    passes = 2 * clones + config.loss.raw_gradient if kind == "ssl" else 1
    simam = simam_bytes(passes * n, size.embed_dim, size.depth) if config.model.attention == "simam" else 0.0
    simam_kept, simam_again = (0.0, simam / size.depth) if again else (simam, 0.0)
    if kind == "ssl":
        masks = {"inter_ratio": config.mask.inter_ratio, "clones": clones}
        kept = pretrain_bytes(size, seconds, element, config.loss, **masks, checkpointing=again)
        # Raw and intra in float32, the intra mask before and after its cutting.
        views = clones * n * PIXELS * (2 * 4.0 + 2.0)
        return kept + simam_kept, workspace_bytes(size, 2 * clones * n, element, again) + views + simam_again
    frozen = config.distill.frozen
    options = {"checkpointing": again, "frozen": frozen, "pooling": config.model.pooling}
    kept = distill_bytes(size, seconds, element, num_classes, **options)
    spectrogram = n * PIXELS * 4.0  # the augmented one
    if frozen:  # a block's forward pass alone
        return kept, workspace_bytes(size, n, element, checkpointing=False) + spectrogram
    return kept + simam_kept, workspace_bytes(size, n, element, again) + spectrogram + simam_again


def ahead_bytes(config: Config, element: int) -> float:
    """Of one clip, where a step is cut into micro-batches: :meth:`fastsskd.pretrain.Pretrain.look_ahead`'s features."""
    looks = config.loss.contrasts and not config.loss.raw_gradient
    return num_tokens(config.data.seconds) * SIZES[config.model.size].embed_dim * element * float(looks)


def batch_bytes(seconds: float, waveform: bool) -> float:
    """One clip as the loader gives it: spectrogram, HOG, and its waveform for a teacher."""
    n = num_tokens(seconds)
    return 4.0 * (n * PIXELS + n + (round(seconds * 16000) if waveform else 0))


def model_bytes(parameters: Parameters, zero: Zero, ranks: int) -> dict[str, float]:
    """Weights, gradients, optimizer and buckets on one of ``ranks`` GPUs.

    Adam has two moments in float32, and a moving average of the weights is a third of the kind. Stages 1 to 3 keep a
    float32 copy of the trained weights too, also in fp32, and all of these are divided over the ranks; so are the
    gradients from stage 2 on and the weights in stage 3, which gathers them for a step. The bucket is allocated whole.
    """
    p, e, share = parameters.trained, zero.element, 1.0 / ranks
    average = 4.0 * parameters.averaged
    buckets = zero.bucket * e * (2.0 if zero.overlap else 1.0) if zero.contiguous else 0.0
    if zero.stage == 0:
        return {"weights": parameters.model * e, "gradients": p * e, "optimizer": 8.0 * p + average, "buckets": p * e}
    weights = parameters.model * e
    if zero.stage == 3:
        # The share, and all of them while they are in use: a model of this size stays gathered in a step.
        weights, buckets = weights * (share + 1.0), zero.bucket * e
    gradients = p * e * (1.0 if zero.stage == 1 else share)
    return {"weights": weights, "gradients": gradients, "optimizer": (12.0 * p + average) * share, "buckets": buckets}


def memory(
    parameters: Parameters,
    zero: Zero,
    ranks: int,
    micro: int,
    clip: tuple[float, float],
    batch: float,
    waiting: float = 0.0,
    *,
    on_gpu: bool = True,
) -> Memory:
    """The peak of a step on one GPU.

    Args:
        micro: clips of a micro-batch.
        clip: kept and workspace bytes of one, see :func:`stage_bytes`. batch: of one in the loader's batches.
        waiting: bytes of the step's other micro-batches.
        on_gpu: otherwise a CPU's memory: no context, and of a bucket only the pages that gradients touch.
    """
    held = model_bytes(parameters, zero, ranks)
    if not on_gpu:
        held["buckets"] = min(held["buckets"], parameters.trained * zero.element)
    # The optimizer's float32 copy of its gradients comes when the activations have gone; the greater of the two counts.
    step = 4.0 * parameters.trained / (ranks if zero.stage else 1) if zero.stage else 0.0
    workspace = max(micro * clip[1], step - micro * clip[0])
    return Memory(
        **held,
        teacher=4.0 * parameters.teacher,
        activations=micro * clip[0],
        workspace=workspace,
        batches=(BATCHES_AHEAD + 1) * micro * batch + waiting,
        context=CONTEXT if on_gpu else 0.0,
    )


def largest(fits: Callable[[int], bool], most: int = 1 << 14) -> int:
    """The largest number up to ``most`` for which ``fits`` holds, 0 for none; it holds for all below that one."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low
