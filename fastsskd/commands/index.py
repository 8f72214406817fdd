"""``fastsskd index``: any data set layout -> one manifest."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from fastsskd.commands.arguments import command

EXAMPLES = """
fastsskd index recordings/ --out my.manifest
fastsskd index ESC-50-master --out esc50.manifest
"""


def add(commands: Any) -> None:
    index = command(commands, "index", run, "read a data set's layout and write its manifest", EXAMPLES)
    index.add_argument("source", metavar="SRC", help="folder, or the data set's csv or json")
    index.add_argument("--out", required=True, metavar="MANIFEST", help="file to write")


def run(args: argparse.Namespace) -> int:
    from fastsskd import manifest
    from fastsskd.layouts import index as layouts

    table = layouts.build(Path(args.source))
    manifest.save(table, args.out)
    classes = f"{len(table.classes)} classes" if table.classes else "no labels"
    print(f"{args.out}: {len(table)} clips, {classes}, layout {table.source}", file=sys.stderr)
    if table.num_absent:
        names = ", ".join(table.absent[:3])
        print(f"left out {table.num_absent} clips that are listed but not there ({names}, ...)", file=sys.stderr)
    return 0
