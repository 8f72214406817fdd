"""BEATs against a second, slow derivation in NumPy and float64, torchaudio's features, and the published weight names.

The second derivation follows the papers: T5's buckets (Raffel et al. 2020, Section 2.1), WavLM's gate (Chen et al.
2021, Section 3.1), deep norm (Wang et al. 2022, Figure 2), weight norm (Salimans and Kingma 2016).
"""

import math

import numpy as np
import pytest
import torch
import torchaudio

from fastsskd.augment import AugmentConfig
from fastsskd.config import DataConfig, DistillConfig
from fastsskd.distill import Distill
from fastsskd.errors import InputError
from fastsskd.teachers import load_teacher
from fastsskd.teachers.beats import from_checkpoint, read_config
from fastsskd.teachers.beats_model import Beats, relative_buckets

# As stored in the published checkpoints (iterations 1 to 3+, fine-tuned).
BASE = {
    "encoder_layers": 12,
    "encoder_embed_dim": 768,
    "encoder_ffn_embed_dim": 3072,
    "encoder_attention_heads": 12,
    "activation_fn": "gelu",
    "dropout": 0.0,
    "attention_dropout": 0.0,
    "activation_dropout": 0.0,
    "encoder_layerdrop": 0.05,
    "dropout_input": 0.0,
    "layer_norm_first": False,
    "conv_bias": False,
    "conv_pos": 128,
    "conv_pos_groups": 16,
    "relative_position_embedding": True,
    "num_buckets": 320,
    "max_distance": 800,
    "gru_rel_pos": True,
    "deep_norm": True,
    "input_patch_size": 16,
    "layer_wise_gradient_decay_ratio": 0.6,
    "embed_dim": 512,
    "finetuned_model": True,
    "predictor_dropout": 0.0,
    "predictor_class": 527,
}
# 0.35 s are 33 frames and 2 x 8 tokens: distances reach beyond the last bucket of 16 at 10.
TINY = BASE | {
    "encoder_layers": 2,
    "encoder_embed_dim": 24,
    "encoder_ffn_embed_dim": 40,
    "encoder_attention_heads": 3,
    "embed_dim": 12,
    "conv_pos": 6,
    "conv_pos_groups": 4,
    "num_buckets": 16,
    "max_distance": 10,
    "predictor_class": 5,
}
SAMPLES = 5600
NAMES = ["/m/09x0r", "/m/05zppz", "/m/02zsn", "/m/0ytgt", "/m/01h8n0"]
PLAIN_NORM = ("weight_g", "weight_v")
NEW_NORM = ("parametrizations.weight.original0", "parametrizations.weight.original1")


