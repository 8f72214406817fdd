"""`fastsskd predict` as a user runs it: answers first, in every form; bad files named; events with times."""

import csv
import io
import json

import numpy as np
import pytest
from small_checkpoint import CLASSES, save_checkpoint, save_sound

from fastsskd import cli
from fastsskd.audio.info import BadClip
from fastsskd.commands import listening
from fastsskd.inference.listen import Heard
from fastsskd.inference.predict import Choice, predict
from fastsskd.inference.sources import Samples


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    save_sound(folder / "a.wav", 0.9)
    save_sound(folder / "b.ogg", 0.5, 44100, seed=1)
    save_sound(folder / "long.flac", 3.0, seed=2)
    (folder / "bad.wav").write_bytes(b"RIFF")
    return folder


def run(capsys, *arguments):
    """Exit code, stdout, stderr."""
    code = cli.main(["predict", *map(str, arguments)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def windows(scores, source, length=1.0, hop=1.0):
    found = [Heard(source, i * hop, i * hop + length, np.array(row, np.float32)) for i, row in enumerate(scores)]
    return [*found, Heard(source, 0.0, found[-1].end, None)]


SOURCE = Samples("x", np.zeros(1), 16000)


def events_of(scores, threshold=0.5, **shape):
    ((_, found),) = predict(windows(scores, SOURCE, **shape), Choice(("a", "b"), 2, threshold))
    return [(e.name, e.start, e.end, round(e.score, 3)) for e in found.events]


def test_neighbouring_windows_above_the_threshold_are_one_event():
    scores = [(0.9, 0), (0.6, 0), (0.1, 0.5), (0.7, 0.8), (0.2, 0.49)]
    assert events_of(scores) == [("a", 0, 2, 0.9), ("b", 2, 4, 0.8), ("a", 3, 4, 0.7)]


def test_overlapping_windows_merge_and_windows_with_a_gap_do_not():
    scores = [(0.9, 0), (0.1, 0), (0.6, 0)]
    assert events_of(scores, length=1.0, hop=0.5) == [("a", 0, 2, 0.9)]
    assert events_of(scores, length=1.0, hop=0.6) == [("a", 0, 1, 0.9), ("a", 1.2, 2.2, 0.6)]
    assert events_of([(0.9, 0), (0.9, 0)], length=1.0, hop=1.5) == [("a", 0, 1, 0.9), ("a", 1.5, 2.5, 0.9)]


def test_the_score_of_a_recording_is_the_mean_of_its_windows():
    ((_, found),) = predict(windows([(0.2, 0.8), (0.6, 0.4), (0.4, 0.6)], SOURCE), Choice(("a", "b"), 1))
    np.testing.assert_allclose(found.probs, [0.4, 0.6], atol=1e-7)
    assert [name for name, _ in found] == ["b"] and found.events == []
    assert [(w.start, w.end, w.top[0][0]) for w in found.windows] == [(0, 1, "b"), (1, 2, "a"), (2, 3, "b")]


def test_a_recording_that_breaks_off_leaves_nothing_to_the_next():
    broken = [*windows([(1.0, 0.0)], SOURCE)[:-1], Heard(SOURCE, 0, 1, BadClip("damaged"))]
    answers = [*broken, *windows([(0.0, 1.0)], SOURCE)]
    (_, first), (_, second) = predict(answers, Choice(("a", "b"), 2, 0.5))
    assert str(first) == "damaged" and second.top == [("b", 1.0)] and second.windows == []
    assert [event.name for event in second.events] == ["b"]


def test_equal_scores_keep_the_order_of_the_classes():
    choice = Choice(("a", "b", "c"), 2)
    assert choice.best(np.array([0.2, 0.4, 0.4], np.float32)) == [("b", pytest.approx(0.4)), ("c", pytest.approx(0.4))]
    assert Choice(("a", "b", "c"), 9, 0.4).best(np.array([0.2, 0.5, 0.3])) == [("b", 0.5)]


def test_bad_files_are_named_and_the_others_are_answered(capsys, checkpoint, clips):
    names = [clips / "bad.wav", clips / "a.wav", clips / "none.wav", clips / "b.ogg"]
    code, out, err = run(capsys, "--checkpoint", checkpoint, *names)
    assert code == 1
    assert [line.split("\t")[0] for line in out.splitlines()] == [str(names[1]), str(names[3])]
    for name, reason in ((names[0], "header is cut short"), (names[2], "No such file")):
        (line,) = [line for line in err.splitlines() if line.startswith(f"{name}: ")]
        assert reason in line
    assert "2 files" in err and "x real time" in err and "2 could not be used" in err


@pytest.mark.parametrize("form", ["text", "json", "csv"])
def test_every_form_says_the_same(capsys, checkpoint, clips, form):
    flags = [] if form == "text" else [f"--{form}"]
    code, out, _ = run(capsys, "--checkpoint", checkpoint, clips / "a.wav", clips / "b.ogg", "--top_k", 3, *flags)
    assert code == 0
    if form == "json":
        found = {file["path"]: [(c["class"], c["score"]) for c in file["top"]] for file in json.loads(out)}
    elif form == "csv":
        found = {}
        for row in csv.DictReader(io.StringIO(out)):
            found.setdefault(row["path"], []).append((row["class"], float(row["score"])))
            assert row["start"] == "0.000" and row["end"] == ("0.900" if "a.wav" in row["path"] else "0.500")
    else:
        lines = [line.split("\t") for line in out.splitlines()]
        found = {name: [(c.split()[0], float(c.split()[1])) for c in classes] for name, *classes in lines}
    import fastsskd

    model = fastsskd.load(checkpoint, device="cpu")
    for name in (clips / "a.wav", clips / "b.ogg"):
        expected = list(model.classify(name, top_k=3))
        assert [c for c, _ in found[str(name)]] == [c for c, _ in expected]
        np.testing.assert_allclose([s for _, s in found[str(name)]], [s for _, s in expected], atol=6e-4)


def test_a_long_recording_is_heard_whole_when_asked_for(capsys, checkpoint, clips):
    long = clips / "long.flac"
    code, out, err = run(capsys, "--checkpoint", checkpoint, long, "--json")
    (start,) = json.loads(out)
    assert code == 0 and start["seconds"] == 0.96 and "windows" not in start
    assert "longer than a window: 1" in err and "--hop" in err
    code, out, err = run(capsys, "--checkpoint", checkpoint, long, "--json", "--hop", 0.5, "--top_k", 4)
    (whole,) = json.loads(out)
    spans = [(w["start"], w["end"]) for w in whole["windows"]]
    assert whole["seconds"] == 2.96 and spans == [(0, 0.96), (0.5, 1.46), (1, 1.96), (1.5, 2.46), (2, 2.96)]
    first, alone = ({c["class"]: c["score"] for c in top} for top in (whole["windows"][0]["top"], start["top"]))
    assert first == pytest.approx(alone, abs=1e-6)
    scores = [{c["class"]: c["score"] for c in w["top"]} for w in whole["windows"]]
    for item in whole["top"]:
        assert item["score"] == pytest.approx(np.mean([s[item["class"]] for s in scores]), abs=1e-6)
    assert "longer than" not in err


def test_a_threshold_gives_events_with_times(capsys, checkpoint, clips):
    code, out, _ = run(capsys, "--checkpoint", checkpoint, clips / "long.flac", "--threshold", 0.0, "--json")
    (found,) = json.loads(out)
    assert code == 0 and {(e["class"], e["start"], e["end"]) for e in found["events"]} == {(c, 0, 3.0) for c in CLASSES}
    _, out, _ = run(capsys, "--checkpoint", checkpoint, clips / "long.flac", "--threshold", 0.0, "--csv")
    assert len(out.splitlines()) == 1 + len(CLASSES)
    _, out, _ = run(capsys, "--checkpoint", checkpoint, clips / "long.flac", "--threshold", 1.0)
    assert out == f"{clips / 'long.flac'}\t-\n"


def test_checkpoints_and_files_after_one_option_are_told_apart(capsys, checkpoint, clips, tmp_path):
    other = save_checkpoint(tmp_path / "other", seed=5)
    arguments = ["--checkpoint", checkpoint, other / "model.safetensors", clips / "a.wav"]
    _, out, _ = run(capsys, *arguments, "--json", "--top_k", 4)
    (both,) = json.loads(out)
    each = []
    for one in (checkpoint, other):
        _, out, _ = run(capsys, clips / "a.wav", "--checkpoint", one, "--json", "--top_k", 4)
        each.append({c["class"]: c["score"] for c in json.loads(out)[0]["top"]})
    for item in both["top"]:
        assert item["score"] == pytest.approx((each[0][item["class"]] + each[1][item["class"]]) / 2, abs=1e-6)


def test_json_is_whole_even_if_nothing_could_be_used(capsys, checkpoint, clips):
    code, out, _ = run(capsys, "--checkpoint", checkpoint, clips / "bad.wav", "--json")
    assert code == 1 and json.loads(out) == []


def test_quiet_leaves_what_matters(capsys, checkpoint, clips):
    code, out, err = run(capsys, "--checkpoint", checkpoint, clips, "--quiet")
    assert code == 1 and len(out.splitlines()) == 3
    assert [line for line in err.splitlines() if "bad.wav" not in line] == []


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--checkpoint", "none", "a.wav"], 1, "no such file"),
        (["--checkpoint", "{model}"], 2, "give both a checkpoint and what to hear"),
        (["--checkpoint", "{model}", "a.wav", "--json", "--csv"], 2, "choose one"),
        (["--checkpoint", "{model}", "a.wav", "--window", "99"], 2, "window 99: choose 0.025 to 0.96 s"),
        (["--checkpoint", "{model}", "a.wav", "--device", "tpu"], 2, "--device tpu"),
        (["--checkpoint", "{ssl}", "a.wav"], 1, "predicts nothing"),
    ],
)
def test_wrong_use_is_one_line(capsys, checkpoint, tmp_path, arguments, code, words):
    ssl = save_checkpoint(tmp_path / "ssl", classes=())
    filled = [argument.format(model=checkpoint, ssl=ssl) for argument in arguments]
    found, out, err = run(capsys, *filled)
    assert found == code and out == "" and len(err.splitlines()) == 1 and words in err


@pytest.mark.parametrize("most", [2, 3, 4])
def test_recordings_that_are_not_counted_are_heard_all_the_same(capsys, monkeypatch, checkpoint, clips, most):
    monkeypatch.setattr(listening, "MOST_COUNTED", most)
    names = [clips / "a.wav", clips / "b.ogg", clips / "long.flac"]
    code, out, _ = run(capsys, "--checkpoint", checkpoint, *names)
    assert code == 0 and [line.split("\t")[0] for line in out.splitlines()] == [str(name) for name in names]
