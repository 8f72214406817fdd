"""What would help, and how much: advice from what `fastsskd profile` measured. Pure functions of numbers."""

from __future__ import annotations

from dataclasses import dataclass

from fastsskd.profile.stats import Interval
from fastsskd.profile.verdict import BALANCED, COMPUTE, Found, slow_rank

WORTH = 1.03
"""Advice that gains less is not given."""


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
    value: of the setting, for :mod:`fastsskd.profile.trial`.
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
    return None if best.threads == found.workers or factor < 1.15 else (best.threads, factor)


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
