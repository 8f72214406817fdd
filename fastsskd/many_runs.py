"""Several runs of the trainer, each a process of its own: in parallel, resumable, and one that fails harms no other.

Of each job there is ``OUT/NAME/``, the run's folder, and ``OUT/NAME.log``, what it printed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from fastsskd import durable
from fastsskd.config import Config
from fastsskd.config import load as load_config
from fastsskd.ds_config import batch_sizes
from fastsskd.ds_config import load as load_ds_config
from fastsskd.errors import InputError, UsageError
from fastsskd.job_pool import KEEP, Job, Pool, Settings, is_complete, out_override, prune, read_result

__all__ = ["KEEP", "Job", "JobsFailed", "run_many"]

_HOW = {f"run.{name}" for name in ("out", "checkpoint_every", "keep_checkpoints", "pictures_every", "timeout")}
_HOW |= {"data.workers", "data.prefetch"}
"""Fields that change nothing of what a run finds out, so they may differ when it is asked for again."""
_LOGGING = ("tensorboard", "wandb", "csv_monitor", "comet", "steps_per_print", "wall_clock_breakdown")


class JobsFailed(InputError):
    """Some jobs failed; the ``results`` of the others are there."""

    def __init__(self, text: str, results: dict[str, dict[str, Any]]):
        super().__init__(text)
        self.results = results


def run_many(
    jobs: Sequence[Job],
    *,
    config: str | Path,
    ds_config: str | Path,
    out: str | Path,
    launcher: str | Path,
    parallel: int = 1,
    threads: int | None = None,
    keep: str = "all",
) -> dict[str, dict[str, Any]]:
    """Run every job that is not complete, resume those that were begun; the same call again goes on where it ended.

    Args:
        config, ds_config: the files that all jobs share.
        out: folder of the jobs' folders and logs; one call at a time may use it.
        launcher: ``launch/train.py``, which plain Python runs as a single rank.
        parallel: jobs at a time. With several GPUs, each in turn gets one of them.
        threads: of each job, for torch and for the loader; None = its share of the cores if ``parallel`` > 1.
        keep: one of :data:`KEEP`, for complete jobs.

    Returns:
        The contents of each job's ``result.json``, by name, in the order of ``jobs``.

    Raises:
        JobsFailed: at the end, when all others are done; says the last line of the log.
        InputError: a folder holds a run with another configuration, or the call was stopped by Ctrl-C or SIGTERM:
            then every job has saved and ended.
        UsageError: names that are no folder names or not unique, overrides that are wrong.
    """
    _check_arguments(jobs, parallel, keep, launcher)
    out = Path(out)
    asked = {job.name: _asked(job, config, out) for job in jobs}
    settings = Settings(Path(config), Path(ds_config), out, Path(launcher), parallel, threads, keep)
    numbers = _numbers(load_ds_config(ds_config))
    out.mkdir(parents=True, exist_ok=True)
    with _alone(out):
        states = {name: _state(out / name, asked[name], numbers) for name in asked}
        pool = Pool(settings, [job for job in jobs if states[job.name] != "complete"], len(jobs), states)
        pool.run()
        results = {}
        for name in [name for name in asked if name not in pool.failed and is_complete(out / name)]:
            prune(out / name, keep)
            results[name] = read_result(out / name)
    if pool.stopped:
        raise InputError(f"stopped; {len(results)} of {len(jobs)} jobs are complete; the same command goes on")
    if pool.failed:
        shown = "; ".join(f"{name}: {why} ({out / name}.log)" for name, why in list(pool.failed.items())[:3])
        more = "; ..." if len(pool.failed) > 3 else ""
        raise JobsFailed(f"{len(pool.failed)} of {len(jobs)} jobs failed: {shown}{more}", results)
    return results


def _check_arguments(jobs: Sequence[Job], parallel: int, keep: str, launcher: str | Path) -> None:
    names = [job.name for job in jobs]
    for name in names:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
            raise UsageError(f"job {name!r}: use letters, digits, '.', '_' and '-'; it names a folder")
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise UsageError(f"job {twice!r}: two jobs have this name")
    if parallel < 1:
        raise UsageError(f"parallel = {parallel}: at least one job at a time")
    if keep not in KEEP:
        raise UsageError(f"keep = {keep!r}: choose one of {', '.join(KEEP)}")
    if not Path(launcher).is_file():
        raise InputError(f"{launcher}: no such file; it is launch/train.py of the checkout")


def _asked(job: Job, config: str | Path, out: Path) -> dict[str, Any]:
    """The resolved configuration of a job, ``section.key -> value``."""
    if any(text.partition("=")[0].strip() == "run.out" for text in job.overrides):
        raise UsageError(f"job {job.name}: run.out is chosen here; name the folder of all jobs instead")
    return _flat(load_config(config, [*job.overrides, out_override(out / job.name)]))


def _flat(config: Config) -> dict[str, Any]:
    tree = dataclasses.asdict(config)
    return {f"{section}.{key}": value for section, values in tree.items() for key, value in values.items()}


def _numbers(tree: dict[str, Any]) -> dict[str, Any]:
    """What of a DeepSpeed JSON, as written or as resolved for one rank, the results depend on."""
    kept = {key: value for key, value in tree.items() if key not in _LOGGING}
    sizes = batch_sizes(tree, 1)
    kept |= {
        "train_batch_size": sizes.total,
        "train_micro_batch_size_per_gpu": sizes.micro,
        "gradient_accumulation_steps": sizes.accumulation,
    }
    zero = dict(kept.get("zero_optimization", {}))
    zero.pop("memory_efficient_linear", None)  # ds_config.resolve adds it
    return {**kept, "zero_optimization": zero}


def _state(folder: Path, asked: dict[str, Any], numbers: dict[str, Any]) -> str:
    """``"complete"``, ``"begun"`` or ``"new"``.

    Raises:
        InputError: what lies there is another run, or no run.
    """
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return "new"
    try:
        found = _flat(load_config(folder / "config.toml"))
        found_numbers = _numbers(json.loads((folder / "ds_config.json").read_text(encoding="utf-8")))
    except (InputError, OSError, ValueError):
        raise InputError(
            f"{folder}: not a run of this version, or one that was killed at its start; delete it to begin anew"
        ) from None
    _refuse_other(folder, found, asked, _HOW)
    _refuse_other(folder, found_numbers, numbers, set())
    return "complete" if is_complete(folder) else "begun"


def _refuse_other(folder: Path, found: dict[str, Any], asked: dict[str, Any], free: set[str]) -> None:
    for name in sorted(found.keys() | asked.keys()):
        if name not in free and found.get(name) != asked.get(name):
            raise InputError(
                f"{folder}: holds a run with {name} = {_short(found.get(name))}, asked for is "
                f"{_short(asked.get(name))}; choose another folder, or delete this one"
            )


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else text[:77] + "..."


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Hold ``folder`` against a second call."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        if not durable.lock(descriptor):
            raise InputError(f"{folder}: another process is running jobs here; wait for it, or choose another folder")
        yield
    finally:
        os.close(descriptor)
