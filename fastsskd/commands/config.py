"""``fastsskd config``: a configuration with all its fields, or the schema that editors check one with."""

from __future__ import annotations

import argparse
import json
from typing import Any

from fastsskd.commands.arguments import command
from fastsskd.errors import UsageError

EXAMPLES = """
fastsskd config launch/configs/quickstart.toml --set model.size=micro
fastsskd config --schema > fastsskd.schema.json
"""


def add(commands: Any) -> None:
    config = command(commands, "config", run, "a run's configuration with all its fields, or its JSON schema", EXAMPLES)
    config.add_argument("toml", nargs="?", metavar="T", help="TOML of a run; without it the defaults")
    config.add_argument("--set", action="append", default=[], metavar="a.b=c", help="change one field")
    config.add_argument("--schema", action="store_true", help="JSON schema (draft 2020-12) of the TOML, for editors")


def run(args: argparse.Namespace) -> int:
    from fastsskd import config, config_help

    if args.schema and (args.toml or args.set):
        raise UsageError("--schema: it is the same for every configuration; leave the rest out")
    if args.schema:
        print(json.dumps(config_help.json_schema(), indent=1, ensure_ascii=False))
    elif args.set and not args.toml:
        raise UsageError("--set: changes a field of a TOML; name the TOML")
    else:
        settings = config.load(args.toml, args.set) if args.toml else config.Config()
        print(config.to_toml(settings), end="")
    return 0
