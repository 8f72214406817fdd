"""Floating-point operations of a training step, counted from the shapes; a multiply and an add are two.

Matrix products only, as everybody counts them: norms, softmax, GELU, SimAM and the losses are a percent or two of the
work and run at the memory's speed. Work that is done twice to save memory (activation checkpointing) does not count.
"""

from __future__ import annotations

from dataclasses import dataclass

from fastsskd.model import SIZES, Size
from fastsskd.patches import NUM_MEL_BINS, PATCH, num_input_frames

PIXELS = PATCH * PATCH


@dataclass(frozen=True)
class StepFlops:
    """Of one clip, by part.

    Attributes:
        raw: forward of the raw view, and its backward where it has a gradient.
        intra, inter: embedding and AFT of the masked views, forward and backward; in the labelled stage ``intra`` is
            the student and ``inter`` is 0.
        mae: MAE module, forward and backward.
        decoder: decoder of both masked views, or the class head and its pooling; forward and backward.
        teacher: forward of the teacher.
    """

    raw: float
    intra: float
    inter: float
    mae: float
    decoder: float
    teacher: float = 0.0

    @property
    def total(self) -> float:
        return self.raw + self.intra + self.inter + self.mae + self.decoder + self.teacher


def blocks(tokens: int, dim: int, depth: int) -> float:
    """Forward of ``depth`` transformer blocks: qkv, attention, projection, and an MLP four times as wide."""
    return depth * tokens * (24.0 * dim**2 + 4.0 * tokens * dim)


def linear(tokens: int, width_in: int, width_out: int) -> float:
    """Forward of a linear map."""
    return 2.0 * tokens * width_in * width_out


def num_tokens(seconds: float) -> int:
    """Patches of a clip."""
    return num_input_frames(seconds) // PATCH * (NUM_MEL_BINS // PATCH)


def pretrain_step(
    size: str | Size,
    seconds: float = 10.0,
    *,
    inter_ratio: float = 0.75,
    raw_gradient: bool = False,
    clones: int = 1,
) -> StepFlops:
    """One clip's share of a Multi-SSL step, with so many ``clones`` of its masked views.

    A backward pass costs twice its forward pass, but for the first layer, which needs no gradient of the spectrogram.
    """
    size = SIZES[size] if isinstance(size, str) else size
    n, dim = num_tokens(seconds), size.embed_dim
    visible = n - round(inter_ratio * n)
    embed, aft = linear(n, PIXELS, dim), blocks(n, dim, size.depth)
    mae = blocks(visible, size.mae_dim, size.mae_depth)
    mae += linear(visible, dim, size.mae_dim) + linear(visible, size.mae_dim, dim)
    return StepFlops(
        raw=2 * embed + 3 * aft if raw_gradient else embed + aft,
        intra=clones * (2 * embed + 3 * aft),
        inter=clones * (2 * embed + 3 * aft),
        mae=clones * 3 * mae,
        decoder=clones * 2 * 3 * decoder(n, dim),
    )


def decoder(tokens: int, dim: int) -> float:
    """Forward of the decoder (768, 1536), (1536, 768), and the pixels."""
    return linear(tokens, dim, 2 * dim) + linear(tokens, 2 * dim, dim) + linear(tokens, dim, PIXELS)


def attentive_pool(tokens: int, dim: int) -> float:
    """Forward of :class:`fastsskd.model.AttentivePool`: keys and values, one query's attention, projection."""
    return linear(tokens, dim, 2 * dim) + 4.0 * tokens * dim + linear(1, dim, dim)


def distill_step(
    size: str | Size,
    num_classes: int,
    seconds: float = 10.0,
    *,
    teacher: str | Size | None = None,
    frozen: bool = False,
    pooling: str = "mean",
) -> StepFlops:
    """One clip's share of a step of the labelled stage.

    Args:
        teacher: the size of one of our own, None for none.
        frozen: the student's features have no backward pass.
        pooling: of the class head.
    """
    size = SIZES[size] if isinstance(size, str) else size
    n, dim = num_tokens(seconds), size.embed_dim
    embed, aft = linear(n, PIXELS, dim), blocks(n, dim, size.depth)
    student = embed + aft if frozen else 2 * embed + 3 * aft
    head = 3 * linear(1, dim, num_classes)
    if pooling == "attentive":
        # Backward twice the forward, but for the keys' and values' input where that has no gradient.
        head += 3 * attentive_pool(n, dim) - (linear(n, dim, 2 * dim) if frozen else 0.0)
    listening = 0.0
    if teacher is not None:
        other = SIZES[teacher] if isinstance(teacher, str) else teacher
        listening = linear(n, PIXELS, other.embed_dim) + blocks(n, other.embed_dim, other.depth)
    return StepFlops(0.0, student, 0.0, 0.0, head, listening)
