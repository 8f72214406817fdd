"""The network that AST and AudioMAE share, a ViT over patches of a spectrogram, and the teacher around it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn

import fastsskd_kernels as kernels
from fastsskd.errors import InputError
from fastsskd.patches import NUM_MEL_BINS, PATCH

AUDIOSET_MEAN, AUDIOSET_STD = -4.2677393, 4.5689974
STRIDES = (10, 12, 14, 16)
RECIPE_FRAMES = (1024, 512, 128)
"""Input lengths of the published recipes: AudioSet and VGGSound, ESC-50, Speech Commands."""


@dataclass(frozen=True)
class Layout:
    """What the weights do not tell of a model.

    Attributes:
        strides: of the patches, in mel bins and frames.
        num_heads: of each block.
        time_major: tokens run through the mel bins first (AudioMAE), rather than through the frames (AST).
        mean_pool: the clip feature is the norm of the patches' mean, rather than the mean of the normed special tokens.
        eps, head_eps: of the layer norms, and of the head's own.
    """

    strides: tuple[int, int]
    num_heads: int
    time_major: bool = False
    mean_pool: bool = False
    eps: float = 1e-6
    head_eps: float = 1e-5


class SpectrogramViT(nn.Module):
    """Takes every size that ``layout`` does not name from the shapes of the weights.

    Args:
        state: ``patch_embed.{weight,bias}`` (D, 1, 16, 16); ``special_tokens`` (1, S, D) and ``pos_embed``
            (1, S + N, D); ``blocks.I.*`` and ``norm.*`` by timm's names; ``head.0.*`` (a norm, may lack) and
            ``head.1.*`` (may lack).
        layout: the rest.
    """

    def __init__(self, state: dict[str, Tensor], layout: Layout):
        super().__init__()
        self.layout, dim = layout, state["pos_embed"].shape[2]
        self.embed_dim, self.num_special = dim, state["special_tokens"].shape[1]
        self.num_patches = state["pos_embed"].shape[1] - self.num_special
        strides = layout.strides[::-1] if layout.time_major else layout.strides
        self.patch_embed = nn.Conv2d(1, dim, kernel_size=PATCH, stride=strides)
        self.special_tokens = nn.Parameter(torch.empty(1, self.num_special, dim))
        self.pos_embed = nn.Parameter(torch.empty(1, self.num_special + self.num_patches, dim))
        depth = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks."))
        norm = partial(nn.LayerNorm, eps=layout.eps)
        options = {
            "mlp_ratio": len(state["blocks.0.mlp.fc1.weight"]) / dim,
            "qkv_bias": "blocks.0.attn.qkv.bias" in state,
            "norm_layer": norm,
        }
        self.blocks = nn.ModuleList(Block(dim, layout.num_heads, **options) for _ in range(depth))
        self.norm, self.head = norm(dim), None
        if "head.1.weight" in state:
            own_norm = nn.LayerNorm(dim, eps=layout.head_eps) if "head.0.weight" in state else nn.Identity()
            self.head = nn.Sequential(own_norm, nn.Linear(dim, len(state["head.1.weight"])))

    @property
    def num_frames(self) -> int:
        """The longest input whose patches are as many as the positions."""
        bins, frames = self.layout.strides
        return PATCH + self.num_patches // rows(bins) * frames - 1

    def tokens(self, fbank: Tensor) -> Tensor:
        """``(B, num_frames, 128)`` normalised fbank -> ``(B, S + N, D)``, not yet normed: special tokens first."""
        picture = fbank[:, None] if self.layout.time_major else fbank[:, None].transpose(2, 3)
        patches = self.patch_embed(picture).flatten(2).transpose(1, 2)
        x = torch.cat([self.special_tokens.expand(len(patches), -1, -1), patches], dim=1) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return x

    def forward(self, fbank: Tensor) -> tuple[Tensor, Tensor]:
        """``(B, num_frames, 128)`` normalised fbank -> logits ``(B, C)`` (C = 0: no head), clip feature ``(B, D)``."""
        tokens = self.tokens(fbank)
        if self.layout.mean_pool:
            clip = self.norm(tokens[:, self.num_special :].mean(dim=1))
        else:
            clip = self.norm(tokens[:, : self.num_special]).mean(dim=1)
        return (clip.new_zeros(len(clip), 0) if self.head is None else self.head(clip)), clip


class SpectrogramTeacher(nn.Module):
    """A ViT over a spectrogram behind the teacher protocol, with AST's features.

    Args:
        model: gives logits and the clip feature.
        classes: names in the order of the logits; empty if the checkpoint has none.
        mean, std: normalisation of the log-mel features, ``(x - mean) / (2 * std)``.
    """

    score_kind = "logits"

    def __init__(self, model: SpectrogramViT, classes: tuple[str, ...], mean: float, std: float):
        super().__init__()
        self.model, self.classes, self.embed_dim = model.eval().requires_grad_(False), classes, model.embed_dim
        self.mean, self.std = mean, std

    @torch.no_grad()
    def forward(self, waveform: Tensor) -> tuple[Tensor, Tensor]:
        """``(B, S)`` waveform at 16 kHz -> logits ``(B, C)`` and clip features ``(B, D)``, float32.

        Raises:
            InputError: clips longer than those the teacher was trained on; shorter ones are padded.
        """
        logits, clip = self.model(self.features(waveform))
        return logits.float(), clip.float()

    def features(self, waveform: Tensor) -> Tensor:
        """``(B, S)`` waveform -> ``(B, num_frames, 128)``: AST's input, zero-padded before it is normalised."""
        longest = self.model.num_frames
        if kernels.num_frames(waveform.shape[1]) > longest:
            raise InputError(
                f"teacher: trained on clips of {longest / 100:.1f} s, it cannot hear {waveform.shape[1] / 16000:g} s; "
                "lower data.seconds to that, or use a teacher of longer clips"
            )
        waveform = waveform.float()
        fbank = kernels.fbank(waveform - waveform.mean(dim=1, keepdim=True), num_mel_bins=NUM_MEL_BINS)
        return (kernels.pad_frames(fbank, longest) - self.mean) / (2 * self.std)

    def train(self, mode: bool = True) -> SpectrogramTeacher:
        """Stays in evaluation mode: a teacher inside a module being trained must not change with it."""
        return super().train(False)


