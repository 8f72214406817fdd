"""The loader: manifest -> ready batches of features, made ahead of training.

    sampler -> read + probe (threads) -> DALI: decode, resample, crop or loop, copy -> fbank + HOG -> queue -> training

One producer thread drives all of it and keeps ``prefetch`` batches ready. What a batch holds is a pure function of
(manifest, seed, epoch, position): no thread, rank or clock has a part in it. A clip that cannot be used is left out of
its batch, which is then smaller, and named in ``skipped``; nothing ever takes its place.
"""

from __future__ import annotations

import os
import queue
import threading
import weakref
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import fastsskd_kernels as kernels
import numpy as np
import torch
from torch import Tensor

from fastsskd import config, layouts, manifest
from fastsskd.audio_file import AudioInfo, BadClip, check_decoded_length, probe
from fastsskd.decode import SAMPLE_RATE, DecodeError, Decoder, EncodedClip
from fastsskd.errors import InputError
from fastsskd.model import num_input_frames
from fastsskd.sampler import Sampler

_CROP_STREAM = 100  # random streams from 100 on are ours; below, the masks' (kernels/random.py)
_DALI_DEPTH = 2  # batches DALI decodes ahead
_FEW_CLIPS = 100  # the share of bad clips means nothing before this many


@dataclass(frozen=True)
class Batch:
    """One batch of ``B`` clips; ``B`` is smaller than the batch size where clips were left out.

    Attributes:
        fbank: ``(B, T, F)`` float32, normalised, zero-padded before normalisation.
        hog: ``(B, N)`` float32, mean gradient magnitude of each patch, the x of Formula 1.
        label: ``(B,)`` int64, -1 = unlabelled; or ``(B, C)`` float32 multi-hot for a multi-label set.
        key: the clips' names.
        index: ``(B,)`` int64, rows of the manifest.
        seed: ``(B,)`` int64, one random seed a clip and epoch, for its masks.
        waveform: ``(B, S)`` float32 at 16 kHz, the same crops, if asked for.
    """

    fbank: Tensor
    hog: Tensor
    label: Tensor
    key: list[str]
    index: Tensor
    seed: Tensor
    waveform: Tensor | None = None

    def __len__(self) -> int:
        return len(self.key)

    def to(self, device: torch.device | str) -> Batch:
        """The batch with every tensor on ``device``."""
        tensors = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{k: v.to(device) for k, v in tensors.items() if isinstance(v, Tensor)})


