"""Whole trainings for tests: ranks that start at once because they are forked, and come to harm where a test says.

`ForkedTraining` starts this file as a program, which imports everything once and then forks the ranks of each run.
"""

import functools
import gc
import importlib
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import soundfile
import torch

ROOT = Path(__file__).parents[1]
BASE = {
    "data.seconds": 0.96,
    "data.workers": 1,
    "model.size": '"nano"',
    "recipe.iterations": 1,
    "ssl.epochs": 2,
    "ssl.lr": 1e-3,
    "ssl.warmup_epochs": 0.5,
    "distill.epochs": 2,
    "distill.lr": 1e-3,
    "distill.warmup_epochs": 0.5,
    "run.log_every": 1,
}


def save_tones(folder: Path) -> None:
    """40 clips of 0.96 s in 2 classes, low and high tones."""
    random = np.random.default_rng(0)
    for number in range(40):
        time = np.arange(15360) / 16000
        pitch = random.uniform(200, 500) * (1, 6)[number % 2]
        wave = 0.3 * np.sin(2 * np.pi * pitch * time) + 0.02 * random.standard_normal(len(time))
        path = folder / ("low", "high")[number % 2] / f"{number:02d}.wav"
        path.parent.mkdir(exist_ok=True)
        soundfile.write(path, wave, 16000)


def arguments(out, clips, *, ds=None, resume=False, **fields) -> list[str]:
    """Those of train.py, for a small run; a double underscore in ``fields`` stands for the dot."""
    out.parent.mkdir(parents=True, exist_ok=True)
    ds_file, toml = out.parent / f"{out.name}.ds.json", out.parent / f"{out.name}.toml"
    ds_file.write_text(json.dumps({"train_batch_size": 8, "zero_optimization": {"stage": 1}, **(ds or {})}))
    values = {**BASE, **{name.replace("__", "."): value for name, value in fields.items()}}
    values |= {"run.out": json.dumps(str(out)), "data.manifest": json.dumps(str(clips))}
    sections = {}
    for name, value in values.items():
        section, key = name.split(".")
        sections.setdefault(section, []).append(f"{key} = {value}")
    toml.write_text("\n".join(line for name, lines in sections.items() for line in [f"[{name}]", *lines]))
    return ["--ds_config", str(ds_file), "--config", str(toml)] + (["--resume"] if resume else [])


MARK = "FASTSSKD_TEST_OF"


def environment() -> dict[str, str]:
    """Of a process that trains: one thread, no rank of another run, and a mark that it is ours."""
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")}
    own = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT), MARK: str(os.getpid())}
    return {**env, **own}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def metrics(out) -> list[dict]:
    file = out / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def losses(lines) -> dict[tuple[str, int], float]:
    return {(line["stage"], line["step"]): line["loss"] for line in lines}


class Run:
    """A training that goes on in processes of its own.

    Attributes:
        out: the run's folder.
        pids: of the ranks.
    """

    def __init__(self, server: "ForkedTraining", out: Path, number: int, pids: list[int], log: Path):
        self._server, self.out, self._number, self.pids, self._log = server, out, number, pids, log

    def codes(self) -> list[int | None]:
        """Exit code of each rank (negative: the signal that ended it), None while it runs."""
        return self._server.ask({"poll": self._number})

    def wait(self, timeout: float = 120.0) -> list[int]:
        """The exit codes at the end; kills what is left after ``timeout`` seconds and fails."""
        end = time.monotonic() + timeout
        while None in (codes := self.codes()):
            if time.monotonic() > end:
                for pid, code in zip(self.pids, codes, strict=True):
                    if code is None:
                        os.kill(pid, signal.SIGKILL)
                raise AssertionError(f"still running after {timeout} s: {codes}\n{self.printed[-3000:]}")
            time.sleep(0.02)
        return codes

    def wait_for_step(self, steps: int, timeout: float = 120.0) -> None:
        """Until metrics.jsonl has this many lines."""
        end = time.monotonic() + timeout
        while len(metrics(self.out)) < steps:
            assert time.monotonic() < end and None in self.codes(), self.printed[-3000:]
            time.sleep(0.01)

    @property
    def printed(self) -> str:
        return self._log.read_text(errors="replace")

    @property
    def result(self) -> dict:
        return json.loads((self.out / "result.json").read_text())


class ForkedTraining:
    """Talks to the program; a context manager."""

    def __init__(self, folder: Path):
        self.folder, self._count = folder, 0

    def __enter__(self):
        command = [sys.executable, __file__]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self._process = subprocess.Popen(command, env=environment(), **pipes)
        return self

    def __exit__(self, *_):
        self._process.stdin.close()
        self._process.wait(timeout=30)

    def left_over(self) -> list[str]:
        """Processes of runs that have not ended, however they were started."""
        found = []
        for process in psutil.process_iter():
            try:
                ours = process.environ().get(MARK) == str(os.getpid())
            except psutil.Error:  # ended, or somebody else's
                continue
            if ours and process.pid != self._process.pid:
                found.append(str(process))
        return found

    def ask(self, request: dict):
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def start(self, out, clips, *, ranks=1, harm=(), pictures=False, **options) -> Run:
        """Start a run; see :func:`arguments` for ``options``.

        Args:
            harm: what goes wrong: dictionaries of ``rank``, ``function`` (its full name), ``calls`` (which ones, from
                1) and ``do``: a key of ``HARM`` below. Without ``rank``, on all of them.
            pictures: draw them; it takes longer than all the rest.
        """
        how = {"ranks": ranks, "harm": list(harm), "pictures": pictures}
        return self._start(out, "launch.train.main", arguments(out, clips, **options), **how)

    def call(self, function: str, *given, ranks=1, expect=0, harm=()) -> None:
        """Call a function, by its full name, on each of some ranks; it must return None, or ``expect``."""
        how = {"ranks": ranks, "harm": list(harm)}
        run = self._start(self.folder, function, [str(value) for value in given], **how)
        assert run.wait() == [expect] * ranks, run.printed[-3000:]

    def _start(self, out: Path, function: str, given: list[str], **how) -> Run:
        self._count += 1
        log = self.folder / f"{self._count}.log"
        pids = self.ask({"start": function, "given": given, "number": self._count, "log": str(log), **how})
        return Run(self, out, self._count, pids, log)

    def run(self, out, clips, *, expect=0, **options):
        """Run to the end; returns metrics.jsonl, result.json and what was printed."""
        run = self.start(out, clips, **options)
        codes = run.wait(300)
        assert codes == [expect] * len(codes), (codes, run.printed[-3000:])
        return metrics(out), run.result if (out / "result.json").exists() else None, run.printed


