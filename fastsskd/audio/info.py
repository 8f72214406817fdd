"""What a file's header says, and the one exception for a clip that must not be used."""

from dataclasses import dataclass
from typing import Protocol

SAMPLE_RATE = 16_000
"""Hz, of packed clips and of everything behind the loader."""
MIN_RATE, MAX_RATE = 1_000, 768_000
"""Sampling rates (Hz) we believe. Resampling 1 Hz to 16 kHz would turn a small file into gigabytes."""
MAX_CHANNELS = 32


class Sliceable(Protocol):
    """The bytes of a file: a ``memoryview`` of them all, or what reads them when it is sliced."""

    def __len__(self) -> int: ...

    def __getitem__(self, places: slice) -> "bytes | memoryview": ...


class BadClip(Exception):
    """A clip that must be left out; ``str()`` is the reason, in one line and without the clip's name."""


@dataclass(frozen=True, slots=True)
class AudioInfo:
    """A header's claims, checked against the file's size.

    Attributes:
        format: "wav", "flac", "vorbis", "opus", "ogg-flac" or "aiff".
        sample_rate: Hz; of Opus always 48000, the rate its lengths are counted in.
        channels: number of channels.
        num_frames: samples per channel, None where the header does not tell (block-coded WAV and AIFF-C, an
            Ogg stream cut out of a longer one).
        sample_type: NumPy's name for the type of samples that need no decoding ("<i2", "<f4"), "" = must be decoded.
        samples_at: first byte of such samples, interleaved channels.
    """

    format: str
    sample_rate: int
    channels: int
    num_frames: int | None
    sample_type: str = ""
    samples_at: int = 0

    @property
    def seconds(self) -> float | None:
        """Length of the clip, None where the header does not tell."""
        return None if self.num_frames is None else self.num_frames / self.sample_rate


def believable(info: AudioInfo) -> AudioInfo:
    """`info` itself.

    Raises:
        BadClip: a sampling rate, number of channels or length that no clip has.
    """
    if not MIN_RATE <= info.sample_rate <= MAX_RATE:
        raise BadClip(f"sampling rate {info.sample_rate} Hz, outside {MIN_RATE}..{MAX_RATE}")
    if not 1 <= info.channels <= MAX_CHANNELS:
        raise BadClip(f"{info.channels} channels, outside 1..{MAX_CHANNELS}")
    if info.num_frames is not None and info.num_frames <= 0:
        raise BadClip("no samples in it")
    return info
