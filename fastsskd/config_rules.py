"""Settings that contradict each other; what a field allows by itself is said where the field is, in ``config.py``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any


def contradictions(config: Any) -> Iterator[str]:
    """One line for each contradiction: which fields, and what to do.

    Args:
        config: a ``fastsskd.config.Config``, whose file imports this one.
    """
    if config.mask.intra_p_time + config.mask.intra_p_freq > 1.0 + 1e-9:
        yield "mask.intra_p_time + mask.intra_p_freq exceed 1"
    if len(config.optim.betas) != 2 or not all(0.0 <= b < 1.0 for b in config.optim.betas):
        yield "optim.betas must be two numbers in [0, 1)"
    if not config.recipe.stages or len(set(config.recipe.stages)) != len(config.recipe.stages):
        yield "recipe.stages must name ssl, distill or both, each once"
    overlap = set(config.data.train_folds) & set(config.data.eval_folds)
    if overlap:
        yield f"fold {min(overlap)} is in both data.train_folds and data.eval_folds"
    loss = config.loss
    kinds, views = ("restore", "mse", "kl", "contrast"), ("intra", "inter")
    if "ssl" in config.recipe.stages and not any(getattr(loss, f"{kind}_{view}") for kind in kinds for view in views):
        yield "[loss] switches off all eight terms; leave one on, or recipe.stages = ['distill']"
    augment = config.augment
    if augment.ssl and not (augment.mixup or augment.time_roll or augment.noise):
        yield "augment.ssl without augment.mixup, time_roll or noise changes nothing: set one of them, or ssl = false"
    if "distill" in config.recipe.stages:
        yield from _of_labelled_stages(config)
    yield from _of_teachers(config.distill)


def _of_labelled_stages(config: Any) -> Iterator[str]:
    distill, model = config.distill, config.model
    if not (distill.labels or distill.teacher or distill.stored):
        yield "distill.labels = false needs a distill.teacher, or its answers in distill.stored"
    if distill.ema and distill.select == "average":
        yield (
            "distill.ema and distill.select = 'average' both average the weights, over steps and over epochs: set "
            "distill.ema = 0, or distill.select = 'last'"
        )
    if not distill.frozen:
        return
    if model.drop_path:
        yield "distill.frozen trains the head alone, on features that model.drop_path would disturb: set it to 0"
    if (distill.teacher or distill.stored) and distill.gamma:
        yield "distill.frozen leaves the features as they are, so they cannot follow a teacher's: set distill.gamma = 0"
    if distill.teacher == "supervised":
        yield (
            "distill.frozen with distill.teacher = 'supervised': the teacher too would be a head on random features; "
            "train it in a run of its own and name its checkpoint"
        )


def _of_teachers(distill: Any) -> Iterator[str]:
    teachers, stored = distill.teacher, distill.stored
    for name in ("teacher", "teacher_classes", "class_map"):
        if stored and getattr(distill, name):
            yield (
                f"distill.stored and distill.{name} are both set; whose answers are stored was settled by "
                f"`fastsskd teach`: leave distill.{name} empty, or distill.stored to ask the teacher in every step"
            )
    if isinstance(teachers, tuple) and (not teachers or {"", "previous", "supervised"} & set(teachers)):
        yield "distill.teacher as a list takes checkpoints, at least one"
