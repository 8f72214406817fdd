"""The ``fastsskd`` command: parse, call, one line for an error. Heavy imports wait until a command needs them."""

from __future__ import annotations

import argparse
import sys

from fastsskd import __version__
from fastsskd.commands import (
    check,
    completion,
    config,
    embed,
    evaluate,
    export,
    index,
    pack,
    plan,
    predict,
    probe,
    profile,
    report,
    stats,
    teach,
)
from fastsskd.errors import InputError

COMMANDS = (
    index,
    check,
    stats,
    pack,
    evaluate,
    probe,
    predict,
    embed,
    export,
    teach,
    plan,
    profile,
    report,
    config,
    completion,
)
"""In the order of ``fastsskd --help``."""


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns its exit code: 0 done, 1 the input or the result is bad, 2 wrong usage."""
    args = _parser().parse_args(arguments)
    try:
        return args.run(args)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:  # the reader of our output has had enough
        sys.stderr.close()
        return 1
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fastsskd",
        description="Audio self-supervision and distillation. Training: deepspeed launch/train.py --help",
    )
    parser.add_argument("--version", action="version", version=f"fastsskd {__version__}")
    commands = parser.add_subparsers(dest="name", required=True, metavar="command")
    for module in COMMANDS:
        module.add(commands)
    return parser


if __name__ == "__main__":
    sys.exit(main())
