"""The producer behind a loader: one thread that turns clip indices into ready batches, in order.

Read and probe (threads) -> DALI: decode, downmix -> check, cut out the crop (threads) -> copy to the device ->
resample, loop, fbank, HOG (numba in threads on a CPU, torch on a GPU) -> queue.
"""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

import fastsskd_kernels as kernels
from fastsskd.audio_file import AudioInfo, BadClip, check_decoded, probe
from fastsskd.batch import Batch
from fastsskd.decode import Decoded, DecodeError, Decoder
from fastsskd.manifest import Manifest
from fastsskd.model import NUM_MEL_BINS, PATCH
from fastsskd.sampler import Sampler

_CROP_STREAM = 100  # random streams from 100 on are ours; below, the masks' (kernels/random.py)
SAMPLE_RATE = 16000
_DALI_DEPTH = 2  # batches DALI decodes ahead


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


@dataclass(frozen=True)
class _File:
    """An encoded clip: its bytes, its header, where its crop starts (a share of the possible starts), its segment."""

    data: np.ndarray
    info: AudioInfo
    crop: float
    segment: tuple[float, float]


@dataclass
class _Planned:
    """One batch between the sampler and the queue: its clips, and those found bad so far."""

    index: np.ndarray
    seed: np.ndarray
    position: int
    files: list[_File]
    skipped: dict[str, str]

    def keep(self, good: list[int]) -> None:
        """Reduce it to the clips at the places ``good``."""
        self.index, self.seed = self.index[good], self.seed[good]
        self.files = [self.files[place] for place in good]


