"""The paper's losses, one formula a function. The number in each docstring is the paper's.

All take and return float32 whatever the model's precision; a mean is over everything the formula averages.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor


def restore(pred: Tensor, target: Tensor, weight: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
    """Formula 2: HOG-weighted squared error between predicted and true pixels.

    ``mean_{b,n,p} w[b,n] (pred[b,n,p] - target[b,n,p])^2``.

    Args:
        pred, target: ``(B, N, P)`` pixels of the patches.
        weight: ``(B, N)`` HOG weights, or None for the plain squared error (Tables 1 and 4).
        mask: ``(B, N, P)`` bool: average over each clip's masked pixels only (option; the paper averages over all).
    """
    error = (pred.float() - target.float()).square()
    if weight is not None:
        error = error * weight.float().unsqueeze(-1)
    if mask is None:
        return error.mean()
    mask = mask.to(error.dtype)
    # Clip by clip, so that the mean over a global batch does not depend on which rank holds which clip.
    return ((error * mask).sum(dim=(1, 2)) / mask.sum(dim=(1, 2)).clamp(min=1.0)).mean()


def feature_mse(pred: Tensor, raw: Tensor) -> Tensor:
    """Formula 4: mean squared error between a view's features and the raw view's, ``(B, N, D)`` each."""
    return F.mse_loss(pred.float(), raw.float())


def feature_kl(pred: Tensor, raw: Tensor) -> Tensor:
    """Formula 5, its log restored: ``KL(softmax(f_raw) || softmax(f_pre))`` over D, mean over clips and tokens."""
    log_raw = F.log_softmax(raw.float(), dim=-1)
    log_pred = F.log_softmax(pred.float(), dim=-1)
    return (log_raw.exp() * (log_raw - log_pred)).sum(dim=-1).mean()


class Keys(NamedTuple):
    """What a micro-batch's clips are told apart from: the raw features of the global batch.

    Attributes:
        rows: ``(K, D)``, normalised.
        first: the row of this micro-batch's first clip.
        valid: ``(K,)`` bool, False where a rank has no clip; None if every row is one.
    """

    rows: Tensor
    first: int
    valid: Tensor | None


def contrast(pred: Tensor, raw: Tensor, temperature: float, slots: int | None = None) -> Tensor:
    """Formula 8, its minus sign restored: InfoNCE on cosine similarity, over the global batch.

    ``-mean_b log( exp(C(pred_b, raw_b)/tau) / sum_k exp(C(pred_b, raw_k)/tau) )``, k over every rank's clips. The mean
    is over this rank's clips; ranks are averaged with their gradients.

    Args:
        pred, raw: ``(B, D)`` AVG-pooled features.
        temperature: tau.
        slots: see :func:`gather_keys`.
    """
    return info_nce(*contrast_logits(pred, gather_keys([raw], slots)[0], temperature))


def contrast_logits(pred: Tensor, keys: Keys, temperature: float, clips: int | None = None) -> tuple[Tensor, Tensor]:
    """``C(pred_b, raw_k) / tau`` of ``(B, D)`` AVG-pooled features with the global batch's.

    Args:
        clips: how many clips the B rows are of, if they are several rounds of the same ones.

    Returns:
        ``(B, K)``, ``-inf`` where a rank has no clip; and ``(B,)``, the column of each clip's own pair.
    """
    logits = F.normalize(pred.float(), dim=-1) @ keys.rows.T / temperature
    if keys.valid is not None:
        logits = logits.masked_fill(~keys.valid, float("-inf"))
    own = torch.arange(pred.shape[0], device=pred.device)
    return logits, (own if clips is None else own % clips) + keys.first


def info_nce(logits: Tensor, own: Tensor) -> Tensor:
    """Formula 8's logarithm, mean over this rank's clips."""
    return F.cross_entropy(logits, own)


def gather_keys(raw: Sequence[Tensor], slots: int | None) -> list[Keys]:
    """The keys of each of a step's micro-batches: all of them, of all ranks, with gradients.

    Args:
        raw: ``(B, D)`` AVG-pooled raw features of each micro-batch; as many of them on every rank.
        slots: the largest B of any rank, needed with several ranks because a rank that left out a bad clip has fewer.
    """
    parts = [F.normalize(own.float(), dim=-1) for own in raw]
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        rows, first = torch.cat(parts), 0
        found = []
        for own in parts:
            found.append(Keys(rows, first, None))
            first += len(own)
        return found
    from torch.distributed.nn.functional import all_gather

    slots = max(len(own) for own in parts) if slots is None else slots
    # One collective: validity travels as one more column.
    flagged = [F.pad(own, (0, 1), value=1.0) for own in parts]
    gathered = torch.cat(all_gather(torch.cat([F.pad(own, (0, 0, 0, slots - len(own))) for own in flagged])))
    rows, valid, first = gathered[:, :-1], gathered[:, -1] > 0.5, dist.get_rank() * len(parts) * slots
    return [Keys(rows, first + number * slots, valid) for number in range(len(parts))]


def label_cross_entropy(logits: Tensor, target: Tensor, multi_label: bool) -> Tensor:
    """Formula 11 on class scores: cross entropy, or binary cross entropy per class for multi-label sets.

    Args:
        logits: ``(B, C)`` of the student.
        target: ``(B, C)`` probabilities: one-hot, smoothed or mixed labels, or a teacher's class output.
    """
    if multi_label:
        return F.binary_cross_entropy_with_logits(logits.float(), target.float())
    return F.cross_entropy(logits.float(), target.float())


def regression(student: Tensor, teacher: Tensor) -> Tensor:
    """Formula 12: mean squared error between the student's and the teacher's clip features, ``(B, D)`` each."""
    return F.mse_loss(student.float(), teacher.float())
