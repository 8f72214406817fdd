"""Starting weights from ViTs of other projects: the same function where the architectures coincide."""

import numpy as np
import PIL.Image
import pytest
import torch
from safetensors.torch import save_file
from vit_files import accounted, audiomae, google_arrays, image_vit

from fastsskd.errors import InputError
from fastsskd.model import build_model
from fastsskd.patches import patchify
from fastsskd.starting.imagenet import patch_weight, resize_positions
from fastsskd.starting.initialise import initialise


@pytest.fixture(scope="module")
def vit():
    return image_vit()


def saved(path, state):
    if path.suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save({"model": state} if path.stem == "wrapped" else state, path)
    return path


# ----------------------------------------------------------------------------------------------- the same function


@pytest.mark.parametrize("name", ["vit.pth", "vit.safetensors", "wrapped.pth"])
def test_a_vit_without_a_class_token_hears_a_grey_picture_as_it_sees_it(tmp_path, name):
    """Of 128 x 128 pixels, whose positions need no change; then all of the encoder is the same."""
    theirs = image_vit(128, class_token=False, global_pool="avg", fc_norm=False)
    model = build_model("nano", 5, seconds=1.28).eval()
    report = initialise(model, saved(tmp_path / name, theirs.state_dict()))
    spectrogram = torch.randn(2, 128, 128)  # frames by bins; as a picture, bins are its height
    picture = spectrogram.transpose(1, 2)[:, None].expand(-1, 3, -1, -1)
    with torch.no_grad():
        expected = theirs.forward_features(picture).reshape(2, 8, 8, 64).transpose(1, 2).flatten(1, 2)  # time-major
        torch.testing.assert_close(model.features(patchify(spectrogram)), expected, atol=1e-4, rtol=1e-4)
        assert expected.std() > 0.1
    assert report.names("resized") == ["patch_embed.weight"]


def test_an_npz_gives_what_its_pth_gives(tmp_path):
    np.savez(tmp_path / "vit.npz", **google_arrays())
    theirs = image_vit(64)
    theirs.load_pretrained(str(tmp_path / "vit.npz"))
    first, second = build_model("nano", 5, seconds=0.96), build_model("nano", 5, seconds=0.96)
    report = initialise(first, tmp_path / "vit.npz")
    initialise(second, saved(tmp_path / "vit.pth", theirs.state_dict()))
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name
    accounted(report, first, google_arrays())
    assert set(report.names("ignored")) == {"cls", "head/kernel", "head/bias", "pre_logits/kernel", "pre_logits/bias"}


@pytest.mark.parametrize("seconds", [0.96, 2.0])
def test_audiomae_s_encoder(tmp_path, seconds):
    state = audiomae(tmp_path / "audiomae.pth")  # of 0.96 s
    model = build_model("nano", 5, seconds=seconds).eval()
    report = initialise(model, tmp_path / "audiomae.pth")
    accounted(report, model, {*state, "epoch", "optimizer"})
    spectrogram = torch.randn(2, 96, 128)
    theirs = image_vit((96, 128), 0, in_chans=1)
    theirs.load_state_dict({name: value for name, value in state.items() if name in theirs.state_dict()})
    with torch.no_grad():
        embedded = theirs.patch_embed(spectrogram[:, None]) + theirs.pos_embed[:, 1:]
        expected = theirs.norm(theirs.blocks(embedded))
        if seconds == 0.96:
            assert report.names("resized") == []
            torch.testing.assert_close(model.features(patchify(spectrogram)), expected, atol=1e-4, rtol=1e-4)
        else:
            assert report.names("resized") == ["pos_embed"]
            torch.testing.assert_close(model.aft(embedded), expected, atol=1e-4, rtol=1e-4)
    assert "mask_token" in report.names("ignored") and "mae.mask_token" in report.names("missing")


# ------------------------------------------------------------------------------------------------------- accounting


