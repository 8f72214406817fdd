"""Cross-validation: which folds train, means and spreads by hand, and a whole one."""

import json

import numpy as np
import pytest
from sklearn.metrics import average_precision_score
from training import BASE

from fastsskd import manifest
from fastsskd.clip_columns import from_columns
from fastsskd.config import from_dict
from fastsskd.errors import InputError, UsageError
from fastsskd.evaluation import kfold, score_file
from fastsskd.evaluation.metrics import NAMES
from fastsskd.evaluation.score_file import ClipScores


@pytest.fixture
def clips(tmp_path):
    """A manifest of 10 clips in folds 1, 2, 3, 5, two of them in none."""
    folds = np.array([1, 1, 2, 2, 3, 3, 5, 5, 0, 0])
    table = from_columns([f"{i}.wav" for i in range(10)], root="/d", labels=folds % 2, classes=("a", "b"), folds=folds)
    manifest.save(table, tmp_path / "m.manifest")
    return str(tmp_path / "m.manifest")


def planned(clips, folds=(), seeds=(0,), **data):
    settings = from_dict({"data": {"manifest": clips, **data}})
    return [(job.name, job.overrides) for job, _, _ in kfold.plan(settings, ["ssl.epochs=1"], folds, seeds)]


def test_each_fold_is_evaluated_and_the_others_train(clips):
    assert planned(clips, folds=(1, 5), seeds=(0, 7)) == [
        (
            f"fold{fold}-seed{seed}",
            ("ssl.epochs=1", f"data.eval_folds=[{fold}]", f"data.train_folds={train}", f"run.seed={seed}"),
        )
        for seed in (0, 7)
        for fold, train in ((1, [2, 3, 5]), (5, [1, 2, 3]))
    ]
    assert [name for name, _ in planned(clips)] == [f"fold{fold}-seed0" for fold in (1, 2, 3, 5)]


def test_folds_that_are_to_be_left_out_are_in_no_training(clips):
    """Nor are those that the TOML's single run evaluates on kept from it."""
    jobs = planned(clips, train_folds=[1, 2, 3], eval_folds=[5])
    assert [job[1][1:3] for job in jobs] == [
        (f"data.eval_folds=[{fold}]", f"data.train_folds={train}")
        for fold, train in ((1, [2, 3]), (2, [1, 3]), (3, [1, 2]))
    ]
    assert planned(clips, folds=(5,), train_folds=[1, 2])[0][1][1:3] == (
        "data.eval_folds=[5]",
        "data.train_folds=[1, 2]",
    )


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        ({"folds": (4,)}, InputError, "no clip is in fold 4; its folds are 1, 2, 3, 5"),
        ({"train_folds": [1, 9]}, InputError, "no clip is in fold 9"),
        ({"folds": (1, 1)}, UsageError, "a fold is named twice"),
        ({"seeds": (3, 3)}, UsageError, "a seed is named twice"),
        ({"eval_manifest": "other"}, UsageError, "data.eval_manifest is set"),
    ],
)
def test_folds_that_cannot_be(clips, given, error, words):
    with pytest.raises(error, match=words) as caught:
        planned(clips, **given)
    assert "\n" not in str(caught.value)


def test_without_folds_there_is_no_cross_validation(tmp_path):
    table = from_columns(["a.wav", "b.wav"], root="/d", labels=np.array([0, 1]), classes=("a", "b"))
    manifest.save(table, tmp_path / "m.manifest")
    with pytest.raises(InputError, match="needs two folds or more; its folds are none"):
        planned(str(tmp_path / "m.manifest"))


