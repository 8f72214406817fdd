"""What a user names: files, folders, lists, stdin; and samples in memory."""

import io
import os
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
from small_checkpoint import save_sound

from fastsskd import manifest
from fastsskd.audio.info import BadClip
from fastsskd.inference import sources
from fastsskd.inference.sources import Samples, find
from fastsskd.layouts import index as layouts


@pytest.fixture
def folder(tmp_path):
    for name in ("dog/a.wav", "dog/deep/b.flac", "cat/c.ogg"):
        save_sound(tmp_path / "clips" / name, 0.5)
    (tmp_path / "clips" / "readme.txt").write_text("not audio")
    return tmp_path / "clips"


def names(arguments):
    return [source.name for source in find(arguments)]


def pipe(monkeypatch, data: bytes):
    monkeypatch.setattr(sources.sys, "stdin", SimpleNamespace(buffer=io.BufferedReader(io.BytesIO(data))))


def test_a_folder_is_all_audio_below_it_in_order(folder):
    assert names([folder]) == [str(folder / name) for name in ("cat/c.ogg", "dog/a.wav", "dog/deep/b.flac")]


def test_a_manifest_is_its_clips_with_their_segments_and_reasons(folder, tmp_path):
    table = layouts.build(folder)
    manifest.save(table.mark({0: "too loud"}), tmp_path / "t.manifest")
    found = list(find([tmp_path / "t.manifest"]))
    assert [source.name for source in found] == [table.key(i) for i in range(3)]
    with pytest.raises(BadClip, match="too loud"):
        next(found[0].open())
    (tmp_path / "list.csv").write_text(f"path,start,end\n{folder}/dog/a.wav,0.1,0.3\n")
    (segment,) = find([tmp_path / "list.csv"])
    whole = np.concatenate(list(next(find([folder / "dog/a.wav"])).open()))
    np.testing.assert_array_equal(np.concatenate(list(segment.open())), whole[1600:4800])


def test_a_manifest_is_known_by_its_content(folder, tmp_path):
    manifest.save(layouts.build(folder), tmp_path / "table.bin")
    assert len(names([tmp_path / "table.bin"])) == 3


def test_a_broken_list_is_one_bad_recording_and_the_others_are_found(folder, tmp_path):
    (tmp_path / "broken.manifest").write_bytes(b"ARROW1" + b"x" * 100)
    (tmp_path / "empty").mkdir()
    found = list(find([tmp_path / "broken.manifest", tmp_path / "empty", folder / "dog/a.wav", ""]))
    assert [bool(source.bad) for source in found] == [True, True, False, True]
    assert "no audio file found" in found[1].bad and str(tmp_path) not in found[1].bad


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b""])
def test_stdin_with_text_is_a_list_of_paths(folder, monkeypatch, end):
    lines = [os.fsencode(folder / "dog/a.wav"), b"", os.fsencode(folder / "cat")]
    pipe(monkeypatch, (b"\r\n" if end == b"\r\n" else b"\n").join(lines) + end)
    assert names(["-"]) == [str(folder / "dog/a.wav"), str(folder / "cat/c.ogg")]


@pytest.mark.parametrize("name", ["dog/a.wav", "dog/deep/b.flac", "cat/c.ogg"])
def test_stdin_with_audio_is_one_recording(folder, monkeypatch, name):
    pipe(monkeypatch, (folder / name).read_bytes())
    (source,) = find(["-"])
    expected = np.concatenate(list(next(find([folder / name])).open()))
    np.testing.assert_array_equal(np.concatenate(list(source.open())), expected)
    kept = source.path
    assert kept.exists()
    del source
    assert not kept.exists()  # nothing is left behind


def test_empty_stdin_is_bad_and_says_what_to_do(monkeypatch):
    pipe(monkeypatch, b"")
    (source,) = find(["-"])
    with pytest.raises(BadClip, match="nothing came on stdin"):
        next(source.open())


@pytest.mark.parametrize(("rate", "channels"), [(16000, 1), (44100, 2), (8000, 3)])
def test_samples_in_memory_are_those_of_the_file(tmp_path, rate, channels):
    path = save_sound(tmp_path / "a.wav", 0.7, rate, channels=channels)
    values, _ = soundfile.read(path, dtype="int16")
    from_file = np.concatenate(list(next(find([path])).open()))
    for samples in (values, values / np.float32(32768)):
        np.testing.assert_allclose(np.concatenate(list(Samples("x", samples, rate).open())), from_file, atol=1e-6)


@pytest.mark.parametrize(
    ("samples", "rate", "words"),
    [
        (np.zeros((2, 48000)), 48000, r"shape \(2, 48000\)"),
        (np.zeros(0), 16000, "shape"),
        (np.zeros(100, np.int64), 16000, "int64"),
        (np.full(100, np.nan), 16000, "NaN"),
        (np.zeros(100), 1, "1 Hz"),
    ],
)
def test_samples_that_are_none_are_refused_in_words(samples, rate, words):
    with pytest.raises(BadClip, match=words):
        next(Samples("x", samples, rate).open())
