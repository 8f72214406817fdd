"""Runs `fastsskd` commands in processes that start at once, and ends some of them early. Also the program that does it.

`ForkedCli` starts this file as a program, which imports everything once and then forks a process for each command.
"""

import glob
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path


class ForkedCli:
    """Talks to the program; a context manager."""

    def __enter__(self):
        command = [sys.executable, __file__]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        return self

    def __exit__(self, *_):
        self._process.stdin.close()
        self._process.wait(timeout=30)

    def run(self, *arguments, **how) -> dict:
        """Run a command to its end, or as `how` says.

        Args:
            arguments: of `fastsskd`.
            kill_at: number of the file operation (opening for writing, renaming, removing) before which it is killed.
            kill_after: seconds after which it is killed.
            interrupt_when: pattern of a path; once it exists the process gets SIGINT.
            largest_file: bytes; writing more to any file fails.

        Returns:
            ``code`` (negative: the signal that ended it), ``stderr``, and ``grown``: by how many bytes memory grew.
        """
        self._process.stdin.write(json.dumps([[str(argument) for argument in arguments], how]) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())


def _serve() -> None:
    import numpy as np

    import fastsskd_kernels
    from fastsskd import cli

    fastsskd_kernels.resample_crop_or_loop(np.zeros(100, np.float32), 44_100, 10)  # compiled before the forks
    for line in sys.stdin:
        arguments, how = json.loads(line)
        with tempfile.TemporaryFile("w+") as log:
            before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
            pid = os.fork()
            if not pid:
                _child(cli.main, arguments, log, how.get("kill_at"), how.get("largest_file"))
            status, usage = _wait(pid, how.get("kill_after"), how.get("interrupt_when"))
            log.seek(0)
            grown = usage.ru_maxrss * 1024 - before
            print(
                json.dumps({"code": os.waitstatus_to_exitcode(status), "stderr": log.read(), "grown": grown}),
                flush=True,
            )


def _child(main, arguments, log, kill_at, largest_file) -> None:
    os.dup2(log.fileno(), 2)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if largest_file:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    if kill_at:
        _kill_before(kill_at, arguments[arguments.index("--out") + 1])
    code = 99
    try:
        code = main(arguments)
    finally:
        sys.stderr.flush()
        os._exit(code)


def _kill_before(number: int, folder: str) -> None:
    seen = 0

    def count(event, args):
        nonlocal seen
        writes = event in ("os.rename", "os.remove") or (event == "open" and set(args[1] or "") & set("wa+"))
        if writes and str(args[0]).startswith(folder):
            seen += 1
            if seen == number:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)


def _wait(pid, kill_after, interrupt_when):
    end = time.monotonic() + (kill_after if kill_after is not None else 1e9)
    while True:
        done, status, usage = os.wait4(pid, os.WNOHANG)
        if done:
            return status, usage
        if time.monotonic() > end:
            os.kill(pid, signal.SIGKILL)
            end = 1e9
        if interrupt_when and glob.glob(interrupt_when):
            os.kill(pid, signal.SIGINT)
            interrupt_when = None
        time.sleep(0.001)


if __name__ == "__main__":
    _serve()
