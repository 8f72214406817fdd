"""Which clips train and which evaluate."""

from collections.abc import Sequence

import numpy as np

from fastsskd.clip_table import SPLIT_EVAL, SPLIT_TRAIN, Manifest
from fastsskd.errors import InputError, UsageError


def split(
    manifest: Manifest,
    *,
    train_folds: Sequence[int] = (),
    eval_folds: Sequence[int] = (),
    eval_share: float = 0.2,
    seed: int = 0,
) -> tuple[Manifest, Manifest]:
    """Training and evaluation views of one manifest; the first rule that applies decides.

    1. `train_folds` or `eval_folds` named: those (when only one is named, the other side gets the other folds).
    2. The manifest marks clips both for train and for eval: those marks; clips with neither are left out.
    3. It has more than one fold: evaluate on the highest, train on the others.
    4. A random share `eval_share` of each class, from `seed`; unlabelled clips of a labelled set all train.

    Clips marked bad are in neither view; both views' `left_out` says how many there were.

    Raises:
        UsageError: `eval_share` outside (0, 1), or a fold named for both sides.
        InputError: nothing to split, an unknown fold, one class only, or an empty side.
    """
    if not 0.0 < eval_share < 1.0:
        raise UsageError(f"eval_share = {eval_share}: must lie between 0 and 1, both excluded")
    left_out = int((~manifest.good).sum())
    good = manifest.select(manifest.good) if left_out else manifest
    _refuse_too_little(good, left_out)
    is_train, is_eval = _sides(good, tuple(train_folds), tuple(eval_folds), eval_share, seed)
    for name, chosen in (("training", is_train), ("evaluation", is_eval)):
        if not chosen.any():
            raise InputError(
                f"{manifest.root}: no clip is left for {name} ({len(good)} good clips): add clips or choose other folds"
            )
    train, evaluation = (good.replace(left_out=left_out).select(chosen) for chosen in (is_train, is_eval))
    _refuse_one_class(train, "in training")
    return train, evaluation


def _sides(good: Manifest, train_folds, eval_folds, eval_share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Masks (n,) of the two sides."""
    folds = good.folds
    present = np.unique(folds)
    if train_folds or eval_folds:
        return _named_folds(good, train_folds, eval_folds)
    marked_train, marked_eval = good.splits == SPLIT_TRAIN, good.splits == SPLIT_EVAL
    if marked_train.any() and marked_eval.any():
        return marked_train, marked_eval
    if len(present) > 1:
        return folds != present[-1], folds == present[-1]
    is_eval = _share_per_class(good, eval_share, seed)
    return ~is_eval, is_eval


def _named_folds(good: Manifest, train_folds, eval_folds) -> tuple[np.ndarray, np.ndarray]:
    both = set(train_folds) & set(eval_folds)
    if both:
        raise UsageError(f"fold {min(both)} is named for training and for evaluation: name it once")
    present = sorted(set(np.unique(good.folds).tolist()))
    unknown = sorted((set(train_folds) | set(eval_folds)) - set(present))
    if unknown:
        raise InputError(f"{good.root}: has no clip in fold {unknown[0]}: its folds are {', '.join(map(str, present))}")
    is_train, is_eval = np.isin(good.folds, train_folds), np.isin(good.folds, eval_folds)
    return (is_train if train_folds else ~is_eval), (is_eval if eval_folds else ~is_train)


def _share_per_class(good: Manifest, share: float, seed: int) -> np.ndarray:
    """(n,) bool, True = evaluation: a share of each class (of a clip's first label), at least one clip a side."""
    first_label = good.first_labels()
    order = np.lexsort((np.random.default_rng(seed).random(len(good)), first_label))
    names, starts, counts = np.unique(first_label[order], return_index=True, return_counts=True)
    num_eval = np.clip(np.rint(counts * share), 1, np.maximum(counts - 1, 0)).astype(np.int64)
    if good.classes:
        num_eval[names == -1] = 0  # an unlabelled clip cannot be scored
    rank_in_class = np.arange(len(good)) - np.repeat(starts, counts)
    is_eval = np.empty(len(good), bool)
    is_eval[order] = rank_in_class < np.repeat(num_eval, counts)
    return is_eval


def _refuse_too_little(good: Manifest, left_out: int) -> None:
    if not len(good):
        why = f"all {left_out} clips are marked bad" if left_out else "it lists no clip"
        raise InputError(f"{good.root}: nothing to train on, {why}: check the data set with `fastsskd check`")
    _refuse_one_class(good, "in the data set")


def _refuse_one_class(manifest: Manifest, where: str) -> None:
    if not manifest.classes:
        return
    used = np.flatnonzero(manifest.class_counts())
    if len(used) < 2:
        found = f"one class only ({manifest.classes[used[0]]!r})" if len(used) else "no labelled clip"
        raise InputError(
            f"{manifest.root}: {found} {where}: give clips of at least two classes, or put them in one folder "
            "without class folders to train without labels"
        )
