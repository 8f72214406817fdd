"""Training checkpoints that survive: written aside, hashed, then renamed into place.

    RUN/checkpoints/step-00000120/
        manifest.json                          where the run stands; size and sha256 of every file; its own sha256
        engine-00001-of-00002.safetensors      each rank's share of the engine's state, see engine_state.py
        extra.safetensors                      weights that a stage has kept aside so far, if any

A checkpoint resumes with another number of ranks, ZeRO stage or precision: all of it is float32 and knows its place.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from fastsskd import __version__, distributed, durable, engine_state
from fastsskd.errors import InputError, SharedError

MANIFEST, EXTRA = "manifest.json", "extra.safetensors"
FORMAT = 2  # 1 was DeepSpeed's own files


@dataclass(frozen=True)
class Progress:
    """Where a run stands.

    Attributes:
        stage: name of the stage in progress.
        step: optimizer steps done in it.
        global_step: optimizer steps done in the run; orders the checkpoints.
        loader: the loader's ``state_dict``.
        batch_size: clips per optimizer step over all ranks; the steps count those.
        world_size, zero_stage, precision: of the engine that wrote it.
        note: of the stage's selection of weights.
    """

    stage: str
    step: int
    global_step: int
    loader: dict[str, Any]
    batch_size: int
    world_size: int
    zero_stage: int
    precision: str
    note: dict[str, Any] = field(default_factory=dict)


def save(
    engine: Any, folder: Path, progress: Progress, keep: int, extra: dict[str, torch.Tensor] | None = None
) -> Path:
    """Save the engine and where the run stands, on every rank together.

    The checkpoint appears under its final name only when every file of every rank is on disk and hashed; older ones
    beyond ``keep`` are removed after that. ``extra`` tensors, the same on every rank, are kept beside the engine's.

    Raises:
        InputError: on every rank, when one of them could not write; the older checkpoints are untouched.
    """
    name = f"step-{progress.global_step:08d}"
    temporary, final = folder / f"tmp-{name}", folder / name
    is_first = distributed.rank() == 0

    def begin() -> None:
        if is_first:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)

    def write() -> dict[str, Any]:
        files = [engine_state.save(engine, temporary)]
        if extra and is_first:
            files.append(temporary / EXTRA)
            save_file({name: value.contiguous() for name, value in extra.items()}, files[-1])
        for file in files:
            durable.sync(file)
        return {file.name: _hash(file) for file in files}

    def publish() -> None:
        if is_first:
            files = {name: about for own in hashes for name, about in own.items()}
            engine_about = engine_state.describe(engine)
            _write_manifest(temporary, {**asdict(progress), "engine": engine_about, "files": files})
            shutil.rmtree(final, ignore_errors=True)  # the same step of an earlier try
            os.replace(temporary, final)
            durable.sync(folder)
            _remove_others(folder, final, keep)

    try:
        write_together(begin, final)
        hashes = write_together(write, final)
        write_together(publish, final)
    finally:
        if is_first:
            shutil.rmtree(temporary, ignore_errors=True)
    return final


def _remove_others(folder: Path, current: Path, keep: int) -> None:
    """Remove checkpoints older than the last ``keep``, damaged ones, and what killed runs began."""
    steps = sorted(folder.glob("step-*"))
    last = steps.index(current) + 1
    for path in [*steps[: max(last - keep, 0)], *steps[last:], *folder.glob("tmp-*"), *folder.glob("damaged-*")]:
        shutil.rmtree(path, ignore_errors=True)


def newest(folder: Path, stage: str) -> tuple[Path, Progress] | None:
    """The newest checkpoint of ``stage`` whose files are whole, or None if the stage never had one.

    Every rank must call it. Damaged ones that it falls back over are renamed, so that they do not count as kept.

    Raises:
        InputError: there are checkpoints of the stage but none is whole: never a silent restart.
    """
    paths = sorted(folder.glob("step-*"), reverse=True)
    broken: dict[Path, str] = {}
    # The first rank's view of the folder holds for all.
    for path, about, problem in distributed.gather_objects([(path, *_read_manifest(path)) for path in paths])[0]:
        if about is not None and about["stage"] != stage:
            continue
        problem = problem or _verify(path, about["files"])
        if problem is None:
            if distributed.rank() == 0:
                _set_aside(broken, path)
            return path, Progress(**{name: about[name] for name in Progress.__dataclass_fields__})
        broken[path] = problem
    if broken:
        path, problem = next(iter(broken.items()))
        raise SharedError(
            f"no checkpoint in {folder} is whole ({path.name}: {problem}); restore one, or start anew in another "
            "run.out"
        )
    return None


def _set_aside(broken: dict[Path, str], instead: Path) -> None:
    for path, problem in broken.items():
        print(f"checkpoint {path}: {problem}; falling back to {instead}", file=sys.stderr, flush=True)
        aside = path.with_name(f"damaged-{path.name}")
        shutil.rmtree(aside, ignore_errors=True)
        os.replace(path, aside)


def restore(engine: Any, path: Path) -> dict[str, torch.Tensor]:
    """Load a checkpoint that :func:`newest` has verified into the engine; returns its ``extra`` tensors."""
    about, _ = _read_manifest(path)
    files = [path / name for name in about["files"] if name != EXTRA]
    try:
        engine_state.load(engine, files, about["engine"])
    except InputError as error:
        raise type(error)(f"checkpoint {path}: {error}") from None
    return load_file(path / EXTRA) if EXTRA in about["files"] else {}


def _hash(file: Path) -> dict[str, Any]:
    """Size and sha256 of a file."""
    return {"size": file.stat().st_size, "sha256": durable.sha256(file)}


def _write_manifest(folder: Path, about: dict[str, Any]) -> None:
    about = {"format": FORMAT, **about, "versions": {"fastsskd": __version__, "torch": torch.__version__}}
    write_json(folder / MANIFEST, {**about, "sha256": _own_hash(about)})
    durable.sync(folder)


def _own_hash(about: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()


def _read_manifest(path: Path) -> tuple[dict[str, Any] | None, str | None]:
    """A checkpoint's manifest, or why there is none to trust."""
    try:
        about = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        return None, f"its {MANIFEST} cannot be read ({error})"
    if not isinstance(about, dict) or about.get("format") != FORMAT:
        return None, f"its {MANIFEST} is not of this version of fastsskd"
    if about.pop("sha256", None) != _own_hash(about):
        return None, f"its {MANIFEST} has changed since it was written"
    return about, None


