"""What the benchmarks share: waiting for an idle machine, saying which machine it was, parts in processes of
their own, small trainings' clips and batches, requirements met or missed, results as files."""

import datetime
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

from fastsskd import hardware

LAUNCH = Path(__file__).parents[1] / "launch"


class IdleWatch:
    """Waits until nobody else computes, as long as its patience lasts, and counts how often that succeeded."""

    def __init__(self, patience_s: float):
        self.patience_s = patience_s
        self.quiet, self.samples = 0, 0

    def wait(self) -> None:
        """Sleep until nobody else computes, or patience ends."""
        self.samples += 1
        while self.patience_s > 0 and Path("/proc/stat").exists():
            used_before, total_before = busy_ticks()
            time.sleep(0.1)
            used, total = busy_ticks()
            self.patience_s -= 0.1
            if used - used_before <= 0.06 * (total - total_before):
                self.quiet += 1
                return

    def __str__(self) -> str:
        return f"{self.quiet} of {self.samples}"


def busy_ticks() -> tuple[float, float]:
    """Ticks of all cores since boot: used, all."""
    ticks = [float(value) for value in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]]
    return sum(ticks) - ticks[3] - ticks[4], sum(ticks)


def machine(versions: dict[str, str], command: str) -> dict:
    """Where and when, without names."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "cpu": hardware.cpu_name(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "versions": versions,
        "load_average": [round(value, 1) for value in os.getloadavg()],
        "command": command,
    }


def machine_line(about: dict) -> str:
    """The same as one paragraph."""
    versions = ", ".join(f"{name} {number}" for name, number in about["versions"].items())
    return (
        f"{about['date']}, {about['cpu']}, {about['cores']} cores, Python {about['python']}, {versions}; load average "
        f"{about['load_average'][0]} at the start, machine otherwise idle in {about['samples_on_an_idle_machine']} "
        f"samples. `{about['command']}`"
    )


def run_part(name: str, command: list[str], limit: float | None = None) -> dict:
    """Run one part; how many seconds it took, and if it failed or ran past the limit, the last line of what it said."""
    begin = time.monotonic()
    print(f"{name}: {' '.join(command[1:])}", file=sys.stderr, flush=True)
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=limit)
    except subprocess.TimeoutExpired:
        return {"seconds": limit, "failed": f"stopped after {limit:.0f} s"}
    found: dict = {"seconds": time.monotonic() - begin}
    if done.returncode:
        lines = [line for line in done.stdout.splitlines() if line.strip()]
        found["failed"] = lines[-1].strip()[:200] if lines else f"exit code {done.returncode}"
    return found


def answer(what: str, command: list[str], env: dict[str, str] | None = None) -> dict:
    """What a command prints as JSON; if it fails, the last line that it said ends the benchmark."""
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | (env or {}))
    if done.returncode:
        raise SystemExit(f"{what}: {(done.stderr.strip().splitlines() or ['no word'])[-1]}")
    return json.loads(done.stdout)


def fastsskd(*words: object) -> None:
    """Run one of our commands and show nothing of it."""
    run_module("fastsskd.cli", *words)


def run_module(name: str, *words: object) -> None:
    command = [sys.executable, "-m", name, *map(str, words)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def sounds(folder: Path) -> Path:
    """Manifest of the quickstart's sounds, which are generated below ``folder``."""
    manifest = folder / "sounds.manifest"
    run_module("fastsskd.sound_events", "--out", folder / "sounds")
    fastsskd("index", folder / "sounds", "--out", manifest)
    return manifest


def batch_file(folder: Path, clips: int, source: Path = LAUNCH / "ds_config.json", tensorboard: bool = False) -> Path:
    """A ds_config with batches of so many clips and no accumulation; unless asked for, without TensorBoard's files."""
    tree = json.loads(source.read_text(encoding="utf-8"))
    for name in ("train_micro_batch_size_per_gpu", *(() if tensorboard else ("tensorboard",))):
        tree.pop(name, None)
    path = folder / f"ds{clips}.json"
    tree |= {"train_batch_size": clips, "gradient_accumulation_steps": 1}
    path.write_text(json.dumps(tree), encoding="utf-8")
    return path


def verdict(what: str, value: float, sign: str, limit: float, unit: str) -> dict:
    """One requirement, what was found, and whether it holds."""
    met = value <= limit if sign == "<=" else value >= limit
    return {"what": what, "found": round(value, 3), "unit": unit, "required": f"{sign} {limit:g}", "met": met}


def verdict_lines(rows: list[dict]) -> list[str]:
    """Requirements as a table; ``met`` is None where the run cannot tell, and ``why`` says what was in the way."""
    lines = ["| requirement | found | required | |", "|---|---|---|---|"]
    for row in rows:
        mark = {True: "met", False: "**missed**", None: f"cannot tell: {row.get('why')}"}[row["met"]]
        lines.append(f"| {row['what']} | {row['found']:.2f} {row['unit']} | {row['required']} {row['unit']} | {mark} |")
    return lines


def write(out: Path, name: str, results: dict, page: str) -> None:
    """Results as ``name.json`` and as a page, ``name.md``, in the folder ``out``."""
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{name}.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    (out / f"{name}.md").write_text(page, encoding="utf-8")
