"""Stochastic depth whose draws belong to the clips.

Drawn from a generator of the rank, it would be another one on another number of ranks; drawn from the clips' seeds, a
step is the same step however its clips are spread.
"""

from __future__ import annotations

from torch import Tensor, nn

import fastsskd_kernels as kernels

_STREAM = 120  # random stream


class DropPath(nn.Module):
    """Leaves a residual branch out for a share of the clips, and makes up for it in the others (Huang et al. 2016).

    Args:
        drop_prob: the share, in [0, 1).
    """

    def __init__(self, drop_prob: float):
        super().__init__()
        self.drop_prob = drop_prob
        self.kept: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """``(B, ...)`` -> the same; in training only, and for the clips last given to :func:`draw_depth`."""
        if not self.training:
            return x
        if self.kept is None or len(self.kept) != len(x):
            raise RuntimeError("stochastic depth: call draw_depth(model, seed) with the batch's seeds before the model")
        factor = self.kept.to(x.dtype) / (1.0 - self.drop_prob)
        return x * factor.view(-1, *[1] * (x.dim() - 1))


def draw_depth(model: nn.Module, seed: Tensor) -> None:
    """Decide which branches of ``model`` each clip of the next batch passes.

    Args:
        model: any; nothing happens where it has no :class:`DropPath`.
        seed: ``(B,)`` int64, one a clip and epoch.
    """
    paths = [module for module in model.modules() if isinstance(module, DropPath)]
    if not paths:
        return
    draws = kernels.uniform(seed, len(paths), stream=_STREAM)
    for path, draw in zip(paths, draws.unbind(1), strict=True):
        path.kept = draw >= path.drop_prob


def use_depth(block: nn.Module, drop_prob: float) -> nn.Module:
    """Give both branches of one of timm's blocks, made without stochastic depth, this kind of it."""
    if drop_prob:
        block.drop_path1, block.drop_path2 = DropPath(drop_prob), DropPath(drop_prob)
    return block
