"""The bytes counted are those that autograd keeps and DeepSpeed holds."""

import json
from dataclasses import replace

import plan_ranks
import pytest
import torch

from fastsskd.config import AugmentConfig, Config, DataConfig, DistillConfig, LossConfig, MaskConfig, ModelConfig
from fastsskd.distill import Distill
from fastsskd.model import SIZES
from fastsskd.plan import memory as plan_memory
from fastsskd.plan.memory import Parameters, Zero, memory, model_bytes
from fastsskd.pretrain import Pretrain

SECONDS = 0.96
TYPES = {torch.float32: 4, torch.bfloat16: 2}


def saved(module, batch):
    """Bytes that torch keeps for the backward pass, parameters left out."""
    own = {p.untyped_storage().data_ptr() for p in module.parameters()}
    kept = {}

    def keep(tensor):
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss, _ = module(batch)
    assert loss.requires_grad
    return sum(storage.nbytes() for storage in kept.values())


def make_distill(model, **distill):
    return Distill(
        model,
        classes=tuple("abcd"),
        multi_label=False,
        distill=DistillConfig(**distill),
        augmentation=AugmentConfig(),
        data=DataConfig(),
        num_frames=94,
    )


LOSSES = [
    LossConfig(),
    LossConfig(raw_gradient=True),
    LossConfig(kl_intra=False, kl_inter=False, mse_intra=False, mse_inter=False),
    LossConfig(restore_intra=False, restore_inter=False),
]


@pytest.mark.parametrize("size", ["nano", "micro"])
@pytest.mark.parametrize("clips", [3, 8])
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_activations(make_model, make_batch, size, clips, dtype, checkpointing, monkeypatch):
    monkeypatch.setattr("fastsskd.attention.fused_attention", lambda device, dtype: True)  # as on a GPU
    batch, options = make_batch(range(clips)), {"activation_checkpointing": checkpointing}
    for loss, clones in [(loss, 1) for loss in LOSSES] + [(LOSSES[0], 2), (LOSSES[1], 2)]:
        module = Pretrain(make_model(size, **options), loss, MaskConfig(clones=clones)).to(dtype)
        how = {"checkpointing": checkpointing, "clones": clones}
        counted = plan_memory.pretrain_bytes(SIZES[size], SECONDS, TYPES[dtype], loss, **how)
        assert clips * counted == pytest.approx(saved(module, batch), rel=0.08)
    module = make_distill(make_model(size, **options)).to(dtype)
    counted = plan_memory.distill_bytes(SIZES[size], SECONDS, TYPES[dtype], 4, checkpointing=checkpointing)
    assert clips * counted == pytest.approx(saved(module, batch), rel=0.01)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("loss", LOSSES[:2])
def test_what_a_step_of_several_micro_batches_looks_at_ahead(make_model, make_batch, loss, dtype):
    config = Config(model=ModelConfig(size="nano"), data=DataConfig(seconds=SECONDS), loss=loss)
    module = Pretrain(make_model("nano"), loss, MaskConfig()).to(dtype)
    ahead = module([make_batch([0, 1, 2]), make_batch([3, 4])]) if module.looks_ahead else []
    assert sum(batch.raw_features.nbytes for batch in ahead) == 5 * plan_memory.ahead_bytes(config, TYPES[dtype])


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_activations_with_simam(make_model, make_batch, dtype, checkpointing):
    batch, element = make_batch(range(3)), TYPES[dtype]
    options = {"activation_checkpointing": checkpointing, "attention": "simam"}
    config = Config(model=ModelConfig(size="micro", **options), data=DataConfig(seconds=SECONDS))
    modules = {
        "ssl": Pretrain(make_model("micro", **options), config.loss, config.mask),
        "distill": make_distill(make_model("micro", **options)),
    }
    for kind, module in modules.items():
        counted, _ = plan_memory.stage_bytes(kind, config, element, 4, fused=element == 4)
        assert 3 * counted == pytest.approx(saved(module.to(dtype), batch), rel=0.08)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("pooling", ["mean", "attentive"])
def test_activations_of_heads(make_model, make_batch, dtype, frozen, pooling):
    options = {"size": "micro", "pooling": pooling}
    config = Config(
        model=ModelConfig(**options), data=DataConfig(seconds=SECONDS), distill=DistillConfig(frozen=frozen)
    )
    module = make_distill(make_model(**options), frozen=frozen).to(dtype)
    counted, _ = plan_memory.stage_bytes("distill", config, TYPES[dtype], 4, fused=TYPES[dtype] == 4)
    # Of a head on mean features next to nothing is kept, so bytes that are left out of the count show.
    rel = 0.15 if frozen and pooling == "mean" else 0.02
    assert 5 * counted == pytest.approx(saved(module, make_batch()), rel=rel)


