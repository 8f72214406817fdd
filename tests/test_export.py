"""Exported folders are loaded like any checkpoint; ONNX files answer as the model does."""

import hashlib
import json

import numpy as np
import pytest
import torch
from small_checkpoint import CLASSES, save_checkpoint, save_sound, sound

import fastsskd
import fastsskd_kernels as kernels
from fastsskd import cli
from fastsskd.errors import InputError
from fastsskd.inference import export, onnx_model
from fastsskd.weights import load_model


def test_a_folder_is_self_contained_and_loads_again(tmp_path, capsys):
    checkpoint = save_checkpoint(tmp_path / "run", multi_label=True, attention="simam")
    out = tmp_path / "given"
    assert cli.main(["export", "--checkpoint", str(checkpoint), "--out", str(out), "--licence", "CC-BY-4.0"]) == 0
    assert sorted(path.name for path in out.iterdir()) == ["config.json", "model.safetensors"]
    about = json.loads((out / "config.json").read_text())
    assert about["classes"] == list(CLASSES) and about["licence"] == "CC-BY-4.0" and about["activation"] == "sigmoid"
    assert about["input"]["sample_rate"] == 16000 and (about["input"]["mean"], about["input"]["std"]) == (-4.0, 4.5)
    assert about["input"]["num_frames"] == 96 and about["architecture"]["grid_size"] == [6, 8]
    assert about["sha256"] == hashlib.sha256((out / "model.safetensors").read_bytes()).hexdigest()
    assert set(about["versions"]) >= {"fastsskd", "torch"}
    clip = save_sound(tmp_path / "a.wav", 0.7)
    again, before = fastsskd.load(out, device="cpu"), fastsskd.load(checkpoint, device="cpu")
    assert again.licence == "CC-BY-4.0" and before.licence == ""
    np.testing.assert_array_equal(again.classify(clip).probs, before.classify(clip).probs)
    capsys.readouterr()
    assert cli.main(["export", "--checkpoint", str(checkpoint), "--out", str(out)]) == 0
    assert "no licence is given" in capsys.readouterr().err


def test_half_is_half_the_size_and_nearly_the_same(tmp_path):
    checkpoint = save_checkpoint(tmp_path / "run")
    model, info = load_model(checkpoint)
    whole, half = (export.export_folder(model, info, tmp_path / str(h), half=h) for h in (False, True))
    assert 0.45 < half.stat().st_size / whole.stat().st_size < 0.6
    assert json.loads((half.parent / "config.json").read_text())["dtype"] == "float16"
    again, about = load_model(half)
    assert about == info
    for name, value in again.state_dict().items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, model.state_dict()[name], atol=1e-3, rtol=1e-3)


def test_what_cannot_be_exported_is_one_line(tmp_path, capsys):
    checkpoint = save_checkpoint(tmp_path / "run")
    (tmp_path / "file").write_text("")
    for arguments, code in (([], 2), (["--out", str(tmp_path / "file")], 1)):
        assert cli.main(["export", "--checkpoint", str(checkpoint), *arguments]) == code
        assert "error: " in capsys.readouterr().err
    assert cli.main(["export", "--checkpoint", str(tmp_path / "none"), "--out", str(tmp_path / "out")]) == 1
    assert not (tmp_path / "out").exists()


def test_the_fbank_as_matrices_is_the_fbank():
    """Held against the reference, and against torchaudio's own."""
    import torchaudio

    waveform = torch.from_numpy(sound(0.6)[:, 0].astype(np.float32))[None] + 0.1  # with a DC offset
    spectrum, banks, floor = kernels.fbank_matrices(128)
    frames = waveform.double().unfold(1, 400, 160)
    real, imaginary = (frames @ spectrum).chunk(2, dim=-1)
    found = ((real**2 + imaginary**2) @ banks).float().clamp(min=floor).log()
    torch.testing.assert_close(found, kernels.fbank(waveform, backend="torch"), atol=2e-3, rtol=0)
    kaldi = torchaudio.compliance.kaldi.fbank(
        waveform, htk_compat=True, use_energy=False, window_type="hanning", num_mel_bins=128, dither=0.0
    )
    torch.testing.assert_close(found[0], kaldi, atol=2e-3, rtol=0)
    silent = ((torch.zeros(1, 400, dtype=torch.float64) @ spectrum).chunk(2, -1)[0] ** 2 @ banks).float()
    torch.testing.assert_close(silent.clamp(min=floor).log(), kernels.fbank(torch.zeros(1, 400), backend="torch")[0])


@pytest.fixture(scope="module")
def clips():
    """Five clips of 0.96 s as users have them: loud, quiet, silent, with an offset, full scale."""
    waves = np.stack([sound(0.96, seed=seed)[:, 0] for seed in range(5)]).astype(np.float32)
    waves[1] *= 1e-3
    waves[2] = 0.0
    waves[3] += 0.2
    waves[4] *= 3.0
    return torch.from_numpy(waves)


@pytest.mark.parametrize(
    ("given", "about"),
    [
        ("fbank", {}),
        ("waveform", {"multi_label": True, "attention": "simam"}),
        ("waveform", {"classes": ()}),
        ("fbank", {"pooling": "attentive"}),
    ],
)
def test_onnx_answers_as_the_model_does(tmp_path, clips, given, about):
    onnx, onnxruntime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    checkpoint = save_checkpoint(tmp_path / "run", **about)
    model, info = load_model(checkpoint)
    file = tmp_path / "deep" / "model.onnx"
    difference = onnx_model.export_onnx(model, info, file, given=given)
    assert difference < 1e-4 and [path.name for path in file.parent.iterdir()] == ["model.onnx"]
    fbank, _ = kernels.features(clips, num_frames=96, mean=info.mean, std=info.std)
    with torch.no_grad():
        logits, clip = model(fbank)
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    taken = fbank if given == "fbank" else clips
    expected = {"logits": logits, "embedding": clip} if info.classes else {"embedding": clip}
    assert [output.name for output in session.get_outputs()] == list(expected)
    for size in (1, 2, 5):
        found = session.run(None, {given: taken[:size].numpy()})
        for values, reference in zip(found, expected.values(), strict=True):
            np.testing.assert_allclose(values, reference[:size].numpy(), atol=1e-4)
    written = onnx.load(file)
    onnx.checker.check_model(written, full_check=True)
    assert [(o.domain, o.version) for o in written.opset_import] == [("", onnx_model.OPSET)]
    said = json.loads({p.key: p.value for p in written.metadata_props}["fastsskd"])
    assert said["classes"] == list(info.classes) and said["takes"] == given and said["gives"] == list(expected)


def test_an_onnx_file_with_other_answers_is_not_written(tmp_path, monkeypatch):
    pytest.importorskip("onnxruntime")
    model, info = load_model(save_checkpoint(tmp_path / "run"))
    monkeypatch.setattr(onnx_model, "TOLERANCE", -1.0)
    with pytest.raises(InputError, match="differ from the model's by"):
        onnx_model.export_onnx(model, info, tmp_path / "out" / "m.onnx")
    assert list((tmp_path / "out").iterdir()) == []


def test_packages_that_are_missing_are_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(onnx_model, "find_spec", lambda name: None)
    checkpoint = save_checkpoint(tmp_path / "run")
    assert cli.main(["export", "--checkpoint", str(checkpoint), "--onnx", str(tmp_path / "m.onnx")]) == 1
    assert "pip install 'fastsskd[onnx]'" in capsys.readouterr().err and not (tmp_path / "m.onnx").exists()
