"""The workers behind a loader: threads that turn clip indices into ready batches, some batches ahead.

A batch is cut into parts of a few clips, and a worker carries its part all the way: read -> decode -> crop -> resample,
loop -> fbank, HOG (numba) -> its rows of the batch. Nothing is handed from thread to thread, and a clip stays in its
core's cache; the plain clips of a part go that way together, in one call. For a GPU a worker stops at the samples of
the crop; when a batch has all of them, the last worker copies them to the device, where torch resamples them and
computes the features.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, fields, replace

import numpy as np
import torch
from torch import Tensor

import fastsskd_kernels as kernels
from fastsskd.answers.stored import Crops
from fastsskd.audio.info import SAMPLE_RATE, BadClip
from fastsskd.batch import Batch
from fastsskd.clip_bytes import ShardFiles
from fastsskd.clip_reader import ClipReader, Crop, Window, announce
from fastsskd.manifest import Manifest
from fastsskd.packed_clips import PackedClips
from fastsskd.patches import NUM_MEL_BINS, PATCH
from fastsskd.recycle import Recycler
from fastsskd.sampler import Sampler

_CROP_STREAM = 100  # random streams from 100 on are ours; below, the masks' (kernels/random.py)
PART = 8
"""Clips that a worker takes at a time: enough to be worth a call of DALI, few enough to stay in cache."""


@dataclass(frozen=True)
class StreamSettings:
    """What a stream loads and how; the fields are those of :class:`~fastsskd.loader.Loader`."""

    manifest: Manifest
    sampler: Sampler
    train: bool
    seed: int
    num_samples: int
    num_frames: int
    mean: float
    std: float
    device: torch.device
    workers: int
    prefetch: int
    waveform: bool
    crops: Crops | None = None
    start: float = 0.0


@dataclass
class Delivery:
    """A batch, when the device will be done with it, the position after it, and the clips left out of it."""

    batch: Batch
    ready: torch.cuda.Event | None
    position: int
    skipped: dict[str, str]


@dataclass
class _Work:
    """A batch being made.

    Attributes:
        epoch: that it is of.
        results: what became of each clip: None = its rows are filled; a crop for the device; or why it is bad.
        parts_left: parts of it that are not finished.
    """

    epoch: int
    index: np.ndarray
    seed: np.ndarray
    crops: list[Crop]
    position: int
    fbank: Tensor
    hog: Tensor
    waveform: Tensor | None
    parts_left: int
    results: list[BadClip | kernels.CropInputs | None] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)
    done: Future[Delivery] = field(default_factory=Future)


class Stream:
    """Batches from a cursor on, made by a pool of workers.

    It does not refer to the Loader, so that a Loader nobody uses any more is collected and its workers stopped.

    Args:
        settings: what to load and how.
        epoch, position: the cursor to start at.
    """

    def __init__(self, settings: StreamSettings, epoch: int, position: int):
        self._s = settings
        self._plans = self._plan(epoch, position)
        self._ahead: deque[_Work] = deque()
        self._shards, self._memory = ShardFiles(settings.manifest.root), Recycler()
        self._own = threading.local()  # each worker's reader and scratch
        self._on_gpu = settings.device.type == "cuda"
        self._side = torch.cuda.Stream(settings.device) if self._on_gpu else None
        self._stopped, self._failed = threading.Event(), False
        self._count, self._busy = threading.Lock(), 0.0
        self._pool = ThreadPoolExecutor(settings.workers, thread_name_prefix="fastsskd-loader")
        self._herald = ThreadPoolExecutor(1, thread_name_prefix="fastsskd-ahead")
        self._start_work()

    def get(self) -> Delivery:
        """The next batch, in order; raises what went wrong while it was made."""
        if self._failed:
            raise RuntimeError("the loader has ended after an error; close() it and iterate anew")
        work = self._ahead.popleft()
        self._start_work()  # before waiting, so that the workers always have the next
        try:
            delivery = work.done.result()
        except BaseException:
            self._failed = True  # going on would leave out this batch's clips in silence
            raise
        if delivery.ready is not None:  # made on the workers' CUDA stream
            current = torch.cuda.current_stream(self._s.device)
            current.wait_event(delivery.ready)
            for column in fields(delivery.batch):
                value = getattr(delivery.batch, column.name)
                if isinstance(value, Tensor) and value.is_cuda:
                    value.record_stream(current)
        return delivery

    @property
    def busy(self) -> float:
        """Seconds that the workers have worked so far, all together."""
        return self._busy

    def stop(self) -> None:
        self._stopped.set()
        for pool in (self._herald, self._pool):
            pool.shutdown(wait=True, cancel_futures=True)

    def _plan(self, epoch: int, position: int) -> Iterator[tuple[int, np.ndarray, int]]:
        """Epoch, clips, and the position after each batch; training goes on through all epochs to come."""
        while True:
            for index, after in self._s.sampler.batches(epoch, position):
                yield epoch, index, after
            if not self._s.train:
                return
            epoch, position = epoch + 1, 0

    def _start_work(self) -> None:
        """Give the workers batches until enough are on their way."""
        while len(self._ahead) < self._s.prefetch:
            plan = next(self._plans, None)
            if plan is None:
                return
            work = self._new_work(*plan)
            self._ahead.append(work)
            self._herald.submit(announce, self._s.manifest, work.index, self._shards)
            for start in range(0, len(work.index), PART) or [0]:  # an empty batch has one empty part
                self._pool.submit(self._do_part, work, range(start, min(start + PART, len(work.index))))

    def _new_work(self, epoch: int, index: np.ndarray, position: int) -> _Work:
        s, size = self._s, len(index)
        seed = kernels.derive_seeds(s.seed, epoch, index)
        crop_seed = seed if s.crops is None else s.crops.seeds(epoch, index)
        where = kernels.uniform(torch.from_numpy(crop_seed), 1, stream=_CROP_STREAM)[:, 0].tolist()
        crops = [Crop(s.num_samples, share if s.train or s.crops is not None else s.start) for share in where]
        rows = 0 if self._on_gpu else size
        fbank = self._memory.empty(rows, s.num_frames, NUM_MEL_BINS)
        hog = torch.empty(rows, s.num_frames * NUM_MEL_BINS // PATCH**2)
        waveform = self._memory.empty(rows, s.num_samples) if s.waveform else None
        parts = max(-(-size // PART), 1)
        return _Work(epoch, index, seed, crops, position, fbank, hog, waveform, parts, [None] * size)

    # The rest runs in the workers.

    def _do_part(self, work: _Work, places: range) -> None:
        if self._stopped.is_set():
            return
        begin = time.perf_counter()
        try:
            left = self._fill(work, places)
            index, crops = [int(work.index[place]) for place in left], [work.crops[place] for place in left]
            for at, clip in self._tools().reader.read(index, crops):
                place = left[at]
                work.results[place] = clip if isinstance(clip, BadClip) else self._place(work, place, clip)
            with work.lock:
                work.parts_left -= 1
                is_last = work.parts_left == 0
            if is_last:
                work.done.set_result(self._deliver(work))
        except BaseException as error:  # whatever it is, the consumer must hear of it rather than wait for ever
            with work.lock:
                if not work.done.done():
                    work.done.set_exception(error)
        finally:
            with self._count:
                self._busy += time.perf_counter() - begin

    def _fill(self, work: _Work, places: range) -> list[int]:
        """Fill the rows of clips that need no decoder and no device; returns the places of the others."""
        if self._on_gpu or self._s.waveform:
            return list(places)
        rows = slice(places.start, places.stop)
        positions = np.array([crop.position for crop in work.crops[rows]])
        filled = self._tools().packed.fill(work.index[rows], positions, work.fbank[rows], work.hog[rows])
        return [place for place, done in zip(places, filled.tolist(), strict=True) if not done]

    def _tools(self) -> threading.local:
        """This worker's own: its two readers and its scratch."""
        if not hasattr(self._own, "reader"):
            s = self._s
            features = {"num_samples": s.num_samples, "num_frames": s.num_frames, "mean": s.mean, "std": s.std}
            self._own.reader = ClipReader(s.manifest, self._shards, PART)
            self._own.packed = PackedClips(s.manifest, self._shards, **features)
            self._own.waveform = torch.empty(1, s.num_samples)
        return self._own

    def _place(self, work: _Work, place: int, clip: Window) -> kernels.CropInputs | None:
        """Fill the clip's rows of the batch; for a GPU, cut out what goes there."""
        if self._on_gpu:
            return inputs_for_device(clip, work.crops[place])
        waveform = None if self._s.waveform else crop_in_place(clip, work.crops[place])
        if waveform is None:
            waveform = self._own.waveform if work.waveform is None else work.waveform[place : place + 1]
            crop_into(waveform[0].numpy(), clip, work.crops[place])
        rows = work.fbank[place : place + 1], work.hog[place : place + 1]
        kernels.features(waveform, num_frames=self._s.num_frames, mean=self._s.mean, std=self._s.std, out=rows)
        return None

    def _deliver(self, work: _Work) -> Delivery:
        """Leave out the bad clips, name them, and put the batch together."""
        skipped = {
            self._s.manifest.key(i): str(result)
            for i, result in zip(work.index, work.results, strict=True)
            if isinstance(result, BadClip)
        }
        good = np.array([not isinstance(result, BadClip) for result in work.results], bool)
        index, columns = work.index[good], [work.fbank, work.hog, work.waveform]
        if skipped and not self._on_gpu:
            columns = [column if column is None else column[torch.from_numpy(good)] for column in columns]
        answers = (None, None) if self._s.crops is None else self._s.crops.answers(work.epoch, index)
        batch = Batch(
            columns[0],
            columns[1],
            torch.from_numpy(self._s.manifest.label_of(index)),
            [self._s.manifest.key(i) for i in index],
            torch.from_numpy(index.astype(np.int64)),
            torch.from_numpy(work.seed[good]),
            columns[2],
            *answers,
        )
        if not self._on_gpu:
            return Delivery(batch, None, work.position, skipped)
        crops = [result for result in work.results if not isinstance(result, BadClip)]
        return Delivery(*self._on_device(batch, crops), work.position, skipped)

    def _on_device(self, batch: Batch, crops: list[kernels.CropInputs]) -> tuple[Batch, torch.cuda.Event]:
        """Fill the batch on the GPU, on a CUDA stream of its own."""
        s = self._s
        with torch.cuda.device(s.device), torch.cuda.stream(self._side):
            waveform = kernels.resample_on_device(crops, s.num_samples, s.device)
            fbank, hog = waveform.new_empty(batch.fbank.shape), waveform.new_empty(batch.hog.shape)
            if len(crops):
                fbank, hog = kernels.features(waveform, num_frames=s.num_frames, mean=s.mean, std=s.std)
            batch = replace(
                batch,
                fbank=fbank,
                hog=hog,
                label=batch.label.to(s.device, non_blocking=True),
                seed=batch.seed.to(s.device, non_blocking=True),
                waveform=waveform if s.waveform else None,
                teacher_probs=_to(batch.teacher_probs, s.device),
                teacher_features=_to(batch.teacher_features, s.device),
            )
            return batch, self._side.record_event()


