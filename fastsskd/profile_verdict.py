"""From what was measured to what it means: which part holds training up, and what would help how much.

Pure functions of numbers. Nothing here measures.
"""

from __future__ import annotations

from dataclasses import dataclass

from fastsskd.profile_disk import Disk
from fastsskd.profile_stages import Pace
from fastsskd.profile_stats import Interval, Waits, together

NEAR = 0.10
"""Loader and step are balanced if their rates differ by no more than this share."""
SURE = 0.5
"""... and if the interval of their ratio is not wider than this share of it."""
SLOW_RANK = 1.5
"""A rank is slow if it takes this many times as long as the others' median, and longer than each for certain."""
WORTH = 1.03
"""Advice that gains less is not given."""

LOADER, COMPUTE, COMMUNICATION = "LOADER-BOUND", "COMPUTE-BOUND", "COMMUNICATION-BOUND"
BALANCED, UNCLEAR = "BALANCED", "CANNOT TELL"


@dataclass(frozen=True)
class RankFound:
    """What one rank measured of itself.

    Attributes:
        synthetic, cached, loader, end_to_end: its clips a second in the four runs.
        waits: of its steps, end to end.
        first: seconds until its first batch.
        step: seconds of a step on a cached batch; alone: the same if no rank waits for another (None with one rank).
        memory: bytes; growth: bytes a clip, end to end; NaN = too few clips to tell.
    """

    synthetic: Interval
    cached: Interval
    loader: Interval
    end_to_end: Interval
    waits: Waits
    first: float
    step: float
    alone: Interval | None
    memory: float
    growth: float


@dataclass(frozen=True)
class StageCost:
    """Of one stage of the loader or part of the step.

    Attributes:
        group: ``"loader"`` or ``"step"``.
        up_to: clips a second of the pipeline that ends with it (loader), or of it alone (step), over all ranks.
        seconds: that it adds to a clip, of a thread (loader) or of a rank (step); cpu: of a processor.
    """

    name: str
    group: str
    up_to: float
    seconds: float
    cpu: float


@dataclass(frozen=True)
class Found:
    """All that was measured.

    Attributes:
        ranks: by rank; node_ranks: ranks of a node; cores: of a rank.
        shares_cores: loader and step compute on the same cores.
        source: ``"pack"`` or the commonest format. clip_seconds: length of a crop. precision: the ds_config's.
        threads: pace of the whole pipeline by number of threads.
        mfu: share of the machine's peak that the cached step reaches; None = not known.
    """

    ranks: tuple[RankFound, ...]
    node_ranks: int
    cores: int
    shares_cores: bool
    workers: int
    prefetch: int
    source: str
    clip_seconds: float
    precision: str
    stages: tuple[StageCost, ...]
    threads: dict[int, Pace]
    disk: Disk | None = None
    mfu: float | None = None

    @property
    def step(self) -> Interval:
        """Clips a second of the step alone, on cached batches, over all ranks."""
        return together([rank.cached for rank in self.ranks])

    @property
    def loader(self) -> Interval:
        """Of the loader alone: every rank needs its share, so the slowest one counts for all."""
        return min((rank.loader for rank in self.ranks), key=lambda rate: rate.value).times(len(self.ranks))

    @property
    def end_to_end(self) -> Interval:
        return together([rank.end_to_end for rank in self.ranks])

    @property
    def communication(self) -> float:
        """Share of a cached step that goes away when nothing is sent; waiting for a slow rank is not in it."""
        alone = [rank.alone.value for rank in self.ranks if rank.alone is not None]
        together_ = max(rank.step for rank in self.ranks)
        return max(1.0 - max(alone) / together_, 0.0) if alone and together_ > 0 else 0.0

    def seconds(self, *names: str) -> float:
        """That some stages add to a clip."""
        return sum(stage.seconds for stage in self.stages if stage.name in names)

    def group(self, name: str) -> float:
        """Seconds of a clip in all stages of a group."""
        return sum(stage.seconds for stage in self.stages if stage.group == name)


@dataclass(frozen=True)
class Verdict:
    """Attributes:
    word: one of the five above. line: the answer in one line.
    ratio: loader's rate over the step's.
    """

    word: str
    line: str
    ratio: Interval


