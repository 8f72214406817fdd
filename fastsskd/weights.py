"""Model files: one ``model.safetensors`` holds the weights and, in its header, all that is needed to use them.

Nothing here unpickles: a file from anywhere is safe to open.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fastsskd import __version__
from fastsskd.errors import InputError
from fastsskd.model import ACM, ATTENTIONS, POOLINGS, SIZES, build_model

MODEL_FILE = "model.safetensors"


@dataclass(frozen=True)
class ModelInfo:
    """What a model file says of itself.

    Attributes:
        size: preset, a key of ``fastsskd.model.SIZES``.
        classes: names in the order of the logits.
        multi_label: probabilities are sigmoids rather than a softmax.
        seconds: clip length the model was trained on.
        mean, std: normalisation of its input.
        sample_rate: Hz of the waveforms its features come from.
        attention: of its blocks, one of ``fastsskd.model.ATTENTIONS``.
        pooling: of the tokens, for its class head: one of ``fastsskd.model.POOLINGS``.
        licence: of the weights, in words or as an SPDX name; "" = none was given.
    """

    size: str
    classes: tuple[str, ...]
    multi_label: bool
    seconds: float
    mean: float
    std: float
    sample_rate: int = 16000
    attention: str = "plain"
    pooling: str = "mean"
    licence: str = ""


def model_file(path: str | Path) -> Path:
    """The model file at ``path``, which may be its folder.

    Raises:
        InputError: there is none.
    """
    path = Path(path)
    file = path / MODEL_FILE if path.is_dir() else path
    if not file.is_file():
        hint = "a run keeps them under checkpoints/iter*/" if path.is_dir() else "check the path"
        raise InputError(f"checkpoint {file}: no such file; {hint}")
    return file


def save_model(path: str | Path, state: dict[str, Tensor], info: ModelInfo, dtype: torch.dtype = torch.float32) -> None:
    """Write a model file; it appears whole or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    metadata = {"format": "pt", "fastsskd": json.dumps({**asdict(info), "version": __version__})}
    temporary.unlink(missing_ok=True)
    temporary.touch()
    rights = temporary.stat().st_mode  # those of any new file; safetensors would have the owner alone read it
    save_file({k: v.detach().to(dtype).cpu().contiguous() for k, v in state.items()}, temporary, metadata)
    temporary.chmod(rights)
    with open(temporary, "rb+") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)


def load_model(path: str | Path, device: torch.device | str = "cpu") -> tuple[ACM, ModelInfo]:
    """A model ready to classify, in evaluation mode.

    Raises:
        InputError: no such file, not a model file of ours, or damaged.
    """
    file = model_file(path)
    state, info = read_model_file(file)
    model = fresh_model(info)
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise InputError(f"checkpoint {file}: does not fit its own description ({_first_line(error)})") from None
    return model.to(device).eval(), info


def fresh_model(info: ModelInfo) -> ACM:
    """A model as ``info`` describes it, with fresh weights."""
    return build_model(
        info.size, len(info.classes), seconds=info.seconds, attention=info.attention, pooling=info.pooling
    )


def is_model_file(path: str | Path) -> bool:
    """Whether the file (or the model file in the folder) at ``path`` carries a description of ours."""
    try:
        with safe_open(model_file(path), framework="pt") as opened:
            return "fastsskd" in (opened.metadata() or {})
    except (SafetensorError, OSError):
        return False


def read_model_file(file: Path) -> tuple[dict[str, Tensor], ModelInfo]:
    """The weights and the description in a model file."""
    try:
        with safe_open(file, framework="pt") as opened:
            about = (opened.metadata() or {}).get("fastsskd")
            if about is None:
                raise InputError(f"checkpoint {file}: a safetensors file, but not a model of fastsskd")
            state = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise InputError(f"checkpoint {file}: not a safetensors file, or damaged ({_first_line(error)})") from None
    return state, _read_info(file, about)


def _read_info(file: Path, text: str) -> ModelInfo:
    """The description in a model file's header: the fields of :class:`ModelInfo`, all but what older files lack."""
    kinds: dict[str, Any] = {"size": str, "classes": list, "multi_label": bool}
    kinds |= dict.fromkeys(("seconds", "mean", "std"), (int, float)) | {
        "sample_rate": int,
        "version": str,
        "attention": str,
        "pooling": str,
        "licence": str,
    }
    try:
        about = json.loads(text)
    except ValueError:
        about = None
    if isinstance(about, dict):
        about = {"attention": "plain", "pooling": "mean", "licence": "", **about}
    known = isinstance(about, dict) and set(about) == set(kinds)
    if not known or not all(isinstance(about[name], kind) for name, kind in kinds.items()):
        raise InputError(
            f"checkpoint {file}: fastsskd {__version__} cannot read its description; which version wrote it?"
        )
    if about["size"] not in SIZES:
        raise InputError(f"checkpoint {file}: model size {about['size']!r} is not known to this version")
    if about["attention"] not in ATTENTIONS:
        raise InputError(f"checkpoint {file}: attention {about['attention']!r} is not known to this version")
    if about["pooling"] not in POOLINGS:
        raise InputError(f"checkpoint {file}: pooling {about['pooling']!r} is not known to this version")
    del about["version"]
    return ModelInfo(**{**about, "classes": tuple(about["classes"])})


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    if not lines:
        return type(error).__name__
    # torch puts a heading first and the first concrete mismatch below it.
    return (lines[1] if len(lines) > 1 and lines[0].endswith(":") else lines[0]).strip()[:160]
