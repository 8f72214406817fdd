"""The model's parts: shapes, sizes, what each part may look at, and the blocks against the textbook."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastsskd.config import LossConfig, MaskConfig
from fastsskd.errors import UsageError
from fastsskd.model import SIZES, SimAM, build_model, simam, sincos_positions
from fastsskd.patches import num_input_frames, patchify, unpatchify
from fastsskd.pretrain import Pretrain
from fastsskd.stochastic_depth import draw_depth


@pytest.fixture
def patches():
    return torch.from_numpy(np.random.default_rng(0).standard_normal((3, 48, 256)).astype(np.float32))


@pytest.fixture
def ids_keep():
    """Twelve of the 48 patches, different ones in each clip."""
    order = [np.random.default_rng(seed).permutation(48)[:12] for seed in range(3)]
    return torch.from_numpy(np.sort(np.stack(order), axis=1))


# ----------------------------------------------------------------------------------------------------------- geometry


@pytest.mark.parametrize(("seconds", "frames"), [(10.0, 1024), (5.0, 512), (0.96, 96), (0.16, 32), (1.0, 128)])
def test_input_frames(seconds, frames):
    assert num_input_frames(seconds) == frames


def test_ten_seconds_are_512_tokens_and_five_are_256():
    with torch.device("meta"):
        assert build_model("nano", 2, seconds=10.0).num_patches == 512
        assert build_model("nano", 2, seconds=5.0).num_patches == 256


@given(rows=st.integers(1, 5), columns=st.integers(1, 8), batch=st.integers(1, 3))
def test_patches_are_time_major_squares_and_come_back(rows, columns, batch):
    image = torch.arange(batch * rows * columns * 256.0).reshape(batch, rows * 16, columns * 16)
    patches = patchify(image)
    assert patches.shape == (batch, rows * columns, 256)
    for t, f in np.ndindex(rows, columns):
        for frame, mel in ((0, 0), (3, 11), (15, 15)):
            assert patches[-1, t * columns + f, 16 * frame + mel] == image[-1, 16 * t + frame, 16 * f + mel]
    assert torch.equal(unpatchify(patches, (rows, columns)), image)


# --------------------------------------------------------------------------------------------------------------- size


def test_base_size_has_the_paper_s_92_million_parameters():
    with torch.device("meta"):
        model = build_model("base", 527)
    parts = model.num_parameters()
    block = 4 * 768 * 768 + 4 * 768 + 2 * 4 * 768 * 768 + 4 * 768 + 768 + 2 * 2 * 768
    assert parts["aft"] == 12 * block + 2 * 768
    assert parts["patch_embed"] == 256 * 768 + 768
    assert parts["pos_embed"] == 512 * 768
    assert parts["decoder"] == (768 * 1536 + 1536) + (1536 * 768 + 768) + (768 * 256 + 256)
    assert parts["head"] == 2 * 768 + 768 * 527 + 527
    assert 3.0e6 < parts["mae"] < 5.0e6
    assert 91.0e6 < parts["total"] < 93.0e6
    assert len(model.blocks) == 12 and all(block.attn.num_heads == 12 for block in model.blocks)


@pytest.mark.parametrize("size", SIZES)
def test_the_parts_add_up_and_every_size_has_whole_heads(size):
    with torch.device("meta"):
        model = build_model(size, 7)
    parts = model.num_parameters()
    assert parts.total == parts["total"] == sum(parts.values()) == sum(p.numel() for p in model.parameters())
    preset = SIZES[size]
    assert preset.embed_dim % preset.num_heads == 0 and preset.mae_dim % preset.mae_heads == 0


def test_an_unknown_size_is_a_usage_error():
    with pytest.raises(UsageError, match="'huge' is not one of base"):
        build_model("huge", 2)


def test_weights_come_from_the_seed_and_leave_the_global_random_state_alone(make_model):
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first, again, other = make_model(seed=1), make_model(seed=1), make_model(seed=2)
    assert torch.equal(state, torch.get_rng_state())
    for name, value in first.state_dict().items():
        assert torch.equal(value, again.state_dict()[name])
    for name in ("mae.mask_token", "patch_embed.weight", "blocks.0.attn.qkv.weight", "head.1.weight"):
        assert not torch.equal(first.state_dict()[name], other.state_dict()[name])
        assert first.state_dict()[name].std() > 0


@pytest.mark.parametrize(("grid_size", "dim"), [((3, 8), 16), ((62, 8), 64), ((5, 2), 4)])
def test_positions_begin_as_sines_and_cosines_of_each_patch_s_place(grid_size, dim, make_model):
    positions = sincos_positions(grid_size, dim)
    assert positions.shape == (1, grid_size[0] * grid_size[1], dim)
    for place, found in zip(itertools.product(*map(range, grid_size)), positions[0].tolist(), strict=True):
        expected = []
        for coordinate in place:
            angles = [coordinate / 10000 ** (i / (dim // 4)) for i in range(dim // 4)]
            expected += [math.sin(angle) for angle in angles] + [math.cos(angle) for angle in angles]
        assert found == pytest.approx(expected, abs=1e-6)
    model = make_model()
    assert torch.equal(model.pos_embed, sincos_positions(model.grid_size, model.embed_dim))
    assert model.pos_embed.requires_grad  # they are where learning begins


# ---------------------------------------------------------------------------------------------------------------- AFT


def textbook_block(block, x: torch.Tensor, heads: int, attended=lambda x: x) -> torch.Tensor:
    """A pre-norm ViT block, in float64; ``attended`` changes attention's output."""

    def linear(layer, value):
        return value @ layer.weight.double().T + layer.bias.double()

    def norm(layer, value):
        value = value - value.mean(-1, keepdim=True)
        value = value / (value.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        return value * layer.weight.double() + layer.bias.double()

    b, n, d = x.shape
    q, k, v = linear(block.attn.qkv, norm(block.norm1, x)).reshape(b, n, 3, heads, d // heads).permute(2, 0, 3, 1, 4)
    attention = (q @ k.transpose(2, 3) / math.sqrt(d // heads)).softmax(-1)
    x = x + attended(linear(block.attn.proj, (attention @ v).transpose(1, 2).reshape(b, n, d)))
    hidden = linear(block.mlp.fc1, norm(block.norm2, x))
    hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
    return x + linear(block.mlp.fc2, hidden)


def test_the_aft_is_pre_norm_blocks_and_a_final_norm(make_model, patches):
    model = make_model().eval()
    with torch.no_grad():
        for parameter in model.parameters():  # away from the ones and zeros of a fresh model
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
        x = patches.double() @ model.patch_embed.weight.double().T + model.patch_embed.bias.double()
        x = x + model.pos_embed.double()
        for block in model.blocks:
            x = textbook_block(block, x, 2)
        centred = x - x.mean(-1, keepdim=True)
        x = centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        x = x * model.norm.weight.double() + model.norm.bias.double()
        torch.testing.assert_close(model.features(patches).double(), x, rtol=1e-4, atol=1e-4)


def test_the_class_head_takes_the_average_over_tokens(make_model, make_batch):
    model, fbank = make_model().eval(), make_batch().fbank
    with torch.no_grad():
        logits, clip = model(fbank)
        features = model.features(patchify(fbank))
        assert clip.shape == (5, 64) and logits.shape == (5, 4)
        torch.testing.assert_close(clip, sum(features[:, n] for n in range(48)) / 48)
        normed = torch.nn.functional.layer_norm(clip, (64,), model.head[0].weight, model.head[0].bias, 1e-6)
        torch.testing.assert_close(logits, normed @ model.head[1].weight.T + model.head[1].bias)


def test_no_classes_no_head(make_model, make_batch):
    model = make_model(num_classes=0)
    logits, clip = model(make_batch([0]).fbank)
    assert model.head is None and logits is None and clip.shape == (1, 64)
    assert model.num_parameters()["head"] == 0


def test_positions_tell_patches_apart(make_model):
    same = torch.ones(1, 48, 256)
    features = make_model().eval().features(same)
    assert not torch.allclose(features[0, 0], features[0, 1], atol=1e-4)
    assert not torch.allclose(features[0, 0], features[0, 8], atol=1e-4)


def test_the_decoder_gives_each_token_s_pixels(make_model, patches):
    model = make_model().eval()
    features = model.features(patches)
    pixels = model.decode(features)
    assert pixels.shape == (3, 48, 256)
    assert [tuple(layer.weight.shape) for layer in model.decoder if hasattr(layer, "weight")] == [
        (128, 64), (64, 128), (256, 64),
    ]  # fmt: skip
    torch.testing.assert_close(model.decode(features[:, 5:6]), pixels[:, 5:6])


# -------------------------------------------------------------------------------------------------------------- SimAM


def slow_simam(x: torch.Tensor) -> torch.Tensor:
    """Each neuron by itself, from the energy as the paper has it: the least over a linear transform of its channel.

    ``e* = 4 (var + lambda) / ((x - mu)^2 + 2 var + 2 lambda)``, and the neuron is weighted by ``sigmoid(1 / e*)``.
    """
    out = np.empty(x.shape)
    for clip, channel in np.ndindex(x.shape[0], x.shape[2]):
        values = [float(value) for value in x[clip, :, channel]]
        mu = sum(values) / len(values)
        var = sum((value - mu) ** 2 for value in values) / max(len(values) - 1, 1)
        for n, value in enumerate(values):
            energy = 4 * (var + 1e-4) / ((value - mu) ** 2 + 2 * var + 2e-4)
            out[clip, n, channel] = value / (1 + math.exp(-1 / energy))
    return torch.from_numpy(out)


@given(tokens=st.integers(1, 20), scale=st.sampled_from([0.0, 1e-3, 1.0, 100.0]), offset=st.sampled_from([0.0, 3.0]))
def test_simam_is_the_papers_energy_of_each_neuron(tokens, scale, offset):
    x = scale * torch.from_numpy(np.random.default_rng(tokens).standard_normal((2, tokens, 3))) + offset
    torch.testing.assert_close(simam(x), slow_simam(x), rtol=1e-9, atol=1e-12)


def test_simam_in_16_bits_is_computed_in_32(no_waiting):
    x = 300 * torch.randn(2, 40, 8, generator=torch.Generator().manual_seed(0))  # its squares are beyond float16
    for kind in (torch.float16, torch.bfloat16):
        low = x.to(kind)
        with no_waiting():
            out = simam(low)
        assert out.dtype == kind
        torch.testing.assert_close(out.double(), slow_simam(low), rtol=0.01, atol=0.01)


def test_simam_sees_a_clip_s_tokens_and_no_other_clip(patches):
    alone = torch.cat([simam(clip[None]) for clip in patches])
    torch.testing.assert_close(simam(patches), alone, rtol=0, atol=0)
    order = torch.randperm(48, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(simam(patches[:, order]), simam(patches)[:, order])


def test_simam_stands_between_attention_s_projection_and_the_residual(make_model, patches):
    model = make_model(attention="simam").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
        x = patches.double() @ model.patch_embed.weight.double().T + model.patch_embed.bias.double()
        x = x + model.pos_embed.double()
        for block in model.blocks:
            x = textbook_block(block, x, 2, slow_simam)
        expected = torch.nn.functional.layer_norm(x, (64,), model.norm.weight.double(), model.norm.bias.double(), 1e-6)
        torch.testing.assert_close(model.features(patches).double(), expected, rtol=1e-4, atol=1e-4)
    assert not any(isinstance(part, SimAM) for part in model.mae.modules())


def test_simam_adds_no_weight_and_draws_no_number(make_model):
    plain, weighted = make_model(), make_model(attention="simam")
    assert list(plain.state_dict()) == list(weighted.state_dict())
    for name, value in plain.state_dict().items():
        assert torch.equal(value, weighted.state_dict()[name])


def test_simam_s_gradient_is_the_slope():
    x = torch.randn(1, 5, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    assert torch.autograd.gradcheck(simam, (x,))


def test_an_unknown_attention_is_a_usage_error():
    with pytest.raises(UsageError, match="'flash' is not one of plain, simam"):
        build_model("nano", 2, attention="flash")


# ------------------------------------------------------------------------------------------------------------ pooling


@torch.no_grad()
def textbook_pool(pool, tokens, heads: int):
    """The query's attention over the tokens of each clip, head by head, in float64."""
    d = tokens.shape[2]
    weight, bias = pool.kv.weight.double(), pool.kv.bias.double()
    key = tokens.double() @ weight[:d].T + bias[:d]
    value = tokens.double() @ weight[d:].T + bias[d:]
    pooled = []
    for head in range(heads):
        own = slice(head * d // heads, (head + 1) * d // heads)
        score = (key[:, :, own] * pool.query[0, 0, own].double()).sum(-1) / math.sqrt(d / heads)
        share = score.exp() / score.exp().sum(1, keepdim=True)
        pooled.append((share[:, :, None] * value[:, :, own]).sum(1))
    return torch.cat(pooled, dim=1) @ pool.proj.weight.double().T + pool.proj.bias.double()


def test_attentive_pooling_is_one_query_s_attention(make_model, make_batch):
    model, batch = make_model("micro", pooling="attentive").eval(), make_batch()
    with torch.no_grad():
        for parameter in model.pool.parameters():
            parameter.add_(0.5 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(4)))
        features = model.features(patchify(batch.fbank))
        expected = textbook_pool(model.pool, features, 3)
        torch.testing.assert_close(model.pool(features).double(), expected, rtol=1e-4, atol=1e-4)
        logits, clip = model(batch.fbank)
        torch.testing.assert_close(logits, model.head(expected.float()), rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(clip, features.mean(1))


def test_attentive_pooling_and_torch_s_own_attention_agree(make_model):
    """nn.MultiheadAttention with a query that no map changes."""
    pool = make_model(pooling="attentive").pool
    other = torch.nn.MultiheadAttention(64, 2, batch_first=True)
    tokens = torch.randn(3, 7, 64, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        other.in_proj_weight.copy_(torch.cat([torch.eye(64), pool.kv.weight]))
        other.in_proj_bias.copy_(torch.cat([torch.zeros(64), pool.kv.bias]))
        other.out_proj.load_state_dict(pool.proj.state_dict())
        expected, _ = other(pool.query.expand(3, 1, 64), tokens, tokens)
        torch.testing.assert_close(pool(tokens), expected[:, 0])


def test_the_order_of_the_tokens_does_not_matter_to_the_pool(make_model):
    pool = make_model(pooling="attentive").pool
    tokens = torch.randn(2, 9, 64, generator=torch.Generator().manual_seed(1))
    order = torch.randperm(9, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(pool(tokens), pool(tokens[:, order]))


def test_the_other_weights_do_not_know_the_pooling(make_model, make_batch):
    mean, attentive = make_model(seed=5), make_model(pooling="attentive", seed=5)
    state = attentive.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in mean.state_dict().items())
    assert {name.split(".")[0] for name in state.keys() - mean.state_dict().keys()} == {"pool"}
    with torch.no_grad():
        assert torch.equal(mean.eval()(make_batch().fbank)[1], attentive.eval()(make_batch().fbank)[1])
    parts, plain = attentive.num_parameters(), mean.num_parameters()
    assert parts["head"] - plain["head"] == parts.total - plain.total == 3 * 64**2 + 4 * 64


def test_no_head_has_no_pool(make_model):
    assert make_model(num_classes=0, pooling="attentive").pool is None


def test_an_unknown_pooling_is_a_usage_error():
    with pytest.raises(UsageError, match="'max' is not one of mean, attentive"):
        build_model("nano", 2, pooling="max")


@pytest.mark.parametrize("pooling", ["mean", "attentive"])
def test_a_frozen_pass_has_a_graph_for_the_head_alone(make_model, make_batch, pooling):
    model, fbank = make_model(pooling=pooling), make_batch().fbank
    free, frozen = model(fbank), model(fbank, frozen=True)
    assert torch.equal(free[0], frozen[0]) and torch.equal(free[1], frozen[1])
    assert not frozen[1].requires_grad and free[1].requires_grad
    frozen[0].square().sum().backward()
    learns = {name.split(".")[0] for name, p in model.named_parameters() if p.grad is not None}
    assert learns == ({"head"} if pooling == "mean" else {"head", "pool"})
    with torch.no_grad():
        assert not model(fbank, frozen=True)[0].requires_grad


# --------------------------------------------------------------------------------------------------------- MAE module


def test_masked_pixels_do_not_reach_the_inter_features(make_model, patches, ids_keep):
    model = make_model().eval()
    visible = torch.zeros(3, 48, dtype=torch.bool).scatter(1, ids_keep, True)
    changed = torch.where(visible[..., None], patches, 1e3 * torch.ones_like(patches))
    assert torch.equal(model.features_inter(patches, ids_keep), model.features_inter(changed, ids_keep))


def test_every_visible_patch_is_looked_at_and_no_other(make_model, patches, ids_keep):
    patches.requires_grad_()
    make_model().features_inter(patches, ids_keep).square().sum().backward()
    visible = torch.zeros(3, 48, dtype=torch.bool).scatter(1, ids_keep, True)
    assert torch.equal(patches.grad.abs().sum(-1) > 0, visible)


def test_masked_places_are_the_mask_token_and_their_position(make_model, patches, ids_keep):
    model = make_model().eval()
    tokens = model.mae(model.embed(patches), model.pos_embed, ids_keep)
    assert tokens.shape == (3, 48, 64)
    for clip in range(3):
        for n in set(range(48)) - set(ids_keep[clip].tolist()):
            assert torch.equal(tokens[clip, n], model.mae.mask_token[0, 0] + model.pos_embed[0, n])


def test_visible_places_are_their_own_tokens_plus_what_the_module_adds(make_model, patches, ids_keep):
    model = make_model().eval()
    embedded = model.embed(patches)
    with torch.no_grad():
        tokens = model.mae(embedded, model.pos_embed, ids_keep)
        for clip in range(3):
            own = embedded[clip : clip + 1, ids_keep[clip]]
            x = model.mae.reduce(own).double()
            for block in model.mae.blocks:
                x = textbook_block(block, x, 2)
            expected = own + model.mae.expand(model.mae.norm(x.float()))
            torch.testing.assert_close(tokens[clip, ids_keep[clip]], expected[0], rtol=1e-4, atol=1e-5)


def test_the_order_of_the_visible_patches_does_not_matter(make_model, patches, ids_keep):
    model = make_model().eval()
    torch.testing.assert_close(
        model.features_inter(patches, ids_keep), model.features_inter(patches, ids_keep.flip(1)), rtol=1e-4, atol=1e-5
    )


# ------------------------------------------------------------------------------------------------------------ options


def test_activation_checkpointing_changes_memory_and_nothing_else(make_model, make_batch):
    fbank = make_batch().fbank
    plain, saving = make_model(), make_model(activation_checkpointing=True)
    for model in (plain, saving):
        model(fbank)[0].square().sum().backward()
    for (name, a), (_, b) in zip(plain.named_parameters(), saving.named_parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None), name
        if a.grad is not None:
            torch.testing.assert_close(a.grad, b.grad, msg=name)


def test_drop_path_grows_with_depth_and_rests_in_evaluation(make_model, make_batch):
    model, fbank = make_model("micro", drop_path=0.5), make_batch().fbank
    rates = [getattr(block.drop_path1, "drop_prob", 0.0) for block in model.blocks]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4, 0.5])
    with torch.no_grad():
        draw_depth(model, torch.arange(len(fbank)))
        first = model(fbank)[0]
        assert torch.equal(first, model(fbank)[0])
        draw_depth(model, torch.arange(len(fbank)) + 100)
        assert not torch.equal(first, model(fbank)[0])
        model.eval()
        assert torch.equal(model(fbank)[0], model(fbank)[0])


@pytest.mark.slow
def test_one_step_at_base_size_on_a_ten_second_clip(make_batch):
    module = Pretrain(build_model("base", 527), LossConfig(), MaskConfig())
    loss, metrics = module(make_batch([0], seconds=10.0))
    loss.backward()
    assert math.isfinite(loss.item()) and metrics["restore_inter"] > 0
    for name, parameter in module.model.named_parameters():
        if name.startswith("head."):
            assert parameter.grad is None
        else:
            assert parameter.grad.isfinite().all(), name
            assert (parameter.grad != 0).any(), name
