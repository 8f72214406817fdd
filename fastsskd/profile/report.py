"""What `fastsskd profile` found, for people and as JSON."""

from __future__ import annotations

import dataclasses
import datetime
import math
import os
from typing import Any

import torch

from fastsskd import hardware
from fastsskd.profile.advice import Advice, contention
from fastsskd.profile.run import Profile
from fastsskd.profile.stats import Interval, number, together
from fastsskd.profile.verdict import Found, StageCost
from fastsskd.run_folder import versions

RUNS = {
    "synthetic": "synthetic batch",
    "cached": "cached batches",
    "loader": "loader alone",
    "end_to_end": "end to end",
}


def rates(found: Found) -> dict[str, Interval]:
    """Clips a second of the four runs, over all ranks."""
    synthetic = together([rank.synthetic for rank in found.ranks])
    return {"synthetic": synthetic, "cached": found.step, "loader": found.loader, "end_to_end": found.end_to_end}


def text(result: Profile) -> str:
    """The verdict in the first line, then the tables."""
    found = result.found
    lines = [result.verdict.line, summary(result), "", "run              clips/s   95 % of the medians"]
    for name, rate in rates(found).items():
        lines.append(f"{RUNS[name]:<15} {number(rate.value):>8}   {number(rate.low)} to {number(rate.high)}")
    lines += ["", *stage_lines(found), "", *waiting_lines(result), "", *machine_lines(result), ""]
    lines += [*advice_lines(result.advice), "", stamp(result)]
    return "\n".join(lines)


def summary(result: Profile) -> str:
    """End to end in a sentence, and what the loader's share of it is."""
    found = result.found
    e, a, b = found.end_to_end, found.step, found.loader
    line = (
        f"End to end {e.value:.0f} clips/s ({number(e.low)} to {number(e.high)}), "
        f"{100 * e.value / a.value:.0f} % of the step's own pace; "
        f"steps wait {100 * max(rank.waits.share for rank in found.ranks):.1f} % of the time."
    )
    if found.shares_cores and contention(a.value, b.value, e.value) > 0.3:
        line += f" Loader and step share {found.cores} core(s), so that each takes from the other."
    if result.others > 0.1:
        line += (
            f" Other processes kept {100 * result.others:.0f} % of the machine busy: do not trust small differences."
        )
    return line


def stage_lines(found: Found) -> list[str]:
    lines = ["stage            clips/s   +ms/clip   CPU s/1000   x real time   share"]
    for group, says in (("loader", "up to and with it, all threads"), ("step", "alone, all ranks")):
        whole = found.group(group)
        lines.append(f"  {group}: {says}")
        for stage in (stage for stage in found.stages if stage.group == group):
            share = 100 * stage.seconds / whole if whole else 0.0
            lines.append(
                f"{stage.name:<15} {number(stage.up_to):>8} {1e3 * stage.seconds:>10.3f} {1e3 * stage.cpu:>12.2f} "
                f"{real_time(found, stage):>13} {share:>6.1f} %"
            )
    if found.communication or len(found.ranks) > 1:
        took = max(rank.step for rank in found.ranks)
        lines.append(
            f"all-reduce               {1e3 * took * found.communication:>8.3f} ms a step, "
            f"{100 * found.communication:.1f} % of it, by leaving it out"
        )
    return lines


def real_time(found: Found, stage: StageCost) -> str:
    """Seconds of audio that the stage alone gets through in a second, all threads or ranks together."""
    if stage.seconds < 1e-6:
        return "-"
    at_once = len(found.ranks) * (found.workers if stage.group == "loader" else 1)
    return f"{found.clip_seconds * at_once / stage.seconds:.0f}"


def waiting_lines(result: Profile) -> list[str]:
    lines = ["rank  wait ms p50     p95     p99     max   ready   waiting   first batch   step ms alone"]
    for number_, rank in enumerate(result.found.ranks):
        w = rank.waits
        points = "".join(f"{1e3 * value:>8.1f}" for value in (w.p50, w.p95, w.p99, w.max))
        alone = "-" if rank.alone is None else f"{1e3 * rank.alone.value:.1f}"
        lines.append(
            f"{number_:<8}{points} {100 * w.ready:>5.0f} % {100 * w.share:>7.1f} % {rank.first:>11.2f} s {alone:>15}"
        )
    return lines


