"""Score a manifest with one model or the mean of several: each clip exactly once, whatever the number of ranks."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastsskd import distributed
from fastsskd.datasets import refuse_unlabelled
from fastsskd.errors import InputError
from fastsskd.loader import Loader, open_manifest
from fastsskd.manifest import Manifest
from fastsskd.metrics import classification_metrics
from fastsskd.model import ACM
from fastsskd.weights import ModelInfo, load_model


@dataclass(frozen=True)
class Scores:
    """Class probabilities ``(n, C)`` of the clips that could be read, their rows in the manifest; why not the rest."""

    probs: np.ndarray
    index: np.ndarray
    skipped: dict[str, str]


@torch.no_grad()
def score(model: Callable[[Tensor], tuple[Tensor, Tensor]], loader: Loader, multi_label: bool) -> Scores:
    """Class probabilities of every clip of ``loader``, gathered over ranks, in the manifest's order."""
    probs, index = [], []
    for batch in loader:
        logits, _ = model(batch.fbank)
        logits = logits.float()
        probs.append((logits.sigmoid() if multi_label else logits.softmax(dim=-1)).cpu().numpy())
        index.append(batch.index.numpy())
    own = (np.concatenate(probs), np.concatenate(index), loader.skipped)
    ranks = distributed.gather_objects(own)
    probs, index = np.concatenate([r[0] for r in ranks]), np.concatenate([r[1] for r in ranks])
    order = np.argsort(index)
    return Scores(probs[order], index[order], {key: why for r in ranks for key, why in r[2].items()})


def evaluation_loader(manifest: Manifest, info: ModelInfo, batch_size: int, **options: Any) -> Loader:
    """A loader over ``manifest`` with the model's own clip length and normalisation, shared out over the ranks."""
    return Loader(
        manifest,
        batch_size=batch_size,
        seconds=info.seconds,
        train=False,
        rank=distributed.rank(),
        world_size=distributed.world_size(),
        mean=info.mean,
        std=info.std,
        **options,
    )


def mean_scores(
    models: Iterable[tuple[Callable[[Tensor], tuple[Tensor, Tensor]], ModelInfo]],
    manifest: Manifest,
    batch_size: int,
    **options: Any,
) -> Scores:
    """The mean of the models' class probabilities, one model at a time; ``options`` are the loader's."""
    probs = []
    for model, info in models:
        loader = evaluation_loader(manifest, info, batch_size, **options)
        scores = score(model, loader, info.multi_label)
        loader.close()
        probs.append(scores.probs)
    return replace(scores, probs=sum(probs) / len(probs))


def evaluate(
    checkpoints: Sequence[str | Path], source: Any, *, batch_size: int = 32, device: str = "cpu", workers: int = 0
) -> dict[str, Any]:
    """Metrics of one checkpoint, or of the mean of several checkpoints' class probabilities (as in AST).

    Args:
        checkpoints: model files or their folders.
        source: a manifest, its file, or a folder that can be indexed.

    Returns:
        :func:`~fastsskd.metrics.classification_metrics`, plus ``checkpoints`` and ``skipped``.

    Raises:
        InputError: checkpoints that do not go together, labels missing, or other classes than the model's.
    """
    manifest = open_manifest(source)
    models = _load_all(checkpoints, manifest, device)
    scores = mean_scores(models, manifest, batch_size, device=device, workers=workers)
    return {
        **summarise(scores.probs, scores, manifest),
        "checkpoints": [str(path) for path in checkpoints],
        "skipped": scores.skipped,
    }


def summarise(probs: np.ndarray, scores: Scores, manifest: Manifest) -> dict[str, Any]:
    """Metrics of class probabilities ``probs`` for the rows of ``scores``."""
    if not len(probs):
        key, reason = next(iter(scores.skipped.items()), ("", "the manifest is empty"))
        raise InputError(f"no clip of the evaluation set could be read (first: {key}: {reason})")
    return classification_metrics(probs, manifest.label_of(scores.index), manifest.classes)


def _load_all(checkpoints: Sequence[str | Path], manifest: Manifest, device: str) -> Iterator[tuple[ACM, ModelInfo]]:
    """The checkpoints' models, one after the other, each checked against the first one and the manifest."""
    first = None
    for path in checkpoints:
        model, info = load_model(path, device)
        first = first or info
        _check_fits(path, info, first, manifest)
        yield model, info


def _check_fits(path: str | Path, info: ModelInfo, first: ModelInfo, manifest: Manifest) -> None:
    if not info.classes:
        raise InputError(f"checkpoint {path}: has no class head; evaluate a model from a distill stage")
    if tuple(info.classes) != tuple(first.classes) or info.multi_label != first.multi_label:
        raise InputError(f"checkpoint {path}: other classes than the first checkpoint; an ensemble needs the same ones")
    if not manifest.classes:
        raise InputError("the manifest has no labels, so there is nothing to compare with; see `fastsskd index --help`")
    if tuple(manifest.classes) != tuple(info.classes):
        raise InputError(
            f"checkpoint {path}: knows {len(info.classes)} classes ({', '.join(info.classes[:3])}, ...), the manifest "
            f"has {len(manifest.classes)} ({', '.join(manifest.classes[:3])}, ...); evaluate on the same classes"
        )
    refuse_unlabelled(manifest, str(manifest.root), "evaluation")


def table(metrics: dict[str, Any]) -> str:
    """A table for people: the totals, then one line a class."""
    lines = []
    for name in ("accuracy", "top5", "mAP", "AUC", "d_prime"):
        if metrics[name] is not None:
            lines.append(f"{name:<10} {metrics[name]:.4f}")
    lines.append(
        f"on {metrics['num_clips']} clips, {metrics['num_classes']} classes; {len(metrics['skipped'])} left out"
    )
    width = max(len(name) for name in metrics["per_class"])
    lines.append(f"{'class':<{width}}  clips      AP     AUC  accuracy")
    for name, row in metrics["per_class"].items():
        numbers = [_number(row.get(column)) for column in ("AP", "AUC", "accuracy")]
        lines.append(f"{name:<{width}}  {row['num_clips']:>5}  {numbers[0]:>6}  {numbers[1]:>6}  {numbers[2]:>8}")
    return "\n".join(lines)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def to_json(metrics: dict[str, Any]) -> str:
    return json.dumps(metrics, indent=1)
