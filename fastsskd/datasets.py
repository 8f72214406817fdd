"""The sets of clips a configuration names, checked before anything is trained."""

from __future__ import annotations

import sys
from dataclasses import dataclass

import numpy as np

from fastsskd import distributed
from fastsskd.config import Config
from fastsskd.errors import InputError
from fastsskd.loader import open_manifest
from fastsskd.manifest import Manifest, keep_existing, split


@dataclass(frozen=True)
class DataSets:
    """Clips for Multi-SSL, for the labelled stages, and for evaluation."""

    ssl: Manifest
    train: Manifest
    evaluation: Manifest


def open_data(config: Config, total_batch: int) -> DataSets:
    """Open, split and draw the sets.

    Args:
        total_batch: clips of one optimizer step, which every training set must have.

    Raises:
        InputError: no data, one class only, no labels where a stage needs them, classes that differ between training
            and evaluation, or fewer training clips than one batch.
    """
    data, labelled = config.data, "distill" in config.recipe.stages
    if not data.manifest:
        raise InputError("data.manifest is not set; see `fastsskd index --help`, then --set data.manifest=M")
    train, evaluation = _train_and_evaluation(config)
    ssl = _open(data.ssl_manifest) if data.ssl_manifest else train
    train = draw(train, data.max_train, config.run.seed)
    evaluation = draw(evaluation, data.max_eval, config.run.seed)
    if labelled:
        _check_labels(train, data.manifest)
        refuse_unlabelled(evaluation, data.eval_manifest or data.manifest, "evaluation")
    for name, clips, used in (
        (data.ssl_manifest or data.manifest, ssl, "ssl" in config.recipe.stages),
        (data.manifest, train, labelled),
    ):
        if used and len(clips) < total_batch:
            raise InputError(
                f"{name}: {len(clips)} training clips are fewer than one batch of {total_batch}; "
                "lower train_batch_size in the ds_config"
            )
    return DataSets(ssl, train, evaluation)


def _train_and_evaluation(config: Config) -> tuple[Manifest, Manifest]:
    data = config.data
    whole = _open(data.manifest)
    if not data.eval_manifest:
        return split(
            whole,
            train_folds=data.train_folds,
            eval_folds=data.eval_folds,
            eval_share=data.eval_share,
            seed=config.run.seed,
        )
    return whole, _open(data.eval_manifest).with_classes(whole.classes)


def _open(source: str) -> Manifest:
    """A manifest with at least one of its files there.

    Files that are absent stay in it: the loader leaves them out by name, and a file that vanishes or returns between a
    run and its resume does not change the order of the others.
    """
    clips = open_manifest(source)
    absent = len(clips) - len(keep_existing(clips))
    if absent and distributed.rank() == 0:
        print(f"{source}: {absent} of {len(clips)} files are not there and will be left out", file=sys.stderr)
    return clips


def draw(clips: Manifest, most: int, seed: int) -> Manifest:
    """A random ``most`` of the clips, in the manifest's order; all for 0."""
    if not most or most >= len(clips):
        return clips
    return clips.select(np.sort(np.random.default_rng((seed, len(clips))).permutation(len(clips))[:most]))


def _check_labels(train: Manifest, name: str) -> None:
    if not train.classes:
        raise InputError(f"{name}: has no labels, which the distill stage needs; set recipe.stages = ['ssl']")
    if train.multi_label:
        return
    refuse_unlabelled(train, name, "training")
    if len(np.unique(train.label_array())) < 2:
        raise InputError(f"{name}: all training clips are of one class; there is nothing to tell apart")


def refuse_unlabelled(clips: Manifest, name: str, side: str) -> None:
    """Single-label clips that have none can be neither learned nor rated (in a multi-label set, no label is an answer).

    Raises:
        InputError: there are some.
    """
    missing = 0 if clips.multi_label else int((clips.label_array() < 0).sum())
    if missing:
        raise InputError(f"{name}: {missing} {side} clips have no label; leave them out")
