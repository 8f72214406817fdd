"""Scores: each clip exactly once and in the manifest's order, whatever the ranks and the batches."""

import dataclasses
import json
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
import soundfile
import torch
from sklearn.metrics import average_precision_score

import fastsskd_kernels as kernels
from fastsskd import cli, distributed, manifest
from fastsskd.clip_columns import from_columns
from fastsskd.errors import InputError
from fastsskd.evaluation import evaluate, score_file
from fastsskd.evaluation.table import table
from fastsskd.layouts import index as layouts
from fastsskd.patches import num_input_frames
from fastsskd.sampler import Sampler
from fastsskd.weights import ModelInfo, load_model, save_model

CLASSES = ("a", "b", "c")
INFO = ModelInfo("nano", CLASSES, False, 0.96, -4.0, 4.5)


def model(fbank):
    """Logits that are a function of the clip alone."""
    return torch.stack([fbank[:, 0, 0], -fbank[:, 0, 0], fbank[:, 0, 0] ** 2], dim=1), fbank[:, 0]


class SmallLoader:
    """One rank's share of ``num_clips`` clips, without those in ``bad``."""

    def __init__(self, num_clips, rank, world_size, batch_size=3, bad=()):
        sampler = Sampler(num_clips, batch_size=batch_size, shuffle=False, seed=0, rank=rank, world_size=world_size)
        batches = [index for index, _ in sampler.batches(0)]
        self.batches = [np.array([i for i in index if i not in bad], np.int64) for index in batches]
        self.skipped = {f"clip{i}": "broken" for index in batches for i in index if i in bad}

    def __iter__(self):
        for index in self.batches:
            values = torch.from_numpy(np.sin(index).astype(np.float32))
            yield SimpleNamespace(fbank=values[:, None, None].expand(-1, 2, 2), index=torch.from_numpy(index))


def scores_of(monkeypatch, num_clips, world_size, **options) -> evaluate.Scores:
    """What rank 0 sees once all ranks have answered."""
    parts = []
    monkeypatch.setattr(distributed, "gather_objects", lambda own: parts.append(own) or [own])
    for rank in range(world_size):
        evaluate.score(model, SmallLoader(num_clips, rank, world_size, **options), False)
    monkeypatch.setattr(distributed, "gather_objects", lambda own: list(parts))
    return evaluate.score(model, SmallLoader(num_clips, 0, world_size, **options), False)


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
@pytest.mark.parametrize("num_clips", [1, 7, 16])
def test_each_clip_exactly_once_on_any_number_of_ranks(monkeypatch, world_size, num_clips):
    scores = scores_of(monkeypatch, num_clips, world_size)
    assert scores.index.tolist() == list(range(num_clips))
    values = torch.sin(torch.arange(num_clips)).float()
    expected = torch.stack([values, -values, values**2], dim=1).softmax(-1)
    np.testing.assert_allclose(scores.probs, expected.numpy(), atol=1e-6)


def test_bad_clips_are_left_out_and_named(monkeypatch):
    scores = scores_of(monkeypatch, 10, 2, bad=(0, 4, 5))
    assert scores.index.tolist() == [1, 2, 3, 6, 7, 8, 9] and len(scores.probs) == 7
    assert scores.skipped == {"clip0": "broken", "clip4": "broken", "clip5": "broken"}


def test_multi_label_scores_are_sigmoids():
    scores = evaluate.score(model, SmallLoader(4, 0, 1), True)
    values = torch.sin(torch.arange(4)).float()
    np.testing.assert_allclose(scores.probs[:, 1], torch.sigmoid(-values).numpy(), atol=1e-6)


class Truth:
    """A manifest's labels."""

    def __init__(self, labels, classes=CLASSES):
        self.labels, self.classes = np.array(labels), classes

    def label_of(self, index):
        return self.labels[index]


def test_metrics_are_of_the_rows_that_were_scored():
    probs = np.eye(3)[[2, 0, 1]].astype(np.float32)
    scores = evaluate.Scores(probs, np.array([1, 3, 4]), {})
    metrics = evaluate.summarise(probs, scores, Truth([0, 2, 0, 0, 1]))
    assert metrics["accuracy"] == 1.0 and metrics["num_clips"] == 3


def table_of(labels, classes=CLASSES):
    return from_columns([f"{i}.wav" for i in range(len(labels))], root="/d", labels=np.array(labels), classes=classes)


@pytest.mark.parametrize(
    ("table", "words"),
    [
        (table_of([0, -1, 2]), "1 evaluation clips have no label"),
        (table_of([0, 1], classes=("a", "b")), "knows 3 classes .a, b, c, ....*manifest has 2 .a, b"),
        (table_of([-1, -1], classes=()), "has no labels"),
    ],
)
def test_a_manifest_that_cannot_be_rated_is_refused_before_any_clip_is_read(tmp_path, make_model, table, words):
    save_model(tmp_path / "m.safetensors", make_model(num_classes=3).state_dict(), INFO)
    with pytest.raises(InputError, match=words) as caught:
        evaluate.evaluate([tmp_path / "m.safetensors"], table)
    assert "\n" not in str(caught.value)


