"""FLAC frames -> samples, the compiled part of ``flac``; the format is RFC 9639.

Two chains of steps that cannot be shortened run side by side: reading the bits of a difference, which must know where
the last one ended, and predicting a sample, which must know the last one. Done one after the other, as decoders do,
each waits for itself; in one loop the processor works on both. For that the filter's past lies in registers, in a tuple
of 4, 8 or 12 numbers, the coefficients filled up with zeros.

Eight bytes follow the data, so that a word can begin at its last one. Every read stays inside the array, and whatever
the bytes are, decoding ends: with the samples or with one of the reasons below.
"""

import numpy as np

from fastsskd_kernels.compile import inlined, njit
from fastsskd_kernels.words import big_endian_word, dot, first_of, leading_zeros

NO_FRAME, OTHER_KIND, GAP, BAD_CODE, BAD_CHECKSUM, CUT = -1, -2, -3, -4, -5, -6
MAX_ORDER = 32
PADDING = 8
BLOCK_SIZES = np.array([0, 192, 576, 1152, 2304, 4608, 0, 0, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768])
SAMPLE_BITS = np.array([0, 8, 12, 0, 16, 20, 24, 32])
FIXED = np.array([[0, 0, 0, 0], [1, 0, 0, 0], [2, -1, 0, 0], [3, -3, 1, 0], [4, -6, 4, -1]])
"""Coefficients of the fixed predictors of order 0 ... 4, for the latest sample first."""
WORD_BITS = 57
"""Bits of a word of 64 that are there wherever in a byte it begins."""


def _crc16_tables() -> np.ndarray:
    """(8, 256) int64: what a byte adds to the checksum (polynomial 0x8005) when 0 ... 7 bytes follow it."""
    tables = np.zeros((8, 256), np.int64)
    values = np.arange(256) << 8
    for _ in range(8):
        values = np.where(values & 0x8000, values << 1 ^ 0x8005, values << 1) & 0xFFFF
    tables[0] = values
    for row in range(1, 8):
        tables[row] = (tables[row - 1] << 8 & 0xFFFF) ^ values[tables[row - 1] >> 8]
    return tables


CRC16 = _crc16_tables()


@njit
def decode_frames(data, channels, sample_bits, block_size, begin, end, scale, out):
    """Samples ``begin`` ... ``end`` of the stream, all channels added up and times ``scale``, into ``out``.

    ``data`` starts with the frame that holds ``begin`` or one before it, and ends with ``PADDING`` bytes of anything.
    ``block_size`` is that of all frames but the last where they are numbered by frames, the largest where they are
    numbered by samples. Returns ``end - begin``, or why it could not.
    """
    block = np.empty((channels, block_size), np.int32)
    coefficient, past = np.empty(MAX_ORDER, np.int64), np.empty(MAX_ORDER, np.int64)
    bit, position, size = 0, -1, data.size - PADDING
    while position < end:
        start = bit >> 3
        if start >= size:
            return CUT
        bit, by_samples, number, count, layout, bits = frame_header(data, bit)
        if bit < 0:
            return bit
        first = number if by_samples else number * block_size
        if first != position if position >= 0 else first > begin:
            return GAP
        position = first
        if (layout + 1 if layout < 8 else 2) != channels or (bits or sample_bits) != sample_bits or count > block_size:
            return OTHER_KIND
        for channel in range(channels):
            is_side = (
                (layout == 8 and channel == 1) or (layout == 9 and channel == 0) or (layout == 10 and channel == 1)
            )
            bit = subframe(data, bit, sample_bits + is_side, coefficient, past, block[channel, :count])
            if bit < 0:
                return bit
        bit = bit + 7 & ~7
        if (bit >> 3) + 2 > size:
            return CUT
        if crc16(data, start, bit >> 3) != read(data, bit, 16):
            return BAD_CHECKSUM
        bit += 16
        low, high = max(begin - position, 0), min(end - position, count)
        if low < high:
            mix(block[:, low:high], layout, scale, out[position + low - begin : position + high - begin])
        position += count
    return end - begin


@njit
def word_at(data, bit):
    """The 57 or more bits from ``bit`` on, at the top of a word; whatever lies there beyond the end."""
    word = big_endian_word(data, min(bit >> 3, data.size - PADDING))
    return word << np.uint64(bit & 7)


@njit
def read(data, bit, count):
    """An unsigned number of 1 ... 57 bits."""
    return np.int64(word_at(data, bit) >> np.uint64(64 - count))