def fake_run(folder, fold, seed, accuracy, teacher=None):
    """A run's result, and the scores of three clips of its fold."""
    random = np.random.default_rng((fold, seed))
    keys, label = np.array([f"{fold}-{i}" for i in range(3)]), np.array([0, 1, 1])
    scores = ClipScores(keys, label, random.random((3, 2)), ("a", "b"))
    score_file.save(folder / "scores/iter1-distill.npz", scores)
    score_file.save(folder / "scores/teacher.npz", scores)
    metrics = {**dict.fromkeys(NAMES, accuracy), "top5": None, "num_clips": 3, "num_classes": 2}
    result = {"teacher": None, "iterations": [{"iteration": 1, "metrics": metrics}], "ensemble": None}
    if teacher is not None:
        result["teacher"] = {"metrics": {**metrics, "accuracy": teacher}}
    return {**result, "num_train": 6, "skipped": {"x": "broken"}}, folder


ACCURACY = {(1, 0): 0.5, (2, 0): 0.7, (1, 4): 0.6, (2, 4): 1.0}


@pytest.fixture
def found(tmp_path):
    runs = {key: fake_run(tmp_path / f"{key}", *key, value) for key, value in ACCURACY.items()}
    return kfold.summary(runs), runs


def test_the_summary_holds_no_path_of_the_machine(found):
    """It can be moved with its runs, and be published."""
    summary, runs = found
    assert [run["folder"] for run in summary["runs"]] == [folder.name for _, folder in runs.values()]


def test_means_and_spreads_by_hand(found):
    row = found[0]["rows"]["iter1-distill"]
    own = row["accuracy"]
    assert own["mean"] == pytest.approx(0.7)
    assert own["folds"] == pytest.approx({"1": 0.55, "2": 0.85}) and own["seeds"] == pytest.approx({"0": 0.6, "4": 0.8})
    assert own["std_folds"] == pytest.approx(0.3 / 2**0.5) and own["std_seeds"] == pytest.approx(0.2 / 2**0.5)
    assert row["top5"] is None and (found[0]["folds"], found[0]["seeds"]) == ([1, 2], [0, 4])
    assert found[0]["runs"][0]["metrics"]["iter1-distill"]["accuracy"] == 0.5


def test_pooled_metrics_are_of_all_folds_clips_as_one_set(found):
    summary, runs = found
    expected = []
    for seed in (0, 4):
        parts = [score_file.load(runs[fold, seed][1] / "scores/iter1-distill.npz") for fold in (1, 2)]
        label, probs = (np.concatenate([getattr(part, name) for part in parts]) for name in ("label", "probs"))
        expected.append(average_precision_score(np.eye(2)[label], probs, average="macro"))
    row = summary["rows"]["iter1-distill"]
    assert row["pooled"]["mAP"] == pytest.approx(np.mean(expected)) and row["num_clips"] == 6


def test_the_table_says_how_many_and_which_weights(found):
    text = kfold.table({**found[0], "weights": kfold.WEIGHTS["best"]})
    head, row = text.splitlines()[:2]
    columns = ["accuracy", "fold 1", "fold 2", "mean", "std folds", "std seeds", "pooled"]
    assert head.split() == " ".join([*columns, "over the row above", "over the first"]).split()
    assert row.split()[:6] == ["iter1-distill", "0.5500", "0.8500", "0.7000", "0.2121", "0.1414"]
    assert "6 clips, 2 classes; 2 folds, 2 seeds" in text and "1 clip(s) left out" in text
    assert text.endswith("weights: best epoch, chosen on the evaluation fold: optimistic")


def test_one_fold_or_seed_has_no_spread(tmp_path):
    row = kfold.summary({(1, 0): fake_run(tmp_path, 1, 0, 0.5)})["rows"]["iter1-distill"]["accuracy"]
    assert row["mean"] == 0.5 and row["std_folds"] is row["std_seeds"] is None


