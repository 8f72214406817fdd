"""AST as a teacher, against transformers' implementation with the same random weights; and wrong files."""

import json
import shutil

import numpy as np
import pytest
import torch
import torchaudio
from safetensors.torch import load_file, save_file
from torch import nn

from fastsskd.errors import InputError
from fastsskd.foreign import load_checkpoint, recognise, weights_in
from fastsskd.teachers import ast, describe, load_teacher
from fastsskd.teachers.vit import find_strides
from fastsskd.weights import ModelInfo, save_model

NAMES = ("Speech", "Dog", "Bell, small", "Rain", "high")
STRIDES = (10, 12, 14, 16)
OURS = ModelInfo("nano", ("bell", "cat", "dog", "rain"), False, 0.96, -3.0, 2.0)


def make_theirs(folder, *, width=32, heads=4, stride=10, names=NAMES, eps=1e-12):
    """A random model of transformers for clips of 128 frames, and the folder it saved itself into."""
    from transformers import ASTConfig, ASTForAudioClassification

    config = ASTConfig(
        hidden_size=width,
        num_hidden_layers=2,
        num_attention_heads=heads,
        intermediate_size=48,
        frequency_stride=stride,
        time_stride=stride,
        max_length=128,
        layer_norm_eps=eps,
        id2label=dict(enumerate(names)),
        label2id={name: place for place, name in enumerate(names)},
    )
    model = ASTForAudioClassification(config).eval()
    generator = torch.Generator().manual_seed(stride)
    with torch.no_grad():
        for name, value in model.named_parameters():
            mean = 1.0 if "layernorm" in name and name.endswith("weight") else 0.0
            value.copy_(mean + 0.2 * torch.randn(value.shape, generator=generator))
    model.save_pretrained(folder)
    return model


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """A function that makes such a model once, and its folder."""
    made = {}

    def make(**options):
        key = tuple(sorted(options.items()))
        if key not in made:
            folder = tmp_path_factory.mktemp("hf")
            made[key] = make_theirs(folder, **options), folder
        return made[key]

    return make


def original_layout(folder) -> dict[str, torch.Tensor]:
    """The weights that transformers saved, as the authors' own script would have."""
    state = load_file(folder / "model.safetensors")
    ast_prefix = "audio_spectrogram_transformer."
    flat = {
        "v.cls_token": state[ast_prefix + "embeddings.cls_token"],
        "v.dist_token": state[ast_prefix + "embeddings.distillation_token"],
        "v.pos_embed": state[ast_prefix + "embeddings.position_embeddings"],
        "v.head.weight": torch.ones(1000, 8),
        "v.head.bias": torch.ones(1000),
        "v.head_dist.weight": torch.ones(1000, 8),
        "v.head_dist.bias": torch.ones(1000),
    }
    for end in ("weight", "bias"):
        flat[f"v.patch_embed.proj.{end}"] = state[f"{ast_prefix}embeddings.patch_embeddings.projection.{end}"]
        flat[f"v.norm.{end}"] = state[f"{ast_prefix}layernorm.{end}"]
        flat[f"mlp_head.0.{end}"] = state[f"classifier.layernorm.{end}"]
        flat[f"mlp_head.1.{end}"] = state[f"classifier.dense.{end}"]
        for block in range(2):
            old, new = f"{ast_prefix}encoder.layer.{block}", f"v.blocks.{block}"
            flat[f"{new}.norm1.{end}"] = state[f"{old}.layernorm_before.{end}"]
            flat[f"{new}.norm2.{end}"] = state[f"{old}.layernorm_after.{end}"]
            parts = [state[f"{old}.attention.attention.{part}.{end}"] for part in ("query", "key", "value")]
            flat[f"{new}.attn.qkv.{end}"] = torch.cat(parts)
            flat[f"{new}.attn.proj.{end}"] = state[f"{old}.attention.output.dense.{end}"]
            flat[f"{new}.mlp.fc1.{end}"] = state[f"{old}.intermediate.dense.{end}"]
            flat[f"{new}.mlp.fc2.{end}"] = state[f"{old}.output.dense.{end}"]
    return {f"module.{name}": value for name, value in flat.items()}


def clips(seconds=0.96, number=3, offset=0.0) -> torch.Tensor:
    time = np.arange(round(seconds * 16000)) / 16000
    random = np.random.default_rng(1)
    tones = [0.3 * np.sin(2 * np.pi * 300 * (n + 1) * time) * np.exp(-time * n) for n in range(number)]
    return torch.tensor(np.stack(tones) + 0.01 * random.standard_normal((number, len(time))) + offset).float()


