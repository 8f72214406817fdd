"""Checkpoints on disk: whole or not there, newest first, and none is trusted that changed."""

import errno
import json
import os
from dataclasses import asdict

import engines
import pytest
import torch

from fastsskd import checkpoint, engine_state
from fastsskd.checkpoint import Progress
from fastsskd.errors import SharedError

STAGE = "iter1-ssl"


def progress(step, stage=STAGE) -> Progress:
    return Progress(stage, step, step, {"epoch": 1}, 8, 1, 0, "fp32", {"select": "best", "value": 0.1})


@pytest.fixture
def saved(tmp_path):
    """Folder with the checkpoints of steps 1 and 2, and the engine that wrote them."""
    engine = engines.Plain(steps=1)
    for step in (1, 2):
        checkpoint.save(engine, tmp_path, progress(step), 2, {"kept": torch.arange(3.0) + step})
    return tmp_path, engine


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_what_was_saved_comes_back(saved):
    folder, engine = saved
    path, about = checkpoint.newest(folder, STAGE)
    assert path.name == "step-00000002" and about == progress(2)
    assert names(path) == ["engine-00001-of-00001.safetensors", "extra.safetensors", "manifest.json"]
    fresh = engines.Plain(steps=0)
    extra = checkpoint.restore(fresh, path)
    assert torch.equal(extra["kept"], torch.tensor([2.0, 3.0, 4.0]))
    assert torch.equal(fresh.module["p0"], engine.module["p0"])


def test_weights_kept_aside_are_optional(tmp_path):
    engine = engines.Plain()
    assert checkpoint.restore(engine, checkpoint.save(engine, tmp_path, progress(1), 2)) == {}


def test_the_oldest_go_and_what_killed_runs_began(saved):
    folder, engine = saved
    (folder / "tmp-step-00000007").mkdir()
    checkpoint.save(engine, folder, progress(3), 2)
    assert names(folder) == ["step-00000002", "step-00000003"]
    checkpoint.save(engine, folder, progress(3), 2)  # again, as after a resume
    assert names(folder) == ["step-00000002", "step-00000003"]


def test_a_stage_has_its_own_checkpoints(saved):
    folder, _ = saved
    assert checkpoint.newest(folder, "iter1-distill") is None
    assert checkpoint.newest(folder / "none", STAGE) is None


def truncate(file):
    os.truncate(file, file.stat().st_size // 2)


def flip(file):
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


DAMAGE = {"truncated": truncate, "missing": lambda file: file.unlink(), "bit-flipped": flip}
FILES = ["engine-00001-of-00001.safetensors", "extra.safetensors", "manifest.json"]


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_one_is_named_and_left_for_the_one_before(saved, capsys, name, damage):
    folder, engine = saved
    damage(folder / "step-00000002" / name)
    path, about = checkpoint.newest(folder, STAGE)
    assert path.name == "step-00000001" and about == progress(1)
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "step-00000002" in said and name in said and f"falling back to {path}" in said
    assert names(folder) == ["damaged-step-00000002", "step-00000001"]
    checkpoint.save(engine, folder, progress(3), 2, {"kept": torch.zeros(3)})
    assert names(folder) == ["step-00000001", "step-00000003"]
    assert checkpoint.newest(folder, STAGE)[0].name == "step-00000003"
    damage(folder / "step-00000001" / name)
    damage(folder / "step-00000003" / name)
    with pytest.raises(SharedError, match=r"no checkpoint in .* is whole") as caught:
        checkpoint.newest(folder, STAGE)
    assert "\n" not in str(caught.value)


def test_every_bit_of_the_manifest_is_watched(saved):
    """A step or a position that is off by one would train on, wrongly."""
    folder, _ = saved
    file = folder / "step-00000002" / "manifest.json"
    data = file.read_bytes()
    for place in range(0, len(data), 7):
        file.write_bytes(data[:place] + bytes([data[place] ^ 4]) + data[place + 1 :])
        about, problem = checkpoint._read_manifest(file.parent)
        assert problem or Progress(**{name: about[name] for name in asdict(progress(2))}) == progress(2), place


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"format": 1, "stage": "iter1-ssl", "files": {}}'])
def test_a_manifest_of_something_else_is_not_believed(saved, content):
    folder, _ = saved
    (folder / "step-00000002" / "manifest.json").write_text(content)
    assert checkpoint.newest(folder, STAGE)[0].name == "step-00000001"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
@pytest.mark.parametrize("function", ["fastsskd.engine_state.save_file", "fastsskd.checkpoint.os.fsync"])
def test_a_full_disk_leaves_the_older_ones(saved, monkeypatch, function, number):
    folder, engine = saved

    def full(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(function, full)
    with pytest.raises(SharedError) as caught:
        checkpoint.save(engine, folder, progress(3), 2)
    text = str(caught.value)
    assert f"rank 0: {os.strerror(number)}" in text and "step-00000003" in text and "make room" in text
    assert names(folder) == ["step-00000001", "step-00000002"]
    assert checkpoint.newest(folder, STAGE)[1] == progress(2)


def test_another_ranks_trouble_is_everybody_s(saved, monkeypatch):
    """This rank could write; the checkpoint still must not appear."""
    folder, engine = saved
    monkeypatch.setattr(checkpoint.distributed, "gather_objects", lambda own: [own, (None, "No space left on device")])
    with pytest.raises(SharedError, match="rank 1: No space left on device"):
        checkpoint.save(engine, folder, progress(3), 2)
    assert names(folder) == ["step-00000001", "step-00000002"]


def test_the_state_of_other_parameters_is_refused_naming_the_checkpoint(saved):
    folder, _ = saved
    path, _ = checkpoint.newest(folder, STAGE)
    with pytest.raises(engine_state.InputError, match=f"checkpoint {path}: it holds other parameters"):
        checkpoint.restore(engines.Plain(sizes=(6,)), path)


def test_what_is_written_is_json_and_safetensors_alone(saved):
    folder, _ = saved
    for file in folder.glob("*/*"):
        if file.suffix == ".json":
            json.loads(file.read_text())
        else:
            assert file.suffix == ".safetensors" and file.read_bytes()[8:9] == b"{"
