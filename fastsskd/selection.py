"""Which weights a labelled stage leaves behind: the last epoch's, the best epoch's, or the mean of the last epochs'."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from fastsskd.config import DistillConfig

State = dict[str, Tensor]


class Selection:
    """Watches the ends of epochs of one stage; every rank has one and all see the same.

    Args:
        config: ``select``, ``average_epochs`` and ``ema``.
        evaluate: metrics of a state on the evaluation set; only called for ``select = "best"``.
    """

    def __init__(self, config: DistillConfig, evaluate: Callable[[State], dict[str, Any]]):
        self.config, self.evaluate = config, evaluate
        self.kept: State = {}  # best: the best epoch's weights; average: the sum of the last epochs'
        self.note: dict[str, Any] = {"select": config.select, "epochs": []}
        if config.ema:
            self.note["ema"] = config.ema

    def wants(self, epoch: int) -> bool:
        """Whether the weights at the end of ``epoch`` (counted from 1) are needed; gathering them costs time."""
        if self.config.select == "average":
            return epoch > self.config.epochs - self.config.average_epochs
        return self.config.select == "best"

    def add(self, epoch: int, state: State) -> None:
        """Take the whole float32 weights at the end of ``epoch``, or their moving average if the stage keeps one."""
        if self.config.select == "average":
            self.kept = {name: self.kept[name] + value for name, value in state.items()} if self.kept else state
            self.note["epochs"].append(epoch)
            return
        metrics = self.evaluate(state)
        value = metrics["mAP"] if metrics["accuracy"] is None else metrics["accuracy"]
        if value is not None and value > self.note.get("value", -1.0):
            self.kept, self.note["epochs"], self.note["value"] = state, [epoch], value

    def result(self, last: State) -> State:
        """The weights the stage leaves behind, given those of its last step."""
        if not self.kept:
            return last
        count = len(self.note["epochs"]) if self.config.select == "average" else 1
        return {name: value / count for name, value in self.kept.items()}
