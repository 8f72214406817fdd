"""`fastsskd pack`: what is in the shards, what is rejected, and that no way of ending the job harms it."""

import csv
import fcntl
import io
import json
import random
import shutil
import tarfile
from pathlib import Path

import damaged_audio
import ffmpeg_audio
import numpy as np
import pytest
import soundfile
from forked_cli import ForkedCli

import fastsskd_kernels as kernels
from fastsskd import cli, manifest
from fastsskd.audio import ffmpeg as audio_ffmpeg
from fastsskd.clip_table import PACKED
from fastsskd.errors import InputError
from fastsskd.layouts import index as layouts
from fastsskd.pack import job as pack_job
from fastsskd.pack.report import top_reasons
from fastsskd.pack.run import num_unreadable, pack

ESC10 = Path(__file__).parents[2] / "shared/data/esc10"


def table_of(folder, files, columns=None):
    """A manifest of files by name, with the columns of a csv by name; keys are the paths unless there is a `key`."""
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    columns = {"path": list(files)} | (columns or {})
    with open(folder / "clips.csv", "w", newline="") as file:
        csv.writer(file).writerows([list(columns), *zip(*columns.values(), strict=True)])
    return manifest.load(folder / "clips.csv")


def samples_of(packed, i):
    """The samples of a packed clip, as its row of the manifest says where they are."""
    offset, size = packed.extent(i)
    data = packed.path(i).read_bytes()[offset : offset + size]
    samples, rate = soundfile.read(io.BytesIO(data), dtype="float32")
    assert rate == 16_000 and samples.ndim == 1
    return samples


def contents(out):
    """Every file below a folder: bytes by name."""
    files = (path for path in out.rglob("*") if path.is_file())
    return {str(path.relative_to(out)): path.read_bytes() for path in files}


def fails(capsys, *arguments, code=1):
    assert cli.main([str(argument) for argument in arguments]) == code
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("error: "))
    return line


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """40 short clips of two classes in several formats, four of them bad; its manifest."""
    folder = tmp_path_factory.mktemp("small")
    files = {}
    for number in range(40):
        rate, kind = [(16_000, "WAV"), (44_100, "OGG"), (22_050, "FLAC"), (48_000, "WAV")][number % 4]
        samples = damaged_audio.tone(round(0.2 * rate), seed=number)
        files[f"{'ab'[number % 2]}/{number}.{kind.lower()}"] = damaged_audio.encode(samples, rate, kind)
    for name in ("a/8.wav", "b/25.ogg", "a/38.flac", "b/39.wav"):
        files[name] = files[name][:100]
    table_of(folder, files)
    return layouts.build(folder)


SMALL_SHARDS = {"shard_size": 0.06}


@pytest.fixture(scope="module")
def reference(small, tmp_path_factory):
    """The folder that `small` gives without an interruption."""
    out = tmp_path_factory.mktemp("reference") / "packed"
    pack(small, out, workers=1, **SMALL_SHARDS)
    return out


@pytest.fixture(scope="module")
def forked():
    with ForkedCli() as server:
        yield server


# ---------------------------------------------------------------------------------------------------- what is packed


def test_good_files_are_packed_and_bad_ones_rejected_each_once(tmp_path):
    good, bad = damaged_audio.good_clips(), damaged_audio.bad_clips()
    table = table_of(tmp_path, good | bad)
    result = pack(table, tmp_path / "packed")
    packed = manifest.load(tmp_path / "packed" / "packed.manifest")
    assert [packed.key(i) for i in range(len(packed))] == list(good)
    assert list(result.rejected) == list(bad) and all(result.rejected.values())
    lines = (tmp_path / "packed" / "rejected.tsv").read_text().splitlines()
    assert dict(line.split("\t") for line in lines) == result.rejected
    about = json.loads((tmp_path / "packed" / "pack.json").read_text())
    assert (about["status"], about["num_clips"], about["num_rejected"]) == ("complete", len(good), len(bad))
    for i in range(len(packed)):
        samples, rate = soundfile.read(io.BytesIO(good[packed.key(i)]), dtype="float32", always_2d=True)
        _, up, down = kernels.resample_table(rate)
        length = kernels.resampled_length(len(samples), up, down)
        expected = kernels.resample_crop_or_loop(samples.mean(axis=1), rate, length)
        np.testing.assert_allclose(samples_of(packed, i), expected, atol=0.501 / 32768)


