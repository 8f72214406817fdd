"""One loader in a fresh process, once: what ``throughput.py`` starts for every sample.

    python benchmarks/throughput_sample.py < JOB     # both ways one line of JSON

Start-up (imports, first batch) and a warm-up are timed apart; then batches are counted over a window that begins and
ends with the arrival of a batch, a whole number of batches from each worker. CPU time is that of this process and all
below it, so that a loader pays for its workers; memory is shared out among those who share it (PSS).
"""

import importlib
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import throughput_peers as peers

CHECKED = 4  # clips that must have been compared before anything is timed
CHECKED_BATCHES = 200
TICK = os.sysconf("SC_CLK_TCK")


def family() -> list[int]:
    """This process and all that descend from it."""
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            fields = read_stat(int(entry.name))
            if fields:
                parents[int(entry.name)] = int(fields[1])
    found = [os.getpid()]
    for pid in found:  # grows while it is read
        found += [child for child, parent in parents.items() if parent == pid]
    return found


def read_stat(pid: int) -> list[str]:
    """Fields of /proc/pid/stat behind the name; empty where the process has gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except OSError:
        return []


def cpu_seconds() -> float:
    """User and system time of the family, those included that it has waited for."""
    return sum(int(tick) for pid in family() for tick in read_stat(pid)[11:15]) / TICK


def memory_mb() -> dict[str, float]:
    """Resident memory of the family: its fair share (PSS), and this process's own with the part that is file."""
    share = 0
    for pid in family():
        try:
            rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
        except OSError:
            continue
        share += sum(int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Pss:"))
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    own = {name: int(status[key].split()[0]) for name, key in (("rss_mb", "VmRSS"), ("file_mb", "RssFile"))}
    return {name: round(value / 1024, 1) for name, value in ({"pss_mb": share} | own).items()}


def compare(batches: Iterator, reference: str, kind: str) -> dict:
    """Largest and mean difference of the fbank, before normalisation, and of HOG from what they should be."""
    with np.load(reference) as file:
        fbanks, hogs = file[f"{kind} fbank"], file[f"{kind} hog"]
    largest, means, hog = 0.0, [], None
    for made, _ in zip(batches, range(CHECKED_BATCHES), strict=False):
        for place, clip in enumerate(made.ids):
            if clip >= len(fbanks):
                continue
            difference = np.abs(made.fbank[place].numpy() - fbanks[clip]) * (2 * peers.STD)
            largest = max(largest, float(difference.max()))
            means.append(float(difference.mean()))
            if made.hog is not None:
                hog = max(hog or 0.0, float(np.abs(made.hog[place].numpy() - hogs[clip]).max()))
        if len(means) >= CHECKED:
            break
    return {"compared": len(means), "largest": largest, "mean": float(np.mean(means)) if means else None, "hog": hog}


def take(batches: Iterator, seconds: float, group: int, most: int) -> tuple[int, float]:
    """Take batches for a while, in groups, at most so many clips: clips, and seconds they took."""
    began, clips, count = time.monotonic(), 0, 0
    while time.monotonic() - began < seconds or count % group:
        clips += len(next(batches).ids)
        count += 1
        if most and clips >= most:
            break
    return clips, time.monotonic() - began


def sample(job: dict) -> dict:
    """All that is measured in this process; ``Bench.sample`` writes the job."""
    home = importlib.import_module(f"throughput_{job['home']}")
    peers.torch.set_num_threads(1)
    ready = time.monotonic()
    batches = getattr(home, job["name"])(
        peers.Job(job["source"], job["workers"], job["batch"], fixed=bool(job["reference"]))
    )
    next(batches)
    first = time.monotonic()
    found = {"start_s": first - job["started"], "first_batch_s": first - ready}
    if job["reference"]:
        found["check"] = compare(batches, job["reference"], job["kind"])
    if job["window_s"]:
        take(batches, job["warm_s"], job["workers"], 0)
        cpu = cpu_seconds()
        clips, wall = take(batches, job["window_s"], job["workers"], job["most_clips"])
        found |= {"clips": clips, "clips_per_s": clips / wall, "cpu_s_per_1000": (cpu_seconds() - cpu) * 1e3 / clips}
    found |= memory_mb()
    batches.close()
    return found


def main() -> None:
    print(json.dumps(sample(json.load(sys.stdin))))


if __name__ == "__main__":
    main()
