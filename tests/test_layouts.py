"""Every layout of data set that users have becomes the same kind of manifest."""

import json
import os
from pathlib import Path

import pytest

from fastsskd import manifest
from fastsskd.errors import InputError
from fastsskd.layouts import index as layouts

ESC10 = Path(__file__).parents[2] / "shared/data/esc10"


def touch(folder: Path, *names: str) -> Path:
    """Empty files: reading a layout looks at names only."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


def rows(clips) -> dict[str, list[str]]:
    """key -> class names."""
    return {clips.key(i): [clips.classes[label] for label in clips.labels(i)] for i in range(len(clips))}


# ------------------------------------------------------------------------------------------------------------ folders


def test_class_folders_at_any_depth(tmp_path):
    touch(tmp_path, "dog/1.wav", "dog/home/x/2.FLAC", "cat/3.ogg", "cat/notes.txt", ".git/4.wav", "cat/.5.wav", "6.mp3")
    clips = layouts.build(tmp_path)
    assert clips.classes == ("cat", "dog")
    assert rows(clips) == {"6.mp3": [], "cat/3.ogg": ["cat"], "dog/1.wav": ["dog"], "dog/home/x/2.FLAC": ["dog"]}
    assert clips.path(3) == tmp_path / "dog/home/x/2.FLAC" and clips.source == "folder"
    assert not clips.multi_label and clips.splits.tolist() == [0, 0, 0, 0]


def test_clips_alone_are_unlabelled(tmp_path):
    clips = layouts.build(touch(tmp_path, "b.wav", "a.wav"))
    assert clips.classes == () and rows(clips) == {"a.wav": [], "b.wav": []}


def test_folders_named_like_splits_are_splits_not_classes(tmp_path):
    clips = layouts.build(touch(tmp_path, "train/dog/1.wav", "train/cat/2.wav", "Test/dog/3.wav"))
    assert clips.classes == ("cat", "dog")
    assert dict(zip([clips.key(i) for i in range(3)], clips.splits.tolist(), strict=True)) == {
        "Test/dog/3.wav": 2,
        "train/cat/2.wav": 1,
        "train/dog/1.wav": 1,
    }


def test_a_class_called_train_among_others_is_a_class(tmp_path):
    assert layouts.build(touch(tmp_path, "train/1.wav", "tram/2.wav")).classes == ("train", "tram")


def test_links_to_folders_are_followed_but_not_in_circles(tmp_path):
    touch(tmp_path / "real", "1.wav")
    (tmp_path / "set" / "dog").mkdir(parents=True)
    os.symlink(tmp_path / "real", tmp_path / "set" / "dog" / "more")
    os.symlink(tmp_path / "set", tmp_path / "set" / "dog" / "loop")
    assert rows(layouts.build(tmp_path / "set")) == {"dog/more/1.wav": ["dog"]}


def test_odd_names(tmp_path):
    names = ["dög/a b.wav", "dög/c;d,e.wav", 'dög/"q".wav', "c/x.y.wav"]
    clips = layouts.build(touch(tmp_path, *names))
    assert sorted(rows(clips)) == sorted(names)
    assert all(clips.path(i).exists() for i in range(4))


def test_classes_survive_saving(tmp_path):
    clips = layouts.build(touch(tmp_path / "set", "dog/1.wav", "cat/2.wav"))
    manifest.save(clips, tmp_path / "m")
    assert rows(manifest.load(tmp_path / "m")) == rows(clips)


# ---------------------------------------------------------------------------------------------------------------- ESC


def esc(folder: Path) -> Path:
    touch(folder, "audio/1-a-A-38.ogg", "audio/2-b-A-10.flac", "audio/3-c-B-38.wav")
    (folder / "meta").mkdir()
    (folder / "meta/esc50.csv").write_text(
        "filename,fold,target,category,esc10,src_file,take\n"
        "1-a-A-38.wav,1,38,clock_tick,True,a,A\n2-b-A-10.wav,2,10,rain,True,b,A\n"
        "3-c-B-38.wav,3,38,clock_tick,True,c,B\n4-d-A-0.wav,4,0,dog,True,d,A\n"
    )
    return folder


@pytest.mark.parametrize("below", ["", "meta/esc50.csv"])
def test_esc_matches_by_stem_and_keeps_folds(tmp_path, below):
    clips = layouts.build(esc(tmp_path) / below)
    # Only classes present, in ESC's order (10 before 38), dog is absent.
    assert clips.classes == ("rain", "clock_tick")
    assert rows(clips) == {"1-a-A-38": ["clock_tick"], "2-b-A-10": ["rain"], "3-c-B-38": ["clock_tick"]}
    assert clips.folds.tolist() == [1, 2, 3]
    assert clips.path(1) == tmp_path / "audio/2-b-A-10.flac"
    assert clips.absent == ["4-d-A-0.wav"] and clips.num_absent == 1


def test_esc_without_its_audio_or_with_a_damaged_list(tmp_path):
    folder = esc(tmp_path)
    for clip in (folder / "audio").iterdir():
        clip.unlink()
    with pytest.raises(InputError, match="none of its 4 clips"):
        layouts.build(folder)
    (folder / "meta/esc50.csv").write_text("filename,fold,target,category\na.wav,x,y,z\n")
    with pytest.raises(InputError, match="damaged"):
        layouts.build(folder)


@pytest.mark.skipif(not ESC10.exists(), reason="ESC-10 is not here")
def test_real_esc10():
    clips = layouts.build(ESC10)
    assert len(clips) == 320 and clips.class_counts().tolist() == [32] * 10
    assert clips.classes[:3] == ("dog", "rooster", "rain")
    assert all(clips.path(i).exists() for i in range(320))
    train, evaluation = manifest.split(clips, train_folds=(1, 2, 3), eval_folds=(4,))
    assert (len(train), len(evaluation)) == (240, 80)


# ----------------------------------------------------------------------------------------------------------- AudioSet

CLASS_LIST = 'index,mid,display_name\n1,/m/b,"Bell, small"\n0,/m/a,Speech\n2,/t/c,Cat\n'
EVAL_LIST = """# Segments csv created Sun Mar  5 10:54:31 2017
# num_ytids=3, num_segs=3, num_unique_labels=3, num_positive_labels=4
# YTID, start_seconds, end_seconds, positive_labels
--4gqARaEJE, 0.000, 10.000, "/m/a,/t/c"
-0xzrMun0Rs, 30.000, 40.000, "/m/b"
zzzzzzzzzzz, 30.000, 40.000, "/m/b"
"""


def audioset(folder: Path) -> Path:
    touch(folder, "audio/eval/--4gqARaEJE.flac", "audio/eval/Y-0xzrMun0Rs.wav", "audio/train/YYYYYYYYYYY.m4a")
    (folder / "class_labels_indices.csv").write_text(CLASS_LIST)
    (folder / "eval_segments.csv").write_text(EVAL_LIST)
    return folder


def test_audioset_list_and_folder(tmp_path):
    audioset(tmp_path)
    clips = layouts.build(tmp_path / "eval_segments.csv")
    assert clips.classes == ("Speech", "Bell, small", "Cat") and clips.multi_label
    assert rows(clips) == {"--4gqARaEJE": ["Speech", "Cat"], "-0xzrMun0Rs": ["Bell, small"]}
    assert clips.path(1) == tmp_path / "audio/eval/Y-0xzrMun0Rs.wav"
    # The files are the cut clips: the list's times do not apply to them.
    assert clips.segment(1) == (0.0, -1.0)
    assert clips.absent == ["zzzzzzzzzzz"]
    (tmp_path / "balanced_train_segments.csv").write_text('# YTID\nYYYYYYYYYYY, 0.000, 10.000, "/m/b"\n')
    both = layouts.build(tmp_path)
    assert dict(zip(rows(both), both.splits.tolist(), strict=True)) == {
        "YYYYYYYYYYY": 1,
        "--4gqARaEJE": 2,
        "-0xzrMun0Rs": 2,
    }


def test_audioset_lists_beside_the_audio_folder(tmp_path):
    audioset(tmp_path)
    (tmp_path / "csv").mkdir()
    for path in tmp_path.glob("*.csv"):
        path.rename(tmp_path / "csv" / path.name)
    assert len(layouts.build(tmp_path / "csv/eval_segments.csv")) == len(layouts.build(tmp_path)) == 2


def test_audioset_without_class_names_uses_the_ids(tmp_path):
    audioset(tmp_path)
    (tmp_path / "class_labels_indices.csv").unlink()
    assert layouts.build(tmp_path).classes == ("/m/a", "/m/b", "/t/c")


def test_audioset_problems_are_one_line(tmp_path):
    audioset(tmp_path)
    (tmp_path / "class_labels_indices.csv").write_text("index,mid,display_name\n0,/m/a,Speech\n")
    with pytest.raises(InputError, match=r"'/t/c'|'/m/b'"):
        layouts.build(tmp_path)
    (tmp_path / "eval_segments.csv").write_text("# YTID\nabc;0;10\n")
    with pytest.raises(InputError, match="'abc;0;10'"):
        layouts.build(tmp_path)
    (tmp_path / "eval_segments.csv").write_text('# YTID\nnone, 0.0, 10.0, "/m/a"\n')
    with pytest.raises(InputError, match="none of its 1 clips"):
        layouts.build(tmp_path)


# --------------------------------------------------------------------------------------------- VGGSound and AST's JSON


@pytest.mark.parametrize("below", ["", "vggsound.csv"])
def test_vggsound(tmp_path, below):
    touch(tmp_path, "video/---g-f_I2yQ_000001.wav", "video/--0PQM4-hqg.flac")
    (tmp_path / "vggsound.csv").write_text(
        '---g-f_I2yQ,1,"people marching, ""loud""",test\n--0PQM4-hqg,30,waterfall burbling,train\ngone,5,"a, b",train\n'
    )
    clips = layouts.build(tmp_path / below)
    assert rows(clips) == {
        "---g-f_I2yQ_000001": ['people marching, "loud"'],
        "--0PQM4-hqg_000030": ["waterfall burbling"],
    }
    assert clips.splits.tolist() == [2, 1] and clips.absent == ["gone_000005"]


