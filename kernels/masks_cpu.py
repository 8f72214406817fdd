"""The intra-patch mask on a CPU: clip by clip, only the touched patches are painted, and no table of all bands is made.

The same random words and the same comparisons as ``masks.intra_patch_mask``, so the same mask, bit for bit.
"""

import numpy as np

from fastsskd_kernels.compile import njit
from fastsskd_kernels.random import (
    GAMMA,
    MIX1,
    MIX2,
    STREAM_INTRA_BANDS,
    STREAM_INTRA_ORDER,
    STREAM_INTRA_SHARE,
    derive_seed,
)

_GAMMA, _MIX1, _MIX2 = np.uint64(GAMMA), np.uint64(MIX1), np.uint64(MIX2)
_SHARE, _ORDER, _BANDS = (
    np.int64(derive_seed(stream)).view(np.uint64)
    for stream in (STREAM_INTRA_SHARE, STREAM_INTRA_ORDER, STREAM_INTRA_BANDS)
)
_S27, _S30, _S31, _S11, _S40 = (np.uint64(bits) for bits in (27, 30, 31, 11, 40))
FIELD_BITS = 21


@njit
def mix(z):
    """splitmix64's finaliser."""
    z = (z ^ (z >> _S30)) * _MIX1
    z = (z ^ (z >> _S27)) * _MIX2
    return z ^ (z >> _S31)


@njit
def word(key, place):
    """Random word number ``place`` of a stream, see ``random.random_bits``."""
    return mix(key + np.uint64(place + 1) * _GAMMA)


@njit
def intra_batch(seeds, columns, patch, widest, most, time_below, both_from, image):
    """Mark the bands of each clip in its image.

    Args:
        seeds: (B,) uint64.
        columns: patches along frequency.
        patch, widest: pixels: side of a patch, widest band.
        most: touched patches at most.
        time_below, both_from: float32 bounds of the field that tells time, frequency and both apart.
        image: (B, T, F) uint8 zeros; 1 is written where masked.
    """
    patches = image.shape[1] // patch * columns
    order = np.empty(patches, np.uint64)
    for b in range(len(seeds)):
        share = np.float32(word(mix(seeds[b] + _SHARE), 0) >> _S40) * np.float32(2.0**-24)
        count = int(share * np.float32(most + 1))
        if count == 0:
            continue
        key = mix(seeds[b] + _ORDER)
        for n in range(patches):
            order[n] = word(key, n) >> _S11
        last = np.partition(order, count - 1)[count - 1]
        key = mix(seeds[b] + _BANDS)
        for n in range(patches):
            if order[n] <= last:
                row, column = n // columns * patch, n % columns * patch
                pixels = image[b, row : row + patch, column : column + patch]
                paint_patch(pixels, (word(key, n), word(key, patches + n)), widest, time_below, both_from)


@njit
def paint_patch(pixels, words, widest, time_below, both_from):
    """Mark the bands that two random words stand for in a patch of (patch, patch) pixels."""
    patch = pixels.shape[0]
    kind = np.float32(field(words[0], 2))
    if kind < time_below or kind >= both_from:
        start, stop = band(words[0], patch, widest)
        pixels[start:stop] = 1
    if kind >= time_below:
        start, stop = band(words[1], patch, widest)
        pixels[:, start:stop] = 1


@njit
def field(bits, place):
    """One of the three fields of a random word."""
    return np.int64((bits >> np.uint64(place * FIELD_BITS)) & np.uint64((1 << FIELD_BITS) - 1))


@njit
def band(bits, patch, widest):
    """First pixel of a run of 1 ... ``widest`` pixels anywhere in the patch, and the one after its last."""
    width = 1 + ((field(bits, 0) * widest) >> FIELD_BITS)
    start = (field(bits, 1) * (patch - width + 1)) >> FIELD_BITS
    return start, start + width
