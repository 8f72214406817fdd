"""The table of clips: what goes in comes out, on disk and through every selection."""

import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from fastsskd import manifest
from fastsskd.clip_columns import from_columns
from fastsskd.clip_table import PACKED
from fastsskd.errors import InputError, UsageError


def make(labels=(0, 1, 2, 0, 1, 2, -1), **columns):
    paths = [f"c{label}/clip{i}.wav" for i, label in enumerate(labels)]
    return from_columns(
        paths, root="/data", labels=np.array(labels), classes=columns.pop("classes", ("a", "b", "c")), **columns
    )


def make_multi(lists=((0, 2), (), (1,), (2, 1, 0))):
    offsets = np.concatenate([[0], np.cumsum([len(row) for row in lists])]).astype(np.int32)
    flat = np.array([label for row in lists for label in row], np.int16)
    labels = pa.ListArray.from_arrays(pa.array(offsets), pa.array(flat))
    paths = [f"{i}.flac" for i in range(len(lists))]
    return from_columns(paths, root="/data", labels=labels, classes=("a", "b", "c"), multi_label=True)


def one_line(error) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


def test_what_is_saved_is_loaded(tmp_path):
    original = make(folds=np.arange(7), splits=[0, 1, 2, 0, 1, 2, 0], starts=np.arange(7) / 2, ends=np.arange(7) + 1.0)
    original = original.replace(absent=["gone.wav"], num_absent=1, source="folder")
    manifest.save(original, tmp_path / "m.arrow")
    loaded = manifest.load(tmp_path / "m.arrow")
    assert (loaded.classes, loaded.multi_label, loaded.root) == (("a", "b", "c"), False, Path("/data"))
    assert (loaded.absent, loaded.num_absent, loaded.source) == (["gone.wav"], 1, "folder")
    assert len(loaded) == 7
    assert loaded.key(3) == "c0/clip3.wav"
    assert loaded.path(3) == Path("/data/c0/clip3.wav")
    assert loaded.segment(3) == (1.5, 4.0)
    assert loaded.labels(3).tolist() == [0] and loaded.labels(6).tolist() == []
    assert loaded.folds.tolist() == list(range(7))
    assert loaded.splits.tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert loaded.label_array().tolist() == [0, 1, 2, 0, 1, 2, -1]
    assert loaded.fingerprint() == original.fingerprint()


def test_saving_leaves_nothing_else_behind(tmp_path, monkeypatch):
    manifest.save(make(), tmp_path / "m.arrow")
    before = (tmp_path / "m.arrow").read_bytes()

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(InputError) as error:
        manifest.save(make(labels=(0, 1)), tmp_path / "m.arrow")
    assert "No space left" in one_line(error)
    assert [path.name for path in tmp_path.iterdir()] == ["m.arrow"]
    assert (tmp_path / "m.arrow").read_bytes() == before


def test_saving_into_a_missing_folder_is_one_line(tmp_path):
    with pytest.raises(InputError) as error:
        manifest.save(make(), tmp_path / "none" / "m.arrow")
    assert "m.arrow" in one_line(error)


def test_loading_maps_the_file_instead_of_reading_it(tmp_path):
    n = 200_000
    big = from_columns([f"folder/clip{i:07d}.wav" for i in range(n)], root="/data", labels=np.arange(n) % 10)
    manifest.save(big.replace(classes=[str(i) for i in range(10)]), tmp_path / "m.arrow")
    before = pa.total_allocated_bytes()
    loaded = manifest.load(tmp_path / "m.arrow")
    assert len(loaded) == n and loaded.key(n - 1) == f"folder/clip{n - 1:07d}.wav"
    assert loaded.folds.base is not None  # a view of the file, not an array of its own
    assert pa.total_allocated_bytes() - before < n  # less than a byte a clip


def test_selection_of_a_selection_matches_plain_lists():
    whole = make(labels=np.random.default_rng(0).integers(-1, 3, 200).tolist(), folds=np.arange(200))
    rows = np.arange(200)
    view = whole
    for which in (rows % 3 == 0, np.array([5, 1, 60, 7, 7]), np.array([True, False, True, True, True])):
        view, rows = view.select(which), rows[which]
    assert [view.key(i) for i in range(len(view))] == [whole.key(i) for i in rows]
    assert view.label_array().tolist() == whole.label_array()[rows].tolist()
    assert view.folds.tolist() == rows.tolist()
    assert view.class_counts().tolist() == [(whole.label_array()[rows] == c).sum() for c in range(3)]
    with pytest.raises(IndexError):
        view.select(np.array([len(view)]))
    with pytest.raises(IndexError):
        view.key(len(view))


