"""Any audio file -> mono samples at its own rate, block by block; and blocks at any rate -> blocks at 16 kHz.

Which decoder is told by the file's content, never by its name: libsndfile for what the loader reads too (WAV, FLAC,
Ogg, AIFF) and for MP3, FFmpeg for the rest. No clip comes out shorter than its file says without an error.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import numpy as np
import soundfile

import fastsskd_kernels as kernels
from fastsskd.audio import ffmpeg as audio_ffmpeg
from fastsskd.audio.ffmpeg_process import RemoteReader
from fastsskd.audio.file import BadClip, check_decoded, check_decoded_length, probe
from fastsskd.audio.info import SAMPLE_RATE, AudioInfo, Sliceable
from fastsskd.audio.mp3 import find_mpeg_audio, probe_mp3
from fastsskd.clip_bytes import OpenFile
from fastsskd.clip_file import FileView, load

BLOCK = 1 << 20
"""Samples, of all channels or at 16 kHz, that are decoded at once."""
MP3_TOLERANCE = 2 * 1152
"""Samples: a decoder may skip the first frames of an MP3 that was cut out of another one."""
FOR_FFMPEG = ("not read directly", "unknown header", "unknown codec")
"""What `probe` says of files that it does not know but that can be sound."""
EXACT_SEEKS = ("PCM_", "FLOAT", "DOUBLE", "ULAW", "ALAW")
"""Beginnings of libsndfile's names of the codecs in which a seek ends at exactly the sample that was asked for."""