def their_features(waveform, frames=128, mean=-4.2677393, std=4.5689974, centre=False) -> torch.Tensor:
    """AST's input by torchaudio, clip by clip, as AST's and transformers' loaders make it."""
    out = []
    for wave in waveform:
        wave = wave[None] - wave.mean() if centre else wave[None]
        options = {"htk_compat": True, "window_type": "hanning", "num_mel_bins": 128, "dither": 0.0}
        fbank = torchaudio.compliance.kaldi.fbank(wave, sample_frequency=16000, use_energy=False, **options)
        out.append((nn.ZeroPad2d((0, 0, 0, frames - len(fbank)))(fbank) - mean) / (2 * std))
    return torch.stack(out)


def assert_same(answers, model, features) -> None:
    """Logits and clip feature are those of transformers' model, and it is no trivial agreement."""
    with torch.no_grad():
        expected = model(features)
        hidden = model.audio_spectrogram_transformer(features).last_hidden_state
    scores, clip = answers
    assert scores.dtype == clip.dtype == torch.float32 and not scores.requires_grad
    torch.testing.assert_close(scores, expected.logits, atol=1e-4, rtol=0)
    torch.testing.assert_close(clip, (hidden[:, 0] + hidden[:, 1]) / 2, atol=1e-4, rtol=0)
    assert (expected.logits[0] - expected.logits[1]).abs().max() > 0.01


# ------------------------------------------------------------------------------------------------------ same numbers


@pytest.mark.parametrize("stride", STRIDES)
def test_hugging_face_s_layout_gives_transformers_numbers(theirs, stride):
    model, folder = theirs(stride=stride)
    teacher = load_teacher(folder)
    assert teacher.classes == NAMES and teacher.score_kind == "logits" and teacher.embed_dim == 32
    assert_same(teacher(clips()), model, their_features(clips()))


@pytest.mark.parametrize("stride", STRIDES)
def test_the_original_layout_gives_transformers_numbers(theirs, tmp_path, stride):
    """The strides are told from the positions. The original's norms have other epsilons than transformers'."""
    model, folder = theirs(stride=stride, width=128, heads=2, eps=1e-6)
    model.classifier.layernorm.eps = 1e-5
    torch.save(original_layout(folder), tmp_path / "best_audio_model.pth")
    teacher = load_teacher(tmp_path / "best_audio_model.pth", kind="ast")
    assert teacher.classes == () and teacher.model.layout.strides == (stride, stride)
    assert_same(teacher(clips()), model, their_features(clips(), centre=True))


def test_features_are_those_of_torchaudio_with_an_offset_of_the_microphone_too(theirs):
    """The original's loader takes the clip's mean off, transformers' does not; Kaldi's frames lose theirs anyway."""
    teacher = load_teacher(theirs()[1])
    for offset in (0.0, 0.2):
        wave = clips(offset=offset)
        for centre in (False, True):
            expected = their_features(wave, teacher.model.num_frames, centre=centre)
            torch.testing.assert_close(teacher.features(wave), expected, atol=2e-3 if offset else 2e-4, rtol=0)


@pytest.mark.parametrize("layout", ["pytorch_model.bin", "in memory", "file alone", "half precision"])
def test_the_forms_in_which_hugging_face_s_weights_come(theirs, tmp_path, layout):
    model, folder = theirs(width=128, heads=2)
    path, state = tmp_path / "pytorch_model.bin", load_file(folder / "model.safetensors")
    shutil.copy(folder / "config.json", tmp_path)
    if layout == "pytorch_model.bin":
        torch.save(state, path)
    elif layout == "in memory":
        torch.save(model.state_dict(), path)
    elif layout == "file alone":
        (tmp_path / "config.json").unlink()
        save_file(state, tmp_path / "weights.safetensors")
    else:
        save_file({name: value.half() for name, value in state.items()}, tmp_path / "model.safetensors")
        model.half().float()
    teacher = load_teacher(tmp_path)
    assert teacher.classes == (() if layout == "file alone" else NAMES)
    assert {value.dtype for value in teacher.state_dict().values()} == {torch.float32}
    assert_same(teacher(clips()), model, their_features(clips()))


def test_the_preprocessors_normalisation_is_taken(theirs, tmp_path):
    model, folder = theirs()
    shutil.copytree(folder, tmp_path / "hf")
    about = {"mean": -6.845978, "std": 5.5654526, "do_normalize": True}
    (tmp_path / "hf/preprocessor_config.json").write_text(json.dumps(about))
    assert_same(load_teacher(tmp_path / "hf")(clips()), model, their_features(clips(), mean=-6.845978, std=5.5654526))
    (tmp_path / "hf/preprocessor_config.json").write_text(json.dumps({**about, "do_normalize": False}))
    assert_same(load_teacher(tmp_path / "hf")(clips()), model, their_features(clips(), mean=0.0, std=0.5))


