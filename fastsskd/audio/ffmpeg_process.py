"""FFmpeg in a process of its own, one for each thread that decodes with it.

PyAV works in steps of a few microseconds, between which threads hand the interpreter's lock to each other: together
they are no faster than one. And FFmpeg has a hundred parsers in C, for files from anywhere: one that crashes takes a
clip with it, and not the whole job.

The two ends talk through pipes, a pickled request and a pickled answer. The process ends when our end is closed, which
a `kill -9` does as well.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import pickle
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np

from fastsskd.audio.ffmpeg import FfmpegReader
from fastsskd.audio.info import BadClip
from fastsskd.clip_bytes import OpenFile
from fastsskd.clip_file import FileView, load

PIPE_BYTES = 1 << 20
_numbers = itertools.count()
_thread = threading.local()


class RemoteReader:
    """A file that is open in this thread's process; used like an `audio_ffmpeg.FfmpegReader`.

    Args:
        path, offset, size: of the file, as those of `any_audio.AnyAudio`.

    Raises:
        BadClip, OSError: here and in `read`, as the reader in the process does; BadClip also if the process crashes.
    """

    seeks = False

    def __init__(self, path: Path | str, offset: int, size: int):
        if not hasattr(_thread, "process"):
            _thread.process = _Process()
        self._process, self._number = _thread.process, next(_numbers)
        self.info, self.rate = self._process.ask("open", self._number, str(path), offset, size)

    def read(self, num_samples: int) -> np.ndarray:
        """The next samples, `(S,)` float32, mono: as many as asked for, or fewer before damage or the end."""
        return self._process.ask("read", self._number, num_samples)

    def seek(self, sample: int) -> bool:
        """Never: most containers count in packets or milliseconds."""
        return False

    def __del__(self):
        self._process.forgotten.append(self._number)


class _Process:
    """Our end of the pipes. It starts the process, and starts it again for the next file if it has crashed."""

    def __init__(self):
        self._process: subprocess.Popen | None = None
        self.forgotten: list[int] = []  # files that nobody reads any more

    def ask(self, command: str, *arguments: Any) -> Any:
        forgotten, self.forgotten = self.forgotten, []
        process = self._process or self._start()
        try:
            pickle.dump((command, forgotten, arguments), process.stdin)
            process.stdin.flush()
            answer = pickle.load(process.stdout)
        except (EOFError, OSError, pickle.UnpicklingError):
            process.kill()
            self._process, code = None, process.wait()
            how = signal.strsignal(-code) if code < 0 else f"exit code {code}"
            raise BadClip(f"FFmpeg crashed on it ({how})") from None
        if isinstance(answer, Exception):
            raise answer
        return answer

    def _start(self) -> subprocess.Popen:
        paths = str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "fastsskd.audio.ffmpeg_process"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            pipesize=PIPE_BYTES,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))},
        )
        return self._process

    def __del__(self):
        if self._process is not None:
            self._process.kill()
            with contextlib.suppress(OSError):
                self._process.communicate()


def _serve() -> None:
    """The other end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the one that asks
    requests, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print must not get between the answers
    readers: dict[int, FfmpegReader] = {}
    while True:
        try:
            command, forgotten, arguments = pickle.load(requests)
        except EOFError:
            return
        for number in forgotten:
            readers.pop(number, None)
        try:
            answer = _answer(readers, command, *arguments)
        except (BadClip, OSError) as error:
            answer = error
        pickle.dump(answer, answers, pickle.HIGHEST_PROTOCOL)
        answers.flush()


def _answer(readers: dict[int, FfmpegReader], command: str, number: int, *arguments: Any) -> Any:
    if command == "open":
        path, offset, size = arguments
        data = load(OpenFile(path), offset, size)
        readers[number] = FfmpegReader(data, FileView(data))
        return readers[number].info, readers[number].rate
    if number not in readers:
        raise BadClip("FFmpeg crashed before it was read to its end")
    return readers[number].read(*arguments)


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):
        _serve()
