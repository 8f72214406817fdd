"""The counted operations are those that torch sees."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from fastsskd import flops
from fastsskd.config import LossConfig, MaskConfig
from fastsskd.model import SIZES
from fastsskd.pretrain import Pretrain

SECONDS = 0.96


def counted(module, batch):
    """Operations of matrix products that torch runs in a forward and backward pass, per clip."""
    # As separate matrix products: the counter does not know the CPU's fused attention.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        loss, _ = module(batch)
        loss.backward()
    return counter.get_total_flops() / len(batch)


@pytest.mark.parametrize("size", ["nano", "mini", "micro"])
@pytest.mark.parametrize("raw_gradient", [False, True])
@pytest.mark.parametrize("clones", [1, 3])
def test_a_pretraining_step(make_model, make_batch, size, raw_gradient, clones):
    torch.manual_seed(0)
    loss = LossConfig(raw_gradient=raw_gradient, contrast_intra=False, contrast_inter=False)
    module = Pretrain(make_model(size), loss, MaskConfig(clones=clones))
    expected = flops.pretrain_step(size, SECONDS, raw_gradient=raw_gradient, clones=clones)
    # With the raw view's gradient the embedding is shared with the inter view, whose backward pass is then its too.
    assert counted(module, make_batch()) == pytest.approx(expected.total, rel=0.02)
    assert expected.total == sum((expected.raw, expected.intra, expected.inter, expected.mae, expected.decoder))


@pytest.mark.parametrize("with_teacher", [False, True])
def test_a_step_of_the_labelled_stage(make_model, make_batch, with_teacher):
    torch.manual_seed(0)
    student, teacher = make_model("micro"), make_model("mini").eval()

    expected = flops.distill_step("micro", 4, SECONDS, teacher="mini" if with_teacher else None)
    batch = make_batch()
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        logits, _ = student(batch.fbank)
        if with_teacher:
            with torch.no_grad():
                teacher(batch.fbank)
        logits.sum().backward()
    assert counter.get_total_flops() / len(batch) == pytest.approx(expected.total, rel=0.02)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("pooling", ["mean", "attentive"])
def test_heads(make_model, make_batch, frozen, pooling):
    torch.manual_seed(0)
    model, batch = make_model("micro", pooling=pooling), make_batch()
    expected = flops.distill_step("micro", 4, SECONDS, frozen=frozen, pooling=pooling)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(batch.fbank, frozen=frozen)[0].sum().backward()
    assert counter.get_total_flops() / len(batch) == pytest.approx(expected.total, rel=0.002)


def test_the_papers_size():
    """By hand: 512 tokens, 12 blocks of 24 D^2 + 4 N D."""
    aft = 512 * 12 * (24 * 768**2 + 4 * 512 * 768)
    assert flops.blocks(512, 768, 12) == aft == pytest.approx(96.6e9, rel=0.01)
    step = flops.pretrain_step("base")
    assert 7 * aft < step.total < 7.5 * aft
    assert flops.pretrain_step(SIZES["base"], raw_gradient=True).total - step.total == pytest.approx(2 * aft, rel=0.01)
    assert flops.distill_step("base", 527).total == pytest.approx(3 * aft, rel=0.01)
    assert flops.distill_step("base", 527, teacher="base").teacher == pytest.approx(aft, rel=0.01)
