"""Headers of the two chunked formats: WAV (RIFF, RF64) and AIFF / AIFF-C.

Both are a form of named chunks, each with its size. The decoder believes whatever is there: a file cut anywhere, or one
whose data chunk claims too little, decodes without an error. So sizes are held against each other and the file's end.

Only the chunks' headers are looked at, by slices, so the file need not be in memory: ``clip_bytes.ClipBytes`` will do.
"""

import struct
from collections.abc import Iterator

from fastsskd.audio.info import MAX_RATE, AudioInfo, BadClip, Sliceable, believable

# Bits per sample come from the header for these; bytes per sample are fixed for the others.
PCM, FLOAT, ALAW, MULAW, EXTENSIBLE = 1, 3, 6, 7, 0xFFFE
BLOCK_CODED = {2: "MS ADPCM", 0x11: "IMA ADPCM", 0x31: "GSM 6.10"}
SAMPLE_TYPES = {(PCM, 16): "<i2", (FLOAT, 32): "<f4"}
_USUAL = struct.Struct("<4sI4s4sIHHIIHH4sI")
UNKNOWN_SIZES = (range(0x7FFFF000 - 1024, 0x80000000), range(0xFFFFFFFF, 0x100000000))
"""Programs that write WAV into a pipe cannot know its length; these stand for it (SoX; FFmpeg: all ones)."""
TAIL_SLACK = 4096
"""Bytes after the last chunk that are taken for a tag or padding."""
AIFC_BYTES = {b"NONE": 0, b"twos": 0, b"sowt": 0, b"raw ": 0, b"fl32": 4, b"FL32": 4, b"fl64": 8, b"FL64": 8}
AIFC_BYTES |= {b"in24": 3, b"in32": 4, b"ulaw": 1, b"ULAW": 1, b"alaw": 1, b"ALAW": 1}


def probe_wav(data: Sliceable) -> AudioInfo:
    """Check a WAV file: PCM, float, A-law, mu-law and block-coded; RIFF, RF64 and the extensible header.

    Raises:
        BadClip: truncated, no samples, or a header that contradicts itself or the file.
    """
    usual = _usual_wav(data)
    if usual is not None:
        return usual
    is_rf64 = data[:4] == b"RF64"
    form_end = 8 + struct.unpack("<I", data[4:8])[0]
    fmt, data_start, data_size, rf64_size = None, 0, None, None
    end_of_chunks = 12
    for name, start, size in _chunks(data, "<"):
        if name == b"ds64" and is_rf64:
            if size < 16 or start + size > len(data):
                raise BadClip("truncated: the RF64 header is cut short")
            riff_size, rf64_size = struct.unpack("<QQ", data[start : start + 16])
            form_end = 8 + riff_size
        elif name == b"fmt ":
            fmt = _wav_format(data[start : start + size])
        elif name == b"data" and data_size is None:
            if fmt is None:
                raise BadClip("WAV header without a format before its data")
            if rf64_size is not None and size == 0xFFFFFFFF:
                size = rf64_size
            elif start + size > len(data) and any(size in unknown for unknown in UNKNOWN_SIZES):
                size = len(data) - start
                form_end = len(data)
            _refuse_cut(start + size, len(data))
            data_start, data_size = start, size
        elif start + size > len(data):
            break
        end_of_chunks = start + size + size % 2
    if fmt is None or data_size is None:
        raise BadClip("truncated: the WAV header ends before any data")
    _refuse_lie(end_of_chunks, form_end, len(data), data_size)
    rate, channels, frame_bytes, sample_type = fmt
    num_frames = data_size // frame_bytes if frame_bytes else None
    if not data_size:
        raise BadClip("no samples in it")
    return believable(AudioInfo("wav", rate, channels, num_frames, sample_type, data_start if sample_type else 0))


