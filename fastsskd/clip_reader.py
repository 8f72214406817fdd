"""A clip of a manifest -> its mono samples at its own rate: all of them, or those that a crop is made from.

Of uncompressed clips (16-bit WAV, packed or not) and of long FLAC files only the place where the crop lies is read, so
a crop of an hour-long recording costs the crop. FLAC is decoded by our own kernel, the rest by DALI.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

import fastsskd_kernels as kernels
from fastsskd.audio.file import AudioInfo, BadClip, check_decoded, probe
from fastsskd.audio.flac import flac_extent, flac_stream
from fastsskd.audio.info import SAMPLE_RATE
from fastsskd.clip_bytes import ClipBytes, OpenFile, ShardFiles
from fastsskd.clip_table import PACKED, Manifest
from fastsskd.decode import Decoded, DecodeError, Decoder

MAX_WHOLE = 1 << 20
"""Bytes of a clip that are asked for ahead and read at once; of longer ones a part is, where the format allows it."""


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
                return self._bare(i, clip, info, crop)
        if clip[:4] == b"fLaC":
            window = self._flac(i, clip, crop)
            if window is not None:
                return window
        data = clip.read()
        return _Encoded(data, probe(data.data))

    def _bare(self, i: int, clip: ClipBytes, info: AudioInfo, crop: Crop) -> Window:
        """Read only what the crop needs of uncompressed samples."""
        first, begin, end, length = self._place(i, info, crop)
        samples = np.empty((end - begin, info.channels), info.sample_type)
        clip.read_into(samples, info.samples_at + (first + begin) * samples.itemsize * info.channels)
        if info.channels == 1:
            return Window(samples[:, 0], info.sample_rate, begin, length)
        return Window(kernels.downmix(samples), info.sample_rate, begin, length)

    def _flac(self, i: int, clip: ClipBytes, crop: Crop) -> Window | None:
        """Of a long file only the frames that the crop lies in, of others all: so that damage is found wherever it is.

        None = something is odd, and DALI should say what.
        """
        is_long = len(clip) > MAX_WHOLE
        data = clip if is_long else clip.read(padding=kernels.FLAC_PADDING)
        stream = flac_stream(clip if is_long else data[: len(clip)].data)
        first, begin, end, length = self._place(i, stream.info, crop)
        decoded = (first + begin, first + end) if is_long else (0, stream.info.num_frames)
        if is_long:
            frames = clip.read(*flac_extent(clip, stream, *decoded), padding=kernels.FLAC_PADDING)
        else:
            frames = data[stream.first_frame :]
        kind = {"channels": stream.info.channels, "sample_bits": stream.sample_bits, "block_size": stream.block_size}
        try:
            samples = kernels.decode_flac(frames, **kind, begin=decoded[0], end=decoded[1])
        except ValueError:
            return None
        return Window(samples[first + begin - decoded[0] :][: end - begin], stream.info.sample_rate, begin, length)

    def _place(self, i: int, info: AudioInfo, crop: Crop) -> tuple[int, int, int, int]:
        """Where in the file the clip begins; begin, end in it of what the crop needs; the clip's length."""
        first, last = self._segment(i, info.sample_rate, info.num_frames)
        begin, end = 0, last - first
        if crop.num_samples is not None:
            begin, end = kernels.crop_inputs_range(end, info.sample_rate, crop.num_samples, crop.position, SAMPLE_RATE)
        return first, begin, end, last - first

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
        if size > MAX_WHOLE:  # a crop of it will be read, and where it lies is not known yet
            continue
        try:
            file = _open_file(manifest, i, size, shards)
            length = MAX_WHOLE if size < 0 else size
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
