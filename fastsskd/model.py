"""The model: patch embedding, AFT, MAE module, decoder and class head (Figure 2; docs/method.md).

Shapes: a spectrogram is ``(B, T, F)``, frames by mel bins; its patches are ``(B, N, 256)``, time-major, so patch
``n = t * grid_f + f``; tokens are ``(B, N, D)``.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastsskd.attention import Attention
from fastsskd.errors import UsageError
from fastsskd.layer_norm import LayerNorm
from fastsskd.linear import Mlp, use_one_product
from fastsskd.patches import NUM_MEL_BINS, PATCH, num_input_frames, patchify
from fastsskd.stochastic_depth import use_depth


@dataclass(frozen=True)
class Size:
    """Widths, depths and heads of one preset, for the AFT and for the MAE module."""

    embed_dim: int
    depth: int
    num_heads: int
    mae_dim: int
    mae_depth: int
    mae_heads: int


SIZES = {
    "base": Size(768, 12, 12, 256, 4, 4),
    "small": Size(384, 12, 6, 128, 4, 2),
    "tiny": Size(192, 12, 3, 64, 4, 2),
    "micro": Size(192, 6, 3, 64, 2, 2),
    "mini": Size(128, 4, 4, 64, 2, 2),
    "nano": Size(64, 2, 2, 32, 1, 2),
}


ATTENTIONS = ("plain", "simam")
"""Of the AFT's blocks: as in ViT, or its output weighted by :func:`simam`; the weights are the same."""
POOLINGS = ("mean", "attentive")
"""Of the tokens, for the class head: their mean, or :class:`AttentivePool`."""


def _blocks(dim: int, depth: int, heads: int, drop_path: float = 0.0) -> nn.ModuleList:
    """Pre-norm ViT blocks; stochastic depth grows linearly from 0 to ``drop_path``."""
    norm = partial(LayerNorm, eps=1e-6)
    rates = [drop_path * i / max(depth - 1, 1) for i in range(depth)]
    options = {"qkv_bias": True, "norm_layer": norm, "attn_layer": Attention, "mlp_layer": Mlp}
    return nn.ModuleList(use_depth(Block(dim, heads, **options), rate) for rate in rates)


def simam(x: Tensor, energy_lambda: float = 1e-4) -> Tensor:
    """SimAM's parameter-free attention (Yang et al., ICML 2021), over a clip's tokens in place of pixels.

    A neuron counts for more the further it is from the others of its channel: ``x sigmoid(e)`` with the inverse of its
    least energy, ``e = (x - mu)^2 / (4 (var + lambda)) + 0.5``. ``mu`` and ``var`` are of the clip's channel over all
    tokens that are given; the variance has N - 1 below the line, as in the authors' code. In float32 or wider.

    Args:
        x: ``(B, N, D)``; a single token, which has no variance, is multiplied by ``sigmoid(0.5)``.
        energy_lambda: added to the variance; 1e-4 as in the paper.

    Returns:
        ``(B, N, D)``, of the type of ``x``.
    """
    value = x.to(torch.promote_types(x.dtype, torch.float32))
    squared = (value - value.mean(dim=1, keepdim=True)).square()
    variance = squared.sum(dim=1, keepdim=True) / max(x.shape[1] - 1, 1)
    return (value * torch.sigmoid(squared / (4 * (variance + energy_lambda)) + 0.5)).to(x.dtype)


class SimAM(nn.Module):
    """:func:`simam` as a module."""

    def forward(self, x: Tensor) -> Tensor:
        return simam(x)


class MAE(nn.Module):
    """The MAE module of ``AFT(MAE(x_inter))``: encodes the visible patches only and gives back all N tokens.

    The visible tokens pass a narrow transformer and return as a residual on themselves, so the AFT sees those patches
    on the scale of the raw view. Masked places hold the mask token plus their position.
    """

    def __init__(self, embed_dim: int, dim: int, depth: int, num_heads: int):
        super().__init__()
        self.reduce = nn.Linear(embed_dim, dim)
        self.blocks = _blocks(dim, depth, num_heads)
        self.norm = LayerNorm(dim, eps=1e-6)
        self.expand = nn.Linear(dim, embed_dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, embed_dim))

    def forward(self, tokens: Tensor, position: Tensor, ids_keep: Tensor) -> Tensor:
        """Encode the visible tokens and fill the masked places.

        Args:
            tokens: ``(B, N, D)`` patch embeddings with their positions.
            position: ``(1, N, D)`` position embedding.
            ids_keep: ``(B, V)`` int64, the visible patches.

        Returns:
            ``(B, N, D)``: what the AFT's blocks take.
        """
        b, n, d = tokens.shape
        index = ids_keep.unsqueeze(-1).expand(-1, -1, d)
        visible = tokens.gather(1, index)
        x = self.reduce(visible)
        for block in self.blocks:
            x = block(x)
        visible = visible + self.expand(self.norm(x))
        filled = (self.mask_token + position).to(visible.dtype).expand(b, n, d)
        return filled.scatter(1, index, visible)


