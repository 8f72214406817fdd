"""Learning rate and parameter groups: functions of the configuration and the step, so resume has nothing to save."""

from __future__ import annotations

import math

import torch
from torch import nn

from fastsskd.config import OptimConfig, StageConfig


def learning_rate(step: int, total_steps: int, warmup_steps: int, peak: float, schedule: str) -> float:
    """Linear warm-up to ``peak``, then a cosine to zero or a constant. ``step`` counts from 0."""
    if step < warmup_steps:
        return peak * ((step + 1) / warmup_steps)  # in this order it never exceeds the peak
    if schedule == "constant":
        return peak
    done = (step - warmup_steps) / max(total_steps - warmup_steps, 1)
    return 0.5 * peak * (1.0 + math.cos(math.pi * done))


def build_optimizer(
    module: nn.Module, stage: StageConfig, optim: OptimConfig, adamw: type[torch.optim.AdamW] = torch.optim.AdamW
) -> torch.optim.AdamW:
    """AdamW over the module's trainable parameters, one group for each (layer, decay or not).

    Each group has ``lr_scale``, by which the learning rate of a step is multiplied: ``layer_decay`` to the power of the
    layer's distance from the head.
    """
    depth = 1 + max((_layer(name)[1] for name, _ in module.named_parameters()), default=0)
    groups: dict[tuple[float, bool], dict] = {}
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        # ZeRO-3 leaves empty placeholders, whose own shape says nothing; ds_shape is the whole parameter's.
        dims = len(getattr(parameter, "ds_shape", parameter.shape))
        decays = dims > 1 and not name.endswith(("pos_embed", "mask_token", "pool.query"))
        kind, index = _layer(name)
        distance = {"embed": depth + 1, "block": depth - index, "top": 0}[kind]
        key = (stage.layer_decay**distance, decays)
        decay = optim.weight_decay if decays else 0.0
        group = groups.setdefault(key, {"params": [], "lr_scale": key[0], "weight_decay": decay})
        group["params"].append(parameter)
    # Fused: one pass over the weights, where its parts make several, with tensors of the weights' size between them.
    return adamw(list(groups.values()), lr=stage.lr, betas=optim.betas, fused=True)


def _layer(name: str) -> tuple[str, int]:
    """Where a parameter sits: the embedding, a block of the AFT, or above (decoder, head, MAE module)."""
    parts = name.removeprefix("model.").split(".")
    if parts[0] in ("patch_embed", "pos_embed"):
        return "embed", 0
    if parts[0] == "blocks":
        return "block", int(parts[1])
    return "top", 0


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every group ``lr`` times its ``lr_scale``."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]
