"""Frozen features: neighbours and linear map against scikit-learn, and a whole probe of a model's file."""

import json

import numpy as np
import pytest
import soundfile
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from fastsskd import cli, manifest
from fastsskd.clip_columns import from_columns
from fastsskd.errors import InputError
from fastsskd.evaluation import probe as probing
from fastsskd.layouts import index as layouts
from fastsskd.weights import ModelInfo, save_model

INFO = ModelInfo("nano", (), False, 0.96, -4.0, 4.5)


def blobs(seed, n, c=3, dim=5, spread=1.0):
    """Features about one place a class, and the classes."""
    places = np.random.default_rng(99).normal(size=(c, dim))
    random = np.random.default_rng(seed)
    y = random.permutation(np.arange(n) % c)
    return (places[y] + spread * random.normal(size=(n, dim))).astype(np.float32), y


def clips_of(y, folds=None, classes=("a", "b", "c")):
    names = [f"{i}.wav" for i in range(len(y))]
    return from_columns(names, root="/d", labels=y, classes=classes, folds=folds)


@pytest.mark.parametrize("k", [1, 5, 40])
def test_neighbours_vote_as_in_scikit_learn(k, monkeypatch):
    monkeypatch.setattr(probing, "_ROWS", 7)
    (x, y), (test, _) = blobs(1, 40), blobs(2, 25)
    vote = KNeighborsClassifier(k, metric="cosine", algorithm="brute", weights=lambda d: np.exp((1.0 - d) / 0.07))
    expected = vote.fit(x, y).predict_proba(test)
    np.testing.assert_allclose(probing.neighbours(x, y, test, 3, k), expected, atol=1e-4)
    np.testing.assert_allclose(probing.neighbours(x, np.eye(3)[y], test, 3, k), expected, atol=1e-4)


def test_neighbours_by_hand():
    """Cosines 1 and 0 to the two neighbours; lengths do not count, a zero vector is near to nobody."""
    x, y = np.array([[2.0, 0.0], [0.0, 9.0], [0.0, 0.0]]), np.array([0, 1, 1])
    votes = probing.neighbours(x, y, np.array([[5.0, 0.0]]), 2, 2)
    near, far = np.exp(1 / 0.07), 1.0
    np.testing.assert_allclose(votes, [[near / (near + far), far / (near + far)]])
    several = probing.neighbours(x, np.array([[1, 1], [0, 1], [0, 0]]), np.array([[5.0, 0.0]]), 2, 2)
    np.testing.assert_allclose(several, [[near / (near + far), 1.0]])


@pytest.mark.parametrize("multi_label", [False, True])
def test_the_linear_map_is_scikit_learns(multi_label):
    (x, y), (test, _) = blobs(1, 60), blobs(2, 20)
    if multi_label:
        y = np.stack([y == 0, y != 1, np.zeros(60), np.ones(60)], axis=1).astype(np.float32)
    found = probing.linear(x, y, test, 4, 0.5)
    assert found.shape == (20, 4)
    if not multi_label:
        fitted = make_pipeline(StandardScaler(), LogisticRegression(C=0.5)).fit(x, y)
        np.testing.assert_allclose(found[:, :3], fitted.predict_proba(test), atol=1e-3)
        assert (found[:, 3] == 0.0).all()  # a class that was never seen
        return
    for column in (0, 1):
        fitted = make_pipeline(StandardScaler(), LogisticRegression(C=0.5)).fit(x, y[:, column])
        np.testing.assert_allclose(found[:, column], fitted.predict_proba(test)[:, 1], atol=1e-3)
    assert (found[:, 2] == 0.0).all() and (found[:, 3] == 1.0).all()


def test_the_order_of_the_clips_does_not_matter():
    (x, y), (test, _) = blobs(1, 50), blobs(2, 12)
    order = np.random.default_rng(0).permutation(50)
    for function, last in ((probing.neighbours, 8), (probing.linear, 0.1)):
        np.testing.assert_allclose(
            function(x[order], y[order], test, 3, last), function(x, y, test, 3, last), atol=1e-3
        )


@pytest.mark.parametrize(("n", "noise"), [(300, 0), (60, 40), (60, 400)])
def test_the_penalty_is_the_best_on_what_is_held_out(n, noise):
    x, y = blobs(1, n)
    x = np.concatenate([x, np.random.default_rng(3).normal(size=(n, noise))], axis=1)
    held, scores = np.arange(n) % 5 == 0, {}
    for c in probing.STRENGTHS:
        fitted = make_pipeline(StandardScaler(), LogisticRegression(C=c, max_iter=5000)).fit(x[~held], y[~held])
        scores[c] = fitted.score(x[held], y[held])
    best = max(scores, key=scores.get)
    assert probing.choose_strength(x, y, held, ("a", "b", "c")) == best and scores[best] > min(scores.values())
    assert probing.choose_strength(x, y, np.zeros(n, bool), ("a", "b", "c")) == 1.0