def test_models_of_other_classes_are_no_ensemble(tmp_path, make_model):
    info = dataclasses.replace(INFO, classes=("c", "b", "a"))
    evaluate._check_fits("first", INFO, INFO, table_of([0, 1, 2]))
    with pytest.raises(InputError, match="second: other classes than the first"):
        evaluate._check_fits("second", info, INFO, table_of([0, 1, 2]))


def test_nothing_readable_is_bad_input():
    scores = evaluate.Scores(np.zeros((0, 3), np.float32), np.zeros(0, np.int64), {"clip0": "broken"})
    with pytest.raises(InputError, match=r"no clip of the evaluation set could be read \(first: clip0: broken"):
        evaluate.summarise(scores.probs, scores, Truth([0]))


# ------------------------------------------------------------------------------------------- crops, averages, command

LENGTHS = {"a": (15000, 40001), "b": (15360, 50000), "c": (15361, 200000)}
"""Samples of the clips of each class; a crop has 15360."""


@pytest.fixture(scope="module")
def noises(tmp_path_factory):
    """Manifest of six clips of noise, two of them no longer than the model's length."""
    folder, random = tmp_path_factory.mktemp("noises"), np.random.default_rng(0)
    for name, lengths in LENGTHS.items():
        (folder / name).mkdir()
        for length in lengths:
            envelope = 0.01 + 0.2 * np.sin(np.arange(length) / random.uniform(1000, 9000)) ** 2
            soundfile.write(folder / name / f"{length}.wav", envelope * random.standard_normal(length), 16000)
    path = tmp_path_factory.mktemp("tables") / "noises.manifest"
    manifest.save(layouts.build(folder), path)
    return path


@pytest.fixture
def checkpoints(tmp_path, make_model):
    """Two models' files."""
    files = []
    for seed in (1, 2):
        files.append(tmp_path / f"{seed}/model.safetensors")
        save_model(files[-1], make_model(num_classes=3, seed=seed).state_dict(), INFO)
    return files


def heard(checkpoint, samples) -> np.ndarray:
    """A model's probabilities for exactly these samples."""
    model, info = load_model(checkpoint)
    clip = torch.from_numpy(samples.astype(np.float32))[None]
    fbank, _ = kernels.features(clip, num_frames=num_input_frames(info.seconds), mean=info.mean, std=info.std)
    with torch.no_grad():
        return model(fbank)[0].softmax(dim=-1)[0].numpy()


