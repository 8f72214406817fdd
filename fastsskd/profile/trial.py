"""Advice followed: the change really made, and its gain measured against the job as it is, in turn."""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

from fastsskd import distributed
from fastsskd.answers.stored import StoredAnswers
from fastsskd.batch import Batch
from fastsskd.loader import Loader
from fastsskd.pack.run import pack
from fastsskd.profile.advice import Advice
from fastsskd.profile.job import Job, say
from fastsskd.profile.run import Profile
from fastsskd.profile.runs import endless, train
from fastsskd.profile.stats import Interval, median_interval

ROUNDS = 3
MOST = 4  # pieces of advice that are tried
SAMPLE = 256  # clips that are packed

Trial = tuple[Callable[[], Loader], Callable[[], Loader], Callable[[Iterator[Batch]], Iterator[Batch]] | None]
"""Makers of a loader without and with the change, and what happens to the batches with it."""


def follow(job: Job, result: Profile, seconds: float) -> list[Advice]:
    """The advice, with what following it really gained where one process can do that. Every rank must call it.

    A change is measured end to end, in turn with the job as it is. Nothing is left behind: a sample of the clips is
    packed into a folder that is removed.

    Args:
        seconds: for all of it, about.
    """
    able = [one for one in result.advice[:MOST] if _can_try(job, one)]
    tried = []
    for one in result.advice:
        if one in able:
            say(f"trying {one.key} ...")
            with contextlib.ExitStack() as stack:
                ratio = _compare(job, _TRIALS[one.key](job, one, stack), seconds / len(able))
                one = dataclasses.replace(one, tried=ratio)
        tried.append(one)
    return tried


def _can_try(job: Job, one: Advice) -> bool:
    if one.key == "pack":
        return not job.is_stored  # whose answers belong to the clips as they are
    return one.key in _TRIALS and (one.value > 0 or one.key == "teacher")


def _compare(job: Job, trial: Trial, seconds: float) -> Interval:
    """Clips a second with the change over those without, of rounds in which each had a turn."""
    before, after, change = trial
    ratios = []
    for _ in range(ROUNDS):
        plain = _rate(job, before, None, seconds / 2 / ROUNDS)
        ratios.append(_rate(job, after, change, seconds / 2 / ROUNDS) / plain)
    return median_interval(ratios)


def _rate(job: Job, make: Callable[[], Loader], change: Callable | None, seconds: float) -> float:
    with contextlib.closing(make()) as loader:
        batches = endless(loader) if change is None else change(endless(loader))
        rate = train(job, batches, seconds, warm_up=loader.prefetch + 2).rate().value
    return sum(other for (other,) in distributed.gather_objects((rate,)))


def _setting(field: str) -> Callable[[Job, Advice, contextlib.ExitStack], Trial]:
    """Another value of a field of ``[data]``."""
    return lambda job, one, stack: (job.loader, lambda: job.loader(**{field: one.value}), None)


def _pack(job: Job, one: Advice, stack: contextlib.ExitStack) -> Trial:
    """A sample of the clips, as it is and packed."""
    number = min(max(SAMPLE, 2 * job.sizes.total), len(job.clips))
    sample = job.clips.select(np.sort(np.random.default_rng(1).permutation(len(job.clips))[:number]))
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fastsskd-profile-")))
    with open(folder / "progress", "w", encoding="utf-8") as quiet, contextlib.redirect_stderr(quiet):
        packed = pack(sample, folder / "packed", workers=distributed.cores_per_rank())
    return (lambda: job.loader(sample)), (lambda: job.loader(packed.manifest)), None


def _teacher(job: Job, one: Advice, stack: contextlib.ExitStack) -> Trial:
    """The same answers for every batch, as if they had been stored."""
    module, answers = job.module, object.__new__(StoredAnswers)  # one that is asked nothing and has no folder
    probs, features = module.teach(torch.zeros(job.sizes.micro, job.config.num_samples, device=job.device))
    real = module._outside

    def change(batches: Iterator[Batch]) -> Iterator[Batch]:
        module._outside = (answers,)
        try:
            for batch in batches:
                known = {"teacher_probs": probs[: len(batch)], "teacher_features": features[: len(batch)]}
                yield dataclasses.replace(batch, **known)
        finally:
            module._outside = real

    return job.loader, job.loader, change


_TRIALS: dict[str, Callable[[Job, Advice, contextlib.ExitStack], Trial]] = {
    "threads": _setting("workers"),
    "disk": _setting("workers"),
    "prefetch": _setting("prefetch"),
    "pack": _pack,
    "teacher": _teacher,
}
