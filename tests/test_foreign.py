"""Files of weights from elsewhere: the good ones read as they are, every other one named in one line."""

import argparse
import json
import os
import pickle
import tarfile
import zipfile
from collections import OrderedDict

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from fastsskd.errors import InputError
from fastsskd.foreign import beside_weights, checkpoint_file, load_checkpoint, recognise, weights_in

WEIGHTS = {"a.weight": torch.arange(600.0).reshape(20, 30), "a.bias": torch.ones(20, dtype=torch.float16)}


def refusal(path) -> str:
    with pytest.raises(InputError) as caught:
        load_checkpoint(path)
    text = str(caught.value)
    assert "\n" not in text and len(text) < 400 and str(path) in text and caught.value.exit_code == 1
    return text


def save(path, state, legacy=False):
    torch.save(state, path, _use_new_zipfile_serialization=not legacy)
    return path


# --------------------------------------------------------------------------------------------------------- good files


@pytest.mark.parametrize("name", ["w.safetensors", "w.pth", "legacy.pth", "renamed.bin", "zip.safetensors"])
def test_weights_come_back_whatever_the_format_and_its_suffix(tmp_path, name):
    path = tmp_path / name
    if name in ("w.safetensors", "renamed.bin"):
        save_file(WEIGHTS, path)
    else:
        save(path, OrderedDict(WEIGHTS), legacy=name == "legacy.pth")
    read = load_checkpoint(path)
    assert sorted(read) == sorted(WEIGHTS)
    for key, value in WEIGHTS.items():
        assert read[key].dtype == value.dtype and torch.equal(read[key], value)


def test_a_trainers_wrapping_is_kept_for_those_who_need_it_and_taken_off_for_the_rest(tmp_path):
    """With the command line beside it, as MAE's trainers have it."""
    state = {"model": WEIGHTS, "epoch": 3, "cfg": {"depth": 2}, "args": argparse.Namespace(lr=0.1)}
    read = load_checkpoint(save(tmp_path / "w.pth", state))
    assert read["epoch"] == 3 and read["cfg"] == {"depth": 2} and vars(read["args"]) == {"lr": 0.1}
    assert weights_in(read).keys() == WEIGHTS.keys()


def test_the_prefix_of_data_parallel_goes_where_all_names_have_it():
    inner = {f"module.{name}": value for name, value in WEIGHTS.items()}
    assert weights_in(inner).keys() == weights_in({"state_dict": inner, "step": 1}).keys() == WEIGHTS.keys()
    assert weights_in({**inner, "b": torch.ones(1)}).keys() == {*inner, "b"}


def test_a_folder_stands_for_its_file_of_weights(tmp_path):
    save(tmp_path / "one.pt", WEIGHTS)
    (tmp_path / "notes.txt").write_text("mine")
    assert checkpoint_file(tmp_path) == tmp_path / "one.pt"
    save(tmp_path / "pytorch_model.bin", WEIGHTS)
    assert checkpoint_file(tmp_path) == tmp_path / "pytorch_model.bin"
    save_file(WEIGHTS, tmp_path / "model.safetensors")
    assert checkpoint_file(tmp_path) == tmp_path / "model.safetensors"


def test_numpy_s_arrays_come_back_by_name(tmp_path):
    arrays = {"block/kernel": np.arange(6.0, dtype=np.float32).reshape(2, 3), "block/bias": np.ones(3, np.float16)}
    for save_arrays in (np.savez, np.savez_compressed):
        save_arrays(tmp_path / "w.npz", **arrays)
        read = load_checkpoint(tmp_path / "w.npz")
        assert list(read) == list(arrays)
        for name, value in arrays.items():
            assert read[name].numpy().dtype == value.dtype and np.array_equal(read[name].numpy(), value)
    assert checkpoint_file(tmp_path) == tmp_path / "w.npz"


def test_what_a_trainer_puts_beside_the_weights_is_named():
    assert beside_weights({"epoch": 1, "model": {"state_dict": WEIGHTS, "step": 2}}) == ["epoch", "step"]
    assert beside_weights({**WEIGHTS, "note": "mine"}) == ["note"]


