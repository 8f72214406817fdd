"""Starting weights from a timm ViT or DeiT checkpoint file (Table 7, "ImageNet Init"), such as vit_base_patch16_224.

What the image model has and ours has not (class token, classifier, ...) is ignored; what ours has beside the blocks
(MAE module, decoder, head) stays fresh.
"""

from __future__ import annotations

from pathlib import Path

import torch.nn.functional as F
from torch import Tensor

from fastsskd.errors import InputError
from fastsskd.foreign import load_checkpoint, recognise, weights_in
from fastsskd.model import ACM
from fastsskd.patches import PATCH

_SPECIAL_TOKENS = ("cls_token", "dist_token", "reg_token")


def initialise_from_image_model(model: ACM, path: Path) -> dict[str, list[str]]:
    """Load a timm ViT's patch embedding, positions, blocks and final norm into ``model``.

    Returns:
        Keys by what happened to them: ``loaded``, ``resized``, ``ignored`` (of the file), ``missing`` (fresh in ours).

    Raises:
        InputError: not a file of weights, not a ViT, or one of another width or depth.
    """
    state = weights_in(load_checkpoint(path))
    for needed in ("patch_embed.proj.weight", "patch_embed.proj.bias", "pos_embed", "blocks.0.attn.qkv.weight"):
        if needed not in state:
            raise InputError(
                f"checkpoint {path}: looks like {recognise(state)[1]}, without {needed}; expected a timm ViT such as "
                "vit_base_patch16_224"
            )
    own, take = model.state_dict(), {}
    take["patch_embed.weight"] = patch_weight(state["patch_embed.proj.weight"])
    take["patch_embed.bias"] = state["patch_embed.proj.bias"]
    num_special = sum(name in state for name in _SPECIAL_TOKENS)
    take["pos_embed"] = image_positions(state["pos_embed"][:, num_special:], model.grid_size, path)
    take |= {name: value for name, value in state.items() if name.startswith(("blocks.", "norm."))}
    for name, value in take.items():
        if name not in own or own[name].shape != value.shape:
            found = tuple(own[name].shape) if name in own else "nothing of that name"
            raise InputError(
                f"checkpoint {path}: {name} is {tuple(value.shape)}, this model has {found}; change model.size"
            )
    lacking = [name for name in own if name.startswith(("blocks.", "norm.")) and name not in take]
    if lacking:
        raise InputError(f"checkpoint {path}: lacks {lacking[0]}; it has fewer blocks than this model")
    model.load_state_dict({**own, **take})
    used = {"patch_embed.proj.weight", "patch_embed.proj.bias", "pos_embed"} | take.keys()
    return {
        "loaded": [name for name in take if name not in ("pos_embed", "patch_embed.weight")],
        "resized": ["pos_embed", "patch_embed.weight"],
        "ignored": [name for name in state if name not in used],
        "missing": [name for name in own if name not in take],
    }


def patch_weight(weight: Tensor) -> Tensor:
    """``(D, 3, 16, 16)`` image filters (height, width) -> ``(D, 256)`` for our patches of frames by mel bins.

    The colours are summed: a grey picture has its one value in all three. Height is frequency and width is time, as in
    AST; ours count time first.

    Raises:
        InputError: patches of another size.
    """
    if weight.shape[2:] != (PATCH, PATCH):
        raise InputError(f"the image model has patches of {tuple(weight.shape[2:])}; choose one with patch16")
    return weight.sum(dim=1).transpose(1, 2).reshape(len(weight), PATCH * PATCH)


def image_positions(pos_embed: Tensor, grid_size: tuple[int, int], path: Path) -> Tensor:
    """``(1, G * G, D)`` positions of a square picture -> ``(1, N, D)`` of our grid (time, frequency), bilinear."""
    side = round(pos_embed.shape[1] ** 0.5)
    if side * side != pos_embed.shape[1]:
        raise InputError(f"checkpoint {path}: {pos_embed.shape[1]} positions are not a square picture's")
    grid = pos_embed.reshape(1, side, side, -1).permute(0, 3, 1, 2)  # (1, D, frequency, time)
    grid = F.interpolate(grid.float(), size=(grid_size[1], grid_size[0]), mode="bilinear", align_corners=False)
    return grid.permute(0, 3, 2, 1).reshape(1, grid_size[0] * grid_size[1], -1)