def test_the_loader_gives_the_same_from_the_shards_as_from_the_files(tmp_path):
    from fastsskd.loader import Loader

    names = [name for name in damaged_audio.good_clips() if name not in ("adpcm.wav", "one_sample.flac")]
    table = table_of(tmp_path, {name: damaged_audio.good_clips()[name] for name in names})
    pack(table, tmp_path / "packed")
    batches = []
    for source in (table, tmp_path / "packed" / "packed.manifest"):
        loader = Loader(source, batch_size=64, seconds=0.96, train=True, seed=4, waveform=True)
        batches += loader
        assert not loader.skipped
        loader.close()
    files, shards = batches
    assert files.key == shards.key and (files.seed == shards.seed).all()
    scale = files.waveform.abs().amax(dim=1, keepdim=True).clamp(min=1.0)
    assert ((files.waveform - shards.waveform).abs() <= 0.52 / 32768 * scale).all()
    loud = np.array(["silent" not in name for name in files.key])
    assert (files.fbank - shards.fbank)[loud].abs().mean() < 0.01


@pytest.mark.parametrize("encoding", ["pcm16", "flac", "float32"])
def test_16_khz_16_bits_come_out_bit_for_bit(tmp_path, encoding):
    steps = np.random.default_rng(0).integers(-32768, 32768, 30_000).astype(np.int16)
    files = {f"{kind}": damaged_audio.encode(steps, 16_000, kind) for kind in ("WAV", "FLAC", "AIFF")}
    pack(table_of(tmp_path, files), tmp_path / "packed", encoding=encoding)
    packed = manifest.load(tmp_path / "packed" / "packed.manifest")
    for i in range(3):
        np.testing.assert_array_equal(samples_of(packed, i) * 32768, steps)


def test_formats_of_films_and_telephones(tmp_path):
    files = {name: ffmpeg_audio.clip(name) for name in ffmpeg_audio.FORMATS}
    files |= {f"cut_{name}": ffmpeg_audio.damaged(data, "cut in the middle") for name, data in files.items()}
    result = pack(table_of(tmp_path, files), tmp_path / "packed", workers=2)
    assert [result.manifest.key(i) for i in range(len(result.manifest))] == list(ffmpeg_audio.FORMATS)
    assert sorted(result.rejected) == sorted(f"cut_{name}" for name in ffmpeg_audio.FORMATS)
    for i in range(len(result.manifest)):
        samples = samples_of(result.manifest, i)
        assert len(samples) / 16_000 == pytest.approx(ffmpeg_audio.SECONDS, abs=0.1)
        assert np.std(samples) == pytest.approx(np.std(ffmpeg_audio.tone(16_000)), rel=0.15)


def test_labels_folds_and_splits_are_carried_over(tmp_path):
    good = damaged_audio.good_clips()["short.wav"]
    files = dict.fromkeys(("a.wav", "b.wav", "c.wav", "d.wav"), good) | {"bad.wav": b""}
    columns = {
        "label": ["dog", "cat", "", "cat", "dog"],
        "fold": [2, 1, 0, 1, 2],
        "split": ["eval", "", "train", "", ""],
    }
    pack(table_of(tmp_path, files, columns), tmp_path / "packed")
    packed = manifest.load(tmp_path / "packed" / "packed.manifest")
    assert packed.source == PACKED and packed.classes == ("cat", "dog") and not packed.multi_label
    assert packed.label_array().tolist() == [1, 0, -1, 0]
    assert packed.folds.tolist() == [2, 1, 0, 1] and packed.splits.tolist() == [2, 0, 1, 0]
    assert packed.segment(0) == (0.0, -1.0) and packed.good.all()
    shutil.move(tmp_path / "packed", tmp_path / "moved")
    moved = manifest.load(tmp_path / "moved" / "packed.manifest")
    assert len(samples_of(moved, 3)) == 291


