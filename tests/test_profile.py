"""`fastsskd profile` on real runs: planted bottlenecks are named, ranks told apart, and nothing is left behind."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import soundfile
from test_cli import fails
from training import arguments

from fastsskd import cli, manifest
from fastsskd.layouts import index as layouts

SECONDS = "3"


@pytest.fixture(scope="session")
def short(tmp_path_factory):
    """Arguments of a small job: batches of 8 clips of 0.96 s, one loader thread."""

    def make(clips, **fields) -> list[str]:
        out = tmp_path_factory.mktemp("profile") / "run"
        return [*arguments(out, clips, **fields), "--seconds", SECONDS]

    return make


@pytest.fixture(scope="session")
def profiled(training, tmp_path_factory):
    """A function that profiles with something planted; returns what was printed as JSON."""

    def run(given, plant="nothing", ranks=1) -> dict:
        file = tmp_path_factory.mktemp("profiled") / "found.json"
        training.call("profile_ranks.profile", file, plant, *given, ranks=ranks)
        return json.loads(file.read_text())

    return run


@pytest.fixture(scope="session")
def encoded(tmp_path_factory):
    """Manifest of 32 clips of 1 s in Ogg Vorbis at 44.1 kHz, in two classes."""
    folder, random = tmp_path_factory.mktemp("ogg"), np.random.default_rng(0)
    for number in range(32):
        path = folder / ("one", "two")[number % 2] / f"{number}.ogg"
        path.parent.mkdir(exist_ok=True)
        soundfile.write(path, 0.1 * random.standard_normal(44100), 44100)
    table = tmp_path_factory.mktemp("tables") / "ogg.manifest"
    manifest.save(layouts.build(folder), table)
    return table


def top(found) -> str:
    return found["advice"][0]["key"]


def test_a_slow_disk_is_named(profiled, short, tones):
    found = profiled(short(tones), "slow_disk")
    assert found["verdict"] == "LOADER-BOUND" and top(found) == "disk"
    assert found["advice"][0]["gain"] > 3
    assert found["clips_per_second"]["loader"]["high"] < 25  # a read of 40 ms a clip at least, one by one
    shares = {stage["name"]: stage["seconds"] for stage in found["stages"] if stage["group"] == "loader"}
    assert shares["read"] > 0.8 * sum(shares.values()) and shares["read"] > 0.04
    assert found["ranks"][0]["waits"]["share"] > 0.3 and found["ranks"][0]["waits"]["ready"] < 0.2


@pytest.mark.slow
def test_too_few_threads_are_named_and_more_of_them_really_help(profiled, short, tones):
    found = profiled([*short(tones), "--try"], "slow_features")
    assert found["verdict"] == "LOADER-BOUND" and top(found) == "threads"
    best = found["advice"][0]
    assert best["value"] > 1 and best["gain"] > 1.5
    assert best["tried"]["value"] > 1.5


def test_heavy_resampling_is_named(profiled, short, tones):
    found = profiled(short(tones), "heavy_resample")
    assert found["verdict"] == "LOADER-BOUND" and top(found) == "pack"
    assert "resampling takes" in found["advice"][0]["text"] and found["advice"][0]["gain"] > 3


@pytest.mark.slow
def test_a_slow_decoder_is_named_and_packing_really_helps(profiled, short, encoded, tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    found = profiled([*short(encoded), "--try"], "slow_decoder")
    assert found["verdict"] == "LOADER-BOUND" and top(found) == "pack"
    assert "decoding takes" in found["advice"][0]["text"]
    assert found["advice"][0]["tried"]["value"] > 1.5
    assert found["formats"].keys() == {"ogg"}
    assert list(tmp_path.iterdir()) == []


def test_an_oversized_model_is_named(profiled, short, tones):
    found = profiled(short(tones), "slow_model")
    assert found["verdict"] == "COMPUTE-BOUND" and top(found) == "model"
    assert found["headroom"] > 1 and found["ranks"][0]["waits"]["share"] < 0.2
    forward = next(stage for stage in found["stages"] if stage["name"] == "forward")
    assert forward["seconds"] == pytest.approx(0.3 / 8, rel=0.5)


def test_a_slow_teacher_is_named_and_stored_answers_really_help(profiled, short, tones):
    given = [*short(tones, distill__teacher='"supervised"'), "--stage", "distill", "--try"]
    found = profiled(given, "slow_teacher")
    assert found["verdict"] == "COMPUTE-BOUND" and top(found) == "teacher"
    assert found["advice"][0]["gain"] > 2 and found["advice"][0]["tried"]["value"] > 2


@pytest.mark.parametrize("plant", ["slow_rank", "slow_disk_of_a_rank"])
def test_a_slow_rank_is_named(profiled, short, tones, plant):
    found = profiled(short(tones), plant, ranks=2)
    assert top(found) == "slow rank" and "rank 1" in found["advice"][0]["text"]
    assert "rank 1 is slow" in found["line"]
    assert found["verdict"] == ("COMPUTE-BOUND" if plant == "slow_rank" else "LOADER-BOUND")
    assert len(found["ranks"]) == 2
    assert found["communication"] < 0.5  # waiting for the slow one is not


def test_a_slow_network_is_named(profiled, short, tones):
    found = profiled(short(tones), "slow_network", ranks=2)
    assert found["verdict"] == "COMMUNICATION-BOUND" and top(found) == "communication"
    assert found["communication"] > 0.5


def test_collectives_fall_silent_and_speak_again(training, tmp_path):
    training.call("profile_ranks.silent_collectives", tmp_path / "found.json", ranks=2)
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["before"]["all_reduce"] == [3.0, 5.0] and found["silent"]["all_reduce"] == [2.0, 3.0]
    assert found["before"]["all_gather"] == [1.0, 2.0, 2.0, 3.0] and found["silent"]["all_gather"] == [2.0, 3.0] * 2
    assert found["silent"]["all_gather_into_tensor"] == [2.0, 3.0] * 2
    assert found["before"]["reduce_scatter_tensor"] == [5.0] and found["silent"]["reduce_scatter_tensor"] == [3.0]


def test_a_profile_holds_everything_and_leaves_nothing(training, profiled, short, tones, tmp_path):
    """Numbers agree with each other; page and trace are whole; the data and the folder are as before."""
    clips = manifest.load(tones)
    files = [Path(clips.path(i)) for i in range(len(clips))]
    before = {file: (file.stat().st_mtime_ns, file.stat().st_size) for file in [*files, *files[0].parent.iterdir()]}
    page, trace = tmp_path / "page.html", tmp_path / "trace.json"
    found = profiled([*short(tones), "--html", str(page), "--trace", str(trace)])
    assert {file: (file.stat().st_mtime_ns, file.stat().st_size) for file in before} == before
    assert sorted(tmp_path.iterdir()) == [page, trace]
    assert training.left_over() == []
    rates = found["clips_per_second"]
    assert all(rate["low"] <= rate["value"] <= rate["high"] for rate in rates.values())
    assert found["headroom"] == pytest.approx(rates["loader"]["value"] / rates["cached"]["value"] - 1)
    names = [stage["name"] for stage in found["stages"]]
    assert names == [
        *("read", "decode", "resample, crop", "fbank", "HOG"),
        *("masks", "views", "forward", "backward", "optimizer"),
    ]
    assert found["formats"]["wav"]["clips"] == 32 and found["bad_clips"] == {}
    assert found["machine"]["versions"]["torch"] and found["stage"] == "ssl" and found["batch"] == 8
    text = page.read_text()
    # "://" and not "http": four letters of the pictures' base64 may spell that.
    assert text.count("data:image/png;base64,") == 5 and "://" not in text
    assert found["line"].split(":")[0] in text
    events = {event.get("name") for event in json.loads(trace.read_text())["traceEvents"]}
    assert {"data", "forward", "backward", "optimizer"} <= events


def test_the_variations_of_multi_ssl_are_a_stage(profiled, short, tones):
    found = profiled(short(tones, augment__ssl="true", augment__mixup=0.5))
    names = [stage["name"] for stage in found["stages"]]
    assert names[names.index("HOG") + 1 :][:3] == ["augmentation", "masks", "views"]


def test_bad_clips_are_counted_and_do_not_end_it(profiled, short, tones, tmp_path):
    table = manifest.load(tones)
    (tmp_path / "cut").mkdir()
    files = [Path(table.path(i)) for i in range(len(table))]
    for number, file in enumerate(files):
        target = tmp_path / "cut" / file.parent.name / file.name
        target.parent.mkdir(exist_ok=True)
        target.write_bytes(file.read_bytes()[: 500 if number % 8 == 0 else None])
    found = profiled(short(tmp_path / "cut", data__max_bad_share=0.5))
    assert 0 < len(found["bad_clips"]) <= 5


def test_wrong_use_is_one_line(capsys, short, tones, tmp_path, monkeypatch):
    given = short(tones)[:-2]
    assert "choose 1 to 3600" in fails(capsys, ["profile", *given, "--seconds", "0"], code=2)
    assert "there is no folder" in fails(capsys, ["profile", *given, "--html", tmp_path / "no" / "page.html"])
    assert "no such" in fails(capsys, ["profile", *given, "--manifest", tmp_path / "nowhere"])
    monkeypatch.setenv("RANK", "1")
    assert cli.main(["profile", *given, "--seconds", "0"]) == 2  # rank 0 has said it
    assert os.environ["RANK"] == "1"


def test_fail_under_is_exit_code_1(training, short, tones, tmp_path):
    """For use in CI; the report is printed all the same."""
    run = training._start(tmp_path, "fastsskd.cli.main", ["profile", *short(tones), "--fail-under", "1e9"], ranks=1)
    assert run.wait() == [1]
    assert "under --fail-under 1e+09" in run.printed and "Advice" in run.printed and "Traceback" not in run.printed
