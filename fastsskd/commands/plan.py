"""``fastsskd plan``: memory, time and communication of a run at N GPUs."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from fastsskd.commands.arguments import command, positive
from fastsskd.errors import UsageError

EXAMPLES = """
fastsskd plan --config launch/configs/audioset2m.toml --ds_config launch/ds_config_v100.json --gpu V100-32
fastsskd plan --config launch/configs/esc50.toml --ds_config launch/ds_config.json --gpu this --json
"""


def add(commands: Any) -> None:
    plan = command(commands, "plan", run, "memory, time, communication and loader needs of a run at N GPUs", EXAMPLES)
    plan.add_argument("--config", required=True, metavar="T", help="TOML of the run; presets are in launch/configs/")
    plan.add_argument("--ds_config", required=True, metavar="J", help="DeepSpeed JSON of the run")
    plan.add_argument("--set", action="append", default=[], metavar="a.b=c", help="change one field of the TOML")
    plan.add_argument(
        "--gpu", default=None, help="V100-32, V100-16, A100-40, A100-80, H100, H200, or this: measures this machine"
    )
    plan.add_argument("--gpus", type=positive, nargs="+", default=None, metavar="N", help="default: 1 8 64 512 4096")
    plan.add_argument("--gpus_per_node", type=positive, default=None, help="default: 8, or 1 for a measured machine")
    plan.add_argument("--clips", type=positive, default=None, metavar="N", help="training clips; default: 2000000")
    plan.add_argument("--manifest", default=None, metavar="M", help="count the clips of this manifest or folder")
    plan.add_argument("--epochs", type=positive, default=None, metavar="E", help="of each stage; default: the TOML's")
    plan.add_argument("--measured", default=None, metavar="FILE", help="costs that --gpu this --json printed")
    plan.add_argument("--json", action="store_true", help="JSON on stdout, the tables on stderr")


def run(args: argparse.Namespace) -> int:
    from fastsskd.plan import job as plan_job
    from fastsskd.plan import report as plan_report
    from fastsskd.plan.scale import plan_at

    if args.manifest and args.clips:
        raise UsageError("--manifest and --clips: both give the number of clips; choose one")
    job, measured = plan_job.from_arguments(args)
    plans = [plan_at(job, gpus) for gpus in args.gpus or ((1,) if args.gpu == "this" else plan_job.GPU_COUNTS)]
    paper = plan_report.paper_point(job.config)
    print(plan_report.table(job, plans, paper, measured), file=sys.stderr if args.json else sys.stdout)
    if args.json:
        print(json.dumps(plan_report.to_dict(job, plans, paper, measured), indent=1))
    return 0
