"""Plain clips in shards: the same rows as any other way gives, and none of a clip that is not plain."""

import os

import damaged_audio
import numpy as np
import pytest
import torch

import fastsskd_kernels as kernels
from fastsskd.clip_bytes import ShardFiles
from fastsskd.clip_columns import from_columns
from fastsskd.loader import Loader
from fastsskd.packed_clips import PackedClips

NUM_SAMPLES, NUM_FRAMES = 15360, 96
NORM = {"mean": -4.0, "std": 4.5}


def wav(samples: np.ndarray, rate: int = 16000, subtype: str = "PCM_16") -> bytes:
    return damaged_audio.encode(samples.astype(np.float32), rate, "WAV", subtype)


def noise(length: int, channels: int = 1) -> np.ndarray:
    samples = np.random.default_rng(length).uniform(-0.5, 0.5, (length, channels))
    return samples[:, 0] if channels == 1 else samples


def changed(data: bytes, at: int, value: int) -> bytes:
    return data[:at] + value.to_bytes(4, "little") + data[at + 4 :]


GOOD = wav(noise(40000))
PLAIN = {
    "long": GOOD,
    "exact": wav(noise(NUM_SAMPLES)),
    "one more": wav(noise(NUM_SAMPLES + 1)),
    "one less": wav(noise(NUM_SAMPLES - 1)),
    "short": wav(noise(7001)),
    "64 rounds": wav(noise(NUM_SAMPLES // 64)),
    "any bytes a second": changed(GOOD, 28, 7),
}
OTHER = {
    "one sample": wav(noise(1)),
    "no samples": GOOD[:44],
    "stereo": wav(noise(40000, 2)),
    "8 kHz": wav(noise(40000), 8000),
    "24 bits": wav(noise(40000), subtype="PCM_24"),
    "float": wav(noise(40000), subtype="FLOAT"),
    "flac": damaged_audio.encode(noise(40000).astype(np.float32), 16000, "FLAC", "PCM_16"),
    "RIFF size": changed(GOOD, 4, len(GOOD)),
    "data size": changed(GOOD, 40, len(GOOD) - 46),
    "a chunk more": GOOD[:36] + b"LIST\4\0\0\0abcd" + GOOD[36:],
    "not audio": b"\0" * len(GOOD),
    "tiny": b"RIFF",
}


@pytest.fixture
def shard(tmp_path):
    """A file of all clips one after the other, cut short inside a last good one; a manifest of them; their names."""
    clips = {**PLAIN, **OTHER, "cut short": GOOD}
    sizes = np.array([len(data) for data in clips.values()])
    data = b"".join(clips.values())
    (tmp_path / "a.tar").write_bytes(b"tar header" + data[: 300 - len(GOOD)])
    offsets = 10 + np.concatenate([[0], np.cumsum(sizes)[:-1]])
    table = from_columns(["a.tar"] * len(clips), keys=list(clips), offsets=offsets, sizes=sizes, root=tmp_path)
    return table, list(clips)


def packed_of(table):
    return PackedClips(table, ShardFiles(table.root), num_samples=NUM_SAMPLES, num_frames=NUM_FRAMES, **NORM)


def rows(count):
    return torch.full((count, NUM_FRAMES, 128), 7.0), torch.full((count, 48), 7.0)


@pytest.mark.parametrize("position", [0.0, 0.37, 0.999999])
def test_rows_of_plain_clips_are_those_of_their_crops(shard, position):
    table, names = shard
    out = rows(len(names))
    done = packed_of(table).fill(np.arange(len(names)), np.full(len(names), position), *out)
    assert [name for name, filled in zip(names, done, strict=True) if filled] == list(PLAIN)
    for row, name in enumerate(names):
        if name not in PLAIN:
            assert (out[0][row] == 7).all() and (out[1][row] == 7).all()
            continue
        samples = np.frombuffer(PLAIN[name][44:], np.int16)
        start = kernels.crop_start(position, len(samples), NUM_SAMPLES)
        crop = kernels.crop_or_loop(samples, NUM_SAMPLES, start)
        fbank, hog = kernels.features(torch.from_numpy(crop)[None], num_frames=NUM_FRAMES, **NORM)
        assert torch.equal(out[0][row], fbank[0]) and torch.equal(out[1][row], hog[0])


def test_a_segment_a_bad_clip_a_file_of_its_own_and_a_shard_that_is_gone_are_left(tmp_path):
    for name in ("a.tar", "b.tar", "c.wav"):
        (tmp_path / name).write_bytes(GOOD)
    columns = {"sizes": [len(GOOD)] * 5 + [-1], "offsets": [0] * 6, "keys": list("012345")}
    columns |= {"starts": [0, 0.1, 0, 0, 0, 0], "ends": [-1, -1, 1.5, -1, -1, -1], "root": tmp_path}
    table = from_columns(["a.tar", "a.tar", "a.tar", "a.tar", "b.tar", "c.wav"], **columns).mark({3: "too loud"})
    os.remove(tmp_path / "b.tar")
    assert packed_of(table).fill(np.arange(6), np.zeros(6), *rows(6)).tolist() == [True] + [False] * 5
    assert packed_of(table).fill(np.array([5]), np.zeros(1), *rows(1)).tolist() == [False]


def test_the_loader_gives_the_same_without_it(shard, monkeypatch):
    table, _ = shard

    def epoch(**options):
        loader = Loader(table, batch_size=5, seconds=0.96, train=True, seed=3, max_bad=10, **options)
        got = [(batch.key, batch.fbank.clone(), batch.hog.clone(), batch.seed.clone()) for batch in loader]
        loader.close()
        return got, loader.skipped

    filled, fill = [], PackedClips.fill
    monkeypatch.setattr(PackedClips, "fill", lambda *args: filled.append(fill(*args)) or filled[-1])
    found, skipped = epoch(workers=2)
    assert sum(part.sum() for part in filled) >= len(PLAIN)  # those of the next epoch are on their way
    assert skipped.keys() == {"not audio", "tiny", "no samples", "cut short"}
    monkeypatch.setattr(PackedClips, "fill", lambda self, index, *rest: np.zeros(len(index), bool))
    other, also_skipped = epoch(workers=1)
    assert skipped == also_skipped and len(found) == len(other)
    for mine, theirs in zip(found, other, strict=True):
        assert mine[0] == theirs[0] and all(map(torch.equal, mine[1:], theirs[1:]))


def test_what_does_not_fit_is_refused():
    nothing = np.zeros(0, np.int64)
    settings = {"num_samples": NUM_SAMPLES, "num_frames": NUM_FRAMES, **NORM, "out": rows(0)}
    memory = np.empty(kernels.wav_memory(NUM_SAMPLES), np.uint8)

    def call(**changes):
        return kernels.wav_features(nothing, nothing, nothing, np.zeros(0), **{**settings, "memory": memory, **changes})

    assert call().shape == (0,)
    for wrong in ({"memory": memory[1:]}, {"std": 0.0}, {"out": rows(1)}, {"num_frames": 80}, {"num_samples": 200}):
        with pytest.raises(ValueError):
            call(**wrong)