def machine_lines(result: Profile) -> list[str]:
    """Disk, memory, clips left out, threads and formats: a line each."""
    found, lines = result.found, []
    disk = found.disk
    if disk is not None and disk.was_cold:
        needed = found.step.value * disk.bytes
        lines.append(
            f"disk: {disk.disk / 1e9:.2f} GB/s cold, {disk.memory / 1e9:.2f} from memory; loader {disk.cold:.0f} "
            f"clips/s cold, {disk.warm:.0f} warm; the step wants {needed / 1e9:.3f} GB/s"
        )
    elif disk is not None:
        lines.append(f"disk: these files cannot be dropped from memory; {disk.memory / 1e9:.2f} GB/s from there")
    largest = max(found.ranks, key=lambda rank: rank.memory)
    known = math.isfinite(largest.growth)
    growth = f"{1e-3 * largest.growth:+.2f} MB per 1000 clips" if known else "too few clips to tell whether it grows"
    lines.append(f"memory: {largest.memory / 1e9:.2f} GB a rank, {growth}")
    left = f"bad clips: {len(result.skipped)} left out"
    if result.skipped:
        key, reason = next(iter(result.skipped.items()))
        left += f" (first: {key}: {reason}); run `fastsskd check`"
    lines.append(left)
    threads = ", ".join(f"{n}: {pace.clips_per_second:.0f}" for n, pace in found.threads.items())
    lines.append(f"clips/s by threads: {threads} (now {found.workers}, {found.prefetch} batches ahead)")
    formats = ", ".join(f"{kind} {pace.clips_per_second:.0f}" for kind, (_, pace) in result.formats.items())
    lines.append(f"clips/s by format: {formats}")
    return lines


def advice_lines(advice: list[Advice]) -> list[str]:
    if not advice:
        return ["Advice: none; nothing here would gain 3 %."]
    lines = ["Advice, the best first:"]
    for place, one in enumerate(advice, 1):
        gain = "gain depends on the choice" if one.gain is None else f"predicted x {one.gain:.2f}"
        if one.tried is not None:
            gain += f", tried x {one.tried.value:.2f} ({one.tried.low:.2f} to {one.tried.high:.2f})"
        lines.append(f"{place}. {one.key}: {one.text}; {gain}")
        lines.append(f"   {one.how}")
    return lines


def machine() -> dict[str, Any]:
    """Where and when, without names."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "cpu": hardware.cpu_name(),
        "cores": os.cpu_count(),
        "gpu": device,
        "load_average": [round(value, 1) for value in os.getloadavg()],
        "versions": versions(),
    }


def stamp(result: Profile) -> str:
    about, found = machine(), result.found
    named = ("fastsskd", "torch", "deepspeed")
    known = ", ".join(f"{name} {about['versions'][name]}" for name in named if name in about["versions"])
    return (
        f"{about['date']}; {about['gpu'] or about['cpu']}, {about['cores']} cores, {len(found.ranks)} rank(s); stage "
        f"{result.kind}, batch {result.batch}, {found.clip_seconds:g} s, {found.precision}; {known}; load "
        f"{about['load_average'][0]}; measured in {result.seconds:.0f} s after {result.setup:.0f} s of setting up"
    )


def to_dict(result: Profile) -> dict[str, Any]:
    """Everything as plain values; NaN is None."""
    found = result.found
    return _plain(
        {
            "verdict": result.verdict.word,
            "line": result.verdict.line,
            "headroom": result.verdict.ratio.value - 1.0,
            "clips_per_second": {name: dataclasses.asdict(rate) for name, rate in rates(found).items()},
            "communication": found.communication,
            "mfu": found.mfu,
            "stages": [dataclasses.asdict(stage) for stage in found.stages],
            "ranks": [dataclasses.asdict(rank) for rank in found.ranks],
            "threads": {str(n): dataclasses.asdict(pace) for n, pace in found.threads.items()},
            "formats": {kind: {"clips": n, **dataclasses.asdict(pace)} for kind, (n, pace) in result.formats.items()},
            "disk": None if found.disk is None else dataclasses.asdict(found.disk),
            "workers": found.workers,
            "prefetch": found.prefetch,
            "advice": [dataclasses.asdict(one) for one in result.advice],
            "bad_clips": result.skipped,
            "stage": result.kind,
            "batch": result.batch,
            "seconds": result.seconds,
            "setup": result.setup,
            "others_busy": result.others,
            "machine": machine(),
        }
    )


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
