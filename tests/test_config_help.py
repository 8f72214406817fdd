"""The JSON schema of the TOML: takes what config.py takes and refuses what it refuses, field by field."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest

from fastsskd import cli, config, config_help
from fastsskd.errors import UsageError

jsonschema = pytest.importorskip("jsonschema")
ROOT = Path(__file__).parents[1]
SECTIONS = {part.name: part.default_factory for part in dataclasses.fields(config.Config)}
FIELDS = [(name, item) for name, section in SECTIONS.items() for item in dataclasses.fields(section)]


@pytest.fixture(scope="module")
def schema():
    return jsonschema.Draft202012Validator(config_help.json_schema())


def test_it_is_a_schema(schema):
    schema.check_schema(schema.schema)
    assert schema.schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"


@pytest.mark.parametrize("preset", sorted((ROOT / "launch/configs").glob("*.toml")), ids=lambda path: path.stem)
def test_every_preset_is_valid(schema, preset):
    schema.validate(config.tomllib.loads(preset.read_text(encoding="utf-8")))
    resolved = config.tomllib.loads(config.to_toml(config.load(preset)))
    schema.validate(resolved)


def candidates(item):
    """Values in and out of the field's limits, and of other types."""
    low, high = item.metadata.get("low"), item.metadata.get("high")
    yield from (-7, 3, 0.5, 1e9, True, "", "no such choice", [], [1], [0.5], ["ssl"], ["ssl", 1], {})
    yield from item.metadata.get("choices", ())
    for limit in (low, high):
        if limit is not None:
            yield from (limit, limit - 1, limit + 1, float(limit) - 0.5, float(limit) + 0.25)


def in_config(section, item, value) -> bool:
    """Whether config.py takes the value for this field alone."""
    try:
        config._section(SECTIONS[section], section, {item.name: value}, "test")
    except UsageError:
        return False
    return True


@pytest.mark.parametrize(("section", "item"), FIELDS, ids=[f"{s}.{i.name}" for s, i in FIELDS])
def test_it_judges_each_field_as_the_loader_does(schema, section, item):
    for value in candidates(item):
        if isinstance(value, float) and value.is_integer() and item.type == "int":
            continue  # JSON knows no difference between 3 and 3.0
        assert schema.is_valid({section: {item.name: value}}) == in_config(section, item, value), value
    described = schema.schema["properties"][section]["properties"][item.name]
    assert described["description"] == item.metadata["doc"]
    schema.validate({section: {item.name: described["default"]}})


def test_unknown_sections_and_keys_are_refused(schema):
    for tree in ({"dta": {}}, {"data": {"manifst": "x"}}, {"seed": 1}, {"data": 3}):
        assert not schema.is_valid(tree)
        with pytest.raises(UsageError):
            config.from_dict(tree)


def test_the_command_prints_the_schema_and_resolved_configurations(capsys):
    assert cli.main(["config", "--schema"]) == 0
    assert json.loads(capsys.readouterr().out) == config_help.json_schema()
    preset = ROOT / "launch/configs/quickstart.toml"
    assert cli.main(["config", str(preset), "--set", "model.size=micro"]) == 0
    printed = config.from_dict(config.tomllib.loads(capsys.readouterr().out))
    assert printed == config.load(preset, ["model.size=micro"]) and printed.model.size == "micro"
    assert cli.main(["config"]) == 0
    assert config.from_dict(config.tomllib.loads(capsys.readouterr().out)) == config.Config()
    for arguments in (["--schema", str(preset)], ["--set", "run.seed=1"], [str(preset), "--set", "run.sed=1"]):
        assert cli.main(["config", *arguments]) == 2
        assert len(capsys.readouterr().err.strip().splitlines()) == 1


def test_train_prints_its_configuration_and_does_nothing_else(tmp_path):
    out = tmp_path / "run"
    command = [sys.executable, ROOT / "launch/train.py", "--config", ROOT / "launch/configs/esc50.toml"]
    command += ["--set", f'run.out="{out}"', "--set", "data.manifest=nowhere", "--print-config"]
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert done.returncode == 0 and done.stderr == "" and list(tmp_path.iterdir()) == []
    printed = config.from_dict(config.tomllib.loads(done.stdout))
    assert printed.run.out == str(out) and printed.data.manifest == "nowhere" and printed.recipe.iterations == 3
    done = subprocess.run([str(c) for c in command[:4]], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and "--ds_config" in done.stderr