def ratio_of(step: Interval, loader: Interval) -> Interval:
    """How many times the step's rate the loader gives, at worst and at best."""
    return Interval(loader.value / step.value, loader.low / step.high, loader.high / step.low)


def judge(step: Interval, loader: Interval, communication: float) -> str:
    """The word for two rates and the share of the step that is communication."""
    ratio = ratio_of(step, loader)
    if abs(ratio.value - 1.0) <= NEAR and ratio.high - ratio.low <= SURE * ratio.value:
        return BALANCED
    if ratio.low <= 1.0 <= ratio.high:
        return UNCLEAR
    if ratio.value < 1.0:
        return LOADER
    return COMMUNICATION if communication > 0.5 else COMPUTE


def verdict(found: Found) -> Verdict:
    step, loader = found.step, found.loader
    ratio, word = ratio_of(step, loader), judge(step, loader, found.communication)
    headroom = 100.0 * (ratio.value - 1.0)
    line = f"{word}: the step could take {step.value:.0f} clips/s, the loader gives {loader.value:.0f}"
    line += f" (headroom {headroom:+.0f} %)"
    if word == UNCLEAR:
        line += f"; their intervals overlap: {step} and {loader}; measure longer (--seconds), on an idle machine"
    if word == COMMUNICATION:
        line += f"; {100.0 * found.communication:.0f} % of the step is communication"
    slow = slow_rank(found)
    if slow is not None:
        line += f"; rank {slow[0]} is slow: {slow[1]} {slow[2]:.1f} times as long as the others'"
    return Verdict(word, line, ratio)


