"""Model files: one ``model.safetensors`` holds the weights and, in its header, all that is needed to use them.

Nothing here unpickles: a file from anywhere is safe to open.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fastsskd import __version__
from fastsskd.errors import InputError
from fastsskd.model import ACM, SIZES, build_model

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
    """

    size: str
    classes: tuple[str, ...]
    multi_label: bool
    seconds: float
    mean: float
    std: float
    sample_rate: int = 16000


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


def save_model(path: str | Path, state: dict[str, Tensor], info: ModelInfo) -> None:
    """Write a model file; it appears whole or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    metadata = {"format": "pt", "fastsskd": json.dumps({**asdict(info), "version": __version__})}
    save_file({k: v.detach().float().cpu().contiguous() for k, v in state.items()}, temporary, metadata)
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
    model = build_model(info.size, len(info.classes), seconds=info.seconds)
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise InputError(f"checkpoint {file}: does not fit its own description ({_first_line(error)})") from None
    return model.to(device).eval(), info


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
    """The description in a model file's header; never more or less than the fields of :class:`ModelInfo`."""
    number = (int, float)
    kinds = {"size": str, "classes": list, "multi_label": bool, "seconds": number, "mean": number, "std": number}
    kinds |= {"sample_rate": int, "version": str}
    try:
        about = json.loads(text)
    except ValueError:
        about = None
    known = isinstance(about, dict) and set(about) == set(kinds)
    if not known or not all(isinstance(about[name], kind) for name, kind in kinds.items()):
        raise InputError(
            f"checkpoint {file}: fastsskd {__version__} cannot read its description; which version wrote it?"
        )
    if about["size"] not in SIZES:
        raise InputError(f"checkpoint {file}: model size {about['size']!r} is not known to this version")
    del about["version"]
    return ModelInfo(**{**about, "classes": tuple(about["classes"])})


def initialise_from(model: ACM, path: str | Path, classes: tuple[str, ...] | None = None) -> dict[str, list[str]]:
    """Load starting weights into ``model`` from a model file, whatever its clip length and classes.

    The position grid is interpolated when the clip length differs; the class head is left fresh when the file's classes
    are not ``classes`` (None: when their number differs).

    Returns:
        The keys by what happened to them: ``loaded``, ``resized``, ``ignored`` (in the file only, or of another
        class head) and ``missing`` (fresh in the model).

    Raises:
        InputError: no such file, or a model of another width or depth.
    """
    file = model_file(path)
    state, info = read_model_file(file)
    own = model.state_dict()
    report: dict[str, list[str]] = {"loaded": [], "resized": [], "ignored": [], "missing": []}
    take = {}
    other_classes = classes is not None and tuple(classes) != tuple(info.classes)
    for name, value in state.items():
        if name.startswith("head.") and other_classes:
            report["ignored"].append(name)
        elif name == "pos_embed" and own[name].shape != value.shape and own[name].shape[2] == value.shape[2]:
            take[name] = resize_positions(value, model.grid_size)
            report["resized"].append(name)
        elif name in own and own[name].shape == value.shape:
            take[name] = value
            report["loaded"].append(name)
        elif name.startswith("head."):
            report["ignored"].append(name)
        else:
            raise InputError(
                f"checkpoint {file}: a model of size {info.size!r} does not fit this one ({name}); change model.size"
            )
    report["missing"] = [name for name in own if name not in take]
    unexpected = [name for name in report["missing"] if not name.startswith("head.")]
    if unexpected:
        raise InputError(f"checkpoint {file}: lacks {unexpected[0]}; is it of size {info.size!r}, not this model's?")
    model.load_state_dict({**own, **take})
    return report


def resize_positions(pos_embed: Tensor, grid_size: tuple[int, int], mel_patches: int = 8) -> Tensor:
    """``(1, N, D)`` positions of a ``(N / mel_patches, mel_patches)`` grid -> ``grid_size``, bilinear along time."""
    dim = pos_embed.shape[2]
    grid = pos_embed.reshape(1, -1, mel_patches, dim).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=grid_size, mode="bilinear", align_corners=False)
    return grid.permute(0, 2, 3, 1).reshape(1, -1, dim)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    if not lines:
        return type(error).__name__
    # torch puts a heading first and the first concrete mismatch below it.
    return (lines[1] if len(lines) > 1 and lines[0].endswith(":") else lines[0]).strip()[:160]
