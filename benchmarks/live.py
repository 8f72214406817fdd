"""What do the live figures cost a training step: clips/s, waiting, the loader's headroom, utilisation of the machine?

    python benchmarks/live.py            # a short real training, then single calls: a minute
    python benchmarks/live.py --smoke    # does it still run: nothing to quote

A difference of half a percent between two trainings drowns in what a machine does by itself, so the pieces are timed:
in a real run of the smallest model, whose steps are the shortest, every log from the sums to the progress line,
metrics.jsonl and TensorBoard; and by themselves, many times, the two readings of the clock around each batch and each
piece of a worker's work. The logs count whole, the losses with them, so that the sum is an upper bound; on a GPU
they also wait for the device.

Results go to ``benchmarks/results/live.{json,md}``.

Last result, 2026-11-23: 0.13 % of a step of the nano model with a log each 10 steps.
"""

import argparse
import contextlib
import functools
import json
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import common
import torch

from fastsskd import config, distributed, ds_config, engine
from fastsskd.recipe import Recipe
from fastsskd.run_folder import RunFolder
from fastsskd.stream import PART

RESULTS, LAUNCH = Path(__file__).parent / "results", common.LAUNCH
BATCH, LOG_EVERY = 12, 10
LIMIT = 0.5
"""Percent of a step."""
CALLS = 20_000
LOGS = {
    engine._Meter: "the sums, headroom and utilisation",
    RunFolder: "progress line, metrics.jsonl, TensorBoard",
}
"""Whose ``log`` is timed."""


def timed(method: Callable, calls: list[float]) -> Callable:
    """The method, which from now on notes the seconds of each call."""

    @functools.wraps(method)
    def noting(*args, **kwargs):
        begin = time.perf_counter()
        try:
            return method(*args, **kwargs)
        finally:
            calls.append(time.perf_counter() - begin)

    return noting


def train(folder: Path, epochs: int) -> tuple[dict[str, list[float]], list[float]]:
    """A real run with labels only; seconds of each call, and seconds a step of each log's interval."""
    fields = {"data.manifest": common.sounds(folder), "run.out": folder / "run", "run.log_every": LOG_EVERY}
    fields |= {"distill.epochs": epochs, "distill.teacher": "", "recipe.iterations": 1, "recipe.stages": '["distill"]'}
    settings = config.load(
        LAUNCH / "configs" / "quickstart.toml", [f"{name}={value}" for name, value in fields.items()]
    )
    tree = ds_config.load(common.batch_file(folder, BATCH, tensorboard=True))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    distributed.start(device)
    spent: dict[str, list[float]] = {}
    with contextlib.ExitStack() as stack:
        for owner, title in LOGS.items():
            log = timed(owner.log, spent.setdefault(title, []))
            stack.enter_context(mock.patch.object(owner, "log", log))
        Recipe(settings, tree, device, RunFolder(settings, resume=False)).run()
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    return spent, [line["seconds"] / LOG_EVERY for line in lines if line["step"] % LOG_EVERY == 0]


def once(function: Callable[[], object]) -> float:
    """Seconds of a call: the median of some bursts."""
    bursts = []
    for _ in range(7):
        begin = time.perf_counter()
        for _ in range(CALLS):
            function()
        bursts.append((time.perf_counter() - begin) / CALLS)
    return statistics.median(bursts)


def singles() -> dict[str, float]:
    """Seconds of what happens at each batch and at each part of one."""
    meter = engine._Meter(SimpleNamespace(), SimpleNamespace())
    batches = iter(int, 1)  # zeros for ever
    lock, busy = threading.Lock(), [0.0]

    def part() -> None:  # as in fastsskd.stream
        begin = time.perf_counter()
        with lock:
            busy[0] += time.perf_counter() - begin

    return {"batch": once(lambda: meter.wait(batches)) - once(lambda: next(batches)), "part": once(part)}


def measure(options: argparse.Namespace, folder: Path) -> dict:
    options.watch.wait()
    spent, steps = train(folder, options.epochs)
    step, own = statistics.median(steps), singles()
    rows = {
        name: {"per": f"log, each {LOG_EVERY} steps", "seconds": statistics.median(calls), "times": 1 / LOG_EVERY}
        for name, calls in spent.items()
    }
    rows["time waited for a batch"] = {"per": "batch", "seconds": own["batch"], "times": 1.0}
    parts = -(-BATCH // PART)
    rows["time that the workers worked"] = {
        "per": f"part of {PART} clips",
        "seconds": own["part"],
        "times": float(parts),
    }
    for row in rows.values():
        row["percent"] = 100 * row["seconds"] * row["times"] / step
    whole = sum(row["percent"] for row in rows.values())
    return {
        "rows": rows,
        "step": step,
        "logs": len(steps),
        "percent": whole,
        "verdicts": [common.verdict("live figures, of a step of the nano model", whole, "<=", LIMIT, "%")],
    }


def write(result: dict, out: Path) -> None:
    lines = [
        "# Live figures",
        "",
        common.machine_line(result["machine"]),
        "",
        *common.verdict_lines(result["verdicts"]),
    ]
    lines += ["", "| | each | microseconds | of a step |", "|---|---|---|---|"]
    lines += [
        f"| {name} | {row['per']} | {1e6 * row['seconds']:.3g} | {row['percent']:.4f} % |"
        for name, row in result["rows"].items()
    ]
    lines += [
        "",
        f"A step took {1e3 * result['step']:.3g} ms, the median of {result['logs']} logs; batch {BATCH}, labels.",
    ]
    common.write(out, "live", result, "\n".join(lines) + "\n")
    print("\n".join(lines))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--patience", type=float, default=60.0, help="seconds to wait in all for an idle machine")
    parser.add_argument("--smoke", action="store_true", help="briefly: only to see that it runs")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    if options.smoke:
        options.epochs, options.patience = 2, 0.0
    options.watch = common.IdleWatch(options.patience)
    command = "python benchmarks/" + " ".join([Path(__file__).name, *sys.argv[1:]])
    about = common.machine({name: version(name) for name in ("torch", "deepspeed")}, command)
    with tempfile.TemporaryDirectory() as folder:
        result = measure(options, Path(folder))
    write({"machine": about | {"samples_on_an_idle_machine": str(options.watch)}, **result}, options.out)


if __name__ == "__main__":
    main()
