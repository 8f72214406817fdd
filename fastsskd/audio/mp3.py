"""MPEG audio frames: MP3, and layers I and II.

An MP3 file is one frame after the other, each with its length in its header, between tags of other programs. The
decoder looks for the next frame wherever one does not follow, and does not mind an end that comes too early: a file
with a hole, or half of a file, decodes to a shorter clip without an error. So every frame's header is looked at here,
and their number is held against what the encoder wrote into the first one (Xing, Info). Changed bytes inside a frame
are not found: nothing in the file tells. Takes about 1 ms for a minute.
"""

import functools
import struct

from fastsskd.audio.info import AudioInfo, BadClip, believable

# kbit/s by the header's four bits, for (MPEG-1?, layer).
_LOW_RATES = (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160)
BIT_RATES = {
    (True, 1): tuple(range(32, 449, 32)),
    (True, 2): (32, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384),
    (True, 3): (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    (False, 1): (32, 48, 56, 64, 80, 96, 112, 128, 144, 160, 176, 192, 224, 256),
    (False, 2): _LOW_RATES,
    (False, 3): _LOW_RATES,
}
RATES = (44_100, 48_000, 32_000)
"""Hz in MPEG-1; half of it in MPEG-2, a quarter in MPEG-2.5."""
TAGS = (b"TAG", b"APETAGEX", b"LYRICSBEGIN", b"ID3", b"3DI")
"""What other programs write behind the last frame."""
JUNK, SLACK = 128, 4096
"""Bytes that are passed over: fewer than `JUNK` of anything, or `SLACK` zeros, behind the last frame (more zeros are
what a stopped download has left); fewer than `SLACK` between a tag and the first frame."""
ENCODER_DELAY = 21
"""Bytes from the encoder's name to the samples that it added in front and behind, 12 bits each."""


def find_mpeg_audio(data: memoryview) -> int | None:
    """First byte of the first MPEG frame of an MP3 file, None if it is none; behind a tag there may be padding."""
    start = _skip_id3(data, 0)
    places = range(start, start + SLACK) if start else (0,)
    return next((at for at in places if _is_mpeg_audio(data, at)), None)


def probe_mp3(data: memoryview, start: int) -> tuple[AudioInfo, int]:
    """Follow the frames from the first, at byte `start`, to the last.

    Returns:
        Rate, channels, and samples per channel as the decoder gives them: without what the encoder has added; and the
        first byte behind the last frame.

    Raises:
        BadClip: cut, damaged, or another number of frames than announced.
    """
    _, rate, samples = _frame(data, start)
    channels = 1 if data[start + 3] >> 6 == 3 else 2
    announced, added = _encoder_info(data, start, channels)
    at, count, cut = _follow(data, start)
    if announced is not None:
        count -= 1  # the first frame announces and holds no sound
        if count > announced + 1:
            raise BadClip(f"header lies: {announced} MPEG frames announced, {count} there")
        # Some programs count the first frame too: one too few is fine, unless there is a beginning of that one.
        if count < announced - (not cut):
            kind = "truncated" if cut else "damaged"
            raise BadClip(f"{kind}: {count} of {announced} MPEG frames, and none whole at byte {at}")
    elif cut:
        raise BadClip(f"truncated: the MPEG frame at byte {at} is cut short")
    elif not _is_tag(data[at:]):
        raise BadClip(f"damaged: no MPEG frame at byte {at}")
    behind = _skip_id3(data, at)
    if behind > at and _is_mpeg_audio(data, behind):
        raise BadClip(f"several MP3 files in one, the second at byte {at}: split it")
    return believable(AudioInfo("mp3", rate, channels, max(0, count * samples - added))), at


def _skip_id3(data: memoryview, at: int) -> int:
    """First byte behind the ID3v2 tags that begin at byte `at`, if there are any."""
    while data[at : at + 3] == b"ID3" and len(data) >= at + 10:
        # Four bytes of seven bits, and ten more if there is a footer.
        size = sum((byte & 0x7F) << shift for byte, shift in zip(data[at + 6 : at + 10], (21, 14, 7, 0), strict=True))
        at += 10 + size + (10 if data[at + 5] & 0x10 else 0)
    return at


def _is_mpeg_audio(data: memoryview, start: int) -> bool:
    """Whether an MPEG frame lies at byte `start`, with another one (or the file's end) behind it."""
    frame = _frame(data, start)
    if frame is None:
        return False
    following = start + frame[0]
    return following + 4 > len(data) or (_frame(data, following) or ())[1:] == frame[1:]


def _follow(data: memoryview, at: int) -> tuple[int, int, bool]:
    """End of the last whole frame of those from byte `at` on, their number, and whether a part of one follows."""
    kind, count = _frame(data, at)[1:], 0
    while (frame := _frame(data, at)) is not None and frame[1:] == kind:
        if at + frame[0] > len(data):
            return at, count, True
        at, count = at + frame[0], count + 1
    return at, count, False


def _is_tag(rest: memoryview) -> bool:
    """Whether what follows the last frame can be something else than sound."""
    if bytes(rest[:16]).startswith(TAGS):
        return True
    return len(rest) < JUNK or (len(rest) < SLACK and not bytes(rest).strip(b"\0"))


def _encoder_info(data: memoryview, start: int, channels: int) -> tuple[int | None, int]:
    """Number of frames that the first one announces, None = it does not; samples that the encoder added to the clip."""
    is_mpeg1 = data[start + 1] >> 3 & 3 == 3
    at = start + 4 + {(True, 1): 17, (True, 2): 32, (False, 1): 9, (False, 2): 17}[is_mpeg1, channels]
    if bytes(data[at : at + 4]) not in (b"Xing", b"Info") or len(data) < at + 12:
        return None, 0
    flags, announced = struct.unpack_from(">II", data, at + 4)
    if not flags & 1:
        return None, 0
    at += 8 + 4 * (flags & 1) + 2 * (flags & 2) + 25 * (flags & 4) + (flags & 8) // 2
    if not bytes(data[at : at + 4]).isalpha():  # the encoder's name: LAME, Lavf, Lavc
        return announced, 0
    added = int.from_bytes(data[at + ENCODER_DELAY : at + ENCODER_DELAY + 3], "big")
    return announced, (added >> 12) + (added & 0xFFF)


def _frame(data: memoryview, at: int) -> tuple[int, int, int] | None:
    """Bytes, rate (Hz) and samples of the frame that starts here; None where none does."""
    if at + 4 > len(data) or data[at] != 0xFF:
        return None
    return _parse_header(data[at + 1], data[at + 2])


@functools.cache
def _parse_header(first: int, second: int) -> tuple[int, int, int] | None:
    """The same, from the two bytes that tell."""
    version, layer = first >> 3 & 3, 4 - (first >> 1 & 3)  # version 0 = 2.5, 2 = 2, 3 = 1
    bit_rate, rate = second >> 4, second >> 2 & 3
    if first < 0xE0 or version == 1 or layer == 4 or bit_rate in (0, 15) or rate == 3:
        return None
    kilobits = BIT_RATES[version == 3, layer][bit_rate - 1]
    rate = RATES[rate] >> {3: 0, 2: 1, 0: 2}[version]
    samples = 384 if layer == 1 else 576 if layer == 3 and version != 3 else 1152
    slot = 4 if layer == 1 else 1  # layer I counts in fours
    return (samples // 8 // slot * kilobits * 1000 // rate + (second >> 1 & 1)) * slot, rate, samples
