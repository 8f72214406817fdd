"""Everything that is measured here, as far as the time goes; and what has changed since another time.

    python benchmarks/run_all.py --budget 60                      # minutes; results in benchmarks/results
    python benchmarks/run_all.py --smoke --out /tmp/smoke         # does every script still run: nothing to quote
    python benchmarks/run_all.py --budget 60 --out new --against benchmarks/results
    python benchmarks/run_all.py --only --out new --against benchmarks/results     # compare, measure nothing

Runs the scripts in the order in which their answers are asked for, each if the time it usually takes still fits, and
writes ``OUT/all.md``: what was run, requirements met and missed, and with ``--against`` a table of every figure that
both have. A figure counts as changed where the ranges of its samples lie apart and its medians by more than
``--noise``, beside the change of what a change of this project cannot move: other libraries in the same benchmark tell
how fast the machine was. On a busy machine run twice before believing it. Exit code 1 if a script failed, or with
``--fail`` if a figure is worse.
"""

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import common
from figures_of import compare, figures_of

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Script:
    """A benchmark.

    Attributes:
        name: of its result files. file: of the script.
        minutes: that it usually takes on two cores, or less on a GPU.
        options: beside ``--out``.
    """

    name: str
    file: str
    minutes: float
    options: tuple[str, ...] = ()


SCRIPTS = (
    Script("kernels", "kernels.py", 6, ("--rounds", "9")),
    Script("train_step", "train_step.py", 25),
    Script("matrix_unit", "matrix_unit.py", 2),
    Script("throughput", "throughput.py", 35, ("--rounds", "3", "--window", "3")),
    Script("teach", "teach.py", 6),
    Script("scale", "scale.py", 8),
    Script("scenarios", "scenarios.py", 15),
    Script("live", "live.py", 1),
    Script("plan", "plan_check.py", 12, ("--rounds", "1")),
    Script("intervals", "intervals.py", 4),
)


def choose(scripts: tuple[Script, ...], budget: float) -> tuple[list[Script], list[Script]]:
    """In their order, those that fit into what is left of the budget; and the others."""
    taken, left = [], []
    for script in scripts:
        fits = script.minutes <= budget
        (taken if fits else left).append(script)
        budget -= script.minutes if fits else 0.0
    return taken, left


def run(script: Script, args: argparse.Namespace) -> dict:
    """Run one; see :func:`common.run_part`."""
    options = ("--smoke",) if args.smoke else script.options
    command = [sys.executable, str(HERE / script.file), *options, "--out", str(args.out)]
    return {"name": script.name, **common.run_part(script.name, command)}


def read(folder: Path) -> dict[str, dict]:
    """The results in a folder, by name."""
    names = {script.name for script in SCRIPTS} | {"train_step_gpu"}
    files = {name: folder / f"{name}.json" for name in sorted(names)}
    return {name: json.loads(file.read_text(encoding="utf-8")) for name, file in files.items() if file.exists()}


def changes(old: dict[str, dict], new: dict[str, dict], noise: float) -> list[dict]:
    rows = []
    for name in [name for name in new if name in old]:
        for row in compare(figures_of(name, old[name]), figures_of(name, new[name]), noise):
            rows.append({**row, "name": f"{name}: {row['name']}"})
    return rows


def page(ran: list[dict], left: list[Script], results: dict[str, dict], rows: list[dict] | None) -> str:
    lines = ["# All benchmarks", ""]
    for item in ran:
        lines.append(
            f"- {item['name']}: {item['seconds'] / 60:.1f} min"
            + (f", **failed**: {item['failed']}" if "failed" in item else "")
        )
    lines += [f"- {script.name}: left out, it takes about {script.minutes:g} min" for script in left]
    for name, result in results.items():
        lines += ["", f"## [{name}]({name}.md)", "", f"{result['machine']['date']}, `{result['machine']['command']}`"]
        if result.get("verdicts"):
            lines += ["", *common.verdict_lines(result["verdicts"])]
    if rows is not None:
        lines += ["", "## Changes", "", *change_lines(rows)]
    return "\n".join(lines) + "\n"


def change_lines(rows: list[dict]) -> list[str]:
    moved = [row for row in rows if row["verdict"] != "same"]
    lines = [f"{len(rows)} figures compared, {len(moved)} changed by more than their samples explain."]
    speeds = {row["name"].split(":")[0]: row["machine"] for row in rows if row["machine"] != 1.0}
    for name, speed in speeds.items():
        of_machine = f"by the figures of others the machine was {speed:.2f} times as fast"
        lines += ["", f"{name}: {of_machine}; changes are beside that."]
    lines += [""]
    if moved:
        lines += ["| | before | now | change | |", "|---|---|---|---|---|"]
    for row in sorted(moved, key=lambda row: row["verdict"], reverse=True):
        numbers = f"{row['old']:.4g} {row['unit']} | {row['new']:.4g} {row['unit']} | {100 * row['change']:+.0f} %"
        lines.append(f"| {row['name']} | {numbers} | {row['verdict']} |")
    return lines


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", type=float, default=60.0, help="minutes (default %(default)s)")
    parser.add_argument("--only", nargs="*", metavar="NAME", help=f"of {', '.join(s.name for s in SCRIPTS)}; or none")
    parser.add_argument("--smoke", action="store_true", help="each briefly: only to see that it runs")
    parser.add_argument("--against", type=Path, metavar="DIR", help="results to compare with")
    parser.add_argument("--noise", type=float, default=0.05, help="change that is taken for noise (default 0.05)")
    parser.add_argument("--fail", action="store_true", help="exit code 1 if a figure is worse than --against")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    args = parser.parse_args(arguments)
    scripts = tuple(s for s in SCRIPTS if args.only is None or s.name in args.only)
    unknown = set(args.only or ()) - {s.name for s in SCRIPTS}
    if unknown:
        parser.error(f"--only {sorted(unknown)[0]}: not one of {', '.join(s.name for s in SCRIPTS)}")
    old = read(args.against) if args.against else None  # before it is written over
    if args.against and not old:
        parser.error(f"--against {args.against}: has no results")
    taken, left = (list(scripts), []) if args.smoke else choose(scripts, args.budget)
    args.out.mkdir(parents=True, exist_ok=True)
    ran = [run(script, args) for script in taken]
    results = read(args.out)
    rows = None if old is None else changes(old, results, args.noise)
    text = page(ran, left, results, rows)
    (args.out / "all.md").write_text(text, encoding="utf-8")
    print(text)
    worse = args.fail and any(row["verdict"] == "worse" for row in rows or ())
    return int(worse or any("failed" in item for item in ran))


if __name__ == "__main__":
    sys.exit(main())