@njit
def read_signed(data, bit, count):
    """A two's complement number of 1 ... 57 bits."""
    value = read(data, bit, count)
    return value - (value >> count - 1 << count)


@inlined
def frame_header(data, bit):
    """Bit after it, whether numbered by samples, number, samples, channel layout, bits a sample (0 = as the stream)."""
    nothing = (0, 0, 0, 0, 0)
    if read(data, bit, 15) != 0x7FFC:
        return (NO_FRAME, *nothing)
    by_samples, size_code, rate_code = read(data, bit + 15, 1), read(data, bit + 16, 4), read(data, bit + 20, 4)
    layout, bits_code = read(data, bit + 24, 4), read(data, bit + 28, 3)
    bit += 32
    # The number is coded as in UTF-8, in up to seven bytes.
    number, more = read(data, bit, 8), 0
    if number >= 0xC0:
        more = leading_zeros(~(np.uint64(number) << np.uint64(56))) - 1
        number &= 0x3F >> more
    bit += 8
    for _ in range(more):
        number = number << 6 | read(data, bit, 8) & 0x3F
        bit += 8
    size = BLOCK_SIZES[size_code]
    if size_code == 6 or size_code == 7:
        width = 8 if size_code == 6 else 16
        size = read(data, bit, width) + 1
        bit += width
    bit += 8 if rate_code == 12 else 16 if rate_code == 13 or rate_code == 14 else 0
    if layout > 10 or size == 0 or (bits_code and SAMPLE_BITS[bits_code] == 0):
        return (OTHER_KIND, *nothing)
    return bit + 8, by_samples, number, size, layout, SAMPLE_BITS[bits_code]  # 8 bits are the header's own checksum


@inlined
def subframe(data, bit, sample_bits, coefficient, past, out):
    """One channel of a frame; returns the bit after it, or why not."""
    kind, wasted = read(data, bit + 1, 6), read(data, bit + 7, 1)
    bit += 8
    if wasted:
        wasted = leading_zeros(word_at(data, bit)) + 1
        bit += wasted
        sample_bits -= wasted
        if sample_bits < 1:
            return BAD_CODE
    if kind == 0:
        out[:] = read_signed(data, bit, sample_bits)
        bit += sample_bits
    elif kind == 1:
        for i in range(out.size):
            out[i] = read_signed(data, bit, sample_bits)
            bit += sample_bits
    elif 8 <= kind <= 12 or kind >= 32:
        bit = predicted(data, bit, sample_bits, kind, coefficient, past, out)
        if bit < 0:
            return bit
    else:
        return OTHER_KIND
    if wasted:
        for i in range(out.size):
            out[i] <<= wasted
    return bit


@inlined
def predicted(data, bit, sample_bits, kind, coefficient, past, out):
    """A subframe of first samples, a filter and differences from what it predicts."""
    order, shift = (kind - 31 if kind >= 32 else kind - 8), 0
    if order > out.size:
        return BAD_CODE
    coefficient[:], past[:] = 0, 0
    for i in range(order):
        out[i] = past[order - 1 - i] = read_signed(data, bit, sample_bits)
        bit += sample_bits
    if kind >= 32:
        precision, shift = read(data, bit, 4) + 1, read_signed(data, bit + 4, 5)
        bit += 9
        if precision == 16 or shift < 0:
            return BAD_CODE
        for i in range(order):
            coefficient[i] = read_signed(data, bit, precision)
            bit += precision
    else:
        coefficient[:4] = FIXED[order]
    if order <= 4:
        return differences(data, bit, order, first_of(coefficient, 4), first_of(past, 4), shift, out)
    if order <= 8:
        return differences(data, bit, order, first_of(coefficient, 8), first_of(past, 8), shift, out)
    if order <= 12:
        return differences(data, bit, order, first_of(coefficient, 12), first_of(past, 12), shift, out)
    past[:] = 0  # longer than any encoder's filters: the differences first, then the filter
    bit = differences(data, bit, order, first_of(past, 4), first_of(past, 4), 0, out)
    for i in range(order, out.size):
        total = 0
        for j in range(order):
            total += coefficient[j] * out[i - 1 - j]
        out[i] += total >> shift
    return bit


