"""Does `fastsskd plan` predict what training on this machine then does: clips a second of each stage, and peak memory?

    python benchmarks/plan_check.py                # two sizes of model, two batches each; 10 minutes a round

For every case: `fastsskd plan --gpu this` times a few steps in micro-batches of the case's size and of half of it (on a
card a half and a quarter), and predicts; then `deepspeed launch/train.py` trains Multi-SSL, labels and distillation, as
users run it. Speed is the median over the run's own log intervals, memory the largest resident size of a rank. Plan and
run are repeated in turn, and medians compared. Results go to ``benchmarks/results/plan.{json,md}``.

Last result, 2026-11-23: over three rounds speeds within 10 %, memory within 13 %.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import common

RESULTS, LAUNCH = Path(__file__).parent / "results", common.LAUNCH
CASES = (("nano", 24, 6), ("nano", 48, 6), ("micro", 24, 2), ("micro", 48, 2))
"""Size, batch, epochs of each stage."""
STAGES = {"ssl": "iter1-ssl", "distill": "iter1-distill", "teacher": "teacher"}
GOAL = 20.0
"""Percent between prediction and run."""


def settings(folder: Path, size: str, batch: int, epochs: int) -> list[str]:
    """Arguments that the plan and the run share."""
    fields = {
        "data.manifest": folder / "sounds.manifest",
        "model.size": size,
        "recipe.iterations": 1,
        "ssl.epochs": epochs,
        "distill.epochs": epochs,
        "run.log_every": 4,
    }
    named = [
        "--ds_config",
        str(common.batch_file(folder, batch)),
        "--config",
        str(LAUNCH / "configs" / "quickstart.toml"),
    ]
    return named + [word for name, value in fields.items() for word in ("--set", f"{name}={value}")]


def predict(shared: list[str], folder: Path) -> dict:
    """Clips a second by stage, and bytes, as the plan says."""
    command = [sys.executable, "-m", "fastsskd.cli", "plan", "--gpu", "this", "--json", *shared]
    command += ["--manifest", str(folder / "sounds.manifest")]
    found = common.answer("the plan", command)
    plan = found["plans"][0]
    rates = {kind: plan["stages"][kind]["clips_per_second"] for kind in STAGES}
    return {**rates, "bytes": plan["memory"]["1"]["total"], "measured": found["measured"]}


def train(shared: list[str], out: Path) -> dict:
    """The same of a real run."""
    launcher = Path(sys.executable).with_name("deepspeed")
    port = str(random.randrange(20000, 40000))
    command = [str(launcher), "--master_port", port, str(LAUNCH / "train.py"), *shared, "--set", f"run.out={out}"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        _, status, usage = os.wait4(process.pid, 0)  # of the launcher and all it waited for: the largest one's memory
        process.returncode = os.waitstatus_to_exitcode(status)
    result = json.loads((out / "result.json").read_text())
    if result["status"] != "complete":
        raise SystemExit(f"the run ended as {result['status']}: {result.get('reason')}")
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    rates = {}
    for kind, name in STAGES.items():
        own = [line["clips_per_second"] for line in lines if line["stage"] == name][1:]  # the first one warms up
        rates[kind] = statistics.median(own)
    return {**rates, "bytes": usage.ru_maxrss * 1024}


def measure(options: argparse.Namespace, folder: Path) -> list[dict]:
    common.sounds(folder)
    watch, rows = options.watch, []
    for size, batch, epochs in options.cases:
        shared, plans, runs = settings(folder, size, batch, epochs), [], []
        for round_ in range(options.rounds):
            watch.wait()
            plans.append(predict(shared, folder))
            watch.wait()
            runs.append(train(shared, folder / f"run-{size}-{batch}-{round_}"))
        for what in (*STAGES, "bytes"):
            said = statistics.median(plan[what] for plan in plans)
            did = statistics.median(run[what] for run in runs)
            rows.append({"size": size, "batch": batch, "what": what, "predicted": said, "run": did})
            rows[-1]["percent"] = 100.0 * (said / did - 1.0)
            print(rows[-1], flush=True)
    return rows


def write(rows: list[dict], about: dict, out: Path) -> None:
    worst = {
        name: max(abs(row["percent"]) for row in rows if (row["what"] == "bytes") == memory)
        for name, memory in (("clips a second", False), ("peak memory", True))
    }
    verdicts = [common.verdict(f"{name}: largest error", value, "<=", GOAL, "%") for name, value in worst.items()]
    lines = ["# Plan against run", "", common.machine_line(about), ""]
    lines += [
        "`fastsskd plan --gpu this` times micro-batches of a half and the whole of the batch (a card: a quarter and a "
        "half); then the same files are trained on by `deepspeed launch/train.py`, one rank, 5 s clips, the "
        "quickstart's generated sounds.",
        "",
        *common.verdict_lines(verdicts),
        "",
        "| model | batch | | predicted | run | error |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        unit, scale = ("peak memory, MB", 1e-6) if row["what"] == "bytes" else (f"{row['what']}, clips/s", 1.0)
        lines.append(
            f"| {row['size']} | {row['batch']} | {unit} | {scale * row['predicted']:.4g} | {scale * row['run']:.4g} | "
            f"{row['percent']:+.0f} % |"
        )
    common.write(out, "plan", {"machine": about, "rows": rows, "verdicts": verdicts}, "\n".join(lines) + "\n")
    print("\n".join(lines))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cases", nargs="+", metavar="SIZE:BATCH:EPOCHS", help="default: nano and micro, 24 and 48")
    parser.add_argument("--patience", type=float, default=60.0, help="seconds to wait in all for an idle machine")
    parser.add_argument("--smoke", action="store_true", help="one small case, once: only to see that it runs")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    if options.smoke:
        options.rounds, options.patience, options.cases = 1, 0.0, ["nano:24:1"]
    given = [case.split(":") for case in options.cases or ()]
    options.cases = [(size, int(batch), int(epochs)) for size, batch, epochs in given] or CASES
    options.watch = common.IdleWatch(options.patience)
    command = "python benchmarks/" + " ".join([Path(__file__).name, *sys.argv[1:]])
    about = common.machine({name: version(name) for name in ("torch", "deepspeed", "timm")}, command)
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(options, Path(folder))
    write(rows, about | {"samples_on_an_idle_machine": str(options.watch)}, options.out)


if __name__ == "__main__":
    main()
