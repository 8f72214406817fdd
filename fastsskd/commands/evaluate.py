"""``fastsskd evaluate``: metrics of one checkpoint, or of several as one."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastsskd.commands.arguments import command, device, natural, positive
from fastsskd.errors import InputError, UsageError

if TYPE_CHECKING:
    from fastsskd.manifest import Manifest

EXAMPLES = """
fastsskd evaluate --checkpoint runs/mine/checkpoints/iter2-distill my.manifest --folds 5
fastsskd evaluate --checkpoint runs/mine/checkpoints/iter1-distill runs/mine/checkpoints/iter2-distill my.manifest
fastsskd evaluate --checkpoint model.safetensors --crops 3 --confusion confusion.png --scores scores.npz my.manifest
"""
PICTURES = (".png", ".svg", ".pdf")


def add(commands: Any) -> None:
    evaluate = command(commands, "evaluate", run, "metrics as JSON on stdout, a table on stderr", EXAMPLES)
    evaluate.add_argument("--checkpoint", nargs="+", required=True, metavar="C", help="several = mean of probabilities")
    evaluate.add_argument("manifest", nargs="?", help="manifest or folder")
    evaluate.add_argument("--folds", type=int, nargs="+", default=(), metavar="K", help="only these folds")
    evaluate.add_argument(
        "--crops", type=positive, default=1, metavar="N", help="evenly spaced crops of longer clips; 1 = the beginning"
    )
    evaluate.add_argument("--average", action="store_true", help="the mean of the checkpoints' weights, as one model")
    evaluate.add_argument(
        "--bootstrap", type=natural, default=1000, metavar="R", help="resamples for the 95 %% intervals; 0 = none"
    )
    evaluate.add_argument("--confusion", metavar="FILE", help="draw the confusion matrix: .png, .svg or .pdf")
    evaluate.add_argument("--scores", metavar="FILE.npz", help="write the class probabilities of each clip")
    evaluate.add_argument("--batch_size", type=positive, default=32, help="clips (default %(default)s)")
    evaluate.add_argument("--device", default=None, help="cpu, cuda or cuda:N; default: cuda if there is one")
    evaluate.add_argument("--workers", type=positive, default=None, help="threads; default: all cores")


def run(args: argparse.Namespace) -> int:
    from fastsskd.evaluation import confusion, score_file
    from fastsskd.evaluation.evaluate import rate
    from fastsskd.evaluation.table import table
    from fastsskd.loader import open_manifest

    if args.manifest is None:  # `--checkpoint A B MANIFEST`: argparse gave the option all three
        *args.checkpoint, args.manifest = args.checkpoint
        if not args.checkpoint:
            raise UsageError("fastsskd evaluate: give both a checkpoint and a manifest: --checkpoint C MANIFEST")
    if args.confusion and Path(args.confusion).suffix not in PICTURES:
        raise UsageError(f"--confusion {args.confusion}: end it with {', '.join(PICTURES)}")
    clips = open_manifest(args.manifest)
    if args.confusion and clips.multi_label:
        raise UsageError(f"--confusion: the clips of {args.manifest} may have several labels; use the table")
    names = ("batch_size", "crops", "average")
    options = {name: getattr(args, name) for name in names} | {"resamples": args.bootstrap}
    options |= {"device": device(args.device), "workers": args.workers or 0}
    rated = rate(args.checkpoint, of_folds(clips, args), **options)
    if args.scores:
        try:
            score_file.save(args.scores, rated.clips)
        except OSError as error:
            raise InputError(f"--scores {args.scores}: cannot be written: {error.strerror}") from None
    if args.confusion:
        matrix = confusion.confusion_matrix(rated.clips.probs, rated.clips.label)
        confusion.draw(matrix, rated.clips.classes, args.confusion)
    print(table(rated.metrics), file=sys.stderr)
    print(json.dumps(rated.metrics, indent=1))
    return 0


def of_folds(clips: Manifest, args: argparse.Namespace) -> Manifest:
    """The clips of the folds that were asked for."""
    if not args.folds:
        return clips
    import numpy as np

    chosen = np.isin(clips.folds, args.folds)
    if not chosen.any():
        raise InputError(f"{args.manifest}: has no clip in fold(s) {', '.join(map(str, args.folds))}")
    return clips.select(chosen)