def test_a_saved_selection_is_the_selection(tmp_path):
    view = make_multi().select(np.array([3, 1, 0]))
    manifest.save(view, tmp_path / "m.arrow")
    loaded = manifest.load(tmp_path / "m.arrow")
    assert [loaded.labels(i).tolist() for i in range(3)] == [[2, 1, 0], [], [0, 2]]
    assert loaded.multi_label and loaded.fingerprint() == view.fingerprint()


def test_multi_label_targets():
    clips = make_multi()
    assert clips.label_of(np.array([3, 1, 0])).tolist() == [[1, 1, 1], [0, 0, 0], [1, 0, 1]]
    assert clips.label_of(np.array([0])).dtype == np.float32
    assert clips.label_array().shape == (4, 3)
    assert clips.class_counts().tolist() == [2, 2, 2]
    assert clips.num_labels().tolist() == [2, 0, 1, 3]
    assert clips.first_labels().tolist() == [0, -1, 1, 2]
    assert clips.sum_over_labels(np.array([1.0, 10.0, 100.0])).tolist() == [101.0, 0.0, 10.0, 111.0]


def test_huge_dense_label_arrays_are_refused(monkeypatch):
    monkeypatch.setattr("fastsskd.clip_table.MAX_DENSE_LABELS", 11)
    with pytest.raises(ValueError, match="label_of"):
        make_multi().label_array()


def test_fingerprint_sees_order_and_names_but_not_the_root():
    clips = make()
    assert clips.fingerprint() == make().replace(root=Path("/elsewhere")).fingerprint()
    assert clips.fingerprint() != clips.select(np.array([1, 0, 2, 3, 4, 5, 6])).fingerprint()
    assert clips.fingerprint() != clips.select(np.arange(6)).fingerprint()
    joined = [from_columns(names, root="/") for names in (["ab", "c"], ["a", "bc"])]
    assert joined[0].fingerprint() != joined[1].fingerprint()


def test_with_classes_matches_by_name():
    renumbered = make().with_classes(("c", "x", "b", "a"))
    assert renumbered.label_array().tolist() == [3, 2, 0, 3, 2, 0, -1]
    assert renumbered.class_counts().tolist() == [2, 0, 2, 2]
    with pytest.raises(InputError) as error:
        make().with_classes(("a", "b"))
    assert "'c'" in one_line(error)
    # A class that no clip carries may be missing.
    assert make(labels=(0, 1)).with_classes(("b", "a")).label_array().tolist() == [1, 0]


def test_equal_keys_are_refused():
    with pytest.raises(InputError) as error:
        from_columns(["a.wav", "b.wav", "a.wav"], root="/data")
    assert "'a.wav'" in one_line(error)


def test_mark_bad_survives_and_is_left_out_of_both_sides(tmp_path):
    path = tmp_path / "m.arrow"
    manifest.save(make(labels=[0, 1] * 10, classes=("a", "b")), path)
    manifest.mark_bad(path, {"c0/clip2.wav": "truncated", "c1/clip5.wav": "empty"})
    manifest.mark_bad(path, {"c0/clip0.wav": "NaN", "c1/clip5.wav": ""})
    marked = manifest.load(path)
    assert {marked.key(i): marked.bad(i) for i in np.flatnonzero(~marked.good)} == {
        "c0/clip2.wav": "truncated",
        "c0/clip0.wav": "NaN",
    }
    train, evaluation = manifest.split(marked)
    keys = {side.key(i) for side in (train, evaluation) for i in range(len(side))}
    assert len(keys) == len(train) + len(evaluation) == 18
    assert not keys & {"c0/clip2.wav", "c0/clip0.wav"}
    assert train.left_out == evaluation.left_out == 2
    with pytest.raises(InputError) as error:
        manifest.mark_bad(path, {"nobody.wav": "x"})
    assert "nobody.wav" in one_line(error)


def test_keep_existing_names_what_is_gone(tmp_path):
    (tmp_path / "c0").mkdir()
    (tmp_path / "c0" / "clip0.wav").touch()
    clips = make(labels=(0, 1, 0)).replace(root=tmp_path)
    kept = manifest.keep_existing(clips)
    assert [kept.key(0)] == ["c0/clip0.wav"] and len(kept) == 1
    assert kept.absent == ["c1/clip1.wav", "c0/clip2.wav"] and kept.num_absent == 2
    (tmp_path / "c0" / "clip0.wav").unlink()
    with pytest.raises(InputError):
        manifest.keep_existing(clips)


# ------------------------------------------------------------------------------------------------------------- split