class AnyAudio:
    """An open audio file of any format.

    Segments that follow each other are read in one go. One that lies before the last makes a format without exact
    seeks (Ogg, MP3, all of FFmpeg's) start again from its beginning.

    Args:
        path: the file.
        offset, size: where in it the clip's own file lies, see `Manifest.extent`.

    Attributes:
        info: what the header says; `num_frames` is None where only decoding tells.
        rate: Hz of the samples that come out; not always the header's (Opus).

    Raises:
        BadClip: it cannot be used. OSError: it cannot be opened or read.
    """

    def __init__(self, path: Path | str, offset: int = 0, size: int = -1):
        self._open = _identify(path, offset, size)
        self._reader: _Reader | None = self._open()
        self._position = 0
        self._broken: tuple[int, str] | None = None  # where decoding ends for good, and why
        self.info, self.rate = self._reader.info, self._reader.rate
        self._any_length = replace(self.info, num_frames=None)
        self._block = max(1, BLOCK // max(self.info.channels, -(-SAMPLE_RATE // self.rate)))

    def blocks(self, start: float = 0.0, end: float = -1.0) -> Iterator[np.ndarray]:
        """The segment from `start` to `end` (seconds, -1 = the file's end) as `(S,)` float32 blocks at `rate`.

        Raises:
            BadClip: damaged, of another length than announced, NaN or absurd samples, or over before `start`.
        """
        first, last = round(start * self.rate), round(end * self.rate) if end > 0 else None
        self._go_to(first)
        while last is None or self._position < last:
            block = self._read(self._block if last is None else min(self._block, last - self._position))
            if not len(block):
                break
            check_decoded(block, self._any_length)
            yield block
        if self._position <= first:
            raise BadClip(f"is over before its segment begins, at {start:g} s" if first else "no samples in it")

    def _go_to(self, first: int) -> None:
        if self._reader is None or first < self._position:
            if self._broken and first >= self._broken[0]:
                raise BadClip(self._broken[1])
            self._reader, self._position = self._open(), 0
        if first > self._position and self._reader.seek(first):
            self._position = first
        while self._position < first and len(self._read(min(self._block, first - self._position))):
            pass

    def _read(self, num_samples: int) -> np.ndarray:
        try:
            block = self._reader.read(num_samples)
            if not len(block):
                self._check_length()
        except BadClip as bad:
            if not self._reader.seeks:
                self._broken = self._position, str(bad)
            self._reader = None
            raise
        self._position += len(block)
        return block

    def _check_length(self) -> None:
        expected = self.info.num_frames
        if self.info.format != "mp3" or abs(self._position - expected) > MP3_TOLERANCE:
            check_decoded_length(self._position, self.info, self.rate)


def resampled(blocks: Iterator[np.ndarray], rate: int) -> Iterator[np.ndarray]:
    """Blocks of a clip at `rate` Hz -> blocks at 16 kHz, each sample the same as if the clip were resampled at once.

    A block is resampled with so much of the sound before it as the filter reaches, from a sample on that both rates
    have; and all but the last block without so much at its end.
    """
    table, up, down = kernels.resample_table(rate, SAMPLE_RATE)
    if up == down:
        yield from blocks
        return
    reach = table.shape[1] // 2 + 1
    lead = -(-reach // down)  # in periods: `down` samples in, `up` samples out
    waiting: list[np.ndarray] = []
    kept, done = 0, 0  # periods of the clip before the first sample that waits, and before the next output
    for block in blocks:
        waiting.append(block)
        ready = kept + (sum(map(len, waiting)) - reach) // down
        if ready > done:
            waiting = [np.concatenate(waiting)]
            yield kernels.resample_crop_or_loop(waiting[0], rate, (ready - kept) * up)[(done - kept) * up :]
            keep_from = max(kept, ready - lead)
            waiting, kept, done = [waiting[0][(keep_from - kept) * down :]], keep_from, ready
    rest = np.concatenate(waiting)
    length = kernels.resampled_length(len(rest), up, down)
    if length > (done - kept) * up:
        yield kernels.resample_crop_or_loop(rest, rate, length)[(done - kept) * up :]


class _Reader(Protocol):
    """A decoder at work: mono samples from the beginning to the end."""

    info: AudioInfo
    rate: int
    seeks: bool
    """Whether `seek` can."""

    def read(self, num_samples: int) -> np.ndarray:
        """The next samples, (S,) float32: as many as asked for, or fewer at the end."""

    def seek(self, sample: int) -> bool:
        """Go to exactly this sample; False, and nothing has changed, where the format does not allow it."""


class _SoundfileReader:
    """Through libsndfile."""

    def __init__(self, data: Sliceable, info: AudioInfo):
        self.info = info
        self._view = FileView(data)
        with self._readable():
            self._file = soundfile.SoundFile(self._view)
        self.rate = self._file.samplerate
        self.seeks = self._file.format == "FLAC" or (
            self.info.format in ("wav", "aiff") and self._file.subtype.startswith(EXACT_SEEKS)
        )

    def read(self, num_samples: int) -> np.ndarray:
        with self._readable():
            samples = self._file.read(num_samples, dtype="float32", always_2d=True)
        return kernels.downmix(samples)

    def seek(self, sample: int) -> bool:
        if not self.seeks or sample > self._file.frames:
            return False
        with self._readable():
            self._file.seek(sample)
        return True

    @contextlib.contextmanager
    def _readable(self) -> Iterator[None]:
        try:
            yield
        except soundfile.SoundFileError as error:
            raise BadClip(f"cannot be decoded: {_text(error)}") from None
        if self._view.error is not None:
            raise BadClip(f"cannot be read: {self._view.error}")


def _identify(path: Path | str, offset: int, size: int) -> Callable[[], _Reader]:
    """What opens the file for decoding."""
    data = load(OpenFile(path), offset, size)
    try:
        info = probe(data)
        return lambda: _SoundfileReader(data, info)
    except BadClip as bad:
        reason = str(bad).removesuffix(": run `fastsskd pack` first")
    if isinstance(data, memoryview) and (start := find_mpeg_audio(data)) is not None:
        info, end = probe_mp3(data, start)
        return lambda: _SoundfileReader(data[start:end], info)
    if not any(words in reason for words in FOR_FFMPEG):
        raise BadClip(reason)
    what = reason.partition(", which")[0]
    if not audio_ffmpeg.is_installed():
        raise BadClip(f"{what}: to read it, `pip install 'fastsskd[formats]'`")
    return lambda: _open_in_ffmpeg(what, path, offset, size)


def _open_in_ffmpeg(what: str, path: Path | str, offset: int, size: int) -> _Reader:
    try:
        return RemoteReader(path, offset, size)
    except BadClip as bad:
        raise BadClip(f"{what}: {bad}") from None


def _text(error: soundfile.SoundFileError) -> str:
    """libsndfile's words, in one line and without the file object's name."""
    text = " ".join(str(getattr(error, "error_string", error)).split()).removeprefix("Error : ")
    return text.rstrip(".")[:200] or "libsndfile refuses it"