# -------------------------------------------------------------------------------------------------------- wrong files


def test_nothing_there(tmp_path):
    assert "no such file or folder" in refusal(tmp_path / "none.pth")
    (tmp_path / "dangling.pth").symlink_to(tmp_path / "none.pth")
    assert "no such file or folder" in refusal(tmp_path / "dangling.pth")


def test_folders_without_one_file_of_weights(tmp_path):
    assert "a folder without a file of weights (model.safetensors, " in refusal(tmp_path)
    for name in ("a.pt", "b.pth"):
        save(tmp_path / name, WEIGHTS)
    assert "several files of weights (a.pt, b.pth); give one" in refusal(tmp_path)
    (tmp_path / "pytorch_model.bin.index.json").write_text("{}")
    assert "in parts (pytorch_model.bin.index.json)" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "empty; download or copy it again"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 346111852\n", "a Git LFS pointer"),
        (b"\n<!DOCTYPE html>\n<html><body>Sign in</body></html>", "a web page, not the weights"),
        (b"<HTML><head><title>404</title>", "a web page, not the weights"),
        (b'{"error": "not found"}', 'text that begins \'{"error": "not found"}\', not weights'),
        (b"Entry not found", "text that begins 'Entry not found'"),
        (b"a\nb\n\n", "text that begins 'a'"),
        (b"\x1f\x8b\x08\x00 compressed", "an archive; unpack it"),
        (bytes(range(128, 256)) * 40, "of an unknown format"),
        (pickle.dumps({"a": np.zeros(3)}), "a pickle that PyTorch did not write"),
        (b"PK\x03\x04" + bytes(500), "cut off, its end is missing"),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else "",
)
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_files_that_are_no_checkpoint(tmp_path, content, says, suffix):
    path = tmp_path / f"w{suffix}"
    path.write_bytes(content)
    assert says in refusal(path)