def test_named_folds_win_over_everything():
    clips = make(labels=[0, 1] * 6, classes=("a", "b"), folds=np.repeat([1, 2, 3], 4), splits=[1, 1, 2, 2] * 3)
    train, evaluation = manifest.split(clips, train_folds=(3,), eval_folds=(1,))
    assert set(train.folds) == {3} and set(evaluation.folds) == {1}
    train, evaluation = manifest.split(clips, eval_folds=(2,))
    assert set(train.folds) == {1, 3} and set(evaluation.folds) == {2}
    train, evaluation = manifest.split(clips, train_folds=(2,))
    assert set(train.folds) == {2} and set(evaluation.folds) == {1, 3}
    with pytest.raises(UsageError):
        manifest.split(clips, train_folds=(1,), eval_folds=(1,))
    with pytest.raises(InputError) as error:
        manifest.split(clips, eval_folds=(9,))
    assert "1, 2, 3" in one_line(error)


def test_marked_splits_win_over_folds_and_folds_over_chance():
    marks = [1, 1, 1, 2, 2, 0]
    clips = make(labels=[0, 1] * 3, classes=("a", "b"), folds=[1, 2, 3, 1, 2, 3], splits=marks)
    train, evaluation = manifest.split(clips)
    assert set(train.splits) == {1} and set(evaluation.splits) == {2} and len(train) + len(evaluation) == 5
    train, evaluation = manifest.split(make(labels=[0, 1] * 3, classes=("a", "b"), folds=[1, 1, 2, 2, 4, 4]))
    assert set(train.folds) == {1, 2} and set(evaluation.folds) == {4}
    # Only training marks (AudioSet's training list alone) decide nothing.
    train, evaluation = manifest.split(make(labels=[0, 1] * 5, classes=("a", "b"), splits=[1] * 10))
    assert len(evaluation) == 2


def test_random_share_is_stratified_seeded_and_complete():
    labels = [0] * 50 + [1] * 10 + [2] * 2 + [-1] * 8
    clips = make(labels=labels)
    train, evaluation = manifest.split(clips, eval_share=0.3, seed=1)
    assert evaluation.class_counts().tolist() == [15, 3, 1]
    assert (evaluation.label_array() >= 0).all()  # an unlabelled clip cannot be scored
    keys = [side.key(i) for side in (train, evaluation) for i in range(len(side))]
    assert sorted(keys) == sorted(clips.key(i) for i in range(70))
    again, other = manifest.split(clips, eval_share=0.3, seed=1)[1], manifest.split(clips, eval_share=0.3, seed=2)[1]
    assert again.fingerprint() == evaluation.fingerprint() != other.fingerprint()


def test_unlabelled_and_multi_label_sets_split_too():
    clips = from_columns([f"{i}.wav" for i in range(2000)], root="/data")
    train, evaluation = manifest.split(clips)
    assert (len(train), len(evaluation)) == (1600, 400)
    train, evaluation = manifest.split(make_multi([(0, 1), (1,), (2,), (0,), (1, 2), (2, 0)] * 10))
    assert (len(train), len(evaluation)) == (48, 12)


@pytest.mark.parametrize(
    ("clips", "says"),
    [
        (make(labels=[0, 0, 0], classes=("a",)), "one class"),
        (make(labels=[1, 1, 1]), "one class"),
        (make(labels=[-1, -1]), "no labelled clip"),
        (make(labels=[0, 1], classes=("a", "b")).select(np.zeros(2, bool)), "nothing to train on"),
        (make(labels=[0, 1], classes=("a", "b")), "evaluation"),
        (from_columns(["a.wav"], root="/data"), "evaluation"),
        (make(labels=[0, 1, 1], classes=("a", "b"), folds=[1, 2, 2]), "one class"),
    ],
)
def test_too_little_to_split_is_one_line(clips, says):
    with pytest.raises(InputError) as error:
        manifest.split(clips)
    assert says in one_line(error)


def test_all_bad_says_so(tmp_path):
    manifest.save(make(labels=[0, 1], classes=("a", "b")), tmp_path / "m")
    manifest.mark_bad(tmp_path / "m", {"c0/clip0.wav": "x", "c1/clip1.wav": "x"})
    with pytest.raises(InputError) as error:
        manifest.split(manifest.load(tmp_path / "m"))
    assert "all 2 clips are marked bad" in one_line(error)


@pytest.mark.parametrize("share", [0.0, 1.0, -1, 2, float("nan")])
def test_share_out_of_range(share):
    with pytest.raises(UsageError):
        manifest.split(make(), eval_share=share)


# --------------------------------------------------------------------------------------------------------------- CSV


