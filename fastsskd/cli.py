"""The ``fastsskd`` command: parse, call, print. Heavy imports wait until a command needs them."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastsskd import __version__
from fastsskd.errors import InputError, UsageError


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns its exit code: 0 done, 1 the input or the result is bad, 2 wrong usage."""
    args = _parser().parse_args(arguments)
    try:
        return args.command(args)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:  # the reader of our output has had enough
        sys.stderr.close()
        return 1
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fastsskd",
        description="Audio self-supervision and distillation. Training: deepspeed launch/train.py --help",
    )
    parser.add_argument("--version", action="version", version=f"fastsskd {__version__}")
    commands = parser.add_subparsers(dest="name", required=True, metavar="command")

    index = _command(commands, "index", _index, "read a data set's layout and write its manifest")
    index.add_argument("source", metavar="SRC", help="folder, or the data set's csv or json")
    index.add_argument("--out", required=True, metavar="MANIFEST", help="file to write")

    check = _command(commands, "check", _check, "decode every clip and list the bad ones; exit 1 if there are any")
    check.add_argument("manifest")
    check.add_argument(
        "--write", action="store_true", help="mark the bad clips in the manifest; training leaves them out"
    )
    check.add_argument("--json", action="store_true", help="print the result as JSON")
    check.add_argument("--workers", type=_positive, default=None, help="threads; default: all cores")

    stats = _command(commands, "stats", _stats, "mean and std of the features, class counts, lengths, sampling rates")
    stats.add_argument("manifest")
    stats.add_argument("--seconds", type=float, default=10.0, help="length of the crops (default %(default)s)")
    stats.add_argument("--limit", type=int, default=0, help="clips to compute mean and std from; default all")
    stats.add_argument("--seed", type=int, default=0)
    stats.add_argument("--workers", type=_positive, default=None, help="threads; default: all cores")

    pack = _command(commands, "pack", _pack, "any audio -> 16 kHz mono in WebDataset shards, for fast random access")
    pack.add_argument("manifest", help="manifest or folder")
    pack.add_argument(
        "--out", required=True, metavar="DIR", help="folder for the shards; the same command goes on there"
    )
    pack.add_argument("--encoding", choices=("pcm16", "float32", "flac"), default="pcm16", help="default %(default)s")
    pack.add_argument(
        "--shard_size", type=_megabytes, default=1000, metavar="MB", help="when a shard is full (default %(default)s)"
    )
    pack.add_argument("--shuffle", type=int, default=None, metavar="SEED", help="clips in random order in the shards")
    pack.add_argument("--workers", type=_positive, default=None, help="threads; default: all cores")
    pack.add_argument(
        "--max_bad_share", type=_share, default=None, metavar="X", help="stop when more of the clips are bad, say 0.05"
    )

    evaluate = _command(commands, "evaluate", _evaluate, "metrics as JSON on stdout, a table on stderr")
    evaluate.add_argument("--checkpoint", nargs="+", required=True, metavar="C", help="several = mean of probabilities")
    evaluate.add_argument("manifest", nargs="?", help="manifest or folder")
    evaluate.add_argument("--folds", type=int, nargs="+", default=(), metavar="K", help="only these folds")
    evaluate.add_argument("--batch_size", type=_positive, default=32)
    evaluate.add_argument("--device", default=None, help="cpu or cuda; default: cuda if there is one")
    evaluate.add_argument("--workers", type=_positive, default=None, help="threads; default: all cores")
    _add_teach(commands)
    _add_plan(commands)
    return parser


def _add_teach(commands: Any) -> None:
    teach = _command(commands, "teach", _teach, "a teacher's answers stored once, for training with distill.stored")
    teach.add_argument("manifest", help="manifest or folder")
    teach.add_argument(
        "--teacher", action="append", required=True, metavar="T", help="checkpoint; again for each of several as one"
    )
    teach.add_argument("--out", required=True, metavar="DIR", help="folder to fill; the same command goes on there")
    teach.add_argument(
        "--crops", type=_positive, default=1, metavar="K", help="crops of each clip, that epochs hear in turn"
    )
    teach.add_argument(
        "--top_k", "--top-k", type=_positive, default=20, metavar="N", help="likeliest classes stored (default 20)"
    )
    teach.add_argument("--seconds", type=float, default=10.0, help="length of a crop, as data.seconds (default 10)")
    teach.add_argument("--seed", type=int, default=0, help="of the crops")
    teach.add_argument("--batch_size", "--batch-size", type=_positive, default=32, help="default %(default)s")
    teach.add_argument(
        "--precision", choices=("fp32", "bf16", "fp16"), default="fp32", help="of the teacher (default %(default)s)"
    )
    teach.add_argument("--teacher_classes", default="", metavar="CSV", help="as distill.teacher_classes")
    teach.add_argument("--class_map", default="", metavar="JSON", help="as distill.class_map")
    teach.add_argument("--device", choices=("cpu", "cuda"), default=None, help="default: cuda if there is one")
    teach.add_argument("--workers", type=_positive, default=None, help="threads; default: all cores")


