"""What the commands' arguments have in common."""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Callable
from typing import Any

from fastsskd.errors import UsageError


def command(
    commands: Any, name: str, run: Callable[[argparse.Namespace], int], text: str, examples: str = ""
) -> argparse.ArgumentParser:
    """The parser of one command.

    Args:
        run: gets the arguments and returns the exit code.
        text: what the command does; a line.
        examples: command lines, one a line, that its help ends with.
    """
    parser = commands.add_parser(
        name,
        help=text,
        description=text[0].upper() + text[1:] + ".",
        epilog="examples:\n" + textwrap.indent(examples.strip(), "  ") if examples else None,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    return parser


def device(name: str | None) -> str:
    """The device that the user names; without a name a GPU if there is one. Imports torch.

    Raises:
        UsageError: torch does not know the name, or finds no GPU.
    """
    import torch

    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        kind = torch.device(name).type
    except RuntimeError:
        kind = ""
    if kind not in ("cpu", "cuda"):
        raise UsageError(f"--device {name}: choose cpu, cuda or cuda:N")
    if kind == "cuda" and not torch.cuda.is_available():
        raise UsageError(f"--device {name}: torch finds no GPU here; leave it out to use the CPU")
    return name


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value


def natural(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text} is less than 0")
    return value


def megabytes(text: str) -> float:
    value = float(text)
    if not 0 < value < 1e9:
        raise argparse.ArgumentTypeError(f"{text} is not a size in MB")
    return value


def share(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not a share of 0 to 1")
    return value
