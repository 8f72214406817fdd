"""FLAC headers: the stream's, those of its first and last frame, and those in between when a part is wanted.

The decoder reports a FLAC file that is cut or damaged, but not one whose header announces too few samples or another
sampling rate. Each frame's header repeats the rate and counts from the start, so the first and the last one tell.
"""

from dataclasses import dataclass, replace

from fastsskd.audio.info import AudioInfo, BadClip, Sliceable, believable

STREAMINFO_SIZE = 34
TAIL_SLACK = 4096
"""Bytes of tags after the last frame that are looked past."""
MAX_FRAME = 1 << 18
"""Bytes searched for a frame where the header does not give the largest frame's size."""
CLOSE_ENOUGH = 1 << 16
"""Bytes before a wanted frame that are read and decoded rather than searched."""
RATES = (0, 88200, 176400, 192000, 8000, 16000, 22050, 24000, 32000, 44100, 48000, 96000)
BLOCK_SIZES = (0, 192, 576, 1152, 2304, 4608, 0, 0, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768)


@dataclass(frozen=True, slots=True)
class FlacStream:
    """What decoding needs to know of a FLAC stream.

    Attributes:
        info: the header's claims, checked against the first and the last frame.
        first_frame: its place in the file.
        sample_bits: bits a sample.
        block_size: samples of the largest frame.
        is_even: whether all frames but the last have that size.
        largest_frame: bytes of the largest frame, or as many as one is searched in.
        head: the first bytes of the first frame.
    """

    info: AudioInfo
    first_frame: int
    sample_bits: int
    block_size: int
    is_even: bool
    largest_frame: int
    head: bytes = b""


def probe_flac(data: Sliceable, start: int = 0) -> AudioInfo:
    """Check a FLAC stream that begins at byte `start`.

    Raises:
        BadClip: truncated, a header without a length, or one that its frames contradict.
    """
    return flac_stream(data, start).info


def flac_stream(data: Sliceable, start: int = 0) -> FlacStream:
    """As `probe_flac`; reads only the beginning and the end of the file."""
    stream = parse_streaminfo(data[start + 8 : start + 8 + STREAMINFO_SIZE])
    first = start + 4
    while True:
        block = data[first : first + 4]
        if len(block) < 4:
            raise BadClip("truncated: the FLAC file ends before its first frame")
        first += 4 + int.from_bytes(block[1:4], "big")
        if block[0] & 0x80:
            break
    head = bytes(data[first : first + 16])
    header = _frame_header(head, 0)
    if header is None:
        raise BadClip("truncated: no sound follows the FLAC header" if first >= len(data) else "damaged first frame")
    rate = header[0]
    if rate and rate != stream.info.sample_rate:
        raise BadClip(f"header lies: {stream.info.sample_rate} Hz announced, its frames have {rate} Hz")
    _refuse_other_end(bytes(data[max(first, len(data) - stream.largest_frame - TAIL_SLACK) : len(data)]), stream)
    return replace(stream, first_frame=first, head=head)


def parse_streaminfo(block: bytes | memoryview) -> FlacStream:
    """What STREAMINFO says; the place of the first frame is not in it."""
    if len(block) < STREAMINFO_SIZE:
        raise BadClip("truncated: the FLAC header is cut short")
    smallest, largest = int.from_bytes(block[0:2], "big"), int.from_bytes(block[2:4], "big")
    packed = int.from_bytes(block[10:18], "big")  # 20 bits rate, 3 channels - 1, 5 bits - 1, 36 length
    num_frames = packed & ((1 << 36) - 1)
    if not num_frames:
        raise BadClip("FLAC without a length (written into a pipe), which the decoder refuses")
    info = believable(AudioInfo("flac", packed >> 44, (packed >> 41 & 7) + 1, num_frames))
    largest_frame = int.from_bytes(block[7:10], "big") or MAX_FRAME
    return FlacStream(info, 0, (packed >> 36 & 31) + 1, largest, smallest == largest, largest_frame)


def flac_extent(data: Sliceable, stream: FlacStream, begin: int, end: int) -> tuple[int, int]:
    """Bytes of the file that hold the frames of samples `begin` ... `end`, and a few more."""
    first, _ = _near(data, stream, begin)
    if end > stream.info.num_frames - stream.block_size:
        return first, len(data)
    _, last = _near(data, stream, end - 1)
    return first, min(last + stream.largest_frame, len(data))


