"""The network of BEATs (Chen et al. 2022, "BEATs: Audio Pre-Training with Acoustic Tokenizers"), for inference.

Parts bear the names of the published checkpoints' keys, so that a checkpoint is loaded without a table of names. Two
things differ in form, not in value: the weight norm of the position convolution is folded into its weight, and the
position embedding that all layers share is there once, in layer 0.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu_accurate": functools.partial(F.gelu, approximate="tanh"),
    "gelu_fast": functools.partial(F.gelu, approximate="tanh"),  # its older name
    "relu": F.relu,
    "tanh": torch.tanh,
    "linear": nn.Identity(),
    "glu": nn.Identity(),  # the gate is in fc1
}


@dataclass(frozen=True)
class BeatsConfig:
    """What a checkpoint's ``cfg`` says of the network; where it is silent, the published defaults.

    Attributes:
        input_patch_size: side P of a patch, in frames and mel bins.
        embed_dim: width of the patch embedding.
        conv_bias: whether the patch embedding has a bias.
        encoder_layers, encoder_embed_dim, encoder_ffn_embed_dim, encoder_attention_heads: size of the transformer.
        activation_fn: key of :data:`ACTIVATIONS`.
        layer_norm_first: pre-norm blocks, and a norm after the last rather than before the first.
        deep_norm: the residual branch is multiplied by ``(2 * layers) ** 0.25``; post-norm only.
        conv_pos, conv_pos_groups: kernel and groups of the position convolution.
        relative_position_embedding, num_buckets, max_distance: T5's bucketed position bias.
        gru_rel_pos: each query scales that bias by a gate.
        finetuned_model, predictor_class: whether there is a class head, and of how many classes.
    """

    input_patch_size: int
    embed_dim: int = 512
    conv_bias: bool = False
    encoder_layers: int = 12
    encoder_embed_dim: int = 768
    encoder_ffn_embed_dim: int = 3072
    encoder_attention_heads: int = 12
    activation_fn: str = "gelu"
    layer_norm_first: bool = False
    deep_norm: bool = False
    conv_pos: int = 128
    conv_pos_groups: int = 16
    relative_position_embedding: bool = False
    num_buckets: int = 320
    max_distance: int = 1280
    gru_rel_pos: bool = False
    finetuned_model: bool = False
    predictor_class: int = 527


class Beats(nn.Module):
    """Spectrogram to tokens; the class head, if any, is ``predictor``, or else None."""

    def __init__(self, config: BeatsConfig):
        super().__init__()
        side, width = config.input_patch_size, config.encoder_embed_dim
        self.patch_embedding = nn.Conv2d(1, config.embed_dim, side, stride=side, bias=config.conv_bias)
        self.layer_norm = nn.LayerNorm(config.embed_dim)
        self.post_extract_proj = nn.Linear(config.embed_dim, width) if config.embed_dim != width else None
        self.encoder = Encoder(config)
        self.predictor = nn.Linear(width, config.predictor_class) if config.finetuned_model else None

    def forward(self, fbank: Tensor) -> Tensor:
        """``(B, T, F)`` normalised log-mel -> ``(B, N, D)`` tokens, time-major; a rest of frames drops out."""
        patches = self.patch_embedding(fbank.unsqueeze(1).to(self.patch_embedding.weight.dtype))
        x = self.layer_norm(patches.flatten(2).transpose(1, 2))
        return self.encoder(x if self.post_extract_proj is None else self.post_extract_proj(x))


class Encoder(nn.Module):
    """Position convolution, then transformer layers with one position bias for all."""

    def __init__(self, config: BeatsConfig):
        super().__init__()
        width, kernel = config.encoder_embed_dim, config.conv_pos
        convolution = nn.Conv1d(width, width, kernel, padding=kernel // 2, groups=config.conv_pos_groups)
        self.pos_conv = nn.ModuleList([convolution])
        self.layers = nn.ModuleList([Layer(config, owns_bias=index == 0) for index in range(config.encoder_layers)])
        self.layer_norm = nn.LayerNorm(width)
        self.layer_norm_first = config.layer_norm_first

    def forward(self, x: Tensor) -> Tensor:
        """``(B, N, D)`` -> the same shape."""
        # An even kernel, padded on both sides, gives one position too many.
        around = self.pos_conv[0](x.transpose(1, 2))[..., : x.shape[1]]
        x = x + F.gelu(around).transpose(1, 2)
        if not self.layer_norm_first:
            x = self.layer_norm(x)
        position_bias = self.layers[0].self_attn.position_bias(x.shape[1])
        for layer in self.layers:
            x = layer(x, position_bias)
        return self.layer_norm(x) if self.layer_norm_first else x


class Layer(nn.Module):
    """Attention and a two-layer perceptron, with the norms after (scaled residual, "deep norm") or before."""

    def __init__(self, config: BeatsConfig, *, owns_bias: bool):
        super().__init__()
        width, hidden = config.encoder_embed_dim, config.encoder_ffn_embed_dim
        self.self_attn = Attention(config, owns_bias=owns_bias)
        self.self_attn_layer_norm = nn.LayerNorm(width)
        self.fc1 = GatedLinear(width, hidden) if config.activation_fn == "glu" else nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)
        self.final_layer_norm = nn.LayerNorm(width)
        self.activation = ACTIVATIONS[config.activation_fn]
        self.layer_norm_first = config.layer_norm_first
        self.residual_scale = (2 * config.encoder_layers) ** 0.25 if config.deep_norm else 1.0

    def forward(self, x: Tensor, position_bias: Tensor | None) -> Tensor:
        if self.layer_norm_first:
            x = x + self.self_attn(self.self_attn_layer_norm(x), position_bias)
            return x + self._perceptron(self.final_layer_norm(x))
        x = self.self_attn_layer_norm(x * self.residual_scale + self.self_attn(x, position_bias))
        return self.final_layer_norm(x * self.residual_scale + self._perceptron(x))

    def _perceptron(self, x: Tensor) -> Tensor:
        return self.fc2(self.activation(self.fc1(x)))


class GatedLinear(nn.Module):
    """``fc1`` of ``activation_fn = "glu"``: one half times the swish of the other."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.linear = nn.Linear(width, 2 * hidden)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.linear(x).chunk(2, dim=-1)
        return value * F.silu(gate)