@pytest.mark.parametrize(
    ("options", "tokens"),
    [
        ({}, {"cls_token"}),
        ({"img_size": 384}, {"cls_token"}),
        ({"reg_tokens": 4}, {"cls_token", "reg_token"}),
        ({"reg_tokens": 4, "no_embed_class": True}, {"cls_token", "reg_token"}),
        ({"class_token": False, "global_pool": "avg", "fc_norm": False}, set()),
    ],
    ids=["224", "384", "registers", "registers without positions", "no class token"],
)
def test_every_key_is_accounted_for_and_the_rest_stays_fresh(tmp_path, options, tokens):
    state = image_vit(**options).state_dict()
    model, fresh = build_model("nano", 5, seconds=5.0), build_model("nano", 5, seconds=5.0).state_dict()
    report = initialise(model, saved(tmp_path / "vit.pth", state))
    accounted(report, model, state)
    assert set(report.names("ignored")) == {"head.weight", "head.bias"} | tokens
    assert all(name.startswith(("mae.", "decoder.", "head.")) for name in report.names("missing"))
    assert set(report.names("resized")) == {"pos_embed", "patch_embed.weight"}
    own = model.state_dict()
    for name in report.names("missing"):
        assert torch.equal(own[name], fresh[name])
    for name in report.names("loaded"):
        assert torch.equal(own[name], state[name.replace("patch_embed.", "patch_embed.proj.")])
    special = state["pos_embed"].shape[1] - (24 if options.get("img_size") == 384 else 14) ** 2
    grid = state["pos_embed"][0, special:]
    side = round(len(grid) ** 0.5)
    expected = pil_resized(grid.reshape(side, side, 64).transpose(0, 1), (32, 8))
    torch.testing.assert_close(own["pos_embed"].reshape(32, 8, 64), expected, atol=1e-5, rtol=1e-4)


def test_deit_has_two_tokens_and_two_heads(tmp_path):
    from timm.models.deit import VisionTransformerDistilled

    options = {"img_size": 224, "patch_size": 16, "embed_dim": 64, "depth": 2, "num_heads": 2, "num_classes": 10}
    deit = VisionTransformerDistilled(**options).eval()
    model = build_model("nano", 5, seconds=5.0)
    report = initialise(model, saved(tmp_path / "wrapped.pth", deit.state_dict()))
    accounted(report, model, deit.state_dict())
    assert {"dist_token", "head_dist.weight"} < set(report.names("ignored"))
    grid = deit.pos_embed.detach()[0, 2:].reshape(14, 14, 64).transpose(0, 1)
    expected = pil_resized(grid, (32, 8))
    torch.testing.assert_close(model.pos_embed.detach().reshape(32, 8, 64), expected, atol=1e-5, rtol=1e-4)


def test_a_norm_after_the_pooling_leaves_ours_fresh_and_says_so(tmp_path):
    """MAE's and AudioMAE's fine-tuned files have ``fc_norm`` in place of ``norm``."""
    state = image_vit(global_pool="avg").state_dict()
    assert "norm.weight" not in state and "fc_norm.weight" in state
    model = build_model("nano", 5, seconds=5.0)
    report = initialise(model, saved(tmp_path / "vit.pth", state))
    accounted(report, model, state)
    assert "norm.weight" in report.names("missing")
    assert any("fc_norm.* (2; after its pooling; here the norm is before)" in line for line in report.lines())


# -------------------------------------------------------------------------------------------------------- the parts


def test_a_grey_picture_s_patches_are_embedded_as_the_image_model_does(vit):
    spectrogram = torch.randn(2, 224, 224)
    picture = spectrogram.transpose(1, 2)[:, None].expand(-1, 3, -1, -1)
    theirs = vit.patch_embed(picture).reshape(2, 14, 14, -1).transpose(1, 2).flatten(1, 2)
    weight = patch_weight(vit.patch_embed.proj.weight, "x")
    ours = patchify(spectrogram) @ weight.T + vit.patch_embed.proj.bias
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


