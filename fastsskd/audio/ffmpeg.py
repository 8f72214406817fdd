"""Formats that libsndfile does not read: m4a, mp4, webm, mkv, wma, amr, ... through FFmpeg (PyAV, an extra).

FFmpeg is made for playing on: a file that is cut plays up to the cut, a damaged packet is passed over, and nothing is
raised. So its decoders are told to raise at any error they see, and the sound that came out is held against what the
container announces:

| damage | found by |
|---|---|
| MP4, AVI, WMA cut; MP4 without its index | the sizes near their beginning |
| other containers cut | packets that FFmpeg marks as incomplete; the announced length |
| bytes missing or blank inside | the decoder; gaps between the packets' times; the announced length |
| a byte changed: FLAC, ALAC, AC-3, WavPack, TTA | the decoder, by checksums (ALAC: rarely, it has none) |
| a byte changed: AAC | the decoder, two times in three |
| a byte changed: Opus, AMR, WMA, MP3 in a video | not found: nothing in the file tells |
"""

from __future__ import annotations

import importlib.util
import struct
from collections.abc import Iterator
from typing import TYPE_CHECKING, BinaryIO

import numpy as np

from fastsskd.audio.info import AudioInfo, BadClip, Sliceable, believable

if TYPE_CHECKING:
    from av import AudioFrame

TOLERANCE = 0.1
"""Seconds that may lack at the end or between packets: containers count in ms, or in packets of up to 93 ms."""
ANNOUNCING = ("mov", "matroska", "asf", "flv", "avi", "au", "wv", "tta", "ape")
"""Containers, by FFmpeg's names, whose header holds the length. Of the others FFmpeg guesses it from the bit rate."""
SAMPLES = {"u8": ("u1", 2.0**7), "s16": ("i2", 2.0**15), "s32": ("i4", 2.0**31), "s64": ("i8", 2.0**63)}
SAMPLES |= {"flt": ("f4", 1.0), "dbl": ("f8", 1.0)}
"""NumPy's type and full scale of FFmpeg's sample formats; with a `p` behind them channels have a plane each."""
ASF_HEADER = bytes.fromhex("3026b2758e66cf11a6d900aa0062ce6c")
ASF_FILE_PROPERTIES = bytes.fromhex("a1dcab8c47a9cf118ee400c00c205365")
ASF_BROADCAST = 1  # flag: its sizes were not known when the header was written
CONTAINER_OPTIONS = {"protocol_whitelist": "none"}  # a file must not make FFmpeg open other files or addresses
DECODER_OPTIONS = {"err_detect": "crccheck+explode"}


def is_installed() -> bool:
    """Whether PyAV is."""
    return importlib.util.find_spec("av") is not None