def test_gains_are_of_pairs_of_the_same_fold_and_seed(tmp_path):
    gains = {(1, 0): 0.25, (2, 0): 0.0, (1, 4): -0.125, (2, 4): 0.375}
    runs = {
        key: fake_run(tmp_path / f"{key}", *key, value, teacher=value - gains[key]) for key, value in ACCURACY.items()
    }
    found = kfold.summary(runs)
    first, second = (found["rows"][name]["accuracy"] for name in ("teacher", "iter1-distill"))
    assert first["over_first"] is first["over_before"] is None
    error = np.std(list(gains.values()), ddof=1) / 2
    expected = {"mean": 0.125, "standard_error": error, "better": 2, "pairs": 4}
    assert second["over_first"] == second["over_before"] == pytest.approx(expected)
    lines = kfold.table({**found, "weights": kfold.WEIGHTS["last"]}).splitlines()
    assert lines[0].endswith("over the row above  over the first")
    assert lines[1].split()[-2:] == ["-", "-"] and lines[2].split()[-6:] == ["+0.125", "±", f"{error:.3f}"] * 2
    assert "gains: mean and standard error" in "\n".join(lines)


@pytest.mark.parametrize(
    ("own", "other", "expected"),
    [
        ({1: 0.5}, {2: 0.5}, None),
        ({1: 0.5, 3: 0.1}, {1: 0.25, 2: 0.5}, {"mean": 0.25, "standard_error": None, "better": 1, "pairs": 1}),
        ({1: 0.5, 2: 0.5}, {1: 0.5, 2: 0.5}, {"mean": 0.0, "standard_error": 0.0, "better": 0, "pairs": 2}),
    ],
)
def test_pairs_are_what_both_have(own, other, expected):
    assert kfold.paired(own, other) == expected


@pytest.mark.slow
def test_a_whole_cross_validation(tones, tmp_path, capsys):
    """Two of three folds; every clip of them is scored once, by the model that was not trained on it."""
    from launch.kfold import main

    table = manifest.load(tones)
    # Clips alternate between the two classes.
    paths, folds = [str(table.path(i)) for i in range(len(table))], np.arange(len(table)) // 2 % 3 + 1
    folded = from_columns(paths, root="/", labels=table.label_array(), classes=table.classes, folds=folds)
    manifest.save(folded, tmp_path / "m.manifest")
    toml, ds, out = tmp_path / "c.toml", tmp_path / "ds.json", tmp_path / "out"
    ds.write_text('{"train_batch_size": 8, "zero_optimization": {"stage": 1}}')
    toml.write_text("")
    values = {**BASE, "recipe.stages": '["distill"]', "data.manifest": json.dumps(str(tmp_path / "m.manifest"))}
    sets = [text for name, value in values.items() for text in ("--set", f"{name}={value}")]
    given = ["--ds_config", str(ds), "--config", str(toml), *sets, "--set", f"run.out={out}", "--folds", "1", "3"]
    assert main([*given, "--keep", "result", "--threads", "1"]) == 0
    printed = capsys.readouterr().out
    found = json.loads((out / "kfold.json").read_text())
    assert printed.strip() == kfold.table(found) and "weights: those of the last epoch" in printed
    results = [json.loads((out / f"fold{fold}-seed0/result.json").read_text()) for fold in (1, 3)]
    accuracy = [result["metrics"]["accuracy"] for result in results]
    assert found["rows"]["iter1-distill"]["accuracy"]["mean"] == pytest.approx(np.mean(accuracy))
    scored = [score_file.load(out / f"fold{fold}-seed0/scores/iter1-distill.npz") for fold in (1, 3)]
    own = [{str(folded.key(i)) for i in np.flatnonzero(folds == fold)} for fold in (1, 3)]
    assert [set(part.key) for part in scored] == own
    hits = np.concatenate([part.probs.argmax(axis=1) == part.label for part in scored])
    assert found["rows"]["iter1-distill"]["pooled"]["accuracy"] == pytest.approx(hits.mean())
    assert not list(out.glob("*/checkpoints/*"))
    # Again, without a training.
    assert main([*given, "--keep", "result"]) == 0
    assert "2 complete before" in capsys.readouterr().err
