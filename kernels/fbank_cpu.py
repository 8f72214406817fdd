"""The numba path of ``fbank``: a block of frames at a time, one per SIMD lane.

A block of LANES frames goes through every step while it sits in the L1 cache: row n of the work buffer holds sample n
of all its frames, so each step is the scalar algorithm with a vector in place of a number (see ``simd``), and neither
the FFT nor the mel filters ever shuffle lanes. What makes it short:

- Reading: with the waveform cut into columns of one frame shift, sample n of neighbouring frames is neighbouring in
  memory: one transposition of a small tile, in registers, serves all overlapping frames.
- Real FFT: N real samples are N/2 complex ones (even samples real, odd imaginary); the power of bins k and N/2 - k
  comes from that spectrum at the same two bins.
- FFT: radix 4, in place, decimation in frequency. Its output order is never undone; what follows looks places up. The
  last pass has no factors, and its values become powers without being stored.
- Mel: each bin is read once, for the two triangles it lies under.
- Log: exponent and a polynomial, in integer and float arithmetic that a compiler vectorises.

``fbank.fbank_torch`` is the truth for all of it.
"""

import functools
from typing import NamedTuple

import numpy as np

from fastsskd_kernels.compile import inlined, njit, njit_fused
from fastsskd_kernels.kaldi import LOG_FLOOR, PREEMPHASIS, frame_samples, mel_banks, window_values
from fastsskd_kernels.simd import LANES, load, splat, store, transpose

# log(1 + t) = t - t^2 / 2 + t^3 (P0 t^8 + ... + P8), and the two parts of log(2). Typed here: literals are float64.
ZERO, HALF, ONE, INFINITY = np.float32(0.0), np.float32(0.5), np.float32(1.0), np.float32(np.inf)
FLOOR = np.float32(LOG_FLOOR)
P0, P1, P2 = np.float32(7.0376836292e-2), np.float32(-1.1514610310e-1), np.float32(1.1676998740e-1)
P3, P4, P5 = np.float32(-1.2420140846e-1), np.float32(1.4249322787e-1), np.float32(-1.6668057665e-1)
P6, P7, P8 = np.float32(2.0000714765e-1), np.float32(-2.4999993993e-1), np.float32(3.3333331174e-1)
LN2_HIGH, LN2_LOW = np.float32(0.693359375), np.float32(-2.12194440e-4)
SQRT_HALF_BITS, MANTISSA_BITS = np.int32(0x3F3504F3), np.int32(23)


class Plan(NamedTuple):
    """The constants of one (sampling rate, mel bins, window). N is the FFT's size, H = N / 2."""

    shift: int
    window: np.ndarray  # (frame length,) float32, halved: the last pass of the real FFT wants E / 2 and O / 2
    root: np.ndarray  # (H, 2) float32: cosine and sine of -2 pi k / H
    half_root: np.ndarray  # (H, 2) float32: the same of -2 pi k / N
    place: np.ndarray  # (H,) int64: row where the radix-4 passes leave frequency k, counted in complex rows
    bin_start: np.ndarray  # (M + 1,) int64: where the bins of each triangle's rising side begin in the next two
    bin_row: np.ndarray  # (K,) int64: row that holds the power of each bin under a triangle
    bin_weight: np.ndarray  # (K, 2) float32: its weight in the triangle before, which falls there, and in this one


@functools.lru_cache(maxsize=16)
def make_plan(sample_rate: int, num_mel_bins: int, window: str) -> Plan:
    """Tables for ``fbank_clip``, from the same constants that the reference uses."""
    length, shift, padded = frame_samples(sample_rate)
    half = padded // 2
    place = np.argsort(_output_order(half))
    bins, start, weight = _rising_sides(mel_banks(num_mel_bins, padded, sample_rate).numpy())
    return Plan(
        shift=shift,
        window=0.5 * window_values(window, length).numpy(),
        root=_roots(half),
        half_root=_roots(padded)[:half],
        place=place,
        bin_start=start,
        bin_row=2 * place[bins],
        bin_weight=weight,
    )


