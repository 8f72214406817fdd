"""Processes of the trainer, a few at a time: started, watched, stopped and cleaned up after."""

from __future__ import annotations

import contextlib
import heapq
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastsskd.alive import LAUNCHER_PID
from fastsskd.distributed import cores_per_rank
from fastsskd.progress import clock
from fastsskd.run_folder import RESULT

KEEP = ("all", "models", "result")
"""What stays of a complete job: everything; not the checkpoints for ``--resume``; no weights at all."""
_TICK = 0.2  # seconds between two looks at the processes
_RANK = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Job:
    """One run: its name, which is its folder's, and what is different in it, each as ``section.key=value``."""

    name: str
    overrides: tuple[str, ...] = ()


def out_override(folder: Path) -> str:
    return f"run.out={json.dumps(str(folder), ensure_ascii=False)}"


@dataclass(frozen=True)
class Settings:
    """How all jobs run; see :func:`fastsskd.many_runs.run_many`."""

    config: Path
    ds_config: Path
    out: Path
    launcher: Path
    parallel: int
    threads: int | None
    keep: str

    def threads_each(self) -> int | None:
        if self.threads or self.parallel == 1:
            return self.threads
        return max(1, cores_per_rank() // self.parallel)

    def command(self, job: Job, resume: bool) -> list[str]:
        files = ["--ds_config", str(self.ds_config), "--config", str(self.config)]
        overrides = [*job.overrides, out_override(self.out / job.name)]
        if self.threads_each():
            overrides.append(f"data.workers={self.threads_each()}")
        sets = [argument for text in overrides for argument in ("--set", text)]
        return [sys.executable, str(self.launcher), *files, *sets, *(["--resume"] if resume else [])]

    def environment(self, slot: int, gpus: list[str]) -> dict[str, str]:
        """Of the job in one of the ``parallel`` places: a rank of nothing, which therefore finds a free port itself."""
        env = {name: value for name, value in os.environ.items() if name not in _RANK}
        env[LAUNCHER_PID] = str(os.getpid())
        if self.threads_each():
            env["OMP_NUM_THREADS"] = str(self.threads_each())
        if len(gpus) > 1:
            env["CUDA_VISIBLE_DEVICES"] = gpus[slot % len(gpus)]
        return env


def _gpus() -> list[str]:
    """The GPUs that jobs may be shared out over, as CUDA_VISIBLE_DEVICES names them."""
    import torch

    named = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    return named or [str(number) for number in range(torch.cuda.device_count())]


@dataclass
class _Running:
    job: Job
    process: subprocess.Popen
    began: float
    log_begin: int  # bytes of the log that are of earlier tries
    told: int = 0  # signals passed on

    def end(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)


@dataclass
class Pool:
    """Keeps up to ``parallel`` processes going until no job waits.

    Attributes:
        waiting: jobs still to start, in order.
        total: jobs asked for, complete ones too.
        states: by name, ``"begun"`` where a job is to be resumed.
        failed: why, by name.
        signals: how many were received that ask to stop.
    """

    settings: Settings
    waiting: list[Job]
    total: int
    states: dict[str, str]
    failed: dict[str, str] = field(default_factory=dict)
    signals: int = 0
    _slots: dict[int, _Running] = field(default_factory=dict)
    _seconds: list[float] = field(default_factory=list)

    @property
    def stopped(self) -> bool:
        return self.signals > 0

    def run(self) -> None:
        self._done, self._gpus = self.total - len(self.waiting), _gpus() if self.waiting else []
        if self._done:
            self._say(f"{self._done} complete before")
        with self._listening():
            try:
                while self._slots or (self.waiting and not self.stopped):
                    self._start()
                    time.sleep(_TICK)
                    self._pass_on()
                    self._collect()
            finally:  # some are left after an error of ours, such as a full disk
                for running in self._slots.values():
                    running.end(signal.SIGTERM)
                for running in self._slots.values():
                    running.process.wait()

    def _start(self) -> None:
        free = [slot for slot in range(self.settings.parallel) if slot not in self._slots]
        for slot in free if not self.stopped else ():
            if not self.waiting:
                return
            job = self.waiting.pop(0)
            resume = self.states[job.name] == "begun"
            with open(self._log(job), "ab") as log:
                log_begin = log.seek(0, os.SEEK_END)
                process = subprocess.Popen(
                    self.settings.command(job, resume),
                    env=self.settings.environment(slot, self._gpus),
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,  # Ctrl-C in the terminal is for us, who pass it on once
                )
            self._slots[slot] = _Running(job, process, time.monotonic(), log_begin)
            self._say(f"{job.name} {'goes on' if resume else 'begins'}")

    def _collect(self) -> None:
        for slot, running in list(self._slots.items()):
            code = running.process.poll()
            if code is None:
                continue
            del self._slots[slot]
            name, seconds = running.job.name, time.monotonic() - running.began
            folder = self.settings.out / name
            if code == 0 and is_complete(folder):
                self._done += 1
                self._seconds.append(seconds)
                prune(folder, self.settings.keep)
                self._say(f"{name} done in {clock(seconds)}{_scores(read_result(folder))}")
            elif self.stopped:
                self._say(f"{name} stopped")
            else:
                self.failed[name] = _last_line(self._log(running.job), running.log_begin, code)
                self._say(f"{name} failed: {self.failed[name]}")

    def _log(self, job: Job) -> Path:
        return self.settings.out / f"{job.name}.log"

    def _say(self, text: str) -> None:
        left = self._left()
        counts = f"{self._done} of {self.total} jobs done, {len(self._slots)} running"
        counts += f", {len(self.failed)} failed" if self.failed else ""
        counts += f", left {clock(left)}" if left is not None else ""
        print(f"{text}  [{counts}]", file=sys.stderr, flush=True)

    def _left(self) -> float | None:
        """Seconds until all are done, at the mean pace of the jobs that this call has ended; None before the first."""
        if not self._seconds or not (self._slots or self.waiting):
            return None
        each, now = sum(self._seconds) / len(self._seconds), time.monotonic()
        ends = [max(each - (now - running.began), 0.0) for running in self._slots.values()]
        ends += [0.0] * (self.settings.parallel - len(ends))
        heapq.heapify(ends)
        for _ in self.waiting:
            heapq.heapreplace(ends, ends[0] + each)
        return max(ends)

    @contextlib.contextmanager
    def _listening(self) -> Iterator[None]:
        """Until the end of the block, count Ctrl-C and SIGTERM instead of ending by them."""

        def handle(number: int, frame: Any) -> None:
            self.signals += 1

        before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _pass_on(self) -> None:
        """The first signal asks each job to save and stop, the second kills it."""
        for running in self._slots.values():
            if running.told < self.signals:
                running.end(signal.SIGTERM if self.signals == 1 else signal.SIGKILL)
                running.told = self.signals


def read_result(folder: Path) -> dict[str, Any]:
    """What the run in ``folder`` says of itself; empty while it says nothing."""
    try:
        return json.loads((folder / RESULT).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def is_complete(folder: Path) -> bool:
    return read_result(folder).get("status") == "complete"


def prune(folder: Path, keep: str) -> None:
    """Remove what ``keep`` does not name; the run's result, curves and scores always stay."""
    checkpoints = folder / "checkpoints"
    for path in checkpoints.iterdir() if keep != "all" and checkpoints.is_dir() else ():
        if keep == "result" or path.name.startswith(("step-", "tmp-step-")):
            shutil.rmtree(path)


def _scores(result: dict[str, Any]) -> str:
    metrics = result.get("metrics") or {}
    named = [(name, metrics.get(name)) for name in ("accuracy", "mAP")]
    return "".join(f", {name} {value:.3f}" for name, value in named if value is not None)


def _last_line(log: Path, begin: int, code: int) -> str:
    """The error a job ended with, or else the last thing it said, from byte ``begin`` of its log on."""
    with open(log, "rb") as file:
        file.seek(max(file.seek(0, os.SEEK_END) - 65536, begin))
        text = file.read().decode(errors="replace").replace("\r", "\n")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("error: ")]
    said = (errors or lines or ["it said nothing"])[-1].removeprefix("error: ")[:300]
    return said if code >= 0 else f"killed by {signal.Signals(-code).name}; before that: {said}"
