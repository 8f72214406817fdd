"""Is Multi-SSL learning? Numbers beside the losses, and what they mean in plain words.

The functions of the first part run inside a step and never wait for the device; :func:`of_features` runs between steps.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fastsskd import distributed
from fastsskd.patches import PATCH

NAMES = (
    "feature_std",
    "effective_rank",
    "rank_limit",
    "feature_spread",
    "contrast_accuracy_intra",
    "contrast_accuracy_inter",
    "contrast_chance",
    "explained_intra",
    "explained_inter",
    "positions_intra",
    "positions_inter",
)
"""What a line of metrics.jsonl says of a pre-training's health; none of them is a term of the loss."""

VIEWS = ("intra", "inter")
COLLAPSED_RANK, COLLAPSED_SPREAD = 1.5, 0.01
PATIENCE, LONG_PATIENCE = 200, 1000
"""Optimizer steps after the warm-up before it is said that nothing was learned, and nothing but the mean spectrum: a
model that learns passes below both, and small sets and rates take their time."""


def contrast_accuracy(logits: Tensor, own: Tensor) -> Tensor:
    """Share of the clips whose own pair is the most similar of all, from :func:`fastsskd.losses.contrast_logits`."""
    return (logits.argmax(dim=1) == own).float().mean()


def contrast_chance(logits: Tensor) -> Tensor:
    """The accuracy of guessing: 1 / clips compared; those that another rank left out are ``-inf`` and do not count."""
    return 1.0 / logits[0].isfinite().sum().clamp(min=1).float()