def test_the_papers_size_by_hand():
    """One block of 512 tokens, 768 wide: 16 tensors of tokens x width, and 12 heads' log-sum-exp."""
    assert plan_memory.block_bytes(512, 768, 12, 2) == pytest.approx(16 * 512 * 768 * 2 + 512 * 12 * 4, rel=0.001)
    whole = plan_memory.pretrain_bytes(SIZES["base"], 10.0, 2, LossConfig())
    assert whole == pytest.approx(2 * 12 * 12.6e6, rel=0.15)  # two views of twelve blocks, and the rest
    less = plan_memory.pretrain_bytes(SIZES["base"], 10.0, 2, LossConfig(), checkpointing=True)
    assert less < 0.25 * whole


def test_a_loss_that_is_off_keeps_nothing():
    config = Config(model=ModelConfig(size="nano"))
    without = replace(config, loss=LossConfig(kl_intra=False))
    assert plan_memory.stage_bytes("ssl", without, 2, 4)[0] < plan_memory.stage_bytes("ssl", config, 2, 4)[0]
    assert plan_memory.stage_bytes("distill", without, 2, 4) == plan_memory.stage_bytes("distill", config, 2, 4)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("kind", plan_ranks.KINDS)
def test_what_deepspeed_holds_between_two_steps(observed, ranks, kind):
    parameters = sum(p.numel() for p in plan_ranks.net().parameters())
    zero = plan_memory.zero_of(plan_ranks.KINDS[kind])
    parts = model_bytes(Parameters(parameters, parameters), zero, ranks)
    expected = parts["weights"] + parts["optimizer"]
    if zero.stage == 3:  # what was gathered is given back; the gradients' share and the bucket stay
        expected += parts["gradients"] + parts["buckets"] - parameters * zero.element
    assert observed(ranks)[kind]["held"] == pytest.approx(expected, rel=0.01)


@pytest.fixture(scope="module")
def observed(training, tmp_path_factory):
    """What was seen with so many ranks."""
    folder = tmp_path_factory.mktemp("ranks")
    for ranks in (1, 2):
        training.call("plan_ranks.observe", folder, ranks=ranks)
    return lambda ranks: json.loads((folder / f"observed by {ranks}.json").read_text())


def test_what_deepspeed_sends_in_a_step(observed):
    from fastsskd.ds_config import BatchSizes
    from fastsskd.plan.scale import sent

    parameters = sum(p.numel() for p in plan_ranks.net().parameters())
    for kind, tree in plan_ranks.KINDS.items():
        sizes = BatchSizes(2 * plan_ranks.MICRO * plan_ranks.ACCUMULATION, plan_ranks.MICRO, plan_ranks.ACCUMULATION)
        counted = sum(sent(plan_memory.zero_of(tree), parameters, sizes, 2))
        assert counted == pytest.approx(observed(2)[kind]["sent"], rel=0.001)
        assert observed(1)[kind]["sent"] == 0 == sum(sent(plan_memory.zero_of(tree), parameters, sizes, 1))


PARTS = Parameters(100_000_000, 90_000_000, 50_000_000)


def test_stages_by_hand():
    """In bf16 with 8 ranks: 2 bytes a weight, 12 for each trained one of the rank's share."""
    of = {stage: model_bytes(PARTS, Zero(stage, 2, bucket=10), 8) for stage in (1, 2, 3)}
    assert [of[stage]["weights"] for stage in (1, 2, 3)] == [200e6, 200e6, 225e6]
    assert [of[stage]["gradients"] for stage in (1, 2, 3)] == [180e6, 22.5e6, 22.5e6]
    assert {of[stage]["optimizer"] for stage in (1, 2, 3)} == {135e6}
    assert model_bytes(PARTS, Zero(0, 4), 8)["optimizer"] == 720e6
    followed = replace(PARTS, averaged=PARTS.trained)  # by a moving average, in float32 as the moments
    assert model_bytes(followed, Zero(2, 2, bucket=10), 8)["optimizer"] == 135e6 + 45e6
    assert model_bytes(followed, Zero(0, 4), 8)["optimizer"] == 720e6 + 360e6
    assert model_bytes(PARTS, Zero(1, 2, overlap=True), 8)["buckets"] == 2 * 2 * plan_memory.BUCKET
    assert model_bytes(PARTS, Zero(1, 2, contiguous=False), 8)["buckets"] == 0


def test_a_peak_is_of_the_backward_pass_or_of_the_optimizer():
    zero, clip = Zero(1, 2, bucket=10), (1e6, 1e5)
    small, large = (memory(PARTS, zero, 1, micro, clip, 1e4) for micro in (1, 1000))
    assert small.activations + small.workspace == 4.0 * PARTS.trained
    assert large.activations + large.workspace == 1000 * 1.1e6
    assert large.teacher == 200e6
    assert large.total == pytest.approx(
        1.05 * (200e6 + 180e6 + 12 * 90e6 + 200e6 + 1.1e9 + 20 + 5 * 1000 * 1e4) + plan_memory.CONTEXT
    )
    on_cpu = memory(PARTS, Zero(1, 2), 1, 1, clip, 1e4, on_gpu=False)
    assert on_cpu.context == 0 and on_cpu.buckets == 2 * PARTS.trained  # pages that nothing touches are not there


def test_the_largest_that_fits():
    for most in (0, 1, 7, 500):
        assert plan_memory.largest(lambda n, most=most: n <= most, 500) == most