def _add_plan(commands: Any) -> None:
    plan = _command(commands, "plan", _plan, "memory, time, communication and loader needs of a run at N GPUs")
    plan.add_argument("--config", required=True, metavar="T", help="TOML of the run; presets are in launch/configs/")
    plan.add_argument("--ds_config", required=True, metavar="J", help="DeepSpeed JSON of the run")
    plan.add_argument("--set", action="append", default=[], metavar="a.b=c", help="change one field of the TOML")
    plan.add_argument(
        "--gpu", default=None, help="V100-32, V100-16, A100-40, A100-80, H100, H200, or this: measures this machine"
    )
    plan.add_argument("--gpus", type=_positive, nargs="+", default=None, metavar="N", help="default: 1 8 64 512 4096")
    plan.add_argument("--gpus_per_node", type=_positive, default=None, help="default: 8, or 1 for a measured machine")
    plan.add_argument("--clips", type=_positive, default=None, metavar="N", help="training clips; default: 2000000")
    plan.add_argument("--manifest", default=None, metavar="M", help="count the clips of this manifest or folder")
    plan.add_argument("--epochs", type=_positive, default=None, metavar="E", help="of each stage; default: the TOML's")
    plan.add_argument("--measured", default=None, metavar="FILE", help="costs that --gpu this --json printed")
    plan.add_argument("--json", action="store_true", help="JSON on stdout, the tables on stderr")


def _command(commands: Any, name: str, function: Callable[[argparse.Namespace], int], text: str) -> Any:
    command = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
    command.set_defaults(command=function)
    return command


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value


def _megabytes(text: str) -> float:
    value = float(text)
    if not 0 < value < 1e9:
        raise argparse.ArgumentTypeError(f"{text} is not a size in MB")
    return value


def _share(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not a share of 0 to 1")
    return value


def _index(args: argparse.Namespace) -> int:
    from fastsskd import layouts, manifest

    table = layouts.build(Path(args.source))
    manifest.save(table, args.out)
    classes = f"{len(table.classes)} classes" if table.classes else "no labels"
    print(f"{args.out}: {len(table)} clips, {classes}, layout {table.source}", file=sys.stderr)
    if table.num_absent:
        names = ", ".join(table.absent[:3])
        print(f"left out {table.num_absent} clips that are listed but not there ({names}, ...)", file=sys.stderr)
    return 0


def _check(args: argparse.Namespace) -> int:
    from fastsskd.check import find_bad
    from fastsskd.loader import open_manifest
    from fastsskd.manifest import mark_bad

    table = open_manifest(args.manifest)
    bad: dict[str, str] = {}
    begin, last = time.monotonic(), 0.0
    for done, found in find_bad(table, workers=args.workers or 0):
        bad = dict(found)
        now = time.monotonic()
        if now - last > 2.0:
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
    done = " (marked in the manifest)" if args.write and bad else ""
    print(f"{len(bad)} of {len(table)} clips are bad{done}", file=sys.stderr)
    return 1 if bad else 0


def _stats(args: argparse.Namespace) -> int:
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


def _pack(args: argparse.Namespace) -> int:
    from fastsskd import layouts, manifest
    from fastsskd.pack import num_unreadable, pack

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
    )
    print(packed, file=sys.stderr)
    return 0


def _evaluate(args: argparse.Namespace) -> int:
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


def _teach(args: argparse.Namespace) -> int:
    import torch

    from fastsskd.loader import open_manifest
    from fastsskd.teach import Options, teach

    if not 0.16 <= args.seconds <= 60.0:
        raise UsageError(f"--seconds {args.seconds}: choose 0.16 to 60")
    names = ("crops", "top_k", "seconds", "seed", "precision", "teacher_classes", "class_map")
    options = Options(tuple(args.teacher), **{name: getattr(args, name) for name in names})
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: torch finds no GPU here; leave it out to use the CPU")
    run = {"device": device, "batch_size": args.batch_size, "workers": args.workers or 0}
    result = teach(open_manifest(args.manifest), args.out, options, source=args.manifest, **run)
    bad = f", {result['bad']} clips are bad, see {args.out}/rejected.tsv" if result["bad"] else ""
    print(f"{args.out} is complete: {result['stored']} crops of {result['clips']} clips{bad}", file=sys.stderr)
    print(json.dumps(result, indent=1))
    return 0


def _plan(args: argparse.Namespace) -> int:
    from fastsskd import plan_job, plan_report
    from fastsskd.plan import plan_at

    if args.manifest and args.clips:
        raise UsageError("--manifest and --clips: both give the number of clips; choose one")
    job, measured = plan_job.from_arguments(args)
    plans = [plan_at(job, gpus) for gpus in args.gpus or ((1,) if args.gpu == "this" else plan_job.GPU_COUNTS)]
    paper = plan_report.paper_point(job.config)
    print(plan_report.table(job, plans, paper, measured), file=sys.stderr if args.json else sys.stdout)
    if args.json:
        print(json.dumps(plan_report.to_dict(job, plans, paper, measured), indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