def pil_resized(grid: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """``(rows, columns, D)`` to other rows and columns with Pillow's antialiased bicubic filter."""
    planes = [
        np.asarray(PIL.Image.fromarray(plane.numpy(), "F").resize(size[::-1], PIL.Image.BICUBIC))
        for plane in grid.permute(2, 0, 1).contiguous()
    ]
    return torch.from_numpy(np.stack(planes, axis=-1))


@pytest.mark.parametrize(
    ("old", "new"), [((14, 14), (64, 8)), ((24, 24), (32, 8)), ((64, 8), (6, 8)), ((6, 8), (9, 8))]
)
def test_positions_are_resized_with_an_antialiased_bicubic_filter(old, new):
    grid = torch.randn(*old, 3)
    resized = resize_positions(grid.reshape(1, -1, 3), old, new)
    torch.testing.assert_close(resized.reshape(*new, 3), pil_resized(grid, new), atol=1e-5, rtol=1e-4)


def test_positions_of_the_same_grid_stay_bit_for_bit():
    positions = torch.randn(1, 48, 8)
    assert torch.equal(resize_positions(positions, (6, 8), (6, 8)), positions)


def test_positions_keep_their_axes(vit, tmp_path):
    """A picture whose positions grow along the height only gives ours that grow along frequency only."""
    ramp = torch.linspace(0, 1, 14)[:, None].expand(14, 14).reshape(1, 196, 1).expand(-1, -1, 64)
    positions = torch.cat([torch.full((1, 1, 64), 9.0), ramp], dim=1)
    model = build_model("nano", 0, seconds=10.0)
    initialise(model, saved(tmp_path / "vit.pth", {**vit.state_dict(), "pos_embed": positions}))
    grid = model.pos_embed.detach().reshape(64, 8, 64)
    assert (grid - grid[:1]).abs().max() < 1e-6
    assert (grid[0, 1:, 0] > grid[0, :-1, 0]).all() and grid.max() < 1.05


# ------------------------------------------------------------------------------------------------------ wrong files


def refusal(path, size="nano"):
    model = build_model(size, 2, seconds=5.0)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(InputError) as error:
        initialise(model, path)
    assert "\n" not in str(error.value) and str(path) in str(error.value)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    return str(error.value)


def test_another_size_says_what_it_is_and_what_would_fit(vit, tmp_path):
    path = saved(tmp_path / "vit.pth", vit.state_dict())
    text = refusal(path, "micro")
    assert "64 wide, 2 blocks; this model is 192 wide with 6 blocks of 3 heads" in text
    assert text.endswith('set model.size = "nano"')
    odd = {k: v for k, v in vit.state_dict().items() if not k.startswith("blocks.1.")}
    assert "64 wide, 1 blocks;" in (text := refusal(saved(tmp_path / "odd.pth", odd)))
    assert text.endswith("no model.size is like that; base, small and tiny are like ViT's and DeiT's")
    np.savez(tmp_path / "vit.npz", **google_arrays(heads=4))
    assert "64 wide, 2 blocks, 4 heads; this model is 64 wide with 2 blocks of 2 heads" in refusal(tmp_path / "vit.npz")


@pytest.mark.parametrize(
    ("name", "change", "says"),
    [
        ("blocks.0.ls1.gamma", lambda state: torch.ones(64), "has blocks.0.ls1.gamma, which a plain ViT has not"),
        ("norm_pre.weight", lambda state: torch.ones(64), "has norm_pre.weight, which a plain ViT has not"),
        ("mae.mask_token", lambda state: torch.ones(1, 1, 64), "has mae.mask_token, which a plain ViT has not"),
        ("blocks.1.norm2.bias", lambda state: None, "lacks blocks.1.norm2.bias"),
        ("norm.weight", lambda state: None, "lacks norm.weight"),
        ("norm.bias", lambda state: torch.ones(63), "norm.bias gives (63,), expected (64,)"),
        ("norm.bias", lambda state: torch.full((64,), torch.nan), "numbers that are not finite"),
        ("norm.bias", lambda state: torch.ones(64, dtype=torch.int8), "torch.int8"),
        (
            "pos_embed",
            lambda state: state["pos_embed"][:, :99],
            "99 positions, 1 of special tokens: the rest are not a square",
        ),
        ("pos_embed", lambda state: state["pos_embed"][:, :, :60], "pos_embed gives (1, 256, 60)"),
        ("patch_embed.proj.weight", lambda state: torch.zeros(64, 3, 32, 32), "its patches are (3, 32, 32)"),
        ("patch_embed.proj.weight", lambda state: torch.zeros(64, 4, 16, 16), "its patches are (4, 16, 16)"),
        ("patch_embed.proj.weight", lambda state: torch.zeros(64, 1, 16, 16), "not rows of 8"),
    ],
)
def test_a_file_that_computes_something_else_is_refused(vit, tmp_path, name, change, says):
    state = {**vit.state_dict()}
    state[name] = change(state)
    state = {key: value for key, value in state.items() if value is not None}
    assert says in refusal(saved(tmp_path / "vit.pth", state))


def test_files_of_something_else_are_one_line(vit, tmp_path):
    (tmp_path / "page.pth").write_text("<html>404</html>")
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pth")
    torch.save(vit, tmp_path / "whole.pth")  # a pickle with code in it
    torch.save({f"v.{name}": value for name, value in vit.state_dict().items()}, tmp_path / "ast.pth")
    assert "a web page" in refusal(tmp_path / "page.pth")
    assert "looks like an unknown model" in refusal(tmp_path / "other.pth")
    assert "weights alone" in refusal(tmp_path / "whole.pth")
    assert "built on AST, without patch_embed.proj.weight; a model starts from" in refusal(tmp_path / "ast.pth")