def _verify(path: Path, files: dict[str, Any]) -> str | None:
    """What is wrong with a checkpoint's files, or None. Ranks share the reading; all of them get the same answer."""
    own = list(files.items())[distributed.rank() :: distributed.world_size()]
    problems = (_problem(path / name, about) for name, about in own)
    return next(filter(None, distributed.gather_objects(next(filter(None, problems), None))), None)


def _problem(file: Path, about: dict[str, Any]) -> str | None:
    if not file.is_file():
        return f"{file.name} is missing"
    if file.stat().st_size != about["size"]:
        return f"{file.name} has {file.stat().st_size} bytes instead of {about['size']}"
    try:
        same = _hash(file) == about
    except OSError as error:
        return f"{file.name} cannot be read ({error.strerror})"
    return None if same else f"{file.name} has changed since it was written"


def write_together(work: Callable[[], Any], target: Path) -> list[Any]:
    """What ``work`` returns on each rank, in rank order; every rank must call it.

    Raises:
        InputError: on every rank, when one of them could not write.
    """
    result = problem = None
    try:
        result = work()
    except (OSError, SafetensorError) as error:
        problem = (getattr(error, "strerror", None) or str(error)).strip().splitlines()[0]
    everyone = distributed.gather_objects((result, problem))
    problems = [f"rank {rank}: {why}" for rank, (_, why) in enumerate(everyone) if why]
    if problems:
        raise SharedError(
            f"{target} could not be written ({problems[0]}); make room, then --resume: what was saved before is whole"
        )
    return [result for result, _ in everyone]


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that the file is whole or not there."""
    durable.write_text(path, json.dumps(value, indent=1))
