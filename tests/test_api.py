"""The Python API of three lines."""

import subprocess
import sys

import numpy as np
import pytest
import soundfile
from small_checkpoint import CLASSES, SECONDS, save_checkpoint, save_sound

import fastsskd
from fastsskd.errors import InputError, UsageError


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = save_checkpoint(tmp_path_factory.mktemp("model"), licence="CC-BY-4.0", multi_label=True)
    return fastsskd.load(folder, device="cpu", workers=2)


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    return [save_sound(folder / f"{i}.wav", seconds, 44100, seed=i) for i, seconds in enumerate((0.4, 2.5, 0.9))]


def test_the_model_carries_what_it_is(model):
    assert model.classes == CLASSES and model.multi_label and model.licence == "CC-BY-4.0"
    assert (model.sample_rate, model.seconds, model.mean, model.std, model.embed_dim) == (16000, SECONDS, -4.0, 4.5, 64)


def test_a_path_several_paths_and_samples_give_the_same(model, clips):
    several = model.classify(clips, top_k=4)
    assert [prediction.name for prediction in several] == [str(path) for path in clips]
    for path, prediction in zip(clips, several, strict=True):
        alone = model.classify(str(path), top_k=4)
        samples, rate = soundfile.read(path, dtype="float32")
        in_memory = model.classify(samples, rate, top_k=4)
        assert list(alone) == alone.top and len(alone) == 4
        np.testing.assert_allclose(alone.probs, prediction.probs, atol=1e-6)
        np.testing.assert_allclose(alone.probs, in_memory.probs, atol=1e-6)
        assert [name for name, _ in alone] == [CLASSES[c] for c in np.argsort(-alone.probs)]
    waves = [soundfile.read(path, dtype="float32")[0] for path in clips]
    for prediction, in_memory in zip(several, model.classify(waves, 44100), strict=True):
        np.testing.assert_allclose(prediction.probs, in_memory.probs, atol=1e-6)
    assert np.ptp([prediction.probs for prediction in several], axis=0).max() > 0.01


def test_embeddings_have_the_shapes_they_say(model, clips):
    every = model.embed(clips)
    assert every.shape == (3, 64) and every.dtype == np.float32
    np.testing.assert_allclose(model.embed(clips[0]), every[0], atol=1e-5)
    steps, patches = 6, 48  # 0.96 s
    assert model.embed(clips[1], level="frame").shape == (1, steps, 64)
    assert model.embed(clips[1], level="frame", hop=0.5).shape == (4, steps, 64)
    assert [found.shape for found in model.embed(clips, level="patch")] == [(1, patches, 64)] * 3
    windows = model.embed(clips[1], level="window")
    assert windows.shape == (3, 64)
    np.testing.assert_allclose(windows[0], every[1], atol=1e-5)
    np.testing.assert_allclose(model.embed(clips[1], hop=SECONDS), windows.mean(0), atol=1e-5)


def test_a_threshold_hears_all_and_gives_events(model, clips):
    found = model.classify(clips[1], threshold=0.0)
    assert {event.name for event in found.events} == set(CLASSES) and len(found.windows) == 3
    assert all(event.start == 0 and event.end == pytest.approx(2.5) for event in found.events)


def test_several_checkpoints_are_their_mean(tmp_path, clips):
    paths = [save_checkpoint(tmp_path / str(i), seed=i) for i in range(2)]
    each = [fastsskd.load(path, device="cpu").classify(clips[0]).probs for path in paths]
    both = fastsskd.load(paths, device="cpu")
    np.testing.assert_allclose(both.classify(clips[0]).probs, np.mean(each, axis=0), atol=1e-6)
    with pytest.raises(UsageError, match="no features in common"):
        both.embed(clips[0])


def test_what_is_wrong_is_said_in_a_line(model, clips, tmp_path):
    (tmp_path / "bad.wav").write_bytes(b"RIFF")
    with pytest.raises(InputError, match=r"bad\.wav: truncated"):
        model.classify([clips[0], tmp_path / "bad.wav"])
    with pytest.raises(InputError, match="No such file"):
        model.embed("nowhere.wav")
    with pytest.raises(UsageError, match="sampling rate"):
        model.classify(np.zeros(1000))
    with pytest.raises(UsageError, match="level 'word'"):
        model.embed(clips[0], level="word")
    with pytest.raises(InputError, match="no such file"):
        fastsskd.load(tmp_path / "nothing")


def test_importing_the_package_does_not_import_torch():
    code = "import sys, fastsskd; assert fastsskd.load; assert not {'torch', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
