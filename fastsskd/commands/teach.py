"""``fastsskd teach``: a teacher's answers, stored once."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from fastsskd.commands.arguments import command, device, positive
from fastsskd.errors import UsageError

EXAMPLES = """
fastsskd teach --teacher runs/mine/checkpoints/iter2-distill my.manifest --out answers
fastsskd teach --teacher ast.pth --teacher_classes class_labels_indices.csv my.manifest --out answers --crops 4
"""


def add(commands: Any) -> None:
    teach = command(
        commands, "teach", run, "a teacher's answers stored once, for training with distill.stored", EXAMPLES
    )
    teach.add_argument("manifest", help="manifest or folder")
    teach.add_argument(
        "--teacher", action="append", required=True, metavar="T", help="checkpoint; again for each of several as one"
    )
    teach.add_argument("--out", required=True, metavar="DIR", help="folder to fill; the same command goes on there")
    teach.add_argument(
        "--crops", type=positive, default=1, metavar="K", help="crops of each clip, that epochs hear in turn"
    )
    teach.add_argument(
        "--top_k", "--top-k", type=positive, default=20, metavar="N", help="likeliest classes stored (default 20)"
    )
    teach.add_argument("--seconds", type=float, default=10.0, help="length of a crop, as data.seconds (default 10)")
    teach.add_argument("--seed", type=int, default=0, help="of the crops")
    teach.add_argument("--batch_size", "--batch-size", type=positive, default=32, help="default %(default)s")
    teach.add_argument(
        "--precision", choices=("fp32", "bf16", "fp16"), default="fp32", help="of the teacher (default %(default)s)"
    )
    teach.add_argument("--teacher_classes", default="", metavar="CSV", help="as distill.teacher_classes")
    teach.add_argument("--class_map", default="", metavar="JSON", help="as distill.class_map")
    teach.add_argument("--device", choices=("cpu", "cuda"), default=None, help="default: cuda if there is one")
    teach.add_argument("--workers", type=positive, default=None, help="threads; default: all cores")
    teach.add_argument("--quiet", action="store_true", help="no progress")


def run(args: argparse.Namespace) -> int:
    from fastsskd.answers.teach import Options, teach
    from fastsskd.loader import open_manifest

    if not 0.16 <= args.seconds <= 60.0:
        raise UsageError(f"--seconds {args.seconds}: choose 0.16 to 60")
    names = ("crops", "top_k", "seconds", "seed", "precision", "teacher_classes", "class_map")
    options = Options(tuple(args.teacher), **{name: getattr(args, name) for name in names})
    run = {
        "device": device(args.device),
        "batch_size": args.batch_size,
        "workers": args.workers or 0,
        "quiet": args.quiet,
    }
    result = teach(open_manifest(args.manifest), args.out, options, source=args.manifest, **run)
    bad = f", {result['bad']} clips are bad, see {args.out}/rejected.tsv" if result["bad"] else ""
    print(f"{args.out} is complete: {result['stored']} crops of {result['clips']} clips{bad}", file=sys.stderr)
    print(json.dumps(result, indent=1))
    return 0
