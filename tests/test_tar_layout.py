"""WebDataset shards, ours and other people's, become manifests; the loader reads clips where they lie."""

import io
import json
import tarfile

import damaged_audio
import numpy as np
import pytest
import torch

from fastsskd import manifest
from fastsskd.errors import InputError
from fastsskd.layouts import index as layouts
from fastsskd.loader import Loader

WAV = damaged_audio.good_clips()["pcm16.wav"]
FLAC = damaged_audio.good_clips()["flac16.flac"]
OGG = damaged_audio.good_clips()["vorbis.ogg"]


def write(path, members):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            data = data.encode() if isinstance(data, str) else data
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def rows(clips):
    return {clips.key(i): [clips.classes[label] for label in clips.labels(i)] for i in range(len(clips))}


def test_members_are_found_where_they_lie(tmp_path):
    shard = write(
        tmp_path / "a.tar", {"x/1.flac": FLAC, "x/1.cls": "3", "x/2.json": "{}", "x/2.wav": WAV, "3.ogg": OGG}
    )
    clips = layouts.build(tmp_path)
    assert rows(clips) == {"x/1": ["3"], "x/2": [], "3": []} and clips.source == "webdataset"
    whole = shard.read_bytes()
    for i, data in enumerate((FLAC, WAV, OGG)):
        offset, size = clips.extent(i)
        assert whole[offset : offset + size] == data and clips.path(i) == shard
    assert rows(layouts.build(shard)) == rows(clips)


@pytest.mark.parametrize(
    ("meta", "expected"),
    [
        ({"cls": "10"}, ["10"]),
        ({"cls": "dog\n"}, ["dog"]),
        ({"json": {"label": "a, b"}}, ["a, b"]),
        ({"json": {"labels": ["b", "a", "b"]}}, ["b", "a"]),
        ({"json": {"label": 0}, "cls": "7"}, ["0"]),
        ({"json": {"text": "a dog"}, "cls": "7"}, ["7"]),
        ({"json": ["not", "a", "dict"], "cls": "7"}, ["7"]),
        ({"json": "{half", "cls": "7"}, ["7"]),
        ({"json": {"label": None, "tags": ["x"]}}, ["x"]),
        ({"txt": "caption"}, []),
    ],
)
def test_labels(tmp_path, meta, expected):
    members = {"a.wav": WAV}
    for suffix, value in meta.items():
        members[f"a.{suffix}"] = value if isinstance(value, str) else json.dumps(value)
    write(tmp_path / "0.tar", members)
    clips = layouts.build(tmp_path)
    assert rows(clips) == {"a": expected} and clips.multi_label == (len(expected) > 1)


def test_numbers_are_sorted_as_numbers_and_long_names_and_dots_work(tmp_path):
    long = "folder/" * 30 + "x" * 120
    write(tmp_path / "0.tar", {"a.v2.flac": FLAC, "a.v2.cls": "10", f"{long}.wav": WAV, f"{long}.cls": "9"})
    clips = layouts.build(tmp_path)
    assert clips.classes == ("9", "10") and rows(clips) == {"a": ["10"], long: ["9"]}


def test_keys_that_shards_repeat_get_the_shards_name(tmp_path):
    for shard in ("s0", "s1"):
        write(tmp_path / f"{shard}.tar", {"000.wav": WAV, "001.wav": WAV})
    assert list(rows(layouts.build(tmp_path))) == ["s0/000", "s0/001", "s1/000", "s1/001"]


def test_folders_or_names_of_shards_tell_the_split(tmp_path):
    write(tmp_path / "f/train/0.tar", {"a.wav": WAV})
    write(tmp_path / "f/valid/0.tar", {"b.wav": WAV})
    assert layouts.build(tmp_path / "f").splits.tolist() == [1, 2]
    write(tmp_path / "n/train-0.tar", {"a.wav": WAV})
    write(tmp_path / "n/test-0.tar", {"b.wav": WAV})
    assert sorted(layouts.build(tmp_path / "n").splits.tolist()) == [1, 2]
    write(tmp_path / "n/more.tar", {"c.wav": WAV})
    assert layouts.build(tmp_path / "n").splits.tolist() == [0, 0, 0]


