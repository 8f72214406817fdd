"""``fastsskd report``: a run, or a cross-validation, as one HTML page."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from fastsskd.commands.arguments import command

EXAMPLES = """
fastsskd report runs/quickstart
fastsskd report runs/quickstart --out quickstart.html
fastsskd report runs/quickstart --json
fastsskd report runs/esc50-folds
"""


def add(commands: Any) -> None:
    report = command(
        commands, "report", run, "a run as one HTML page, finished or not; or a cross-validation", EXAMPLES
    )
    report.add_argument("folder", metavar="RUN", help="folder of a run (run.out), or of launch/kfold.py")
    report.add_argument("--out", metavar="FILE", help="page to write; default: RUN/report.html")
    report.add_argument(
        "--reference", metavar="DIR", help="curves to compare with, as in benchmarks/results/reference/"
    )
    report.add_argument("--json", action="store_true", help="print the numbers; the page is written with --out only")


def run(args: argparse.Namespace) -> int:
    from fastsskd.report import reference
    from fastsskd.report.data import numbers, read_run
    from fastsskd.report.folds import folds_page, is_folds, read_folds
    from fastsskd.report.page import page
    from fastsskd.report.run_table import PAGE, write_page

    folder = Path(args.folder)
    if is_folds(folder):
        found = read_folds(folder)
        told, text = found, folds_page(folder, found)
    else:
        data = read_run(folder)
        told, text = numbers(data), page(data, reference.load(args.reference) if args.reference else None)
    if args.json:
        print(json.dumps(told, indent=1))
    if args.out or not args.json:
        file = write_page(text, Path(args.out or folder / PAGE))
        print(f"{file} written ({file.stat().st_size / 1e6:.1f} MB)", file=sys.stderr)
    return 0
