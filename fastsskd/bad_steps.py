"""Steps whose loss or gradients are not finite: skipped on every rank, blamed on clips, and not too many in a row.

ZeRO 1-3 test the gradients, which are everybody's by then, and skip the step on all ranks alike: ``overflow`` of
DeepSpeed's optimizer tells. Stage 0 tests nothing; :class:`SkippingAdamW` does it there in the same words.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

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


class GradientWatch:
    """Sums of each clip's gradient where the spectrogram enters the model: they tell whose is not finite.

    A gradient that is not finite is so from where it arose back to the model's input, and there it is one clip's still;
    in the weights it is everybody's. A sum is one pass over a tensor that was just written, and nothing waits for it.

    Args:
        layer: the first one that a batch meets, of ``(B, N, ...)``; each of its outputs that has a graph is watched.
    """

    def __init__(self, layer: nn.Module):
        self._sums: list[Tensor] = []
        layer.register_forward_hook(self._watch)

    def _watch(self, layer: nn.Module, inputs: Any, output: Tensor) -> None:
        if output.requires_grad:
            output.register_hook(self._add)

    def _add(self, gradient: Tensor) -> None:
        self._sums.append(gradient.flatten(1).sum(dim=1, dtype=torch.float32))

    def take(self) -> list[Tensor]:
        """``(B,)`` of each view of the micro-batch whose backward pass is done."""
        sums, self._sums = self._sums, []
        return sums


class Forward(NamedTuple):
    """A micro-batch that was trained on: its values, ``loss`` among them, its weight in the step's mean, and what
    :class:`GradientWatch` saw of its clips."""

    batch: Batch
    values: dict[str, Tensor]
    weight: float
    gradients: Sequence[Tensor] = ()


@dataclass(frozen=True)
class BadStep:
    """A step that was skipped.

    Attributes:
        step: its number in the stage, from 1.
        in_a_row: skipped steps so far without a good one between.
        limit: of those.
        suspects: ``rank``, ``loss`` and ``keys`` of the micro-batches whose loss is not finite; when every loss is, and
            only a gradient was not, of those with such clips, and these clips' keys; of all of them when none is known.
        gradient: ``suspects`` are clips whose own gradient is not finite.
    """

    step: int
    in_a_row: int
    limit: int
    suspects: list[dict[str, Any]]
    gradient: bool = False

    def __str__(self) -> str:
        first = self.suspects[0]
        ranks = ", ".join(map(str, sorted({suspect["rank"] for suspect in self.suspects})))
        if self.gradient:
            clips = sum(len(suspect["keys"]) for suspect in self.suspects)
            what = f"the gradient of {clips} clip(s) of rank {ranks} is not finite, though every rank's loss is"
        elif math.isfinite(first["loss"]):
            what = "a gradient is not finite, though every rank's loss is"
        else:
            what = f"the loss of rank {ranks} is {first['loss']}"
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
        losses = [float(forward.values["loss"]) for forward in forwards]
        own = [_suspect(forward, loss) for forward, loss in zip(forwards, losses, strict=True)]
        everyone = [suspect for rank in distributed.gather_objects(own) for suspect in rank]
        guilty = [whole for whole, _ in everyone if not math.isfinite(whole["loss"])]
        if not guilty and getattr(optimizer, "dynamic_loss_scale", False):
            return forwards  # fp16 looking for its loss scale
        self.in_a_row += 1
        steep = [] if guilty else [part for _, part in everyone if part["keys"]]
        suspects = guilty or steep or [whole for whole, _ in everyone]
        bad = BadStep(step, self.in_a_row, self.limit, suspects, gradient=bool(steep))
        self.report(bad)
        if self.in_a_row >= self.limit:
            raise SharedError(
                f"{self.name}: gave up at step {step}: {bad}; look at the clips in bad_steps.jsonl, lower the learning "
                "rate, or use bf16 or fp32; --resume continues from the last checkpoint"
            )
        return [forward for forward, loss in zip(forwards, losses, strict=True) if math.isfinite(loss)]


def _suspect(forward: Forward, loss: float) -> tuple[dict[str, Any], dict[str, Any]]:
    """A micro-batch with all its clips; and with those alone whose own gradient is not finite in one of the views."""
    keys, bad = list(forward.batch.key), torch.zeros(len(forward.batch), dtype=torch.bool)
    for sums in forward.gradients:
        bad |= ~sums.view(-1, len(keys)).isfinite().all(dim=0).cpu()  # of all its clones
    steep = [key for key, is_bad in zip(keys, bad.tolist(), strict=True) if is_bad]
    whole = {"rank": distributed.rank(), "loss": loss, "keys": keys}
    return whole, {**whole, "keys": steep}