def test_several_labels_and_none(tmp_path):
    good = damaged_audio.good_clips()["short.wav"]
    columns = {"label": ["dog;car", "", "cat"]}
    result = pack(table_of(tmp_path, {"a.wav": good, "b.wav": good, "c.wav": good}, columns), tmp_path / "packed")
    assert [result.manifest.labels(i).tolist() for i in range(3)] == [[2, 0], [], [1]] and result.manifest.multi_label
    (tmp_path / "bare").mkdir()
    bare = pack(table_of(tmp_path / "bare", {"a.wav": good}), tmp_path / "bare/packed").manifest
    assert bare.classes == () and bare.labels(0).tolist() == []
    for folder, names in ((tmp_path / "packed", ["a", "b", "c"]), (tmp_path / "bare/packed", ["a"])):
        with tarfile.open(folder / "shard-000000.tar") as tar:
            assert tar.getnames() == [f"{name}.{suffix}" for name in names for suffix in ("wav", "json")]


def test_segments_of_recordings(tmp_path):
    files = {
        "long.wav": damaged_audio.encode(damaged_audio.tone(5 * 44_100)),
        "long.ogg": damaged_audio.encode(damaged_audio.tone(5 * 48_000), 48_000, "OGG"),
        "cut.flac": damaged_audio.encode(damaged_audio.tone(5 * 44_100), kind="FLAC")[:90_000],
    }
    segments = [(name, start, start + 0.7) for name in files for start in (0.5, 1.2, 4.6, 3.0, 9.0)]
    segments.append(("long.wav", 2, ""))
    columns = {"path": [name for name, _, _ in segments], "key": [f"{n}@{s}" for n, s, _ in segments]}
    columns |= {"start": [start for _, start, _ in segments], "end": [end for _, _, end in segments]}
    table = table_of(tmp_path, files, columns)
    result = pack(table, tmp_path / "packed", workers=2)
    packed = result.manifest
    assert set(result.rejected) == {"long.wav@9.0", "long.ogg@9.0"} | {key for key in columns["key"] if "cut" in key}
    assert result.rejected["long.ogg@9.0"] == "is over before its segment begins, at 9 s"
    for i in range(len(packed)):
        name, start = packed.key(i).split("@")
        samples, rate = soundfile.read(io.BytesIO(files[name]), dtype="float32")
        end = None if start == "2" else round(np.float32(float(start) + 0.7) * rate)
        part = samples[round(float(start) * rate) : end]
        _, up, down = kernels.resample_table(rate)
        expected = kernels.resample_crop_or_loop(part, rate, kernels.resampled_length(len(part), up, down))
        np.testing.assert_allclose(samples_of(packed, i), expected, atol=0.501 / 32768)


def test_clips_in_tar_shards_can_be_packed_again(small, reference, tmp_path):
    first = manifest.load(reference / "packed.manifest")
    again = pack(first, tmp_path / "again", encoding="flac", shuffle=3).manifest
    assert [again.key(i) for i in range(len(again))] == [first.key(i) for i in range(len(first))]
    for i in range(len(first)):
        np.testing.assert_array_equal(samples_of(again, i), samples_of(first, i))