def test_without_a_class_head_it_gives_features_only(theirs, tmp_path):
    model, folder = theirs()
    shutil.copytree(folder, tmp_path / "hf")
    model.audio_spectrogram_transformer.save_pretrained(tmp_path / "hf")  # names without their prefix
    teacher = load_teacher(tmp_path / "hf")
    scores, clip = teacher(clips())
    assert teacher.classes == () and scores.shape == (3, 0)
    torch.testing.assert_close(clip, load_teacher(folder)(clips())[1])


def test_published_sizes_of_the_positions_tell_the_strides(tmp_path):
    for number, stride in ((1212, 10), (850, 12), (657, 14), (512, 16), (600, 10), (144, 10)):
        assert find_strides(number, tmp_path / "best.pth") == (stride, stride)
    assert find_strides(768, tmp_path / "best.pth") == (10, 16)
    for unknown in (288, 1000, 1):
        with pytest.raises(InputError, match="cannot be told from"):
            find_strides(unknown, tmp_path / "best.pth")
    assert find_strides(288, tmp_path / "ast_16_14_0.4.pth") == (16, 14)
    assert find_strides(512, tmp_path / "run_10_16_2024.pth") == (16, 16)  # a date: 10 and 16 cannot be


def test_ten_seconds_are_what_an_audioset_model_hears(theirs, tmp_path):
    state = original_layout(theirs(width=128, heads=2, eps=1e-6)[1])
    state["module.v.pos_embed"] = torch.zeros(1, 1214, 128)
    torch.save(state, tmp_path / "audioset_10_10_0.4593.pth")
    teacher = load_teacher(tmp_path / "audioset_10_10_0.4593.pth")
    assert teacher(torch.zeros(1, 160000))[0].isfinite().all()
    assert teacher.model.tokens(torch.zeros(1, 1024, 128)).shape == (1, 1214, 128)


# ------------------------------------------------------------------------------------------------------------ conduct


def test_a_teacher_is_frozen_and_leaves_the_random_state_alone(theirs):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    teacher = load_teacher(theirs()[1])
    teacher.train()
    assert torch.equal(torch.get_rng_state(), before)
    assert not any(p.requires_grad for p in teacher.parameters())
    assert not any(part.training for part in teacher.modules())
    assert teacher.to("cpu") is teacher


def test_clips_do_not_disturb_each_other_and_longer_ones_are_refused(theirs):
    teacher, wave = load_teacher(theirs()[1]), clips(1.25)
    torch.testing.assert_close(teacher(wave)[0][1:2], teacher(wave[1:2])[0], atol=1e-5, rtol=1e-5)
    with pytest.raises(InputError) as caught:
        teacher(clips(2.0))
    assert "it cannot hear 2 s; lower data.seconds" in str(caught.value) and "\n" not in str(caught.value)


def test_sixteen_bits_are_near_and_come_back_as_float32(theirs):
    teacher = load_teacher(theirs()[1])
    exact, wave = teacher(clips()), clips()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores, clip = teacher(wave)
    assert scores.dtype == clip.dtype == torch.float32
    assert 1e-6 < (scores - exact[0]).abs().max() < 0.05 * exact[0].abs().max()


# ------------------------------------------------------------------------------------------------- names of its classes


@pytest.fixture
def class_list(tmp_path):
    """AudioSet's format, in no order, for five classes."""
    rows = [f'{place},/m/{place},"{name}"' for place, name in enumerate(NAMES)]
    path = tmp_path / "class_labels_indices.csv"
    path.write_text("index,mid,display_name\n" + "\n".join(reversed(rows)) + "\n")
    return path


@pytest.fixture
def unnamed(theirs, tmp_path):
    torch.save(original_layout(theirs(width=128, heads=2, eps=1e-6)[1]), tmp_path / "ast.pth")
    return tmp_path / "ast.pth"


