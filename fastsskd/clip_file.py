"""The bytes of a clip as decoders want them: all in memory, or a file object."""

import io
import mmap

from fastsskd.audio.info import BadClip, Sliceable
from fastsskd.clip_bytes import ClipBytes, OpenFile

IN_MEMORY = 1 << 26
"""Bytes up to which a file is read whole."""


def load(file: OpenFile, offset: int, size: int) -> Sliceable:
    """The clip's bytes: in memory, or read when asked for.

    Of long WAV and AIFF files nothing is read ahead. The other formats are checked from end to end, which needs a
    memory map where the file is long.
    """
    clip = ClipBytes(file, offset, size)
    if len(clip) <= IN_MEMORY:
        return clip.read().data
    if clip[:4] in (b"RIFF", b"RF64", b"FORM"):
        return clip
    whole = memoryview(mmap.mmap(file.descriptor, 0, access=mmap.ACCESS_READ))
    return whole[offset : offset + len(clip)]


class FileView(io.RawIOBase):
    """The bytes of a clip as a file object; libsndfile cannot pass on an exception, so the first one is kept."""

    def __init__(self, data: Sliceable):
        self._data, self._at = data, 0
        self.error: Exception | None = None

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = max(0, offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: len(self._data)}[whence])
        return self._at

    def readinto(self, buffer) -> int:
        try:
            piece = self._data[self._at : self._at + len(buffer)]
        except (BadClip, OSError) as error:
            self.error = self.error or error
            return 0
        buffer[: len(piece)] = piece
        self._at += len(piece)
        return len(piece)