def test_archives_that_are_no_checkpoint(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.pth", "w") as archive:
        archive.writestr("weights/a.pth", "x")
    assert "a zip archive with 'weights/a.pth' in it, not one that PyTorch wrote" in refusal(tmp_path / "a.pth")
    with tarfile.open(tmp_path / "b.pth", "w") as archive:
        archive.add(tmp_path / "a.pth", "a.pth")
    assert "an archive; unpack it" in refusal(tmp_path / "b.pth")
    torch.jit.trace(nn.Linear(2, 2), torch.zeros(1, 2)).save(tmp_path / "c.pth")
    assert "a TorchScript program" in refusal(tmp_path / "c.pth")


@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors", "npz"])
@pytest.mark.parametrize("share", [0.05, 0.2, 0.5, 0.9, 0.999])
def test_cut_off_downloads(tmp_path, kind, share):
    path = tmp_path / "w.pth"
    if kind == "npz":
        with open(path, "wb") as file:
            np.savez(file, **{name: value.numpy() for name, value in WEIGHTS.items()})
    elif kind == "safetensors":
        save_file(WEIGHTS, path)
    else:
        save(path, WEIGHTS, legacy=kind == "legacy")
    os.truncate(path, int(path.stat().st_size * share))
    text = refusal(path)
    assert "cut off" in text and "again" in text


def test_a_cut_safetensors_file_says_how_much_is_there(tmp_path):
    save_file(WEIGHTS, path := tmp_path / "w.safetensors")
    whole = path.stat().st_size
    os.truncate(path, whole - 100)
    assert f"cut off, {whole - 100:,} bytes of {whole:,};" in refusal(path)


@pytest.mark.parametrize("legacy", [False, True])
def test_bytes_overwritten_in_the_description_are_one_line(tmp_path, legacy):
    """Whatever a damaged pickle makes of itself: an error of one line, or, where it still makes sense, a dictionary."""
    path = save(tmp_path / "w.pth", WEIGHTS, legacy)
    content, refused = path.read_bytes(), 0
    for place in range(20, 700, 7):
        path.write_bytes(content[:place] + bytes([content[place] ^ 0xA5]) + content[place + 1 :])
        try:
            assert isinstance(load_checkpoint(path), dict)
        except InputError as error:
            assert "\n" not in str(error) and str(path) in str(error)
            refused += 1
    assert refused > 20


def test_bytes_overwritten_in_numpy_s_arrays_are_one_line(tmp_path):
    """The archive has a checksum of each array, so there is no damage that still makes sense."""
    path = tmp_path / "w.npz"
    np.savez(path, a=np.arange(40.0), b=np.ones(3))
    content = path.read_bytes()
    for place in range(60, 500, 5):  # of the first array and what NumPy says of it
        path.write_bytes(content[:place] + bytes([content[place] ^ 0xA5]) + content[place + 1 :])
        assert "download or copy it again" in refusal(path)


def test_numpy_s_arrays_of_other_things_are_refused(tmp_path):
    np.savez(tmp_path / "objects.npz", a=np.array([Runs(tmp_path / "harm")], dtype=object))
    assert "a holds Python objects, which would run code and are refused" in refusal(tmp_path / "objects.npz")
    assert not (tmp_path / "harm").exists()
    np.savez(tmp_path / "text.npz", a=np.array(["word"]))
    assert "a holds <U4, not numbers" in refusal(tmp_path / "text.npz")
    np.savez(tmp_path / "order.npz", a=np.ones(3, ">f4"))
    assert "a holds >f4, not numbers that can be weights" in refusal(tmp_path / "order.npz")
    np.savez(tmp_path / "bfloat16.npz", a=np.ones(3, np.int16).view("V2"))
    assert "a holds |V2, not numbers that can be weights" in refusal(tmp_path / "bfloat16.npz")


class Runs:
    """Touches a file when it is unpickled."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("legacy", [False, True])
def test_code_in_a_pickle_does_not_run(tmp_path, legacy):
    path = save(tmp_path / "w.pth", {"model": WEIGHTS, "extra": Runs(tmp_path / "harm")}, legacy)
    text = refusal(path)
    assert "would run posix.mkdir, which is refused" in text and "state_dict()" in text
    assert not (tmp_path / "harm").exists()


def test_a_whole_module_is_refused_with_its_class(tmp_path):
    text = refusal(save(tmp_path / "w.pth", timm.create_model("vit_tiny_patch16_224", depth=1)))
    assert "would run timm.models.vision_transformer.VisionTransformer" in text


@pytest.mark.parametrize("state", [torch.ones(3), [torch.ones(3)]])
def test_something_else_than_a_dictionary(tmp_path, state):
    assert f"holds a {type(state).__name__}, not a dictionary" in refusal(save(tmp_path / "w.pth", state))


# --------------------------------------------------------------------------------------------------------- recognition


def test_models_are_recognised_by_the_names_of_their_weights(make_model):
    assert recognise(make_model().state_dict())[0] == "ours"
    picture = timm.create_model("deit_tiny_distilled_patch16_224", depth=1).state_dict()
    assert recognise(picture) == ("", "a ViT or MAE for pictures")
    sound = {**picture, "patch_embed.proj.weight": torch.zeros(192, 1, 16, 16)}
    assert recognise(sound) == ("audiomae", "AudioMAE")
    assert recognise({f"v.{name}": value for name, value in picture.items()})[0] == "ast"
    google = {"embedding/kernel": torch.zeros(1), "Transformer/encoderblock_0/LayerNorm_0/bias": torch.zeros(1)}
    assert recognise(google) == ("", "a ViT for pictures, Google's .npz")
    assert recognise({}) == ("", "a file without weights")
    assert recognise(WEIGHTS) == ("", "an unknown model, with 2 tensors such as 'a.weight'")


def test_a_configuration_taken_for_the_weights(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "x"}, indent=2))
    assert "text that begins '{'" in refusal(tmp_path / "config.json")