def published_shapes(cfg, norm=PLAIN_NORM) -> dict[str, tuple[int, ...]]:
    """Every weight of a checkpoint with this ``cfg``, and its shape."""
    width, hidden, heads = (cfg[f"encoder_{name}"] for name in ("embed_dim", "ffn_embed_dim", "attention_heads"))
    embed, side, kernel = cfg["embed_dim"], cfg["input_patch_size"], cfg["conv_pos"]
    shapes = {"patch_embedding.weight": (embed, 1, side, side), "layer_norm.weight": (embed,)}
    shapes |= {"layer_norm.bias": (embed,), "encoder.layer_norm.weight": (width,), "encoder.layer_norm.bias": (width,)}
    if cfg["conv_bias"]:
        shapes["patch_embedding.bias"] = (embed,)
    if embed != width:
        shapes |= {"post_extract_proj.weight": (width, embed), "post_extract_proj.bias": (width,)}
    shapes |= {"encoder.pos_conv.0.bias": (width,), f"encoder.pos_conv.0.{norm[0]}": (1, 1, kernel)}
    shapes[f"encoder.pos_conv.0.{norm[1]}"] = (width, width // cfg["conv_pos_groups"], kernel)
    for number in range(cfg["encoder_layers"]):
        layer = f"encoder.layers.{number}."
        for name in ("q", "k", "v", "out"):
            shapes[f"{layer}self_attn.{name}_proj.weight"] = (width, width)
            shapes[f"{layer}self_attn.{name}_proj.bias"] = (width,)
        for name in ("self_attn_layer_norm", "final_layer_norm"):
            shapes |= {f"{layer}{name}.weight": (width,), f"{layer}{name}.bias": (width,)}
        gated = cfg["activation_fn"] == "glu"
        first, rows = f"{layer}fc1.linear" if gated else f"{layer}fc1", 2 * hidden if gated else hidden
        shapes |= {f"{first}.weight": (rows, width), f"{first}.bias": (rows,)}
        shapes |= {f"{layer}fc2.weight": (width, hidden), f"{layer}fc2.bias": (width,)}
        if cfg["relative_position_embedding"]:
            shapes[f"{layer}self_attn.relative_attention_bias.weight"] = (cfg["num_buckets"], heads)
        if cfg["gru_rel_pos"]:
            shapes[f"{layer}self_attn.grep_linear.weight"] = (8, width // heads)
            shapes[f"{layer}self_attn.grep_linear.bias"] = (8,)
            shapes[f"{layer}self_attn.grep_a"] = (1, heads, 1, 1)
    if cfg["finetuned_model"]:
        shapes |= {"predictor.weight": (cfg["predictor_class"], width), "predictor.bias": (cfg["predictor_class"],)}
    return shapes


def make_checkpoint(*, norm=PLAIN_NORM, **changes) -> dict:
    """A checkpoint of random weights as ``torch.save`` would have it: layer 0's position bias once in each layer."""
    cfg, weights = TINY | changes, {}
    generator = torch.Generator().manual_seed(1)
    for name, shape in published_shapes(cfg).items():
        spread = 1.0 if "relative" in name else 0.2 if len(shape) == 1 else 1.5 / math.sqrt(math.prod(shape[1:]))
        centre = float("norm.weight" in name or "grep_a" in name)
        weights[name] = centre + spread * torch.randn(shape, generator=generator)
        if "relative" in name:
            weights[name] = weights["encoder.layers.0.self_attn.relative_attention_bias.weight"]
    for old, new in zip(PLAIN_NORM, norm, strict=True):
        weights[f"encoder.pos_conv.0.{new}"] = weights.pop(f"encoder.pos_conv.0.{old}")
    checkpoint = {"cfg": cfg, "model": weights}
    return checkpoint | {"label_dict": dict(enumerate(NAMES))} if cfg["finetuned_model"] else checkpoint


def make_teacher(**changes):
    return from_checkpoint(make_checkpoint(**changes), "beats.pt")


def make_waveform(batch=3, samples=SAMPLES, seed=2):
    wave = 0.2 * torch.randn(batch, samples, generator=torch.Generator().manual_seed(seed))
    return wave * torch.linspace(0, 1, samples)


# ------------------------------------------------------------------------------------------------ the slow derivation


def slow_features(wave) -> np.ndarray:
    """Kaldi's filter banks with all of its defaults, of samples in 16-bit units."""
    fbank = torchaudio.compliance.kaldi.fbank(
        wave[None] * 2**15, num_mel_bins=128, sample_frequency=16000, frame_length=25, frame_shift=10
    )
    return (fbank.double().numpy() - 15.41663) / (2 * 6.55582)


class Slow:
    """Tokens of one clip from a checkpoint, in float64, one number at a time where it is short enough to say."""

    def __init__(self, checkpoint):
        self.cfg = checkpoint["cfg"]
        self.weights = {name: value.double().numpy() for name, value in checkpoint["model"].items()}

    def linear(self, name, x):
        return x @ self.weights[f"{name}.weight"].T + self.weights[f"{name}.bias"]

    def norm(self, name, x):
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
        return x * self.weights[f"{name}.weight"] + self.weights[f"{name}.bias"]

    def tokens(self, wave) -> np.ndarray:
        x, side = self.patches(slow_features(wave)), self.cfg["layer_norm_first"]
        x = self.norm("layer_norm", x)
        if "post_extract_proj.weight" in self.weights:
            x = self.linear("post_extract_proj", x)
        x = x + gelu(self.position_convolution(x))
        x = x if side else self.norm("encoder.layer_norm", x)
        for number in range(self.cfg["encoder_layers"]):
            x = self.layer(f"encoder.layers.{number}", x)
        return self.norm("encoder.layer_norm", x) if side else x

    def patches(self, fbank):
        side, filters = self.cfg["input_patch_size"], self.weights["patch_embedding.weight"][:, 0]
        bias = self.weights.get("patch_embedding.bias", 0.0)
        return np.array(
            [
                (filters * fbank[t : t + side, f : f + side]).sum((1, 2)) + bias
                for t in range(0, len(fbank) - side + 1, side)
                for f in range(0, 128 - side + 1, side)
            ]
        )

    def position_convolution(self, x):
        """Grouped, with half the kernel of zeros on both sides, as many places out as in."""
        kernel, groups = self.cfg["conv_pos"], self.cfg["conv_pos_groups"]
        gain, direction = (self.weights[f"encoder.pos_conv.0.{name}"] for name in PLAIN_NORM)
        out, width = np.zeros_like(x) + self.weights["encoder.pos_conv.0.bias"], x.shape[1] // groups
        for place in range(len(x)):
            for tap in range(kernel):
                source = place + tap - kernel // 2
                if not 0 <= source < len(x):
                    continue
                taps = direction[:, :, tap] * gain[0, 0, tap] / np.sqrt((direction[:, :, tap] ** 2).sum())
                for group in range(groups):
                    rows = slice(group * width, (group + 1) * width)
                    out[place, rows] += taps[rows] @ x[source, rows]
        return out

    def layer(self, name, x):
        alpha = (2 * self.cfg["encoder_layers"]) ** 0.25 if self.cfg["deep_norm"] else 1.0
        if self.cfg["layer_norm_first"]:
            x = x + self.attention(f"{name}.self_attn", self.norm(f"{name}.self_attn_layer_norm", x))
            return x + self.perceptron(name, self.norm(f"{name}.final_layer_norm", x))
        x = self.norm(f"{name}.self_attn_layer_norm", alpha * x + self.attention(f"{name}.self_attn", x))
        return self.norm(f"{name}.final_layer_norm", alpha * x + self.perceptron(name, x))

    def perceptron(self, name, x):
        kind = self.cfg["activation_fn"]
        if kind == "glu":
            x = self.linear(f"{name}.fc1.linear", x)
            half = x.shape[1] // 2
            return self.linear(f"{name}.fc2", x[:, :half] * x[:, half:] / (1 + np.exp(-x[:, half:])))
        return self.linear(f"{name}.fc2", ACTIVATIONS[kind](self.linear(f"{name}.fc1", x)))

    def attention(self, name, x):
        heads, size = self.cfg["encoder_attention_heads"], x.shape[1] // self.cfg["encoder_attention_heads"]
        query, key, value = (self.linear(f"{name}.{part}_proj", x) for part in "qkv")
        out = np.zeros_like(x)
        for head in range(heads):
            own = slice(head * size, (head + 1) * size)
            for i in range(len(x)):
                logits = [query[i, own] @ key[j, own] / math.sqrt(size) for j in range(len(x))]
                if self.cfg["relative_position_embedding"]:
                    gate = self.gate(name, query[i, own], head) if self.cfg["gru_rel_pos"] else 1.0
                    logits = [logit + gate * self.position_bias(j - i, head) for j, logit in enumerate(logits)]
                weights = np.exp(np.array(logits) - max(logits))
                out[i, own] = (weights / weights.sum()) @ value[:, own]
        return self.linear(f"{name}.out_proj", out)

    def gate(self, name, query, head) -> float:
        logits = self.linear(f"{name}.grep_linear", query)
        update, reset = (1 / (1 + math.exp(-part.sum())) for part in (logits[:4], logits[4:]))
        return update * (reset * self.weights[f"{name}.grep_a"][0, head, 0, 0] - 1) + 2

    def position_bias(self, offset, head) -> float:
        bucket = math.floor(slow_bucket(offset, self.cfg["num_buckets"], self.cfg["max_distance"]))
        return self.weights["encoder.layers.0.self_attn.relative_attention_bias.weight"][bucket, head]


def slow_bucket(offset: int, num_buckets: int, max_distance: int) -> float:
    """T5's bucket of one offset, before the rounding down."""
    half = num_buckets // 2
    near, distance = half // 2, abs(offset)
    if distance >= near:
        distance = near + math.log(distance / near) / math.log(max_distance / near) * (half - near)
    return min(distance, half - 1) + (half if offset > 0 else 0)


def gelu(x):
    return 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def gelu_tanh(x):
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


ACTIVATIONS = {
    "gelu": gelu,
    "gelu_accurate": gelu_tanh,
    "gelu_fast": gelu_tanh,
    "relu": lambda x: np.maximum(x, 0),
    "tanh": np.tanh,
    "linear": lambda x: x,
}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"gru_rel_pos": False},
        {"relative_position_embedding": False},
        {"relative_position_embedding": False, "gru_rel_pos": False},
        {"deep_norm": False},
        {"deep_norm": False, "layer_norm_first": True},
        {"conv_pos": 5},
        {"embed_dim": 24},
        {"conv_bias": True},
        {"input_patch_size": 24},
        {"num_buckets": 11, "max_distance": 7},
        {"finetuned_model": False},
        *({"activation_fn": name} for name in (*ACTIVATIONS, "glu")),
    ],
    ids=lambda changes: ",".join(f"{name}={value}" for name, value in changes.items()) or "as published",
)
def test_it_is_the_slow_derivation(changes):
    checkpoint, wave = make_checkpoint(**changes), make_waveform(2)
    teacher, slow = from_checkpoint(checkpoint, "beats.pt"), Slow(checkpoint)
    expected = np.array([slow.tokens(clip) for clip in wave])
    torch.testing.assert_close(teacher.tokens(wave).double().numpy(), expected, atol=1e-5, rtol=0)
    scores, features = teacher(wave)
    assert scores.dtype == features.dtype == torch.float32
    torch.testing.assert_close(features.double().numpy(), expected.mean(1), atol=1e-5, rtol=0)
    if changes.get("finetuned_model", True):
        probs = 1 / (1 + np.exp(-slow.linear("predictor", expected).mean(1)))
        torch.testing.assert_close(scores.double().numpy(), probs, atol=1e-5, rtol=0)
        assert expected.std() > 0.3 and probs.std(0).max() > 1e-3, "weights so small that anything would agree"


