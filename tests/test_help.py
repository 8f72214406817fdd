"""The commands' help and completion: examples that parse, every option completed, and fast."""

import argparse
import re
import shlex
import shutil
import subprocess
import sys

import pytest

from fastsskd import cli, config_help
from fastsskd.commands import completion

PARSERS = next(a for a in cli._parser()._actions if isinstance(a, argparse._SubParsersAction)).choices


def examples(parser: argparse.ArgumentParser) -> list[list[str]]:
    """Arguments of each `fastsskd` line below "examples:"; what the shell does with its output is left out."""
    _, _, text = (parser.epilog or "").partition("examples:\n")
    lines = [re.sub(r"^source <\((.*)\)$", r"\1", line.strip()) for line in text.splitlines()]
    return [shlex.split(re.split(r" [>|] ", line)[0])[1:] for line in lines if line.startswith("fastsskd ")]


@pytest.mark.parametrize("name", PARSERS)
def test_help_ends_with_examples_that_parse(name):
    found = examples(PARSERS[name])
    assert found, f"fastsskd {name} --help has no example"
    assert PARSERS[name].format_help().rstrip().endswith(PARSERS[name].epilog.rstrip())
    for arguments in found:
        assert arguments[0] == name
        assert cli._parser().parse_args(arguments).run is not None


@pytest.mark.parametrize("name", PARSERS)
def test_every_argument_is_explained(name):
    silent = [a.dest for a in PARSERS[name]._actions if a.option_strings and not a.help and a.dest != "seed"]
    assert silent == []


def completed(*words: str) -> list[str]:
    """What bash offers after `fastsskd` and these words, the last of which is being typed."""
    line = " ".join(f"'{word}'" for word in ("fastsskd", *words))
    code = f'COMP_WORDS=({line}); COMP_CWORD={len(words)}; _fastsskd; printf "%s\\n" "${{COMPREPLY[@]}}"'
    done = subprocess.run(
        ["bash", "-c", completion.script(PARSERS) + code], capture_output=True, text=True, check=True, timeout=30
    )
    return done.stdout.split()


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
def test_bash_completes_commands_options_and_choices():
    assert set(completed("")) == {*PARSERS, "--help", "--version"}
    assert completed("pre") == ["predict"]
    assert set(completed("predict", "--c")) == {"--checkpoint", "--csv"}
    assert completed("embed", "--level", "fr") == ["frame"]
    assert set(completed("pack", "--encoding", "")) == {"pcm16", "float32", "flac"}
    assert set(completed("completion", "")) == {"bash", "zsh"}
    assert completed("predict", "a") == []  # the shell's own names of files
    for name, parser in PARSERS.items():
        assert set(completed(name, "--")) == {o for a in parser._actions for o in a.option_strings if o[:2] == "--"}


@pytest.mark.skipif(shutil.which("zsh") is None, reason="no zsh")
def test_zsh_takes_the_script(capsys):
    assert cli.main(["completion", "zsh"]) == 0
    subprocess.run(["zsh", "-f", "-c", capsys.readouterr().out], check=True, timeout=30)


def test_zsh_loads_what_bash_has(capsys):
    assert cli.main(["completion", "zsh"]) == 0
    zsh = capsys.readouterr().out
    assert cli.main(["completion", "bash"]) == 0
    assert zsh.endswith(capsys.readouterr().out) and "bashcompinit" in zsh


def test_the_help_of_training_has_every_field_with_its_limits():
    text = " ".join(config_help.describe().split())
    assert "[mask] intra_max_share = 0.5 (0 to 1) intra view: at most this share" in text
    assert 'hog_form = "gaussian" (gaussian | printed) gaussian =' in text
    assert "keep_checkpoints = 2 (at least 2)" in text


def test_no_command_imports_torch_for_its_help():
    code = (
        "import sys\nfrom fastsskd import cli\n"
        "for name in (None, 'predict', 'evaluate'):\n"
        "    try: cli.main([*([name] if name else []), '--help'])\n"
        "    except SystemExit: pass\n"
        "assert not {'torch', 'numba', 'pyarrow'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, stdout=subprocess.DEVNULL)
