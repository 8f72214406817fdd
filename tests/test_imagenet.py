"""Starting weights from a timm ViT's file."""

import pytest
import timm
import torch
from safetensors.torch import save_file

from fastsskd.errors import InputError
from fastsskd.imagenet import initialise_from_image_model, patch_weight
from fastsskd.model import SIZES, build_model
from fastsskd.patches import patchify


@pytest.fixture(scope="module")
def vit():
    """A timm ViT with 16 x 16 patches, as wide and deep as our ``nano``, with random weights."""
    size = SIZES["nano"]
    torch.manual_seed(0)
    return timm.models.vision_transformer.VisionTransformer(
        img_size=224,
        patch_size=16,
        embed_dim=size.embed_dim,
        depth=size.depth,
        num_heads=size.num_heads,
        num_classes=10,
    ).eval()


def test_patch_embedding_sees_a_grey_picture_as_the_image_model_does(vit):
    spectrogram = torch.randn(2, 224, 224)  # frames by bins; as a picture, bins are its height
    picture = spectrogram.transpose(1, 2)[:, None].expand(-1, 3, -1, -1)
    theirs = vit.patch_embed(picture).reshape(2, 14, 14, -1).transpose(1, 2).flatten(1, 2)  # time-major, as ours
    ours = patchify(spectrogram) @ patch_weight(vit.patch_embed.proj.weight).T + vit.patch_embed.proj.bias
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["pth", "safetensors", "wrapped.pth"])
def test_every_key_is_accounted_for(vit, tmp_path, kind):
    path, state = tmp_path / f"vit.{kind}", vit.state_dict()
    if kind == "safetensors":
        save_file(state, path)
    else:
        torch.save({"model": state} if kind == "wrapped.pth" else state, path)
    model = build_model("nano", 5, seconds=5.0)
    fresh = {name: value.clone() for name, value in model.state_dict().items()}
    report = initialise_from_image_model(model, path)
    assert set(report["ignored"]) == {"cls_token", "head.weight", "head.bias"}
    assert all(name.startswith(("mae.", "decoder.", "head.")) for name in report["missing"])
    own = model.state_dict()
    assert {*report["loaded"], *report["resized"], *report["missing"]} == own.keys()
    for name in report["missing"]:
        assert torch.equal(own[name], fresh[name])
    for name, value in state.items():
        if name.startswith(("blocks.", "norm.")):
            assert torch.equal(own[name], value)


def test_blocks_compute_what_the_image_models_do(vit, tmp_path):
    torch.save(vit.state_dict(), tmp_path / "vit.pth")
    model = build_model("nano", 0, seconds=5.0).eval()
    initialise_from_image_model(model, tmp_path / "vit.pth")
    tokens = torch.randn(2, 20, 64)
    torch.testing.assert_close(model.aft(tokens), vit.norm(vit.blocks(tokens)), atol=1e-5, rtol=1e-4)


def test_positions_keep_their_axes(vit, tmp_path):
    """A picture whose positions grow along the height only gives ours that grow along frequency only."""
    state = dict(vit.state_dict())
    ramp = torch.linspace(0, 1, 14)[:, None].expand(14, 14).reshape(1, 196, 1).expand(-1, -1, 64)
    state["pos_embed"] = torch.cat([torch.full((1, 1, 64), 9.0), ramp], dim=1)
    torch.save(state, tmp_path / "vit.pth")
    model = build_model("nano", 0, seconds=10.0)
    initialise_from_image_model(model, tmp_path / "vit.pth")
    grid = model.pos_embed.detach().reshape(64, 8, 64)
    assert (grid - grid[:1]).abs().max() < 1e-6
    assert (grid[0, 1:, 0] > grid[0, :-1, 0]).all() and grid.max() <= 1.0


def test_wrong_files_are_one_line(vit, tmp_path):
    def refusal(path, size="nano"):
        with pytest.raises(InputError) as error:
            initialise_from_image_model(build_model(size, 2, seconds=5.0), path)
        assert "\n" not in str(error.value) and str(path) in str(error.value)
        return str(error.value)

    (tmp_path / "page.pth").write_text("<html>404</html>")
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pth")
    torch.save(vit, tmp_path / "whole.pth")  # a pickle with code in it
    torch.save(vit.state_dict(), tmp_path / "vit.pth")
    refusal(tmp_path / "page.pth")
    assert "expected a timm ViT" in refusal(tmp_path / "other.pth")
    assert "weights alone" in refusal(tmp_path / "whole.pth")
    assert "model.size" in refusal(tmp_path / "vit.pth", size="micro")