def test_a_class_list_names_the_outputs(theirs, unnamed, class_list, tmp_path):
    assert load_teacher(unnamed, classes=class_list).classes == NAMES
    _, folder = theirs(names=tuple(f"/m/{n}" for n in range(5)))
    assert load_teacher(folder, classes=class_list).classes == NAMES
    _, folder = theirs(names=tuple(f"LABEL_{n}" for n in range(5)))
    assert load_teacher(folder).classes == ()
    assert describe(load_teacher(folder)) == "no named classes, features of 32"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (None, "cannot be read"),
        ("index,mid,display_name\n0,/m/0,A\n1,/m/1,B\n", "has 2 classes, the teacher has 5 outputs"),
        ("index,mid,display_name\n0,/m/0,A\n2,/m/1,B\n", "numbered from 0"),
        ("index,mid,display_name\n0,/m/0,A\n1,/m/1,A\n", "each class once"),
        ("index,mid\n0,/m/0\n", "expected index,mid,display_name"),
        ("", "expected index,mid,display_name"),
        ("index,mid,display_name\nzero,/m/0,A\n", "expected index,mid,display_name"),
    ],
)
def test_a_wrong_class_list_is_one_line(unnamed, class_list, text, says):
    class_list.unlink() if text is None else class_list.write_text(text)
    with pytest.raises(InputError, match=says) as caught:
        load_teacher(unnamed, classes=class_list)
    assert "\n" not in str(caught.value) and str(class_list) in str(caught.value)


# --------------------------------------------------------------------------------------------------------- wrong files


def refusal(state, path) -> str:
    torch.save(state, path)
    with pytest.raises(InputError) as caught:
        load_teacher(path)
    text = str(caught.value)
    assert "\n" not in text and str(path) in text
    return text


def test_weights_that_do_not_fit_together(theirs, tmp_path):
    state, path = original_layout(theirs(width=128, heads=2, eps=1e-6)[1]), tmp_path / "ast.pth"
    cut = {name: value for name, value in state.items() if "blocks.0.attn.qkv.bias" not in name}
    assert "has blocks.1.attn.qkv.bias, which this model does not know" in refusal(cut, path)
    cut = {name: value for name, value in state.items() if "blocks.1.mlp.fc2.bias" not in name}
    assert "lacks blocks.1.mlp.fc2.bias" in refusal(cut, path)
    assert "has rope, which this model does not know" in refusal({**state, "module.v.rope": torch.ones(2)}, path)
    other = {**state, "module.v.norm.weight": torch.ones(7)}
    assert "norm.weight is (7,), the other weights ask for (128,)" in refusal(other, path)
    other = {**state, "module.v.patch_embed.proj.weight": torch.ones(128, 3, 16, 16)}
    assert "its patches are (3, 16, 16)" in refusal(other, path)
    other = {**state, "module.v.pos_embed": torch.ones(1, 290, 128)}
    assert "cannot be told from 288 positions; put them into the file's name" in refusal(other, path)
    other = {**state, "module.v.pos_embed": torch.ones(1, 146, 100)}
    assert "width 100 is not a multiple of 64, so its heads cannot be told" in refusal(other, path)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"model_type": "wav2vec2"}, "is of a 'wav2vec2', but the weights beside it are of AST"),
        ({"num_mel_bins": 64}, "num_mel_bins is 64; only 128"),
        ({"hidden_act": "relu"}, "hidden_act is 'relu'; only 'gelu'"),
        ({"num_attention_heads": 5}, "width 32 is not a multiple of its 5 heads"),
        ({"num_attention_heads": "4"}, "num_attention_heads is '4', expected a number"),
        ({"frequency_stride": 16}, "144 positions are not the patches of 128 frames at the strides 16 and 10"),
        ({"layer_norm_eps": "small"}, "layer_norm_eps is 'small', expected a small number"),
        ({"max_length": 1024}, "144 positions are not the patches of 1024 frames at the strides 10 and 10"),
    ],
)
def test_a_configuration_that_does_not_fit_is_one_line(theirs, tmp_path, change, says):
    shutil.copytree(theirs()[1], tmp_path / "hf")
    file = tmp_path / "hf/config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(InputError, match=says) as caught:
        load_teacher(tmp_path / "hf")
    assert "\n" not in str(caught.value)


def test_other_models_are_named(theirs, make_model, unnamed, tmp_path):
    path = tmp_path / "other.pth"
    text = refusal({"a": torch.ones(1)}, path)
    assert (
        "looks like an unknown model, with 1 tensors such as 'a'; expected ours (a run's model.safetensors), ast"
        in text
    )
    assert "looks like wav2vec 2.0, Hugging Face layout" in refusal({"wav2vec2.masked": torch.ones(1)}, path)
    for wrong in ("audiomae", "ours"):
        with pytest.raises(InputError) as caught:
            load_teacher(unnamed, kind=wrong)
        assert "\n" not in str(caught.value) and str(unnamed) in str(caught.value)
        assert f"looks like AST, original layout; expected kind '{wrong}'" in str(caught.value)
    save_model(tmp_path / "model.safetensors", make_model().state_dict(), OURS)
    with pytest.raises(InputError, match=r"looks like a model of fastsskd.*; expected kind 'ast'"):
        load_teacher(tmp_path / "model.safetensors", kind="ast")
    assert "looks like a model of fastsskd, perhaps without" in refusal(make_model().state_dict(), path)