def slow_rank(found: Found) -> tuple[int, str, float] | None:
    """The rank that holds the others up, with what, and how many times as long it takes."""
    candidates = [("its loader takes", [_inverse(rank.loader) for rank in found.ranks])]
    if all(rank.alone is not None for rank in found.ranks):
        candidates.insert(0, ("its step takes", [rank.alone for rank in found.ranks]))
    for what, seconds in candidates:
        worst = max(range(len(seconds)), key=lambda r: seconds[r].value)
        others = sorted((own for r, own in enumerate(seconds) if r != worst), key=lambda own: own.value)
        if others and all(own.high < seconds[worst].low for own in others):
            times = seconds[worst].value / others[(len(others) - 1) // 2].value
            if times >= SLOW_RANK:
                return worst, what, times
    return None


def _inverse(rate: Interval) -> Interval:
    """Seconds of a clip."""
    return Interval(*(1.0 / max(value, 1e-9) for value in (rate.value, rate.high, rate.low)))


def contention(step: float, loader: float, end_to_end: float) -> float:
    """Share of the faster of the two that is not hidden behind the slower: 0 = side by side, 1 = one after the other.

    ``1 / E = max(1 / A, 1 / B) + k min(1 / A, 1 / B)``. On a GPU the loader's cores are idle anyway and k is near 0;
    on a CPU both want the same cores.
    """
    slow, fast = max(1.0 / step, 1.0 / loader), min(1.0 / step, 1.0 / loader)
    return min(max((1.0 / end_to_end - slow) / fast, 0.0), 1.0)


def predict(found: Found, *, step: float = 1.0, loader: float = 1.0) -> float:
    """Factor on the speed end to end if the step or the loader becomes so many times as fast."""
    a, b, e = found.step.value, found.loader.value, found.end_to_end.value
    k = contention(a, b, e)

    def together_(a: float, b: float) -> float:
        return 1.0 / (max(1.0 / a, 1.0 / b) + k * min(1.0 / a, 1.0 / b))

    return together_(a * step, b * loader) / together_(a, b)


@dataclass(frozen=True)
class Advice:
    """Attributes:
    key: ``"threads"``, ``"prefetch"``, ``"pack"``, ``"disk"``, ``"teacher"``, ``"ranks"``, ``"slow rank"``,
        ``"communication"``, ``"optimizer"`` or ``"model"``.
    text: what takes the time. how: what to do about it.
    gain: predicted factor on the clips a second end to end; None = depends on what is chosen.
    effort: 0 a setting, 1 a job to run once, 2 other hardware or another model.
    value: of the setting, for :mod:`fastsskd.profile_try`.
    tried: the factor when it was really done, and its interval; None = was not.
    """

    key: str
    text: str
    how: str
    gain: float | None
    effort: int
    value: int = 0
    tried: Interval | None = None

    @property
    def weight(self) -> float:
        """By which advice is sorted: the gain, less where it costs more to have."""
        return 0.05 if self.gain is None else (self.gain - 1.0) * (1.0, 0.8, 0.6)[self.effort]


def advise(found: Found, word: str) -> list[Advice]:
    """What would help, the best first."""
    given = [
        *_ranks(found),
        *_threads(found),
        *_pack(found),
        *_disk(found),
        *_prefetch(found, word),
        *_step(found, word),
        *_cores(found),
    ]
    given = [advice for advice in given if advice.gain is None or advice.gain >= WORTH or advice.key == "ranks"]
    return sorted(given, key=lambda advice: -advice.weight)


def _ranks(found: Found) -> list[Advice]:
    slow = slow_rank(found)
    if slow is None:
        return []
    rank, what, times = slow
    gain = predict(found, **{"step" if "step" in what else "loader": times})
    text = f"rank {rank}: {what} {times:.1f} times as long as the others', which wait for it"
    how = "look at that machine: clocks, other processes, cores, disk; or leave it out"
    return [Advice("slow rank", text, how, gain, 0)]


def _better_threads(found: Found) -> tuple[int, float] | None:
    """Another number of threads, and how many times as fast the loader is with it."""
    now = found.threads.get(found.workers)
    if now is None:
        return None
    best = max(found.threads.values(), key=lambda pace: pace.clips_per_second)
    # The fewest that reach nearly the best: more would only get in the step's way.
    best = next(p for _, p in sorted(found.threads.items()) if p.clips_per_second >= 0.95 * best.clips_per_second)
    factor = best.clips_per_second / now.clips_per_second
    return None if best.threads == found.workers or factor < 1.05 else (best.threads, factor)


def _reads_slowly(found: Found) -> bool:
    return found.seconds("read") > 0.4 * found.group("loader") > 0


def _threads(found: Found) -> list[Advice]:
    better = _better_threads(found)
    if better is None or _reads_slowly(found):  # which is said of the disk
        return []
    number, factor = better
    text = f"the loader has {found.workers} thread(s); with {number} it is {factor:.1f} times as fast"
    return [Advice("threads", text, f"--set data.workers={number}", predict(found, loader=factor), 0, number)]


_RAW_RATE = 2e9  # bytes a second of a thread that copies out of memory
_MADE = ("fbank", "HOG", "copy, resample")  # what packed clips need too


def _pack(found: Found) -> list[Advice]:
    if found.source in ("pack", "wav") and found.seconds("resample, crop") < 0.3 * found.group("loader"):
        return []
    whole = found.group("loader")
    raw = found.clip_seconds * 32000  # bytes of a crop, 16 bit at 16 kHz
    read = found.seconds("read") * (min(raw / max(found.disk.bytes, 1.0), 10.0) if found.disk else 1.0)
    packed = found.seconds(*_MADE) + max(read, raw / _RAW_RATE)
    costs = {name: found.seconds(name) for name in ("decode", "resample, crop")}
    heavy = max(costs, key=lambda name: costs[name])
    what = {"decode": "decoding", "resample, crop": "resampling"}[heavy]
    text = f"{what} takes {100 * costs[heavy] / max(whole, 1e-12):.0f} % of the loader's work on each clip, every epoch"
    how = "fastsskd pack once, at full quality, then --set data.manifest=PACKED/packed.manifest"
    return [Advice("pack", text, how, predict(found, loader=whole / max(packed, 1e-9)), 1)]


def _disk(found: Found) -> list[Advice]:
    disk = found.disk
    if _reads_slowly(found):
        whole, read = found.group("loader"), found.seconds("read")
        text = f"reading takes {100 * read / whole:.0f} % of the loader's time, though the files were read before"
        how = "copy the data to a local disk; or pack it, if small files are slow"
        better = _better_threads(found)
        if better is None:
            gain = predict(found, loader=whole / max(whole - 0.95 * read, 1e-9))
            return [Advice("disk", text, how, gain, 2)]
        hidden, how = predict(found, loader=better[1]), f"--set data.workers={better[0]} hides some of it; or {how}"
        return [Advice("disk", text, how, hidden, 0, better[0])]
    if disk is None or not disk.was_cold:
        return []
    ranks = found.node_ranks
    if disk.cold * ranks < 0.8 * min(disk.warm * ranks, found.step.value):
        text = (
            f"clips that are not in memory come at {disk.cold:.0f} a second and rank instead of {disk.warm:.0f}: the "
            f"first epoch, and all if the data is larger than the memory"
        )
        how = "more memory, a faster disk, or smaller files (--encoding flac in fastsskd pack)"
        return [Advice("disk", text, how, None, 2)]
    return []


def _prefetch(found: Found, word: str) -> list[Advice]:
    share = max(rank.waits.share for rank in found.ranks)
    if found.shares_cores or word not in (COMPUTE, BALANCED) or share < 0.05:
        return []
    text = f"steps wait {100 * share:.0f} % of the time though the loader is fast enough on average: it gives bursts"
    gain = 1.0 / (1.0 - min(share, 0.9))
    more = min(4 * found.prefetch, 64)
    return [Advice("prefetch", text, f"--set data.prefetch={more}", gain, 0, more)] if more > found.prefetch else []


def _step(found: Found, word: str) -> list[Advice]:
    whole, given = found.group("step"), []
    if not whole:
        return []
    teacher, optimizer = found.seconds("teacher"), found.seconds("optimizer")
    if teacher:
        text = f"the teacher takes {100 * teacher / whole:.0f} % of the step"
        how = "fastsskd teach once, then --set distill.stored=ANSWERS"
        given.append(Advice("teacher", text, how, predict(found, step=whole / max(whole - teacher, 1e-9)), 1))
    share = found.communication
    if share >= 0.1:
        text = f"{100 * share:.0f} % of the step is communication that nothing hides"
        gain = predict(found, step=1.0 / (1.0 - 0.75 * share))
        how = 'a larger micro-batch, or "gradient_accumulation_steps" of 4; "overlap_comm": true; a lower ZeRO stage'
        given.append(Advice("communication", text, how, gain, 0))
    if optimizer > 0.3 * whole:
        text = f"the optimizer takes {100 * optimizer / whole:.0f} % of the step, whatever the batch"
        gain = predict(found, step=whole / (whole - 0.5 * optimizer))
        given.append(Advice("optimizer", text, "a batch twice as large", gain, 0))
    model = found.seconds("forward", "backward")
    if word in (COMPUTE, BALANCED) and model > 0.5 * whole:
        text = f"the model itself takes {100 * model / whole:.0f} % of the step"
        if found.mfu is not None:
            text += f", at {100 * found.mfu:.0f} % of the peak"
        how = (
            "a smaller model.size, a larger micro-batch, more GPUs"
            if found.precision != "fp32"
            else ('"bf16": {"enabled": true}, a larger micro-batch, a smaller model.size, more GPUs')
        )
        given.append(Advice("model", text, how + "; no setting of the loader helps", None, 2))
    return given


def _cores(found: Found) -> list[Advice]:
    """How many ranks a node's cores can feed."""
    if found.shares_cores or found.node_ranks < 2:
        return []
    cpu = sum(stage.cpu for stage in found.stages if stage.group == "loader")
    wanted = found.step.value / len(found.ranks) * cpu
    cores = found.cores * found.node_ranks
    fed = int(cores / max(wanted, 1e-9))
    if wanted <= found.cores or not fed or fed >= found.node_ranks:
        return []
    text = f"a rank's loader wants {wanted:.1f} cores at the step's pace, and has {found.cores}"
    how = f"{fed} ranks on a node of {cores} cores do as much as {found.node_ranks}; or pack, to need fewer cores"
    return [Advice("ranks", text, how, 1.0, 2, fed)]
