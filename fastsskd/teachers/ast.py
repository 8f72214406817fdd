"""AST checkpoints as teachers: the original ``.pth`` (github.com/YuanGongND/ast) and Hugging Face's layout."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from fastsskd.errors import InputError
from fastsskd.foreign import weights_in
from fastsskd.patches import NUM_MEL_BINS, PATCH
from fastsskd.teachers.vit import (
    AUDIOSET_MEAN,
    AUDIOSET_STD,
    Layout,
    SpectrogramTeacher,
    build_vit,
    find_strides,
    heads_of,
    join,
    patches_along,
    rows,
)

# Hugging Face's names -> timm's, in this order; where there are two, transformers 5 has other ones in memory.
_HUGGING_FACE = (
    ("audio_spectrogram_transformer.", ""),
    ("classifier.layernorm.", "head.0."),
    ("classifier.dense.", "head.1."),
    ("embeddings.patch_embeddings.projection.", "patch_embed."),
    ("embeddings.position_embeddings", "pos_embed"),
    ("embeddings.distillation_token", "dist_token"),
    ("embeddings.cls_token", "cls_token"),
    ("encoder.layer.", "blocks."),
    ("layers.", "blocks."),
    (".layernorm_before.", ".norm1."),
    (".layernorm_after.", ".norm2."),
    (".attention.output.dense.", ".attn.proj."),
    (".attention.o_proj.", ".attn.proj."),
    (".attention.attention.", ".attn."),
    (".attention.q_proj.", ".attn.query."),
    (".attention.k_proj.", ".attn.key."),
    (".attention.v_proj.", ".attn.value."),
    (".intermediate.dense.", ".mlp.fc1."),
    (".output.dense.", ".mlp.fc2."),
    ("layernorm.", "norm."),
)


def from_checkpoint(checkpoint: Mapping[str, Any], path: Path) -> SpectrogramTeacher:
    """The teacher in an opened checkpoint.

    Args:
        checkpoint: what the file holds.
        path: the file. Its name may tell the strides; Hugging Face's ``config.json`` and ``preprocessor_config.json``
            are looked for beside it.

    Raises:
        InputError: weights that do not fit together, unknown strides, or a configuration that asks for another model.
    """
    weights = weights_in(checkpoint)
    if any(name.startswith("v.") for name in weights):
        return _original(weights, path)
    return _hugging_face(weights, path)


def _original(weights: dict[str, Tensor], path: Path) -> SpectrogramTeacher:
    """Names of classes are not in such a file."""
    state = {}
    for name, value in weights.items():
        if not name.startswith("v.head"):  # DeiT's own heads, for pictures
            name = name.removeprefix("v.").replace("patch_embed.proj.", "patch_embed.").replace("mlp_head.", "head.")
            state[name] = value
    _join_special_tokens(state, path)
    num_patches = _num_patches(state, path)
    layout = Layout(find_strides(num_patches, path), heads_of(state["pos_embed"].shape[2], path))
    return SpectrogramTeacher(build_vit(state, layout, path), (), AUDIOSET_MEAN, AUDIOSET_STD)


def _hugging_face(weights: dict[str, Tensor], path: Path) -> SpectrogramTeacher:
    """Without ``config.json``: strides and heads as for the original, the published epsilon, no names of classes."""
    state = {}
    for name, value in weights.items():
        for theirs, ours in _HUGGING_FACE:
            name = name.replace(theirs, ours)
        state[name] = value
    _join_attention(state, path)
    _join_special_tokens(state, path)
    num_patches = _num_patches(state, path)
    file = path.with_name("config.json")
    config = _read_json(file)
    if config is None:
        eps = 1e-12
        strides, heads = find_strides(num_patches, path), heads_of(state["pos_embed"].shape[2], path)
    else:
        _check_config(config, file)
        eps, heads = config.get("layer_norm_eps", 1e-12), config["num_attention_heads"]
        strides = config["frequency_stride"], config["time_stride"]
        _check_positions(strides, config["max_length"], num_patches, file)
    model = build_vit(state, Layout(strides, heads, eps=eps, head_eps=eps), path)
    classes = () if config is None or model.head is None else _class_names(config, model.head[1].out_features)
    return SpectrogramTeacher(model, classes, *_normalisation(path.with_name("preprocessor_config.json")))


def _num_patches(state: dict[str, Tensor], path: Path) -> int:
    if "pos_embed" not in state or state["pos_embed"].ndim != 3:
        raise InputError(f"teacher {path}: lacks AST's position embedding; the file is not whole, or of another model")
    return state["pos_embed"].shape[1] - state["special_tokens"].shape[1]


def _join_special_tokens(state: dict[str, Tensor], path: Path) -> None:
    """The class and the distillation token as one tensor ``(1, 2, D)``."""
    if not {"cls_token", "dist_token"} <= state.keys():
        raise InputError(f"teacher {path}: lacks AST's class or distillation token; it is of another model")
    join(state, ("cls_token", "dist_token"), "special_tokens", 1, path)


def _join_attention(state: dict[str, Tensor], path: Path) -> None:
    """Query, key and value of each block as timm's one linear map."""
    for first in [name for name in state if ".attn.query." in name]:
        names = [first.replace(".query.", part) for part in (".query.", ".key.", ".value.")]
        if all(name in state for name in names):
            join(state, names, first.replace(".query.", ".qkv."), 0, path)