@pytest.mark.parametrize(("num_buckets", "max_distance"), [(320, 800), (320, 1280), (32, 128)])
def test_buckets_are_t5s(num_buckets, max_distance):
    """A distance that the formula puts on the very edge may fall on either side: float32 decides, as when trained."""
    length = max_distance + 100
    found = relative_buckets(length, num_buckets, max_distance)
    line = torch.cat([found[-1, :-1], found[0]])  # the last query sees all that is before, the first all after
    place = torch.arange(length)
    assert torch.equal(found, line[place[None, :] - place[:, None] + length - 1])
    exact = [slow_bucket(offset, num_buckets, max_distance) for offset in range(1 - length, length)]
    firm = [abs(value - round(value)) > 1e-4 or value == round(value) for value in exact]
    assert sum(firm) >= len(line) - 20
    assert all(a == math.floor(b) for a, b, sure in zip(line.tolist(), exact, firm, strict=True) if sure)
    assert set(line.tolist()) == set(range(num_buckets)) - {num_buckets // 2}  # no key is zero places after its query


# ----------------------------------------------------------------------------------------------------------- features


def signals():
    """Clips in which quiet bins lie far below loud ones, where one rounding more or less shows."""
    time, noise = torch.arange(16000) / 16000, make_waveform(1, 16000)[0]
    tone = 0.5 * torch.sin(2 * torch.pi * 1000 * time)
    low = torch.cumsum(noise, 0) / 20
    return {"noise": noise, "tone": tone, "low": low, "quiet": 1e-4 * noise, "offset": 0.5 + tone, "silence": 0 * noise}


@pytest.mark.parametrize("name", signals())
def test_features_are_torchaudios_on_16_bit_samples(name, monkeypatch):
    """In every bin: the model hears what it was trained on, whatever the loudness."""
    teacher, heard = make_teacher(), []
    monkeypatch.setattr(teacher.model, "forward", lambda fbank: heard.append(fbank) or torch.zeros(1, 1, 24))
    teacher(signals()[name][None])
    expected = slow_features(signals()[name])
    assert heard[0].shape == (1, 98, 128)  # not padded
    torch.testing.assert_close(heard[0][0].double().numpy(), expected, atol=1e-6, rtol=0)


def test_a_clip_shorter_than_a_patch_is_one_line():
    teacher = make_teacher()
    assert teacher(make_waveform(1, 2800))[1].isfinite().all()  # 16 frames
    with pytest.raises(InputError, match=r"needs 16 frames of 10 ms, it cannot hear 0\.17\d* s; raise data\.seconds"):
        teacher(make_waveform(1, 2799))


# ---------------------------------------------------------------------------------------------------------- invariants


def test_a_clip_does_not_depend_on_its_batch():
    teacher, wave = make_teacher(), make_waveform(5)
    scores, features = teacher(wave)
    order = torch.tensor([3, 1, 4, 0, 2])
    for found, whole in zip(teacher(wave[order]), (scores, features), strict=True):
        torch.testing.assert_close(found, whole[order], atol=1e-6, rtol=0)
    for number, clip in enumerate(wave):
        torch.testing.assert_close(teacher(clip[None])[0][0], scores[number], atol=1e-6, rtol=0)
    assert (scores[0] - scores[1]).abs().max() > 1e-4


def test_frames_after_the_last_whole_patch_are_not_heard():
    teacher, wave = make_teacher(), make_waveform(1, 400 + 160 * 47)
    assert teacher.tokens(wave).shape == (1, 24, 24)  # 48 frames
    for more in (1, 160, 160 * 15):
        longer = torch.cat([wave, torch.ones(1, more)], dim=1)
        torch.testing.assert_close(teacher.tokens(longer), teacher.tokens(wave), atol=1e-6, rtol=0)
    assert teacher.tokens(torch.cat([wave, torch.ones(1, 160 * 16)], dim=1)).shape == (1, 32, 24)


def test_it_is_frozen_and_stays_in_evaluation_mode():
    teacher = make_teacher()
    teacher.train()
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert not any(part.training for part in teacher.modules())
    assert not any(out.requires_grad for out in (*teacher(make_waveform()), teacher.tokens(make_waveform())))


@pytest.mark.parametrize("how", ["autocast", "weights"])
def test_16_bits(how):
    teacher, wave = make_teacher(), make_waveform()
    exact = teacher(wave)
    if how == "weights":
        teacher.bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=how == "autocast"):
        found = teacher(wave)
    for a, b in zip(found, exact, strict=True):
        assert a.dtype == torch.float32 and 0 < (a - b).abs().max() < 0.05


