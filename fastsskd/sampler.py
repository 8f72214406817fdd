"""Which clip next: the order of an epoch, and each rank's share of it.

The order is a pure function of (seed, epoch); ranks, threads and time have no part in it. A global batch is a run of
``batch_size * world_size`` places in that order, of which each rank takes its own ``batch_size``, so the clips of an
optimizer step are the same for 1 rank with accumulation 2 and for 2 ranks with none.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from fastsskd.errors import InputError
from fastsskd.manifest import Manifest

_ORDER_STREAM = 0x0D  # keeps the order's random stream apart from those of crops and masks


class Sampler:
    """Places of an epoch's order, cut into the batches of one rank.

    Args:
        num_clips: clips in the manifest.
        batch_size: clips per rank and batch.
        shuffle: a new permutation each epoch; otherwise the manifest's order.
        seed: of the order.
        rank, world_size: this rank's share.
        weights: ``(num_clips,)`` sampling weights: an epoch is then ``num_clips`` draws with replacement, of which
            a clip gets its weight's share; 0 = never.
        drop_last_to: drop the tail of an epoch to a multiple of this many clips; 0 keeps every clip.

    Raises:
        ValueError: a batch size or rank that cannot be.
        InputError: not one batch in an epoch, or weights that cannot be.
    """

    def __init__(
        self,
        num_clips: int,
        *,
        batch_size: int,
        shuffle: bool,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        weights: np.ndarray | None = None,
        drop_last_to: int = 0,
    ):
        if batch_size < 1 or not 0 <= rank < world_size:
            raise ValueError(
                f"batch_size {batch_size}, rank {rank} of {world_size}: need a positive size, rank < world"
            )
        if num_clips < max(drop_last_to, 1):
            raise InputError(f"{num_clips} clips make no batch of {drop_last_to or batch_size}; lower the batch size")
        self.num_clips, self.batch_size = num_clips, batch_size
        self.shuffle, self.seed = shuffle, seed
        self.rank, self.world_size = rank, world_size
        self.probability = None if weights is None else _probability(weights, num_clips)
        self.epoch_length = num_clips - num_clips % drop_last_to if drop_last_to else num_clips
        self.global_batch = batch_size * world_size

    def order(self, epoch: int) -> np.ndarray:
        """``(epoch_length,)`` clip indices in the order of ``epoch``."""
        if not self.shuffle:
            return np.arange(self.epoch_length)
        random = np.random.default_rng((_ORDER_STREAM, self.seed, epoch))
        if self.probability is not None:
            return random.choice(self.num_clips, self.epoch_length, p=self.probability)
        return random.permutation(self.num_clips)[: self.epoch_length]

    def num_batches(self, position: int = 0) -> int:
        """Batches left of an epoch from the global ``position``; the same for every rank."""
        return -(-(self.epoch_length - position) // self.global_batch)

    def batches(self, epoch: int, position: int = 0) -> Iterator[tuple[np.ndarray, int]]:
        """Yield this rank's clip indices of each batch and the global position after it.

        The last global batch of an epoch may be short; it is shared out evenly, and a rank's share may be empty.
        """
        order = self.order(epoch)
        while position < self.epoch_length:
            chunk = order[position : position + self.global_batch]
            position += len(chunk)
            if len(chunk) == self.global_batch:
                yield chunk[self.rank * self.batch_size : (self.rank + 1) * self.batch_size], position
            else:
                yield np.array_split(chunk, self.world_size)[self.rank], position


def _probability(weights: np.ndarray, num_clips: int) -> np.ndarray:
    weights = np.asarray(weights, np.float64)
    if weights.shape != (num_clips,):
        raise InputError(f"{weights.size} sampling weights for {num_clips} clips: give one a clip")
    if not (np.isfinite(weights).all() and (weights >= 0).all() and weights.any()):
        raise InputError("sampling weights must be finite and not negative, and one of them above 0")
    return weights / weights.sum()


def balanced_weights(manifest: Manifest) -> np.ndarray:
    """AudioSet's balanced sampling: a clip weighs the sum over its labels of 1000 / (clips of the label + 0.01).

    Returns:
        ``(n,)`` float64, for :class:`Sampler`.
    """
    return manifest.sum_over_labels(1000.0 / (manifest.class_counts() + 0.01))
