"""`fastsskd profile`: measure a stage's loader and step, alone and together, and say which holds the other up."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastsskd import distributed, ds_config, peak
from fastsskd.batch import Batch
from fastsskd.clip_table import PACKED
from fastsskd.profile import disk as profile_disk
from fastsskd.profile import step as profile_step
from fastsskd.profile.advice import Advice, advise
from fastsskd.profile.job import Job, say
from fastsskd.profile.runs import Trace, endless, four_runs, real_batches
from fastsskd.profile.stages import Pace, Pipelines, marginal
from fastsskd.profile.stats import slope, waits
from fastsskd.profile.verdict import Found, RankFound, StageCost, Verdict, verdict

SHARES = {"runs": 0.45, "stages": 0.14, "threads": 0.09, "formats": 0.06, "disk": 0.08, "step": 0.10, "sent": 0.08}
"""Of the time there is."""
ENOUGH_CLIPS = 500
"""Fewer do not tell whether memory grows."""


@dataclass
class Profile:
    """What was found out.

    Attributes:
        found: the numbers; verdict, advice: what they mean.
        traces: of the four runs, by rank.
        formats: clips of the sample and pace by kind of file.
        skipped: clips left out, and why.
        batch: clips of an optimizer step; kind: of the stage.
        seconds: that measuring took; setup: that everything before it took.
        others: share of the machine's cores that other processes kept busy meanwhile.
    """

    found: Found
    verdict: Verdict
    advice: list[Advice]
    traces: list[dict[str, Trace]]
    formats: dict[str, tuple[int, Pace]]
    skipped: dict[str, str]
    batch: int
    kind: str
    seconds: float
    others: float
    setup: float = 0.0


def profile(job: Job, seconds: float) -> Profile:
    """Measure a job for about ``seconds``; longer where a few steps take longer. Every rank must call it."""
    begin, ticks = time.perf_counter(), Ticks.now()
    ranks = distributed.gather_objects(_measure(job, {name: part * seconds for name, part in SHARES.items()}))
    found = _found(job, ranks)
    answer, spent = verdict(found), time.perf_counter() - begin
    return Profile(
        found=found,
        verdict=answer,
        advice=advise(found, answer.word),
        traces=[rank["traces"] for rank in ranks],
        formats=ranks[0]["formats"],
        skipped={key: reason for rank in ranks for key, reason in rank["skipped"].items()},
        batch=job.sizes.total,
        kind=job.stage.kind,
        seconds=spent,
        others=_others(ticks, spent),
    )


def _measure(job: Job, share: dict[str, float]) -> dict[str, Any]:
    """All that one rank measures; ``share`` says for how many seconds each thing."""
    batches = real_batches(job)
    rounds = _rounds(job, batches[0], share["runs"])
    say(f"profiling {job.stage.name} for about {sum(share.values()):.0f} s: four runs ...")
    traces, skipped = four_runs(job, batches, share["runs"], rounds)
    say("the loader's stages, and the step's ...")
    with contextlib.closing(job.loader()) as loader:
        workers, prefetch = loader.workers, loader.prefetch
    pipelines = Pipelines(job.clips, job.config.data, job.device, workers)
    distributed.barrier()
    own = {"traces": traces, "skipped": skipped, "workers": workers, "prefetch": prefetch}
    own["stages"] = pipelines.stages(share["stages"])
    own["threads"] = pipelines.by_threads(share["threads"], thread_counts(workers))
    own["formats"] = pipelines.by_format(share["formats"])
    distributed.barrier()  # the disk is everybody's
    own["disk"] = profile_disk.measure(pipelines, share["disk"])
    distributed.barrier()
    own["parts"] = profile_step.parts(job, batches[0], share["step"])
    sent = profile_step.communication(job, batches[0], share["sent"])
    own["rank"] = _rank(job, traces, sent)
    return own


def _found(job: Job, ranks: list[dict[str, Any]]) -> Found:
    """From what the ranks measured; the same on every rank, which must all come to the same conclusions."""
    first = ranks[0]
    packed = job.clips.source == PACKED
    found = Found(
        ranks=tuple(rank["rank"] for rank in ranks),
        node_ranks=_node_ranks(),
        cores=distributed.cores_per_rank(),
        shares_cores=job.device.type == "cpu",
        workers=first["workers"],
        prefetch=first["prefetch"],
        source=PACKED if packed else max(first["formats"], key=lambda kind: first["formats"][kind][0]),
        clip_seconds=job.config.data.seconds,
        precision=ds_config.precision(job.deepspeed_config),
        stages=_stages(ranks),
        threads=first["threads"],
        disk=first["disk"],
    )
    (own, *_) = distributed.gather_objects(dataclasses.replace(found, mfu=_mfu(job, found)))
    return own


def save_trace(job: Job, path: Path) -> None:
    """A few real steps in torch's profiler; rank 0 writes, every rank takes part."""
    with contextlib.closing(job.loader()) as loader:
        out = path if distributed.rank() == 0 else None
        profile_step.save_trace(job, endless(loader), out)


