"""FLAC headers: the stream's, and those of its first and last frame.

The decoder reports a FLAC file that is cut or damaged, but not one whose header announces too few samples or another
sampling rate. Each frame's header repeats the rate and counts from the start, so the first and the last one tell.
"""

from fastsskd.audio_info import AudioInfo, BadClip, believable

STREAMINFO_SIZE = 34
TAIL_SLACK = 4096
"""Bytes of tags after the last frame that are looked past."""
MAX_FRAME = 1 << 18
"""Bytes searched for the last frame where the header does not give the largest frame's size."""
RATES = (0, 88200, 176400, 192000, 8000, 16000, 22050, 24000, 32000, 44100, 48000, 96000)
BLOCK_SIZES = (0, 192, 576, 1152, 2304, 4608, 0, 0, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768)


def probe_flac(data: memoryview, start: int = 0) -> AudioInfo:
    """Check a FLAC stream that begins at byte `start`.

    Raises:
        BadClip: truncated, a header without a length, or one that its frames contradict.
    """
    info, block_size, largest_frame = parse_streaminfo(data[start + 8 : start + 8 + STREAMINFO_SIZE])
    first = start + 4
    while True:
        if first + 4 > len(data):
            raise BadClip("truncated: the FLAC file ends before its first frame")
        is_last, size = data[first] & 0x80, int.from_bytes(data[first + 1 : first + 4], "big")
        first += 4 + size
        if is_last:
            break
    header = _frame_header(bytes(data[first : first + 16]), 0)
    if header is None:
        raise BadClip("truncated: no sound follows the FLAC header" if first >= len(data) else "damaged first frame")
    rate = header[0]
    if rate and rate != info.sample_rate:
        raise BadClip(f"header lies: {info.sample_rate} Hz announced, its frames have {rate} Hz")
    _refuse_other_end(data[first:], info.num_frames, block_size, largest_frame or MAX_FRAME)
    return info


def parse_streaminfo(block: memoryview) -> tuple[AudioInfo, int, int]:
    """Header, samples per frame (0 = it varies) and bytes of the largest frame (0 = unknown) from STREAMINFO."""
    if len(block) < STREAMINFO_SIZE:
        raise BadClip("truncated: the FLAC header is cut short")
    smallest, largest = int.from_bytes(block[0:2], "big"), int.from_bytes(block[2:4], "big")
    packed = int.from_bytes(block[10:18], "big")  # 20 bits rate, 3 channels - 1, 5 bits - 1, 36 length
    num_frames = packed & ((1 << 36) - 1)
    if not num_frames:
        raise BadClip("FLAC without a length (written into a pipe), which the decoder refuses")
    info = believable(AudioInfo("flac", packed >> 44, (packed >> 41 & 7) + 1, num_frames))
    return info, largest if smallest == largest else 0, int.from_bytes(block[7:10], "big")


def _refuse_other_end(frames: memoryview, num_frames: int, block_size: int, largest_frame: int) -> None:
    """Hold the last frame's place against the announced length.

    Two bytes of sound can look like a frame's start, and once in 256 the check byte then fits too. So any start that
    agrees with the length settles it, and only starts that all disagree are held against the clip.
    """
    tail = bytes(frames[max(0, len(frames) - largest_frame - TAIL_SLACK) :])
    at, furthest = len(tail), None
    while (at := tail.rfind(b"\xff", 0, at)) >= 0:
        header = _frame_header(tail, at)
        if header is None:
            continue
        _, is_variable, number, samples = header
        if not is_variable and not block_size:
            return  # numbered in frames of a size that we do not know
        end = (number if is_variable else number * block_size) + samples
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
