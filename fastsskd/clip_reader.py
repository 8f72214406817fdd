"""A clip of a manifest -> its mono samples at its own rate: all of them, or those that a crop is made from.

Uncompressed clips (16-bit WAV, packed or not) are read straight from the place where the crop lies, so a crop of an
hour-long recording costs the crop. All others are read whole and decoded by DALI.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

import fastsskd_kernels as kernels
from fastsskd.audio_file import AudioInfo, BadClip, check_decoded, probe
from fastsskd.audio_info import SAMPLE_RATE
from fastsskd.clip_bytes import ClipBytes, OpenFile, ShardFiles
from fastsskd.clip_table import PACKED, Manifest
from fastsskd.decode import Decoded, DecodeError, Decoder

MAX_ANNOUNCED = 1 << 20
"""Bytes of a clip that are asked for ahead; longer ones are read in part."""


@dataclass(frozen=True)
class Crop:
    """What training wants of a clip.

    Attributes:
        num_samples: length at ``SAMPLE_RATE``; None = the whole clip.
        position: in [0, 1), where among the possible starts; see ``kernels.crop_start``.
    """

    num_samples: int | None
    position: float = 0.0


@dataclass(frozen=True)
class Window:
    """Samples of a clip, mono.

    Attributes:
        samples: ``(L,)`` float32, or int16 full scale; valid until the reader's next clip.
        rate: Hz.
        begin: place of ``samples[0]`` in the clip.
        length: samples of the whole clip.
    """

    samples: np.ndarray
    rate: int
    begin: int
    length: int


@dataclass(frozen=True)
class _Encoded:
    data: np.ndarray
    info: AudioInfo


class ClipReader:
    """Reads clips; one a thread.

    Args:
        manifest: the clips.
        shards: open tar shards, shared by all readers of the manifest.
        max_clips: most clips in a call.
    """

    def __init__(self, manifest: Manifest, shards: ShardFiles, max_clips: int):
        self._manifest, self._shards, self._max_clips = manifest, shards, max_clips
        # NaN can hide anywhere in a float file: only one that was checked whole before is read in part.
        self._direct = ("<i2", "<f4") if manifest.source == PACKED else ("<i2",)
        self._decoder: Decoder | None = None

    def read(self, index: list[int], crops: list[Crop]) -> Iterator[tuple[int, Window | BadClip]]:
        """Place in ``index``, and the clip or what is wrong with it; in any order, each place once."""
        encoded: dict[int, _Encoded] = {}
        for place, (i, crop) in enumerate(zip(index, crops, strict=True)):
            try:
                if self._manifest.bad(i):
                    raise BadClip(self._manifest.bad(i))
                found = self._open(i, crop)
            except BadClip as bad:
                yield place, bad
            except OSError as error:
                yield place, BadClip(f"cannot be read: {error.strerror or error}")
            else:
                if isinstance(found, Window):
                    yield place, found
                else:
                    encoded[place] = found
        for place, clip in self._decode(encoded):
            try:
                yield place, clip if isinstance(clip, BadClip) else self._checked(index[place], encoded[place], clip)
            except BadClip as bad:
                yield place, bad

    def _open(self, i: int, crop: Crop) -> Window | _Encoded:
        clip = open_clip(self._manifest, i, self._shards)
        if clip[:4] in (b"RIFF", b"RF64"):
            info = probe(clip)
            if info.sample_type in self._direct:
                return self._window(i, clip, info, crop)
        data = clip.read()
        return _Encoded(data, probe(data.data))

    def _window(self, i: int, clip: ClipBytes, info: AudioInfo, crop: Crop) -> Window:
        """Read only what the crop needs of uncompressed samples."""
        first, last = self._segment(i, info.sample_rate, info.num_frames)
        length = last - first
        begin, end = 0, length
        if crop.num_samples is not None:
            begin, end = kernels.crop_inputs_range(
                length, info.sample_rate, crop.num_samples, crop.position, SAMPLE_RATE
            )
        samples = np.empty((end - begin, info.channels), info.sample_type)
        clip.read_into(samples, info.samples_at + (first + begin) * samples.itemsize * info.channels)
        if info.channels == 1:
            return Window(samples[:, 0], info.sample_rate, begin, length)
        return Window(kernels.downmix(samples), info.sample_rate, begin, length)

    def _decode(self, encoded: dict[int, _Encoded]) -> Iterator[tuple[int, Decoded | BadClip]]:
        """All in one call; where DALI refuses one of them, each alone to find out which."""
        if not encoded:
            return
        if self._decoder is None:
            self._decoder = Decoder(self._max_clips)
        try:
            yield from zip(encoded, self._decoder.decode([clip.data for clip in encoded.values()]), strict=True)
            return
        except DecodeError as error:
            reason = str(error)
        for place, clip in encoded.items():
            try:
                yield place, self._decoder.decode([clip.data])[0] if len(encoded) > 1 else BadClip(reason)
            except DecodeError as error:
                yield place, BadClip(str(error))

    def _checked(self, i: int, file: _Encoded, clip: Decoded) -> Window:
        """Find what DALI does not report; cut out the clip's segment."""
        check_decoded(clip.samples, file.info, clip.rate)
        first, last = self._segment(i, clip.rate, len(clip.samples))
        return Window(clip.samples[first:last], clip.rate, 0, last - first)

    def _segment(self, i: int, rate: int, num_frames: int) -> tuple[int, int]:
        """First sample of the clip in its file, and the one after its last."""
        start, end = self._manifest.segment(i)
        first, last = round(start * rate), num_frames if end <= 0 else min(round(end * rate), num_frames)
        if first >= last:
            raise BadClip(f"is over before its segment begins, at {start:g} s")
        return first, last


def announce(manifest: Manifest, index: np.ndarray, shards: ShardFiles) -> None:
    """Ask the system to bring clips into memory that will be read soon; it does so while others are worked on.

    A disk that is asked for many clips at once gives several times what it gives to readers who wait for each.
    """
    for i in index.tolist():
        offset, size = manifest.extent(i)
        if size > MAX_ANNOUNCED:  # a crop of it will be read, and where it lies is not known yet
            continue
        try:
            file = _open_file(manifest, i, size, shards)
            length = MAX_ANNOUNCED if size < 0 else size
            os.posix_fadvise(file.descriptor, offset, length, os.POSIX_FADV_WILLNEED)
        except OSError:
            continue  # whoever reads it will say so


def open_clip(manifest: Manifest, i: int, shards: ShardFiles) -> ClipBytes:
    """The bytes of a clip, in a file of its own or in a shard, which then stays open.

    Raises:
        OSError: the file is not there or cannot be read.
    """
    offset, size = manifest.extent(i)
    return ClipBytes(_open_file(manifest, i, size, shards), offset, size)


def _open_file(manifest: Manifest, i: int, size: int, shards: ShardFiles) -> OpenFile:
    return OpenFile(manifest.path(i)) if size < 0 else shards.open(manifest.file_name(i))
