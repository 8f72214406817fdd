"""Cross-validation: ``python launch/kfold.py --ds_config J --config T [--set a.b=c ...] [--folds 1 2] [--seeds 0 1]``.

A training for each fold and seed, each as ``launch/train.py`` does it; then their mean and spread.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from fastsskd.errors import InputError


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="kfold.py",
        description="Train and evaluate on each fold; print mean and spread; write kfold.json in run.out.",
        epilog="The same command goes on where it was stopped, and does not train again what is complete.",
    )
    parser.add_argument("--ds_config", required=True, help="as of train.py")
    parser.add_argument("--config", required=True, help="as of train.py; data.train_folds = the folds to use, or all")
    parser.add_argument("--set", action="append", default=[], metavar="a.b=c", help="change one field of the TOML")
    parser.add_argument("--folds", type=int, nargs="+", default=(), metavar="K", help="to evaluate on; default: all")
    parser.add_argument("--seeds", type=int, nargs="+", default=(0,), metavar="S", help="a training each; default: 0")
    parser.add_argument("--parallel", type=int, default=1, metavar="N", help="trainings at a time")
    parser.add_argument(
        "--threads", type=int, default=None, metavar="N", help="of each; default: its share of the cores"
    )
    parser.add_argument(
        "--keep",
        choices=("all", "models", "result"),
        default="models",
        help="of a complete training: also its checkpoints, its models (default), or no weights",
    )
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    from fastsskd.evaluation.kfold import cross_validate, table

    try:
        found = cross_validate(
            config=args.config,
            ds_config=args.ds_config,
            launcher=Path(__file__).with_name("train.py"),
            overrides=args.set,
            folds=args.folds,
            seeds=args.seeds,
            parallel=args.parallel,
            threads=args.threads,
            keep=args.keep,
        )
    except InputError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    print(table(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