def test_ast_json(tmp_path):
    touch(tmp_path, "a.flac", "x/b.flac")
    entries = [
        {"wav": str(tmp_path / "a.flac"), "labels": "/m/b"},
        {"wav": "x/b.flac", "labels": "/m/a,/t/c"},
        {"wav": "/nowhere/c.flac", "labels": "/m/a"},
    ]
    (tmp_path / "train.json").write_text(json.dumps({"data": entries}))
    (tmp_path / "class_labels_indices.csv").write_text(CLASS_LIST)
    clips = layouts.build(tmp_path / "train.json")
    assert list(rows(clips).values()) == [["Bell, small"], ["Speech", "Cat"]] and clips.multi_label
    assert clips.path(0) == tmp_path / "a.flac" and clips.path(1) == tmp_path / "x/b.flac"
    assert clips.absent == ["/nowhere/c.flac"]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"data": 3}', '{"data": [{"path": "a"}]}', '{"data": []}'])
def test_bad_json_is_one_line(tmp_path, text):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(InputError, match=r"x\.json") as error:
        layouts.build(tmp_path / "x.json")
    assert "\n" not in str(error.value)


# ------------------------------------------------------------------------------------------------------ other sources


def test_written_csv_and_saved_manifest_are_layouts_too(tmp_path):
    touch(tmp_path, "a.wav")
    (tmp_path / "l.csv").write_text("path,label\na.wav,dog\n")
    clips = layouts.build(tmp_path / "l.csv")
    assert rows(clips) == {"a.wav": ["dog"]}
    manifest.save(clips, tmp_path / "m.arrow")
    assert rows(layouts.build(tmp_path / "m.arrow")) == {"a.wav": ["dog"]}