def test_marked_clips_are_rejected_but_for_those_that_wait_for_pack(tmp_path, capsys):
    files = {"a.wav": damaged_audio.good_clips()["short.wav"], "b.wav": damaged_audio.good_clips()["short.wav"]}
    files["c.mp3"] = damaged_audio.encode(damaged_audio.tone(), kind="MP3")
    manifest.save(table_of(tmp_path, files), tmp_path / "m")
    assert cli.main(["check", str(tmp_path / "m"), "--write"]) == 1  # the loader does not read MP3
    assert "1 of these are in formats that `fastsskd pack` reads" in capsys.readouterr().err
    manifest.mark_bad(tmp_path / "m", {"b.wav": "sounds wrong"})
    result = pack(manifest.load(tmp_path / "m"), tmp_path / "packed")
    assert result.rejected == {"b.wav": "sounds wrong"} and result.manifest.good.all()
    assert [result.manifest.key(i) for i in range(2)] == ["a.wav", "c.mp3"]


def test_files_that_cannot_be_read_and_a_data_set_that_is_gone(tmp_path):
    good = damaged_audio.good_clips()["short.wav"]
    table = table_of(tmp_path / "data", {"a.wav": good, "gone.wav": good, "folder.wav": good})
    (tmp_path / "data" / "gone.wav").unlink()
    (tmp_path / "data" / "folder.wav").unlink()
    (tmp_path / "data" / "folder.wav").mkdir()
    result = pack(table, tmp_path / "packed")
    assert result.rejected == {
        "gone.wav": "cannot be read: No such file or directory",
        "folder.wav": "cannot be read: Is a directory",
    }
    shutil.rmtree(tmp_path / "data")
    with pytest.raises(InputError, match="the data set is gone"):
        pack(table, tmp_path / "other")
    assert not (tmp_path / "other" / "packed.manifest").exists()


# -------------------------------------------------------------------------------------------------------- WebDataset


def test_the_webdataset_package_reads_the_shards(tmp_path):
    wds = pytest.importorskip("webdataset", reason="needs the package webdataset")
    good = damaged_audio.good_clips()
    names = ["a.wav", "a.flac", "deep/er.v2/b.c.wav", "ü/ж 1.ogg", "x" * 120 + "/" + "y" * 120 + ".wav", "__m__/e.wav"]
    files = dict(zip(names, [good["pcm16.wav"], good["flac16.flac"], *[good["short.wav"]] * 4], strict=True))
    files["loud.wav"] = good["float_scaled_to_int16.wav"]
    columns = {"label": ["one", "two"] * 3 + [""], "fold": [1, 2, 3, 0, 0, 0, 0]}
    result = pack(table_of(tmp_path, files, columns), tmp_path / "packed", shard_size=0.1, encoding="flac")
    shards = sorted(str(path) for path in (tmp_path / "packed").glob("*.tar"))
    assert len(shards) == result.num_shards > 1
    samples = list(wds.WebDataset(shards, shardshuffle=False))
    assert len(samples) == len(files) == len({sample["__key__"] for sample in samples})
    for i, (sample, (name, data)) in enumerate(zip(samples, files.items(), strict=True)):
        about = json.loads(sample["json"])
        _, rate = soundfile.read(io.BytesIO(data))
        assert about["key"] == about["source"] == name and about["sample_rate"] == rate
        assert about["labels"] == [columns["label"][i]] * bool(columns["label"][i])
        assert about.get("fold", 0) == columns["fold"][i]
        assert sample.get("cls") == ([b"0", b"1"] * 3 + [None])[i]
        audio, rate = soundfile.read(io.BytesIO(sample["wav" if name == "loud.wav" else "flac"]))
        assert rate == 16_000 and about["seconds"] == len(audio) / rate


# ------------------------------------------------------------------------------------------- the same, however it ends


def test_threads_do_not_change_a_byte(small, reference, tmp_path):
    pack(small, tmp_path / "packed", workers=3, **SMALL_SHARDS)
    assert contents(tmp_path / "packed") == contents(reference)
    assert len(list(reference.glob("*.tar"))) > 4