def test_it_never_makes_the_host_wait(no_waiting):
    teacher, wave = make_teacher(), make_waveform()
    with no_waiting():
        teacher(wave)


# --------------------------------------------------------------------------------------------------------- checkpoints


@pytest.mark.parametrize("finetuned", [True, False])
def test_the_published_weights_are_the_models_one_for_one(finetuned):
    cfg = BASE | {"finetuned_model": finetuned}
    with torch.device("meta"):
        model = Beats(read_config(cfg, "beats.pt"))
    shapes = published_shapes(cfg)
    shapes["encoder.pos_conv.0.weight"] = shapes.pop("encoder.pos_conv.0.weight_v")
    del shapes["encoder.pos_conv.0.weight_g"]
    for number in range(1, 12):
        del shapes[f"encoder.layers.{number}.self_attn.relative_attention_bias.weight"]
    assert {name: tuple(value.shape) for name, value in model.state_dict().items()} == shapes
    assert round(sum(map(math.prod, shapes.values())) / 1e6) == (91 if finetuned else 90)  # the paper's Table 1: 90 M


def test_how_weights_are_stored_makes_no_difference():
    wave, expected = make_waveform(), make_teacher()(make_waveform())
    once = make_checkpoint()
    del once["model"]["encoder.layers.1.self_attn.relative_attention_bias.weight"]
    parallel = make_checkpoint()
    parallel["model"] = {f"module.{name}": value for name, value in parallel["model"].items()}
    text = make_checkpoint()
    text["label_dict"] = {str(place): name for place, name in text["label_dict"].items()}
    for checkpoint in (make_checkpoint(norm=NEW_NORM), once, parallel, text):
        teacher = from_checkpoint(checkpoint, "beats.pt")
        assert teacher.classes == tuple(NAMES)
        assert all(map(torch.equal, teacher(wave), expected))
    half = make_checkpoint()
    half["model"] = {name: value.half() for name, value in half["model"].items()}
    torch.testing.assert_close(from_checkpoint(half, "beats.pt")(wave), expected, atol=2e-2, rtol=0)


