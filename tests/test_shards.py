"""Packed clips as files, their names, and shards that are there whole or not at all."""

import errno
import io
import os
import re
import tarfile
import tempfile

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
import soundfile

from fastsskd.audio import encoding as clip_encoding
from fastsskd.audio.encoding import encode
from fastsskd.audio.file import probe
from fastsskd.audio.info import BadClip
from fastsskd.pack import shards
from fastsskd.pack.shards import ShardIndex, ShardWriter, member_stems, read_index

STEPS = np.random.default_rng(0).integers(-32768, 32768, 50_000)
"""16-bit samples."""


def encoded(tmp_path, samples, encoding="pcm16"):
    """The file of a packed clip, its samples as soundfile reads them, and whether it is stored as float32."""
    clip = encode(np.split(np.asarray(samples, np.float32), [len(samples) // 3]), encoding, tmp_path)
    data = b"".join(clip.file.chunks())
    assert len(data) == clip.size and clip.num_samples == len(samples)
    info = probe(data)
    assert (info.format, info.sample_rate, info.channels, info.num_frames) == (clip.suffix, 16_000, 1, len(samples))
    read, _ = soundfile.read(io.BytesIO(data), dtype="float32")
    return data, read, clip.is_float


# ---------------------------------------------------------------------------------------------------------- encodings


@pytest.mark.parametrize("encoding", ["pcm16", "flac", "float32"])
def test_16_bits_come_out_as_they_went_in(tmp_path, encoding):
    data, read, is_float = encoded(tmp_path, STEPS / 32768, encoding)
    np.testing.assert_array_equal(read * 32768, STEPS)
    assert is_float == (encoding == "float32") and data == encoded(tmp_path, STEPS / 32768, encoding)[0]


def test_the_header_is_the_usual_one(tmp_path):
    with io.BytesIO() as file:
        soundfile.write(file, STEPS.astype(np.int16), 16_000, format="WAV", subtype="PCM_16")
        assert encoded(tmp_path, STEPS / 32768)[0] == file.getvalue()


@pytest.mark.parametrize("encoding", ["pcm16", "flac"])
@pytest.mark.parametrize(
    ("peak", "is_float"), [(0.5, False), (1.0, False), (1.00001, False), (1.00002, True), (3e4, True), (3e-3, True)]
)
def test_what_16_bits_would_change_is_float32(tmp_path, encoding, peak, is_float):
    samples = np.float32(peak) * np.sin(np.arange(3000) / 7).astype(np.float32)
    samples[100] = peak
    _, read, as_float = encoded(tmp_path, samples, encoding)
    assert as_float == is_float
    np.testing.assert_allclose(read, samples, atol=0 if is_float else 1.5 / 32768)


def test_a_quiet_clip_that_has_16_bits_keeps_them(tmp_path):
    for steps in (np.zeros(1000), np.arange(1000) % 5 - 2):
        _, read, is_float = encoded(tmp_path, steps / 32768)
        assert not is_float
        np.testing.assert_array_equal(read * 32768, steps)


def test_long_clips_go_through_files_without_a_name(tmp_path, monkeypatch):
    small = encoded(tmp_path, STEPS / 32768)[0], encoded(tmp_path, STEPS / 32768, "flac")[0]
    monkeypatch.setattr(clip_encoding, "IN_MEMORY", 10_000)
    monkeypatch.setattr(clip_encoding, "CHUNK", 4_000)
    assert (encoded(tmp_path, STEPS / 32768)[0], encoded(tmp_path, STEPS / 32768, "flac")[0]) == small
    assert list(tmp_path.iterdir()) == []


def test_too_long_for_a_wav_file(tmp_path, monkeypatch):
    monkeypatch.setattr(clip_encoding, "LARGEST_WAV", 90_000)
    with pytest.raises(BadClip, match="more than a WAV file can hold"):
        encoded(tmp_path, STEPS / 32768)


@pytest.mark.parametrize("encoding", ["pcm16", "flac"])
def test_a_full_disk_is_not_the_clips_fault(tmp_path, monkeypatch, encoding, capfd):
    calls, write = [], tempfile.SpooledTemporaryFile.write

    def full(self, data):
        calls.append(data)
        if len(calls) > 2:  # the second file, which libsndfile writes
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(self, data)

    monkeypatch.setattr(tempfile.SpooledTemporaryFile, "write", full)
    with pytest.raises(OSError, match="No space left"):
        encode([np.zeros(100, np.float32)] * 2, encoding, tmp_path)
    assert capfd.readouterr().err == ""


# -------------------------------------------------------------------------------------------------------------- names


def test_stems_are_unique_and_have_no_dot():
    keys = ["a/b.c/d.e.WAV", "/abs/x.mp3", "ü/ж 1.flac", "x" * 300 + ".wav", "no_suffix", "v1.0", ".hidden.wav", ".wav"]
    keys += ["../up/x.ogg", "__meta__/x.wav", "line\nbreak.wav", "tab\t.wav", "nul\0.wav", "a/", "dir/.wav"]
    stems = member_stems(pa.array(keys)).to_pylist()
    assert stems[:8] == ["a/b_c/d_e", "abs/x", "ü/ж 1", "x" * 300, "no_suffix", "v1_0", "_hidden", "clip"]
    assert stems[8:] == ["__/up/x", "_meta__/x", "line_break", "tab_", "nul_", "a", "dir"]


def test_stems_that_would_be_equal_get_their_row():
    keys = ["a.wav", "b.wav", "a.flac", "a-0", "a_b", "a.b", "a-2.ogg"]
    stems = member_stems(pa.array(keys)).to_pylist()
    assert stems[1] == "b" and len(set(stems)) == len(keys)
    assert stems[2].startswith("a-2") and stems[4:6] == ["a_b-4", "a_b-5"]


def test_stems_of_many_clips():
    numbers = pa.array(np.arange(300_000)).cast(pa.string())
    stems = member_stems(pc.binary_join_element_wise("unbalanced/Y", numbers, ".flac", ""))
    assert len(stems) == 300_000 and stems[299_999].as_py() == "unbalanced/Y299999"


# -------------------------------------------------------------------------------------------------------------- shards


@pytest.fixture
def out(tmp_path):
    (tmp_path / shards.WORK).mkdir()
    return tmp_path


def write(out, number, members):
    writer, index = ShardWriter(out, number), ShardIndex(begin=0)
    for row, (name, data) in enumerate(members.items()):
        index.offsets.append(writer.add(name, len(data), [data[:5], data[5:]]))
        index.sizes.append(len(data))
        index.rows.append(row)
    writer.commit(index)
    return index


def test_a_shard_is_a_tar_file_and_offsets_point_into_it(out):
    long = "folder/" * 40 + "n" * 90
    members = {"a.wav": b"x" * 1000, f"{long}.wav": b"", "ж/ü.json": b"{}", "b.cls": b"7" * 512}
    index = write(out, 3, members)
    raw = (out / "shard-000003.tar").read_bytes()
    assert len(raw) == index.tar_size and len(raw) % tarfile.RECORDSIZE == 0
    with tarfile.open(out / "shard-000003.tar") as tar:
        assert tar.getnames() == list(members)
        for member, data in zip(tar, members.values(), strict=True):
            assert tar.extractfile(member).read() == data
            assert (member.mtime, member.uid, member.gid, member.uname, member.mode) == (0, 0, 0, "", 0o644)
    for offset, size, data in zip(index.offsets, index.sizes, members.values(), strict=True):
        assert raw[offset : offset + size] == data and offset % 512 == 0
    assert read_index(out, 3) == index
    assert sorted(path.name for path in (out / shards.WORK).iterdir()) == ["shard-000003.tar.json"]


def test_a_shard_counts_only_with_its_index_and_its_size(out):
    write(out, 0, {"a.wav": b"x" * 1000})
    tar, index = out / "shard-000000.tar", out / shards.WORK / "shard-000000.tar.json"
    whole, text = tar.read_bytes(), index.read_text()
    assert read_index(out, 1) is None
    for damage in (lambda: tar.write_bytes(whole[:-1]), tar.unlink):
        damage()
        assert read_index(out, 0) is None
    tar.write_bytes(whole)
    for other in ("", text[:20], "[]", "{}", text.replace("rows", "lines")):
        index.write_text(other)
        assert read_index(out, 0) is None
    index.write_text(text)
    assert read_index(out, 0).sizes == [1000]


def test_a_shard_that_is_not_finished_is_not_there(out):
    writer = ShardWriter(out, 0)
    writer.add("a.wav", 3, [b"abc"])
    assert [path.name for path in out.iterdir()] == [shards.WORK]
    writer.discard()
    assert os.listdir(out / shards.WORK) == []


def test_a_shard_without_clips_leaves_only_an_index(out):
    writer, index = ShardWriter(out, 0), ShardIndex(begin=4, rejected={4: "empty file", 9: "no samples in it"})
    writer.commit(index)
    assert os.listdir(out) == [shards.WORK] and os.listdir(out / shards.WORK) == ["shard-000000.tar.json"]
    assert read_index(out, 0) == index and index.end == 6


def test_what_is_written_whole_is_never_seen_in_parts(out, monkeypatch):
    shards.write_whole(out, out / "a.txt", "first")

    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space left"):
        shards.write_whole(out, out / "a.txt", "second")
    assert (out / "a.txt").read_text() == "first"


def test_names_cannot_be_taken_for_other_shards():
    assert re.fullmatch(r"shard-\d{6}\.tar", shards.shard_name(7))
