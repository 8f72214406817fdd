"""Teachers: one protocol, frozen, with features of their own."""

import dataclasses

import pytest
import torch

import fastsskd_kernels as kernels
from fastsskd.errors import InputError, UsageError
from fastsskd.teachers import load_teacher
from fastsskd.weights import ModelInfo, save_model

INFO = ModelInfo("nano", ("bell", "cat", "dog", "rain"), False, 0.96, -3.0, 2.0)


@pytest.fixture
def saved(tmp_path, make_model):
    model = make_model(seed=3)
    save_model(tmp_path / "model.safetensors", model.state_dict(), INFO)
    return model.eval(), tmp_path / "model.safetensors"


def test_the_protocol(saved, make_batch):
    _, path = saved
    teacher = load_teacher(path)
    scores, features = teacher(make_batch(waveform=True).waveform)
    assert scores.shape == (5, 4) and features.shape == (5, teacher.embed_dim) == (5, 64)
    assert scores.dtype == features.dtype == torch.float32
    assert teacher.classes == INFO.classes and teacher.score_kind == "logits"
    assert teacher.to("cpu") is teacher


def test_our_own_model_teaches_with_its_own_normalisation(saved, make_batch):
    model, path = saved
    wave = make_batch(waveform=True).waveform
    fbank = kernels.fbank(wave, backend="torch")
    padded = torch.nn.functional.pad(fbank, (0, 0, 0, 96 - fbank.shape[1]))
    logits, clip = model((padded - INFO.mean) / (2 * INFO.std))
    scores, features = load_teacher(path, kind="ours")(wave)
    torch.testing.assert_close(scores, logits.detach(), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(features, clip.detach(), rtol=1e-3, atol=1e-4)


def test_a_model_with_simam_teaches_as_it_was_trained(tmp_path, make_model, make_batch):
    """The SPFA teacher: its file says how it attends."""
    model, batch = make_model(attention="simam", seed=3), make_batch(waveform=True)
    info = dataclasses.replace(INFO, attention="simam")
    for name, about in (("spfa", info), ("plain", INFO)):
        save_model(tmp_path / name / "model.safetensors", model.state_dict(), about)
    spfa, plain = (load_teacher(tmp_path / name) for name in ("spfa", "plain"))
    fbank, _ = kernels.features(batch.waveform, num_frames=96, mean=INFO.mean, std=INFO.std)
    torch.testing.assert_close(spfa(batch.waveform)[0], model.eval()(fbank)[0].detach(), rtol=1e-3, atol=1e-4)
    assert not torch.allclose(spfa(batch.waveform)[0], plain(batch.waveform)[0], atol=1e-3)


def test_a_teacher_is_frozen_and_stays_in_evaluation_mode(saved, make_batch):
    teacher = load_teacher(saved[1])
    teacher.train()
    assert not any(p.requires_grad for p in teacher.parameters())
    assert not any(part.training for part in teacher.modules())
    assert not any(out.requires_grad for out in teacher(make_batch(waveform=True).waveform))


def test_a_teacher_of_longer_clips_hears_short_ones_with_padding(tmp_path, make_model, make_batch):
    info = dataclasses.replace(INFO, seconds=2.0)
    save_model(tmp_path / "model.safetensors", make_model(seconds=2.0).state_dict(), info)
    scores, _ = load_teacher(tmp_path)(make_batch(waveform=True).waveform)
    assert scores.shape == (5, 4) and scores.isfinite().all()


def test_a_teacher_of_shorter_clips_is_refused_in_one_line(saved):
    with pytest.raises(InputError) as caught:
        load_teacher(saved[1])(torch.randn(2, 32000))
    text = str(caught.value)
    assert "\n" not in text and "0.96 s" in text and "2 s" in text and "data.seconds" in text


@pytest.mark.parametrize("name", ["none.safetensors", "empty-folder", "text.safetensors"])
def test_a_path_without_a_model_is_bad_input(tmp_path, name):
    (tmp_path / "empty-folder").mkdir()
    (tmp_path / "text.safetensors").write_text("not a model")
    with pytest.raises(InputError, match=name) as caught:
        load_teacher(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_a_model_without_classes_cannot_teach(tmp_path, make_model):
    info = dataclasses.replace(INFO, classes=())
    save_model(tmp_path / "model.safetensors", make_model(num_classes=0).state_dict(), info)
    with pytest.raises(InputError, match="has no class head; use a model from a distill stage"):
        load_teacher(tmp_path)


def test_an_unknown_kind_is_wrong_usage(saved):
    with pytest.raises(UsageError, match=r"teacher kind 'wav2vec' is not one of auto"):
        load_teacher(saved[1], kind="wav2vec")