def test_weights_are_copied_out_of_the_checkpoint():
    checkpoint, wave = make_checkpoint(), make_waveform()
    teacher = from_checkpoint(checkpoint, "beats.pt")
    before = teacher(wave)
    for value in checkpoint["model"].values():
        value.zero_()
    assert all(map(torch.equal, teacher(wave), before))


@pytest.mark.parametrize("kind", ["auto", "beats"])
def test_a_file_is_recognised_and_loaded(tmp_path, kind):
    torch.save(make_checkpoint(), tmp_path / "beats.pt")
    teacher = load_teacher(tmp_path / "beats.pt", kind=kind)
    assert teacher.classes == tuple(NAMES) and teacher.score_kind == "probs" and teacher.embed_dim == 24
    assert all(map(torch.equal, teacher(make_waveform()), make_teacher()(make_waveform())))
    assert teacher.to("cpu") is teacher


def test_without_a_head_or_names_there_are_no_classes():
    pretrained = make_teacher(finetuned_model=False)
    scores, features = pretrained(make_waveform())
    assert pretrained.classes == () and scores.shape == (3, 0) and features.shape == (3, 24)
    unnamed = make_checkpoint()
    del unnamed["label_dict"]
    teacher = from_checkpoint(unnamed, "beats.pt")
    assert teacher.classes == () and torch.equal(teacher(make_waveform())[0], make_teacher()(make_waveform())[0])