def test_nothing_usable_is_one_line(tmp_path):
    cases = {"missing": "no such file", "empty": "it is empty", "texts": ".txt", "shards": "tar", "x.bin": "neither"}
    (tmp_path / "empty").mkdir()
    touch(tmp_path, "texts/a.txt", "shards/0000.tar", "x.bin")
    for name, says in cases.items():
        with pytest.raises(InputError) as error:
            layouts.build(tmp_path / name)
        assert says in str(error.value) and name in str(error.value) and "\n" not in str(error.value)


# ------------------------------------------------------------------------------------------------------------ weights


def test_ast_weights_beside_the_list_follow_the_clips_that_are_there(tmp_path):
    touch(tmp_path, "a.wav", "c.wav")
    data = [{"wav": f"{name}.wav", "labels": "/m/a"} for name in "abc"]
    (tmp_path / "train.json").write_text(json.dumps({"data": data}))
    assert layouts.build(tmp_path / "train.json").weights.tolist() == [1.0, 1.0]
    (tmp_path / "train_weight.csv").write_text("0.5\n7\n2.5\n")
    clips = layouts.build(tmp_path / "train.json")
    assert clips.weights.tolist() == [0.5, 2.5] and clips.num_absent == 1
    assert clips.select([1]).weights.tolist() == [2.5]
    for text, message in (("1\n2\n", "2 weights for the 3 clips"), ("x\n", "one number a line")):
        (tmp_path / "train_weight.csv").write_text(text)
        with pytest.raises(InputError, match=message):
            layouts.build(tmp_path / "train.json")


def test_weights_of_a_csv_are_kept(tmp_path):
    touch(tmp_path, "a.wav", "b.wav")
    (tmp_path / "clips.csv").write_text("path,weight\na.wav,0.25\nb.wav,\n")
    manifest.save(layouts.build(tmp_path / "clips.csv"), tmp_path / "m")
    assert manifest.load(tmp_path / "m").weights.tolist() == [0.25, 1.0]
