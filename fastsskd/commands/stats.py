"""``fastsskd stats``: what a data set's features, classes, lengths and rates are."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from fastsskd.commands.arguments import command, positive
from fastsskd.errors import UsageError

EXAMPLES = """
fastsskd stats my.manifest --seconds 5
fastsskd stats my.manifest --limit 2000
"""


def add(commands: Any) -> None:
    stats = command(
        commands, "stats", run, "mean and std of the features, class counts, lengths, sampling rates", EXAMPLES
    )
    stats.add_argument("manifest")
    stats.add_argument("--seconds", type=float, default=10.0, help="length of the crops (default %(default)s)")
    stats.add_argument("--limit", type=int, default=0, help="clips to compute mean and std from; default all")
    stats.add_argument("--seed", type=int, default=0)
    stats.add_argument("--workers", type=positive, default=None, help="threads; default: all cores")


def run(args: argparse.Namespace) -> int:
    from fastsskd.check import feature_statistics, headers
    from fastsskd.loader import open_manifest

    if not 0.16 <= args.seconds <= 60.0:
        raise UsageError(f"--seconds {args.seconds}: choose 0.16 to 60")
    table = open_manifest(args.manifest)
    workers = args.workers or 0
    result = feature_statistics(table, seconds=args.seconds, limit=args.limit, seed=args.seed, workers=workers)
    result |= headers(table, workers=workers)
    if table.classes:
        result["classes"] = dict(zip(table.classes, table.class_counts().tolist(), strict=True))
    print(json.dumps(result, indent=1))
    print(f"for the TOML: [data] mean = {result['mean']:.4f}, std = {result['std']:.4f}", file=sys.stderr)
    return 0
