"""The numba path of ``hog`` and ``hog_patch_mean``: row by row, each row's pixels in SIMD lanes.

Three neighbouring rows of the spectrogram are all that a row of gradients needs, and sums are kept per column until a
cell's rows are done: nothing larger than a row is stored. The repeated frames at the end are never built: row indices
stop at the last real frame. ``hog.hog_torch`` and ``hog.hog_patch_mean_torch`` are the truth.
"""

import math

import numpy as np

from fastsskd_kernels.compile import inlined, njit
from fastsskd_kernels.simd import LANES, load, load_but_first, load_but_last, square_root, store


@njit
def patch_mean_batch(fbank, frames, patch, out):
    """Mean gradient magnitude of each patch: fbank (B, >= frames, F), out (B, N) float32.

    The patches of a clip cover N * patch / (F / patch) rows; rows from ``frames`` on repeat the last real one.
    """
    for b in range(out.shape[0]):
        patch_mean_clip(fbank[b], frames, patch, out[b])


@inlined
def patch_mean_clip(fbank, frames, patch, out):
    """As ``patch_mean_batch``, one clip: (T, F) -> (N,)."""
    column_sum = np.empty((1, fbank.shape[1]), np.float32)
    for band in range(out.size * patch // fbank.shape[1]):
        band_mean(fbank, frames, patch, band, column_sum, out)


@njit
def band_mean(fbank, frames, patch, band, column_sum, out):
    """The patches of one band of ``patch`` rows; reads the row before and the row after it as well.

    Row t is ``fbank[t % len(fbank)]``: the latest rows are enough. ``column_sum``, (1, F), is memory to work in.
    """
    across = fbank.shape[1] // patch
    padded = patch * (out.size // across)
    column_sum[:] = np.float32(0.0)
    for row in range(band * patch, (band + 1) * patch):
        above, here, below = neighbours(row, frames, padded, fbank.shape[0])
        if fbank.shape[1] % LANES == 0 and fbank.shape[1] > LANES:
            for f in range(0, fbank.shape[1], LANES):
                store(column_sum, 0, f, load(column_sum, 0, f) + magnitudes(fbank, above, here, below, f))
        else:
            add_magnitudes(fbank[above], fbank[here], fbank[below], column_sum[0])
    for cell in range(across):
        total = np.float32(0.0)
        for f in range(cell * patch, (cell + 1) * patch):
            total += column_sum[0, f]
        mean = total / np.float32(patch * patch)
        out[band * across + cell] = mean if abs(mean) < np.float32(np.inf) else np.float32(np.nan)


@inlined
def neighbours(row, frames, padded, kept):
    """Rows before, at and after ``row`` in an image of ``padded`` rows that repeats row ``frames - 1``; all modulo
    ``kept``.

    The first and the last row of the image are their own neighbours: no gradient along time at the border.
    """
    last, border = frames - 1, row == 0 or row == padded - 1
    here = min(row, last)
    above, below = (here, here) if border else (min(row - 1, last), min(row + 1, last))
    return above % kept, here % kept, below % kept


@inlined
def magnitudes(fbank, above, here, below, f):
    """Gradient magnitude of LANES pixels of a longer row, from column f on; none along frequency at the border."""
    along_time = load(fbank, below, f) - load(fbank, above, f)
    if f == 0:
        after = load(fbank, here, f + 1)
        before = load_but_first(fbank, here, f - 1, after)
    elif f + LANES == fbank.shape[1]:
        before = load(fbank, here, f - 1)
        after = load_but_last(fbank, here, f + 1, before)
    else:
        before, after = load(fbank, here, f - 1), load(fbank, here, f + 1)
    along_freq = after - before
    return square_root(along_time * along_time + along_freq * along_freq)


@njit
def add_magnitudes(above, here, below, column_sum):
    """Add the gradient magnitude of each pixel of one row; no gradient along frequency at the border."""
    end = here.size - 1
    column_sum[0] += abs(below[0] - above[0])
    for f in range(1, end):
        along_time, along_freq = below[f] - above[f], here[f + 1] - here[f - 1]
        column_sum[f] += math.sqrt(along_time * along_time + along_freq * along_freq)
    if end > 0:
        column_sum[end] += abs(below[end] - above[end])


@njit
def hog_batch(fbank, edges, cell, out):
    """HOG histograms: fbank (B, T, F), edges (orientations - 1, 2) float64 cosine and sine of the bin edges,
    out (B, N, orientations) float32."""
    frames, columns = fbank.shape[1:]
    across = columns // cell
    rows = cell * (out.shape[1] // across)
    magnitude = np.empty(columns, np.float32)
    direction = np.empty((2, columns), np.float64)
    passed = np.empty(columns, np.int64)
    for b in range(out.shape[0]):
        out[b] = 0.0
        for row in range(rows):
            above, here, below = neighbours(row, frames, rows, frames)
            pixel_gradients(fbank[b, above], fbank[b, here], fbank[b, below], magnitude, direction)
            pixel_bins(direction, edges, passed)
            first = row // cell * across
            for f in range(columns):
                out[b, first + f // cell, passed[f]] += magnitude[f]
        finish_histograms(out[b], cell)


@njit
def pixel_gradients(above, here, below, magnitude, direction):
    """Gradients of one row: magnitude, and (along time, along frequency) folded into [0, 180) degrees."""
    end = here.size - 1
    for f in range(here.size):
        y = below[f] - above[f]
        x = here[f + 1] - here[f - 1] if 0 < f < end else np.float32(0.0)
        magnitude[f] = math.sqrt(y * y + x * x)
        direction[0, f] = abs(y)
        # A gradient along frequency alone is 0 degrees, whatever its sign.
        direction[1, f] = -x if y < 0.0 or (y == 0.0 and x < 0.0) else x


@njit
def pixel_bins(direction, edges, passed):
    """passed[f] = number of bin edges that the pixel's direction has passed: its bin."""
    passed[:] = 0
    for edge in range(edges.shape[0]):
        cosine, sine = edges[edge]
        for f in range(passed.size):
            passed[f] += direction[0, f] * cosine - direction[1, f] * sine >= 0.0


@njit
def finish_histograms(histogram, cell):
    """Sums to means; a cell that met a NaN or infinity becomes NaN in every bin."""
    for n in range(histogram.shape[0]):
        total = np.float32(0.0)
        for o in range(histogram.shape[1]):
            histogram[n, o] /= np.float32(cell * cell)
            total += histogram[n, o]
        if not abs(total) < np.float32(np.inf):
            histogram[n] = np.nan