class Loader:
    """Iterate over an epoch's batches; iterate again for the next epoch.

    Args:
        manifest: a :class:`~fastsskd.manifest.Manifest`, a manifest file, or a folder that can be indexed.
        batch_size: clips per rank and batch.
        seconds: length of the crops; shorter clips are looped.
        train: shuffle, random crops. Otherwise the manifest's order, from the start of each clip.
        seed: of the order, the crops and the batch's mask seeds.
        rank, world_size: this rank's share of each global batch.
        device: ``"cpu"``, ``"gpu"``, ``"cuda"`` or ``"cuda:N"``: where the batches are made and end up.
        workers: threads for reading, decoding and (on a CPU) features; None or 0 = this rank's share of the cores.
        prefetch: batches kept ready ahead of the consumer.
        waveform: put the waveform in the batch, for a teacher that has its own features.
        mean, std: normalisation, ``(x - mean) / (2 * std)``.
        drop_last_to: drop an epoch's tail to a multiple of this many clips; 0 = every clip exactly once.
        weights: sampling weight of each clip, see :class:`~fastsskd.sampler.Sampler`.
        max_bad_share: raise :class:`InputError` when a larger share of the clips seen is bad; None = never.

    Attributes:
        skipped: reason by key of every clip left out so far.
        epoch, position: the cursor: epoch, and clips of it that all ranks together have been given.
    """

    def __init__(
        self,
        manifest: Any,
        *,
        batch_size: int,
        seconds: float = 10.0,
        train: bool = False,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        device: torch.device | str = "cpu",
        workers: int | None = None,
        prefetch: int = 4,
        waveform: bool = False,
        mean: float = config.AUDIOSET_MEAN,
        std: float = config.AUDIOSET_STD,
        drop_last_to: int = 0,
        weights: np.ndarray | None = None,
        max_bad_share: float | None = None,
    ):
        self.manifest = open_manifest(manifest)
        self.train, self.seed, self.waveform = train, seed, waveform
        self.num_samples = round(seconds * SAMPLE_RATE)
        self.num_frames = num_input_frames(seconds)
        self.mean, self.std = mean, std
        self.device = _device(device)
        self.workers = workers or default_workers()
        self.prefetch, self.max_bad_share = prefetch, max_bad_share
        if batch_size < 1 or not 0 <= rank < world_size:
            raise ValueError(f"batch_size {batch_size}, rank {rank} of {world_size}: need batch_size > 0 and rank < world")
        self.sampler = Sampler(
            len(self.manifest),
            batch_size=batch_size,
            shuffle=train,
            seed=seed,
            rank=rank,
            world_size=world_size,
            weights=weights,
            drop_last_to=drop_last_to,
        )
        self.skipped: dict[str, str] = {}
        self.epoch = self.position = 0
        self._seen = 0
        self._stream: _Stream | None = None

    def __len__(self) -> int:
        """Batches of an epoch."""
        return self.sampler.num_batches()

    def __iter__(self) -> Iterator[Batch]:
        """The batches from the cursor to the end of the epoch; a new evaluation pass starts at the beginning."""
        if not self.train:
            self.load_state_dict({**self.state_dict(), "position": 0})
        if self._stream is None:
            self._stream = _Stream(self, self.epoch, self.position)
            self._finalizer = weakref.finalize(self, self._stream.stop)
        for _ in range(self.sampler.num_batches(self.position)):
            batch, position, skipped = self._stream.get()
            self.position = position
            if position >= self.sampler.epoch_length and self.train:
                self.epoch, self.position = self.epoch + 1, 0
            self._count(len(batch), skipped)
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """The cursor. It is global: any rank's state resumes all ranks, with any world size, workers and batch size."""
        return {
            "epoch": self.epoch,
            "position": self.position,
            "seed": self.seed,
            "num_clips": len(self.manifest),
            "manifest": self.manifest.fingerprint(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from ``state``.

        Raises:
            InputError: the state belongs to another list of clips or another seed, so its position means nothing here.
        """
        if state["manifest"] != self.manifest.fingerprint():
            raise InputError(
                f"loader state is of another manifest ({state['num_clips']} clips, {state['manifest']}; here "
                f"{len(self.manifest)}, {self.manifest.fingerprint()}): resume with the data the run was started on"
            )
        if state["seed"] != self.seed:
            raise InputError(f"loader state has seed {state['seed']}, this loader {self.seed}: use the run's own seed")
        self.close()
        self.epoch, self.position = state["epoch"], state["position"]

    def close(self) -> None:
        """Stop the producer; iterating again starts a new one at the cursor."""
        if self._stream is not None:
            self._finalizer.detach()
            self._stream.stop()
            self._stream = None

    def _count(self, num_good: int, skipped: dict[str, str]) -> None:
        self._seen += num_good + len(skipped)
        self.skipped.update(skipped)
        many = self.max_bad_share is not None and self._seen >= min(_FEW_CLIPS, len(self.manifest))
        if many and len(self.skipped) > self.max_bad_share * min(self._seen, len(self.manifest)):
            key, reason = next(iter(self.skipped.items()))
            raise InputError(
                f"{len(self.skipped)} of {min(self._seen, len(self.manifest))} clips are bad, more than "
                f"data.max_bad_share = {self.max_bad_share:g} (first: {key}: {reason}); run `fastsskd check`"
            )


def open_manifest(source: Any) -> manifest.Manifest:
    """A manifest as such, from its file, or from a folder or list that ``fastsskd index`` understands."""
    if isinstance(source, manifest.Manifest):
        return source
    path = Path(source)
    return layouts.build(path) if path.is_dir() else manifest.load(path)


def default_workers() -> int:
    """This rank's share of the cores it may run on."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def _device(device: torch.device | str) -> torch.device:
    device = torch.device("cuda" if device == "gpu" else device)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    return device


@dataclass
class _Planned:
    """One batch between the sampler and the queue: its clips, and those found bad so far."""

    index: np.ndarray
    seed: np.ndarray
    position: int
    clips: list[EncodedClip]
    infos: list[AudioInfo]
    skipped: dict[str, str]


class _Stream:
    """The producer thread and its queue. Holds no reference to its Loader, so that one can be collected."""

    def __init__(self, loader: Loader, epoch: int, position: int):
        self._manifest, self._sampler = loader.manifest, loader.sampler
        self._train, self._seed = loader.train, loader.seed
        self._num_samples, self._waveform = loader.num_samples, loader.waveform
        self._normalise = {"num_frames": loader.num_frames, "mean": loader.mean, "std": loader.std}
        self._device, self._workers = loader.device, loader.workers
        self._plans = self._plan(epoch, position)
        self._reading: deque = deque()  # batches whose files are being read
        self._decoding: deque[_Planned] = deque()  # batches inside DALI, in order
        self._queue: queue.Queue = queue.Queue(maxsize=loader.prefetch)
        self._stopped = threading.Event()
        self._pool = ThreadPoolExecutor(self._workers, thread_name_prefix="fastsskd-read")
        self._thread = threading.Thread(target=self._produce, name="fastsskd-loader", daemon=True)
        self._thread.start()

    def get(self) -> tuple[Batch, int, dict[str, str]]:
        item = self._queue.get()
        if isinstance(item, BaseException):
            raise item
        batch, position, skipped, ready = item
        if ready is not None:  # made on the producer's CUDA stream
            current = torch.cuda.current_stream(self._device)
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
            for index, after in self._sampler.batches(epoch, position):
                yield index, kernels.derive_seeds(self._seed, epoch, index), after
            if not self._train:
                return
            epoch, position = epoch + 1, 0

    def _produce(self) -> None:
        try:
            if self._device.type == "cuda":
                torch.cuda.set_device(self._device)
                with torch.cuda.stream(torch.cuda.Stream(self._device)):
                    self._produce_all()
            else:
                self._produce_all()
        except BaseException as error:  # whatever it is, the consumer must hear of it rather than wait for ever
            self._put(error)

    def _produce_all(self) -> None:
        decoder = Decoder(
            self._next_source,
            max_batch=self._sampler.batch_size,
            num_samples=self._num_samples,
            device=self._device,
            num_threads=self._workers,
            depth=_DALI_DEPTH,
        )
        while not self._stopped.is_set():
            try:
                waveforms = decoder.run()
            except DecodeError:
                waveforms = None
            except StopIteration:
                self._flush_empty()
                return
            self._flush_empty()
            planned = self._decoding.popleft()
            if waveforms is None:
                waveforms = self._decode_each(decoder, planned)
            self._finish(planned, *waveforms)

    def _next_source(self) -> list[EncodedClip]:
        """DALI's source: the next batch that has a readable clip, its files read ahead by the pool."""
        while True:
            while len(self._reading) < 1 + _DALI_DEPTH:
                plan = next(self._plans, None)
                if plan is None or self._stopped.is_set():
                    break
                index, seed, position = plan
                crops = kernels.uniform(torch.from_numpy(seed), 1, stream=_CROP_STREAM)[:, 0].tolist()
                crops = crops if self._train else [0.0] * len(crops)
                jobs = [self._pool.submit(self._read, i, crop) for i, crop in zip(index.tolist(), crops, strict=True)]
                self._reading.append((index, seed, position, jobs))
            if not self._reading:
                raise StopIteration
            planned = self._collect(*self._reading.popleft())
            self._decoding.append(planned)
            if planned.clips:
                return planned.clips

    def _read(self, i: int, crop: float) -> tuple[EncodedClip, AudioInfo] | BadClip:
        """Read and probe one file (in a pool thread)."""
        try:
            if self._manifest.bad(i):
                raise BadClip(self._manifest.bad(i))
            data = np.fromfile(self._manifest.path(i), np.uint8)
            return EncodedClip(data, crop, self._manifest.segment(i)), probe(data.data)
        except BadClip as bad:
            return bad
        except OSError as error:
            return BadClip(f"cannot be read: {error.strerror or error}")

    def _collect(self, index: np.ndarray, seed: np.ndarray, position: int, jobs: list) -> _Planned:
        results = [job.result() for job in jobs]
        good = np.array([not isinstance(r, BadClip) for r in results], dtype=bool)
        skipped = {self._manifest.key(i): str(r) for i, r in zip(index, results, strict=True) if isinstance(r, BadClip)}
        pairs = [r for r in results if not isinstance(r, BadClip)]
        return _Planned(index[good], seed[good], position, [c for c, _ in pairs], [i for _, i in pairs], skipped)

    def _decode_each(self, decoder: Decoder, planned: _Planned) -> tuple[Tensor, np.ndarray, np.ndarray]:
        """DALI refused the batch: decode its clips one by one and leave out the one at fault."""
        parts, good = [], []
        for place, clip in enumerate(planned.clips):
            try:
                parts.append(decoder.run_one(clip))
                good.append(place)
            except DecodeError as error:
                planned.skipped[self._manifest.key(planned.index[place])] = str(error)
        _keep(planned, good)
        if not parts:
            return torch.empty(0, self._num_samples, device=self._device), np.empty(0), np.empty(0)
        return torch.cat([p[0] for p in parts]), np.concatenate([p[1] for p in parts]), np.concatenate([p[2] for p in parts])

    def _finish(self, planned: _Planned, waveform: Tensor, lengths: np.ndarray, totals: np.ndarray) -> None:
        """Check what DALI does not report, compute the features, put the batch in the queue."""
        good = []
        for place, (info, length, total) in enumerate(zip(planned.infos, lengths, totals, strict=True)):
            try:
                check_decoded_length(int(length), info, SAMPLE_RATE)
                if not np.isfinite(total):
                    raise BadClip("holds NaN or infinite samples")
                good.append(place)
            except BadClip as bad:
                planned.skipped[self._manifest.key(planned.index[place])] = str(bad)
        if len(good) < len(lengths):
            _keep(planned, good)
            waveform = waveform[torch.tensor(good, dtype=torch.int64, device=waveform.device)]
        self._deliver(planned, waveform)

    def _flush_empty(self) -> None:
        """Deliver the batches at the head of the line that never went into DALI because no clip of theirs was readable."""
        while self._decoding and not self._decoding[0].clips:
            planned = self._decoding.popleft()
            self._deliver(planned, torch.empty(0, self._num_samples, device=self._device))

    def _deliver(self, planned: _Planned, waveform: Tensor) -> None:
        fbank, hog = self._features(waveform)
        label = torch.from_numpy(self._manifest.label_of(planned.index)).to(self._device)
        batch = Batch(
            fbank,
            hog,
            label,
            [self._manifest.key(i) for i in planned.index],
            torch.from_numpy(planned.index.astype(np.int64)),
            torch.from_numpy(planned.seed).to(self._device),
            waveform if self._waveform else None,
        )
        ready = torch.cuda.current_stream(self._device).record_event() if self._device.type == "cuda" else None
        self._put((batch, planned.position, planned.skipped, ready))

    def _features(self, waveform: Tensor) -> tuple[Tensor, Tensor]:
        """fbank and HOG; on a CPU the rows are shared out over the pool, whose kernels release the GIL."""
        if waveform.is_cuda or len(waveform) < 2 or self._workers == 1:
            return kernels.features(waveform, **self._normalise)
        rows = waveform.chunk(self._workers)
        parts = list(self._pool.map(lambda chunk: kernels.features(chunk, **self._normalise), rows))
        return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])

    def _put(self, item: Any) -> None:
        while not self._stopped.is_set():
            try:
                self._queue.put(item, timeout=0.1)
                return
            except queue.Full:
                continue


def _keep(planned: _Planned, good: list[int]) -> None:
    """Reduce a planned batch to the clips at the places ``good``."""
    planned.index, planned.seed = planned.index[good], planned.seed[good]
    planned.clips = [planned.clips[place] for place in good]
    planned.infos = [planned.infos[place] for place in good]
