"""Augmentation on normalised spectrograms. Every draw comes from the clip's seed."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

import fastsskd_kernels as kernels
from fastsskd.batch import Batch
from fastsskd.config import AugmentConfig

_STREAM = 110  # random streams 110, 111, 112


def augment(fbank: Tensor, seed: Tensor, config: AugmentConfig, num_frames: int) -> Tensor:
    """Roll, noise, time and frequency bands, as switched on.

    Args:
        fbank: ``(B, T, F)`` normalised.
        seed: ``(B,)`` int64, one a clip.
        num_frames: frames that are not padding; only these are rolled.
    """
    draws = kernels.uniform(seed, 6, stream=_STREAM)
    if config.time_roll:
        fbank = _roll(fbank, draws[:, 0], num_frames)
    if config.noise > 0:
        fbank = _add_noise(fbank, seed, draws[:, 1] * config.noise)
    if config.time_mask or config.freq_mask:
        frames = _band(fbank.shape[1], config.time_mask, draws[:, 2], draws[:, 3])
        bins = _band(fbank.shape[2], config.freq_mask, draws[:, 4], draws[:, 5])
        fbank = fbank.masked_fill(frames[:, :, None] | bins[:, None, :], 0.0)
    return fbank


def mixup_partner(seed: Tensor, config: AugmentConfig) -> tuple[Tensor, Tensor]:
    """Whom each clip is mixed with, and its own share.

    Neighbours are paired, (0, 1), (2, 3), ...: the pairs stay together however many ranks share the batch, so with an
    even number of clips a rank the run does not depend on the number of ranks.

    Returns:
        ``(B,)`` int64 partners (an odd last clip is its own) and ``(B,)`` float32 ratios; 1 = not mixed.
    """
    place = torch.arange(len(seed), device=seed.device)
    partner = (place ^ 1).clamp_max(len(seed) - 1)
    # The median of 2a - 1 uniform draws is distributed as Beta(a, a).
    draws = kernels.uniform(seed, 2 * config.mixup_alpha, stream=_STREAM + 1)
    ratio = draws[:, 1:].median(dim=1).values
    return partner, torch.where(draws[:, 0] < config.mixup, ratio, torch.ones_like(ratio))


def mix_fbank(fbank: Tensor, partner: Tensor, ratio: Tensor, std: float) -> Tensor:
    """Mix in the power domain, which is what adding two unrelated waveforms does to their expected spectrum.

    Args:
        fbank: ``(B, T, F)``, ``(x - mean) / (2 std)`` of the log-mel energies; the mean is a factor of all powers.
        partner, ratio: see :func:`mixup_partner`.
        std: of the normalisation.
    """
    scale = 2.0 * std
    power = (fbank * scale).exp_()
    mixed = torch.lerp(power[partner], power, ratio.view(-1, 1, 1))
    return mixed.clamp_min_(torch.finfo(torch.float32).tiny).log_().div_(scale)


@torch.no_grad()
def vary(batch: Batch, config: AugmentConfig, std: float, num_frames: int) -> Batch:
    """Other clips for Multi-SSL, ``augment.ssl``: mixed, rolled and with noise, and HOG statistics of what came of it.

    Bands are left to the masks. Arguments as for :func:`mix_fbank` and :func:`augment`.
    """
    fbank = batch.fbank
    if config.mixup > 0 and len(batch) > 1:
        fbank = mix_fbank(fbank, *mixup_partner(batch.seed, config), std)
    fbank = augment(fbank, batch.seed, replace(config, time_mask=0, freq_mask=0), num_frames)
    # Formula 1 does not know the scale, so that gradients of the normalised spectrogram do.
    whole = kernels.pad_frames(fbank[:, :num_frames], fbank.shape[1], "repeat")
    return replace(batch, fbank=fbank, hog=kernels.hog_patch_mean(whole))


def _roll(fbank: Tensor, share: Tensor, num_frames: int) -> Tensor:
    """Rotate each clip's frames along time by its own share of their number; the padding stays at the end."""
    place = torch.arange(fbank.shape[1], device=fbank.device)
    shift = (share * num_frames).long()
    rolled = (place[None] - shift[:, None]) % num_frames
    index = torch.where(place < num_frames, rolled, place)
    row = torch.arange(len(fbank), device=fbank.device)[:, None] * fbank.shape[1] + index
    return fbank.flatten(0, 1).index_select(0, row.flatten()).view_as(fbank)


def _add_noise(fbank: Tensor, seed: Tensor, level: Tensor) -> Tensor:
    """Gaussian noise from the clips' seeds, standard deviation ``level`` ``(B,)``; a GPU draws other numbers."""
    normal = _normal if fbank.is_cuda else _normal_cpu
    return fbank + level.view(-1, 1, 1) * normal(seed, fbank[0].numel()).view_as(fbank)


def _normal(seed: Tensor, count: int) -> Tensor:
    """``(B, count)`` standard normal draws from the seeds: Box-Muller on hashed uniforms, which waits for nothing."""
    half = (count + 1) // 2
    draws = kernels.uniform(seed, 2 * half, stream=_STREAM + 2)
    radius, angle = (-2.0 * torch.log1p(-draws[:, :half])).sqrt(), 2.0 * torch.pi * draws[:, half:]
    return torch.cat([radius * angle.cos(), radius * angle.sin()], dim=1)[:, :count]


def _normal_cpu(seed: Tensor, count: int) -> Tensor:
    """The same with one generator, seeded anew for each clip: on a CPU four times faster than hashing each position."""
    normal, generator = torch.empty(len(seed), count), torch.Generator()
    for row, own in zip(normal, seed.tolist(), strict=True):
        row.normal_(generator=generator.manual_seed(own))
    return normal


def _band(size: int, widest: int, width: Tensor, start: Tensor) -> Tensor:
    """``(B, size)`` bool: a band of 0 to ``widest`` places at a random start."""
    width = (width * (min(widest, size) + 1)).long()
    start = (start * (size - width + 1)).long()
    place = torch.arange(size, device=width.device)
    return (place >= start[:, None]) & (place < (start + width)[:, None])