def _rising_sides(banks: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Triangles (M, bins) as in ``Plan``: bins, where those of each begin, weights.

    A bin is under two neighbours, or under one: then it counts as rising, whichever side it is on.
    """
    bins = np.flatnonzero(banks.any(axis=0))
    last = banks.shape[0] - 1 - (banks[::-1, bins] > 0).argmax(axis=0)
    before = np.where(last > 0, banks[last - 1, bins], 0)
    weight = np.stack([before, banks[last, bins]], axis=1)
    return bins, np.searchsorted(last, np.arange(banks.shape[0] + 1)), np.ascontiguousarray(weight, np.float32)


def _roots(n: int) -> np.ndarray:
    """(n, 2) float32: real and imaginary part of exp(-2 pi i k / n)."""
    angle = -2.0 * np.pi * np.arange(n) / n
    return np.stack([np.cos(angle), np.sin(angle)], axis=1).astype(np.float32)


def _output_order(n: int) -> np.ndarray:
    """Frequency at each row after the in-place radix-4 passes, a radix-2 pass last where n is not a power of 4."""
    if n <= 2:
        return np.arange(n)
    return np.concatenate([4 * _output_order(n // 4) + r for r in range(4)])


@njit
def fbank_batch(waveform, scale, frames, plan, out):
    """Log-mel of each clip: (B, S) float32 or int16, times scale -> out (B, >= frames, M) float32."""
    for b in range(out.shape[0]):
        fbank_clip(waveform[b], scale, frames, plan, out[b])


@inlined
def fbank_clip(waveform, scale, frames, plan, out):
    """Log-mel of one clip into the first ``frames`` rows of ``out``."""
    work, tile, mel = block_memory(plan, out.shape[1])
    for start in range(0, frames, LANES):
        fbank_block(
            waveform[start * plan.shift :], scale, plan, work, tile, mel, out[start : min(start + LANES, frames)]
        )


@inlined
def block_memory(plan, num_mel_bins):
    """What ``fbank_block`` works in: the spectra, the samples and the filters' outputs of LANES frames."""
    work = np.empty((2 * plan.place.size, LANES), np.float32)
    tile = np.empty((plan.shift, LANES + (plan.window.size - 1) // plan.shift), np.float32)
    return work, tile, np.empty((num_mel_bins, LANES), np.float32)


@inlined
def fbank_block(waveform, scale, plan, work, tile, mel, out):
    """Log-mel of up to LANES frames, as many as ``out`` has rows; the first begins where ``waveform`` does."""
    read_tile(waveform, tile)
    window_frames(tile, plan.window, scale, work)
    first_passes(work, plan.root)
    last_pass_power(work, plan.half_root, plan.place)
    mel_filters(work, plan, mel)
    log_inplace(mel.reshape(-1))
    copy_transposed(mel.reshape(-1), mel.shape[1], mel.shape[0], out)


@inlined
def read_tile(waveform, tile):
    """tile[p, j] = waveform[j * shift + p]: sample p of column j; zero beyond the end."""
    shift, columns = tile.shape
    whole = min(columns, waveform.size // shift)
    copy_transposed(waveform, shift, whole, tile)
    for j in range(whole, columns):
        for p in range(shift):
            n = j * shift + p
            tile[p, j] = np.float32(waveform[n]) if n < waveform.size else ZERO


@njit
def copy_transposed(source, stride, columns, target):
    """target[i, j] = source[j * stride + i] for every row i of target and its first columns j.

    Squares of LANES x LANES in registers, what is left at the edges number by number.
    """
    rows = target.shape[0]
    inner_rows, inner_columns = rows - rows % LANES, columns - columns % LANES
    for j in range(0, inner_columns, LANES):
        for i in range(0, inner_rows, LANES):
            transpose(source, j * stride + i, stride, target, i, j)
    for j in range(columns):
        for i in range(inner_rows if j < inner_columns else 0, rows):
            target[i, j] = source[j * stride + i]


@njit
def window_frames(tile, window, scale, work):
    """DC removal, pre-emphasis and window times ``scale``; rows from the frame's length to N become zero.

    The mean is corrected by the mean of what it leaves: under a large offset one float32 sum is off by enough to show
    in quiet bins.
    """
    shift, length = tile.shape[0], window.size
    mean = frame_mean(tile, length, splat(0.0))
    mean = mean + frame_mean(tile, length, mean)
    emphasis = splat(np.float32(PREEMPHASIS))
    previous = load(tile, 0, 0) - mean
    for q in range((length + shift - 1) // shift):
        for p in range(min(shift, length - q * shift)):
            current = load(tile, p, q) - mean
            n = q * shift + p
            store(work, n, 0, (current - emphasis * previous) * splat(window[n] * scale))
            previous = current
    for n in range(length, work.shape[0]):
        store(work, n, 0, splat(0.0))


@njit
def frame_mean(tile, length, offset):
    """Mean of (sample - offset) per frame; sample n of lane j is tile[n % shift, j + n // shift].

    Four sums take turns: an adder need not wait for its last result, and rounding grows more slowly.
    """
    shift = tile.shape[0]
    a = b = c = d = splat(0.0)
    for q in range((length + shift - 1) // shift):
        for p in range(min(shift, length - q * shift)):
            a, b, c, d = b, c, d, a + (load(tile, p, q) - offset)
    return ((a + b) + (c + d)) * splat(np.float32(1.0 / length))


@inlined
def butterfly(ar, ai, br, bi, cr, ci, dr, di):
    """The DFT of four complex numbers, real and imaginary parts in turn."""
    pr, pi, qr, qi = ar + cr, ai + ci, ar - cr, ai - ci
    sr, si, tr, ti = br + dr, bi + di, br - dr, bi - di
    return pr + sr, pi + si, qr + ti, qi - tr, pr - sr, pi - si, qr - ti, qi + tr


@inlined
def store_turned(x, root, row, quarter, w, values):
    """Four complex values into rows ``row``, ``row + quarter``, ...; value r is turned by root ``r * w``."""
    ar, ai, br, bi, cr, ci, dr, di = values
    r1, i1 = splat(root[w, 0]), splat(root[w, 1])
    r2, i2 = splat(root[2 * w, 0]), splat(root[2 * w, 1])
    r3, i3 = splat(root[3 * w, 0]), splat(root[3 * w, 1])
    a, b, c, d = 2 * row, 2 * (row + quarter), 2 * (row + 2 * quarter), 2 * (row + 3 * quarter)
    store(x, a, 0, ar)
    store(x, a + 1, 0, ai)
    store(x, b, 0, br * r1 - bi * i1)
    store(x, b + 1, 0, br * i1 + bi * r1)
    store(x, c, 0, cr * r2 - ci * i2)
    store(x, c + 1, 0, cr * i2 + ci * r2)
    store(x, d, 0, dr * r3 - di * i3)
    store(x, d + 1, 0, dr * i3 + di * r3)


@inlined
def load_row(x, row):
    """Real and imaginary part of a complex row."""
    return load(x, 2 * row, 0), load(x, 2 * row + 1, 0)


@inlined
def load_butterfly(x, row, quarter):
    """The DFT of rows ``row``, ``row + quarter``, ..."""
    ar, ai = load_row(x, row)
    br, bi = load_row(x, row + quarter)
    cr, ci = load_row(x, row + 2 * quarter)
    dr, di = load_row(x, row + 3 * quarter)
    return butterfly(ar, ai, br, bi, cr, ci, dr, di)


@njit
def first_passes(x, root):
    """The radix-4 passes but the last: blocks of H rows, then of H / 4, ..., more than 4."""
    size = root.shape[0]
    block = size
    while block > 4:
        quarter = block // 4
        for j in range(quarter):
            for row in range(j, size, block):
                store_turned(x, root, row, quarter, j * (size // block), load_butterfly(x, row, quarter))
        block = quarter


@njit
def last_pass_power(x, half_root, place):
    """The FFT's last pass, then the power of bins 1 ... H - 1, each left in the real row of its frequency's place.

    Bins k and H - k are needed at once. Where the last pass is radix 4, four rows that hold bins k, k + H/4, ... and
    four that hold those of H/4 - k are all that the eight bins need: they are never stored.
    """
    half = place.size
    quarter = half // 4
    if place[quarter] != 1:  # the last pass is radix 2
        for row in range(0, half, 2):
            ar, ai = load_row(x, row)
            br, bi = load_row(x, row + 1)
            store(x, 2 * row, 0, ar + br)
            store(x, 2 * row + 1, 0, ai + bi)
            store(x, 2 * row + 2, 0, ar - br)
            store(x, 2 * row + 3, 0, ai - bi)
        for k in range(1, half // 2 + 1):
            stored_power(x, half_root, place, k)
        return
    for row in (0, place[quarter // 2]):  # bins that are each other's partners, or their own
        for i, value in enumerate(load_butterfly(x, row, 1)):
            store(x, 2 * row + i, 0, value)
    for k in (quarter, 2 * quarter, quarter // 2, quarter // 2 + quarter):
        stored_power(x, half_root, place, k)
    for k in range(1, quarter // 2):
        row, partner = place[k], place[quarter - k]
        a0r, a0i, a1r, a1i, a2r, a2i, a3r, a3i = load_butterfly(x, row, 1)
        b0r, b0i, b1r, b1i, b2r, b2i, b3r, b3i = load_butterfly(x, partner, 1)
        store_power(x, half_root, k, row, partner + 3, a0r, a0i, b3r, b3i)
        store_power(x, half_root, k + quarter, row + 1, partner + 2, a1r, a1i, b2r, b2i)
        store_power(x, half_root, k + 2 * quarter, row + 2, partner + 1, a2r, a2i, b1r, b1i)
        store_power(x, half_root, k + 3 * quarter, row + 3, partner, a3r, a3i, b0r, b0i)


@inlined
def stored_power(x, half_root, place, k):
    """As ``store_power`` of the rows of bins k and H - k themselves."""
    ar, ai = load_row(x, place[k])
    br, bi = load_row(x, place[place.size - k])
    store_power(x, half_root, k, place[k], place[place.size - k], ar, ai, br, bi)


@inlined
def store_power(x, half_root, k, row, partner, ar, ai, br, bi):
    """Power of bins k and H - k of the real FFT, into the real rows of two places, from the complex FFT's Z.

    With Z the spectrum of even + i odd samples: E = Z[k] + conj Z[H-k] and O = -i (Z[k] - conj Z[H-k]) are twice the
    spectra of the even and odd samples (the window carries the half), X[k] = E + w O and X[H-k] = conj(E - w O) with
    w = exp(-2 pi i k / N). Bins 0 and H lie outside Kaldi's triangles and are left as they are.
    """
    er, ei, our, oui = ar + br, ai - bi, ai + bi, br - ar
    wr, wi = splat(half_root[k, 0]), splat(half_root[k, 1])
    tr, ti = our * wr - oui * wi, our * wi + oui * wr
    ur, ui, vr, vi = er + tr, ei + ti, er - tr, ei - ti
    store(x, 2 * row, 0, ur * ur + ui * ui)
    store(x, 2 * partner, 0, vr * vr + vi * vi)


@njit
def mel_filters(power, plan, mel):
    """mel[m] = sum over the bins of triangle m of weight times power.

    Bin by bin: between the peaks of two neighbouring triangles a bin lies on the one's falling and the other's rising
    side. A sum begins as zero times a power, so that a NaN in the frame reaches a triangle without bins.
    """
    nothing = splat(0.0) * load(power, plan.bin_row[0], 0)
    falling = nothing
    for m in range(mel.shape[0]):
        rising = nothing
        for i in range(plan.bin_start[m], plan.bin_start[m + 1]):
            here = load(power, plan.bin_row[i], 0)
            falling = falling + splat(plan.bin_weight[i, 0]) * here
            rising = rising + splat(plan.bin_weight[i, 1]) * here
        if m > 0:
            store(mel, m - 1, 0, falling)
        falling = rising
    store(mel, mel.shape[0] - 1, 0, falling)


@njit_fused
def log_inplace(x):
    """x = log(max(x, float32 epsilon)), natural, within 1 ulp or so (Cephes' logf); NaN and infinity stay."""
    bits = x.view(np.int32)
    for i in range(x.size):
        value = FLOOR if x[i] < FLOOR else x[i]
        # value = mantissa * 2^exponent with the mantissa in [sqrt(1/2), sqrt(2)); equal bits are read as int and float.
        x[i] = value
        exponent = np.int32(np.int32(bits[i] - SQRT_HALF_BITS) >> MANTISSA_BITS)
        bits[i] = np.int32(bits[i] - np.int32(exponent << MANTISSA_BITS))
        t, e = x[i] - ONE, np.float32(exponent)
        y = P0 * t + P1
        y = y * t + P2
        y = y * t + P3
        y = y * t + P4
        y = y * t + P5
        y = y * t + P6
        y = y * t + P7
        y = y * t + P8
        y = y * t * t * t + e * LN2_LOW - HALF * t * t
        x[i] = t + y + e * LN2_HIGH if value < INFINITY else value
