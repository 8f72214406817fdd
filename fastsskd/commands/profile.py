"""``fastsskd profile``: which of loader, step and communication holds training up, and what would help."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

from fastsskd.commands.arguments import command
from fastsskd.errors import InputError, UsageError

EXAMPLES = """
fastsskd profile --config launch/configs/esc50.toml --ds_config launch/ds_config.json --manifest my.manifest
torchrun --nproc_per_node 8 -m fastsskd.cli profile --config T --ds_config J --html profile.html
deepspeed --no_local_rank --module fastsskd.cli profile --config T --ds_config J
"""


def add(commands: Any) -> None:
    says = "what holds training up: loader, step or network; what would help"
    profile = command(commands, "profile", run, says, EXAMPLES)
    profile.add_argument("--config", required=True, metavar="T", help="TOML of the run; presets are in launch/configs/")
    profile.add_argument("--ds_config", required=True, metavar="J", help="DeepSpeed JSON of the run")
    profile.add_argument("--set", action="append", default=[], metavar="a.b=c", help="change one field of the TOML")
    profile.add_argument("--manifest", default=None, metavar="M", help="in place of data.manifest")
    profile.add_argument(
        "--stage", choices=("ssl", "distill"), default=None, help="default: the first of the run's that is one of these"
    )
    profile.add_argument("--seconds", type=float, default=60.0, help="to measure for, about (default %(default)g)")
    profile.add_argument("--try", action="store_true", dest="really", help="follow the advice, and measure its gain")
    profile.add_argument("--html", default=None, metavar="FILE", help="a page with plots, in one file")
    profile.add_argument("--trace", default=None, metavar="FILE", help="torch's trace of a few steps (ui.perfetto.dev)")
    profile.add_argument("--json", action="store_true", help="JSON on stdout, the tables on stderr")
    profile.add_argument(
        "--fail-under", type=float, default=None, metavar="CLIPS", help="exit 1 below so many clips/s end to end"
    )


def run(args: argparse.Namespace) -> int:
    if not 1.0 <= args.seconds <= 3600.0:
        raise UsageError(f"--seconds {args.seconds:g}: choose 1 to 3600")
    for option, file in (("--html", args.html), ("--trace", args.trace)):
        if file and not Path(file).absolute().parent.is_dir():
            raise InputError(f"{option} {file}: there is no folder {Path(file).parent}; make it first")
    try:
        result = _measure(args)
        _show(args, result)
    except InputError as error:
        if os.environ.get("RANK", "0") == "0":
            raise
        return error.exit_code  # rank 0 speaks for all
    return 0


def _show(args: argparse.Namespace, result: Any) -> None:
    from fastsskd import distributed
    from fastsskd.profile import page as profile_page
    from fastsskd.profile import report as profile_report

    if distributed.rank() == 0:
        print(profile_report.text(result), file=sys.stderr if args.json else sys.stdout, flush=True)
        if args.json:
            print(json.dumps(profile_report.to_dict(result), indent=1))
        if args.html:
            profile_page.write(result, Path(args.html))
    rate = result.found.end_to_end.value
    if args.fail_under is not None and rate < args.fail_under:
        raise InputError(f"{rate:.1f} clips/s end to end, under --fail-under {args.fail_under:g}")


def _measure(args: argparse.Namespace) -> Any:
    import time

    begin = time.perf_counter()
    from fastsskd import config, ds_config

    overrides = [*args.set, *([f"data.manifest={args.manifest}"] if args.manifest else [])]
    settings, tree = config.load(args.config, overrides), ds_config.load(args.ds_config)
    import torch

    from fastsskd import distributed

    device = "cuda" if torch.cuda.is_available() else "cpu"
    ds_config.check_device(tree, device)
    distributed.start(device, settings.run.timeout)
    from fastsskd.profile.job import Job
    from fastsskd.profile.run import profile, save_trace

    job = Job(settings, tree, device, args.stage)
    setup = time.perf_counter() - begin
    try:
        result = profile(job, args.seconds)
        result.setup = setup
        if args.really:
            from fastsskd.profile.trial import follow

            result.advice = follow(job, result, args.seconds)
        if args.trace:
            save_trace(job, Path(args.trace))
    finally:
        job.close()
    return result
