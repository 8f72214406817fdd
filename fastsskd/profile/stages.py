"""What each stage of the loader costs, by pipelines that end one stage later each: read, decode, crop, fbank, HOG.

DALI tells no times of its operators, and stages that share a thread and its cache cannot be timed one by one; two
pipelines that differ in one stage can. They run as the loader does: threads, each of which takes a few clips all the
way. The clips are a sample of the training clips, in memory after a first pass.
"""

from __future__ import annotations

import itertools
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import fastsskd_kernels as kernels
from fastsskd.audio.info import BadClip
from fastsskd.clip_bytes import ShardFiles
from fastsskd.clip_reader import MAX_WHOLE, ClipReader, Crop, Window, open_clip
from fastsskd.clip_table import PACKED
from fastsskd.config import DataConfig
from fastsskd.errors import InputError
from fastsskd.manifest import Manifest
from fastsskd.patches import num_input_frames
from fastsskd.stream import PART, crop_in_place, crop_into, inputs_for_device

SAMPLE = 192  # clips
FORMATS = 4  # kinds of files that are measured one by one
ROUNDS = 3


@dataclass(frozen=True)
class Pace:
    """How fast a pipeline is.

    Attributes:
        threads: that worked.
        clips_per_second: of all threads together.
        cpu: seconds of processor time of a clip.
    """

    threads: int
    clips_per_second: float
    cpu: float

    @property
    def thread_seconds(self) -> float:
        """Of one thread, for a clip; waiting for a disk included."""
        return self.threads / self.clips_per_second


class Hand:
    """What one thread can do to a few clips of a sample, and what it needs for that.

    Each method takes rows of the sample and returns how many of them could be used.
    """

    def __init__(self, clips: Manifest, shards: ShardFiles, data: DataConfig, device: torch.device):
        self._clips, self._shards, self._device = clips, shards, device
        self._crop = Crop(round(data.seconds * 16000), 0.5)
        self._norm = {"num_frames": num_input_frames(data.seconds), "mean": data.mean, "std": data.std}
        self._reader = ClipReader(clips, shards, PART)
        self._waveform = torch.empty(1, self._crop.num_samples)
        self._features: tuple[Tensor, Tensor] | None = None
        self._bare: set[int] = set()  # clips that are read in part, and not decoded

    def read(self, part: Sequence[int]) -> int:
        """The bytes that decoding needs: all of a file; of uncompressed clips those of the crop."""
        done = 0
        for i in part:
            if i in self._bare:
                done += self.decode([i])
                continue
            with suppress(OSError, BadClip):
                clip = open_clip(self._clips, i, self._shards)
                if clip[:4] in (b"RIFF", b"RF64"):
                    self._bare.add(i)
                clip.read(0, min(len(clip), MAX_WHOLE))
                done += 1
        return done

    def decode(self, part: Sequence[int]) -> int:
        return sum(1 for _ in self._windows(part))

    def crop(self, part: Sequence[int]) -> int:
        """Resampled, and cut or looped to the length of training."""
        return sum(1 for _ in self._waveforms(part))

    def fbank(self, part: Sequence[int]) -> int:
        if self._device.type == "cuda":
            return self._there(part, kernels.fbank)
        return sum(kernels.fbank(waveform).shape[0] for waveform in self._waveforms(part))

    def features(self, part: Sequence[int]) -> int:
        """Normalised fbank and HOG."""
        if self._device.type == "cuda":
            return self._there(part, lambda waveform: kernels.features(waveform, **self._norm))
        done = 0
        for waveform in self._waveforms(part):
            self._features = kernels.features(waveform, **self._norm, out=self._features)
            done += 1
        return done

    def copy(self, part: Sequence[int]) -> int:
        """To the device, which resamples."""
        return self._there(part, lambda waveform: None)

    def _there(self, part: Sequence[int], then: Callable[[Tensor], object]) -> int:
        crops = [inputs_for_device(window, self._crop) for window in self._windows(part)]
        if crops:
            with torch.cuda.device(self._device):
                then(kernels.resample_on_device(crops, self._crop.num_samples, self._device))
                torch.cuda.synchronize(self._device)
        return len(crops)

    def _waveforms(self, part: Sequence[int]) -> Iterator[Tensor]:
        for window in self._windows(part):
            waveform = crop_in_place(window, self._crop)
            if waveform is None:
                waveform = self._waveform
                crop_into(waveform[0].numpy(), window, self._crop)
            yield waveform

    def _windows(self, part: Sequence[int]) -> Iterator[Window]:
        for _, clip in self._reader.read(list(part), [self._crop] * len(part)):
            if isinstance(clip, Window):
                yield clip


