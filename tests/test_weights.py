"""Model files: what is saved is loaded bit for bit, and what is not ours or not whole is refused in one line."""

import dataclasses
import json
import os
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from fastsskd.errors import InputError
from fastsskd.starting.initialise import initialise
from fastsskd.weights import ModelInfo, load_model, model_file, read_model_file, save_model

CLASSES = ("bell", "cat", "dog", "räin")
INFO = ModelInfo("nano", CLASSES, False, 0.96, -4.0, 4.5)
ABOUT = {
    "size": "nano", "classes": ["a"], "multi_label": False, "seconds": 1.0, "mean": 0.0, "std": 1.0,
    "sample_rate": 16000, "version": "0.1.0",
}  # fmt: skip


@pytest.fixture
def saved(tmp_path, make_model):
    """A model and its file."""
    model = make_model(seed=3)
    path = tmp_path / "run" / "model.safetensors"
    save_model(path, model.state_dict(), INFO)
    return model, path


def refusal(action, *args) -> str:
    with pytest.raises(InputError) as caught:
        action(*args)
    text = str(caught.value)
    assert "\n" not in text and type(caught.value) is InputError
    return text


# --------------------------------------------------------------------------------------------------------- round trip


def test_others_may_read_a_model_file_as_any_other_file(saved, tmp_path):
    _, path = saved
    (tmp_path / "other").touch()
    assert path.stat().st_mode == (tmp_path / "other").stat().st_mode


def test_what_is_saved_is_loaded_bit_for_bit(saved, make_batch):
    model, path = saved
    loaded, info = load_model(path)
    assert info == INFO
    assert list(loaded.state_dict()) == list(model.state_dict())
    for name, value in model.state_dict().items():
        assert value.numpy().tobytes() == loaded.state_dict()[name].numpy().tobytes(), name
    assert not loaded.training
    with torch.no_grad():
        assert torch.equal(loaded(make_batch().fbank)[0], model.eval()(make_batch().fbank)[0])


def test_the_file_and_its_folder_are_the_same_thing(saved):
    _, path = saved
    assert model_file(path) == model_file(path.parent) == path
    assert load_model(path.parent)[1] == INFO


@given(
    classes=st.lists(st.text(max_size=8), max_size=5, unique=True).map(tuple),
    multi_label=st.booleans(),
    mean=st.floats(-100, 100),
    seconds=st.floats(0.16, 60),
)
def test_any_description_survives(tmp_path_factory, classes, multi_label, mean, seconds):
    info = ModelInfo("base", classes, multi_label, seconds, mean, 2.5)
    path = tmp_path_factory.mktemp("any") / "m.safetensors"
    save_model(path, {"x": torch.zeros(1)}, info)
    assert read_model_file(path)[1] == info


def test_16_bit_and_strided_tensors_are_stored_as_plain_float32(tmp_path):
    state = {"half": torch.randn(3).bfloat16(), "strided": torch.randn(4, 6).T, "grad": torch.ones(2).requires_grad_()}
    save_model(tmp_path / "m.safetensors", state, INFO)
    for name, value in load_file(tmp_path / "m.safetensors").items():
        assert value.dtype == torch.float32 and torch.equal(value, state[name].detach().float())


def test_a_file_says_who_wrote_it_and_leaves_nothing_beside_it(saved):
    _, path = saved
    with safe_open(path, framework="pt") as opened:
        assert json.loads(opened.metadata()["fastsskd"])["version"]
    assert os.listdir(path.parent) == ["model.safetensors"]


