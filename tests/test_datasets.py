"""Which clips a configuration trains and evaluates on, and what is refused before anything is trained."""

import numpy as np
import pytest

from fastsskd import manifest
from fastsskd.clip_columns import from_columns
from fastsskd.config import from_dict
from fastsskd.datasets import open_data
from fastsskd.errors import InputError

CLASSES = ("a", "b", "c")


def save(folder, labels, name="m", classes=CLASSES, **columns) -> str:
    paths = [f"{name}{i}.wav" for i in range(len(labels))]
    for path in paths:
        (folder / path).touch()
    table = from_columns(paths, root=str(folder), labels=np.array(labels), classes=classes, **columns)
    manifest.save(table, folder / f"{name}.manifest")
    return str(folder / f"{name}.manifest")


def open_sets(total_batch=2, stages=("ssl", "distill"), **data):
    return open_data(from_dict({"data": data, "recipe": {"stages": list(stages)}}), total_batch)


def refusal(**options) -> str:
    with pytest.raises(InputError) as caught:
        open_sets(**options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def keys(clips) -> set[str]:
    return {clips.key(i) for i in range(len(clips))}


def test_one_manifest_is_split_and_a_second_one_is_not(tmp_path):
    one, two = save(tmp_path, [0, 1, 2] * 10), save(tmp_path, [2, 1, 0] * 4, "eval")
    sets = open_sets(manifest=one)
    assert len(sets.train) == 24 and len(sets.evaluation) == 6 and keys(sets.ssl) == keys(sets.train)
    assert keys(sets.train).isdisjoint(keys(sets.evaluation))
    sets = open_sets(manifest=one, eval_manifest=two)
    assert len(sets.train) == 30 and len(sets.evaluation) == 12


def test_folds_choose_the_sides(tmp_path):
    path = save(tmp_path, [0, 1] * 10, folds=np.arange(20) % 5 + 1)
    sets = open_sets(manifest=path, train_folds=[1, 2], eval_folds=[4])
    assert keys(sets.train) == {f"m{i}.wav" for i in range(20) if i % 5 in (0, 1)}
    assert keys(sets.evaluation) == {f"m{i}.wav" for i in range(20) if i % 5 == 3}


def test_the_paper_s_20_k_is_a_random_draw_of_the_labelled_stages_alone(tmp_path):
    one, two = save(tmp_path, [0, 1, 2] * 20), save(tmp_path, [2, 1, 0] * 20, "eval")
    options = {"manifest": one, "eval_manifest": two, "max_train": 20, "max_eval": 10}
    sets, again = open_sets(**options), open_sets(**options)
    assert (len(sets.ssl), len(sets.train), len(sets.evaluation)) == (60, 20, 10)
    assert keys(sets.train) == keys(again.train) and keys(sets.train) < keys(sets.ssl)
    assert keys(sets.train) != {f"m{i}.wav" for i in range(20)}


def test_ssl_may_have_clips_of_its_own_without_labels(tmp_path):
    one, bare = save(tmp_path, [0, 1, 2] * 10), save(tmp_path, [-1] * 50, "bare")
    sets = open_sets(manifest=one, ssl_manifest=bare)
    assert len(sets.ssl) == 50 and len(sets.train) == 24


def test_a_batch_larger_than_the_data_is_refused_for_each_stage_that_runs(tmp_path):
    one, few = save(tmp_path, [0, 1, 2] * 10), save(tmp_path, [-1] * 5, "few")
    assert "24 training clips are fewer than one batch of 25" in refusal(manifest=one, total_batch=25)
    assert "few.manifest: 5 training clips are fewer" in refusal(manifest=one, ssl_manifest=few, total_batch=6)
    open_sets(manifest=one, ssl_manifest=few, total_batch=6, stages=["distill"])
    assert "4 training clips are fewer" in refusal(manifest=one, max_train=4, total_batch=6)
    open_sets(manifest=one, max_train=4, total_batch=6, stages=["ssl"])


def test_unlabelled_clips_are_refused_on_both_sides(tmp_path):
    good, holes = save(tmp_path, [0, 1, 2] * 5), save(tmp_path, [0, 1, 2, -1], "holes")
    assert "holes.manifest: 1 training clips have no label" in refusal(manifest=holes, eval_manifest=good)
    assert "holes.manifest: 1 evaluation clips have no label" in refusal(manifest=good, eval_manifest=holes)
    open_sets(manifest=good, eval_manifest=holes, stages=["ssl"])


def test_other_refusals_name_the_manifest_and_say_what_to_do(tmp_path):
    good, other = save(tmp_path, [0, 1, 2] * 5), save(tmp_path, [0, 1] * 5, "other", classes=("x", "y"))
    one_class = save(tmp_path, [1] * 10, "one")
    assert "data.manifest is not set" in refusal()
    assert "classes" in refusal(manifest=good, eval_manifest=other)
    assert "one class" in refusal(manifest=one_class, eval_manifest=good)
    bare = save(tmp_path, [-1] * 10, "bare", classes=())
    assert "has no labels" in refusal(manifest=bare)
    assert str(tmp_path / "none") in refusal(manifest=str(tmp_path / "none"))
