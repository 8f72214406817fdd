"""The bytes of a clip's own file: a file of its own or a member of a tar shard, read piece by piece.

By ``pread`` and not by a memory map: a shard that is cut short or replaced during a run would kill every process that
has it mapped (SIGBUS), where a read only comes back short, and a copy out of the page cache costs less than the page
faults of a map that is touched once.
"""

from __future__ import annotations

import functools
import os
from pathlib import Path

import numpy as np

from fastsskd.audio.info import BadClip

HEAD = 512
"""Bytes that are read at once at the start of a clip: most headers lie in them."""
OPEN_SHARDS = 128
"""Shards that stay open; opening one for every clip costs milliseconds on network disks."""


class OpenFile:
    """A file open for reading, closed when nobody refers to it any more."""

    def __init__(self, path: Path | str):
        self.path = path
        self.descriptor = -1
        self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self):
        if self.descriptor >= 0:
            os.close(self.descriptor)


class ShardFiles:
    """Shards that were read last, kept open. Threads may share it.

    Args:
        root: folder that their names start from.
    """

    def __init__(self, root: Path):
        self.open = functools.lru_cache(maxsize=OPEN_SHARDS)(lambda name: OpenFile(root / name))


class ClipBytes:
    """The bytes of one clip, read when asked for.

    Slices give ``bytes``; like those of a ``memoryview`` they end where the clip ends.

    Args:
        file: the file that holds the clip.
        offset: its first byte in there.
        size: its length; -1 = to the end of the file.

    Raises:
        BadClip: in any method, the file ends before the clip does. OSError: it cannot be read.
    """

    def __init__(self, file: OpenFile, offset: int = 0, size: int = -1):
        self._file, self._offset = file, offset
        self._size = os.fstat(file.descriptor).st_size - offset if size < 0 else size
        self._head = b""
        self._head = self[: min(HEAD, self._size)]

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, places: slice) -> bytes:
        start, stop, _ = places.indices(self._size)
        if stop <= len(self._head):
            return self._head[start:stop]
        data = bytearray(max(stop - start, 0))
        self.read_into(data, start)
        return bytes(data)

    def read(self, start: int = 0, stop: int | None = None, *, padding: int = 0) -> np.ndarray:
        """The bytes from ``start`` to ``stop``, by default all, and ``padding`` bytes of anything; uint8."""
        stop = self._size if stop is None else stop
        data = np.empty(stop - start + padding, np.uint8)
        self.read_into(data[: stop - start], start)
        return data

    def read_into(self, buffer: np.ndarray | bytearray, start: int) -> None:
        """Fill ``buffer`` with the bytes from ``start`` on."""
        view = memoryview(buffer).cast("B")
        done = 0
        while done < len(view):
            count = os.preadv(self._file.descriptor, [view[done:]], self._offset + start + done)
            if not count:
                missing = len(view) - done
                raise BadClip(
                    f"truncated: {os.path.basename(self._file.path)} ends {missing} bytes before the clip does"
                )
            done += count