def test_a_failed_save_leaves_the_old_file(saved, monkeypatch):
    _, path = saved
    before = path.read_bytes()

    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr("fastsskd.weights.os.fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        save_model(path, {"x": torch.zeros(1)}, INFO)
    assert path.read_bytes() == before


def test_a_file_from_before_there_was_a_choice_of_attention_has_the_plain_one(saved, tmp_path):
    model, _ = saved
    about = {**ABOUT, "classes": list(CLASSES), "seconds": 0.96}
    save_file(model.state_dict(), tmp_path / "old.safetensors", {"fastsskd": json.dumps(about)})
    loaded, info = load_model(tmp_path / "old.safetensors")
    assert info.attention == loaded.attention == "plain"


def test_the_attention_comes_back(tmp_path, make_model, make_batch):
    model, fbank = make_model(attention="simam", seed=3).eval(), make_batch().fbank
    save_model(tmp_path / "m.safetensors", model.state_dict(), dataclasses.replace(INFO, attention="simam"))
    loaded, info = load_model(tmp_path / "m.safetensors")
    plain = make_model(seed=3).eval()
    with torch.no_grad():
        assert info.attention == "simam" and torch.equal(loaded(fbank)[0], model(fbank)[0])
        assert not torch.allclose(loaded(fbank)[0], plain(fbank)[0], atol=1e-3)


def test_a_file_from_before_there_was_a_choice_of_pooling_has_the_mean(saved, tmp_path):
    model, _ = saved
    about = {**ABOUT, "classes": list(CLASSES), "seconds": 0.96, "attention": "plain"}
    save_file(model.state_dict(), tmp_path / "old.safetensors", {"fastsskd": json.dumps(about)})
    loaded, info = load_model(tmp_path / "old.safetensors")
    assert info.pooling == loaded.pooling == "mean"


def test_the_pooling_comes_back(tmp_path, make_model, make_batch):
    model, fbank = make_model(pooling="attentive", seed=3).eval(), make_batch().fbank
    save_model(tmp_path / "m.safetensors", model.state_dict(), dataclasses.replace(INFO, pooling="attentive"))
    loaded, info = load_model(tmp_path / "m.safetensors")
    with torch.no_grad():
        assert info.pooling == "attentive" and torch.equal(loaded(fbank)[0], model(fbank)[0])


# --------------------------------------------------------------------------------------------------- bad input, refused


def test_an_absent_file_is_refused(tmp_path):
    assert f"checkpoint {tmp_path / 'no.safetensors'}: no such file" in refusal(load_model, tmp_path / "no.safetensors")
    assert "a run keeps them under checkpoints/" in refusal(load_model, tmp_path)


@pytest.mark.parametrize("length", [0, 1, 7, 8, 9, 100, -1000, -1])
def test_a_cut_file_is_refused(saved, length):
    _, path = saved
    path.write_bytes(path.read_bytes()[:length])
    assert "not a safetensors file, or damaged" in refusal(load_model, path)


@pytest.mark.parametrize("place", [0, 4, 8, 20, 200])
def test_a_changed_header_is_refused(saved, place):
    _, path = saved
    data = bytearray(path.read_bytes())
    data[place] ^= 0xFF
    path.write_bytes(data)
    assert str(path) in refusal(load_model, path)


def test_trailing_bytes_are_refused(saved):
    _, path = saved
    path.write_bytes(path.read_bytes() + b"more")
    assert "damaged" in refusal(load_model, path)


class Trap:
    """Unpickling this makes a file: proof that something was run."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("writer", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value))])
def test_a_pickle_is_refused_and_never_run(tmp_path, make_model, writer):
    path = tmp_path / "model.safetensors"
    writer({"weights": Trap(tmp_path / "sprung")}, path)
    assert "not a safetensors file" in refusal(load_model, path)
    assert str(path) in refusal(initialise, make_model(), path)
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize(
    "metadata",
    [
        None,
        {"format": "pt"},
        {"fastsskd": "no json"},
        {"fastsskd": "[]"},
        {"fastsskd": "{}"},
        {"fastsskd": json.dumps({**ABOUT, "size": "huge"})},
        {"fastsskd": json.dumps({**ABOUT, "size": ["nano"]})},
        {"fastsskd": json.dumps({**ABOUT, "from_the_future": 1})},
        {"fastsskd": json.dumps({**ABOUT, "classes": 3})},
        {"fastsskd": json.dumps({**ABOUT, "attention": "none"})},
        {"fastsskd": json.dumps({**ABOUT, "attention": None})},
        {"fastsskd": json.dumps({**ABOUT, "seconds": "ten"})},
        {"fastsskd": json.dumps({name: value for name, value in ABOUT.items() if name != "std"})},
    ],
)
def test_a_safetensors_file_of_something_else_is_refused(tmp_path, make_model, metadata):
    path = tmp_path / "other.safetensors"
    save_file({"x": torch.zeros(1)}, path, metadata)
    for action in ((load_model, path), (initialise, make_model(), path)):
        assert str(path) in refusal(*action)


def test_weights_that_do_not_fit_their_description_are_refused(tmp_path, make_model):
    path = tmp_path / "m.safetensors"
    state = make_model().state_dict()
    save_model(path, state, ModelInfo("nano", CLASSES[:3], False, 0.96, 0.0, 1.0))
    assert "does not fit its own description" in refusal(load_model, path)
    del state["norm.weight"]
    save_model(path, state, INFO)
    assert "norm.weight" in refusal(load_model, path)
