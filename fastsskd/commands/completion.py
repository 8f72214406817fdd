"""``fastsskd completion``: a script that completes commands, options and their choices."""

from __future__ import annotations

import argparse
from typing import Any

from fastsskd.commands.arguments import command

EXAMPLES = """
source <(fastsskd completion bash)
fastsskd completion zsh > ~/.fastsskd-completion.zsh
"""
SCRIPT = """\
_fastsskd() {{
    local current="${{COMP_WORDS[COMP_CWORD]}}" before="${{COMP_WORDS[COMP_CWORD-1]}}" words=""
    if [[ "$COMP_CWORD" -eq 1 ]]; then
        words="{commands} --help --version"
    elif [[ "$current" == -* ]]; then
        case "${{COMP_WORDS[1]}}" in
{options}
        esac
    else
        case "${{COMP_WORDS[1]}} $before" in
{choices}
        esac
    fi
    COMPREPLY=($(compgen -W "$words" -- "$current"))
}}
complete -o default -F _fastsskd fastsskd
"""
"""Where there is nothing of ours to offer, the shell completes names of files."""


def add(commands: Any) -> None:
    completion = command(commands, "completion", run, "a script that makes the shell complete this command", EXAMPLES)
    completion.add_argument("shell", choices=("bash", "zsh"))
    completion.set_defaults(parsers=commands.choices)


def run(args: argparse.Namespace) -> int:
    if args.shell == "zsh":
        print("autoload -U +X compinit && compinit -u\nautoload -U +X bashcompinit && bashcompinit")
    print(script(args.parsers), end="")
    return 0


def script(parsers: dict[str, argparse.ArgumentParser]) -> str:
    """For bash; zsh takes it through ``bashcompinit``.

    Args:
        parsers: of the commands, by name.
    """
    options, choices = [], []
    for name, parser in parsers.items():
        words = [text for action in parser._actions for text in action.option_strings]
        options.append(f'            {name}) words="{" ".join(words)}" ;;')
        for action in parser._actions:
            if action.choices is None:
                continue
            said = " ".join(map(str, action.choices))
            befores = action.option_strings or [name]
            choices += [f'            "{name} {before}") words="{said}" ;;' for before in befores]
    return SCRIPT.format(commands=" ".join(parsers), options="\n".join(options), choices="\n".join(choices))
