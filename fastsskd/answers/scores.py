"""A teacher's class probabilities in 16 bits: the likeliest few, or all.

Stored are log-odds, in which 16 bits hold what is likely and what is unlikely alike: a probability to about 1e-4, a
small one to half a per cent of itself. Classes beyond the first k share evenly what they have together, so that the sum
over all stays. Cross entropy is linear in the target: its error is how far those classes' logits of the student lie
from their mean, times probabilities that are next to nothing.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

_LEAST = 1e-13  # nearer to 0 or 1 nothing is stored; in float32 that is 1


def width(top_k: int, num_classes: int) -> int:
    """Numbers stored a crop: those of the k classes and the others' mean, or all."""
    return num_classes if top_k >= num_classes else top_k + 1


def encode(probs: Tensor, top_k: int) -> tuple[np.ndarray, np.ndarray | None]:
    """Probabilities as they are stored.

    Args:
        probs: ``(B, C)``.
        top_k: k, at least 1; from C on, all classes are stored.

    Returns:
        ``(B, k + 1)`` float16 log-odds, of the likeliest class first, of the mean of the others last, and ``(B, k)``
        int16 classes; or ``(B, C)`` float16 log-odds in the classes' order and None.
    """
    probs = probs.double()
    if top_k >= probs.shape[1]:
        return _log_odds(probs), None
    best, classes = probs.topk(top_k, dim=1)
    others = probs.scatter(1, classes, 0.0).sum(dim=1, keepdim=True) / (probs.shape[1] - top_k)
    return _log_odds(torch.cat([best, others], dim=1)), classes.cpu().numpy().astype(np.int16)


def decode(log_odds: np.ndarray, classes: np.ndarray | None, num_classes: int, multi_label: bool) -> Tensor:
    """``(B, num_classes)`` float32 probabilities from what :func:`encode` gave; a distribution unless multi-label."""
    probs = torch.from_numpy(log_odds).float().sigmoid()
    if classes is not None:
        others = probs[:, -1:].repeat(1, num_classes)
        probs = others.scatter_(1, torch.from_numpy(classes).long(), probs[:, :-1])
    return probs if multi_label else probs / probs.sum(dim=1, keepdim=True)


def _log_odds(probs: Tensor) -> np.ndarray:
    return torch.logit(probs, _LEAST).cpu().numpy().astype(np.float16)
