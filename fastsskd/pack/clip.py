"""One clip of a manifest -> the file that stands for it in a shard, or why there is none. Runs in many threads."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fastsskd.audio.any_format import AnyAudio, resampled
from fastsskd.audio.encoding import EncodedClip, encode
from fastsskd.audio.info import AudioInfo, BadClip
from fastsskd.clip_table import Manifest
from fastsskd.errors import InputError

MARKED_FOR_PACK = "run `fastsskd pack` first"
"""In the reason of a clip that `fastsskd check` marked because the loader does not read its format: we do."""


@dataclass(frozen=True)
class PackedClip:
    """A clip's new file, and what its old one was."""

    encoded: EncodedClip
    source: AudioInfo


class Stopped(Exception):
    """The clip was not finished because the whole job ends."""


class ClipPacker:
    """Packs clips of a manifest; threads share it.

    Args:
        manifest: the clips.
        encoding: see `clip_encoding.encode`.
        work: folder for temporary files.

    Attributes:
        stop: set it to end the clips that are being packed, with `Stopped`.
    """

    def __init__(self, manifest: Manifest, encoding: str, work: Path):
        self._manifest, self._encoding, self._work = manifest, encoding, work
        self._thread = threading.local()
        self.stop = threading.Event()

    def pack(self, i: int) -> PackedClip | BadClip:
        """Clip `i`, or what is wrong with it.

        Raises:
            OSError: the disk we write to is full. InputError: the data set is gone. Stopped.
        """
        try:
            marked = self._manifest.bad(i)
            if marked and MARKED_FOR_PACK not in marked:
                raise BadClip(marked)
            audio = self._open(i)
            blocks = self._until_stop(audio.blocks(*self._manifest.segment(i)))
            return PackedClip(encode(resampled(blocks, audio.rate), self._encoding, self._work), audio.info)
        except BadClip as bad:
            return BadClip(str(bad))  # without the traceback, which would hold the clip in memory

    def _open(self, i: int) -> AnyAudio:
        """The clip's file; the one of this thread's last clip is still open, for the segments of a long recording."""
        what = self._manifest.path(i), self._manifest.extent(i)
        last, audio = getattr(self._thread, "last", (None, None))
        if last != what:
            self._thread.last = None, None  # let go of it before the next one is read
            try:
                audio = AnyAudio(what[0], *what[1])
            except BadClip as bad:
                audio = str(bad)
            except OSError as error:
                if not os.path.isdir(self._manifest.root):
                    raise InputError(
                        f"{self._manifest.root}: the data set is gone ({error.strerror}): bring it back, then run the "
                        "same command again to go on"
                    ) from None
                audio = f"cannot be read: {error.strerror or error}"
            self._thread.last = what, audio
        if isinstance(audio, str):
            raise BadClip(audio)
        return audio

    def _until_stop(self, blocks: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
        for block in blocks:
            if self.stop.is_set():
                raise Stopped
            yield block
