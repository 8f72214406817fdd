"""Steps whose loss or gradients are not finite: skipped on every rank, blamed on clips, and not too many in a row.

ZeRO 1-3 test the gradients, which are everybody's by then, and skip the step on all ranks alike: ``overflow`` of
DeepSpeed's optimizer tells. Stage 0 tests nothing; :class:`SkippingAdamW` does it there in the same words.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastsskd import distributed
from fastsskd.batch import Batch
from fastsskd.errors import SharedError


class SkippingAdamW(torch.optim.AdamW):
    """AdamW that changes nothing when a gradient is not finite. For stage 0, whose ranks have the same gradients.

    Attributes:
        overflow: the last step was skipped.
    """

    overflow = False

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        # Reading it waits for the device, as DeepSpeed does at the other stages.
        self.overflow = not torch.nn.utils.get_total_norm(gradients, norm_type=math.inf).isfinite().item()
        if not self.overflow:
            super().step(closure)


class Forward(NamedTuple):
    """A micro-batch that was trained on: its values, ``loss`` among them, and its weight in the step's mean."""

    batch: Batch
    values: dict[str, Tensor]
    weight: float


@dataclass(frozen=True)
class BadStep:
    """A step that was skipped.

    Attributes:
        step: its number in the stage, from 1.
        in_a_row: skipped steps so far without a good one between.
        limit: of those.
        suspects: ``rank``, ``loss`` and ``keys`` of the micro-batches whose loss is not finite; of all of them when
            every loss is, and only a gradient was not.
    """

    step: int
    in_a_row: int
    limit: int
    suspects: list[dict[str, Any]]

    def __str__(self) -> str:
        first = self.suspects[0]
        if math.isfinite(first["loss"]):
            what = "a gradient is not finite, though every rank's loss is"
        else:
            ranks = sorted({suspect["rank"] for suspect in self.suspects})
            what = f"the loss of rank {', '.join(map(str, ranks))} is {first['loss']}"
        return f"{what} (in a row: {self.in_a_row}, limit: optim.max_bad_steps = {self.limit})"


class BadSteps:
    """Watches a stage.

    Args:
        name: of the stage.
        limit: bad steps in a row that end the run.
        report: called on every rank with each bad step.
    """

    def __init__(self, name: str, limit: int, report: Callable[[BadStep], None]):
        self.name, self.limit, self.report = name, limit, report
        self.in_a_row = 0

    def after(self, step: int, forwards: list[Forward], optimizer: Any) -> list[Forward]:
        """Look at step ``step`` once it is done; costs nothing unless it was skipped.

        Returns:
            The ``forwards`` whose losses count.

        Raises:
            InputError: on every rank, at the last bad step that ``limit`` allows.
        """
        if not (forwards and getattr(optimizer, "overflow", False)):
            self.in_a_row = 0
            return forwards
        suspects = _suspects(forwards)
        everyone = [suspect for rank in distributed.gather_objects(suspects) for suspect in rank]
        guilty = [suspect for suspect in everyone if not math.isfinite(suspect["loss"])]
        if not guilty and getattr(optimizer, "dynamic_loss_scale", False):
            return forwards  # fp16 looking for its loss scale
        self.in_a_row += 1
        bad = BadStep(step, self.in_a_row, self.limit, guilty or everyone)
        self.report(bad)
        if self.in_a_row >= self.limit:
            raise SharedError(
                f"{self.name}: gave up at step {step}: {bad}; look at the clips in bad_steps.jsonl, lower the learning "
                "rate, or use bf16 or fp32; --resume continues from the last checkpoint"
            )
        return [f for f, suspect in zip(forwards, suspects, strict=True) if math.isfinite(suspect["loss"])]


def _suspects(forwards: list[Forward]) -> list[dict[str, Any]]:
    return [{"rank": distributed.rank(), "loss": float(f.values["loss"]), "keys": list(f.batch.key)} for f in forwards]
