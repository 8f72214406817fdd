"""The paper's losses, one formula a function. The number in each docstring is the paper's.

All take and return float32 whatever the model's precision; a mean is over everything the formula averages.
"""

from __future__ import annotations

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


def contrast(pred: Tensor, raw: Tensor, temperature: float, slots: int | None = None) -> Tensor:
    """Formula 8, its minus sign restored: InfoNCE on cosine similarity, over the global batch.

    ``-mean_b log( exp(C(pred_b, raw_b)/tau) / sum_k exp(C(pred_b, raw_k)/tau) )``, k over every rank's clips. The mean
    is over this rank's clips; ranks are averaged with their gradients. Arguments as for :func:`contrast_logits`.
    """
    return info_nce(*contrast_logits(pred, raw, temperature, slots))


def contrast_logits(pred: Tensor, raw: Tensor, temperature: float, slots: int | None = None) -> tuple[Tensor, Tensor]:
    """``C(pred_b, raw_k) / tau`` of this rank's clips with every rank's.

    Args:
        pred, raw: ``(B, D)`` AVG-pooled features.
        temperature: tau.
        slots: the largest B of any rank, needed with several ranks because a rank that left out a bad clip has fewer.

    Returns:
        ``(B, W * slots)``, ``-inf`` where a rank has no clip; and ``(B,)``, the column of each clip's own pair.
    """
    pred = F.normalize(pred.float(), dim=-1)
    keys, offset, valid = gather_keys(F.normalize(raw.float(), dim=-1), slots)
    logits = pred @ keys.T / temperature
    if valid is not None:
        logits = logits.masked_fill(~valid, float("-inf"))
    return logits, torch.arange(pred.shape[0], device=pred.device) + offset


def info_nce(logits: Tensor, own: Tensor) -> Tensor:
    """Formula 8's logarithm, mean over this rank's clips."""
    return F.cross_entropy(logits, own)


def gather_keys(keys: Tensor, slots: int | None) -> tuple[Tensor, int, Tensor | None]:
    """Every rank's keys with gradients, where ours begin, and which rows are real.

    Returns:
        ``(W * slots, D)``, the offset of this rank's rows, and ``(W * slots,)`` bool (None with one rank).
    """
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return keys, 0, None
    from torch.distributed.nn.functional import all_gather

    slots = keys.shape[0] if slots is None else slots
    # One collective: validity travels as one more column.
    flagged = F.pad(keys, (0, 1), value=1.0)
    flagged = F.pad(flagged, (0, 0, 0, slots - keys.shape[0]))
    gathered = torch.cat(all_gather(flagged))
    return gathered[:, :-1], dist.get_rank() * slots, gathered[:, -1] > 0.5


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