def test_shuffled_shards_and_a_manifest_in_order(small, reference, tmp_path):
    packed = pack(small, tmp_path / "packed", shuffle=1, **SMALL_SHARDS).manifest
    plain = manifest.load(reference / "packed.manifest")
    assert [packed.key(i) for i in range(len(packed))] == [plain.key(i) for i in range(len(plain))]
    places = [(packed.path(i).name, packed.extent(i)) for i in range(len(packed))]
    assert places != sorted(places) and len(set(places)) == len(places)
    for i in range(len(packed)):
        np.testing.assert_array_equal(samples_of(packed, i), samples_of(plain, i))


def test_killed_before_any_file_operation_it_goes_on_as_if_nothing_had_been(small, tmp_path, forked):
    """No half shard is ever seen, and the same command makes the same files as without the kill."""
    manifest.save(small.select(np.arange(0, 40, 2)), tmp_path / "m")
    pack(manifest.load(tmp_path / "m"), tmp_path / "whole", **SMALL_SHARDS)
    whole, number = contents(tmp_path / "whole"), 0
    while True:
        number += 1
        out = tmp_path / f"killed{number}"
        command = ["pack", tmp_path / "m", "--out", out, "--workers", "2", "--shard_size", "0.06"]
        ended = forked.run(*command, kill_at=number)
        if ended["code"] == 0:
            break
        assert ended["code"] == -9
        visible = {name: data for name, data in contents(out).items() if name.endswith((".tar", ".tsv", ".manifest"))}
        assert visible.items() <= whole.items()
        assert forked.run(*command)["code"] == 0
        assert contents(out) == whole
    assert number > 20


def test_killed_at_random_moments_again_and_again(small, reference, tmp_path, forked):
    manifest.save(small, tmp_path / "m")
    command = ["pack", tmp_path / "m", "--workers", "2", "--shard_size", "0.06", "--out"]
    draw = random.Random(0)
    for number in range(5):
        kills = 0
        while forked.run(*command, tmp_path / f"{number}", kill_after=draw.uniform(0.0, 0.03 * kills))["code"]:
            kills += 1
        assert kills and contents(tmp_path / f"{number}") == contents(reference)


def test_interrupted_it_says_how_to_go_on(small, tmp_path, forked):
    manifest.save(small, tmp_path / "m")
    pack(small, tmp_path / "whole", shard_size=0.01)  # a shard a clip: there is time to interrupt it
    command = ["pack", tmp_path / "m", "--workers", "1", "--shard_size", "0.01", "--out", tmp_path / "packed"]
    ended = forked.run(*command, interrupt_when=str(tmp_path / "packed/*.tar"))
    assert ended["code"] == 1 and "Traceback" not in ended["stderr"]
    (line,) = (line for line in ended["stderr"].splitlines() if line.startswith("error: "))
    assert "interrupted" in line and "run the same command again" in line
    assert not any(name.endswith(".tmp") for name in contents(tmp_path / "packed"))
    assert forked.run(*command)["code"] == 0
    assert contents(tmp_path / "packed") == contents(tmp_path / "whole")


def test_a_full_disk_is_one_line_and_costs_no_finished_shard(small, reference, tmp_path, forked):
    manifest.save(small, tmp_path / "m")
    command = ["pack", tmp_path / "m", "--shard_size", "0.06", "--out", tmp_path / "packed"]
    ended = forked.run(*command, largest_file=70_000)
    assert ended["code"] == 1 and "Traceback" not in ended["stderr"]
    (line,) = (line for line in ended["stderr"].splitlines() if line.startswith("error: "))
    assert "cannot be written (File too large)" in line and "run the same command again" in line
    assert forked.run(*command)["code"] == 0
    assert contents(tmp_path / "packed") == contents(reference)


def test_a_complete_folder_is_left_alone_and_a_lost_shard_made_again(small, reference, tmp_path, capsys):
    out = tmp_path / "packed"
    shutil.copytree(reference, out)
    times = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.name != "lock"}
    assert pack(small, out, **SMALL_SHARDS).was_complete
    assert {path: path.stat().st_mtime_ns for path in times} == times
    (out / "shard-000001.tar").unlink()
    with open(out / "shard-000003.tar", "ab") as file:
        file.write(b"x")
    assert not pack(small, out, **SMALL_SHARDS).was_complete
    assert contents(out) == contents(reference)
    untouched = out / "shard-000002.tar"
    assert untouched.stat().st_mtime_ns == times[untouched]