def _read_json(file: Path) -> dict[str, Any] | None:
    """The file's dictionary; None if there is no such file."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise InputError(f"teacher {file}: cannot be read ({str(error).splitlines()[0][:100]})") from None
    if not isinstance(content, dict):
        raise InputError(f"teacher {file}: holds no dictionary; download it again")
    return content


def _check_config(config: dict[str, Any], file: Path) -> None:
    """Raise if ``config.json`` is of another model or asks for what is not implemented here."""
    if config.get("model_type") != "audio-spectrogram-transformer":
        raise InputError(f"teacher {file}: is of a {config.get('model_type')!r}, but the weights beside it are of AST")
    for name, only in (("num_mel_bins", NUM_MEL_BINS), ("patch_size", PATCH), ("hidden_act", "gelu")):
        if config.get(name, only) != only:
            raise InputError(f"teacher {file}: {name} is {config[name]!r}; only {only!r} is implemented")
    eps = config.get("layer_norm_eps", 1e-12)
    if not isinstance(eps, float) or not 0 <= eps < 1:
        raise InputError(f"teacher {file}: layer_norm_eps is {eps!r}, expected a small number such as 1e-12")
    for name, low, high in (
        ("num_attention_heads", 1, 64),
        ("frequency_stride", 1, 64),
        ("time_stride", 1, 64),
        ("max_length", PATCH, 100_000),
    ):
        if type(config.get(name)) is not int or not low <= config[name] <= high:
            raise InputError(f"teacher {file}: {name} is {config.get(name)!r}, expected a number from {low} to {high}")


def _check_positions(strides: tuple[int, int], frames: int, num_patches: int, file: Path) -> None:
    """Raise unless the weights have a position for each patch that ``config.json`` speaks of."""
    if rows(strides[0]) * patches_along(frames, strides[1]) != num_patches:
        raise InputError(
            f"teacher {file}: {num_patches} positions are not the patches of {frames} frames at the strides "
            f"{strides[0]} and {strides[1]}; is it the file that belongs to these weights?"
        )


def _class_names(config: dict[str, Any], number: int) -> tuple[str, ...]:
    """Those of ``id2label``; none where it names other outputs or has only transformers' ``LABEL_0``, ..."""
    names = config.get("id2label")
    names = {str(place): name for place, name in names.items()} if isinstance(names, dict) else {}
    ordered = tuple(str(names.get(str(place), "")) for place in range(number))
    if len(names) != number or "" in ordered or ordered == tuple(f"LABEL_{place}" for place in range(number)):
        return ()
    return ordered


def _normalisation(file: Path) -> tuple[float, float]:
    """Mean and deviation in a ``preprocessor_config.json``; AudioSet's where there is none."""
    about = _read_json(file) or {}
    if about.get("do_normalize") is False:
        return 0.0, 0.5
    mean, std = about.get("mean", AUDIOSET_MEAN), about.get("std", AUDIOSET_STD)
    if not all(isinstance(value, (int, float)) for value in (mean, std)) or not std > 0:
        raise InputError(f"teacher {file}: mean {mean!r} and std {std!r} are not a normalisation")
    return float(mean), float(std)
