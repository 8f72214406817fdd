"""Starting weights: from a model of ours, or a ViT of another project; each key accounted for."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from fastsskd.errors import InputError
from fastsskd.foreign import checkpoint_file, load_checkpoint
from fastsskd.model import ACM, SIZES
from fastsskd.starting.imagenet import MEL_PATCHES, resize_note, resize_positions, weights_of_vit
from fastsskd.starting.report import StartReport
from fastsskd.weights import is_model_file, read_model_file

_PUBLISHED = {size: f"vit_{size}_patch16_224.augreg_in21k_ft_in1k" for size in ("base", "small", "tiny")}
"""timm's names of the ViTs that are as wide and deep as ours."""


def initialise(model: ACM, source: str | Path, classes: tuple[str, ...] | None = None) -> StartReport:
    """Load starting weights into ``model``: see :func:`starting_weights`."""
    take, report = starting_weights(model, source, classes)
    model.load_state_dict({**model.state_dict(), **take})
    return report


def starting_weights(
    model: ACM, source: str | Path, classes: tuple[str, ...] | None = None
) -> tuple[dict[str, Tensor], StartReport]:
    """What ``model`` would take from a file, whatever the clip length and classes of the file's model.

    The position grid is interpolated where its size differs. The class head of a model of ours is left out when its
    classes are not ``classes`` (None: when their number differs), and with its pooling when that is another one.

    Args:
        model: on any device; it is only looked at.
        source: a model of ours, a ViT or DeiT (``.pth``, ``.safetensors``, Google's ``.npz``), AudioMAE; or a folder
            with one of them.

    Returns:
        Weights by the model's names, and what became of each.

    Raises:
        InputError: no such file, or a model of another kind, width or depth.
    """
    if str(source) == "imagenet" and not Path(source).exists():
        raise InputError(f"model.init = 'imagenet': nothing is downloaded here; {_where_to_fetch(model)}")
    if (Path(source) / "manifest.json").is_file():
        raise InputError(
            f"checkpoint {source}: it is for --resume; start from the model.safetensors of a stage that has ended, in "
            "the run's checkpoints/<stage>/"
        )
    if (Path(source) / "checkpoints").is_dir():
        raise InputError(f"checkpoint {source}: a run; its models are in checkpoints/<stage>/: name one of them")
    file = checkpoint_file(source)
    if is_model_file(file):
        return _weights_of_ours(model, file, classes)
    return weights_of_vit(model, load_checkpoint(file), file)


def _where_to_fetch(model: ACM) -> str:
    name = next((_PUBLISHED[size] for size in _PUBLISHED if SIZES[size] == model.size), None)
    if name is None:
        return f"and no published ViT is like this model: set model.size to {', '.join(_PUBLISHED)}, or model.init = ''"
    return (
        f"fetch model.safetensors of timm/{name} (documented at huggingface.co/timm/{name}) and set model.init to its "
        "path"
    )


def _weights_of_ours(model: ACM, file: Path, classes: tuple[str, ...] | None) -> tuple[dict[str, Tensor], StartReport]:
    state, info = read_model_file(file)
    kind = "" if info.attention == model.attention else f", {info.attention} attention"
    report = StartReport(f"a model of ours, size {info.size}, {info.seconds:g} s, {len(info.classes)} classes{kind}")
    if SIZES[info.size] != model.size:
        mine = next((f" ({size})" for size, widths in SIZES.items() if widths == model.size), "")
        raise InputError(
            f"checkpoint {file}: a model of size {info.size!r} does not fit this one{mine}; set model.size = "
            f'"{info.size}"'
        )
    own, take = model.state_dict(), {}
    other_classes = classes is not None and tuple(classes) != tuple(info.classes)
    for name, value in state.items():
        fits = name in own and own[name].shape == value.shape
        why = _unfit_for_the_head(name, fits, model, info.pooling, other_classes)
        if why:
            report.add("ignored", name, (name,), why)
            continue
        if name == "pos_embed" and not fits and value.shape[2:] == own[name].shape[2:]:
            grid = value.shape[1] // MEL_PATCHES, MEL_PATCHES
            take[name] = resize_positions(value, grid, model.grid_size)
            report.add("resized", name, (name,), resize_note(grid, model.grid_size))
            continue
        if not fits:
            raise InputError(f"checkpoint {file}: {name} does not fit its own description; the file is damaged")
        take[name] = value
        report.add("loaded", name, (name,))
    for name in own:
        if name not in take:
            if not name.startswith(("head.", "pool.")):
                raise InputError(f"checkpoint {file}: lacks {name}; the file is damaged")
            report.add("missing", name, note="fresh")
    return take, report


def _unfit_for_the_head(name: str, fits: bool, model: ACM, pooling: str, other_classes: bool) -> str:
    """Why a weight of the file's head, or of its pooling, cannot be taken; "" for those that can, and all others."""
    if not name.startswith(("head.", "pool.")):
        return ""
    if not model.num_classes:
        return "no head here"
    if pooling != model.pooling:
        return "for another pooling"
    return "for other classes" if name.startswith("head.") and (other_classes or not fits) else ""