def build_vit(state: dict[str, Tensor], layout: Layout, path: Path) -> SpectrogramViT:
    """The model with the weights in ``state``, copied to float32.

    Raises:
        InputError: a weight is missing, left over, or of another shape than the others ask for.
    """
    _check_sizes(state, path)
    width, patch = state["pos_embed"].shape[2], tuple(state["patch_embed.weight"].shape[1:])
    if patch != (1, PATCH, PATCH):
        raise InputError(f"teacher {path}: its patches are {patch}, expected one channel of {PATCH} x {PATCH}")
    if width % layout.num_heads:
        raise InputError(f"teacher {path}: width {width} is not a multiple of its {layout.num_heads} heads")
    with torch.device("meta"):
        model = SpectrogramViT(state, layout)
    own = model.state_dict()
    for name in own | state:
        if name not in state:
            raise InputError(f"teacher {path}: lacks {name}; the file is not whole, or of another model")
        if name not in own:
            raise InputError(f"teacher {path}: has {name}, which this model does not know; it is of another model")
        if own[name].shape != state[name].shape:
            found, wanted = tuple(state[name].shape), tuple(own[name].shape)
            raise InputError(f"teacher {path}: {name} is {found}, the other weights ask for {wanted}")
    model.to_empty(device="cpu").load_state_dict(state)
    return model


def _check_sizes(state: dict[str, Tensor], path: Path) -> None:
    """Raise unless the weights that tell the model's sizes are there and can tell them."""
    for name, dims in (
        ("patch_embed.weight", 4),
        ("special_tokens", 3),
        ("pos_embed", 3),
        ("blocks.0.mlp.fc1.weight", 2),
    ):
        if name not in state:
            raise InputError(f"teacher {path}: lacks {name}; the file is not whole, or of another model")
        if state[name].ndim != dims:
            raise InputError(f"teacher {path}: {name} is {tuple(state[name].shape)}, expected {dims} dimensions")
    if "head.1.weight" in state and state["head.1.weight"].ndim != 2:
        raise InputError(f"teacher {path}: head.1.weight is {tuple(state['head.1.weight'].shape)}, expected a matrix")
    for name, value in state.items():
        if not value.is_floating_point():
            raise InputError(f"teacher {path}: {name} holds {value.dtype}; only floating point weights can be used")
    numbers = {name.split(".")[1] for name in state if name.startswith("blocks.")}
    if numbers != {str(number) for number in range(len(numbers))}:
        raise InputError(f"teacher {path}: its blocks are {', '.join(sorted(numbers))[:80]}, not numbered from 0")


def join(state: dict[str, Tensor], names: Sequence[str], into: str, dim: int, path: Path) -> None:
    """Replace the weights ``names`` by one tensor: one after the other along ``dim``.

    Raises:
        InputError: they are not all of one shape and type.
    """
    parts = [state.pop(name) for name in names]
    kinds = {(part.shape, part.dtype) for part in parts}
    if parts[0].ndim <= dim or len(kinds) > 1:
        found = ", ".join(f"{part.dtype} {tuple(part.shape)}" for part in parts)
        raise InputError(f"teacher {path}: {', '.join(names)} are {found}; expected the same of all")
    state[into] = torch.cat(parts, dim=dim)


def heads_of(width: int, path: Path) -> int:
    """Heads of a model that does not name them: 64 wide each, as in every published ViT, DeiT, AST and AudioMAE."""
    if width % 64:
        raise InputError(f"teacher {path}: width {width} is not a multiple of 64, so its heads cannot be told")
    return width // 64


def rows(stride: int) -> int:
    """Patches along the 128 mel bins: 12, 10, 9 and 8 at a stride of 10, 12, 14 and 16."""
    return patches_along(NUM_MEL_BINS, stride)


def patches_along(length: int, stride: int) -> int:
    """Patches that fit into ``length`` bins or frames."""
    return (length - PATCH) // stride + 1


def find_strides(num_patches: int, path: Path) -> tuple[int, int]:
    """The patches' strides in mel bins and frames, from the file's name or else from the number of positions.

    Names are as the published ``audioset_10_10_0.4593.pth``. The numbers of positions of the recipes' input lengths
    seldom agree for two pairs of strides; where they do, equal strides are taken before others.

    Raises:
        InputError: it cannot be told.
    """
    number = "|".join(map(str, STRIDES))
    named = re.search(rf"(?<!\d)({number})[_-]({number})(?!\d)", path.stem)
    if named and num_patches % rows(int(named[1])) == 0:
        return int(named[1]), int(named[2])
    fitting = [
        (bins, frames)
        for bins in STRIDES
        for frames in STRIDES
        if any(rows(bins) * patches_along(length, frames) == num_patches for length in RECIPE_FRAMES)
    ]
    fitting = [pair for pair in fitting if pair[0] == pair[1]] or fitting
    if len(fitting) != 1:
        raise InputError(
            f"teacher {path}: the strides of its patches cannot be told from {num_patches} positions; put them into "
            "the file's name as in audioset_10_10_0.4593.pth (mel bins, then frames)"
        )
    return fitting[0]
