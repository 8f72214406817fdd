"""From what was measured to what it means: which part holds training up.

Pure functions of numbers. Nothing here measures.
"""

from __future__ import annotations

from dataclasses import dataclass

from fastsskd.profile.disk import Disk
from fastsskd.profile.stages import Pace
from fastsskd.profile.stats import Interval, Waits, together

NEAR = 0.10
"""Loader and step are balanced if their rates differ by no more than this share."""
SURE = 0.5
"""... and if the interval of their ratio is not wider than this share of it."""
SLOW_RANK = 1.5
"""A rank is slow if it takes this many times as long as the others' median, and longer than each for certain."""

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