def _usual_wav(data: Sliceable) -> AudioInfo | None:
    """The header that nearly all 16-bit files have, if this is one and all its sizes agree: 44 bytes, nothing else."""
    if len(data) < _USUAL.size:
        return None
    head = _USUAL.unpack(data[: _USUAL.size])
    riff, riff_size, wave, fmt, fmt_size, tag, channels, rate, _, frame_bytes, bits, name, size = head
    is_usual = (riff, wave, fmt, fmt_size, tag, bits, name) == (b"RIFF", b"WAVE", b"fmt ", 16, PCM, 16, b"data")
    agrees = riff_size == len(data) - 8 and size == len(data) - _USUAL.size and frame_bytes == 2 * channels
    if not (is_usual and agrees and size and channels and size % frame_bytes == 0):
        return None
    return believable(AudioInfo("wav", rate, channels, size // frame_bytes, "<i2", _USUAL.size))


def _wav_format(chunk: bytes | memoryview) -> tuple[int, int, int, str]:
    """Rate, channels, bytes of one sample of all channels (0 = block-coded), sample type from a ``fmt`` chunk."""
    if len(chunk) < 16:
        raise BadClip("truncated: the WAV format is cut short")
    tag, channels, rate, _, frame_bytes, bits = struct.unpack_from("<HHIIHH", chunk)
    if tag == EXTENSIBLE and len(chunk) >= 26:
        (tag,) = struct.unpack_from("<H", chunk, 24)
    if tag in BLOCK_CODED:
        return rate, channels, 0, ""
    if tag not in (PCM, FLOAT, ALAW, MULAW):
        raise BadClip(f"WAV with codec 0x{tag:04x}, which is not read directly")
    believable(AudioInfo("wav", rate, channels, None))
    if not 8 <= bits <= 64 or frame_bytes % channels or frame_bytes // channels < (bits + 7) // 8:
        raise BadClip(f"header contradicts itself: {channels} channels of {bits} bits in {frame_bytes} bytes")
    sample_type = SAMPLE_TYPES.get((tag, bits), "") if frame_bytes * 8 == channels * bits else ""
    return rate, channels, frame_bytes, sample_type


def probe_aiff(data: Sliceable) -> AudioInfo:
    """Check an AIFF or AIFF-C file.

    Raises:
        BadClip: truncated, no samples, or a header that contradicts itself or the file.
    """
    form_end = 8 + struct.unpack(">I", data[4:8])[0]
    comm, sound_size = None, None
    end_of_chunks = 12
    for name, start, size in _chunks(data, ">"):
        if name == b"COMM":
            comm = _aiff_format(data[start : start + size], is_aifc=data[8:12] == b"AIFC")
        elif name == b"SSND":
            _refuse_cut(start + size, len(data))
            offset = struct.unpack(">I", data[start : start + 4])[0] if size >= 8 else 0
            sound_size = size - 8 - offset
        elif start + size > len(data):
            break
        end_of_chunks = start + size + size % 2
    if comm is None or sound_size is None:
        raise BadClip("truncated: the AIFF header ends before any data")
    _refuse_lie(end_of_chunks, form_end, len(data), sound_size)
    rate, channels, frame_bytes, num_frames = comm
    if sound_size <= 0:
        raise BadClip("no samples in it")
    if frame_bytes and abs(num_frames - sound_size // frame_bytes) > 1:
        raise BadClip(f"header lies: {num_frames} samples announced, {sound_size // frame_bytes} there")
    return believable(AudioInfo("aiff", rate, channels, num_frames if frame_bytes else None))


def _aiff_format(chunk: bytes | memoryview, is_aifc: bool) -> tuple[int, int, int, int]:
    """Rate, channels, bytes of one sample of all channels (0 = block-coded), samples from a ``COMM`` chunk."""
    if len(chunk) < (22 if is_aifc else 18):
        raise BadClip("truncated: the AIFF format is cut short")
    channels, num_frames, bits, exponent, mantissa = struct.unpack_from(">HIHHQ", chunk)
    # 80-bit float: exponent with bias 16383, 64-bit mantissa with its leading one written out.
    shift = 16383 + 63 - (exponent & 0x7FFF)
    rate = mantissa >> shift if 0 <= shift < 64 else MAX_RATE + 1
    believable(AudioInfo("aiff", rate, channels, None))
    codec = bytes(chunk[18:22]) if is_aifc else b"NONE"
    if codec not in AIFC_BYTES:
        return rate, channels, 0, num_frames
    if not 1 <= bits <= 64:
        raise BadClip(f"header contradicts itself: samples of {bits} bits")
    return rate, channels, channels * (AIFC_BYTES[codec] or (bits + 7) // 8), num_frames


def _chunks(data: Sliceable, endian: str) -> Iterator[tuple[bytes, int, int]]:
    """(name, start of the contents, size) of each chunk; chunks start at even bytes."""
    at = 12
    while at + 8 <= len(data):
        name, size = struct.unpack(f"{endian}4sI", data[at : at + 8])
        if not all(32 <= letter < 127 for letter in name):
            return
        yield name, at + 8, size
        at += 8 + size + size % 2


def _refuse_cut(claimed_end: int, file_end: int) -> None:
    if claimed_end > file_end:
        raise BadClip(f"truncated: {claimed_end - file_end} of {claimed_end} bytes are missing")


def _refuse_lie(end_of_chunks: int, form_end: int, file_end: int, data_size: int) -> None:
    """Bytes after the last chunk: fine when they are few, a header that lies when samples could hide there."""
    rest = file_end - end_of_chunks
    announced = min(form_end, file_end) - end_of_chunks
    if announced > 8 or rest > max(TAIL_SLACK, data_size // 10):
        raise BadClip(f"header lies: {rest} bytes follow the {data_size} bytes of samples it announces")
