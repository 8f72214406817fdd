"""How fast the clips' files come from the disk, and how fast once they are in memory."""

from __future__ import annotations

import os
import statistics
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

from fastsskd.audio.info import BadClip
from fastsskd.clip_reader import MAX_WHOLE
from fastsskd.manifest import Manifest
from fastsskd.profile.stages import Hand, Pipelines


@dataclass(frozen=True)
class Disk:
    """Attributes:
    disk, memory: bytes a second of plain reading, by as many threads as the loader has, cold and warm.
    cold, warm: clips a second of the whole pipeline.
    bytes: that are read of a clip.
    still: share of the clips that stayed in memory though the system was asked to drop them; near 1, nothing was cold.
    """

    disk: float
    memory: float
    cold: float
    warm: float
    bytes: float
    still: float

    @property
    def was_cold(self) -> bool:
        return self.still < 0.5


def measure(pipelines: Pipelines, seconds: float) -> Disk | None:
    """Half of the sample for reading, the other half for the pipeline: what was read once is in memory. None = too few.

    Nothing is written; the system is asked to drop these files from its memory, which needs no rights.
    """
    clips = pipelines.clips
    half = len(clips) // 2
    if half < 2:
        return None
    one, other = range(half), range(half, len(clips))
    size = statistics.fmean(_bytes(clips, i) for i in one)
    still = forget(clips, one)
    disk = pipelines.run(Hand.read, one, seconds / 4, once=True)
    memory = pipelines.run(Hand.read, one, seconds / 4)
    still = (still + forget(clips, other)) / 2
    cold = pipelines.run(Hand.features, other, seconds / 4, once=True)
    warm = pipelines.run(Hand.features, other, seconds / 4)
    read = disk.clips_per_second * size, memory.clips_per_second * size
    return Disk(*read, cold.clips_per_second, warm.clips_per_second, size, still)


def forget(clips: Manifest, rows: Sequence[int]) -> float:
    """Ask the system to drop clips from its memory; the share of them whose first bytes are still there."""
    still = asked = 0
    for i in rows:
        offset, size = clips.extent(i)
        try:
            descriptor = os.open(clips.path(i), os.O_RDONLY)
        except OSError:
            continue
        try:
            os.posix_fadvise(descriptor, offset, max(size, 0), os.POSIX_FADV_DONTNEED)
            still += _in_memory(descriptor, offset)
            asked += 1
        finally:
            os.close(descriptor)
    return still / max(asked, 1)


def _in_memory(descriptor: int, offset: int) -> bool:
    """Whether a byte can be had without asking the disk; True where the file system cannot tell."""
    try:
        return os.preadv(descriptor, [bytearray(1)], offset, os.RWF_NOWAIT) == 1
    except BlockingIOError:
        return False
    except OSError:
        return True


def _bytes(clips: Manifest, i: int) -> int:
    """That are read of the clip's file, of a long one no more than a part."""
    size = clips.extent(i)[1]
    if size < 0:
        with suppress(OSError, BadClip):
            size = os.stat(clips.path(i)).st_size
    return min(max(size, 0), MAX_WHOLE)