def without(part, name):
    return lambda checkpoint: checkpoint[part].pop(name)


def having(part, name, value):
    return lambda checkpoint: checkpoint[part].__setitem__(name, value)


FC2, BIAS_1 = "encoder.layers.0.fc2.bias", "encoder.layers.1.self_attn.relative_attention_bias.weight"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda c: c.pop("cfg"), "looks like BEATs; a BEATs checkpoint holds 'cfg' and 'model'"),
        (lambda c: c.pop("model"), "looks like a file without weights; a BEATs"),
        (lambda c: c.update(cfg=["encoder_layers"]), "a BEATs checkpoint holds 'cfg' and 'model'"),
        (having("model", "quantize.embedding.weight", torch.zeros(4, 2)), "a BEATs tokenizer, which is no teacher"),
        (without("model", FC2), f"lacks {FC2}, which its cfg asks for"),
        (having("model", "mask_emb", torch.zeros(24)), "has mask_emb, which its cfg does not speak of"),
        (having("model", FC2, torch.zeros(7)), rf"{FC2} is \(7,\), its cfg asks for \(24,\)"),
        (having("model", BIAS_1, torch.zeros(16, 3)), f"{BIAS_1} is not layer 0's"),
        (without("model", BIAS_1.replace("1", "0")), f"{BIAS_1} is not layer 0's"),
        (
            having("model", "encoder.pos_conv.0.weight_g", torch.ones(24, 1, 1)),
            r"weight_g is \(24, 1, 1\), expected one",
        ),
        (without("model", "encoder.pos_conv.0.weight_g"), r"lacks encoder\.pos_conv\.0\.weight"),
        (having("cfg", "finetuned_model", False), r"has predictor\.weight, which its cfg does not speak of"),
        (having("cfg", "gru_rel_pos", False), "grep_linear.weight, which its cfg does not speak of"),
        (having("cfg", "embed_dim", 13), r"patch_embedding\.weight is \(12, 1, 16, 16\), its cfg asks for"),
        (having("cfg", "encoder_layers", 3), "has fewer layers than the 3 of its cfg"),
        (having("cfg", "encoder_layers", 1), "which its cfg does not speak of"),
        (
            having("cfg", "encoder_layers", 10**15),
            "encoder_layers = 1000000000000000, expected a number from 1 to 100000",
        ),
        (having("cfg", "conv_pos", "128"), "conv_pos = '128', expected a number from 1"),
        (having("cfg", "deep_norm", 1), "deep_norm = 1, expected True or False"),
        (having("cfg", "conv_pos", torch.ones(2, 2)), r"conv_pos = tensor\(\[\[1., 1.\],, expected a number"),
        (having("cfg", "scales", torch.ones(2, 2)), "which BEATs as published does not know"),
        (having("cfg", "rotary", True), "rotary = True, which BEATs as published does not know"),
        (having("cfg", "activation_fn", "mish"), "activation_fn = 'mish', expected one of gelu"),
        (having("cfg", "layer_norm_first", True), "both deep_norm and layer_norm_first"),
        (having("cfg", "encoder_attention_heads", 5), "not a multiple of its 5 heads"),
        (having("cfg", "conv_pos_groups", 5), "5 conv_pos_groups"),
        (having("cfg", "max_distance", 4), "num_buckets = 16 and max_distance = 4, which do not fit"),
        (having("cfg", "num_buckets", 3), "num_buckets = 3 and max_distance = 10, which do not fit"),
        (having("cfg", "input_patch_size", 129), "more than the 128 mel bins"),
        (without("cfg", "input_patch_size"), "cfg lacks input_patch_size"),
        (without("label_dict", 3), "label_dict does not name each of the 5 classes once"),
        (having("label_dict", 5, "/m/x"), "label_dict does not name each"),
        (having("label_dict", 3, NAMES[0]), "label_dict does not name each"),
        (having("label_dict", 3, 17), "label_dict does not name each"),
        (lambda c: c.update(label_dict=NAMES), "label_dict does not name each"),
    ],
)
def test_what_cannot_be_is_one_line(damage, message):
    checkpoint = make_checkpoint()
    damage(checkpoint)
    with pytest.raises(InputError, match=message) as caught:
        from_checkpoint(checkpoint, "folder/beats.pt")
    assert "\n" not in str(caught.value) and str(caught.value).startswith("teacher folder/beats.pt: ")


