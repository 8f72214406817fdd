"""The commands as a user types them: exit codes, one line for bad input, nothing half-written."""

import json
import subprocess
import sys
from pathlib import Path

import damaged_audio
import pytest

from fastsskd import cli, manifest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def clips(tmp_path):
    """Six good clips in two classes, and a damaged one."""
    folder = tmp_path / "clips"
    for number in range(6):
        path = folder / ("dog", "cat")[number % 2] / f"{number}.wav"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(damaged_audio.encode(damaged_audio.tone(seed=number)))
    good = (folder / "dog" / "0.wav").read_bytes()
    (folder / "dog" / "cut.wav").write_bytes(good[: len(good) // 2])
    return folder


def fails(capsys, arguments, code=1):
    """Run a command that must fail with one line; returns that line."""
    assert cli.main([str(argument) for argument in arguments]) == code
    lines = [line for line in capsys.readouterr().err.strip().splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


def test_index_check_write_and_the_rest(clips, tmp_path, capsys):
    table = tmp_path / "clips.manifest"
    assert cli.main(["index", str(clips), "--out", str(table)]) == 0
    assert len(manifest.load(table)) == 7
    capsys.readouterr()
    assert cli.main(["check", str(table), "--json", "--write"]) == 1
    found = json.loads(capsys.readouterr().out)
    (key,) = found["bad"]
    assert found["num_clips"] == 7 and "cut" in key
    marked = manifest.load(table)
    assert [marked.key(i) for i in range(7) if marked.bad(i)] == [key]
    assert cli.main(["stats", str(table), "--seconds", "1"]) == 0
    stats = json.loads(capsys.readouterr().out)
    assert stats["num_clips"] == 6 and stats["std"] > 0 and stats["classes"] == {"cat": 3, "dog": 4}
    assert stats["sample_rates"] == {"44100": 6}


def test_check_of_good_clips_is_exit_code_0(clips, tmp_path, capsys):
    (clips / "dog" / "cut.wav").unlink()
    assert cli.main(["check", str(clips)]) == 0
    assert capsys.readouterr().out == ""


def test_statistics_are_those_of_the_features(clips, capsys):
    import torch

    from fastsskd.loader import Loader

    (clips / "dog" / "cut.wav").unlink()
    assert cli.main(["stats", str(clips), "--seconds", "1.6"]) == 0
    stats = json.loads(capsys.readouterr().out)
    loader = Loader(clips, batch_size=6, seconds=1.6, train=True, mean=0.0, std=0.5)
    (batch,) = list(loader)
    loader.close()
    values = batch.fbank[:, :158].double()
    assert stats["mean"] == pytest.approx(values.mean().item(), abs=1e-4)
    assert stats["std"] == pytest.approx(torch.std(values, unbiased=False).item(), abs=1e-4)


def test_bad_input_is_one_line(clips, tmp_path, capsys):
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "no such" in fails(capsys, ["index", tmp_path / "nowhere", "--out", tmp_path / "m"])
    fails(capsys, ["index", empty, "--out", tmp_path / "m"])
    assert not (tmp_path / "m").exists()
    fails(capsys, ["check", tmp_path / "nowhere"])
    fails(capsys, ["stats", tmp_path / "nowhere"])
    assert "no such file" in fails(capsys, ["evaluate", "--checkpoint", tmp_path / "none", clips])
    fails(capsys, ["evaluate", "--checkpoint", tmp_path / "none"], code=2)
    fails(capsys, ["stats", clips, "--seconds", "0"], code=2)


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["--set", "data.manifst=x"], 2, "did you mean manifest?"),
        (["--set", "data.seconds=ten"], 2, "data.seconds"),
        (["--set", "mask.inter_ratio=1.5"], 2, "out of range"),
        (["--config", "nowhere.toml"], 1, "nowhere.toml"),
        (["--ds_config", "nowhere.json"], 1, "nowhere.json"),
        (["--nonsense"], 2, "--nonsense"),
    ],
)
def test_train_refuses_bad_configuration_in_one_line(tmp_path, arguments, code, says):
    out = tmp_path / "run"
    base = ["--ds_config", ROOT / "launch/ds_config.json", "--config", ROOT / "launch/configs/quickstart.toml"]
    command = [sys.executable, ROOT / "launch/train.py", *base, "--set", f'run.out="{out}"', *arguments]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=120)
    assert done.returncode == code and says in done.stderr
    assert "Traceback" not in done.stderr and not out.exists()


@pytest.mark.parametrize("preset", sorted(path.name for path in (ROOT / "launch/configs").glob("*.toml")))
def test_every_preset_loads(preset):
    from fastsskd import config

    settings = config.load(ROOT / "launch/configs" / preset)
    if settings.model.size == "base" and "ssl" in settings.recipe.stages:  # the paper's numbers
        assert settings.recipe.iterations == 3 and settings.recipe.lr_decay == 0.8
        assert settings.ssl.lr == settings.distill.lr == 1.5e-4
        assert settings.mask.inter_ratio == 0.75


@pytest.mark.parametrize("name", sorted(path.name for path in (ROOT / "launch").glob("ds_config*.json")))
def test_every_deepspeed_file_loads(name):
    from fastsskd import ds_config

    tree = ds_config.load(ROOT / "launch" / name)
    sizes = ds_config.batch_sizes(tree, world_size=32 if "v100" in name else 1)
    small = {"ds_config_small.json": 16, "ds_config.json": 24, "ds_config_cpu_fp32.json": 24}
    assert sizes.total == small.get(name, 256)


def test_help_does_not_import_torch():
    code = "import sys; from fastsskd import cli; cli._parser(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
