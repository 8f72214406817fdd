"""AudioMAE checkpoints (github.com/facebookresearch/AudioMAE) as teachers, fine-tuned or pre-trained."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastsskd.errors import InputError
from fastsskd.foreign import weights_in
from fastsskd.teachers.vit import (
    AUDIOSET_MEAN,
    AUDIOSET_STD,
    Layout,
    SpectrogramTeacher,
    build_vit,
    find_strides,
    heads_of,
)

_PRETRAINING_ONLY = ("decoder", "mask_token")


def from_checkpoint(checkpoint: Mapping[str, Any], path: Path) -> SpectrogramTeacher:
    """The teacher in an opened checkpoint ``{"model": ...}``: features of AST, tokens time-major.

    Fine-tuned with global pooling (``fc_norm``), the clip feature is the norm of the patches' mean, else the class
    token. A pre-trained file has no head, so it gives features only; names of classes are in neither.

    Raises:
        InputError: weights that do not fit together, or unknown strides.
    """
    weights = weights_in(checkpoint)
    mean_pool = "fc_norm.weight" in weights
    state = {}
    for name, value in weights.items():
        if name.startswith(_PRETRAINING_ONLY) or (mean_pool and name.startswith("norm.")):
            continue
        name = name.replace("patch_embed.proj.", "patch_embed.").replace("fc_norm.", "norm.")
        state["head.1." + name.removeprefix("head.") if name.startswith("head.") else name] = value
    if "cls_token" not in state or "pos_embed" not in state or state["pos_embed"].ndim != 3:
        raise InputError(f"teacher {path}: lacks AudioMAE's class token or positions; it is of another model")
    state["special_tokens"] = state.pop("cls_token")
    width, num_patches = state["pos_embed"].shape[2], state["pos_embed"].shape[1] - 1
    layout = Layout(find_strides(num_patches, path), heads_of(width, path), time_major=True, mean_pool=mean_pool)
    return SpectrogramTeacher(build_vit(state, layout, path), (), AUDIOSET_MEAN, AUDIOSET_STD)
