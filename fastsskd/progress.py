"""What people see of a run while it goes on: one line, with the time left."""

from __future__ import annotations

import math
import sys
import time

from fastsskd.engine import Log, StagePlan


class ProgressLine:
    """Prints a line for each log; on a terminal the line is rewritten in place.

    Args:
        steps: optimizer steps of each stage, in order.
        enabled: False on every rank but the first.
    """

    def __init__(self, steps: dict[str, int], enabled: bool):
        self.steps, self.enabled = steps, enabled
        self.seconds_per_step: dict[str, float] = {}  # by kind of stage, the latest measure
        self._last = 0.0
        self._open_line = False

    def say(self, text: str) -> None:
        """A line of its own."""
        if self.enabled:
            print(("\n" if self._open_line else "") + text, file=sys.stderr, flush=True)
            self._open_line = False

    def log(self, stage: str, plan: StagePlan, log: Log, steps_in_log: int) -> None:
        """The line for a log; not more than one in 2 s unless the stage ends with it."""
        kind = _kind(stage)
        self.seconds_per_step[kind] = log.seconds / max(steps_in_log, 1)
        ends = log.step >= plan.total_steps
        if not self.enabled or (time.monotonic() - self._last < 2.0 and not ends):
            return
        self._last = time.monotonic()
        line = (
            f"{stage:<14} step {log.step:>5}/{plan.total_steps}  epoch {log.step / plan.steps_per_epoch:5.1f}  "
            f"loss {log.metrics.get('loss', float('nan')):8.4f}  lr {log.lr:.1e}  "
            f"{log.clips / max(log.seconds, 1e-9):7.1f} clips/s  wait {100 * log.wait:4.1f} %  {live(log)}"
            f"left {clock(self._left(stage, log.step, plan))}, run {clock(self._left(stage, log.step, plan, run=True))}"
        )
        terminal = sys.stderr.isatty()
        print(("\r" if terminal else "") + line, end="" if terminal and not ends else "\n", file=sys.stderr, flush=True)
        self._open_line = terminal and not ends

    def _left(self, stage: str, step: int, plan: StagePlan, run: bool = False) -> float:
        """Seconds left of the stage or the run: later stages at the pace of their kind, or of this one if unknown."""
        own = self.seconds_per_step[_kind(stage)]
        seconds = (plan.total_steps - step) * own
        if not run:
            return seconds
        names = list(self.steps)
        for name in names[names.index(stage) + 1 :]:
            seconds += self.steps[name] * self.seconds_per_step.get(_kind(name), own)
        return seconds


def live(log: Log) -> str:
    """What is known of the loader's headroom and of the machine's use."""
    text = ""
    if math.isfinite(log.headroom):
        text += f"spare {min(100 * log.headroom, 999):3.0f} %  "
    if math.isfinite(log.mfu):
        text += f"mfu {100 * log.mfu:4.1f} %  "
    return text


def _kind(stage: str) -> str:
    return stage.rsplit("-", 1)[-1]


def clock(seconds: float) -> str:
    """``h:mm:ss`` or ``m:ss``."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