def _to(values: Tensor | None, device: torch.device) -> Tensor | None:
    return None if values is None else values.to(device, non_blocking=True)


def crop_in_place(clip: Window, crop: Crop) -> Tensor | None:
    """The crop where it lies, ``(1, S)`` float32 or int16, if the clip has the right rate and is long enough."""
    if clip.rate != SAMPLE_RATE or clip.length < crop.num_samples:
        return None
    start = kernels.crop_start(crop.position, clip.length, crop.num_samples) - clip.begin
    return torch.from_numpy(clip.samples[start : start + crop.num_samples])[None]


def crop_into(out: np.ndarray, clip: Window, crop: Crop) -> None:
    """Write the clip's crop or loop at ``SAMPLE_RATE`` to ``out``, ``(crop.num_samples,)`` float32."""
    rates, where = (clip.rate, crop.num_samples, crop.position, SAMPLE_RATE), (clip.begin, clip.length)
    kernels.resample_crop_or_loop(clip.samples, *rates, begin=where[0], length=where[1], out=out)


def inputs_for_device(clip: Window, crop: Crop) -> kernels.CropInputs:
    """What of the clip a GPU needs for its crop or loop; at rates that have no form for it, the finished crop."""
    rates, where = (clip.rate, crop.num_samples, crop.position, SAMPLE_RATE), (clip.begin, clip.length)
    if kernels.has_device_form(clip.rate, SAMPLE_RATE):
        return kernels.crop_inputs(clip.samples, *rates, begin=where[0], length=where[1])
    samples = kernels.resample_crop_or_loop(clip.samples, *rates, begin=where[0], length=where[1])
    return kernels.CropInputs(samples, SAMPLE_RATE, 0, crop.num_samples)
