"""`fastsskd embed`: a .npy that NumPy reads, and the names of its rows."""

import json

import numpy as np
import pytest
from small_checkpoint import save_checkpoint, save_sound

from fastsskd import cli
from fastsskd.errors import InputError
from fastsskd.inference.npy_file import NpyFile


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("model"), classes=())  # features need no head


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    save_sound(folder / "a.wav", 0.9)
    save_sound(folder / "b.ogg", 2.4, 44100, seed=1)
    return folder


def embed(checkpoint, out, *arguments):
    return cli.main(["embed", "--checkpoint", str(checkpoint), *map(str, arguments), "--out", str(out), "--quiet"])


def rows_of(path):
    head, *lines = path.read_text().splitlines()
    assert head == "path\tstart\tend"
    return [line.split("\t") for line in lines]


@pytest.mark.parametrize(
    ("level", "shape", "spans"),
    [
        ("clip", (2, 64), [("0.000", "0.900"), ("0.000", "0.960")]),
        ("window", (4, 64), [("0.000", "0.900"), ("0.000", "0.960"), ("0.960", "1.920"), ("1.440", "2.400")]),
        ("frame", (2, 6, 64), [("0.000", "0.900"), ("0.000", "0.960")]),
        ("patch", (2, 48, 64), [("0.000", "0.900"), ("0.000", "0.960")]),
    ],
)
def test_each_level_has_its_shape_and_named_rows(checkpoint, clips, tmp_path, level, shape, spans):
    assert embed(checkpoint, tmp_path / "f.npy", clips, "--level", level) == 0
    found = np.load(tmp_path / "f.npy")
    assert found.shape == shape and found.dtype == np.float32 and np.isfinite(found).all()
    rows = rows_of(tmp_path / "f.tsv")
    assert [(start, end) for _, start, end in rows] == spans
    assert [name for name, *_ in rows] == [str(clips / "a.wav")] + [str(clips / "b.ogg")] * (shape[0] - 1)
    import fastsskd

    model = fastsskd.load(checkpoint, device="cpu")
    expected = [model.embed(clips / name, level=level) for name in ("a.wav", "b.ogg")]
    np.testing.assert_allclose(found, np.stack(expected) if level == "clip" else np.concatenate(expected), atol=1e-5)


def test_bad_files_are_left_out_and_named(checkpoint, clips, tmp_path, capsys):
    (tmp_path / "bad.wav").write_bytes(b"RIFF")
    assert embed(checkpoint, tmp_path / "f.npy", tmp_path / "bad.wav", clips / "a.wav", "--json") == 1
    captured = capsys.readouterr()
    said = json.loads(captured.out)
    assert said["shape"] == [1, 64] and said["files"] == [str(clips / "a.wav")] and "bad.wav: truncated" in captured.err
    assert np.load(tmp_path / "f.npy").shape == (1, 64) and len(rows_of(tmp_path / "f.tsv")) == 1


def test_nothing_usable_leaves_no_file(checkpoint, tmp_path, capsys):
    (tmp_path / "bad.wav").write_bytes(b"RIFF")
    assert embed(checkpoint, tmp_path / "f.npy", tmp_path / "bad.wav") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.wav"]
    assert "not written" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [(["--out", "f.txt"], 2, "end it with .npy"), (["--out", "no/such/folder/f.npy"], 1, "cannot be written")],
)
def test_a_file_that_cannot_be_written_is_one_line(checkpoint, clips, capsys, arguments, code, words):
    assert cli.main(["embed", "--checkpoint", str(checkpoint), str(clips / "a.wav"), *arguments]) == code
    assert words in capsys.readouterr().err


def test_several_checkpoints_have_no_features_in_common(checkpoint, clips, tmp_path, capsys):
    other = save_checkpoint(tmp_path / "other", classes=(), seed=1)
    assert embed(checkpoint, tmp_path / "f.npy", "--checkpoint", other, clips / "a.wav") == 2
    assert "give one checkpoint" in capsys.readouterr().err


@pytest.mark.parametrize("count", [1, 9, 10, 12345])
def test_a_growing_file_is_what_numpy_would_have_written(tmp_path, count):
    values = np.arange(count * 6, dtype=np.float32).reshape(count, 2, 3)
    with NpyFile(tmp_path / "a.npy", (2, 3)) as file:
        for part in np.array_split(values, 7):
            file.append(part)
        assert not (tmp_path / "a.npy").exists()
    np.testing.assert_array_equal(np.load(tmp_path / "a.npy"), values)
    np.testing.assert_array_equal(np.load(tmp_path / "a.npy", mmap_mode="r")[-1], values[-1])


def test_an_error_leaves_the_old_file(tmp_path):
    np.save(tmp_path / "a.npy", np.ones(3, np.float32))
    with pytest.raises(InputError), NpyFile(tmp_path / "a.npy", (2,)) as file:
        file.append(np.zeros((1, 2)))
        raise InputError("disk full")
    assert [path.name for path in tmp_path.iterdir()] == ["a.npy"]
    np.testing.assert_array_equal(np.load(tmp_path / "a.npy"), np.ones(3))