class Pipelines:
    """A sample of clips, and threads that do things to it.

    Args:
        clips: of the stage.
        data: the section of the configuration.
        device: where features are made.
        threads: as many as the loader has.
    """

    def __init__(self, clips: Manifest, data: DataConfig, device: torch.device, threads: int):
        self.threads, self.device = threads, device
        chosen = np.random.default_rng(0).permutation(len(clips))[:SAMPLE]
        self.clips, shards = clips.select(np.sort(chosen)), ShardFiles(clips.root)
        self._new_hand = lambda: Hand(self.clips, shards, data, device)
        self._hands: list[Hand] = []

    def stages(self, seconds: float) -> dict[str, Pace]:
        """The pipelines up to each stage, by the stage's name, in order; medians of rounds in which each had a turn."""
        middle = {"resample, crop": Hand.crop} if self.device.type == "cpu" else {"copy, resample": Hand.copy}
        work = {"read": Hand.read, "decode": Hand.decode, **middle, "fbank": Hand.fbank, "HOG": Hand.features}
        everything = range(len(self.clips))
        self.run(Hand.features, everything, seconds / 6)  # brings the files into memory
        share = seconds * 5 / 6 / ROUNDS / len(work)
        paces = [{name: self.run(do, everything, share) for name, do in work.items()} for _ in range(ROUNDS)]
        return {name: _median([pace[name] for pace in paces]) for name in work}

    def by_threads(self, seconds: float, counts: Sequence[int]) -> dict[int, Pace]:
        """The whole pipeline with other numbers of threads."""
        share, everything = seconds / 2 / len(counts), range(len(self.clips))
        paces = [{n: self.run(Hand.features, everything, share, threads=n) for n in counts} for _ in range(2)]
        return {n: _median([pace[n] for pace in paces]) for n in counts}

    def by_format(self, seconds: float) -> dict[str, tuple[int, Pace]]:
        """Clips of the sample and the whole pipeline's pace, for the commonest kinds of files."""
        kinds: dict[str, list[int]] = {}
        for i in range(len(self.clips)):
            kinds.setdefault(format_of(self.clips, i), []).append(i)
        common = sorted(kinds, key=lambda kind: -len(kinds[kind]))[:FORMATS]
        found = {}
        for kind in common:
            with suppress(InputError):  # none of this kind can be used
                found[kind] = (len(kinds[kind]), self.run(Hand.features, kinds[kind], seconds / len(common)))
        return found

    def run(
        self,
        do: Callable[[Hand, Sequence[int]], int],
        rows: Sequence[int],
        seconds: float,
        *,
        threads: int | None = None,
        once: bool = False,
    ) -> Pace:
        """``do`` to parts of the rows in threads, over and over for ``seconds``; or once, if that takes less."""
        threads = threads or self.threads
        self._hands += [self._new_hand() for _ in range(threads - len(self._hands))]
        size = PART if once else self._part_that_fits(do, rows[0], seconds, threads)
        size = max(min(size, -(-len(rows) // threads)), 1)
        parts = [rows[start : start + size] for start in range(0, len(rows), size)]
        numbers = itertools.count() if not once else iter(range(len(parts)))
        ready, done = threading.Barrier(threads + 1), []

        def work(hand: Hand) -> None:
            ready.wait()
            end = time.perf_counter() + seconds
            for number in numbers:  # one step of it is atomic
                done.append(do(hand, parts[number % len(parts)]))
                if time.perf_counter() >= end:
                    return

        with ThreadPoolExecutor(threads, thread_name_prefix="fastsskd-profile") as pool:
            futures = [pool.submit(work, hand) for hand in self._hands[:threads]]
            begin, cpu = time.perf_counter(), time.process_time()
            ready.wait()
            for future in futures:
                future.result()
            wall, cpu = time.perf_counter() - begin, time.process_time() - cpu
        if not sum(done):
            raise InputError(f"not one of {len(rows)} clips looked at can be used; see `fastsskd check`")
        return Pace(threads, sum(done) / wall, cpu / sum(done))

    def _part_that_fits(self, do: Callable[[Hand, Sequence[int]], int], row: int, seconds: float, threads: int) -> int:
        """Clips that a hand takes at once; fewer than in the loader where they would take too long."""
        for hand in self._hands[:threads]:  # which makes what it needs
            begin = time.perf_counter()
            do(hand, [row])
        return min(PART, int(seconds / 2 / (time.perf_counter() - begin)) + 1)


def format_of(clips: Manifest, i: int) -> str:
    """The kind of file a clip is in."""
    if clips.source == PACKED:
        return "packed"
    if clips.extent(i)[1] >= 0:
        return "tar"
    return Path(clips.path(i)).suffix.lower().lstrip(".") or "no suffix"


def marginal(paces: dict[str, Pace]) -> dict[str, tuple[float, float]]:
    """Seconds of a thread and of a processor that each stage adds to a clip."""
    added, before = {}, (0.0, 0.0)
    for name, pace in paces.items():
        now = (pace.thread_seconds, pace.cpu)
        added[name] = (max(now[0] - before[0], 0.0), max(now[1] - before[1], 0.0))
        before = (max(now[0], before[0]), max(now[1], before[1]))
    return added


def _median(paces: list[Pace]) -> Pace:
    rates = [pace.clips_per_second for pace in paces]
    return Pace(paces[0].threads, statistics.median(rates), statistics.median(pace.cpu for pace in paces))
