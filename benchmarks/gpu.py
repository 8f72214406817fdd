"""Every figure that the README owes to a GPU, in one call of ten minutes: is the loader ever in the card's way?

    python benchmarks/gpu.py                    # on a machine with a card: results in benchmarks/results/gpu.{json,md}
    python benchmarks/gpu.py --smoke --out OUT  # the same path with a tiny model, on a CPU too: nothing to quote

One part after the other, each a process of its own with a limit of time, so that one that fails costs the others
nothing: the kernels; the Multi-SSL step of the base model against the machine's matrix products, with and without
activation checkpointing, and the labelled step under AST and BEATs; then whole trainings by ``launch/train.py`` of the
base model on 10 s clips, from packed shards, from FLAC and from 44.1 kHz Ogg, with DALI on the device. Of these the
share of time that the step waited for data is what this project is about: it is to stay below 1 %.

Last result: none; no card has run it yet.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import common
import numpy as np
import soundfile
import torch

HERE = Path(__file__).parent
LAUNCH = HERE.parent / "launch"
SOURCES = (("packed", "wav", 16_000), ("flac", "flac", 16_000), ("ogg", "ogg", 44_100))
DISTINCT = 40
GOALS = {"clips_per_s": 500.0, "wait": 0.01}
"""Of the training from packed shards, on an H200: clips a second at base size, share of time waiting."""


class Clock:
    """What is left of the time that all parts have together."""

    def __init__(self, minutes: float):
        self.end = time.monotonic() + 60 * minutes

    def left(self) -> float:
        return max(self.end - time.monotonic(), 1.0)


def save_clips(folder: Path, count: int, seconds: float) -> dict[str, Path]:
    """Noise that swells and fades in three kinds of files, after the first few of them under further names.

    The shards are packed from the WAV files.
    """
    random = np.random.default_rng(0)
    for name, suffix, rate in SOURCES:
        written = []
        for number in range(count):
            file = folder / name / f"class{number % 4}" / f"{number}.{suffix}"
            file.parent.mkdir(parents=True, exist_ok=True)
            if number >= DISTINCT:
                os.link(written[number % DISTINCT], file)
                continue
            samples = random.standard_normal(round(seconds * rate)) * 0.1
            samples *= 0.5 + 0.5 * np.sin(np.arange(len(samples)) / rate * (1 + number % 7))
            soundfile.write(file, samples.astype(np.float32), rate)
            written.append(file)
    manifests = {}
    for name, _, _ in SOURCES:
        manifests[name] = folder / f"{name}.manifest"
        call("index", str(folder / name), "--out", str(manifests[name]))
    call("pack", str(manifests["packed"]), "--out", str(folder / "shards"))
    return manifests | {"packed": folder / "shards" / "packed.manifest"}


def call(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "fastsskd.cli", *arguments], check=True, stderr=subprocess.DEVNULL)


def train(name: str, manifest: Path, folder: Path, args: argparse.Namespace, limit: float) -> dict:
    """A Multi-SSL stage from one kind of files: speed, waiting and utilisation after the first lines of its log."""
    tree = {"train_batch_size": args.batch, "gradient_clipping": 1.0, "zero_optimization": {"stage": 1}}
    if args.precision != "fp32":
        tree[args.precision] = {"enabled": True}
    (folder / "ds.json").write_text(json.dumps(tree), encoding="utf-8")
    clips = int(args.clips * 0.8)  # the rest is held out for evaluation
    fields = {
        "data.manifest": manifest,
        "data.seconds": args.seconds,
        "model.size": args.size,
        "recipe.stages": '["ssl"]',
        "recipe.iterations": 1,
        "ssl.epochs": max(args.steps * args.batch // max(clips, 1), 1),
        "run.log_every": max(args.steps // 12, 1),
        "run.pictures_every": 0,
        "run.out": folder / f"run-{name}",
    }
    command = [sys.executable, str(LAUNCH / "train.py"), "--ds_config", str(folder / "ds.json")]
    command += ["--config", str(LAUNCH / "configs" / "audioset2m.toml")]
    command += [word for key, value in fields.items() for word in ("--set", f"{key}={value}")]
    found = common.run_part(name, command, limit)
    metrics = folder / f"run-{name}" / "metrics.jsonl"
    lines = [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.exists() else []
    steady = lines[2:] or lines[1:]
    if steady:
        found |= {
            "clips_per_s": statistics.median(line["clips_per_second"] for line in steady),
            "wait": sum(line["wait"] * line["seconds"] for line in steady) / sum(line["seconds"] for line in steady),
            "mfu": statistics.median(line["mfu"] for line in steady) if "mfu" in steady[0] else None,
            "steps": lines[-1]["step"],
        }
    return found


def measure(args: argparse.Namespace, folder: Path) -> dict:
    clock, python = Clock(args.minutes), sys.executable
    smoke = ["--smoke", "--no-levers", "--no-teachers"] if args.smoke else []
    found = {}
    if not args.smoke:
        command = [python, str(HERE / "kernels.py"), "--rounds", "3", "--patience", "0", "--out", str(args.out)]
        found["kernels"] = common.run_part("kernels", command, clock.left() / 4)
    step = [python, str(HERE / "train_step.py"), "--size", args.size, "--batch", str(args.batch), "--patience", "0"]
    step += ["--rounds", "1" if args.smoke else "5", "--out", str(args.out), *smoke]
    found["training step"] = common.run_part("training step", step, clock.left() / 2)
    manifests = save_clips(folder, args.clips, args.seconds)
    for number, (name, _, _) in enumerate(SOURCES):
        found[f"from {name}"] = train(name, manifests[name], folder, args, clock.left() / (len(SOURCES) - number))
    return found


def verdicts(found: dict) -> list[dict]:
    row = found["from packed"]
    if "wait" not in row:
        return []
    return [
        common.verdict("training from shards", row["clips_per_s"], ">=", GOALS["clips_per_s"], "clips/s"),
        common.verdict("waiting for data, from shards", 100 * row["wait"], "<=", 100 * GOALS["wait"], "% of the time"),
    ]


def page(result: dict) -> str:
    about = result["machine"]
    lines = ["# On a GPU", "", f"{about['date']}, {about['device']}, {about['cpu']}, {about['cores']} cores, "]
    lines[-1] += ", ".join(f"{name} {number}" for name, number in about["versions"].items())
    lines += ["", f"`{about['command']}`", "", *common.verdict_lines(result["verdicts"]), ""]
    lines += ["| part | s | clips/s | waiting | utilisation | |", "|---|---|---|---|---|---|"]
    for name, row in result["parts"].items():
        speed = f"{row['clips_per_s']:.0f}" if "clips_per_s" in row else ""
        wait = f"{100 * row['wait']:.2f} %" if "wait" in row else ""
        mfu = f"{100 * row['mfu']:.0f} %" if row.get("mfu") else ""
        lines.append(f"| {name} | {row['seconds']:.0f} | {speed} | {wait} | {mfu} | {row.get('failed', '')} |")
    return "\n".join([*lines, "", "Kernels and steps: kernels.md and train_step_gpu.md beside this page.", ""])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="base")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--clips", type=int, default=640)
    parser.add_argument("--steps", type=int, default=240, help="of each training")
    parser.add_argument("--precision", choices=("bf16", "fp16", "fp32"), default="bf16")
    parser.add_argument("--minutes", type=float, default=10.0, help="for everything")
    parser.add_argument("--smoke", action="store_true", help="a tiny model and few clips: only to see that it runs")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    args = parser.parse_args(arguments)
    if not (args.smoke or torch.cuda.is_available()):
        parser.error("torch finds no GPU here; --smoke runs the same path without one")
    if args.smoke:
        args.size, args.batch, args.seconds, args.clips, args.steps = "nano", 4, 1.0, 20, 12
    args.out.mkdir(parents=True, exist_ok=True)
    command = " ".join(["python benchmarks/gpu.py", *(sys.argv[1:] if arguments is None else arguments)])
    about = common.machine({name: version(name) for name in ("torch", "deepspeed", "timm")}, command)
    about["device"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    with tempfile.TemporaryDirectory() as folder:
        found = measure(args, Path(folder))
    result = {"machine": about, "parts": found, "verdicts": verdicts(found)}
    common.write(args.out, "gpu", result, page(result))
    print(page(result))
    return int(any("failed" in row for row in found.values()))


if __name__ == "__main__":
    sys.exit(main())
