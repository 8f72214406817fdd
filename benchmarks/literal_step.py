"""The step of the paper's pseudo code, taken literally, and each of its differences from ours by itself."""

import contextlib
import unittest.mock
from collections.abc import Callable

import timm.layers
import torch
from torch import Tensor, nn

from fastsskd.attention import Attention
from fastsskd.batch import Batch
from fastsskd.layer_norm import LayerNorm
from fastsskd.linear import Linear
from fastsskd.pretrain import Pretrain
from fastsskd.views import Views


class ThreePasses(Pretrain):
    """The masked views one after the other, as the formulas are written."""

    def _features(self, views: Views, raw: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        model, dtype = self.model, self.model.patch_embed.weight.dtype
        raw_patches = views.raw.to(dtype)
        with torch.set_grad_enabled(self.loss.raw_gradient):
            raw = model.features(raw_patches)
        intra = model.features(views.intra.to(dtype))
        return raw, intra, self._inter(views, raw_patches)

    def _inter(self, views: Views, raw_patches: Tensor) -> Tensor:
        return self.model.features_inter(raw_patches, views.ids_keep)


class MaskedTokensToo(Pretrain):
    """Masked places hold the mask token before the MAE module, which then sees all N tokens."""

    def _features(self, views: Views, raw: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        model, dtype = self.model, self.model.patch_embed.weight.dtype
        raw_patches = views.raw.to(dtype)
        with torch.set_grad_enabled(self.loss.raw_gradient):
            raw = model.features(raw_patches)
        intra = model.embed(views.intra.to(dtype))
        intra, inter = model.aft(torch.cat([intra, self._all_tokens(views, raw_patches)])).chunk(2)
        return raw, intra, inter

    def _all_tokens(self, views: Views, raw_patches: Tensor) -> Tensor:
        model = self.model
        mask = views.inter_mask.unsqueeze(-1)
        tokens = torch.where(mask, (model.mae.mask_token + model.pos_embed), model.embed(raw_patches))
        x = model.mae.reduce(tokens)
        for block in model.mae.blocks:
            x = block(x)
        return tokens + model.mae.expand(model.mae.norm(x))


class Literal(ThreePasses, MaskedTokensToo):
    """Both."""

    def _inter(self, views: Views, raw_patches: Tensor) -> Tensor:
        return self.model.aft(self._all_tokens(views, raw_patches))


class Plain:
    """An engine without DeepSpeed: float32, torch's AdamW."""

    def __init__(self, module: nn.Module, device: torch.device):
        self.module = module.to(device)
        self.optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=1e-4)

    def __call__(self, batch: Batch) -> tuple[Tensor, dict]:
        return self.module(batch)

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def step(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


class Patched(nn.Module):
    """A module whose layers take another way forward: pairs of a class and what replaces methods of it."""

    def __init__(self, module: nn.Module, *patches: tuple[type[nn.Module], dict[str, Callable]]):
        super().__init__()
        self.module, self.patches = module, patches

    def forward(self, batch: Batch) -> tuple[Tensor, dict]:
        with contextlib.ExitStack() as patched:
            for kind, methods in self.patches:
                patched.enter_context(unittest.mock.patch.multiple(kind, **methods))
            return self.module(batch)


def with_torchs_layers(module: nn.Module) -> nn.Module:
    """torch's linear maps, GELU and layer norms."""
    layer_norm = (LayerNorm, {"forward": nn.LayerNorm.forward})
    return Patched(module, (Linear, {"_takes": lambda layer, x: False}), layer_norm)


def with_timm_attention(module: nn.Module, *, fused: bool) -> nn.Module:
    """timm's attention in the module's blocks: torch's fused one, or plain products of all clips at once."""
    for layer in module.modules():
        if isinstance(layer, Attention):
            layer.fused_attn = fused
    return Patched(module, (Attention, {"forward": timm.layers.Attention.forward}))
