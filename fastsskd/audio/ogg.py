"""Ogg pages: Vorbis, Opus and FLAC inside Ogg.

An Ogg stream carries its own proof: every page has a checksum and a number, and the last one is flagged. The decoder
does not look at the end of it: a cut file, or one whose last page is damaged, decodes to a shorter clip without an
error. So every page is checked. That reads the whole file, at about a hundredth of the time that decoding it takes.
"""

import struct
import zlib
from dataclasses import dataclass, replace

from fastsskd.audio.flac import STREAMINFO_SIZE, parse_streaminfo
from fastsskd.audio.info import AudioInfo, BadClip, believable

BEGINS, ENDS = 0x02, 0x04
NO_PACKET_ENDS = -1
OPUS_RATE, OPUS_LONGEST_PACKET = 48_000, 5_760
# Ogg's checksum is the usual CRC-32 with bits in the other order: reversing the bits of each byte lets zlib compute it.
REVERSED_BITS = bytes(int(f"{value:08b}"[::-1], 2) for value in range(256))


@dataclass
class _Stream:
    """One logical stream while its pages go by. Positions and lengths are in samples."""

    info: AudioInfo
    pre_skip: int
    longest_packet: int
    sequence: int = 0
    position: int = 0
    starts_at_zero: bool = True
    ended: bool = False

    def add(self, flags: int, position: int, sequence: int, num_packets: int) -> None:
        if sequence != self.sequence + 1:
            raise BadClip(f"damaged: Ogg page {self.sequence + 1} is missing")
        self.sequence = sequence
        self.ended = bool(flags & ENDS)
        if position == NO_PACKET_ENDS:
            return
        if position < self.position:
            raise BadClip("header lies: the Ogg stream's positions run backwards")
        if self.position == 0 and position > num_packets * self.longest_packet:
            self.starts_at_zero = False  # cut out of a longer stream: positions are not lengths
        self.position = position


def probe_ogg(data: memoryview) -> AudioInfo:
    """Check every page of an Ogg file.

    Raises:
        BadClip: cut anywhere, a damaged or missing page, several streams, or not Vorbis, Opus or FLAC.
    """
    flags, _, serial, sequence, _, body, at = _page(data, 0)
    if not flags & BEGINS:
        raise BadClip("damaged: the Ogg stream's beginning is missing")
    stream = _identify(bytes(data[body:at]))
    stream.sequence = sequence
    while at < len(data):
        if data[at : at + 4] != b"OggS":
            if stream.ended:
                break  # a tag or padding after the end
            raise BadClip(f"damaged: no Ogg page at byte {at}")
        flags, position, page_serial, sequence, lacing, _, at = _page(data, at)
        if page_serial != serial or flags & BEGINS:
            raise BadClip("several Ogg streams in one file, of which only one would be read: run `fastsskd pack` first")
        stream.add(flags, position, sequence, len(lacing) - lacing.count(255))
    if not stream.ended:
        raise BadClip("truncated: the Ogg stream does not reach its end")
    length = max(0, stream.position - stream.pre_skip) if stream.starts_at_zero else None
    return believable(replace(stream.info, num_frames=length))


def _page(data: memoryview, at: int) -> tuple[int, int, int, int, bytes, int, int]:
    """Flags, position, stream, number, lacing values, start of the body and end of the page that starts here."""
    if at + 27 > len(data):
        raise BadClip("truncated: an Ogg page is cut short")
    flags, position, serial, sequence, checksum, count = struct.unpack_from("<BqIIIB", data, at + 5)
    body = at + 27 + count
    lacing = bytes(data[at + 27 : body])
    end = body + sum(lacing)
    if end > len(data) or len(lacing) < count:
        raise BadClip("truncated: an Ogg page is cut short")
    page = bytearray(data[at:end])
    page[22:26] = bytes(4)
    if _crc(page) != checksum:
        raise BadClip(f"damaged: wrong checksum in the Ogg page at byte {at}")
    return flags, position, serial, sequence, lacing, body, end


def _crc(page: bytearray) -> int:
    # zlib starts from all ones and inverts the result; Ogg starts from zero and does not.
    reversed_crc = zlib.crc32(page.translate(REVERSED_BITS), 0xFFFFFFFF) ^ 0xFFFFFFFF
    return int.from_bytes(reversed_crc.to_bytes(4, "little").translate(REVERSED_BITS), "big")


def _identify(packet: bytes) -> _Stream:
    """Which codec a stream's first packet announces."""
    if packet[:7] == b"\x01vorbis" and len(packet) >= 30:
        channels, rate = struct.unpack_from("<BI", packet, 11)
        # A packet gives at most half of the longer of the two window lengths; a whole one is a safe bound.
        return _Stream(AudioInfo("vorbis", rate, channels, None), 0, 1 << (packet[28] >> 4))
    if packet[:8] == b"OpusHead" and len(packet) >= 19:
        channels, pre_skip = struct.unpack_from("<BH", packet, 9)
        return _Stream(AudioInfo("opus", OPUS_RATE, channels, None), pre_skip, OPUS_LONGEST_PACKET)
    if packet[:5] == b"\x7fFLAC" and packet[9:13] == b"fLaC":
        stream = parse_streaminfo(packet[17 : 17 + STREAMINFO_SIZE])
        info, most = AudioInfo("ogg-flac", stream.info.sample_rate, stream.info.channels, None), stream.block_size
        return _Stream(info, 0, most or 65535)
    raise BadClip(f"Ogg with an unknown codec ({packet[:8]!r})")
