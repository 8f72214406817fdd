"""What models hear: as in evaluation, in order, whatever the batches and the threads."""

import dataclasses

import numpy as np
import pytest
import torch
from small_checkpoint import SECONDS, save_checkpoint, save_sound, sound

from fastsskd.audio.info import BadClip
from fastsskd.errors import InputError, UsageError
from fastsskd.inference.listen import Listener
from fastsskd.inference.loaded import Loaded
from fastsskd.inference.sources import Samples, find
from fastsskd.inference.windows import Cut

CLIPS = {
    "cat/short.wav": (0.3, 16000, 1),
    "cat/shortest.wav": (0.03, 44100, 1),
    "cat/exact.wav": (SECONDS, 16000, 1),
    "dog/other_rate.ogg": (0.5, 44100, 2),
    "dog/long.flac": (2.7, 16000, 2),
    "dog/long_other_rate.wav": (3.1, 22050, 1),
}


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """A folder of clips of all lengths and rates."""
    folder = tmp_path_factory.mktemp("clips")
    for seed, (name, (seconds, rate, channels)) in enumerate(CLIPS.items()):
        save_sound(folder / name, seconds, rate, seed, channels)
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("model"))


def heard(loaded, sources, *, answer=None, cut=None, **how):
    listener = Listener(loaded.ears, answer or loaded.probabilities, cut or loaded.cut(), **how)
    return list(listener.listen(sources))


def rows(found) -> np.ndarray:
    return np.stack([one.answer for one in found if isinstance(one.answer, np.ndarray)])


@pytest.mark.parametrize("multi_label", [False, True])
@pytest.mark.parametrize("seconds", [(SECONDS,), (SECONDS, 0.64)])
def test_scores_are_those_of_evaluation(clips, tmp_path, seconds, multi_label):
    """Also of an ensemble of models that hear different lengths, with normalisations of their own."""
    pytest.importorskip("nvidia.dali")
    from fastsskd.evaluation import evaluate
    from fastsskd.layouts import index as layouts
    from fastsskd.weights import load_model

    paths = [
        save_checkpoint(tmp_path / str(i), seed=i, seconds=length, mean=-4.0 - i, multi_label=multi_label)
        for i, length in enumerate(seconds)
    ]
    table = layouts.build(clips)
    expected = evaluate.mean_scores([load_model(path) for path in paths], table, 4)
    found = heard(Loaded(paths), find([clips]), batch_size=4, workers=2)
    np.testing.assert_allclose(rows(found), expected.probs, atol=1e-5)
    assert np.ptp(expected.probs, axis=0).max() > 0.02  # the clips do differ
    ends = [one for one in found if one.answer is None]
    assert [one.source.name for one in ends] == [str(table.path(i)) for i in range(len(table))]
    assert [one.goes_on for one in ends] == ["long" in one.source.name for one in ends]


@pytest.mark.parametrize(("batch_size", "workers"), [(1, 1), (3, 2), (100, 5)])
def test_batches_and_threads_change_nothing(clips, checkpoint, batch_size, workers):
    loaded = Loaded([checkpoint])
    cut = loaded.cut(hop=0.2)
    one = heard(loaded, find([clips]), cut=cut)
    other = heard(loaded, find([clips]), cut=cut, batch_size=batch_size, workers=workers)
    assert [(h.source, h.start, h.end, h.answer is None) for h in one] == [
        (h.source, h.start, h.end, h.answer is None) for h in other
    ]
    np.testing.assert_allclose(rows(one), rows(other), atol=1e-6)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_gpu_hears_what_a_cpu_hears(clips, checkpoint):
    found = [heard(Loaded([checkpoint], device), find([clips]), device=device) for device in ("cpu", "cuda")]
    np.testing.assert_allclose(rows(found[1]), rows(found[0]), atol=2e-3)


def test_a_batch_is_never_larger_than_asked_for(clips, checkpoint):
    loaded, sizes = Loaded([checkpoint]), []

    def answer(features):
        sizes.append(len(features[0]))
        return loaded.probabilities(features)

    heard(loaded, find([clips]), answer=answer, cut=loaded.cut(hop=0.05), batch_size=5, workers=2)
    assert max(sizes) == 5


def test_windows_of_a_recording_are_heard_as_clips_of_their_own(checkpoint):
    loaded, samples = Loaded([checkpoint]), sound(2.5)[:, 0].astype(np.float32)
    found = heard(loaded, [Samples("x", samples, 16000)], cut=loaded.cut(window=0.5, hop=0.3))
    spans = [(round(h.start * 16000), round(h.end * 16000)) for h in found[:-1]]
    assert spans[0] == (0, 8000) and spans[-1][1] == len(samples) and len(spans) == 8
    alone = heard(loaded, [Samples("x", samples[start:end], 16000) for start, end in spans])
    np.testing.assert_allclose(rows(found), rows(alone), atol=1e-6)


