"""Who is still there: the launcher that started this rank, and the other ranks."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path

_LAUNCHERS = ("deepspeed", "torchrun", "deepspeed.launcher.launch", "torch.distributed.run")
LAUNCHER_PID = "FASTSSKD_LAUNCHER_PID"
"""Environment variable with which another parent says that it is the launcher."""


class Launcher:
    """The launchers above this process: ``deepspeed`` and its helper, or ``torchrun``; none if there is no /proc.

    SIGTERM to the ``deepspeed`` command kills just that process. Its helper and the ranks would train on, unseen.
    """

    def __init__(self):
        self._links: list[tuple[int, int]] = []  # each child with its parent
        child = os.getpid()
        while (parent := _parent(child)) and _is_launcher(parent):
            self._links.append((child, parent))
            child = parent
        if os.environ.get(LAUNCHER_PID):
            self._links.append((os.getpid(), int(os.environ[LAUNCHER_PID])))

    def gone(self) -> bool:
        """Whether one of them has ended: then its child has another parent, or is gone too."""
        return any(_parent(child) != parent for child, parent in self._links)


def _parent(pid: int) -> int | None:
    try:
        # The second field, the name, may hold spaces and brackets.
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except (OSError, ValueError, IndexError):
        return None


def _is_launcher(pid: int) -> bool:
    try:
        arguments = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return False
    return any(os.path.basename(argument) in _LAUNCHERS for argument in arguments[:6])


class Watchdog:
    """While entered, calls ``give_up`` from a thread when there was no :meth:`beat` for ``seconds``.

    It sees what no time limit of a collective does: DeepSpeed's own groups have torch's default of 10 or 30 minutes
    whatever one asks for, and behind NCCL the process waits for the device. Time in which this process itself was
    frozen does not count.
    """

    TICK = 1.0  # seconds

    def __init__(self, seconds: float, give_up: Callable[[], None]):
        self.seconds, self.give_up = seconds, give_up
        self._ticks = 0

    def __enter__(self) -> Watchdog:
        self._ticks, self._end = 0, threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()

    def beat(self) -> None:
        """There is progress."""
        self._ticks = 0

    def _watch(self) -> None:
        while not self._end.wait(self.TICK):
            self._ticks += 1
            if self._ticks * self.TICK >= self.seconds:
                self.give_up()
                return