class FfmpegReader:
    """Decodes the best audio stream of a file from its beginning to its end; the pictures of a video are not decoded.

    Args:
        data: the file.
        file: the same as a file object.

    Attributes:
        info: codec, rate (Hz) and channels; the length is known at the end only.
        rate: Hz.

    Raises:
        BadClip: here and in `read`: no sound in it, cut, or damaged.
    """

    def __init__(self, data: Sliceable, file: BinaryIO):
        import av

        _refuse_cut(data)
        try:
            self._container = av.open(file, options=CONTAINER_OPTIONS, metadata_errors="ignore")
        except (av.FFmpegError, ValueError) as error:
            raise BadClip(f"FFmpeg finds no audio in it ({_text(error)})") from None
        if not self._container.streams.audio:
            raise BadClip("no sound in it")
        self._stream = self._container.streams.best("audio")
        if self._stream is None or self._stream.codec_context is None:
            raise BadClip("its sound has a codec that FFmpeg does not know")
        codec = self._stream.codec_context
        codec.options, codec.thread_count = DECODER_OPTIONS, 1
        self._frames = self._checked_frames()
        self._bad: BadClip | None = None  # found behind the last good frame
        first = self._next_frame()
        if first is None:
            raise BadClip("no samples in it")
        self.rate, self._format, self._channels = _kind(first)
        self.info = believable(AudioInfo(codec.name, self.rate, self._channels, None))
        self._held = self._mono([self._sum_of_planes(first)])

    def read(self, num_samples: int) -> np.ndarray:
        """The next samples, `(S,)` float32, mono: as many as asked for, or fewer before damage or the end."""
        arrays, count = [], len(self._held)
        try:
            while count < num_samples and self._bad is None and (frame := self._next_frame()) is not None:
                arrays.append(self._sum_of_planes(frame))
                count += frame.samples
        except BadClip as bad:
            self._bad = bad
        if not count and self._bad is not None:
            raise BadClip(str(self._bad))
        samples = np.concatenate([self._held, self._mono(arrays)]) if arrays else self._held
        self._held = samples[num_samples:]
        return samples[:num_samples]

    def _sum_of_planes(self, frame: AudioFrame) -> np.ndarray:
        """(S,), or (S * channels,) where they take turns in one plane; PyAV's `to_ndarray` takes five times as long."""
        kind, _ = SAMPLES[self._format.removesuffix("p")]
        count = frame.samples * self._channels // len(frame.planes)
        planes = [np.frombuffer(plane, kind, count) for plane in frame.planes]
        return planes[0] if len(planes) == 1 else np.sum(planes, axis=0, dtype=np.float32)

    def _mono(self, sums: list[np.ndarray]) -> np.ndarray:
        """Mean of the channels, (S,) float32."""
        kind, full_scale = SAMPLES[self._format.removesuffix("p")]
        values = np.concatenate(sums)
        if not self._format.endswith("p"):
            values = sum(values.reshape(-1, self._channels).T.astype(np.float32))
        mean = values.astype(np.float32, copy=False) * np.float32(1.0 / full_scale / self._channels)
        return mean - np.float32(1.0) if kind == "u1" else mean

    def _next_frame(self):
        try:
            return next(self._frames, None)
        except BadClip:
            raise
        except Exception as error:  # PyAV and FFmpeg raise many kinds; none may end a run over a million files
            raise BadClip(f"damaged: {_text(error)}") from None

    def _checked_frames(self) -> Iterator[AudioFrame]:
        """The decoded frames; raises :class:`BadClip` or whatever PyAV does."""
        kind, end, reached = None, None, 0.0  # seconds: end of our last frame, of the furthest packet of any stream
        seconds = {stream: float(stream.time_base or 0) for stream in self._container.streams}
        for packet in self._container.demux():
            if packet.pts is not None:
                reached = max(reached, (packet.pts + (packet.duration or 0)) * seconds.get(packet.stream, 0.0))
            if packet.stream is not self._stream:
                continue
            if packet.is_corrupt:
                raise BadClip(f"truncated or damaged: an incomplete packet {_at(end)}")
            for frame in packet.decode():
                kind = kind or _kind(frame)
                if frame.is_corrupt:
                    raise BadClip(f"damaged: a frame that cannot be decoded {_at(end)}")
                if _kind(frame) != kind:
                    raise BadClip(f"its sound changes from {kind} to {_kind(frame)} {_at(end)}")
                begin = end if frame.time is None else frame.time
                if end is not None and abs(begin - end) > TOLERANCE:
                    raise BadClip(f"damaged: a gap of {begin - end:.2f} s {_at(end)}")
                end = (begin or 0.0) + frame.samples / frame.sample_rate
                yield frame
        self._refuse_early_end(end or 0.0, reached)

    def _refuse_early_end(self, end: float, reached: float) -> None:
        """Hold the end of the sound, or of everything, against what the container announces (all in seconds)."""
        container, stream = self._container, self._stream
        if container.format.name.split(",")[0] not in ANNOUNCING:
            return
        if stream.duration:
            announced = float(((stream.start_time or 0) + stream.duration) * stream.time_base)
        elif container.duration:
            announced, end = ((container.start_time or 0) + container.duration) / 1e6, max(end, reached)
        else:
            return
        if end < announced - TOLERANCE:
            raise BadClip(f"truncated: {end:.2f} s are there, {announced:.2f} s announced")


def _kind(frame: AudioFrame) -> tuple[int, str, int]:
    """Rate (Hz), FFmpeg's name of the sample format, channels."""
    return frame.sample_rate, frame.format.name, frame.layout.nb_channels


def _refuse_cut(data: Sliceable) -> None:
    """Find the files that say near their beginning how many bytes they have, and have fewer."""
    head, size = bytes(data[:8192]), 0
    if head[:4] == b"RIFF" and head[8:12] == b"AVI ":
        size = 8 + struct.unpack_from("<I", head, 4)[0]
    elif head.startswith(ASF_HEADER):
        properties = head.find(ASF_FILE_PROPERTIES)
        if properties >= 0 and len(head) >= properties + 92 and not head[properties + 88] & ASF_BROADCAST:
            (size,) = struct.unpack_from("<Q", head, properties + 40)
    elif head[4:8] == b"ftyp":
        size = _mp4_size(data)
    if size > len(data):
        raise BadClip(f"truncated: {size - len(data)} of {size} bytes are missing")


def _mp4_size(data: Sliceable) -> int:
    """End of the last of an MP4's boxes, as it announces it."""
    at, names = 0, set()
    while at + 8 <= len(data):
        size, name = struct.unpack(">I4s", data[at : at + 8])
        if size == 1 and at + 16 <= len(data):
            (size,) = struct.unpack(">Q", data[at + 8 : at + 16])
        names.add(name)
        at += size if size >= 8 else len(data) - at  # 0: to the end of the file
    if at <= len(data) and b"moov" not in names:
        raise BadClip("truncated: the MP4 file ends before its index (moov)")
    return at


def _at(end: float | None) -> str:
    return f"at {end or 0.0:.2f} s"


def _text(error: Exception) -> str:
    """What an exception says, in one line."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(text.split())[:200]
