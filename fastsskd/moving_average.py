"""The exponential moving average (EMA) of the weights that a labelled stage trains, beside DeepSpeed's engine.

Averaged are the float32 master weights, each rank its own share of them, after every step: one pass over memory that
the optimizer has just touched, and no communication. The average lies in the optimizer's state, so checkpoints hold it
and it goes to other ranks, ZeRO stages and precisions with the rest (``engine_state.py``).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from fastsskd import engine_state


def decay_at(step: int, decay: float) -> float:
    """``min(decay, (1 + step) / (10 + step))``, ``step`` from 1: as in TensorFlow's ExponentialMovingAverage.

    Otherwise the weights of the start would weigh for 1 / (1 - decay) steps, more than a short stage has.
    """
    return min(decay, (1 + step) / (10 + step))


class MovingAverage:
    """Follows an engine's weights.

    Args:
        engine: to which :func:`fastsskd.engine_state.keep_average` was done before a checkpoint was loaded.
        decay: what of the average a step leaves, see :func:`decay_at`.
    """

    def __init__(self, engine: Any, decay: float):
        self.engine, self.decay = engine, decay
        self._step = engine_state.optimizer_steps(engine)

    @torch.no_grad()
    def update(self) -> None:
        """Take the weights after a step into the average; a step that was skipped changes nothing."""
        step = engine_state.optimizer_steps(self.engine)
        if step == self._step:
            return
        self._step = step
        averages, masters = engine_state.averages(self.engine)
        torch._foreach_lerp_(averages, masters, 1.0 - decay_at(step, self.decay))

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The average where the master weights are, to be gathered like them; they come back bit for bit."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for average, master in zip(*engine_state.averages(self.engine), strict=True):
            kept = master.clone()
            master.copy_(average)
            average.copy_(kept)