def test_what_is_not_whole_is_named_and_the_rest_is_used(tmp_path):
    write(tmp_path / "good.tar", {"a.wav": WAV, "b.json": "{}", ".hidden.wav": WAV})
    cut = write(tmp_path / "cut.tar", {"c.wav": WAV, "d.wav": WAV, "e.wav": WAV})
    cut.write_bytes(cut.read_bytes()[: len(WAV) + 2000])  # inside of d
    (tmp_path / "page.tar").write_text("<html>not found</html>" * 100)
    (tmp_path / "empty.tar").touch()
    (tmp_path / ".half.tar").write_bytes(b"half a shard")
    clips = layouts.build(tmp_path)
    assert {"a", "c"} <= set(rows(clips)) <= {"a", "c", "d"}
    text = " ".join(clips.absent)
    assert "good.tar: b" in text and "cut.tar (cut short" in text and "page.tar" in text and "empty.tar" in text
    assert "half" not in text
    loader = Loader(clips, batch_size=3, seconds=0.5)
    assert sorted(key for batch in loader for key in batch.key) == ["a", "c"]
    loader.close()
    assert all("truncated" in reason for reason in loader.skipped.values())


def test_shards_without_audio_are_refused_in_one_line(tmp_path):
    write(tmp_path / "0.tar", {"a.txt": "no sound"})
    with pytest.raises(InputError, match=r"no KEY\.wav"):
        layouts.build(tmp_path)


def test_unpacked_audio_comes_before_the_archive_it_came_from(tmp_path):
    write(tmp_path / "all.tar", {"a.wav": WAV})
    (tmp_path / "dog").mkdir()
    (tmp_path / "dog/b.wav").write_bytes(WAV)
    assert layouts.build(tmp_path).source == "folder"


def test_batches_from_shards_are_those_from_files(tmp_path):
    """Every good file of the tests, once alone and once in two shards."""
    good = damaged_audio.good_clips()
    keys = {name: f"{number:03d}" for number, name in enumerate(good)}
    (tmp_path / "files").mkdir()
    for name, data in good.items():
        (tmp_path / "files" / f"{keys[name]}{name[name.rfind('.') :]}").write_bytes(data)
    names = list(good)
    for shard, own in enumerate((names[::2], names[1::2])):
        write(tmp_path / f"shards/{shard}.tar", {f"{keys[n]}{n[n.rfind('.') :]}": good[n] for n in own})
    manifest.save(layouts.build(tmp_path / "shards"), tmp_path / "shards.manifest")
    batches = {}
    for name in ("files", "shards.manifest"):
        clips = {}
        loader = Loader(tmp_path / name, batch_size=4, seconds=0.3, train=False, waveform=True)
        for batch in loader:
            for i, key in enumerate(batch.key):
                clips[key.partition(".")[0]] = (batch.fbank[i], batch.hog[i], batch.waveform[i])
        loader.close()
        assert not loader.skipped
        batches[name] = clips
    assert batches["files"].keys() == batches["shards.manifest"].keys() == set(keys.values())
    for key, clip in batches["files"].items():
        assert all(torch.equal(a, b) for a, b in zip(clip, batches["shards.manifest"][key], strict=True))


@pytest.mark.parametrize("world_size", [1, 2])
def test_bad_clips_in_shards_are_left_out_and_named_on_any_number_of_ranks(tmp_path, world_size):
    good, bad = damaged_audio.good_clips(), damaged_audio.bad_clips()
    names = {f"{number:03d}": name for number, name in enumerate([*good, *bad])}
    members = {f"{key}{name[name.rfind('.') :]}": {**good, **bad}[name] for key, name in names.items()}
    parts = [dict(list(members.items())[start::3]) for start in range(3)]
    for number, part in enumerate(parts):
        write(tmp_path / f"{number}.tar", part)
    clips = layouts.build(tmp_path)
    delivered, skipped = [], {}
    for epoch in range(2):
        for rank in range(world_size):
            loader = Loader(clips, batch_size=5, seconds=0.5, train=True, rank=rank, world_size=world_size)
            loader.load_state_dict({**loader.state_dict(), "epoch": epoch})
            delivered += [key for batch in loader for key in batch.key]
            loader.close()
            assert all("\n" not in reason for reason in loader.skipped.values())
            skipped |= loader.skipped
    assert sorted(delivered) == sorted(2 * [key for key, name in names.items() if name in good])
    assert {names[key] for key in skipped} == bad.keys()


