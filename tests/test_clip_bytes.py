"""Bytes of clips, wherever they lie."""

import gc
import os

import pytest

from fastsskd.audio.file import BadClip
from fastsskd.clip_bytes import HEAD, OPEN_SHARDS, ClipBytes, OpenFile, ShardFiles

DATA = bytes(range(256)) * 20


@pytest.fixture
def file(tmp_path):
    (tmp_path / "shard.tar").write_bytes(DATA)
    return OpenFile(tmp_path / "shard.tar")


@pytest.mark.parametrize(("offset", "size"), [(0, -1), (100, -1), (100, 3000), (5000, 120), (0, 0), (len(DATA), -1)])
def test_slices_are_those_of_the_bytes(file, offset, size):
    clip = ClipBytes(file, offset, size)
    expected = DATA[offset:] if size < 0 else DATA[offset : offset + size]
    assert len(clip) == len(expected) and clip.read().tobytes() == expected
    for start, stop in ((0, 4), (8, 12), (HEAD - 3, HEAD + 3), (2000, 2010), (0, 10**9), (7, 3)):
        assert clip[start:stop] == expected[start:stop]
    if len(expected) > 50:
        buffer = bytearray(10)
        clip.read_into(buffer, 33)
        assert buffer == expected[33:43]


def test_a_file_that_ends_too_early_is_said(file):
    clip = ClipBytes(file, 4000, 5000)
    assert clip[0:4] == DATA[4000:4004]
    with pytest.raises(BadClip, match=r"truncated: shard\.tar ends \d+ bytes before the clip does"):
        clip.read()


def test_clip_that_begins_behind_the_end(file):
    with pytest.raises(BadClip, match="ends 10 bytes before"):
        ClipBytes(file, len(DATA) + 5, 10)


def test_shards_stay_open_up_to_a_number(tmp_path):
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    shards = ShardFiles(tmp_path)
    for number in range(OPEN_SHARDS + 50):
        (tmp_path / f"{number}.tar").write_bytes(b"x" * 10)
        assert ClipBytes(shards.open(f"{number}.tar"), 0, 10).read().tobytes() == b"x" * 10
    assert shards.open(f"{number}.tar") is shards.open(f"{number}.tar")
    assert len(os.listdir("/proc/self/fd")) <= before + OPEN_SHARDS
    del shards
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before


def test_missing_files_and_folders(tmp_path):
    with pytest.raises(FileNotFoundError):
        OpenFile(tmp_path / "none.wav")
    with pytest.raises(OSError, match="Is a directory"):
        ClipBytes(OpenFile(tmp_path), 0, 10)
