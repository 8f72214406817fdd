"""The numba path of ``fbank``: a block of frames at a time, one per SIMD lane.

A block of LANES frames goes through every step while it sits in the L1 cache: row n of the work buffer holds sample n
of all its frames, so each step is the scalar algorithm with a vector in place of a number (see ``simd``), and neither
the FFT nor the mel filters ever shuffle lanes. What makes it short:

- Reading: with the waveform cut into columns of one frame shift, sample n of neighbouring frames is neighbouring in
  memory: one transposition of a small tile, in registers, serves all overlapping frames.
- Real FFT: N real samples are N/2 complex ones (even samples real, odd imaginary); one butterfly pass at the end turns
  that spectrum into the power of bins k and N/2 - k.
- FFT: radix 4, in place, decimation in frequency. Its output order is never undone; the last pass looks places up.
- Mel: only the nonzero weights of each triangle.
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
    mel_start: np.ndarray  # (M + 1,) int64: where each triangle begins in the next two
    mel_row: np.ndarray  # int64: row that holds the power of each bin under the triangle
    mel_weight: np.ndarray  # float32: the weight of that bin


@functools.lru_cache(maxsize=16)
def make_plan(sample_rate: int, num_mel_bins: int, window: str) -> Plan:
    """Tables for ``fbank_clip``, from the same constants that the reference uses."""
    length, shift, padded = frame_samples(sample_rate)
    half = padded // 2
    place = np.argsort(_output_order(half))
    banks = mel_banks(num_mel_bins, padded, sample_rate).numpy()
    # An empty triangle still reads one bin, with weight zero: so a NaN in the frame reaches every mel bin.
    bins = [row.nonzero()[0] if row.any() else np.array([1]) for row in banks]
    return Plan(
        shift=shift,
        window=0.5 * window_values(window, length).numpy(),
        root=_roots(half),
        half_root=_roots(padded)[:half],
        place=place,
        mel_start=np.cumsum([0] + [len(used) for used in bins]),
        mel_row=2 * place[np.concatenate(bins)],
        mel_weight=np.concatenate([row[used] for row, used in zip(banks, bins, strict=True)]),
    )


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
    complex_fft(work, plan.root)
    power_spectrum(work, plan.half_root, plan.place)
    mel_filters(work, plan.mel_start, plan.mel_row, plan.mel_weight, mel)
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


@njit
def complex_fft(x, root):
    """In-place FFT of H complex rows; x[2k] and x[2k + 1] are real and imaginary part of row k."""
    size = root.shape[0]
    block = size
    while block >= 4:
        quarter = block // 4
        for j in range(quarter):
            w = j * (size // block)
            r1, i1 = splat(root[w, 0]), splat(root[w, 1])
            r2, i2 = splat(root[2 * w, 0]), splat(root[2 * w, 1])
            r3, i3 = splat(root[3 * w, 0]), splat(root[3 * w, 1])
            for a in range(2 * j, 2 * size, 2 * block):
                b, c, d = a + 2 * quarter, a + 4 * quarter, a + 6 * quarter
                ar, ai, br, bi = load(x, a, 0), load(x, a + 1, 0), load(x, b, 0), load(x, b + 1, 0)
                cr, ci, dr, di = load(x, c, 0), load(x, c + 1, 0), load(x, d, 0), load(x, d + 1, 0)
                pr, pi, qr, qi = ar + cr, ai + ci, ar - cr, ai - ci
                sr, si, tr, ti = br + dr, bi + di, br - dr, bi - di
                store(x, a, 0, pr + sr)
                store(x, a + 1, 0, pi + si)
                yr, yi = qr + ti, qi - tr
                store(x, b, 0, yr * r1 - yi * i1)
                store(x, b + 1, 0, yr * i1 + yi * r1)
                yr, yi = pr - sr, pi - si
                store(x, c, 0, yr * r2 - yi * i2)
                store(x, c + 1, 0, yr * i2 + yi * r2)
                yr, yi = qr - ti, qi + tr
                store(x, d, 0, yr * r3 - yi * i3)
                store(x, d + 1, 0, yr * i3 + yi * r3)
        block = quarter
    if block == 2:
        for a in range(0, 2 * size, 4):
            ar, ai, br, bi = load(x, a, 0), load(x, a + 1, 0), load(x, a + 2, 0), load(x, a + 3, 0)
            store(x, a, 0, ar + br)
            store(x, a + 1, 0, ai + bi)
            store(x, a + 2, 0, ar - br)
            store(x, a + 3, 0, ai - bi)


@njit
def power_spectrum(x, half_root, place):
    """Power of bins 1 ... H - 1 of the real FFT, each left in the real row of its frequency's place.

    With Z the spectrum of even + i odd samples: E = Z[k] + conj Z[H-k] and O = -i (Z[k] - conj Z[H-k]) are twice the
    spectra of the even and odd samples (the window carries the half), X[k] = E + w O and X[H-k] = conj(E - w O) with
    w = exp(-2 pi i k / N). Bins 0 and H lie outside Kaldi's triangles and are left as they are.
    """
    half = place.size
    for k in range(1, half // 2 + 1):
        a, b = 2 * place[k], 2 * place[half - k]
        ar, ai, br, bi = load(x, a, 0), load(x, a + 1, 0), load(x, b, 0), load(x, b + 1, 0)
        er, ei, our, oui = ar + br, ai - bi, ai + bi, br - ar
        wr, wi = splat(half_root[k, 0]), splat(half_root[k, 1])
        tr, ti = our * wr - oui * wi, our * wi + oui * wr
        ur, ui, vr, vi = er + tr, ei + ti, er - tr, ei - ti
        store(x, a, 0, ur * ur + ui * ui)
        store(x, b, 0, vr * vr + vi * vi)


@njit
def mel_filters(power, start, row, weight, mel):
    """mel[m] = sum over the bins of triangle m of weight times power."""
    for m in range(mel.shape[0]):
        total = splat(0.0)
        for i in range(start[m], start[m + 1]):
            total = total + splat(weight[i]) * load(power, row[i], 0)
        store(mel, m, 0, total)


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
