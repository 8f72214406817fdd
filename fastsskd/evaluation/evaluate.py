"""Score a manifest with one model or the mean of several: each clip exactly once, whatever the number of ranks."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastsskd import distributed
from fastsskd.datasets import refuse_unlabelled
from fastsskd.errors import InputError
from fastsskd.evaluation.clip_lengths import longer_than
from fastsskd.evaluation.confusion import confusion_matrix, most_confused
from fastsskd.evaluation.intervals import bootstrap
from fastsskd.evaluation.metrics import classification_metrics
from fastsskd.evaluation.score_file import ClipScores
from fastsskd.loader import Loader, open_manifest
from fastsskd.manifest import Manifest
from fastsskd.model import ACM
from fastsskd.weights import ModelInfo, fresh_model, load_model, model_file, read_model_file

Model = Callable[[Tensor], tuple[Tensor, Tensor]]
"""``(B, T, F)`` spectrograms -> logits ``(B, C)`` and clip features."""


@dataclass(frozen=True)
class Scores:
    """Class probabilities of the clips that could be read.

    Attributes:
        probs: ``(n, C)``.
        index: ``(n,)`` the clips' rows in the manifest.
        skipped: why not the rest, by key.
        crops: ``(n,)`` of each clip, how many were heard; None = one.
    """

    probs: np.ndarray
    index: np.ndarray
    skipped: dict[str, str]
    crops: np.ndarray | None = None


@dataclass(frozen=True)
class Rated:
    """Metrics, and the scores of the clips they are of."""

    metrics: dict[str, Any]
    clips: ClipScores


@torch.no_grad()
def score(model: Model, loader: Loader, multi_label: bool) -> Scores:
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
    models: Iterable[tuple[Model, ModelInfo]],
    manifest: Manifest,
    batch_size: int,
    *,
    crops: int = 1,
    **options: Any,
) -> Scores:
    """The mean of the models' class probabilities, one model at a time; ``options`` are the loader's.

    Args:
        crops: of each clip that is longer than the model's length, see :func:`crop_scores`.
    """
    found = [crop_scores(model, info, manifest, batch_size, crops, **options) for model, info in models]
    scores = _mean(found, np.full(len(manifest), len(found)))
    if crops == 1:
        return scores
    most = np.ones(len(manifest), np.int64)  # models that hear longer clips may have heard fewer
    for own in found:
        most[own.index] = np.maximum(most[own.index], own.crops)
    return replace(scores, crops=most[scores.index])


def crop_scores(
    model: Model, info: ModelInfo, manifest: Manifest, batch_size: int, crops: int = 1, **options: Any
) -> Scores:
    """The mean of a model's class probabilities over evenly spaced crops of each clip.

    The first crop begins with the clip and the last ends with it; one crop is the beginning. A clip that is no longer
    than the model's length is looped, and heard once: its crops would all hold the same.
    """

    def one(which: np.ndarray, start: float) -> Scores:
        loader = evaluation_loader(manifest.select(which), info, batch_size, start=start, **options)
        with contextlib.closing(loader):
            scores = score(model, loader, info.multi_label)
        return replace(scores, index=which[scores.index])

    found, times = [one(np.arange(len(manifest)), 0.0)], np.ones(len(manifest), np.int64)
    long = longer_than(manifest, info.seconds, workers=options.get("workers")) if crops > 1 else np.zeros(0, bool)
    if long.any():
        found += [one(np.flatnonzero(long), k / (crops - 1)) for k in range(1, crops)]
        times[long] = crops
    scores = _mean(found, times)
    return replace(scores, crops=times[scores.index])


def _mean(found: Sequence[Scores], times: np.ndarray) -> Scores:
    """The mean of the scores of each clip that was heard as often as ``times`` (n,) says.

    A clip whose damage was met by some of the crops or models only is left out whole.
    """
    if len(found) == 1:
        return found[0]
    total = np.zeros((len(times), found[0].probs.shape[1]), np.float32)
    heard = np.zeros(len(times), np.int64)
    for scores in found:
        total[scores.index] += scores.probs
        heard[scores.index] += 1
    index = np.flatnonzero(heard == times)
    skipped = {key: why for scores in found for key, why in scores.skipped.items()}
    return Scores(total[index] / times[index, None].astype(np.float32), index, skipped)


def evaluate(checkpoints: Sequence[str | Path], source: Any, **options: Any) -> dict[str, Any]:
    """The metrics of :func:`rate`."""
    return rate(checkpoints, source, **options).metrics


def rate(
    checkpoints: Sequence[str | Path],
    source: Any,
    *,
    batch_size: int = 32,
    device: str = "cpu",
    workers: int = 0,
    crops: int = 1,
    average: bool = False,
    resamples: int = 0,
) -> Rated:
    """Metrics of one checkpoint, or of the mean of several checkpoints' class probabilities (as in AST).

    Args:
        checkpoints: model files or their folders.
        source: a manifest, its file, or a folder that can be indexed.
        crops: of each clip that is longer than the model's length, see :func:`crop_scores`.
        average: the mean of the checkpoints' weights, as one model, instead of the mean of their probabilities.
        resamples: of :func:`~fastsskd.evaluation.intervals.bootstrap`; 0 = no intervals.

    Returns:
        The clips' scores, and :func:`~fastsskd.evaluation.metrics.classification_metrics` plus ``interval``,
        ``confused`` (the pairs of classes that are, for single labels), ``checkpoints``, ``average_weights``,
        ``crops``, ``heard_once`` (the clips that were too short for several crops) and ``skipped``.

    Raises:
        InputError: checkpoints that do not go together, labels missing, or other classes than the model's.
    """
    manifest = open_manifest(source)
    models = (_load_averaged if average else _load_all)(checkpoints, manifest, device)
    scores = mean_scores(models, manifest, batch_size, crops=crops, device=device, workers=workers)
    metrics = summarise(scores.probs, scores, manifest)
    clips = clip_scores(scores, manifest)
    metrics["interval"] = bootstrap(clips.probs, clips.label, resamples=resamples) if resamples else None
    metrics["confused"] = None
    if clips.label.ndim == 1:
        metrics["confused"] = most_confused(confusion_matrix(clips.probs, clips.label), clips.classes)
    metrics |= {"checkpoints": [str(path) for path in checkpoints], "average_weights": average, "crops": crops}
    metrics["heard_once"] = int((scores.crops == 1).sum()) if crops > 1 else None
    return Rated({**metrics, "skipped": scores.skipped}, clips)


def summarise(probs: np.ndarray, scores: Scores, manifest: Manifest) -> dict[str, Any]:
    """Metrics of class probabilities ``probs`` for the rows of ``scores``."""
    if not len(probs):
        key, reason = next(iter(scores.skipped.items()), ("", "the manifest is empty"))
        raise InputError(f"no clip of the evaluation set could be read (first: {key}: {reason})")
    return classification_metrics(probs, manifest.label_of(scores.index), manifest.classes)


def clip_scores(scores: Scores, manifest: Manifest) -> ClipScores:
    """The scores with the clips' names and labels."""
    keys = np.array([manifest.key(i) for i in scores.index], str)
    return ClipScores(keys, manifest.label_of(scores.index), scores.probs, manifest.classes)


def _load_all(checkpoints: Sequence[str | Path], manifest: Manifest, device: str) -> Iterator[tuple[ACM, ModelInfo]]:
    """The checkpoints' models, one after the other, each checked against the first one and the manifest."""
    first = None
    for path in checkpoints:
        model, info = load_model(path, device)
        first = first or info
        _check_fits(path, info, first, manifest)
        yield model, info


def _load_averaged(checkpoints: Sequence[str | Path], manifest: Manifest, device: str) -> list[tuple[ACM, ModelInfo]]:
    """One model, whose weights are the mean of the checkpoints'."""
    first, total = None, {}
    for path in checkpoints:
        state, info = read_model_file(model_file(path))
        first = first or info
        _check_fits(path, info, first, manifest)
        for name, value in asdict(first).items():
            if getattr(info, name) != value:
                raise InputError(
                    f"checkpoint {path}: {name} {getattr(info, name)}, the first has {value}; weights can only be "
                    "averaged over models of one kind: leave out --average for the mean of their probabilities"
                )
        total = {name: total[name] + value for name, value in state.items()} if total else state
    model = fresh_model(first)
    model.load_state_dict({name: value / len(checkpoints) for name, value in total.items()})
    return [(model.to(device).eval(), first)]


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