def test_a_bad_recording_ends_with_its_reason_and_the_others_are_heard(clips, checkpoint, tmp_path):
    whole = (clips / "dog/long.flac").read_bytes()
    (tmp_path / "cut.flac").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.wav").write_text("no audio at all")
    loaded = Loaded([checkpoint])
    names = [tmp_path / "cut.flac", clips / "cat/exact.wav", tmp_path / "text.wav", tmp_path / "none.wav"]
    found = heard(loaded, find([*names, clips / "cat/short.wav"]), workers=3, batch_size=2)
    ends = {h.source.path.name: h.answer for h in found if not isinstance(h.answer, np.ndarray)}
    assert list(ends) == ["cut.flac", "exact.wav", "text.wav", "none.wav", "short.wav"]
    assert ends["exact.wav"] is None and ends["short.wav"] is None
    assert isinstance(ends["cut.flac"], BadClip) and "not audio but text" in str(ends["text.wav"])
    assert "No such file" in str(ends["none.wav"])


def test_reading_stays_a_few_recordings_ahead(checkpoint):
    """An endless list of recordings is heard as it comes, and none of it is held."""
    loaded, asked = Loaded([checkpoint]), []

    def endless():
        while True:
            asked.append(1)
            yield Samples("x", np.zeros(4000, np.float32), 16000)

    listener = Listener(loaded.ears, loaded.probabilities, loaded.cut(), batch_size=2, workers=2)
    answers = listener.listen(endless())
    for _ in range(40):
        next(answers)
    answers.close()
    assert 20 <= len(asked) < 40


def test_an_error_of_ours_is_not_taken_for_a_bad_recording(checkpoint):
    loaded = Loaded([checkpoint])

    def answer(features):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        heard(loaded, [Samples("x", np.zeros(4000, np.float32), 16000)], answer=answer)


def test_windows_that_make_no_sense_are_refused(checkpoint):
    loaded = Loaded([checkpoint])
    for options in ({"window": 2.0}, {"window": 0.0}, {"hop": -1.0}, {"hop": float("inf")}, {"window": float("nan")}):
        with pytest.raises(UsageError, match=r"^(window|hop) "):
            loaded.cut(**options)
    assert loaded.cut() == Cut(15360, 0) and loaded.cut(whole=True) == Cut(15360, 15360)
    assert loaded.cut(window=0.5) == Cut(8000, 8000) and loaded.cut(hop=0.1) == Cut(15360, 1600)


def test_models_of_other_classes_are_refused(tmp_path, checkpoint):
    other = save_checkpoint(tmp_path, classes=("a", "b", "c", "d"))
    with pytest.raises(InputError, match="other classes than"):
        Loaded([checkpoint, other])


def test_features_of_each_level_are_means_of_the_patches(checkpoint):
    loaded = Loaded([checkpoint])
    features = [torch.randn(3, *_shape(loaded), generator=torch.Generator().manual_seed(0))]
    patches = loaded.embedding(features, "patch")
    grid = loaded.models[0].grid_size
    assert patches.shape == (3, grid[0] * grid[1], 64)
    by_step = patches.reshape(3, *grid, 64)  # time-major
    np.testing.assert_allclose(loaded.embedding(features, "frame"), by_step.mean(2), atol=1e-6)
    with torch.no_grad():
        clip = loaded.models[0](features[0])[1].numpy()
    for level in ("clip", "window"):
        np.testing.assert_allclose(loaded.embedding(features, level), clip, atol=1e-6)


def _shape(loaded):
    return loaded.ears[0].num_frames, 128


def test_a_head_that_was_never_trained_is_known(tmp_path, checkpoint, make_model):
    from fastsskd.weights import load_model, save_model

    _, info = load_model(checkpoint)
    assert Loaded([checkpoint]).untrained() == []
    save_model(tmp_path / "fresh.safetensors", make_model(num_classes=4).state_dict(), info)
    assert Loaded([checkpoint, tmp_path / "fresh.safetensors"]).untrained() == [str(tmp_path / "fresh.safetensors")]
    headless = dataclasses.replace(info, classes=())
    save_model(tmp_path / "ssl.safetensors", make_model(num_classes=0).state_dict(), headless)
    with pytest.raises(InputError, match="no class head"):
        Loaded([tmp_path / "ssl.safetensors"]).require_head()