def _near(data: Sliceable, stream: FlacStream, sample: int) -> tuple[int, int]:
    """Two places not far from each other: a frame there begins at `sample` or before; none from there on does.

    Sound that looks like a frame's header is no danger: frames that do not follow each other are not decoded.
    """
    low, high = stream.first_frame, len(data)
    while high - low > CLOSE_ENOUGH:
        middle = (low + high) // 2
        found = _next_frame(bytes(data[middle : min(middle + stream.largest_frame + 16, high)]), stream)
        if found is not None and found[1] <= sample:
            low = middle + found[0]
        else:
            high = middle
    return low, high


def _next_frame(data: bytes, stream: FlacStream) -> tuple[int, int] | None:
    """Place and first sample of the first frame that begins in `data`."""
    alike = stream.head[:3] if stream.is_even else stream.head[:2]  # the last frame's size may be another; never mind
    at = -1
    while (at := data.find(alike, at + 1)) >= 0:
        header = _frame_header(data, at)
        if header is not None:
            return at, header[2] if header[1] else header[2] * stream.block_size
    return None


def _refuse_other_end(tail: bytes, stream: FlacStream) -> None:
    """Hold the last frame's place against the announced length.

    Two bytes of sound can look like a frame's start, and once in 256 the check byte then fits too. So any start that
    agrees with the length settles it, and only starts that all disagree are held against the clip.
    """
    num_frames = stream.info.num_frames
    at, furthest = len(tail), None
    while (at := tail.rfind(b"\xff", 0, at)) >= 0:
        header = _frame_header(tail, at)
        if header is None:
            continue
        _, is_variable, number, samples = header
        if not (is_variable or stream.is_even):
            return  # numbered in frames of a size that we do not know
        end = (number if is_variable else number * stream.block_size) + samples
        if end == num_frames:
            return
        furthest = end if furthest is None else furthest
    if furthest is not None:
        kind = "truncated" if furthest < num_frames else "header lies"
        raise BadClip(f"{kind}: {num_frames} samples announced, its last whole frame ends at {furthest}")


def _frame_header(data: bytes, at: int) -> tuple[int, bool, int, int] | None:
    """Rate (0 = as the stream's), whether numbered by samples, number, and samples of the frame that starts here.

    None where no frame starts here.
    """
    head = data[at : at + 16]
    if len(head) < 6 or head[0] != 0xFF or head[1] & 0xFE != 0xF8 or head[3] & 1 or head[3] >> 4 > 10:
        return None
    size_code, rate_code = head[2] >> 4, head[2] & 15
    extra = (1 if size_code == 6 else 2 if size_code == 7 else 0, 1 if rate_code == 12 else 2 * (rate_code in (13, 14)))
    number_end = 4 + _number_bytes(head[4])
    end = number_end + sum(extra)
    if size_code == 0 or rate_code == 15 or number_end == 4 or len(head) <= end or _crc8(head[:end]) != head[end]:
        return None
    number = head[4] & (0x7F if number_end == 5 else 0x7F >> (number_end - 4))
    for byte in head[5:number_end]:
        number = number << 6 | byte & 0x3F
    size_bytes = head[number_end : number_end + extra[0]]
    rate_bytes = int.from_bytes(head[number_end + extra[0] : end], "big")
    samples = int.from_bytes(size_bytes, "big") + 1 if size_bytes else BLOCK_SIZES[size_code]
    rate = RATES[rate_code] if rate_code < 12 else rate_bytes * {12: 1000, 13: 1, 14: 10}[rate_code]
    return rate, bool(head[1] & 1), number, samples


def _number_bytes(first: int) -> int:
    """Bytes of a frame's number, coded as in UTF-8 but up to seven; 0 = not a first byte."""
    if first < 0x80:
        return 1
    ones = 8 - (first ^ 0xFF).bit_length()
    return ones if 2 <= ones <= 7 else 0


def _crc8(data: bytes) -> int:
    value = 0
    for byte in data:
        value = _CRC8[value ^ byte]
    return value


def _crc8_table() -> bytes:
    table = bytearray()
    for value in range(256):
        for _ in range(8):
            value = (value << 1 ^ (0x07 if value & 0x80 else 0)) & 0xFF
        table.append(value)
    return bytes(table)


_CRC8 = _crc8_table()
