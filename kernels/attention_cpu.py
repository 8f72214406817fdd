"""The numba loops of ``attention``: a head of a clip at a time, whose numbers stay in a core's cache."""

import numpy as np
from numba import prange

from fastsskd_kernels import tiles
from fastsskd_kernels.compile import njit, njit_parallel
from fastsskd_kernels.product_cpu import NOTHING, add_products, pack_first, pack_second, write
from fastsskd_kernels.simd import (
    LANES,
    fence,
    largest,
    largest_of,
    load,
    load_bf16,
    power_of_2,
    splat,
    store,
    store_bf16,
    sum_of,
)
from fastsskd_kernels.tiles import SIDE

PACKED = 2
"""Factors whose tiles a head's work needs at a time."""


@njit_parallel
def forward(qkv, scale, kept, probs, rooms, zeros, ticket, out):
    """qkv (B, N, 3, H, D), out (B, N, H, D), probs (B, H, N, N), all bf16.

    scale: float32, of the scores as powers of 2.
    kept: whether all probabilities are; else probs is (threads, 1, N, N), room.
    rooms: each thread's, uninitialised: (threads, PACKED, N D) and (threads, SIDE max(N, D)) bf16 for tiles;
        (threads, SIDE, N) and (threads, SIDE SIDE) float32.
    zeros: (D,) float32, a bias. ticket: one zero.
    """
    for thread in prange(len(rooms[0])):
        packed, block, scores, square = rooms[0][thread], rooms[1][thread], rooms[2][thread], rooms[3][thread]
        clips, n, _, heads, d = qkv.shape
        numbers, flat, stride, width = qkv.reshape(-1), out.reshape(-1), 3 * heads * d, heads * d
        later = NOTHING
        tiles.configure()
        task = tiles.next_ticket(ticket)
        while task < clips * heads:
            clip, head = task // heads, task % heads
            q, o = clip * n * stride + head * d, clip * n * width + head * d
            k, v = q + width, q + 2 * width
            p = probs[clip, head] if kept else probs[thread, 0]
            pack_second(numbers, k, stride, False, 0, d, 0, n, packed[0])
            pack_second(numbers, v, stride, True, 0, n, 0, d, packed[1])
            for i in range(0, n, SIDE):
                pack_first(numbers, q, stride, True, 0, d, i, i + SIDE, block)
                multiply(block, packed[0], d, scores, square, zeros, flat, width, later)
                for row in range(SIDE):
                    softmax(scores, row, scale, p, i + row)
                pack_first(p.reshape(-1), 0, n, True, 0, n, i, i + SIDE, block)
                later = multiply_to(block, packed[1], n, d, o + i * width, square, zeros, flat, width, NOTHING)
            task = tiles.next_ticket(ticket)
        write(square, zeros, flat, width, later)
        tiles.release()
        fence()


