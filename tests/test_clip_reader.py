"""Reading clips: in part where samples lie bare, through DALI where they do not; both give the same."""

import os

import damaged_audio
import numpy as np
import pytest
import soundfile

import fastsskd_kernels as kernels
from fastsskd.audio.file import BadClip
from fastsskd.clip_bytes import ClipBytes, ShardFiles
from fastsskd.clip_columns import from_columns
from fastsskd.clip_reader import MAX_WHOLE, ClipReader, Crop, announce
from fastsskd.clip_table import PACKED

RATE = 44100


def reader_of(folder, names, source="", **columns):
    table = from_columns(names, root=folder, source=source, **columns)
    return ClipReader(table, ShardFiles(folder), 4)


def one(reader, i, crop):
    ((place, clip),) = reader.read([i], [crop])
    assert place == 0
    return clip


def waveform(clip, crop):
    rates, where = (clip.rate, crop.num_samples, crop.position), {"begin": clip.begin, "length": clip.length}
    return kernels.resample_crop_or_loop(np.asarray(clip.samples), *rates, **where)


@pytest.mark.parametrize("channels", [1, 2, 3])
@pytest.mark.parametrize("segment", [(0.0, -1.0), (0.5, 1.25), (1.0, -1.0)])
def test_a_part_gives_what_dali_gives_of_the_whole(tmp_path, channels, segment):
    samples = np.random.default_rng(channels).integers(-20000, 20000, (2 * RATE, channels), dtype=np.int16)
    soundfile.write(tmp_path / "a.wav", samples, RATE, subtype="PCM_16")
    soundfile.write(tmp_path / "a.aiff", samples, RATE, subtype="PCM_16")  # through DALI
    soundfile.write(tmp_path / "a.flac", samples, RATE, subtype="PCM_16")
    columns = {"starts": [segment[0]] * 3, "ends": [segment[1]] * 3}
    reader = reader_of(tmp_path, ["a.wav", "a.aiff", "a.flac"], **columns)
    for num_samples in (3000, 12000, 50000):
        for position in (0.0, 0.7):
            crop = Crop(num_samples, position)
            bare, dali, flac = (waveform(one(reader, i, crop), crop) for i in range(3))
            np.testing.assert_allclose(bare, dali, atol=2e-6)
            np.testing.assert_allclose(flac, dali, atol=2e-6)
    length = one(reader, 0, Crop(None)).length
    assert length == one(reader, 1, Crop(None)).length == len(one(reader, 0, Crop(None)).samples)
    assert length == one(reader, 2, Crop(None)).length
    assert one(reader, 0, Crop(800)).samples.size < 0.2 * length


@pytest.fixture
def long_flac(tmp_path):
    """40 s of stereo noise, some 6 MB, and a reader of it."""
    samples = np.random.default_rng(1).integers(-9000, 9000, (40 * RATE, 2), dtype=np.int16)
    soundfile.write(tmp_path / "a.flac", samples, RATE, subtype="PCM_16")
    assert (tmp_path / "a.flac").stat().st_size > 4 * MAX_WHOLE
    return tmp_path / "a.flac", samples.astype(np.float64).mean(1) / 32768, reader_of(tmp_path, ["a.flac"])


def test_of_a_long_flac_a_part_is_read(long_flac, monkeypatch):
    path, mono, reader = long_flac
    read, preadv = [], os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, at: read.append(preadv(fd, buffers, at)) or read[-1])
    for position in np.random.default_rng(2).random(20):
        read.clear()
        clip = one(reader, 0, Crop(RATE, position))
        assert clip.length == len(mono) and len(clip.samples) < 0.1 * len(mono)
        np.testing.assert_allclose(clip.samples, mono[clip.begin :][: len(clip.samples)], atol=1e-7)
        assert sum(read) < 0.35 * path.stat().st_size
    whole = one(reader, 0, Crop(None))
    np.testing.assert_allclose(whole.samples, mono, atol=1e-7)


def test_damage_in_a_long_flac_is_found_where_it_is_heard(long_flac):
    path, mono, reader = long_flac
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x10
    path.write_bytes(data)
    assert isinstance(one(reader, 0, Crop(RATE, 0.5)), BadClip)
    assert isinstance(one(reader, 0, Crop(None)), BadClip)
    clip = one(reader, 0, Crop(RATE, 0.9))
    np.testing.assert_allclose(clip.samples, mono[clip.begin :][: len(clip.samples)], atol=1e-7)