def test_reading_takes_nothing_from_the_file_afterwards(theirs, unnamed):
    teacher = ast.from_checkpoint(load_checkpoint(unnamed), unnamed)
    stored = weights_in(load_checkpoint(unnamed))
    before = teacher(clips())[0]
    with torch.no_grad():
        for value in stored.values():
            value.zero_()
    assert torch.equal(teacher(clips())[0], before)


# ------------------------------------------------------------------------------------------------------------ whole run


def test_a_student_learns_from_ast_in_a_whole_run(theirs, unnamed, training, tones, tmp_path):
    """Alone by its class names; then with one that names none, whose features count alone."""
    _, folder = theirs(names=("low", "high", "other"))
    options = {"recipe__stages": '["distill"]', "distill__epochs": 1}
    lines, result, printed = training.run(tmp_path / "one", tones, distill__teacher=json.dumps(str(folder)), **options)
    assert result["status"] == "complete" and len(lines) == 4
    assert {"label", "teacher_label", "regression"} <= result["iterations"][0]["distill"]["losses"].keys()
    assert "teacher with 3 named classes, features of 32" in printed

    both = json.dumps([str(folder), str(unnamed)])
    _, result, printed = training.run(tmp_path / "two", tones, distill__teacher=both, **options)
    assert {"teacher_label", "regression"} <= result["iterations"][0]["distill"]["losses"].keys()
    assert "3 classes that 2 teachers share" in printed and "no named classes, features of 128" in printed

    _, result, printed = training.run(tmp_path / "three", tones, distill__teacher=json.dumps(str(unnamed)), **options)
    assert "teacher_label" not in result["iterations"][0]["distill"]["losses"]
    assert "the teacher gives features only: it does not name its classes; distill.teacher_classes can" in printed


@pytest.mark.parametrize("wrong", ["page", "short", "map"])
def test_a_wrong_teacher_ends_the_run_before_anything_is_trained(theirs, training, tones, tmp_path, wrong):
    """A teacher of clips of 1.3 s in a run of 2 s; a class map of others; and a download that failed."""
    options = {"distill__teacher": json.dumps(str(theirs()[1])), "distill__epochs": 1, "ssl__epochs": 1}
    if wrong == "page":
        (tmp_path / "ast.pth").write_text("<!DOCTYPE html><html></html>")
        options["distill__teacher"] = json.dumps(str(tmp_path / "ast.pth"))
        says = "ast.pth: a web page, not the weights"
    elif wrong == "short":
        options["data__seconds"] = 2.0
        says = "it cannot hear 2 s"
    else:
        (tmp_path / "map.json").write_text('{"low": "Whale"}')
        options["distill__class_map"] = json.dumps(str(tmp_path / "map.json"))
        says = "the teacher has no class 'Whale'"
    lines, result, printed = training.run(tmp_path / "run", tones, expect=1, **options)
    assert lines == [] and result is None and not (tmp_path / "run").exists()
    assert says in printed and "Traceback" not in printed


@pytest.mark.parametrize("layout", ["original", "hugging face", "hugging face with its configuration"])
def test_any_one_weight_damaged_is_one_line(theirs, tmp_path, layout):
    """Missing, renamed, a single number, a vector, one column too many, or of whole numbers."""
    _, folder = theirs(width=128, heads=2, eps=1e-6)
    state = original_layout(folder) if layout == "original" else load_file(folder / "model.safetensors")
    if layout.endswith("configuration"):
        shutil.copy(folder / "config.json", tmp_path)
    path = tmp_path / "weights.pth"
    ast.from_checkpoint(state, path)
    for name, value in state.items():
        if ".head" in name:  # DeiT's, not looked at
            continue
        rest = {other: weight for other, weight in state.items() if other != name}
        wider = torch.cat([value, value[..., :1]], dim=-1)
        damaged = [torch.tensor(1.0), torch.ones(3), wider, value.int()]
        for bad in [rest, {**rest, name + "x": value}, *({**rest, name: weight} for weight in damaged)]:
            with pytest.raises(InputError) as caught:
                load_checked(bad, path)
            assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


def load_checked(state, path):
    """As :func:`load_teacher` does with an opened file."""
    kind, words = recognise(weights_in(state))
    if kind != "ast":
        raise InputError(f"teacher {path}: looks like {words}")
    return ast.from_checkpoint(state, path)
