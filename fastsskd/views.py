"""The three views of a batch: raw, intra-patch masked, inter-patch masked (Figures 2-4).

Masks depend on each clip's seed alone, so they are the same on any number of ranks, on any device, after any resume.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

import fastsskd_kernels as kernels
from fastsskd.batch import Batch
from fastsskd.config import MaskConfig
from fastsskd.patches import PATCH, patchify

_CLONES_STREAM = 130  # random stream


@dataclass(frozen=True)
class Views:
    """What pre-training sees of ``B`` clips of ``N`` patches with ``P`` = 256 pixels; with ``mask.clones``, all clips
    are there that many times, one round after the other, and ``B`` is so many times theirs.

    Attributes:
        raw: ``(B, N, P)`` pixels of the unmasked patches.
        intra: ``(B, N, P)`` pixels with bands inside some patches set to 0, the mean.
        intra_mask: ``(B, N, P)`` bool, True = masked pixel.
        inter_mask: ``(B, N)`` bool, True = masked patch.
        ids_keep: ``(B, V)`` int64, the visible patches of the inter view in order; ``V = N - round(ratio * N)``.
        weight: ``(B, N)`` Formula 2's weight of each patch, a Gaussian of its mean gradient.
    """

    raw: Tensor
    intra: Tensor
    intra_mask: Tensor
    inter_mask: Tensor
    ids_keep: Tensor
    weight: Tensor


def draw_masks(batch: Batch, config: MaskConfig) -> tuple[Tensor, Tensor, Tensor]:
    """Formula 1's weight of each patch ``(B, N)``; the inter mask ``(B, N)`` and the intra mask ``(B, T, F)``, bool."""
    grid_size = (batch.fbank.shape[1] // PATCH, batch.fbank.shape[2] // PATCH)
    weight = kernels.patch_weight(batch.hog)
    # Formula 1 as printed is an option of the draw alone: Formula 2 prints the Gaussian.
    drawn = weight if config.hog_form == "gaussian" else kernels.patch_weight(batch.hog, form=config.hog_form)
    sampling = drawn if config.inter_sampling == "hog" else torch.ones_like(weight)
    inter_mask = kernels.inter_patch_mask(sampling, config.inter_ratio, generator=batch.seed)
    intra_mask = kernels.intra_patch_mask(
        len(batch),
        grid_size,
        patch=PATCH,
        generator=batch.seed,
        max_share=config.intra_max_share,
        p_time=config.intra_p_time,
        p_freq=config.intra_p_freq,
        p_both=1.0 - config.intra_p_time - config.intra_p_freq,
        max_width=config.intra_max_width,
    )
    return weight, inter_mask, intra_mask


def cloned(batch: Batch, number: int) -> Batch:
    """The clips ``number`` times, one round after the other; from the second on with seeds drawn from their own."""
    if number == 1:
        return batch
    others = kernels.random_bits(batch.seed, number - 1, stream=_CLONES_STREAM)
    return replace(
        batch,
        fbank=batch.fbank.repeat(number, 1, 1),
        hog=batch.hog.repeat(number, 1),
        key=batch.key * number,
        seed=torch.cat([batch.seed[None], others.T]).flatten(),
    )


def make_views(batch: Batch, config: MaskConfig) -> Views:
    """Build the views of a batch; no gradient, no waiting for the device."""
    batch = cloned(batch, config.clones)
    weight, inter_mask, intra_mask = draw_masks(batch, config)
    raw, masked = patchify(batch.fbank), patchify(intra_mask)
    # Every clip masks the same number of patches, so the count is known without asking the device.
    num_visible = inter_mask.shape[1] - round(config.inter_ratio * inter_mask.shape[1])
    ids_keep = inter_mask.to(torch.uint8).argsort(dim=1, stable=True)[:, :num_visible]
    return Views(raw, raw.masked_fill(masked, 0.0), masked, inter_mask, ids_keep, weight)
