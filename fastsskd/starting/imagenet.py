"""Starting weights from a ViT of other projects: ImageNet's (Table 7, "ImageNet Init") or AudioMAE's encoder.

What that model has and ours has not (class token, classifier, decoder) is ignored; what ours has beside the encoder
(MAE module, decoder, head) stays fresh. A weight that would change what the blocks compute is never left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from timm.layers import resample_abs_pos_embed
from torch import Tensor

from fastsskd.errors import InputError
from fastsskd.model import ACM, SIZES
from fastsskd.patches import NUM_MEL_BINS, PATCH
from fastsskd.starting.report import StartReport
from fastsskd.starting.vit_file import VitFile, open_vit

MEL_PATCHES = NUM_MEL_BINS // PATCH
_IGNORED = {
    ("cls_token", "dist_token", "reg_token"): "no special tokens here",
    ("head.", "head_dist.", "pre_logits.", "attn_pool."): "for its own classes",
    ("fc_norm.",): "after its pooling; here the norm is before",
    ("decoder", "mask_token"): "of its own pre-training",
}


def weights_of_vit(model: ACM, checkpoint: Mapping[str, Any], path: Path) -> tuple[dict[str, Tensor], StartReport]:
    """What ``model`` takes from an opened checkpoint: patch embedding, positions, blocks and final norm.

    Returns:
        Weights by the model's names, and what became of each.

    Raises:
        InputError: not a ViT, one of another width or depth, or one that computes something else.
    """
    vit = open_vit(checkpoint, path)
    _check_size(vit, model, path)
    sound = vit.state["patch_embed.proj.weight"].shape[1] == 1  # AudioMAE: frames by mel bins, time-major
    grid, positions = _positions(vit, path, sound)
    report = StartReport(f"{vit.words}, {vit.width} wide, {vit.depth} blocks, {grid[0]} x {grid[1]} positions")
    own, take = model.state_dict(), {}
    for name, value in vit.state.items():
        why = next((why for marks, why in _IGNORED.items() if name.startswith(marks)), "")
        if why:
            for source in vit.sources[name]:
                report.add("ignored", source, (source,), why)
            continue
        fate, note, target = "loaded", "", name
        if name == "patch_embed.proj.weight":
            target, value = "patch_embed.weight", patch_weight(value, path)
            if not sound:
                fate, note = "resized", "3 colours summed, height to frequency"
        elif name == "pos_embed":
            value = resize_positions(positions, grid, model.grid_size)
            if grid != model.grid_size:
                fate, note = "resized", resize_note(grid, model.grid_size)
        target = target.replace("patch_embed.proj.", "patch_embed.")
        _check_weight(own, target, value, name, path)
        take[target] = value
        report.add(fate, target, vit.sources[name], note)
    for name in vit.beside:
        report.add("ignored", name, (name,), "not a weight of the model")
    needed = ("blocks.",) if "fc_norm.weight" in vit.state else ("blocks.", "norm.")
    for name in own:
        if name not in take:
            if name.startswith(needed):
                raise InputError(f"checkpoint {path}: lacks {name}; the file is not whole, or of another model")
            report.add("missing", name, note="fresh")
    return take, report


def patch_weight(weight: Tensor, path: Path) -> Tensor:
    """Filters of 16 x 16 pixels -> ``(D, 256)`` for our patches of frames by mel bins.

    ``(D, 3, 16, 16)`` of a model for pictures (height, width): the colours are summed, for a grey picture has its one
    value in all three. Height is frequency and width is time, as in AST; ours count time first. ``(D, 1, 16, 16)`` of
    AudioMAE is (time, frequency) already.

    Raises:
        InputError: another number of colours, or patches of another size.
    """
    if weight.shape[2:] != (PATCH, PATCH) or weight.shape[1] not in (1, 3):
        raise InputError(
            f"checkpoint {path}: its patches are {tuple(weight.shape[1:])} (channels, height, width); choose a model "
            f"with patch{PATCH} and 3 colours, or AudioMAE"
        )
    if weight.shape[1] == 3:
        weight = weight.sum(dim=1).transpose(1, 2)
    return weight.reshape(len(weight), PATCH * PATCH)


def resize_positions(pos_embed: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """``(1, N, D)`` positions of a grid (time, frequency) -> of another one, as timm does it: bicubic, antialiased."""
    return resample_abs_pos_embed(pos_embed, new_size=list(new), old_size=list(old), num_prefix_tokens=0)


def resize_note(old: tuple[int, int], new: tuple[int, int]) -> str:
    """:func:`resize_positions` in words."""
    return f"{old[0]} x {old[1]} to {new[0]} x {new[1]} (time, frequency), bicubic"


def _positions(vit: VitFile, path: Path, sound: bool) -> tuple[tuple[int, int], Tensor]:
    """The grid (time, frequency) and its positions, time-major, without those of special tokens."""
    pos_embed, whole = vit.state["pos_embed"], vit.state["pos_embed"].shape[1]
    special = sum(vit.state[name].shape[1] for name in ("cls_token", "dist_token", "reg_token") if name in vit.state)
    for number in (whole - special, whole):  # some models have no positions for their special tokens
        side = round(max(number, 0) ** 0.5)
        if sound and number > 0 and number % MEL_PATCHES == 0:
            return (number // MEL_PATCHES, MEL_PATCHES), pos_embed[:, whole - number :]
        if not sound and number > 0 and side * side == number:
            square = pos_embed[:, whole - number :].reshape(1, side, side, -1)  # (1, frequency, time, D)
            return (side, side), square.transpose(1, 2).reshape(1, number, -1)
    expected = f"rows of {MEL_PATCHES}, as patches that do not overlap have" if sound else "a square"
    raise InputError(f"checkpoint {path}: {whole} positions, {special} of special tokens: the rest are not {expected}")


def _check_size(vit: VitFile, model: ACM, path: Path) -> None:
    """Raise unless the file's model is as wide and deep as ours; say which of ours is."""
    size = model.size
    heads = size.num_heads if vit.num_heads is None else vit.num_heads
    if (vit.width, vit.depth, heads) == (size.embed_dim, size.depth, size.num_heads):
        return
    fitting = [
        name
        for name, other in SIZES.items()
        if (other.embed_dim, other.depth) == (vit.width, vit.depth) and vit.num_heads in (None, other.num_heads)
    ]
    about = f"{vit.width} wide, {vit.depth} blocks" + (f", {heads} heads" if vit.num_heads else "")
    remedy = f'set model.size = "{fitting[0]}"' if fitting else "no model.size is like that; base, small and tiny are "
    remedy += "" if fitting else "like ViT's and DeiT's"
    raise InputError(
        f"checkpoint {path}: {vit.words}, {about}; this model is {size.embed_dim} wide with {size.depth} blocks of "
        f"{size.num_heads} heads; {remedy}"
    )


def _check_weight(own: Mapping[str, Tensor], target: str, value: Tensor, name: str, path: Path) -> None:
    """Raise for a weight that the model has not, or that cannot be one."""
    if target not in own or not target.startswith(("patch_embed.", "pos_embed", "blocks.", "norm.")):
        raise InputError(
            f"checkpoint {path}: has {name}, which a plain ViT has not: without it the blocks would compute something "
            "else; choose a plain ViT such as vit_base_patch16_224"
        )
    if own[target].shape != value.shape:
        raise InputError(f"checkpoint {path}: {name} gives {tuple(value.shape)}, expected {tuple(own[target].shape)}")
    if not value.is_floating_point() or not value.isfinite().all():
        raise InputError(f"checkpoint {path}: {name} holds {value.dtype} or numbers that are not finite; get it again")
