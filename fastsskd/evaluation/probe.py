"""What frozen features are good for: nearest neighbours and a linear map to the classes, against random weights.

The features are a model's AVG-pooled ones, of any stage; it needs no class head, and none is used.
"""

from __future__ import annotations

import contextlib
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from fastsskd.clip_table import Manifest
from fastsskd.datasets import refuse_unlabelled
from fastsskd.errors import InputError
from fastsskd.evaluation.evaluate import evaluation_loader
from fastsskd.evaluation.metrics import NAMES, classification_metrics
from fastsskd.health import effective_rank
from fastsskd.model import ACM, build_model
from fastsskd.split import split
from fastsskd.text_table import aligned
from fastsskd.weights import ModelInfo, load_model

STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
"""Of the linear probe: scikit-learn's C, the inverse of the L2 penalty, on standardised features."""
TEMPERATURE = 0.07
"""Of the neighbours' votes, as in DINO."""
_ROWS = 1024  # of similarities at a time
_MAX_ITERATIONS = 2000


@dataclass(frozen=True)
class Labelled:
    """Features ``x (n, D)``, labels ``y`` ``(n,)`` or ``(n, C)`` multi-hot, rows in the manifest; why not the rest."""

    x: np.ndarray
    y: np.ndarray
    index: np.ndarray
    skipped: dict[str, str]


def probe(
    checkpoint: str | Path,
    train: Manifest,
    test: Manifest,
    *,
    k: int = 20,
    seed: int = 0,
    batch_size: int = 32,
    device: str = "cpu",
    workers: int = 0,
) -> dict[str, Any]:
    """Rate a model's frozen features, and those of the same model with random weights.

    Args:
        checkpoint: a model file or its folder.
        train: clips that the neighbours and the linear map are from.
        test: clips they are rated on, of the same classes.
        k: neighbours that vote.
        seed: of the random weights, and of the split that the linear map's penalty is chosen on.

    Returns:
        ``trained`` and ``random``, for each: ``dim``, ``effective_rank`` and its largest possible value ``rank_limit``,
        ``std`` (mean over dimensions of the standard deviation over the test clips), ``knn`` and ``linear`` with the
        metrics, the latter with ``C``. ``num_train``, ``num_eval``, ``num_classes``, ``k``, ``checkpoint``,
        ``skipped``.

    Raises:
        InputError: no model of ours, labels missing, other classes in ``test``, or nothing that can be read.
    """
    for clips, side in ((train, "training"), (test, "evaluation")):
        if not clips.classes:
            raise InputError(f"{clips.root}: has no labels, so there is nothing to compare with; see `fastsskd index`")
        refuse_unlabelled(clips, str(clips.root), side)
    if test.classes != train.classes or test.multi_label != train.multi_label:
        raise InputError(
            f"{test.root}: other classes than those that are trained on, {', '.join(train.classes[:3])}, ..."
        )
    model, info = load_model(checkpoint, device)
    fresh = build_model(info.size, 0, seconds=info.seconds, attention=info.attention, seed=seed)
    options = {"batch_size": batch_size, "device": device, "workers": workers}
    found: dict[str, Any] = {"checkpoint": str(checkpoint)}
    for name, own in (("trained", model), ("random", fresh.to(device).eval())):
        sides = [clip_features(own, info, clips, **options) for clips in (train, test)]
        found[name] = rate(*sides, train, k=k, seed=seed)
        counts = {"num_train": len(sides[0].x), "num_eval": len(sides[1].x), "k": min(k, len(sides[0].x))}
        found |= {**counts, "skipped": {**sides[0].skipped, **sides[1].skipped}}
    return {**found, "num_classes": found["trained"]["knn"]["num_classes"]}


@torch.no_grad()
def clip_features(model: ACM, info: ModelInfo, clips: Manifest, batch_size: int, **options: Any) -> Labelled:
    """The features of each clip's beginning, in the manifest's order; ``options`` are the loader's."""
    values, index = [], []
    with contextlib.closing(evaluation_loader(clips, info, batch_size, **options)) as loader:
        for batch in loader:
            values.append(model(batch.fbank)[1].float().cpu().numpy())
            index.append(batch.index.numpy())
    if not sum(map(len, values)):
        key, reason = next(iter(loader.skipped.items()))
        raise InputError(f"{clips.root}: no clip could be read (first: {key}: {reason})")
    rows = np.concatenate(index)
    return Labelled(np.concatenate(values), clips.label_of(rows), rows, dict(loader.skipped))


def rate(train: Labelled, test: Labelled, clips: Manifest, *, k: int, seed: int) -> dict[str, Any]:
    """The numbers of one model's features; ``clips`` are those of ``train``."""
    classes = clips.classes
    held_out = _held_out(clips, seed)[train.index]
    strength = choose_strength(train.x, train.y, held_out, classes)
    probs = {
        "knn": neighbours(train.x, train.y, test.x, len(classes), k),
        "linear": linear(train.x, train.y, test.x, len(classes), strength),
    }
    found = {name: _numbers(own, test.y, classes) for name, own in probs.items()}
    found["linear"]["C"] = strength
    n, dim = test.x.shape
    return {
        "dim": dim,
        "effective_rank": effective_rank(torch.from_numpy(test.x)),
        "rank_limit": min(n - 1, dim),
        "std": float(test.x.std(axis=0).mean()),
        **found,
    }