def write_csv(folder: Path, text: str, files=("a.wav", "d/b.wav", "c.wav")) -> Path:
    for name in files:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).touch()
    (folder / "list.csv").write_text(text)
    return folder / "list.csv"


def test_csv_written_by_hand(tmp_path):
    path = write_csv(
        tmp_path,
        "path, label,fold,split,start,end\n".replace(" ", "")
        + "a.wav,dog; car,1,train,0.5,2\nd/b.wav,,2,test,,\nc.wav,dog,,,1,\nnone.wav,cat,1,,,\n",
    )
    clips = manifest.load(path)
    assert clips.classes == ("car", "cat", "dog") and clips.multi_label
    assert [clips.labels(i).tolist() for i in range(3)] == [[2, 0], [], [2]]
    assert clips.folds.tolist() == [1, 2, 0] and clips.splits.tolist() == [1, 2, 0]
    assert [clips.segment(i) for i in range(3)] == [(0.5, 2.0), (0.0, -1.0), (1.0, -1.0)]
    assert clips.path(1) == tmp_path / "d" / "b.wav"
    assert clips.absent == ["none.wav"]


def test_csv_with_paths_alone_and_absolute_paths(tmp_path):
    clips = manifest.load(write_csv(tmp_path, f"path\na.wav\n{tmp_path}/c.wav\n"))
    assert clips.classes == () and clips.path(1) == tmp_path / "c.wav" and clips.label_array().tolist() == [-1, -1]


def test_numeric_class_names_count_as_numbers(tmp_path):
    clips = manifest.load(write_csv(tmp_path, "path,label\na.wav,10\nd/b.wav,9\nc.wav,100\n"))
    assert clips.classes == ("9", "10", "100") and not clips.multi_label


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("file,label\na.wav,dog\n", "`path`"),
        ("path,lable\na.wav,dog\n", "did you mean 'label'"),
        ("path,fold\na.wav,one\n", "row 2"),
        ("path,fold\na.wav,1\nc.wav,99999\n", "row 3"),
        ("path,split\na.wav,dev\n", "'dev'"),
        ("path\na.wav\na.wav\n", "unique"),
        ("path,label\n,dog\n", "row 2"),
        ("path,label\na.wav\n", "CSV"),
        ("path\nx.wav\ny.wav\n", "none of the 2 files"),
        ("path\n", "lists no clip"),
        ("", "CSV"),
    ],
)
def test_bad_csv_is_one_line(tmp_path, text, says):
    with pytest.raises(InputError) as error:
        manifest.load(write_csv(tmp_path, text))
    assert says in one_line(error) and str(tmp_path) in str(error.value)


def test_csv_cannot_be_marked(tmp_path):
    with pytest.raises(InputError, match="index"):
        manifest.mark_bad(write_csv(tmp_path, "path\na.wav\n"), {"a.wav": "x"})


# ------------------------------------------------------------------------------------------------------- other input


def test_not_a_manifest_is_one_line(tmp_path):
    good = tmp_path / "m.arrow"
    manifest.save(make(), good)
    (tmp_path / "cut.arrow").write_bytes(good.read_bytes()[:-100])
    (tmp_path / "noise.arrow").write_bytes(b"ARROW1\0\0" + bytes(range(256)))
    (tmp_path / "text.arrow").write_text("hello")
    with pa.OSFile(str(tmp_path / "other.arrow"), "wb") as sink, pa.ipc.new_file(sink, pa.schema([("x", pa.int8())])):
        pass
    manifest.save(make().select(np.zeros(7, bool)), tmp_path / "empty.arrow")
    for name in ("cut", "noise", "text", "other", "empty", "missing"):
        with pytest.raises(InputError) as error:
            manifest.load(tmp_path / f"{name}.arrow")
        assert name in one_line(error)
    with pytest.raises(InputError, match="folder"):
        manifest.load(tmp_path)


def test_a_packed_folder_moves_with_its_manifest_and_a_copy_elsewhere_still_finds_it(tmp_path):
    (tmp_path / "packed").mkdir()
    clips = from_columns(["s.tar"], root=tmp_path / "packed", offsets=[512], sizes=[100], source=PACKED)
    manifest.save(clips, tmp_path / "packed/packed.manifest")
    manifest.save(manifest.load(tmp_path / "packed/packed.manifest"), tmp_path / "copy.manifest")
    assert manifest.load(tmp_path / "copy.manifest").path(0) == tmp_path / "packed/s.tar"
    (tmp_path / "packed").rename(tmp_path / "moved")
    moved = manifest.load(tmp_path / "moved/packed.manifest")
    assert moved.path(0) == tmp_path / "moved/s.tar" and moved.extent(0) == (512, 100)
