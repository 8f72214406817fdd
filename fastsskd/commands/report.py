"""``fastsskd report``: a run as one HTML page."""

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
"""


def add(commands: Any) -> None:
    report = command(commands, "report", run, "a run as one HTML page, finished or not", EXAMPLES)
    report.add_argument("folder", metavar="RUN", help="folder of a run (run.out)")
    report.add_argument("--out", metavar="FILE", help="page to write; default: RUN/report.html")
    report.add_argument("--json", action="store_true", help="print the numbers; the page is written with --out only")


def run(args: argparse.Namespace) -> int:
    from fastsskd.report import write_page
    from fastsskd.report_data import numbers, read_run

    data = read_run(args.folder)
    if args.json:
        print(json.dumps(numbers(data), indent=1))
    if args.out or not args.json:
        page = write_page(data, Path(args.out or data.path / "report.html"))
        print(f"{page} written ({page.stat().st_size / 1e6:.1f} MB)", file=sys.stderr)
    return 0
