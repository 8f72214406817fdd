"""``fastsskd pack``: any audio -> 16 kHz mono shards."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from fastsskd.commands.arguments import command, megabytes, positive, share

EXAMPLES = """
fastsskd pack my.manifest --out packed
fastsskd pack recordings/ --out packed --encoding flac --max_bad_share 0.05
"""


def add(commands: Any) -> None:
    pack = command(
        commands, "pack", run, "any audio -> 16 kHz mono in WebDataset shards, for fast random access", EXAMPLES
    )
    pack.add_argument("manifest", help="manifest or folder")
    pack.add_argument(
        "--out", required=True, metavar="DIR", help="folder for the shards; the same command goes on there"
    )
    pack.add_argument("--encoding", choices=("pcm16", "float32", "flac"), default="pcm16", help="default %(default)s")
    pack.add_argument(
        "--shard_size", type=megabytes, default=1000, metavar="MB", help="when a shard is full (default %(default)s)"
    )
    pack.add_argument("--shuffle", type=int, default=None, metavar="SEED", help="clips in random order in the shards")
    pack.add_argument("--workers", type=positive, default=None, help="threads; default: all cores")
    pack.add_argument(
        "--max_bad_share", type=share, default=None, metavar="X", help="stop when more of the clips are bad, say 0.05"
    )
    pack.add_argument("--quiet", action="store_true", help="no progress")


def run(args: argparse.Namespace) -> int:
    from fastsskd import manifest
    from fastsskd.layouts import index as layouts
    from fastsskd.pack.run import num_unreadable, pack

    path = Path(args.manifest)
    table = layouts.build(path) if path.is_dir() else manifest.load(path)
    if unreadable := num_unreadable(table):
        print(f"{unreadable} clips seem to need FFmpeg to be read: pip install 'fastsskd[formats]'", file=sys.stderr)
    packed = pack(
        table,
        args.out,
        encoding=args.encoding,
        shard_size=args.shard_size,
        shuffle=args.shuffle,
        workers=args.workers or 0,
        max_bad_share=args.max_bad_share,
        quiet=args.quiet,
    )
    print(packed, file=sys.stderr)
    return 0
