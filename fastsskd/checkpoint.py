"""Training checkpoints that survive: written aside, hashed, then renamed into place.

    RUN/checkpoints/step-00000120/
        manifest.json      sizes and sha256 of every file, step, stage, world size, ZeRO stage, versions, loader cursor
        mp_rank_00_model_states.pt, zero_pp_rank_0_..._optim_states.pt     DeepSpeed's own

DeepSpeed's loader unpickles, so only checkpoints whose hashes match the manifest this run wrote are given to it.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from fastsskd import __version__, distributed
from fastsskd.errors import InputError

MANIFEST, EXTRA = "manifest.json", "extra.safetensors"
_CHUNK = 1 << 22


@dataclass(frozen=True)
class Progress:
    """Where a run stands.

    Attributes:
        stage: name of the stage in progress.
        step: optimizer steps done in it.
        global_step: optimizer steps done in the run; orders the checkpoints.
        loader: the loader's ``state_dict``.
        world_size: ranks that wrote it.
        zero_stage, precision: of the engine that wrote it.
        note: of the stage's selection of weights.
    """

    stage: str
    step: int
    global_step: int
    loader: dict[str, Any]
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
    """
    name = f"step-{progress.global_step:08d}"
    temporary, final = folder / f"tmp-{name}", folder / name
    if distributed.rank() == 0:
        shutil.rmtree(temporary, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)
    distributed.barrier()
    engine.save_checkpoint(str(folder), tag=temporary.name, save_latest=False)
    if extra and distributed.rank() == 0:
        save_file({name: value.contiguous() for name, value in extra.items()}, temporary / EXTRA)
    distributed.barrier()
    hashes = {file.name: _hash(file) for file in _own_files(temporary)}
    everyone = distributed.gather_objects(hashes)
    if distributed.rank() == 0:
        files = {file: about for own in everyone for file, about in own.items()}
        versions = {"fastsskd": __version__, "torch": torch.__version__}
        _write_json(temporary / MANIFEST, {**asdict(progress), "files": files, "versions": versions})
        _sync(temporary)
        shutil.rmtree(final, ignore_errors=True)  # the same step of an earlier try
        os.replace(temporary, final)
        _sync(folder)
        for old in sorted(folder.glob("step-*"))[:-keep]:
            shutil.rmtree(old, ignore_errors=True)
    distributed.barrier()
    return final


def newest(folder: Path, stage: str) -> tuple[Path, Progress] | None:
    """The newest checkpoint of ``stage`` whose files are whole, or None if the stage never had one.

    Raises:
        InputError: there are checkpoints of the stage but none is whole: never a silent restart.
    """
    broken = []
    for path in sorted(folder.glob("step-*"), reverse=True):
        about, problem = _read_manifest(path)
        if about is not None and about["stage"] != stage:
            continue
        problem = problem or _verify(path, about["files"])
        if problem is None:
            fields = {name: about[name] for name in Progress.__dataclass_fields__}
            for reason in broken:
                print(f"checkpoint {reason}; falling back to {path}", file=sys.stderr)
            return path, Progress(**fields)
        broken.append(f"{path}: {problem}")
    if broken:
        raise InputError(
            f"no checkpoint in {folder} is whole ({broken[0]}); restore one, or start anew in another run.out"
        )
    return None


def restore(engine: Any, path: Path) -> dict[str, torch.Tensor]:
    """Load a checkpoint that :func:`newest` has verified into the engine; returns its ``extra`` tensors."""
    loaded, _ = engine.load_checkpoint(str(path.parent), tag=path.name)
    if loaded is None:
        raise InputError(f"checkpoint {path}: DeepSpeed found nothing to load; was it written with the same ds_config?")
    return load_file(path / EXTRA) if (path / EXTRA).exists() else {}


def full_state(engine: Any, untrained: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The model's whole float32 state on the CPU, from ZeRO's partitions; every rank must call it.

    Args:
        untrained: the parameters this stage left alone, from before the engine rounded them to 16 bit.
    """
    from deepspeed.utils import safe_get_full_fp32_param

    state = {}
    for name, parameter in engine.module.model.named_parameters():
        if name in untrained:
            state[name] = untrained[name].cpu()
            continue
        full = (
            safe_get_full_fp32_param(parameter)
            if hasattr(parameter, "_hp_mapping") or hasattr(parameter, "ds_id")
            else None
        )
        state[name] = (parameter.detach() if full is None else full).float().cpu().clone()
    bad = [name for name, value in state.items() if not math.isfinite(float(value.abs().max()))]
    if bad:
        raise InputError(
            f"the weights are not finite ({bad[0]}); lower the learning rate; the last checkpoint is untouched"
        )
    return state


def _own_files(folder: Path) -> list[Path]:
    """The files of a checkpoint that this rank wrote, by DeepSpeed's names; rank 0 answers for the rest."""
    own = []
    for file in sorted(folder.iterdir()):
        match = re.search(r"pp_rank_(\d+)_", file.name)
        if (int(match.group(1)) if match else 0) == distributed.rank():
            own.append(file)
    return own


def _hash(file: Path) -> dict[str, Any]:
    digest = hashlib.sha256()
    with open(file, "rb+") as opened:
        os.fsync(opened.fileno())
        while chunk := opened.read(_CHUNK):
            digest.update(chunk)
    return {"size": file.stat().st_size, "sha256": digest.hexdigest()}


def _read_manifest(path: Path) -> tuple[dict[str, Any] | None, str | None]:
    try:
        return json.loads((path / MANIFEST).read_text(encoding="utf-8")), None
    except (OSError, ValueError) as error:
        return None, f"its {MANIFEST} cannot be read ({error})"


def _verify(path: Path, files: dict[str, Any]) -> str | None:
    """What is wrong with a checkpoint's files, or None. Rank 0 reads them; all ranks get its answer."""
    problem = None
    if distributed.rank() == 0:
        for name, about in files.items():
            file = path / name
            if not file.is_file():
                problem = f"{name} is missing"
            elif file.stat().st_size != about["size"]:
                problem = f"{name} has {file.stat().st_size} bytes instead of {about['size']}"
            elif _hash(file)["sha256"] != about["sha256"]:
                problem = f"{name} has changed since it was written"
            if problem:
                break
    return distributed.gather_objects(problem)[0]


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that the file is whole or not there."""
    temporary = path.with_name(f".{path.name}.tmp")
    _write_json(temporary, value)
    os.replace(temporary, path)


def _write_json(path: Path, value: Any) -> None:
    with open(path, "w", encoding="utf-8") as file:
        json.dump(value, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
