"""``fastsskd check``: decode every clip, list the bad ones."""

from __future__ import annotations

import argparse
import json
import sys
import time
from typing import Any

from fastsskd.commands.arguments import command, positive

EXAMPLES = """
fastsskd check my.manifest
fastsskd check my.manifest --write --json
"""


def add(commands: Any) -> None:
    check = command(
        commands, "check", run, "decode every clip and list the bad ones; exit 1 if there are any", EXAMPLES
    )
    check.add_argument("manifest")
    check.add_argument(
        "--write", action="store_true", help="mark the bad clips in the manifest; training leaves them out"
    )
    check.add_argument("--json", action="store_true", help="print the result as JSON")
    check.add_argument("--workers", type=positive, default=None, help="threads; default: all cores")
    check.add_argument("--quiet", action="store_true", help="no progress")


def run(args: argparse.Namespace) -> int:
    from fastsskd.check import find_bad
    from fastsskd.loader import open_manifest
    from fastsskd.manifest import mark_bad
    from fastsskd.pack.clip import MARKED_FOR_PACK

    table = open_manifest(args.manifest)
    bad: dict[str, str] = {}
    begin, last = time.monotonic(), 0.0
    for done, found in find_bad(table, workers=args.workers or 0):
        bad = dict(found)
        now = time.monotonic()
        if now - last > 2.0 and not args.quiet:
            last = now
            left = (now - begin) / done * (len(table) - done)
            print(f"{done}/{len(table)} clips, {len(bad)} bad, {left:.0f} s left", file=sys.stderr)
    if args.write:
        mark_bad(args.manifest, bad)
    if args.json:
        print(json.dumps({"num_clips": len(table), "bad": bad}, indent=1))
    else:
        for key, reason in bad.items():
            print(f"{key}\t{reason}")
    marked = " (marked in the manifest)" if args.write and bad else ""
    print(f"{len(bad)} of {len(table)} clips are bad{marked}", file=sys.stderr)
    if unread := sum(MARKED_FOR_PACK in reason for reason in bad.values()):
        print(f"{unread} of these are in formats that `fastsskd pack` reads, and training does not", file=sys.stderr)
    return 1 if bad else 0
