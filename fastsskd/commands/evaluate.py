"""``fastsskd evaluate``: metrics of one checkpoint, or of several as one."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from fastsskd.commands.arguments import command, positive
from fastsskd.errors import InputError, UsageError


def add(commands: Any) -> None:
    evaluate = command(commands, "evaluate", run, "metrics as JSON on stdout, a table on stderr")
    evaluate.add_argument("--checkpoint", nargs="+", required=True, metavar="C", help="several = mean of probabilities")
    evaluate.add_argument("manifest", nargs="?", help="manifest or folder")
    evaluate.add_argument("--folds", type=int, nargs="+", default=(), metavar="K", help="only these folds")
    evaluate.add_argument("--batch_size", type=positive, default=32)
    evaluate.add_argument("--device", default=None, help="cpu or cuda; default: cuda if there is one")
    evaluate.add_argument("--workers", type=positive, default=None, help="threads; default: all cores")


def run(args: argparse.Namespace) -> int:
    import torch

    from fastsskd.evaluate import evaluate, table, to_json
    from fastsskd.loader import open_manifest

    if args.manifest is None:  # `--checkpoint A B MANIFEST`: argparse gave the option all three
        *args.checkpoint, args.manifest = args.checkpoint
        if not args.checkpoint:
            raise UsageError("fastsskd evaluate: give both a checkpoint and a manifest: --checkpoint C MANIFEST")
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    clips = open_manifest(args.manifest)
    if args.folds:
        import numpy as np

        chosen = np.isin(clips.folds, args.folds)
        if not chosen.any():
            raise InputError(f"{args.manifest}: has no clip in fold(s) {', '.join(map(str, args.folds))}")
        clips = clips.select(chosen)
    metrics = evaluate(args.checkpoint, clips, batch_size=args.batch_size, device=device, workers=args.workers or 0)
    print(table(metrics), file=sys.stderr)
    print(to_json(metrics))
    return 0