# ------------------------------------------------------------------------------------------------------- the program


def _kill(*_):
    os.kill(os.getpid(), signal.SIGKILL)


def _freeze(function, args, kwargs):
    os.kill(os.getpid(), signal.SIGSTOP)
    return function(*args, **kwargs)  # once somebody sends SIGCONT


def _terminate(function, args, kwargs):
    os.kill(os.getpid(), signal.SIGTERM)
    return function(*args, **kwargs)


def _interrupt(function, args, kwargs):
    os.kill(os.getpid(), signal.SIGINT)
    return function(*args, **kwargs)


def _write_half(function, args, kwargs):
    """A file that is cut short, by a process that dies while it writes."""
    function(*args, **kwargs)
    file = args[1]
    os.truncate(file, os.path.getsize(file) // 2)
    _kill()


def _fill_the_disk(function, args, kwargs):
    """No file may grow beyond 100 kB from now on, which fails as a full disk does."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    return function(*args, **kwargs)


def _nan(function, args, kwargs):
    loss, parts = function(*args, **kwargs)
    return loss * float("nan"), parts


def _steep(function, args, kwargs):
    """The second clip's gradient is a NaN, its value is as it was: the root of a zero."""
    features = function(*args, **kwargs)
    second = features[1:2] + (features[1:2] * 0).abs().sqrt()
    return torch.cat([features[:1], second, features[2:]])


HARM = {
    "kill": _kill,
    "terminate": _terminate,
    "interrupt": _interrupt,
    "freeze": _freeze,
    "write half and die": _write_half,
    "fill the disk": _fill_the_disk,
    "nan": _nan,
    "nan gradient": _steep,
}


def _find(name: str):
    """What holds the function of this full name, and its own name."""
    path = name.split(".")
    cut = max(i for i in range(1, len(path)) if _is_module(".".join(path[:i])))
    return functools.reduce(getattr, path[cut:-1], importlib.import_module(".".join(path[:cut]))), path[-1]


def _harm(name: str, calls: list[int], do: str) -> None:
    """Replace the function ``name`` by one that does ``do`` in some of its calls."""
    owner, name = _find(name)
    function, seen = getattr(owner, name), 0

    @functools.wraps(function)
    def harmed(*args, **kwargs):
        nonlocal seen
        seen += 1
        if seen not in calls:
            return function(*args, **kwargs)
        return HARM[do](function, args, kwargs)

    setattr(owner, name, harmed)


def _is_module(name: str) -> bool:
    try:
        importlib.import_module(name)
    except ImportError:
        return False
    return True


def _serve() -> None:
    import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401  what deepspeed.initialize imports: torch's compiler
    import torch

    import fastsskd_kernels
    from launch import train  # noqa: F401

    fastsskd_kernels.features(torch.zeros(1, 15360), num_frames=96)  # compiled before the forks
    gc.collect()
    gc.freeze()  # DeepSpeed collects garbage often: not among all that was imported
    runs: dict[int, list[int]] = {}
    codes: dict[int, int] = {}
    for line in sys.stdin:
        request = json.loads(line)
        if "start" in request:
            port = free_port()
            runs[request["number"]] = [_fork(request, rank, port) for rank in range(request["ranks"])]
            answer = runs[request["number"]]
        else:
            pids = runs[request["poll"]]
            for pid in pids:
                if pid not in codes and (done := os.waitpid(pid, os.WNOHANG))[0]:
                    codes[pid] = os.waitstatus_to_exitcode(done[1])
            answer = [codes.get(pid) for pid in pids]
        print(json.dumps(answer), flush=True)


def _fork(request: dict, rank: int, port: int) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 99
    try:
        log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        null = os.open(os.devnull, os.O_RDONLY)
        for new, old in ((null, 0), (log, 1), (log, 2)):
            os.dup2(new, old)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        ranks = request["ranks"]
        if ranks > 1:
            own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
            os.environ.update({k: str(v) for k, v in own.items()}, MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        if not request.get("pictures"):
            from fastsskd import figures, recipe

            recipe.draw_views = figures.loss_curves = lambda *_: None
        for harm in request.get("harm", ()):
            if harm.get("rank", rank) == rank:
                _harm(harm["function"], harm["calls"], harm["do"])
        given = request["given"]
        code = getattr(*_find(request["start"]))(*([given] if request["start"].endswith(".main") else given)) or 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:
        import traceback

        traceback.print_exc()
        code = 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    _serve()