def test_settings_of_the_training_and_unknown_ones_that_are_off_are_passed_over():
    checkpoint, wave = make_checkpoint(), make_waveform()
    checkpoint["cfg"] |= {"encoder_layerdrop": 0.5, "dropout": 0.9, "checkpoint_activations": False, "fsdp": None}
    assert all(map(torch.equal, from_checkpoint(checkpoint, "beats.pt")(wave), make_teacher()(wave)))


# -------------------------------------------------------------------------------------------------------- distillation

CLASSES = ("bell", "cat", "dog", "rain")


def make_distill(model, teacher, class_map=None):
    return Distill(
        model,
        classes=CLASSES,
        multi_label=True,
        distill=DistillConfig(gamma=0.5),
        augmentation=AugmentConfig(),
        data=DataConfig(),
        num_frames=94,
        teacher=teacher,
        class_map=class_map,
    )


def test_a_step_of_distillation(make_model, make_batch):
    """Scores by name, features through the map that joins the widths; gradients for the student alone."""
    teacher, batch = make_teacher(), make_batch(multi_label=True, waveform=True)
    names = dict(zip(CLASSES, (NAMES[column] for column in (4, 0, 2, 1)), strict=True))
    module = make_distill(make_model().eval(), teacher, names)
    total, metrics = module(batch)
    scores, features = teacher(batch.waveform)
    logits, clip = module.model(batch.fbank)
    expected = torch.nn.functional.binary_cross_entropy_with_logits(logits, scores[:, [4, 0, 2, 1]])
    assert metrics["teacher_label"].item() == pytest.approx(expected.item(), rel=1e-5)
    difference = (module.projection(clip) - features).square().mean()
    assert metrics["regression"].item() == pytest.approx(difference.item(), rel=1e-5)
    total.backward()
    assert module.model.patch_embed.weight.grad.abs().sum() > 0 and module.projection.weight.shape == (24, 64)
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert not any(name.startswith("_outside") for name in module.state_dict())


@pytest.mark.parametrize("multi_label", [True, False])
def test_a_pre_trained_teacher_gives_features_only(make_model, make_batch, multi_label):
    module = make_distill(make_model().eval(), make_teacher(finetuned_model=False))
    module.multi_label = multi_label
    total, metrics = module(make_batch(multi_label=multi_label, waveform=True))
    assert set(metrics) == {"label", "regression"} and total.isfinite()