def test_a_folder_belongs_to_one_manifest_and_one_set_of_options(small, reference, tmp_path, capsys):
    out = tmp_path / "packed"
    shutil.copytree(reference, out)
    manifest.save(small, tmp_path / "m")
    before = contents(out)
    base = ["pack", tmp_path / "m", "--out", out, "--shard_size", "0.06"]
    assert "encoding = pcm16, now it is flac" in fails(capsys, *base, "--encoding", "flac")
    assert "shuffle = None, now it is 0" in fails(capsys, *base, "--shuffle", "0")
    assert "shard_size = 0.06, now it is 7.0" in fails(capsys, *base[:-1], "7")
    manifest.mark_bad(tmp_path / "m", {small.key(0): "noise"})
    assert "another manifest" in fails(capsys, *base)
    manifest.save(small.select(np.arange(39)), tmp_path / "m")
    assert "another manifest" in fails(capsys, *base)
    assert contents(out) == before
    (out / "pack.json").unlink()
    assert "holds shards but no pack.json" in fails(capsys, *base)


def test_two_at_once_is_one_too_many(small, tmp_path, capsys):
    manifest.save(small, tmp_path / "m")
    (tmp_path / "packed" / ".pack").mkdir(parents=True)
    with open(tmp_path / "packed" / ".pack" / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        line = fails(capsys, "pack", tmp_path / "m", "--out", tmp_path / "packed")
    assert "another `fastsskd pack` is writing there" in line
    assert list(contents(tmp_path / "packed")) == [".pack/lock"]


def test_a_long_recording_does_not_fill_the_memory(tmp_path, forked):
    with soundfile.SoundFile(tmp_path / "long.wav", "w", 44_100, 1, "PCM_16") as file:
        minute = np.round(damaged_audio.tone(60 * 44_100) * 32768).astype(np.int16)
        for _ in range(32):
            file.write(minute)
    (tmp_path / "list.csv").write_text("path,key,start,end\nlong.wav,all,,\nlong.wav,part,1800,1810\n")
    ended = forked.run("pack", tmp_path / "list.csv", "--out", tmp_path / "packed", "--workers", "1")
    assert ended["code"] == 0, ended["stderr"]
    assert ended["grown"] < 100e6  # the recording has 169 MB, and 123 MB as float32 at 16 kHz
    packed = manifest.load(tmp_path / "packed" / "packed.manifest")
    assert packed.extent(0)[1] == 44 + 32 * 60 * 16_000 * 2
    whole, part = samples_of(packed, 0), samples_of(packed, 1)
    np.testing.assert_array_equal(whole[100_000:860_000], whole[100_000 + 960_000 * 9 : 860_000 + 960_000 * 9])
    np.testing.assert_allclose(part[1000:-1000], whole[1800 * 16_000 + 1000 : 1810 * 16_000 - 1000], atol=1.01 / 32768)


# ------------------------------------------------------------------------------------------------------- the command


def test_the_command_from_a_folder(small, reference, tmp_path, capsys):
    arguments = ["pack", str(small.root), "--out", str(tmp_path / "new" / "packed"), "--shard_size", "0.06"]
    assert cli.main(arguments) == 0
    text = capsys.readouterr().err
    assert "36 clips" in text and "4 clips were rejected" in text and "2  truncated: ... of ... bytes" in text
    assert contents(tmp_path / "new" / "packed") == contents(reference)
    assert cli.main(arguments) == 0
    assert "was complete already" in capsys.readouterr().err


def test_nothing_to_pack_is_exit_code_1_and_can_be_tried_again(tmp_path, capsys):
    table_of(tmp_path, {"a.wav": b"", "b.wav": b"<html>"})
    line = fails(capsys, "pack", tmp_path / "clips.csv", "--out", tmp_path / "packed")
    assert "none of 2 clips can be packed" in line and "rejected.tsv" in line
    assert len((tmp_path / "packed" / "rejected.tsv").read_text().splitlines()) == 2
    (tmp_path / "a.wav").write_bytes(damaged_audio.good_clips()["short.wav"])
    assert cli.main(["pack", str(tmp_path / "clips.csv"), "--out", str(tmp_path / "packed")]) == 0


def test_too_many_bad_clips_stop_clearly_if_wanted(small, reference, tmp_path, capsys, monkeypatch):
    manifest.save(small, tmp_path / "m")
    monkeypatch.setattr(pack_job, "FEW_CLIPS", 20)
    base = ["pack", tmp_path / "m", "--out", tmp_path / "packed", "--shard_size", "0.06", "--max_bad_share"]
    line = fails(capsys, *base, "0.05")
    assert "more than --max_bad_share 0.05" in line and "truncated" in line
    assert (tmp_path / "packed" / "shard-000000.tar").exists()
    assert cli.main([str(part) for part in [*base, "0.2"]]) == 0
    assert contents(tmp_path / "packed") == contents(reference)


def test_bad_input_is_one_line(small, tmp_path, capsys):
    fails(capsys, "pack", tmp_path / "nowhere", "--out", tmp_path / "packed")
    assert not (tmp_path / "packed").exists()
    manifest.save(small, tmp_path / "m")
    (tmp_path / "file").write_text("")
    assert "cannot write there" in fails(capsys, "pack", tmp_path / "m", "--out", tmp_path / "file")
    for wrong in (["--encoding", "mp3"], ["--shard_size", "0"], ["--max_bad_share", "5"], ["--workers", "0"]):
        with pytest.raises(SystemExit) as error:
            cli.main(["pack", str(tmp_path / "m"), "--out", str(tmp_path / "packed"), *wrong])
        assert error.value.code == 2


def test_without_ffmpeg_the_first_line_counts_the_clips_that_need_it(tmp_path, capsys, monkeypatch):
    short = damaged_audio.good_clips()["short.wav"]
    table = table_of(tmp_path, {"a.wav": short, "b.M4A": ffmpeg_audio.clip("aac.m4a"), "c.webm": short})
    assert num_unreadable(table) == 0
    monkeypatch.setattr(audio_ffmpeg, "is_installed", lambda: False)
    assert num_unreadable(table) == 2
    assert cli.main(["pack", str(tmp_path / "clips.csv"), "--out", str(tmp_path / "packed")]) == 0
    text = capsys.readouterr().err
    assert text.startswith("2 clips seem to need FFmpeg to be read: pip install 'fastsskd[formats]'")
    assert "MP4 or M4A: to read it, `pip install 'fastsskd[formats]'`" in text


def test_reasons_are_counted_without_their_numbers():
    reasons = [f"truncated: {n} of {n * 9} bytes are missing" for n in range(5)] + ["empty file"] * 2
    reasons += [f"unknown header {n:02x} ff 0a" for n in range(3)] + list("abcd")
    assert top_reasons(reasons) == [
        "       5  truncated: ... of ... bytes are missing",
        "       3  unknown header ...",
        "       2  empty file",
        "       1  a",
        "       1  b",
        "       2  other reasons",
    ]


@pytest.mark.skipif(not ESC10.is_dir(), reason="needs ESC-10 beside the checkout, in shared/data/esc10")
def test_real_clips(tmp_path):
    table = layouts.build(ESC10).select(np.arange(0, 320, 16))
    packed = pack(table, tmp_path / "packed", workers=2).manifest
    assert len(packed) == 20 and packed.folds.tolist() == table.folds.tolist()
    for i in range(20):
        assert len(samples_of(packed, i)) / 16_000 == pytest.approx(soundfile.info(table.path(i)).duration, abs=1e-4)