def sincos_positions(grid_size: tuple[int, int], dim: int) -> Tensor:
    """Sines and cosines of each patch's place: what the learned positions begin as.

    The first half of the dimensions tells the time, the second the frequency, with MAE's wave lengths of 2 pi to
    10000 x 2 pi patches. Random positions of ViT's size, 0.02, say next to nothing beside the patches' own values, and
    a few hundred clips do not teach them.

    Args:
        grid_size: patches along time and along frequency.
        dim: of a token, a multiple of 4.

    Returns:
        ``(1, N, dim)`` float32 in [-1, 1], time-major.
    """
    wave = 10000.0 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    halves = []
    for count in grid_size:
        angle = torch.arange(count, dtype=torch.float64)[:, None] * wave
        halves.append(torch.cat([angle.sin(), angle.cos()], dim=1))
    time, frequency = halves[0][:, None, :], halves[1][None, :, :]
    both = [half.expand(*grid_size, dim // 2) for half in (time, frequency)]
    return torch.cat(both, dim=2).reshape(1, -1, dim).float()


class AttentivePool(nn.Module):
    """Multi-head attention by one learned query over the tokens, as in CoCa's pooler (Yu et al. 2022, Section 3.2).

    The query is learned as it is: the linear map that others put behind it would give another learned query. No MLP
    follows; the class head begins with a LayerNorm.

    Args:
        dim: width of the tokens and of the pool.
        num_heads: as many as the AFT's blocks have.
    """

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.query = nn.Parameter(torch.zeros(1, 1, dim))
        self.kv = nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)
        nn.init.trunc_normal_(self.query, std=0.02)
        for linear in (self.kv, self.proj):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        """``(B, N, D)`` -> ``(B, D)``."""
        b, n, d = tokens.shape
        key, value = self.kv(tokens).view(b, n, 2, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        query = self.query.expand(b, -1, -1).view(b, 1, self.num_heads, -1).transpose(1, 2)
        pooled = nn.functional.scaled_dot_product_attention(query, key, value)
        return self.proj(pooled.reshape(b, d))


class PartCounts(dict[str, int]):
    """Parameters by part. The parts alone are its items, so that they add up; the sum is at hand beside them."""

    @property
    def total(self) -> int:
        return sum(self.values())

    def __missing__(self, name: str) -> int:
        if name == "total":
            return self.total
        raise KeyError(name)


class ACM(nn.Module):
    """Audio classifier with multi-dimensional self-supervision: one set of weights for every stage.

    Args:
        size: widths and depths.
        num_classes: outputs of the class head; 0 leaves the head out.
        grid_size: patches along time and along frequency.
        drop_path: stochastic depth rate of the last block; call ``draw_depth`` before each forward pass in training.
        activation_checkpointing: recompute each block in the backward pass.
        attention: of the AFT's blocks, one of :data:`ATTENTIONS`; the MAE module, which a teacher lacks, has it plain.
        pooling: for the class head, one of :data:`POOLINGS`.
    """

    def __init__(
        self,
        size: Size,
        num_classes: int,
        grid_size: tuple[int, int],
        *,
        drop_path: float = 0.0,
        activation_checkpointing: bool = False,
        attention: str = "plain",
        pooling: str = "mean",
    ):
        super().__init__()
        dim = size.embed_dim
        self.size, self.num_classes, self.grid_size = size, num_classes, grid_size
        self.attention, self.pooling = attention, pooling
        self.embed_dim = dim
        self.activation_checkpointing = activation_checkpointing
        self.patch_embed = nn.Linear(PATCH * PATCH, dim)
        self.pos_embed = nn.Parameter(torch.zeros(1, grid_size[0] * grid_size[1], dim))
        self.blocks = _blocks(dim, size.depth, size.num_heads, drop_path)
        if attention == "simam":
            for block in self.blocks:
                block.ls1 = SimAM()  # timm's LayerScale, ours unused: after attention's projection, before the residual
        self.norm = LayerNorm(dim, eps=1e-6)
        self.mae = MAE(dim, size.mae_dim, size.mae_depth, size.mae_heads)
        self.decoder = nn.Sequential(
            nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim), nn.GELU(), nn.Linear(dim, PATCH * PATCH)
        )
        self.head = nn.Sequential(LayerNorm(dim, eps=1e-6), nn.Linear(dim, num_classes)) if num_classes else None
        self._initialise()
        # Drawn last: the other weights are the same with and without it.
        self.pool = AttentivePool(dim, size.num_heads) if num_classes and pooling == "attentive" else None
        use_one_product(self)

    def _initialise(self) -> None:
        """As MAE: sines and cosines for the positions, Xavier for the linear maps, truncated normal 0.02 for tokens."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        with torch.no_grad():
            self.pos_embed.copy_(sincos_positions(self.grid_size, self.embed_dim))
        nn.init.trunc_normal_(self.mae.mask_token, std=0.02)
        if self.head is not None:
            nn.init.trunc_normal_(self.head[1].weight, std=0.02)

    @property
    def num_patches(self) -> int:
        return self.grid_size[0] * self.grid_size[1]

    def embed(self, patches: Tensor) -> Tensor:
        """``(B, N, 256)`` patches -> ``(B, N, D)`` tokens with positions."""
        return self.patch_embed(patches) + self.pos_embed

    def aft(self, tokens: Tensor) -> Tensor:
        """The Audio Feature Transformer: ``(B, N, D)`` tokens -> ``(B, N, D)`` features."""
        for block in self.blocks:
            if self.activation_checkpointing and torch.is_grad_enabled():
                tokens = checkpoint(block, tokens, use_reentrant=False)
            else:
                tokens = block(tokens)
        return self.norm(tokens)

    def features(self, patches: Tensor) -> Tensor:
        """Features of a spectrogram's patches, ``AFT(x)``: ``(B, N, 256)`` -> ``(B, N, D)``."""
        return self.aft(self.embed(patches))

    def features_inter(self, patches: Tensor, ids_keep: Tensor) -> Tensor:
        """Features of the inter-patch view, ``AFT(MAE(x_inter))``; only the patches in ``ids_keep`` are looked at."""
        return self.aft(self.mae(self.embed(patches), self.pos_embed, ids_keep))

    def decode(self, features: Tensor) -> Tensor:
        """Features -> the 256 pixels of each patch, ``(B, N, 256)``."""
        return self.decoder(features)

    def forward(self, spectrogram: Tensor, *, frozen: bool = False) -> tuple[Tensor | None, Tensor]:
        """Classify.

        Args:
            spectrogram: ``(B, T, F)`` normalised fbank, ``T`` and ``F`` as ``grid_size`` says.
            frozen: without a graph up to the features; the head still has one.

        Returns:
            Logits ``(B, C)`` (None without a head) and the clip feature ``(B, D)``, the AVG pool of the features
            whatever the head's pooling.
        """
        patches = patchify(spectrogram.to(self.patch_embed.weight.dtype))
        with torch.set_grad_enabled(torch.is_grad_enabled() and not frozen):
            features = self.features(patches)
            clip = features.mean(dim=1)
        if self.head is None:
            return None, clip
        return self.head(clip if self.pool is None else self.pool(features)), clip

    def num_parameters(self) -> PartCounts:
        """Number of parameters by part; ``["total"]`` or ``.total`` is their sum."""
        return PartCounts(
            patch_embed=sum(p.numel() for p in self.patch_embed.parameters()),
            pos_embed=self.pos_embed.numel(),
            aft=sum(p.numel() for m in (self.blocks, self.norm) for p in m.parameters()),
            mae=sum(p.numel() for p in self.mae.parameters()),
            decoder=sum(p.numel() for p in self.decoder.parameters()),
            head=sum(p.numel() for m in (self.pool, self.head) if m is not None for p in m.parameters()),
        )


def build_model(
    size: str,
    num_classes: int,
    *,
    seconds: float = 10.0,
    drop_path: float = 0.0,
    activation_checkpointing: bool = False,
    attention: str = "plain",
    pooling: str = "mean",
    seed: int = 0,
) -> ACM:
    """Build a model with fresh weights drawn from ``seed``; the global random state is left as it was.

    Args:
        size: a key of :data:`SIZES`; ``"base"`` is the paper's 92 M.
        num_classes: outputs of the class head, 0 for none.
        seconds: length of the input clips, which sets the position grid.
        attention: of the AFT's blocks, one of :data:`ATTENTIONS`.
        pooling: for the class head, one of :data:`POOLINGS`.

    Raises:
        UsageError: unknown ``size``, ``attention`` or ``pooling``.
    """
    if size not in SIZES:
        raise UsageError(f"model size {size!r} is not one of {', '.join(SIZES)}")
    if attention not in ATTENTIONS:
        raise UsageError(f"model attention {attention!r} is not one of {', '.join(ATTENTIONS)}")
    if pooling not in POOLINGS:
        raise UsageError(f"model pooling {pooling!r} is not one of {', '.join(POOLINGS)}")
    grid_size = (num_input_frames(seconds) // PATCH, NUM_MEL_BINS // PATCH)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return ACM(
            SIZES[size],
            num_classes,
            grid_size,
            drop_path=drop_path,
            activation_checkpointing=activation_checkpointing,
            attention=attention,
            pooling=pooling,
        )