def restore_baselines(
    target: Tensor, grid_size: tuple[int, int], weight: Tensor | None = None, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Formula 2's value for two predictions that have heard nothing of what is masked.

    Args:
        target, weight, mask: as for :func:`fastsskd.losses.restore`.
        grid_size: patches in time and in frequency.

    Returns:
        For each clip's own (weighted) mean at every pixel, which makes it the variance of the target; and for the mean
        of each mel bin over the other clips of this rank's batch, which is what positions alone can tell.
    """
    b, n, _ = target.shape
    target = target.float()
    weight = torch.ones(b, n, device=target.device) if weight is None else weight.float()
    # Sums over the 16 frames of each patch: whatever follows is sixteen times smaller than the spectrogram.
    if mask is None:
        counts = target.new_full((), PATCH).expand(b, n, PATCH)
    else:
        target = target * mask
        counts = mask.float().unflatten(-1, (PATCH, PATCH)).sum(dim=-2)
    sums = target.unflatten(-1, (PATCH, PATCH)).sum(dim=-2)
    squares = (weight * torch.linalg.vector_norm(target, dim=-1).square()).sum(dim=1)
    pixels = counts.sum(dim=(1, 2)).clamp(min=1.0)

    def mel_bins(of_patches: Tensor) -> Tensor:
        weighted = of_patches * weight.unsqueeze(-1)
        return weighted.unflatten(1, grid_size).sum(dim=1).flatten(1)

    sums, counts = mel_bins(sums), mel_bins(counts)  # (B, F)
    tiny = torch.finfo(torch.float32).tiny
    variance = squares - sums.sum(dim=1).square() / counts.sum(dim=1).clamp(min=tiny)
    others = (sums.sum(dim=0) - sums) / (counts.sum(dim=0) - counts).clamp(min=1e-6)
    positions = squares - 2.0 * (others * sums).sum(dim=1) + (others.square() * counts).sum(dim=1)
    return (variance / pixels).mean(), (positions / pixels).mean()


def effective_rank(features: Tensor) -> float:
    """Dimensions that features really use: e to the entropy of their normalised singular values, mean taken off.

    Roy and Vetterli, "The effective rank", 2007. It is at most ``min(B - 1, D)``, and 0 when all rows are equal.

    Args:
        features: ``(B, D)``. Reading the result waits for the device.
    """
    centred = features.double() - features.double().mean(dim=0)
    values = torch.linalg.svdvals(centred)
    if not bool(values.isfinite().all()) or float(values.sum()) == 0.0:
        return 0.0
    share = values / values.sum()
    return float(torch.special.entr(share).sum().exp())


def of_features(pooled: Tensor | None) -> dict[str, float]:
    """Health of the clips' features over the batch of all ranks; every rank calls it at once, between two steps.

    Args:
        pooled: ``(B, D)``, this rank's AVG-pooled raw features of the last step; None if it had none.

    Returns:
        ``effective_rank`` and its largest possible value ``rank_limit``; ``feature_spread``, the clips' standard
        deviation as a share of the features' size (root mean squares). Nothing for fewer than two clips.
    """
    ranks = distributed.gather_objects(None if pooled is None else pooled.float().cpu())
    clips = [features for features in ranks if features is not None]
    features = torch.cat(clips) if clips else torch.zeros(0, 1)
    if len(features) < 2 or not bool(features.isfinite().all()):
        return {}
    spread = features.var(dim=0, unbiased=False).mean() / features.square().mean().clamp(min=1e-30)
    return {
        "effective_rank": effective_rank(features),
        "rank_limit": float(min(len(features) - 1, features.shape[1])),
        "feature_spread": math.sqrt(float(spread)),
    }


def with_shares(metrics: dict[str, float]) -> dict[str, float]:
    """``metrics`` with the baselines of the reconstruction turned into shares of the variance.

    ``explained_VIEW`` is ``1 - restore / variance``: 0 is as good as each clip's mean, 1 is perfect. ``positions_VIEW``
    is what a model explains that knows where a patch is, and has heard nothing.
    """
    shares = {name: value for name, value in metrics.items() if not name.startswith(("variance_", "positions_"))}
    for view in VIEWS:
        variance = metrics.get(f"variance_{view}", 0.0)
        if variance > 0.0:
            shares[f"explained_{view}"] = 1.0 - metrics[f"restore_{view}"] / variance
            shares[f"positions_{view}"] = 1.0 - metrics[f"positions_{view}"] / variance
    return shares


def problems(line: dict[str, Any], warmup_steps: int) -> dict[str, str]:
    """What is wrong in one line of a Multi-SSL stage's metrics.

    Returns:
        A sentence for each problem, by a name that stays the same while the problem lasts.
    """
    found, step = {}, line["step"]
    rank, limit, spread = (line.get(name) for name in ("effective_rank", "rank_limit", "feature_spread"))
    if rank is not None and limit >= 4:
        if spread < COLLAPSED_SPREAD:
            found["collapse"] = f"features collapse: all clips get the same ones but for {100 * spread:.2g} %"
        elif rank < COLLAPSED_RANK:
            found["collapse"] = f"features collapse: effective rank {rank:.1f} of {limit:.0f}"
    if step < warmup_steps + PATIENCE:
        return found
    for view in VIEWS:
        explained, positions = line.get(f"explained_{view}"), line.get(f"positions_{view}")
        if explained is not None and explained <= 0.0:
            found[f"explained_{view}"] = (
                f"reconstruction of the {view} view no better than each clip's mean after {step} steps "
                f"({100 * explained:.0f} % of the variance explained)"
            )
        elif explained is not None and explained <= positions and step >= warmup_steps + LONG_PATIENCE:
            found[f"explained_{view}"] = (
                f"reconstruction of the {view} view no better than the mean spectrum after {step} steps "
                f"({100 * explained:.0f} % of the variance explained, {100 * positions:.0f} % by positions alone)"
            )
        accuracy, chance = line.get(f"contrast_accuracy_{view}"), line.get("contrast_chance", 1.0)
        if accuracy is not None and chance <= 0.25 and accuracy < 1.5 * chance:
            found[f"contrast_{view}"] = (
                f"contrast of the {view} view at chance after {step} steps: {100 * accuracy:.0f} % of the clips find "
                f"their own pair, {100 * chance:.0f} % by guessing"
            )
    return found


class Watch:
    """Says each problem of a stage once, when it has lasted for two lines; again only after it was gone."""

    def __init__(self):
        self._lasted: dict[str, int] = {}

    def see(self, line: dict[str, Any], warmup_steps: int) -> list[str]:
        """The sentences that are new with this line."""
        found = problems(line, warmup_steps)
        self._lasted = {name: self._lasted.get(name, 0) + 1 for name in found}
        return [text for name, text in found.items() if self._lasted[name] == 2]
