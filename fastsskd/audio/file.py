"""Is this file an audio clip, whole and believable? Told from its bytes before decoding, and from its length after.

DALI's audio decoder (2.4.0, libsndfile inside) reports some damage, with an error that loses the whole batch, and is
silent about the rest. What it does with each kind, tried, and which of our checks finds it:

| damage | DALI | found by |
|---|---|---|
| zero bytes, HTML, text, MP3, noise, no format or no data chunk | error | `probe` |
| WAV or AIFF cut anywhere after the header | **silently short or empty** | `probe`: chunk sizes and the file's end |
| WAV: data chunk announces less than is there | **silently short** | `probe`: bytes after the last chunk |
| WAV: data chunk announces more than is there | **silently what is there** | `probe`: chunk sizes and the file's end |
| WAV: 64 channels, 7 or 24 bits written over 1 x 16 | **silently other sound** | `probe`: header against itself |
| WAV: 0 Hz | error | `probe` |
| WAV, FLAC, AIFF: 1 Hz, 1 GHz; real 64 channels | **silently decoded** | `probe`: limits |
| WAV from a pipe (length 0xFFFFFFFF), RIFF size wrong, junk of < 4 kB after it | decoded whole | good |
| AIFF: COMM's length and SSND's size differ | **silently SSND's** | `probe` |
| FLAC cut before its last frame | error | `probe`: its last frame |
| FLAC cut in its last frame, a byte changed, bytes missing inside | error | DALI |
| FLAC: announces more samples | error | `probe`: its last frame |
| FLAC: announces fewer samples | **silently short** | `probe`: its last frame |
| FLAC: another sampling rate in the header | **silently wrong pitch** | `probe`: its first frame |
| FLAC without a length (from a pipe) | error | `probe` |
| Ogg Vorbis, Opus cut anywhere | error in the first pages, then **silently short** | `probe`: every page |
| Ogg Vorbis: a byte changed or bytes missing | error; in the last page **silently short** | `probe`: page checksums |
| Ogg Opus: a byte changed | error; in first and last pages **silently short** | `probe`: page checksums |
| Ogg streams one after the other | **silently the first one** | `probe` |
| float WAV with NaN, infinite or 1e30 samples | **silently decoded** | `check_decoded` |
| bytes changed inside WAV or AIFF samples | silently decoded | not found: nothing in the file tells |
| all samples zero | decoded | good |

`probe` takes 5 us for WAV and AIFF, 10-20 us for FLAC, and reads Ogg whole: about 1 us per kB.

FLAC is decoded by `fastsskd_kernels.decode_flac`, which checks every frame, and by DALI wherever that one refuses: what
is said of a damaged file is the same.
"""

import mmap
import struct

import numpy as np

from fastsskd.audio.chunks import probe_aiff, probe_wav
from fastsskd.audio.flac import probe_flac
from fastsskd.audio.info import AudioInfo, BadClip, Sliceable
from fastsskd.audio.ogg import probe_ogg
from fastsskd.clip_bytes import ClipBytes

__all__ = ["AudioInfo", "BadClip", "check_decoded", "check_decoded_length", "probe"]

LENGTH_TOLERANCE = 2
"""Samples by which a decoded and resampled clip may differ from its header: resamplers round."""
MAX_AMPLITUDE = 2.0**31
"""Float files hold samples of +-1, some of +-2^15 or +-2^31. Beyond that their power overflows in the features."""

# First bytes of what people have under an audio file's name, and what we call it.
NOT_READ_DIRECTLY = {
    b"ID3": "MP3",
    b"\xff\xfb": "MP3",
    b"\xff\xf3": "MP3",
    b"\xff\xf2": "MP3",
    b"\xff\xfa": "MP3",
    b"\xff\xf1": "AAC",
    b"\xff\xf9": "AAC",
    b"\x1aE\xdf\xa3": "WebM or Matroska",
    b"0&\xb2u": "WMA",
    b".snd": "AU",
    b"caff": "CAF",
    b"riff": "W64",
    b"RIFX": "RIFX",
    b"#!AMR": "AMR",
    b"wvpk": "WavPack",
}
NOT_AUDIO = {b"PK\x03\x04": "a zip archive", b"\x1f\x8b": "a gzip archive", b"\x89PNG": "a PNG picture"} | {
    b"\xff\xd8\xff": "a JPEG picture",
    b"%PDF": "a PDF document",
    b"version https://git-lfs": "a Git LFS pointer: fetch the file itself",
}


