"""AudioMAE as a teacher, against timm's VisionTransformer with the same random weights."""

import argparse
import math

import pytest
import torch
import torchaudio
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from fastsskd.errors import InputError
from fastsskd.teachers import load_teacher


def make_theirs(pool: str, frames: int = 128, stride: int = 16) -> VisionTransformer:
    """A random ViT over (frames, 128) pictures of one channel, which is how AudioMAE sees a clip."""
    torch.manual_seed(0)
    options = {"embed_dim": 128, "depth": 2, "num_heads": 2, "num_classes": 5, "qkv_bias": True, "in_chans": 1}
    model = VisionTransformer(img_size=(frames, 128), patch_size=16, global_pool=pool, **options).eval()
    if stride != 16:
        model.patch_embed.proj.stride = (stride, stride)
        patches = ((128 - 16) // stride + 1) * ((frames - 16) // stride + 1)
        model.pos_embed = nn.Parameter(torch.zeros(1, patches + 1, 128))
        model.patch_embed.strict_img_size = False
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for value in model.parameters():
            value.add_(0.1 * torch.randn(value.shape, generator=generator))
    return model


def clips() -> torch.Tensor:
    time = torch.arange(15360) / 16000
    noise = torch.randn(3, 15360, generator=torch.Generator().manual_seed(2))
    return torch.stack([torch.sin(2 * math.pi * 500 * n * time) for n in (1, 2, 3)]) * 0.3 + 0.01 * noise


def their_features(waveform, frames=128) -> torch.Tensor:
    """``(B, 1, frames, 128)`` by torchaudio, as AudioMAE's loader makes it."""
    out = []
    for wave in waveform:
        options = {"htk_compat": True, "window_type": "hanning", "num_mel_bins": 128, "dither": 0.0}
        wave = (wave - wave.mean())[None]
        fbank = torchaudio.compliance.kaldi.fbank(wave, sample_frequency=16000, use_energy=False, **options)
        out.append(nn.ZeroPad2d((0, 0, 0, frames - len(fbank)))(fbank))
    return ((torch.stack(out) + 4.2677393) / (2 * 4.5689974))[:, None]


@pytest.mark.parametrize("pool", ["avg", "token"])
@pytest.mark.parametrize("stride", [16, 10])
def test_it_gives_timm_s_numbers_with_either_pooling_and_overlapping_patches(tmp_path, pool, stride):
    model = make_theirs(pool, stride=stride)
    state = {"model": model.state_dict(), "epoch": 60, "args": argparse.Namespace(model="vit_base_patch16")}
    torch.save(state, tmp_path / "finetuned.pth")
    teacher = load_teacher(tmp_path / "finetuned.pth")
    scores, clip = teacher(clips())
    features = their_features(clips())
    with torch.no_grad():
        torch.testing.assert_close(scores, model(features), atol=1e-4, rtol=0)
        expected = model.forward_head(model.forward_features(features), pre_logits=True)
        torch.testing.assert_close(clip, expected, atol=1e-4, rtol=0)
    assert teacher.score_kind == "logits" and teacher.classes == () and teacher.embed_dim == 128
    assert (scores[0] - scores[1]).abs().max() > 0.01


def test_tokens_run_through_the_mel_bins_first(tmp_path):
    torch.save({"model": make_theirs("avg").state_dict()}, tmp_path / "w.pth")
    model = load_teacher(tmp_path / "w.pth").model
    model.blocks = nn.ModuleList()
    quiet, loud = torch.zeros(1, 143, 128), torch.zeros(1, 143, 128)
    loud[:, 16:32, 32:48] = 1.0  # the second 16 frames, the third 16 bins
    changed = (model.tokens(loud) != model.tokens(quiet)).any(dim=2)[0, 1:]
    assert changed.nonzero().flatten().tolist() == [1 * 8 + 2]


def test_a_pre_trained_file_gives_features_only_and_its_decoder_is_left(tmp_path):
    model = make_theirs("token")
    state = {name: value for name, value in model.state_dict().items() if not name.startswith("head.")}
    decoder = {"mask_token": torch.ones(1, 1, 8), "decoder_pos_embed": torch.ones(1, 9, 8)}
    decoder["decoder_blocks.0.attn.qkv.weight"] = torch.ones(24, 8)
    torch.save({"model": {**state, **decoder}}, tmp_path / "pretrained.pth")
    teacher = load_teacher(tmp_path / "pretrained.pth", kind="audiomae")
    scores, clip = teacher(clips())
    assert scores.shape == (3, 0) and teacher.classes == ()
    with torch.no_grad():
        expected = model.forward_features(their_features(clips()))[:, 0]
    torch.testing.assert_close(clip, expected, atol=1e-4, rtol=0)


def refusal(state, path, **options) -> str:
    torch.save(state, path)
    with pytest.raises(InputError) as caught:
        load_teacher(path, **options)
    text = str(caught.value)
    assert "\n" not in text and str(path) in text
    return text


def test_wrong_files_are_one_line(tmp_path):
    state, path = make_theirs("avg").state_dict(), tmp_path / "w.pth"
    picture = {**state, "patch_embed.proj.weight": torch.ones(128, 3, 16, 16)}
    assert "looks like a ViT or MAE for pictures" in refusal({"model": picture}, path)
    lacking = {name: value for name, value in state.items() if name != "cls_token"}
    assert "lacks AudioMAE's class token" in refusal({"model": lacking}, path)
    assert "has gate.weight, which this model does not know" in refusal({**state, "gate.weight": torch.ones(1)}, path)
    assert "expected kind 'ast'" in refusal(state, path, kind="ast")
    odd = {**state, "pos_embed": torch.ones(1, 12, 128)}
    assert "cannot be told from 11 positions" in refusal(odd, path)