@njit_parallel
def backward(grad, qkv, scale, probs, rooms, slopes, zeros, ticket, out):
    """out (B, N, 3, H, D), the gradient of qkv, from grad (B, N, H, D), that of ``forward``'s out.

    scale: float32, of the scores. slopes: (threads, N, N) bf16, room. The others as there.
    """
    for thread in prange(len(rooms[0])):
        packed, block, scores, square = rooms[0][thread], rooms[1][thread], rooms[2][thread], rooms[3][thread]
        clips, n, _, heads, d = qkv.shape
        numbers, above, flat = qkv.reshape(-1), grad.reshape(-1), out.reshape(-1)
        stride, width, ds = 3 * heads * d, heads * d, slopes[thread]
        later = NOTHING
        tiles.configure()
        task = tiles.next_ticket(ticket)
        while task < clips * heads:
            clip, head = task // heads, task % heads
            q, o = clip * n * stride + head * d, clip * n * width + head * d
            k, v = q + width, q + 2 * width
            p = probs[clip, head]
            # By rows, one for each query: ds through the softmax from do v', and dq = ds k.
            pack_second(numbers, v, stride, False, 0, d, 0, n, packed[0])
            pack_second(numbers, k, stride, True, 0, n, 0, d, packed[1])
            for i in range(0, n, SIDE):
                pack_first(above, o, width, True, 0, d, i, i + SIDE, block)
                multiply(block, packed[0], d, scores, square, zeros, flat, stride, later)
                for row in range(SIDE):
                    softmax_gradient(scores, row, scale, p, ds, i + row)
                pack_first(ds.reshape(-1), 0, n, True, 0, n, i, i + SIDE, block)
                later = multiply_to(block, packed[1], n, d, q + i * stride, square, zeros, flat, stride, NOTHING)
            # By columns, one for each key: dv = p' do, and dk = ds' q.
            pack_second(above, o, width, True, 0, n, 0, d, packed[0])
            pack_second(numbers, q, stride, True, 0, n, 0, d, packed[1])
            for i in range(0, n, SIDE):
                pack_first(p.reshape(-1), 0, n, False, 0, n, i, i + SIDE, block)
                later = multiply_to(block, packed[0], n, d, v + i * stride, square, zeros, flat, stride, later)
                pack_first(ds.reshape(-1), 0, n, False, 0, n, i, i + SIDE, block)
                later = multiply_to(block, packed[1], n, d, k + i * stride, square, zeros, flat, stride, later)
            task = tiles.next_ticket(ticket)
        write(square, zeros, flat, stride, later)
        tiles.release()
        fence()


@njit
def multiply(block, packed, depth, sums, square, zeros, out, stride, later):
    """sums (SIDE, C) float32 = SIDE packed rows times the packed columns; ``later`` is done, see ``add_products``."""
    flat, columns = sums.reshape(-1), sums.shape[1]
    for column in range(0, columns, SIDE):
        tiles.clear()
        add_products(block, 0, packed, column * depth, depth * 16, square, zeros, out, stride, later)
        tiles.keep(flat, column, columns)
        later = NOTHING


@njit
def multiply_to(block, packed, depth, columns, there, square, zeros, out, stride, later):
    """The same, rounded, to rows of out, from out[there] on. Returns what is left to do."""
    for column in range(0, columns, SIDE):
        tiles.clear()
        add_products(block, 0, packed, column * depth, depth * 16, square, zeros, out, stride, later)
        tiles.keep(square, 0, SIDE)
        later = SIDE, 0, there + column
    return later


@njit
def softmax(scores, row, scale, out, to):
    """out[to] (bf16) = the powers of 2 of scale * scores[row] (float32) over their sum; the scores are lost.

    scale > 0.
    """
    size = scores.shape[1]
    top, beside = load(scores, row, 0), load(scores, row, LANES)
    for i in range(2 * LANES, size, 2 * LANES):
        top = largest(top, load(scores, row, i))
        beside = largest(beside, load(scores, row, i + LANES))
    top, factor = splat(largest_of(largest(top, beside)) * scale), splat(scale)
    total = splat(np.float32(0.0))
    for i in range(0, size, 2 * LANES):
        power = power_of_2(load(scores, row, i) * factor - top)
        another = power_of_2(load(scores, row, i + LANES) * factor - top)
        store(scores, row, i, power)
        store(scores, row, i + LANES, another)
        total = total + (power + another)
    factor = splat(np.float32(1.0) / sum_of(total))
    for i in range(0, size, LANES):
        store_bf16(out, to, i, load(scores, row, i) * factor)


@njit
def softmax_gradient(grad, row, scale, probs, out, to):
    """out[to] (bf16) = scale * p (g - the mean of g, weighted by p): g is grad[row] (float32), p is probs[to]."""
    size = grad.shape[1]
    total = splat(np.float32(0.0))
    for i in range(0, size, LANES):
        total = total + load(grad, row, i) * load_bf16(probs, to, i)
    mean, factor = splat(sum_of(total)), splat(scale)
    for i in range(0, size, LANES):
        store_bf16(out, to, i, load_bf16(probs, to, i) * (load(grad, row, i) - mean) * factor)
