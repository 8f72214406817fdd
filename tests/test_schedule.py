"""Learning rates step by step, and which parameter is in which group."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fastsskd.config import LossConfig, MaskConfig, OptimConfig, StageConfig
from fastsskd.pretrain import Pretrain
from fastsskd.schedule import build_optimizer, learning_rate, set_learning_rate


def test_a_linear_warm_up_then_a_cosine_to_zero():
    rates = [learning_rate(step, 10, 4, 2.0, "cosine") for step in range(10)]
    warm = [0.5, 1.0, 1.5, 2.0]
    cosine = [1.0 + math.cos(math.pi * done / 6) for done in range(6)]
    assert rates == pytest.approx(warm + cosine)
    assert rates[4] == 2.0 and rates[7] == pytest.approx(1.0)
    assert learning_rate(10, 10, 4, 2.0, "cosine") == pytest.approx(0.0)


def test_a_constant_after_the_warm_up():
    assert [learning_rate(step, 5, 2, 2.0, "constant") for step in range(5)] == [1.0, 2.0, 2.0, 2.0, 2.0]


def test_no_warm_up_starts_at_the_peak():
    assert learning_rate(0, 10, 0, 2.0, "cosine") == 2.0
    assert learning_rate(0, 1, 0, 2.0, "cosine") == 2.0


@given(
    total=st.integers(1, 300),
    warmup=st.integers(0, 400),
    peak=st.floats(1e-6, 10),
    schedule=st.sampled_from(["cosine", "constant"]),
)
def test_rates_rise_then_fall_between_zero_and_the_peak(total, warmup, peak, schedule):
    rates = [learning_rate(step, total, warmup, peak, schedule) for step in range(total)]
    assert all(0 <= rate <= peak * (1 + 1e-12) for rate in rates)
    assert all(a < b for a, b in itertools.pairwise(rates[: min(warmup, total)]))
    assert all(a >= b for a, b in itertools.pairwise(rates[max(warmup - 1, 0) :]))


# ------------------------------------------------------------------------------------------------------------- groups


def groups_by_name(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, dict]:
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    found = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            name = names[id(parameter)]
            assert name not in found, f"{name} is in two groups"
            found[name] = group
    return found


@pytest.fixture
def module(make_model):
    """A module as a stage trains it: six blocks, a frozen head, and a map beside the model."""
    module = Pretrain(make_model("micro"), LossConfig(), MaskConfig())
    module.projection = nn.Linear(192, 10)
    return module


def test_every_trainable_parameter_is_in_one_group_and_no_other(module):
    found = groups_by_name(module, build_optimizer(module, StageConfig(layer_decay=0.75), OptimConfig()))
    assert set(found) == {name for name, p in module.named_parameters() if p.requires_grad}
    assert not any(name.startswith("model.head.") for name in found)


def test_vectors_positions_and_tokens_do_not_decay(module):
    found = groups_by_name(module, build_optimizer(module, StageConfig(), OptimConfig(weight_decay=0.07)))
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            free = parameter.dim() == 1 or name in ("model.pos_embed", "model.mae.mask_token")
            assert found[name]["weight_decay"] == (0.0 if free else 0.07), name


def test_the_query_of_attentive_pooling_is_a_token_and_trains_at_the_top(make_model):
    model = make_model(pooling="attentive")
    found = groups_by_name(model, build_optimizer(model, StageConfig(layer_decay=0.5), OptimConfig()))
    decays = {name: group["weight_decay"] > 0 for name, group in found.items() if name.startswith("pool.")}
    assert decays == {name: name in ("pool.kv.weight", "pool.proj.weight") for name in decays} and len(decays) == 5
    assert all(found[name]["lr_scale"] == 1.0 for name in decays)


def test_layer_decay_counts_from_the_head_down(module):
    found = groups_by_name(module, build_optimizer(module, StageConfig(layer_decay=0.5), OptimConfig()))
    for name, group in found.items():
        if name.startswith("model.blocks."):
            expected = 0.5 ** (6 - int(name.split(".")[2]))
        elif name.startswith(("model.patch_embed.", "model.pos_embed")):
            expected = 0.5**7
        else:  # final norm, MAE module, decoder, projection
            expected = 1.0
        assert group["lr_scale"] == expected, name
    assert {name.split(".")[1] for name, group in found.items() if group["lr_scale"] == 1.0} == {
        "norm",
        "mae",
        "decoder",
        "weight",
        "bias",
    }


def test_no_layer_decay_means_two_groups_of_equal_rate(module):
    optimizer = build_optimizer(module, StageConfig(), OptimConfig())
    assert len(optimizer.param_groups) == 2
    assert all(group["lr_scale"] == 1.0 for group in optimizer.param_groups)


def test_the_optimizer_is_adamw_with_the_configured_numbers(module):
    optimizer = build_optimizer(module, StageConfig(lr=3e-4), OptimConfig(betas=(0.8, 0.9)))
    assert type(optimizer) is torch.optim.AdamW
    assert all(group["betas"] == (0.8, 0.9) and group["lr"] == 3e-4 for group in optimizer.param_groups)


def test_setting_the_rate_keeps_each_group_s_share(module):
    optimizer = build_optimizer(module, StageConfig(layer_decay=0.5), OptimConfig())
    for lr in (1e-3, 2e-5):
        set_learning_rate(optimizer, lr)
        assert all(group["lr"] == lr * group["lr_scale"] for group in optimizer.param_groups)


def test_zero_3_s_empty_placeholders_are_judged_by_their_whole_shape(make_model):
    module = make_model()
    whole = groups_by_name(module, build_optimizer(module, StageConfig(), OptimConfig()))
    for parameter in module.parameters():
        parameter.ds_shape, parameter.data = parameter.shape, torch.empty(0)
    placeholders = groups_by_name(module, build_optimizer(module, StageConfig(), OptimConfig()))
    for name, group in whole.items():
        assert placeholders[name]["weight_decay"] == group["weight_decay"], name
