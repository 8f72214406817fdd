"""The training and evaluation sets a configuration names, checked before anything is trained."""

from __future__ import annotations

import numpy as np

from fastsskd.config import Config
from fastsskd.errors import InputError
from fastsskd.loader import open_manifest
from fastsskd.manifest import Manifest, split


def open_data(config: Config, total_batch: int, *, needs_labels: bool) -> tuple[Manifest, Manifest]:
    """The training and evaluation sets.

    Raises:
        InputError: no data, one class only, no labels where a stage needs them, classes that differ between the two,
            or fewer training clips than one batch.
    """
    data = config.data
    if not data.manifest:
        raise InputError(
            "data.manifest is not set; make one with `fastsskd index SRC --out M` and --set data.manifest=M"
        )
    whole = open_manifest(data.manifest)
    if data.eval_manifest:
        train_set, eval_set = whole, open_manifest(data.eval_manifest)
        if tuple(train_set.classes) != tuple(eval_set.classes):
            raise InputError(f"{data.eval_manifest}: has other classes than {data.manifest}; index both the same way")
    else:
        train_set, eval_set = split(
            whole,
            train_folds=data.train_folds,
            eval_folds=data.eval_folds,
            eval_share=data.eval_share,
            seed=config.run.seed,
        )
    if needs_labels:
        _check_labels(train_set, data.manifest)
    if len(train_set) < total_batch:
        raise InputError(
            f"{data.manifest}: {len(train_set)} training clips are fewer than one batch of {total_batch}; "
            "lower train_batch_size in the ds_config"
        )
    return train_set, eval_set


def _check_labels(train_set: Manifest, name: str) -> None:
    if not train_set.classes:
        raise InputError(f"{name}: has no labels, which the distill stage needs; set recipe.stages = ['ssl']")
    if not train_set.multi_label:
        labels = train_set.label_array()
        if (labels < 0).any():
            raise InputError(
                f"{name}: {int((labels < 0).sum())} training clips have no label; index labelled clips only"
            )
        if len(np.unique(labels)) < 2:
            raise InputError(f"{name}: all training clips are of one class; there is nothing to tell apart")