@pytest.mark.parametrize("then", [1, 2, 3])
def test_resume_from_shards_with_other_ranks_and_workers(tmp_path, then):
    for shard in range(3):
        wavs = {f"{shard}{number}.wav": damaged_audio.encode(damaged_audio.tone(seed=number)) for number in range(9)}
        write(tmp_path / f"{shard}.tar", wavs)

    def clips_of(loader, count=None):
        found = {}
        for _, batch in zip(range(count or 10**9), loader, strict=False):
            for row, key in enumerate(batch.key):
                assert key not in found
                found[key] = (batch.fbank[row].clone(), batch.hog[row].clone(), int(batch.seed[row]))
        state = loader.state_dict()
        loader.close()
        return found, state

    options = {"seconds": 0.5, "train": True, "seed": 3}
    expected, _ = clips_of(Loader(tmp_path, batch_size=4, workers=3, **options))
    got, state = clips_of(Loader(tmp_path, batch_size=4, workers=1, **options), count=2)
    assert len(got) == 8 and len(expected) == 27
    for rank in range(then):
        loader = Loader(tmp_path, batch_size=3, rank=rank, world_size=then, workers=rank + 1, **options)
        loader.load_state_dict(state)
        own, _ = clips_of(loader)
        assert not got.keys() & own.keys()
        got |= own
    assert got.keys() == expected.keys()
    for key, (fbank, hog, seed) in expected.items():
        assert torch.equal(got[key][0], fbank) and torch.equal(got[key][1], hog) and got[key][2] == seed


def test_a_shard_that_is_cut_during_the_run(tmp_path):
    members = {f"{number:02d}.wav": damaged_audio.encode(damaged_audio.tone(seed=number)) for number in range(12)}
    shard = write(tmp_path / "0.tar", members)
    clips = layouts.build(tmp_path)
    loader = Loader(clips, batch_size=4, seconds=0.5, train=True)
    assert sum(len(batch) for batch in loader) == 12
    loader.close()
    with open(shard, "r+b") as file:
        file.truncate(clips.extent(6)[0] + 100)
    assert sorted(key for batch in loader for key in batch.key) == [f"{number:02d}" for number in range(6)]
    loader.close()
    assert set(loader.skipped) == {f"{number:02d}" for number in range(6, 12)}
    assert all("0.tar ends" in reason for reason in loader.skipped.values())
    shard.unlink()
    assert sum(len(batch) for batch in loader) == 0
    loader.close()
    assert len(loader.skipped) == 12 and "No such file" in loader.skipped["00"]


def test_a_crop_of_a_long_recording_costs_the_crop(tmp_path):
    """Read calls are counted: one second of ten minutes is a hundredth of a percent of the file."""
    hour = np.arange(16000 * 600, dtype=np.int64).astype(np.int16)
    write(tmp_path / "0.tar", {"long.wav": damaged_audio.encode(hour, 16000)})
    loader = Loader(layouts.build(tmp_path), batch_size=1, seconds=1.0, train=True, waveform=True, workers=1)
    before = read_bytes()
    starts = [float(next(iter(batch.waveform))[0]) for _ in range(5) for batch in loader]
    loader.close()
    assert len(set(starts)) == 5
    assert read_bytes() - before < 30 * 40000


def read_bytes():
    """Bytes this process has asked the system for."""
    with open("/proc/self/io") as file:
        return int(file.readline().split()[1])