class Stream:
    """The producer thread and its queue.

    It does not refer to the Loader, so that a Loader nobody uses any more is collected and its thread stopped.

    Args:
        settings: what to load and how.
        epoch, position: the cursor to start at.
    """

    def __init__(self, settings: StreamSettings, epoch: int, position: int):
        self._s = settings
        self._plans = self._plan(epoch, position)
        self._reading: deque = deque()  # batches whose files are being read
        self._decoding: deque[_Planned] = deque()  # batches inside DALI, in order
        self._queue: queue.Queue = queue.Queue(maxsize=settings.prefetch)
        self._stopped = threading.Event()
        self._pool = ThreadPoolExecutor(settings.workers, thread_name_prefix="fastsskd-read")
        self._thread = threading.Thread(target=self._produce, name="fastsskd-loader", daemon=True)
        self._thread.start()

    def get(self) -> tuple[Batch, int, dict[str, str]]:
        """The next batch, the position after it, and the clips left out of it; raises what ended the producer."""
        item = None
        while item is None:
            try:
                item = self._queue.get(timeout=1.0)
            except queue.Empty:
                if not self._thread.is_alive():
                    raise RuntimeError("the loader has ended after an error; close() it and iterate anew") from None
        if isinstance(item, BaseException):
            raise item
        batch, position, skipped, ready = item
        if ready is not None:  # made on the producer's CUDA stream
            current = torch.cuda.current_stream(self._s.device)
            current.wait_event(ready)
            for field in fields(batch):
                value = getattr(batch, field.name)
                if isinstance(value, Tensor) and value.is_cuda:
                    value.record_stream(current)
        return batch, position, skipped

    def stop(self) -> None:
        self._stopped.set()
        while self._thread.is_alive():  # the producer may be waiting for room in the queue
            try:
                self._queue.get_nowait()
            except queue.Empty:
                self._thread.join(timeout=0.05)
        self._pool.shutdown(wait=True, cancel_futures=True)

    # The rest runs in the producer thread.

    def _plan(self, epoch: int, position: int) -> Iterator[tuple[np.ndarray, np.ndarray, int]]:
        """Clips, their seeds, and the position after each batch; training goes on through all epochs to come."""
        while True:
            for index, after in self._s.sampler.batches(epoch, position):
                yield index, kernels.derive_seeds(self._s.seed, epoch, index), after
            if not self._s.train:
                return
            epoch, position = epoch + 1, 0

    def _produce(self) -> None:
        try:
            if self._s.device.type == "cuda":
                torch.cuda.set_device(self._s.device)
                with torch.cuda.stream(torch.cuda.Stream(self._s.device)):
                    self._produce_all()
            else:
                self._produce_all()
        except BaseException as error:  # whatever it is, the consumer must hear of it rather than wait for ever
            self._put(error)

    def _produce_all(self) -> None:
        decoder = Decoder(
            self._next_files, max_batch=self._s.sampler.batch_size, num_threads=self._s.workers, depth=_DALI_DEPTH
        )
        while not self._stopped.is_set():
            try:
                decoded = decoder.run()
            except DecodeError:
                decoded = None
            except StopIteration:
                self._flush_empty()
                return
            self._flush_empty()
            planned = self._decoding.popleft()
            if decoded is None:
                decoded = self._decode_each(decoder, planned)
            self._deliver(planned, self._cut(planned, decoded))

    def _next_files(self) -> list[np.ndarray]:
        """DALI's source: the next batch that has a readable clip, its files read ahead by the pool."""
        while True:
            while len(self._reading) < 1 + _DALI_DEPTH:
                plan = next(self._plans, None)
                if plan is None or self._stopped.is_set():
                    break
                index, seed, position = plan
                crops = kernels.uniform(torch.from_numpy(seed), 1, stream=_CROP_STREAM)[:, 0].tolist()
                crops = crops if self._s.train else [0.0] * len(crops)
                jobs = [self._pool.submit(self._read, i, crop) for i, crop in zip(index.tolist(), crops, strict=True)]
                self._reading.append((index, seed, position, jobs))
            if not self._reading:
                raise StopIteration
            planned = self._collect(*self._reading.popleft())
            self._decoding.append(planned)
            if planned.files:
                return [file.data for file in planned.files]

    def _read(self, i: int, crop: float) -> _File | BadClip:
        """Read and probe one file (in a pool thread)."""
        try:
            if self._s.manifest.bad(i):
                raise BadClip(self._s.manifest.bad(i))
            data = np.fromfile(self._s.manifest.path(i), np.uint8)
            return _File(data, probe(data.data), crop, self._s.manifest.segment(i))
        except BadClip as bad:
            return bad
        except OSError as error:
            return BadClip(f"cannot be read: {error.strerror or error}")

    def _collect(self, index: np.ndarray, seed: np.ndarray, position: int, jobs: list) -> _Planned:
        planned = _Planned(index, seed, position, [job.result() for job in jobs], {})
        self._leave_out(planned, planned.files)
        return planned

    def _leave_out(self, planned: _Planned, results: list) -> None:
        """Drop the clips whose result is a :class:`BadClip`, and note why."""
        for i, result in zip(planned.index, results, strict=True):
            if isinstance(result, BadClip):
                planned.skipped[self._s.manifest.key(i)] = str(result)
        planned.keep([place for place, result in enumerate(results) if not isinstance(result, BadClip)])

    def _decode_each(self, decoder: Decoder, planned: _Planned) -> list[Decoded]:
        """DALI refused the batch: decode its clips one by one and leave out the one at fault."""
        results: list[Decoded | BadClip] = []
        for file in planned.files:
            try:
                results.append(decoder.run_one(file.data))
            except DecodeError as error:
                results.append(BadClip(str(error)))
        self._leave_out(planned, results)
        return [result for result in results if isinstance(result, Decoded)]

    def _cut(self, planned: _Planned, decoded: list[Decoded]) -> Tensor:
        """Check what DALI does not report; resample each clip's crop or loop, on the device.

        Returns:
            ``(B, S)`` float32 waveforms at 16 kHz, on the device.
        """
        pairs = list(zip(planned.files, decoded, strict=True))
        num_samples = self._s.num_samples
        if self._s.device.type == "cuda":
            results = list(self._pool.map(lambda pair: _inputs_one(*pair, num_samples), pairs))
            self._leave_out(planned, results)
            crops = [result for result in results if not isinstance(result, BadClip)]
            return kernels.resample_on_device(crops, num_samples, self._s.device)
        rows = torch.empty(len(pairs), num_samples)
        results = list(self._pool.map(lambda pair, row: _cut_one(*pair, row.numpy()), pairs, rows))
        good = [place for place, result in enumerate(results) if result is None]
        self._leave_out(planned, results)
        return rows if len(good) == len(rows) else rows[good]

    def _flush_empty(self) -> None:
        """Deliver the batches at the head of the line that never went into DALI: no clip of theirs was readable."""
        while self._decoding and not self._decoding[0].files:
            self._deliver(self._decoding.popleft(), torch.empty(0, self._s.num_samples))

    def _deliver(self, planned: _Planned, waveform: Tensor) -> None:
        device = self._s.device
        waveform = waveform.to(device, non_blocking=True)
        fbank, hog = self._features(waveform)
        batch = Batch(
            fbank,
            hog,
            torch.from_numpy(self._s.manifest.label_of(planned.index)).to(device),
            [self._s.manifest.key(i) for i in planned.index],
            torch.from_numpy(planned.index.astype(np.int64)),
            torch.from_numpy(planned.seed).to(device),
            waveform if self._s.waveform else None,
        )
        ready = torch.cuda.current_stream(device).record_event() if device.type == "cuda" else None
        self._put((batch, planned.position, planned.skipped, ready))

    def _features(self, waveform: Tensor) -> tuple[Tensor, Tensor]:
        """fbank and HOG; on a CPU the rows are shared out over the pool, whose kernels release the GIL."""
        settings = {"num_frames": self._s.num_frames, "mean": self._s.mean, "std": self._s.std}
        if waveform.is_cuda and len(waveform):
            return kernels.features(waveform, **settings)
        fbank = waveform.new_empty(len(waveform), self._s.num_frames, NUM_MEL_BINS)
        hog = waveform.new_empty(len(waveform), self._s.num_frames * NUM_MEL_BINS // PATCH**2)
        share = -(-len(waveform) // self._s.workers) or 1
        parts = [slice(start, start + share) for start in range(0, len(waveform), share)]
        jobs = [self._pool.submit(kernels.features, waveform[p], **settings, out=(fbank[p], hog[p])) for p in parts]
        for job in jobs:
            job.result()
        return fbank, hog

    def _put(self, item: Any) -> None:
        while not self._stopped.is_set():
            try:
                self._queue.put(item, timeout=0.1)
                return
            except queue.Full:
                continue


def _checked(file: _File, clip: Decoded) -> np.ndarray:
    """The clip's samples at its own rate, its segment only; raises :class:`BadClip`."""
    check_decoded(clip.samples, file.info, clip.rate)
    start, end = file.segment
    if end <= 0:
        return clip.samples
    samples = clip.samples[round(start * clip.rate) : round(end * clip.rate)]
    if not len(samples):
        raise BadClip(f"is over before its segment begins, at {start:g} s")
    return samples


def _cut_one(file: _File, clip: Decoded, out: np.ndarray) -> BadClip | None:
    """Write the clip's crop or loop at 16 kHz to ``out``, or say what is wrong with the clip (in a pool thread)."""
    try:
        samples = _checked(file, clip)
    except BadClip as bad:
        return bad
    kernels.resample_into(out, samples, *kernels.resample_table(clip.rate, SAMPLE_RATE), file.crop)
    return None


def _inputs_one(file: _File, clip: Decoded, num_samples: int) -> BadClip | kernels.CropInputs:
    """What of the clip a GPU needs for its crop or loop, or what is wrong with the clip (in a pool thread)."""
    try:
        samples = _checked(file, clip)
    except BadClip as bad:
        return bad
    if kernels.has_device_form(clip.rate, SAMPLE_RATE):
        return kernels.crop_inputs(samples, clip.rate, num_samples, file.crop, SAMPLE_RATE)
    crop = kernels.resample_crop_or_loop(samples, clip.rate, num_samples, file.crop, SAMPLE_RATE)
    return kernels.CropInputs(crop, SAMPLE_RATE, 0, num_samples)