def test_the_part_held_out_is_a_fold_or_a_fifth_of_each_class():
    y = np.arange(30) % 3
    assert probing._held_out(clips_of(y, folds=np.arange(30) // 10 + 1), 0).tolist() == [False] * 20 + [True] * 10
    held = probing._held_out(clips_of(y), 0)
    assert np.bincount(y[held]).tolist() == [2, 2, 2]
    assert not probing._held_out(clips_of(np.arange(3)), 0).any()


def test_good_features_rate_well_and_the_numbers_are_the_metrics():
    train, test = ((*blobs(seed, n, spread=0.05), np.arange(n), {}) for seed, n in ((1, 60), (2, 30)))
    found = probing.rate(probing.Labelled(*train), probing.Labelled(*test), clips_of(train[1]), k=5, seed=0)
    assert found["knn"]["accuracy"] == found["linear"]["accuracy"] == 1.0
    assert found["knn"]["mAP"] == pytest.approx(1.0) and found["linear"]["mAP"] == pytest.approx(1.0)
    assert found["dim"] == found["rank_limit"] == 5 and 1.0 < found["effective_rank"] < 3.0  # three places: a plane
    assert found["std"] == pytest.approx(test[0].std(axis=0).mean())
    assert found["linear"]["C"] in probing.STRENGTHS


@pytest.fixture(scope="module")
def tones(tmp_path_factory):
    """Manifest of 24 clips in folds 1 to 3: soft low tones, loud high tones; and the folder without classes."""
    folder, random = tmp_path_factory.mktemp("tones"), np.random.default_rng(0)
    for number in range(24):
        pitch = random.uniform(200, 400) * (1, 6)[number % 2]
        wave = (0.003, 0.3)[number % 2] * np.sin(
            2 * np.pi * pitch * np.arange(15360) / 16000
        ) + 0.001 * random.standard_normal(15360)
        soundfile.write(folder / f"{number:02d}.wav", wave, 16000)
    paths, folds = sorted(str(path) for path in folder.iterdir()), np.arange(24) // 8 + 1
    table = from_columns(paths, root="/", labels=np.arange(24) % 2, classes=("soft", "loud"), folds=folds)
    path = tmp_path_factory.mktemp("tables") / "tones.manifest"
    manifest.save(table, path)
    return path, folder


@pytest.mark.parametrize("classes", [(), ("dog", "cat", "cow")])
def test_a_model_with_any_head_or_none_is_probed(tones, tmp_path, make_model, capsys, classes):
    info = ModelInfo("nano", classes, False, 0.96, -4.0, 4.5)
    save_model(tmp_path / "m.safetensors", make_model(num_classes=len(classes), seed=3).state_dict(), info)
    given = ["probe", str(tones[0]), "--checkpoint", str(tmp_path / "m.safetensors"), "--folds", "2", "--k", "3"]
    assert cli.main(given) == 0
    printed, told = capsys.readouterr()
    found = json.loads(printed)
    assert (found["num_train"], found["num_eval"], found["num_classes"], found["k"]) == (16, 8, 2, 3)
    for name in ("trained", "random"):
        assert found[name]["knn"]["accuracy"] >= 0.75 and found[name]["linear"]["accuracy"] >= 0.75
    assert found["trained"]["std"] != found["random"]["std"]  # other weights
    assert told.strip() == probing.table(found) and "16 clips to learn from, 8 to rate, 2 classes" in told


def test_what_cannot_be_probed_is_named(tones, tmp_path, make_model, capsys):
    save_model(tmp_path / "m.safetensors", make_model(num_classes=0).state_dict(), INFO)
    table = manifest.load(tones[0])
    with pytest.raises(InputError, match="has no labels"):
        probing.probe(tmp_path, layouts.build(tones[1]), table)
    with pytest.raises(InputError, match="other classes"):
        probing.probe(tmp_path, table, clips_of(np.arange(3), classes=("x", "y", "z")))
    assert cli.main(["probe", str(tones[0]), "--checkpoint", str(tmp_path / "none")]) == 1
    assert "no such file" in capsys.readouterr().err
