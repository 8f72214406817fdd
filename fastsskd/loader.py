"""The loader: manifest -> ready batches of features, made ahead of training.

    sampler -> read, probe -> DALI: decode -> crop -> copy -> resample, loop, fbank, HOG -> queue -> training

What a batch holds is a pure function of (manifest, seed, epoch, position): no thread, rank or clock has a part in it.
A clip that cannot be used is left out of its batch, which is then smaller, and named in ``skipped``; nothing ever takes
its place. The work is done by a producer thread (``stream.py``) that keeps ``prefetch`` batches ready.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastsskd import config, distributed, layouts, manifest
from fastsskd.batch import Batch
from fastsskd.clip_reader import SAMPLE_RATE
from fastsskd.errors import InputError
from fastsskd.model import num_input_frames
from fastsskd.sampler import Sampler
from fastsskd.stream import Stream, StreamSettings

__all__ = ["Batch", "Loader", "default_workers", "open_manifest"]

_FEW_CLIPS = 100  # the share of bad clips means nothing before this many


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
        self.train, self.seed = train, seed
        self.device, self.workers = _device(device), workers or default_workers()
        self.max_bad_share = max_bad_share
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
        self._settings = StreamSettings(
            manifest=self.manifest,
            sampler=self.sampler,
            train=train,
            seed=seed,
            num_samples=round(seconds * SAMPLE_RATE),
            num_frames=num_input_frames(seconds),
            mean=mean,
            std=std,
            device=self.device,
            workers=self.workers,
            prefetch=prefetch,
            waveform=waveform,
        )
        self.skipped: dict[str, str] = {}
        self.epoch = self.position = 0
        self._seen = 0
        self._stream: Stream | None = None

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
    """This rank's share of the cores of its machine."""
    return distributed.cores_per_rank()


def _device(device: torch.device | str) -> torch.device:
    device = torch.device("cuda" if device == "gpu" else device)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    return device
