"""ViT files of every layout, by timm's names: Google's against timm's own reading of the same file."""

import numpy as np
import pytest
import torch
from vit_files import google_arrays, image_vit

from fastsskd.errors import InputError
from fastsskd.foreign import load_checkpoint
from fastsskd.starting.vit_file import open_vit


def opened(path):
    return open_vit(load_checkpoint(path), path)


@pytest.mark.parametrize("prefix", ["", "opt/target/", "params/"])
def test_google_s_file_is_what_timm_reads_from_it(tmp_path, prefix):
    path, newer = tmp_path / "vit.npz", prefix == "params/"
    arrays = google_arrays(prefix, newer)
    np.savez(path, **arrays)
    theirs = image_vit(64, class_token=not newer, global_pool="avg" if newer else "token", fc_norm=False)
    theirs.load_pretrained(str(path))
    vit = opened(path)
    assert vit.width == 64 and vit.depth == 2 and vit.num_heads == 2 and vit.beside == []
    for name, value in theirs.state_dict().items():
        assert torch.equal(vit.state[name], value), name
    assert {*vit.state} - {*theirs.state_dict()} == ({*()} if newer else {"pre_logits.weight", "pre_logits.bias"})
    assert {source for sources in vit.sources.values() for source in sources} == arrays.keys()
    assert vit.sources.keys() == vit.state.keys()


def test_what_lies_beside_the_weights_is_named(tmp_path):
    arrays = google_arrays("opt/target/") | {"opt/state/step": np.array(3), "opt/target/new/kernel": np.zeros(2)}
    np.savez(tmp_path / "vit.npz", **arrays)
    vit = opened(tmp_path / "vit.npz")
    assert vit.beside == ["opt/state/step"] and "opt/target/new/kernel" in vit.state
    torch.save({"model": image_vit().state_dict(), "epoch": 3, "args": None}, tmp_path / "vit.pth")
    vit = opened(tmp_path / "vit.pth")
    assert vit.beside == ["epoch", "args"] and vit.sources["norm.bias"] == ("norm.bias",) and vit.num_heads is None


def damage(name, change):
    arrays = google_arrays()
    name = f"Transformer/encoderblock_1/{name}" if name.startswith("M") else name
    arrays[name] = change(arrays[name])
    return {key: value for key, value in arrays.items() if value is not None}


QUERY = "MultiHeadDotProductAttention_1/query/kernel"


@pytest.mark.parametrize(
    ("arrays", "says"),
    [
        (damage(QUERY, lambda w: None), f"lacks Transformer/encoderblock_1/{QUERY}"),
        (damage(QUERY, lambda w: w[0]), "expected 3 dimensions"),
        (damage(QUERY, lambda w: w[:, :1]), "differ in shape"),
        (damage("embedding/bias", lambda w: None), "lacks embedding/bias"),
        ({k: v for k, v in google_arrays().items() if "encoderblock" not in k}, "has no Transformer/encoderblock_0"),
        ({"a": np.zeros(3)}, "looks like an unknown model, with 1 tensors such as 'a'"),
    ],
)
def test_files_that_are_not_whole_are_one_line(tmp_path, arrays, says):
    np.savez(tmp_path / "vit.npz", **arrays)
    with pytest.raises(InputError) as caught:
        opened(tmp_path / "vit.npz")
    text = str(caught.value)
    assert says in text and "\n" not in text and str(tmp_path / "vit.npz") in text


def test_other_shapes_under_a_vit_s_names_are_one_line(tmp_path):
    state = image_vit().state_dict()
    torch.save({**state, "patch_embed.proj.weight": torch.zeros(64, 768)}, tmp_path / "flat.pth")
    with pytest.raises(InputError, match=r"not a ViT's shapes \(patch_embed.proj.weight \(64, 768\)"):
        opened(tmp_path / "flat.pth")
