"""Scores: each clip exactly once and in the manifest's order, whatever the ranks and the batches."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fastsskd import distributed, evaluate
from fastsskd.clip_columns import from_columns
from fastsskd.errors import InputError
from fastsskd.sampler import Sampler
from fastsskd.weights import ModelInfo, save_model

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