def test_damage_in_a_short_flac_is_found_wherever_it_is(tmp_path):
    (tmp_path / "a.flac").write_bytes(damaged_audio.bad_clips()["changed_at_0.97_flac16.flac"])
    assert isinstance(one(reader_of(tmp_path, ["a.flac"]), 0, Crop(1000, 0.0)), BadClip)


def test_flac_that_the_kernel_leaves_to_dali(tmp_path, monkeypatch):
    (tmp_path / "a.flac").write_bytes(damaged_audio.good_clips()["flac16.flac"])
    ours = one(reader_of(tmp_path, ["a.flac"]), 0, Crop(None))

    def refuse(*args, **kwargs):
        raise ValueError("not read here")

    monkeypatch.setattr(kernels, "decode_flac", refuse)
    dali = one(reader_of(tmp_path, ["a.flac"]), 0, Crop(None))
    assert dali.samples.dtype == np.float32 and ours.rate == dali.rate
    np.testing.assert_array_equal(dali.samples, ours.samples / np.float32(32768))


def test_float_files_are_read_whole_unless_they_were_checked(tmp_path):
    samples = np.random.default_rng(0).standard_normal(RATE).astype(np.float32) * 0.1
    samples[40000] = np.nan
    soundfile.write(tmp_path / "a.wav", samples, RATE, subtype="FLOAT")
    crop = Crop(2000, 0.0)  # the NaN lies elsewhere
    assert "NaN" in str(one(reader_of(tmp_path, ["a.wav"]), 0, crop))
    clip = one(reader_of(tmp_path, ["a.wav"], source=PACKED), 0, crop)
    np.testing.assert_array_equal(clip.samples, samples[: len(clip.samples)])
    assert len(clip.samples) < 10000


def test_a_mixed_call_returns_every_place_once(tmp_path):
    names = []
    for number, (name, data) in enumerate({**damaged_audio.good_clips(), **damaged_audio.bad_clips()}.items()):
        names.append(f"{number:03d}{name[name.find('.') :]}")
        (tmp_path / names[-1]).write_bytes(data)
    num_good = len(damaged_audio.good_clips())
    reader = reader_of(tmp_path, [*names, "gone.wav"])
    order = np.random.default_rng(0).permutation(len(names) + 1).tolist()
    for start in range(0, len(order), 4):
        part = order[start : start + 4]
        results = list(reader.read(part, [Crop(1000, 0.5)] * len(part)))
        assert sorted(place for place, _ in results) == list(range(len(part)))
        for place, clip in results:
            assert isinstance(clip, BadClip) == (part[place] >= num_good), names[part[place]]


def test_marked_clips_are_not_read(tmp_path):
    (tmp_path / "a.wav").write_bytes(damaged_audio.good_clips()["pcm16.wav"])
    table = from_columns(["a.wav"], root=tmp_path)
    index = table.table.schema.get_field_index("bad")
    marked = table.replace(table=table.table.set_column(index, table.table.schema.field("bad"), [["too loud"]]))
    assert str(one(ClipReader(marked, ShardFiles(tmp_path), 1), 0, Crop(100))) == "too loud"


def test_a_part_is_read_and_no_more(tmp_path, monkeypatch):
    soundfile.write(tmp_path / "a.wav", np.zeros(16000 * 100, np.int16), 16000, subtype="PCM_16")
    read = []
    original = ClipBytes.read_into

    def counted(clip, buffer, start):
        read.append(memoryview(buffer).nbytes)
        original(clip, buffer, start)

    monkeypatch.setattr(ClipBytes, "read_into", counted)
    one(reader_of(tmp_path, ["a.wav"]), 0, Crop(16000, 0.5))
    assert sum(read) < 32000 + 1000


def test_clips_are_announced_where_they_lie(tmp_path, monkeypatch):
    for name in ("a.flac", "s.tar"):
        (tmp_path / name).write_bytes(b"x" * 9000)
    table = from_columns(
        ["a.flac", "s.tar", "s.tar", "gone.wav", "gone.tar"],
        root=tmp_path,
        keys=list("abcde"),
        offsets=[0, 512, 4096, 0, 512],
        sizes=[-1, 3000, MAX_WHOLE + 1, -1, 100],
    )
    asked = []
    monkeypatch.setattr("os.posix_fadvise", lambda descriptor, offset, size, what: asked.append((offset, size)))
    announce(table, np.arange(5), ShardFiles(tmp_path))
    assert asked == [(0, MAX_WHOLE), (512, 3000)]