def _numbers(probs: np.ndarray, labels: np.ndarray, classes: tuple[str, ...]) -> dict[str, Any]:
    metrics = classification_metrics(probs, labels, classes)
    return {name: metrics[name] for name in (*NAMES, "num_classes")}


def neighbours(x: np.ndarray, y: np.ndarray, test: np.ndarray, num_classes: int, k: int) -> np.ndarray:
    """Weighted nearest neighbours, as in DINO: the ``k`` most similar by cosine vote with ``exp(cosine / 0.07)``.

    Args:
        x, y: features ``(n, D)`` and labels, ``(n,)`` or ``(n, C)`` multi-hot, of the neighbours.
        test: ``(m, D)``.

    Returns:
        ``(m, C)``: of each class, the share of the votes that go to it.
    """
    target = np.eye(num_classes)[y] if y.ndim == 1 else y
    own, other = (value / np.maximum(np.linalg.norm(value, axis=1, keepdims=True), 1e-12) for value in (x, test))
    k, votes = min(k, len(x)), []
    for begin in range(0, len(other), _ROWS):
        similarity = other[begin : begin + _ROWS] @ own.T
        near = np.argsort(-similarity, axis=1, kind="stable")[:, :k]
        weight = np.exp(np.take_along_axis(similarity, near, axis=1) / TEMPERATURE)
        votes.append(np.einsum("mk,mkc->mc", weight / weight.sum(axis=1, keepdims=True), target[near]))
    return np.concatenate(votes)


def linear(x: np.ndarray, y: np.ndarray, test: np.ndarray, num_classes: int, strength: float) -> np.ndarray:
    """Logistic regression with an L2 penalty on standardised features: multinomial, or one a class for multi-hot ``y``.

    Args:
        x, y: features ``(n, D)`` and labels, ``(n,)`` or ``(n, C)`` multi-hot, that it is fitted to.
        test: ``(m, D)``.
        strength: scikit-learn's C.

    Returns:
        ``(m, C)`` probabilities; of a class that none or all of ``x`` have, 0 or 1.
    """
    scaler = StandardScaler().fit(x)
    x, test = scaler.transform(x), scaler.transform(test)
    if y.ndim == 1:
        return _logistic(x, y, test, num_classes, strength)
    columns = [_logistic(x, (column > 0.5).astype(np.int64), test, 2, strength)[:, 1] for column in y.T]
    return np.stack(columns, axis=1)


def _logistic(x: np.ndarray, y: np.ndarray, test: np.ndarray, num_classes: int, strength: float) -> np.ndarray:
    probs, there = np.zeros((len(test), num_classes)), np.unique(y)
    if len(there) == 1:
        probs[:, there] = 1.0
        return probs
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # nearly there is near enough to rate features
        fitted = LogisticRegression(C=strength, max_iter=_MAX_ITERATIONS).fit(x, y)
    probs[:, fitted.classes_] = fitted.predict_proba(test)
    return probs


def choose_strength(x: np.ndarray, y: np.ndarray, held_out: np.ndarray, classes: tuple[str, ...]) -> float:
    """The one of :data:`STRENGTHS` that is best on the rows ``held_out`` (n,) bool when fitted to the others.

    By accuracy, of multi-hot labels by mAP; of equal ones the strongest penalty. 1 where nothing is held out.
    """
    best, found = -1.0, 1.0
    for strength in STRENGTHS if held_out.any() else ():
        probs = linear(x[~held_out], y[~held_out], x[held_out], len(classes), strength)
        metrics = classification_metrics(probs, y[held_out], classes)
        value = metrics["accuracy"] if y.ndim == 1 else metrics["mAP"]
        if value is not None and value > best:
            best, found = value, strength
    return found


def _held_out(clips: Manifest, seed: int) -> np.ndarray:
    """``(n,)`` bool: the part of the training clips that the penalty is chosen on; a fold if there are, or a fifth."""
    try:
        _, held = split(clips, seed=seed)
    except InputError:  # too few
        return np.zeros(len(clips), bool)
    keys = {held.key(i) for i in range(len(held))}
    return np.array([clips.key(i) in keys for i in range(len(clips))])


def table(found: dict[str, Any]) -> str:
    """The numbers for people: a row for the model and one for random weights."""
    names = ("accuracy", "mAP") if found["trained"]["knn"]["accuracy"] is not None else ("mAP", "AUC")
    head = [f"{kind} {name}" for kind in ("kNN", "linear") for name in names]
    rows = [("features", *head, "effective rank", "std")]
    for name, label in (("trained", "of the checkpoint"), ("random", "random weights")):
        own = found[name]
        numbers = [_number(own[kind][metric]) for kind in ("knn", "linear") for metric in names]
        rank = f"{own['effective_rank']:.1f} of {own['rank_limit']}"
        rows.append((label, *numbers, rank, f"{own['std']:.4f}"))
    counts = f"{found['num_train']} clips to learn from, {found['num_eval']} to rate, {found['num_classes']} classes"
    dims = f"{found['trained']['dim']} dimensions, {found['k']} neighbours, C = {found['trained']['linear']['C']:g}"
    skipped = f"; {len(found['skipped'])} clip(s) left out" if found["skipped"] else ""
    return "\n".join([*aligned(rows), f"{counts}; {dims}{skipped}"])


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
