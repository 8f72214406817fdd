"""Stochastic depth: which clips skip which blocks is told by their seeds alone."""

import pytest
import torch
from torch import nn

from fastsskd.stochastic_depth import DropPath, draw_depth

SEEDS = torch.arange(4000) * 7919 + 13


def test_share_scale_and_independence():
    model = nn.Sequential(DropPath(0.1), DropPath(0.4)).train()
    draw_depth(model, SEEDS)
    first, second = (path(torch.ones(4000, 2, 3)) for path in model)
    for x, rate in ((first, 0.1), (second, 0.4)):
        assert (x == x[:, :1, :1]).all()  # a clip is left out as a whole
        left_out = x[:, 0, 0] == 0
        assert left_out.float().mean().item() == pytest.approx(rate, abs=0.03)
        torch.testing.assert_close(x[~left_out], torch.full_like(x[~left_out], 1 / (1 - rate)))
    both = ((first == 0) & (second == 0))[:, 0, 0].float().mean().item()
    assert both == pytest.approx(0.04, abs=0.015)


def test_a_clip_meets_the_same_in_any_batch_and_something_else_in_another_epoch():
    model = nn.Sequential(*[DropPath(0.5) for _ in range(6)]).train()

    def passed(seeds):
        draw_depth(model, seeds)
        return torch.stack([path(torch.ones(len(seeds), 1)) for path in model])

    together = passed(SEEDS[:64])
    apart = torch.cat([passed(SEEDS[start : start + 16]) for start in (0, 16, 32, 48)], dim=1)
    assert torch.equal(together, apart)
    assert not torch.equal(together, passed(SEEDS[64:128]))


def test_it_rests_in_evaluation_and_asks_for_seeds_in_training():
    path, x = DropPath(0.5), torch.ones(3, 2)
    assert torch.equal(path.eval()(x), x)
    path.train()
    with pytest.raises(RuntimeError, match="draw_depth"):
        path(x)
    draw_depth(path, SEEDS[:4])
    with pytest.raises(RuntimeError, match="draw_depth"):
        path(x)  # of another batch


def test_16_bit_stays_16_bit():
    path = DropPath(0.5).train()
    draw_depth(path, SEEDS[:8])
    assert path(torch.ones(8, 2, dtype=torch.bfloat16)).dtype == torch.bfloat16
