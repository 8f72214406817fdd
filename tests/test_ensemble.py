"""Several teachers as one, against the mean computed clip by clip."""

import math

import pytest
import torch
from torch import nn

from fastsskd.config import AugmentConfig, DataConfig, DistillConfig
from fastsskd.distill import Distill
from fastsskd.errors import InputError, UsageError
from fastsskd.teachers import describe, load_teacher
from fastsskd.teachers.ensemble import Ensemble
from fastsskd.weights import ModelInfo, save_model


class FixedTeacher(nn.Module):
    """Scores and features that are a fixed linear function of the waveform."""

    def __init__(self, classes, embed_dim=3, score_kind="logits", outputs=None, seed=0):
        super().__init__()
        self.classes, self.embed_dim, self.score_kind = tuple(classes), embed_dim, score_kind
        self.outputs = outputs if outputs is not None else len(classes)
        generator = torch.Generator().manual_seed(seed)
        self.weight = nn.Parameter(0.01 * torch.randn(15360, self.outputs + embed_dim, generator=generator))

    def forward(self, waveform):
        out = waveform @ self.weight
        scores, features = out[:, : self.outputs], out[:, self.outputs :]
        return (scores if self.score_kind == "logits" else scores.sigmoid()), features


WAVES = torch.randn(4, 15360, generator=torch.Generator().manual_seed(1))


def by_hand(members, classes, multi_label) -> list[list[float]]:
    """Mean probability of each class over the members that name their classes, in plain numbers."""
    rows = []
    for clip in range(len(WAVES)):
        total = [0.0] * len(classes)
        for member in members:
            scores = member(WAVES)[0][clip].tolist()
            picked = [scores[member.classes.index(name)] for name in classes]
            if member.score_kind == "logits" and multi_label:
                picked = [1 / (1 + math.exp(-value)) for value in picked]
            elif member.score_kind == "logits":
                picked = [math.exp(value) for value in picked]
            if not multi_label:
                picked = [value / sum(picked) for value in picked]
            total = [a + b / len(members) for a, b in zip(total, picked, strict=True)]
        rows.append(total)
    return rows


@pytest.mark.parametrize("multi_label", [True, False])
def test_the_mean_of_probabilities_of_the_common_classes_found_by_name(multi_label):
    first = FixedTeacher(("cat", "dog", "bell"), seed=1)
    second = FixedTeacher(("rain", "bell", "cat"), embed_dim=5, score_kind="probs", seed=2)
    nameless = FixedTeacher((), embed_dim=2, outputs=7, seed=3)
    both = Ensemble([first, nameless, second], ["a", "b", "c"], multi_label)
    scores, features = both(WAVES)
    assert both.classes == ("cat", "bell") and both.score_kind == "probs" and both.embed_dim == 10
    expected = torch.tensor(by_hand([first, second], ("cat", "bell"), multi_label))
    torch.testing.assert_close(scores, expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(features, torch.cat([m(WAVES)[1] for m in (first, nameless, second)], dim=1))
    assert not scores.requires_grad and not features.requires_grad
    shares = "3 named classes, features of 3; no named classes, features of 2; 3 named classes, features of 5"
    assert describe(both) == f"2 classes that 3 teachers share ({shares})"


def test_members_without_a_common_class_are_refused_and_without_names_give_features_only():
    members = [FixedTeacher(("cat", "dog")), FixedTeacher(("/m/01", "/m/02"))]
    with pytest.raises(InputError) as caught:
        Ensemble(members, ["a.pth", "b.pt"], True)
    text = str(caught.value)
    assert "\n" not in text and "'cat' (a.pth) and '/m/01' (b.pt)" in text
    nameless = Ensemble([FixedTeacher((), outputs=4), FixedTeacher((), outputs=0)], ["a", "b"], True)
    scores, features = nameless(WAVES)
    assert nameless.classes == () and scores.shape == (4, 0) and features.shape == (4, 6)


@pytest.fixture
def paths(tmp_path, make_model):
    """Two models of ours with the same classes in another order."""
    for seed, classes in enumerate((("bell", "cat", "dog", "rain"), ("rain", "dog", "cat", "bell"))):
        info = ModelInfo("nano", classes, False, 0.96, -3.0, 2.0)
        save_model(tmp_path / f"{seed}.safetensors", make_model(seed=seed).state_dict(), info)
    return [tmp_path / "0.safetensors", tmp_path / "1.safetensors"]


def test_a_list_of_checkpoints_is_an_ensemble(paths, make_batch):
    wave = make_batch(waveform=True).waveform
    both = load_teacher(paths, multi_label=False)
    one, other = (load_teacher(path) for path in paths)
    expected = (one(wave)[0].softmax(1) + other(wave)[0].flip(1).softmax(1)) / 2
    scores, features = both(wave)
    torch.testing.assert_close(scores, expected)
    assert features.shape == (5, 128) and both.classes == one.classes
    both.train()
    assert not any(part.training for member in both.members for part in member.modules())
    assert not any(p.requires_grad for p in both.parameters()) and both.state_dict().keys() == {
        f"members.{n}.{name}" for n in (0, 1) for name in one.state_dict()
    }


def test_a_list_of_one_is_that_teacher_and_an_empty_one_is_wrong_usage(paths):
    assert type(load_teacher(paths[:1])) is type(load_teacher(paths[0]))
    with pytest.raises(UsageError, match="empty list"):
        load_teacher([])
    with pytest.raises(InputError, match="no such file or folder"):
        load_teacher([paths[0], paths[0].with_name("none.pth")])


def test_a_student_learns_from_an_ensemble_without_waiting_for_the_device(make_model, make_batch, no_waiting):
    classes = ("bell", "cat", "dog", "rain")
    members = [FixedTeacher(classes, seed=1), FixedTeacher(classes[::-1], seed=2)]
    module = Distill(
        make_model(),
        classes=classes,
        multi_label=True,
        distill=DistillConfig(),
        augmentation=AugmentConfig(),
        data=DataConfig(),
        num_frames=94,
        teacher=Ensemble(members, ["a", "b"], True),
    )
    batch = make_batch(waveform=True, multi_label=True)
    with no_waiting():
        total, terms = module(batch)
        total.backward()
    assert set(terms) == {"label", "teacher_label", "regression"} and total.isfinite()
