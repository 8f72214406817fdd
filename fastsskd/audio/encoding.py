"""Samples at 16 kHz -> the file of a packed clip: WAV of 16 bits or float32, or FLAC.

Sound goes through temporary files that stay in memory while they are small, so a recording of any length costs
the same. The headers are our own where others put the time of day into theirs: equal clips must be equal bytes.
"""

from __future__ import annotations

import io
import struct
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile

from fastsskd.audio.info import SAMPLE_RATE, BadClip

ENCODINGS = ("pcm16", "float32", "flac")
FULL_SCALE = 32768.0
QUIET = 128
"""Steps of 16 bits: a clip whose peak is below keeps fewer than 8 bits of itself in them."""
IN_MEMORY = 1 << 23
"""Bytes of a clip from which on it goes to disk."""
CHUNK = 1 << 20
"""Bytes read back at once."""
LARGEST_WAV = (1 << 32) - 4096
PCM, FLOAT = 1, 3


class Spool(tempfile.SpooledTemporaryFile):
    """A file in memory, or, when it grows, one in `folder` that has no name and so is never left behind.

    An error in `write` is kept in `error` instead of raised: libsndfile, which calls it, cannot pass one on.
    """

    def __init__(self, folder: Path):
        super().__init__(max_size=IN_MEMORY, dir=folder)
        self.error: OSError | None = None

    def write(self, data) -> int:
        try:
            return super().write(data)
        except OSError as error:
            self.error = self.error or error
            return len(data)

    def raise_error(self) -> None:
        if self.error is not None:
            raise self.error

    def chunks(self) -> Iterator[bytes]:
        """All of it, from the beginning."""
        self.seek(0)
        while chunk := self.read(CHUNK):
            yield chunk


@dataclass(frozen=True)
class EncodedClip:
    """The file of a packed clip.

    Attributes:
        file: its bytes.
        size: their number.
        suffix: "wav" or "flac".
        num_samples: at 16 kHz.
        is_float: stored as float32, asked for or not.
    """

    file: Spool
    size: int
    suffix: str
    num_samples: int
    is_float: bool


def encode(blocks: Iterable[np.ndarray], encoding: str, folder: Path) -> EncodedClip:
    """Encode a clip.

    A clip that 16 bits would change is stored as float32 WAV whatever was asked for: one that reaches above full scale
    would be clipped, and of a very quiet one little would be left (unless it has 16 bits already).

    Args:
        blocks: its samples at 16 kHz, `(S,)` float32 each.
        encoding: one of `ENCODINGS`.
        folder: for long clips' temporary files.

    Raises:
        BadClip: too long for a WAV file. OSError: the disk is full.
    """
    with Spool(folder) as samples:
        peak = 0.0
        for block in blocks:
            peak = max(peak, float(np.abs(block).max()))
            samples.write(np.ascontiguousarray(block))
            samples.raise_error()
        num_samples = samples.tell() // 4
        is_float = encoding == "float32" or not _fits_16_bits(samples, peak)
        out = Spool(folder)
        if encoding == "flac" and not is_float:
            suffix = "flac"
            _write_flac(samples, out)
        else:
            suffix = "wav"
            _write_wav(samples, out, num_samples, is_float)
    out.raise_error()
    out.seek(0, io.SEEK_END)
    return EncodedClip(out, out.tell(), suffix, num_samples, is_float)


def _fits_16_bits(samples: Spool, peak: float) -> bool:
    if np.rint(peak * FULL_SCALE) > FULL_SCALE:
        return False
    return not 0.0 < peak * FULL_SCALE < QUIET or all(
        np.array_equal(block * FULL_SCALE, np.rint(block * FULL_SCALE)) for block in _blocks(samples)
    )


def _blocks(samples: Spool) -> Iterator[np.ndarray]:
    for chunk in samples.chunks():
        yield np.frombuffer(chunk, np.float32)


def _to_16_bits(block: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(block * np.float32(FULL_SCALE)), -32768, 32767).astype("<i2")  # 1.0 is 32767


def _write_wav(samples: Spool, out: Spool, num_samples: int, is_float: bool) -> None:
    sample_bytes = 4 if is_float else 2
    data_size = num_samples * sample_bytes
    if data_size > LARGEST_WAV:
        raise BadClip(f"{num_samples / SAMPLE_RATE / 3600:.0f} hours, more than a WAV file can hold: split it")
    out.write(_wav_header(data_size, sample_bytes, num_samples))
    for block in _blocks(samples):
        out.write(block.astype("<f4") if is_float else _to_16_bits(block))


def _wav_header(data_size: int, sample_bytes: int, num_samples: int) -> bytes:
    """44 bytes, or 56: float files must say their number of samples again. The samples begin at a multiple of 4."""
    kind, bits, rate = FLOAT if sample_bytes == 4 else PCM, 8 * sample_bytes, SAMPLE_RATE
    fmt = struct.pack("<4sIHHIIHH", b"fmt ", 16, kind, 1, rate, rate * sample_bytes, sample_bytes, bits)
    fact = struct.pack("<4sII", b"fact", 4, num_samples) if kind == FLOAT else b""
    size = 4 + len(fmt) + len(fact) + 8 + data_size
    return struct.pack("<4sI4s", b"RIFF", size, b"WAVE") + fmt + fact + struct.pack("<4sI", b"data", data_size)


def _write_flac(samples: Spool, out: Spool) -> None:
    with soundfile.SoundFile(out, "w", SAMPLE_RATE, 1, "PCM_16", format="FLAC") as file:
        for block in _blocks(samples):
            file.write(_to_16_bits(block))