@njit
def differences(data, bit, order, coefficient, past, shift, out):
    """Rice-coded differences plus predictions: samples from ``order`` on; returns the bit after them, or why not."""
    method, log_parts = read(data, bit, 2), read(data, bit + 2, 4)
    bit += 6
    part_size, parameter_bits = out.size >> log_parts, 4 + method
    if method > 1 or part_size << log_parts != out.size or part_size < order:
        return BAD_CODE
    escape, last = (1 << parameter_bits) - 1, 8 * (data.size - PADDING)
    i = order
    for part in range(1 << log_parts):
        stop, k = (part + 1) * part_size, read(data, bit, parameter_bits)
        bit += parameter_bits
        if bit > last:
            return CUT
        if k == escape:
            width = read(data, bit, 5)
            bit += 5
            while i < stop:
                difference = read_signed(data, bit, width) if width else 0
                past = step(difference << 1 ^ difference >> 63, coefficient, past, shift)
                out[i] = past[0]
                bit += width
                i += 1
            continue
        while i < stop:
            # Four numbers from one word where they fit, which they do but for the loudest clips.
            word = word_at(data, bit)
            zeros_a, a, word = take(word, k)
            zeros_b, b, word = take(word, k)
            zeros_c, c, word = take(word, k)
            zeros_d, d, word = take(word, k)
            used = zeros_a + zeros_b + zeros_c + zeros_d + 4 * (k + 1)
            if used <= WORD_BITS and i + 4 <= stop:
                past = step(a, coefficient, past, shift)
                out[i] = past[0]
                past = step(b, coefficient, past, shift)
                out[i + 1] = past[0]
                past = step(c, coefficient, past, shift)
                out[i + 2] = past[0]
                past = step(d, coefficient, past, shift)
                out[i + 3] = past[0]
                bit += used
                i += 4
            else:
                bit, a = rice(data, bit, k)
                if bit > last:
                    return CUT
                past = step(a, coefficient, past, shift)
                out[i] = past[0]
                i += 1
    return bit if bit <= last else CUT


@njit
def take(word, k):
    """Rice code at the top of a word: its run of zeros, the number, the word after it; right if all of it was there."""
    zeros = leading_zeros(word)
    word <<= np.uint64(zeros & 63)  # now its one is at the top, and taken with the k bits after it
    return zeros, (zeros << k) + np.int64(word >> np.uint64(63 - k)) - (1 << k), word << np.uint64(k + 1)


@njit
def step(code, coefficient, past, shift):
    """The past with one more sample in front: the prediction plus a difference, its sign in the code's last bit."""
    return ((code >> 1 ^ -(code & 1)) + (dot(coefficient, past) >> shift), *past[:-1])


@njit
def rice(data, bit, k):
    """One number of any length: bit after it, number."""
    quotient = 0
    while bit < 8 * (data.size - PADDING):
        zeros = min(leading_zeros(word_at(data, bit)), WORD_BITS - 1)
        quotient += zeros
        bit += zeros
        if zeros < WORD_BITS - 1:
            break
    bit += 1
    return bit + k, quotient << k | (read(data, bit, k) if k else 0)


@njit
def crc16(data, start, stop):
    """Checksum of data[start : stop], eight bytes at a time."""
    value, i = 0, start
    while i + 8 <= stop:
        low = CRC16[3, data[i + 4]] ^ CRC16[2, data[i + 5]] ^ CRC16[1, data[i + 6]] ^ CRC16[0, data[i + 7]]
        value = (
            CRC16[7, data[i] ^ value >> 8] ^ CRC16[6, data[i + 1] ^ value & 255] ^ CRC16[5, data[i + 2]]
            ^ CRC16[4, data[i + 3]] ^ low
        )  # fmt: skip
        i += 8
    while i < stop:
        value = value << 8 & 0xFFFF ^ CRC16[0, value >> 8 ^ data[i]]
        i += 1
    return value


@inlined
def mix(block, layout, scale, out):
    """The sum of a frame's channels times ``scale``, an integer where ``out`` holds integers."""
    for i in range(out.size):
        if layout == 8:  # left, left - right
            total = 2 * block[0, i] - block[1, i]
        elif layout == 9:  # left - right, right
            total = block[0, i] + 2 * block[1, i]
        elif layout == 10:  # (left + right) / 2 rounded down, left - right, whose last bit is that of the sum
            total = 2 * block[0, i] + (block[1, i] & 1)
        else:
            total = block[0, i]
            for channel in range(1, block.shape[0]):
                total += block[channel, i]
        out[i] = total * scale