def thread_counts(workers: int) -> list[int]:
    """Numbers of threads worth a look: powers of two up to twice the cores of this rank, and the loader's own."""
    cores, counts = distributed.cores_per_rank(), {workers}
    count = 1
    while count < cores:
        counts.add(count)
        count *= 2
    return sorted(counts | {cores, 2 * cores})


def _rounds(job: Job, batch: Batch, seconds: float) -> int:
    """Three rounds of the four runs, or one if steps are so slow that they would be too short."""
    for _ in range(2):  # the first one allocates
        begin = time.perf_counter()
        profile_step.step(job, batch, {})
        took = time.perf_counter() - begin
    took = max(other for (other,) in distributed.gather_objects((took,)))
    return 3 if seconds / 3 / 4.5 > 8 * took else 1


def _rank(job: Job, traces: dict[str, Trace], sent: profile_step.Alone | None) -> RankFound:
    whole = traces["end_to_end"]
    waited = [wait for _, wait, _ in whole.steps]
    # The first batches fill memory that is then used again; what the runs between two rounds took is not this one's.
    later = [line[len(line) // 3 :] for line in whole.memory]
    clips = sum(line[-1][0] - line[0][0] for line in later if line)
    cached = traces["cached"].rate()
    own = job.sizes.micro * job.sizes.accumulation
    return RankFound(
        synthetic=traces["synthetic"].rate(),
        cached=cached,
        loader=traces["loader"].rate(),
        end_to_end=whole.rate(),
        waits=waits(waited, sum(wait + rest for _, wait, rest in whole.steps)),
        first=statistics.median(whole.first),
        step=sent.together.value if sent else own / cached.value,
        alone=sent.alone if sent else None,
        memory=max((float(used) for line in later for _, used in line), default=0.0),
        growth=slope(later) if clips >= ENOUGH_CLIPS else math.nan,
    )


def _stages(ranks: list[dict[str, Any]]) -> tuple[StageCost, ...]:
    """Means over the ranks; what a pipeline or a part can do is added up."""
    found, count = [], len(ranks)
    costs = [marginal(rank["stages"]) for rank in ranks]
    for name in ranks[0]["stages"]:
        rate = sum(rank["stages"][name].clips_per_second for rank in ranks)
        seconds, cpu = (statistics.fmean(cost[name][i] for cost in costs) for i in (0, 1))
        found.append(StageCost(name, "loader", rate, seconds, cpu))
    for name in ranks[0]["parts"]:
        seconds, cpu = (statistics.fmean(rank["parts"][name][i] for rank in ranks) for i in (0, 1))
        found.append(StageCost(name, "step", count / max(seconds, 1e-9), seconds, cpu))
    return tuple(found)


def _mfu(job: Job, found: Found) -> float:
    classes = len(job.parts.data.train.classes)
    known = peak.of_stage(job.config, job.stage.kind, classes, job.teacher, job.device, found.precision)
    return found.step.value * known["clip_flops"] / known["peak_flops"]


def _node_ranks() -> int:
    return int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)


@dataclass(frozen=True)
class Ticks:
    """Seconds of processors since the machine started, and of this process; where the system tells."""

    busy: float
    own: float

    @staticmethod
    def now() -> Ticks:
        file, own = Path("/proc/stat"), time.process_time()
        if not file.exists():
            return Ticks(own, own)
        numbers = [float(word) for word in file.read_text().split("\n", 1)[0].split()[1:9]]
        return Ticks((sum(numbers) - numbers[3] - numbers[4]) / os.sysconf("SC_CLK_TCK"), own)


def _others(begin: Ticks, seconds: float) -> float:
    """Share of the machine's cores that other processes kept busy since ``begin``, those of all ranks left out."""
    now = Ticks.now()
    own = sum(spent for (spent,) in distributed.gather_objects((now.own - begin.own,)))
    nodes = max(distributed.world_size() // _node_ranks(), 1)
    spent = now.busy - begin.busy - own / nodes
    return min(max(spent / (seconds * (os.cpu_count() or 1)), 0.0), 1.0)
