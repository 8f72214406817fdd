"""``fastsskd probe``: how good frozen features are, of any stage."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from fastsskd.commands.arguments import command, device, positive

EXAMPLES = """
fastsskd probe --checkpoint runs/mine/checkpoints/iter1-ssl my.manifest
fastsskd probe my.manifest --checkpoint model.safetensors --folds 5
"""


def add(commands: Any) -> None:
    probe = command(
        commands, "probe", run, "nearest neighbours and a linear map on a model's frozen features, as JSON", EXAMPLES
    )
    probe.add_argument("manifest", help="manifest or folder; split into training and evaluation as a run does it")
    probe.add_argument("--checkpoint", required=True, metavar="C", help="model file or its folder, of any stage")
    probe.add_argument("--folds", type=int, nargs="+", default=(), metavar="K", help="to rate on; the others train")
    probe.add_argument("--train_folds", type=int, nargs="+", default=(), metavar="K", help="as data.train_folds")
    probe.add_argument("--eval_manifest", metavar="M", help="clips to rate on; the manifest then trains whole")
    probe.add_argument(
        "--max_train", type=positive, default=None, metavar="N", help="a random draw of the training clips"
    )
    probe.add_argument("--k", type=positive, default=20, help="neighbours that vote (default %(default)s)")
    probe.add_argument("--seed", type=int, default=0, help="of the splits and of the random weights, as run.seed")
    probe.add_argument("--batch_size", type=positive, default=32, help="default %(default)s")
    probe.add_argument("--device", default=None, help="cpu, cuda or cuda:N; default: cuda if there is one")
    probe.add_argument("--workers", type=positive, default=None, help="threads; default: all cores")


def run(args: argparse.Namespace) -> int:
    from fastsskd.datasets import draw
    from fastsskd.evaluation.probe import probe, table
    from fastsskd.loader import open_manifest
    from fastsskd.manifest import split

    clips = open_manifest(args.manifest)
    if args.eval_manifest:
        train, test = clips, open_manifest(args.eval_manifest).with_classes(clips.classes)
    else:
        train, test = split(clips, train_folds=args.train_folds, eval_folds=args.folds, seed=args.seed)
    how = {"k": args.k, "seed": args.seed, "batch_size": args.batch_size, "workers": args.workers or 0}
    train = draw(train, args.max_train or 0, args.seed)
    found = probe(args.checkpoint, train, test, device=device(args.device), **how)
    print(table(found), file=sys.stderr)
    print(json.dumps(found, indent=1))
    return 0