class Attention(nn.Module):
    """Multi-head self-attention with the gated relative position bias of WavLM (Chen et al. 2021, Section 3.1).

    The published code divides the logits by 32, subtracts their maximum and multiplies again, against overflow in 16
    bits. A softmax does not see it, and the fused attention keeps its logits in float32.
    """

    def __init__(self, config: BeatsConfig, *, owns_bias: bool):
        super().__init__()
        width, self.num_heads = config.encoder_embed_dim, config.encoder_attention_heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(width, width) for _ in range(4))
        self.max_distance, self.relative_attention_bias = config.max_distance, None
        if config.relative_position_embedding and owns_bias:
            self.relative_attention_bias = nn.Embedding(config.num_buckets, self.num_heads)
        self.grep_linear = self.grep_a = None
        if config.gru_rel_pos:
            self.grep_linear = nn.Linear(width // self.num_heads, 8)
            self.grep_a = nn.Parameter(torch.ones(1, self.num_heads, 1, 1))

    def position_bias(self, length: int) -> Tensor | None:
        """``(H, N, N)``, [head, query, key], for N = ``length``; None without relative positions. Layer 0 only."""
        if self.relative_attention_bias is None:
            return None
        table = self.relative_attention_bias
        buckets = _buckets_on(table.weight.device, length, table.num_embeddings, self.max_distance)
        return table(buckets).permute(2, 0, 1).contiguous()

    def forward(self, x: Tensor, position_bias: Tensor | None) -> Tensor:
        """``(B, N, D)`` and ``(H, N, N)`` or None -> ``(B, N, D)``."""
        heads = (part(x).unflatten(-1, (self.num_heads, -1)) for part in (self.q_proj, self.k_proj, self.v_proj))
        query, key, value = (part.transpose(1, 2) for part in heads)
        if position_bias is not None:
            position_bias = position_bias.to(query.dtype).unsqueeze(0)
            if self.grep_linear is not None:
                position_bias = self._gate(query).to(query.dtype) * position_bias
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=position_bias)
        return self.out_proj(mixed.transpose(1, 2).flatten(2))

    def _gate(self, query: Tensor) -> Tensor:
        """``(B, H, N, D / H)`` -> ``(B, H, N, 1)``: ``a * (b * grep_a - 1) + 2``, each gate of four summed logits."""
        gates = self.grep_linear(query).unflatten(-1, (2, 4)).sum(-1).sigmoid()
        first, second = gates.chunk(2, dim=-1)
        return first * (second * self.grep_a - 1.0) + 2.0


def relative_buckets(length: int, num_buckets: int, max_distance: int) -> Tensor:
    """T5's buckets (Raffel et al. 2020) of ``key - query``: ``(length, length)`` int64, [query, key].

    Half of the buckets are for keys after the query. In each half, the near distances have a bucket each; those beyond
    share logarithmically wider ones, and the last takes everything from ``max_distance``.
    """
    place = torch.arange(length, device="cpu")
    offset = place[None, :] - place[:, None]
    half = num_buckets // 2
    near, distance = half // 2, offset.abs()
    # In float32 and in this order, as published: a distance on the edge of a bucket must fall on the same side.
    octave = torch.log(distance.clamp(min=1).float() / near) / math.log(max_distance / near)
    far = (near + (octave * (half - near)).long()).clamp(max=half - 1)
    return torch.where(distance < near, distance, far) + half * (offset > 0)


@functools.lru_cache(maxsize=8)
def _buckets_on(device: torch.device, *args: int) -> Tensor:
    """``relative_buckets(*args)``, computed and sent to the device once for each length."""
    return relative_buckets(*args).to(device)