@pytest.mark.parametrize("crops", [1, 2, 4])
def test_crops_are_evenly_spaced_and_short_clips_are_heard_once(noises, checkpoints, crops):
    clips, n = manifest.load(noises), 15360
    rated = evaluate.rate(checkpoints[:1], clips, crops=crops, batch_size=4)
    assert rated.metrics["heard_once"] == (2 if crops > 1 else None) and rated.metrics["crops"] == crops
    assert rated.clips.key.tolist() == [clips.key(i) for i in range(6)]
    for i, probs in enumerate(rated.clips.probs):
        samples, _ = soundfile.read(clips.path(i))
        starts = [0]
        if len(samples) > n:
            starts = [min(k * (len(samples) - n + 1) // max(crops - 1, 1), len(samples) - n) for k in range(crops)]
        parts = [np.tile(samples, 2)[start : start + n] for start in starts]
        np.testing.assert_allclose(probs, np.mean([heard(checkpoints[0], p) for p in parts], axis=0), atol=1e-5)


def test_a_clip_whose_end_only_some_crops_hear_is_left_out_whole():
    first = evaluate.Scores(np.full((3, 2), 0.5, np.float32), np.arange(3), {})
    second = evaluate.Scores(np.full((1, 2), 1.0, np.float32), np.array([2]), {"b": "broken"})
    mean = evaluate._mean([first, second], np.array([1, 2, 2]))
    assert mean.index.tolist() == [0, 2] and mean.skipped == {"b": "broken"}
    np.testing.assert_array_equal(mean.probs, [[0.5, 0.5], [0.75, 0.75]])


def test_the_mean_of_weights_is_a_model_of_its_own(noises, checkpoints, make_model):
    one, two = (make_model(num_classes=3, seed=seed) for seed in (1, 2))
    with torch.no_grad():
        for a, b in zip(one.parameters(), two.parameters(), strict=True):
            a.copy_((a + b) / 2)
    mean = checkpoints[0].with_name("mean.safetensors")
    save_model(mean, one.state_dict(), INFO)
    own = evaluate.rate(checkpoints, noises, average=True)
    np.testing.assert_allclose(own.clips.probs, evaluate.rate([mean], noises).clips.probs, atol=1e-6)
    of_probs = evaluate.rate(checkpoints, noises).clips.probs
    each = [evaluate.rate([path], noises).clips.probs for path in checkpoints]
    np.testing.assert_allclose(of_probs, np.mean(each, axis=0), atol=1e-6)
    assert np.abs(own.clips.probs - of_probs).max() > 1e-4
    same = evaluate.rate([checkpoints[0]] * 3, noises, average=True)
    np.testing.assert_allclose(same.clips.probs, each[0], atol=1e-5)


def test_weights_of_different_kinds_are_not_averaged(noises, checkpoints, make_model):
    save_model(checkpoints[1], make_model(num_classes=3).state_dict(), dataclasses.replace(INFO, std=4.0))
    with pytest.raises(InputError, match=r"std 4\.0, the first has 4\.5"):
        evaluate.rate(checkpoints, noises, average=True)


def test_the_command_writes_what_it_says(noises, checkpoints, tmp_path, capsys):
    files = ["--scores", str(tmp_path / "s.npz"), "--confusion", str(tmp_path / "c.png")]
    asked = ["evaluate", "--checkpoint", *map(str, checkpoints), "--crops", "2", "--average", *files]
    assert cli.main([*asked, "--bootstrap", "50", str(noises)]) == 0
    printed, told = capsys.readouterr()
    metrics = json.loads(printed)
    scores = score_file.load(tmp_path / "s.npz")
    assert metrics["accuracy"] == np.mean(scores.probs.argmax(axis=1) == scores.label)
    assert metrics["interval"]["resamples"] == 50 and len(metrics["interval"]["mAP"]) == 2
    assert sum(pair["clips"] for pair in metrics["confused"]) == round(6 * (1 - metrics["accuracy"]))
    assert (tmp_path / "c.png").stat().st_size > 5000
    assert "on 6 clips, 3 classes; 0 left out" in told and "mean of the weights of 2 checkpoints" in told
    assert "mean over 2 crops of each clip; 2 of 6, not longer" in told and "95 % over clips" in told
    assert told.strip() == table(metrics)


def test_a_multi_label_set_has_no_confusion(tmp_path, checkpoints, capsys):
    clips = from_columns(
        ["a.wav", "b.wav"], root="/d", labels=pa.array([[0, 1], [2]]), classes=CLASSES, multi_label=True
    )
    manifest.save(clips, tmp_path / "m.manifest")
    given = ["--checkpoint", str(checkpoints[0]), "--confusion", "c.png", str(tmp_path / "m.manifest")]
    assert cli.main(["evaluate", *given]) == 2
    assert "may have several labels" in capsys.readouterr().err


def test_a_picture_of_no_kind_is_refused_before_any_clip_is_read(checkpoints, capsys):
    given = ["--checkpoint", str(checkpoints[0]), "--confusion", "c.docx", "no.manifest"]
    assert cli.main(["evaluate", *given]) == 2
    assert "c.docx: end it with .png" in capsys.readouterr().err


def test_a_place_that_cannot_be_written_is_named(noises, checkpoints, tmp_path, capsys):
    (tmp_path / "file").touch()
    given = ["--checkpoint", str(checkpoints[0]), "--scores", str(tmp_path / "file/s.npz"), str(noises)]
    assert cli.main(["evaluate", *given]) == 1
    assert "file/s.npz: cannot be written: " in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("ranks", [2, 3])
def test_crops_are_the_same_on_any_number_of_ranks(training, noises, checkpoints, tmp_path, ranks):
    """Of the four clips that are long enough, three ranks have shares of different sizes."""
    training.call("evaluate_ranks.save_scores", noises, checkpoints[0], tmp_path / "s.npz", ranks=ranks)
    one = evaluate.rate(checkpoints[:1], noises, crops=3).clips
    with np.load(tmp_path / "s.npz") as found:
        assert found["key"].tolist() == one.key.tolist()
        np.testing.assert_allclose(found["probs"], one.probs, atol=1e-6)


def test_a_multi_label_set_is_rated_by_sigmoids(noises, tmp_path, make_model):
    clips = manifest.load(noises)
    labels = pa.array([[0], [0, 1], [1], [1, 2], [2], []])
    paths = [str(clips.path(i)) for i in range(6)]
    several = from_columns(paths, root="/", labels=labels, classes=CLASSES, multi_label=True)
    info = dataclasses.replace(INFO, multi_label=True)
    save_model(tmp_path / "m.safetensors", make_model(num_classes=3).state_dict(), info)
    rated = evaluate.rate([tmp_path / "m.safetensors"], several, resamples=20)
    assert (rated.metrics["accuracy"], rated.metrics["confused"], rated.metrics["interval"]["accuracy"]) == (None,) * 3
    assert rated.clips.label.tolist() == [[1, 0, 0], [1, 1, 0], [0, 1, 0], [0, 1, 1], [0, 0, 1], [0, 0, 0]]
    assert not np.allclose(rated.clips.probs.sum(axis=1), 1.0)
    assert rated.metrics["mAP"] == pytest.approx(average_precision_score(rated.clips.label, rated.clips.probs))
    assert "mAP" in table(rated.metrics) and "taken for another" not in table(rated.metrics)
