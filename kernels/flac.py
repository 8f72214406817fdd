"""FLAC frames -> mono samples.

libFLAC, which every loader's decoder comes down to, takes twice as long: the loader spends most of its time there. What
this one does not take (32 bits a sample, a damaged stream) a decoder that reports what is wrong should see.
"""

import numpy as np

from fastsskd_kernels import flac_cpu

REASONS = {
    flac_cpu.NO_FRAME: "no frame begins where one should",
    flac_cpu.OTHER_KIND: "a frame of another kind than the header announces",
    flac_cpu.GAP: "frames are missing",
    flac_cpu.BAD_CODE: "a code that nothing stands for",
    flac_cpu.BAD_CHECKSUM: "a frame's checksum does not fit",
    flac_cpu.CUT: "ends inside a frame",
}
MAX_BITS = 24
FLAC_PADDING = flac_cpu.PADDING


def decode_flac(
    data: np.ndarray, *, channels: int, sample_bits: int, block_size: int, begin: int, end: int
) -> np.ndarray:
    """Decode part of a FLAC stream; the mean of its channels.

    Every frame's checksum is checked. Runs without the GIL.

    Args:
        data: (N + FLAC_PADDING,) uint8 from the first byte of a frame on: the one that holds sample ``begin``, or an
            earlier one. The last ``FLAC_PADDING`` bytes may be anything; they are not part of the stream.
        channels: 1 ... 8, as STREAMINFO says.
        sample_bits: bits a sample, 4 ... 24, as STREAMINFO says.
        block_size: samples of the largest frame, as STREAMINFO says.
        begin, end: samples of the stream that are wanted, ``begin < end``.

    Returns:
        (end - begin,) int16 full scale where that holds it, else float32 in [-1, 1).

    Raises:
        ValueError: damaged, cut, or of a kind that is not read here.
    """
    if not (1 <= channels <= 8 and 4 <= sample_bits <= MAX_BITS and 1 <= block_size <= 65535 and 0 <= begin < end):
        raise ValueError(
            f"FLAC of {channels} channels, {sample_bits} bits, {block_size} samples a frame is not read here"
        )
    if data.ndim != 1 or data.dtype != np.uint8 or data.size < FLAC_PADDING or not data.flags.c_contiguous:
        raise ValueError(
            f"data: expected contiguous uint8 with {FLAC_PADDING} more bytes, got {data.dtype} {data.shape}"
        )
    if channels == 1 and sample_bits <= 16:
        out, scale = np.empty(end - begin, np.int16), 1 << 16 - sample_bits
    else:
        out, scale = np.empty(end - begin, np.float32), np.float32(1.0 / (channels << sample_bits - 1))
    found = flac_cpu.decode_frames(data, channels, sample_bits, block_size, begin, end, scale, out)
    if found < 0:
        raise ValueError(REASONS[found])
    return out