def probe(data: bytes | bytearray | memoryview | mmap.mmap | ClipBytes) -> AudioInfo:
    """Read and check the header of an encoded clip without decoding it.

    Args:
        data: the whole file. Of ``ClipBytes`` that do not hold Ogg only the headers are read.

    Returns:
        Format, sampling rate (Hz), channels and samples per channel.

    Raises:
        BadClip: not a WAV, FLAC, Ogg or AIFF file, or one that is cut, damaged or not believable.
    """
    if isinstance(data, ClipBytes):
        if _parser(data) is not probe_ogg:
            return _probe(data)
        data = data.read().data
    with memoryview(data) as view:
        return _probe(view)


def _probe(data: Sliceable) -> AudioInfo:
    try:
        return _parser(data)(data)
    except BadClip as bad:
        reason = str(bad)
    except (struct.error, IndexError):
        reason = "truncated: its header is cut short"
    # Outside of the handler: the first exception's frames would keep a memory-mapped file from being closed.
    raise BadClip(reason)


def check_decoded_length(num_samples: int, info: AudioInfo, sample_rate: int | None = None) -> None:
    """Hold the length of a decoded clip against its header.

    Args:
        num_samples: samples per channel after decoding (and resampling).
        info: what `probe` said.
        sample_rate: Hz of the decoded clip; None: the file's own.

    Raises:
        BadClip: empty, or more than `LENGTH_TOLERANCE` samples off.
    """
    if num_samples <= 0:
        raise BadClip("no samples in it")
    if info.num_frames is None:
        return
    expected = info.num_frames * (sample_rate or info.sample_rate) / info.sample_rate
    if abs(num_samples - expected) > LENGTH_TOLERANCE:
        raise BadClip(f"{num_samples} samples decoded, {expected:.0f} announced")


def check_decoded(waveform: np.ndarray, info: AudioInfo, sample_rate: int | None = None) -> None:
    """Check a decoded clip; silence is fine.

    Args:
        waveform: (S,) or (S, channels) float.
        info: what `probe` said.
        sample_rate: Hz of the waveform; None: the file's own.

    Raises:
        BadClip: a wrong length, NaN, infinite, or beyond `MAX_AMPLITUDE`.
    """
    check_decoded_length(len(waveform), info, sample_rate)
    peak = float(max(waveform.max(), -waveform.min()))  # NaN if any sample is
    if not peak <= MAX_AMPLITUDE:
        raise BadClip("NaN or infinite samples" if not np.isfinite(peak) else f"samples of up to {peak:.0e}, not audio")


def _parser(data: Sliceable):
    """The function for this file's format, told by its first bytes and never by its name."""
    head = bytes(data[:16])
    if head[:4] in (b"RIFF", b"RF64") and head[8:12] == b"WAVE":
        return probe_wav
    if head[:4] == b"FORM" and head[8:12] in (b"AIFF", b"AIFC"):
        return probe_aiff
    if head[:4] == b"OggS":
        return probe_ogg
    if head[:4] == b"fLaC":
        return probe_flac
    if head[:3] == b"ID3" and len(head) >= 10:
        # Some programs put an MP3 tag before FLAC; its size is in four bytes of seven bits.
        start = 10 + sum((byte & 0x7F) << shift for byte, shift in zip(head[6:10], (21, 14, 7, 0), strict=True))
        if data[start : start + 4] == b"fLaC":
            return lambda view: probe_flac(view, start)
    raise BadClip(_what_is_it(data))


def _what_is_it(data: Sliceable) -> str:
    """Name of what is not one of our formats."""
    if not len(data):
        return "empty file"
    head = bytes(data[:512])
    for magic, name in NOT_READ_DIRECTLY.items():
        if head.startswith(magic):
            return f"{name}, which is not read directly: run `fastsskd pack` first"
    if head[4:8] == b"ftyp":
        return "MP4 or M4A, which is not read directly: run `fastsskd pack` first"
    for magic, name in NOT_AUDIO.items():
        if head.startswith(magic):
            return f"not audio but {name}"
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n")
    if text[:9].lower() in (b"<!doctype", b"<html>") or text[:5].lower() in (b"<html", b"<?xml"):
        return "not audio but a web page"
    if not head.strip(b"\0"):
        return "not audio but zeros"
    if all(byte >= 32 or byte in b"\t\r\n\f" for byte in head):
        return "not audio but text" if len(data) > 4 else "truncated: its header is cut short"
    return f"unknown header {head[:8].hex(' ')}"
