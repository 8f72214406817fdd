"""The loader: manifest -> ready batches of features, made ahead of training.

    sampler -> read, probe -> decode (DALI, a kernel for FLAC) -> crop -> resample, loop -> fbank, HOG -> batch

What a batch holds is a pure function of (manifest, seed, epoch, position): no thread, rank or clock has a part in it.
A clip that cannot be used is left out of its batch, which is then smaller, and named in ``skipped``; nothing ever takes
its place. The work is done by threads (``stream.py``) that keep ``prefetch`` batches ready.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastsskd import config, distributed, manifest, skip_log
from fastsskd.answers.stored import Crops
from fastsskd.audio.info import SAMPLE_RATE
from fastsskd.batch import Batch
from fastsskd.clip_table import PACKED
from fastsskd.errors import InputError
from fastsskd.layouts import index as layouts
from fastsskd.layouts import listed as listed_layouts
from fastsskd.patches import NUM_MEL_BINS, num_input_frames
from fastsskd.sampler import Sampler
from fastsskd.stream import PART, Stream, StreamSettings

__all__ = ["Batch", "Loader", "default_workers", "open_manifest"]

MAX_AHEAD = 1 << 30
"""Bytes of features that are made ahead when ``prefetch`` is not given."""
_FEW_CLIPS = 100  # the share of bad clips means nothing before this many


class Loader:
    """Iterate over an epoch's batches; iterate again for the next epoch.

    Args:
        manifest: a :class:`~fastsskd.manifest.Manifest`, its file, or a folder of clips or shards.
        batch_size: clips per rank and batch.
        seconds: length of the crops; shorter clips are looped.
        train: shuffle, random crops. Otherwise the manifest's order, and of each clip the crop that ``start`` says.
        seed: of the order, the crops and the batch's mask seeds.
        rank, world_size: this rank's share of each global batch.
        device: ``"cpu"``, ``"gpu"``, ``"cuda"`` or ``"cuda:N"``: where the batches are made and end up.
        workers: threads for reading, decoding and (on a CPU) features; None or 0 = this rank's share of the cores.
        prefetch: batches kept ready ahead of the consumer; None or 0 = enough to keep all workers busy, within
            ``MAX_AHEAD`` bytes.
        waveform: put the waveform in the batch, for a teacher that has its own features.
        crops: which crops to hear instead of a new one of each clip every epoch (``start``'s, if not ``train``); if
            they are those of :class:`~fastsskd.answers.stored.StoredAnswers`, the answers are put in the batch.
        start: where the crop of a clip lies when not training, 0 = at its start, 1 = at its end; see
            ``kernels.crop_start``.
        mean, std: normalisation, ``(x - mean) / (2 * std)``.
        drop_last_to: drop an epoch's tail to a multiple of this many clips; 0 = every clip exactly once.
        weights: sampling weight of each clip, see :class:`~fastsskd.sampler.Sampler`; or a file of them, one a line.
        max_bad_share: raise :class:`InputError` when a larger share of the clips seen is bad; None = never.
        max_bad: raise it when more clips than this are bad; None = never.
        skip_log: file that the clips left out are added to, ``key<TAB>reason``; it may be shared.

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
        prefetch: int | None = None,
        waveform: bool = False,
        crops: Crops | None = None,
        start: float = 0.0,
        mean: float = config.AUDIOSET_MEAN,
        std: float = config.AUDIOSET_STD,
        drop_last_to: int = 0,
        weights: np.ndarray | str | Path | None = None,
        max_bad_share: float | None = None,
        max_bad: int | None = None,
        skip_log: str | Path | None = None,
    ):
        self.manifest = open_manifest(manifest)
        self.train, self.seed, self.max_bad_share, self.max_bad = train, seed, max_bad_share, max_bad
        self.device, self.workers = _device(device), workers or default_workers()
        self.skip_log = None if skip_log is None else Path(skip_log)
        self.sampler = Sampler(
            len(self.manifest),
            batch_size=batch_size,
            shuffle=train,
            seed=seed,
            rank=rank,
            world_size=world_size,
            weights=listed_layouts.read_weights(Path(weights)) if isinstance(weights, str | Path) else weights,
            drop_last_to=drop_last_to,
        )
        self.prefetch = prefetch or _choose_prefetch(batch_size, seconds, self.workers)
        features = {"mean": mean, "std": std, "waveform": waveform, "crops": crops, "start": start}
        self._settings = StreamSettings(
            manifest=self.manifest,
            sampler=self.sampler,
            train=train,
            seed=seed,
            num_samples=round(seconds * SAMPLE_RATE),
            num_frames=num_input_frames(seconds),
            device=self.device,
            workers=self.workers,
            prefetch=self.prefetch,
            **features,
        )
        self.skipped: dict[str, str] = {}
        self.epoch = self.position = self._seen = 0
        self._stream: Stream | None = None
        self._busy = 0.0  # of streams that have ended

    def __len__(self) -> int:
        """Batches of an epoch."""
        return self.sampler.num_batches()

    def __iter__(self) -> Iterator[Batch]:
        """The batches from the cursor to the end of the epoch; a new evaluation pass starts at the beginning."""
        if not self.train:
            self.load_state_dict({**self.state_dict(), "position": 0})
        if self._stream is None:
            self._stream = Stream(self._settings, self.epoch, self.position)
            self._finalizer = weakref.finalize(self, self._stream.stop)
        for _ in range(self.sampler.num_batches(self.position)):
            delivery = self._stream.get()
            self.position = delivery.position
            if self.position >= self.sampler.epoch_length and self.train:
                self.epoch, self.position = self.epoch + 1, 0
            self._count(len(delivery.batch), delivery.skipped)
            yield delivery.batch

    def describe(self) -> str:
        """How it works, in one line: the numbers it chose by itself or was given."""
        mega = self.prefetch * self.sampler.batch_size * self._settings.num_frames * NUM_MEL_BINS * 4 / 1e6
        source = "packed shards" if self.manifest.source == PACKED else self.manifest.source or "clips"
        return (
            f"{len(self.manifest)} clips ({source}), {self.workers} worker thread(s), {self.prefetch} batches of "
            f"{self.sampler.batch_size} ahead ({mega:.0f} MB)"
        )

    @property
    def busy(self) -> float:
        """Seconds that the worker threads have worked so far, all together; of each, waiting for a disk is a part."""
        return self._busy + (self._stream.busy if self._stream is not None else 0.0)

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
            self._busy += self._stream.busy
            self._stream = None

    def _count(self, num_good: int, skipped: dict[str, str]) -> None:
        self._seen += num_good + len(skipped)
        new = {key: reason for key, reason in skipped.items() if key not in self.skipped}
        self.skipped.update(new)
        if new and self.skip_log is not None:
            skip_log.append(self.skip_log, new)
        bad, seen = len(self.skipped), min(self._seen, len(self.manifest))
        limit = ""
        if self.max_bad is not None and bad > self.max_bad:
            limit = f"data.max_bad = {self.max_bad}"
        elif self.max_bad_share is not None and seen >= min(_FEW_CLIPS, len(self.manifest)):
            limit = f"data.max_bad_share = {self.max_bad_share:g}" if bad > self.max_bad_share * seen else ""
        if limit:
            key, reason = next(iter(self.skipped.items()))
            raise InputError(
                f"{bad} of {seen} clips are bad, more than {limit} (first: {key}: {reason}); run `fastsskd check`"
            )


def open_manifest(source: Any) -> manifest.Manifest:
    """A manifest as such, from its file, or from a folder or list that ``fastsskd index`` understands."""
    if isinstance(source, manifest.Manifest):
        return source
    path = Path(source)
    return layouts.build(path) if path.is_dir() else manifest.load(path)


def _choose_prefetch(batch_size: int, seconds: float, workers: int) -> int:
    """Two batches that are ready, and behind them a part and the next for each worker; within ``MAX_AHEAD``."""
    bytes_each = batch_size * num_input_frames(seconds) * NUM_MEL_BINS * 4
    return max(2, min(2 + -(-2 * workers * PART // batch_size), MAX_AHEAD // bytes_each, 64))


def default_workers() -> int:
    """This rank's share of the cores of its machine."""
    return distributed.cores_per_rank()


def _device(device: torch.device | str) -> torch.device:
    device = torch.device("cuda" if device == "gpu" else device)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    return device
