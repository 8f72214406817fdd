"""ViT checkpoints of other projects by timm's names, whichever layout the file has: timm, DeiT, MAE, Google's .npz."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastsskd.errors import InputError
from fastsskd.foreign import beside_weights, recognise, weights_in

_PREFIXES = ("", "opt/target/", "params/")  # of Google's names; the second in files that training continues from
_NEEDED = ("patch_embed.proj.weight", "patch_embed.proj.bias", "pos_embed", "blocks.0.attn.qkv.weight")


@dataclass(frozen=True)
class VitFile:
    """What a file holds.

    Attributes:
        words: the model, for people.
        state: the weights by timm's names; those it does not know keep their own.
        sources: for each of them, its names in the file.
        beside: names in the file that are no weights of the model: optimizer state, epochs, arguments.
        num_heads: None where the file does not tell.
    """

    words: str
    state: dict[str, Tensor]
    sources: dict[str, tuple[str, ...]]
    beside: list[str]
    num_heads: int | None = None

    @property
    def width(self) -> int:
        return self.state["patch_embed.proj.weight"].shape[0]

    @property
    def depth(self) -> int:
        return len({name.split(".")[1] for name in self.state if name.startswith("blocks.")})


def open_vit(checkpoint: Mapping[str, Any], path: Path) -> VitFile:
    """The ViT in an opened checkpoint.

    Raises:
        InputError: it is of another model, or lacks a weight.
    """
    weights = weights_in(checkpoint)
    prefix = next((prefix for prefix in _PREFIXES if f"{prefix}embedding/kernel" in weights), None)
    if prefix is not None:
        return _open_google(weights, prefix, path)
    words = recognise(weights)[1]
    for needed in _NEEDED:
        if needed not in weights:
            raise InputError(
                f"checkpoint {path}: looks like {words}, without {needed}; a model starts from a model.safetensors of "
                "ours, a ViT or DeiT of timm's or Google's (.npz) such as vit_base_patch16_224, or AudioMAE"
            )
    if weights["patch_embed.proj.weight"].ndim != 4 or weights["pos_embed"].ndim != 3:
        shapes = ", ".join(f"{name} {tuple(weights[name].shape)}" for name in _NEEDED[::2])
        raise InputError(f"checkpoint {path}: not a ViT's shapes ({shapes}); it is of another model")
    return VitFile(words, weights, {name: (name,) for name in weights}, beside_weights(checkpoint))


def _open_google(weights: dict[str, Tensor], prefix: str, path: Path) -> VitFile:
    """Google's names and shapes (github.com/google-research/vision_transformer): kernels are (in, out)."""
    google = _Google({name: value for name, value in weights.items() if name.startswith(prefix)}, prefix, path)
    google.take("patch_embed.proj.weight", "embedding/kernel", 4, lambda w: w.permute(3, 2, 0, 1))
    google.take("patch_embed.proj.bias", "embedding/bias", 1)
    newer = f"{prefix}pos_embedding" in weights  # big_vision
    google.take("pos_embed", "pos_embedding" if newer else "Transformer/posembed_input/pos_embedding", 3)
    google.norm("norm", "Transformer/encoder_norm")
    if f"{prefix}cls" in weights:
        google.take("cls_token", "cls", 3)
    block = "Transformer/encoderblock_"
    depth = len({name.split("/")[1] for name in google.short if name.startswith(block)})
    for number in range(depth):
        google.block(f"blocks.{number}", f"{block}{number}", newer)
    for name in ("head", "pre_logits"):
        if f"{prefix}{name}/kernel" in weights:
            google.dense(name, name)
    query = weights.get(f"{prefix}{block}0/MultiHeadDotProductAttention_{0 if newer else 1}/query/kernel")
    if query is None:
        raise InputError(f"checkpoint {path}: has no {block}0; it is of another model than a ViT")
    google.keep_the_rest()
    beside = [name for name in weights if not name.startswith(prefix)]
    return VitFile("a ViT for pictures, Google's .npz", google.state, google.sources, beside, query.shape[1])


class _Google:
    """Takes weights out of Google's names, and notes which."""

    def __init__(self, weights: dict[str, Tensor], prefix: str, path: Path):
        self.weights, self.prefix, self.path = weights, prefix, path
        self.short = [name.removeprefix(prefix) for name in weights]
        self.state: dict[str, Tensor] = {}
        self.sources: dict[str, tuple[str, ...]] = {}

    def get(self, name: str, ndim: int) -> Tensor:
        name = self.prefix + name
        if name not in self.weights:
            raise InputError(f"checkpoint {self.path}: lacks {name}; the file is not whole, or of another model")
        value = self.weights[name]
        if value.ndim != ndim:
            raise InputError(f"checkpoint {self.path}: {name} is {tuple(value.shape)}, expected {ndim} dimensions")
        return value

    def take(self, name: str, source: str, ndim: int, change=lambda w: w) -> None:
        self.state[name] = change(self.get(source, ndim))
        self.sources[name] = (self.prefix + source,)

    def norm(self, name: str, source: str) -> None:
        self.take(f"{name}.weight", f"{source}/scale", 1)
        self.take(f"{name}.bias", f"{source}/bias", 1)

    def dense(self, name: str, source: str) -> None:
        self.take(f"{name}.weight", f"{source}/kernel", 2, lambda w: w.T)
        self.take(f"{name}.bias", f"{source}/bias", 1)

    def block(self, name: str, source: str, newer: bool) -> None:
        """One transformer block; its parts are numbered in two ways."""
        attention, mlp, norm = (0, 0, 1) if newer else (1, 3, 2)
        self.norm(f"{name}.norm1", f"{source}/LayerNorm_0")
        self.norm(f"{name}.norm2", f"{source}/LayerNorm_{norm}")
        heads = f"{source}/MultiHeadDotProductAttention_{attention}"
        for kind, ndim in (("kernel", 3), ("bias", 2)):  # (D, heads, D / heads) and (heads, D / heads)
            names = [f"{heads}/{part}/{kind}" for part in ("query", "key", "value")]
            parts = [self.get(part, ndim) for part in names]
            if len({part.shape for part in parts}) > 1:
                raise InputError(f"checkpoint {self.path}: {', '.join(names)} differ in shape; the file is damaged")
            own = f"{name}.attn.qkv.{'weight' if kind == 'kernel' else 'bias'}"
            self.state[own] = torch.cat([part.flatten(1).T if ndim == 3 else part.flatten() for part in parts])
            self.sources[own] = tuple(self.prefix + part for part in names)
        self.take(f"{name}.attn.proj.weight", f"{heads}/out/kernel", 3, lambda w: w.flatten(0, 1).T)
        self.take(f"{name}.attn.proj.bias", f"{heads}/out/bias", 1)
        self.dense(f"{name}.mlp.fc1", f"{source}/MlpBlock_{mlp}/Dense_0")
        self.dense(f"{name}.mlp.fc2", f"{source}/MlpBlock_{mlp}/Dense_1")

    def keep_the_rest(self) -> None:
        """What is not known keeps its name, for whoever says what becomes of it."""
        known = {source for sources in self.sources.values() for source in sources}
        for name, value in self.weights.items():
            if name not in known:
                self.state[name], self.sources[name] = value, (name,)
