"""The numba loops of ``product``: factors are packed into tiles, and squares of the result are summed in registers."""

from numba import prange

from fastsskd_kernels import tiles
from fastsskd_kernels.compile import njit, njit_parallel
from fastsskd_kernels.simd import fence
from fastsskd_kernels.tiles import SIDE, TILE

BLOCK = 128
"""Rows of the result that a thread takes at a time."""
DEEPEST = 3072
"""Places of the sum that are packed at a time: a block's tiles are then 768 KB, less than half of a core's L2 cache."""
SQUARE = SIDE * SIDE
"""Numbers in a square of the result."""
NOTHING = 0, 0, 0
"""Is left to do for the square before: see ``add_products``."""


@njit_parallel
def multiply(a, a_stride, a_rows, b, b_stride, b_rows, bias, depth, packed, blocks, squares, sums, tickets, out):
    """out (M, N) = a b + bias, added up over ``depth`` places.

    a, b: flat bf16; ``stride`` numbers lie between the rows of one that lies by ``rows``, else between its columns.
    bias: (N,) float32.
    packed, blocks, squares: room for b's tiles, and each thread's for a block of a's and for a SQUARE of sums.
    sums: (M, N) float32 where depth exceeds DEEPEST, else anything.
    tickets: zeros, one for each DEEPEST places.
    """
    for chunk in range(len(tickets)):
        start, end = chunk * DEEPEST, min(depth, (chunk + 1) * DEEPEST)
        for i in prange((out.shape[1] + BLOCK - 1) // BLOCK):
            pack_second(b, 0, b_stride, b_rows, start, end, i * BLOCK, min(out.shape[1], (i + 1) * BLOCK), packed)
        for thread in prange(len(blocks)):
            share = (packed, blocks[thread], squares[thread], sums, tickets[chunk : chunk + 1])
            work(a, a_stride, a_rows, bias, start, end, end == depth, share, out)


@njit
def pack_second(b, corner, stride, by_rows, start, end, first, last, packed):
    """Tiles of 16 columns, from ``first`` to ``last``, and from ``start`` to ``end`` of the sum; ``b[corner]`` is the
    matrix's own first number.

    Here and below, what lies beside each other in memory is read in turn.
    """
    deep = (end - start) * 16
    if by_rows:
        for k in range(start, end, SIDE):
            for j in range(first, last, 16):
                to = (j // 16) * deep + (k - start) * 16
                tiles.pack_columns(b, corner + k * stride + j, stride, packed, to)
    else:
        for j in range(first, last, 16):
            for k in range(start, end, SIDE):
                to = (j // 16) * deep + (k - start) * 16
                tiles.pack_columns_of_transposed(b, corner + j * stride + k, stride, packed, to)


@njit
def pack_first(a, corner, stride, by_rows, start, end, first, last, block):
    """Tiles of 16 rows, likewise."""
    deep = (end - start) * 16
    if by_rows:
        for i in range(first, last, 16):
            for k in range(start, end, SIDE):
                to = ((i - first) // 16) * deep + (k - start) * 16
                tiles.pack_rows(a, corner + i * stride + k, stride, block, to)
    else:
        for k in range(start, end, SIDE):
            for i in range(first, last, 16):
                to = ((i - first) // 16) * deep + (k - start) * 16
                tiles.pack_rows_of_transposed(a, corner + k * stride + i, stride, block, to)


@njit
def work(a, stride, by_rows, bias, start, end, last, share, out):
    """One thread's blocks of rows: the next one, as long as there is one. Cores of a shared machine differ in speed."""
    packed, block, square, sums, ticket = share
    rows, columns = out.shape
    flat, kept = out.reshape(-1), sums.reshape(-1)
    deep = (end - start) * 16
    later = NOTHING
    tiles.configure()
    top = tiles.next_ticket(ticket) * BLOCK
    while top < rows:
        height = min(BLOCK, rows - top)
        pack_first(a, 0, stride, by_rows, start, end, top, top + height, block)
        for column in range(0, columns, SIDE):
            for row in range(0, height, SIDE):
                there = (top + row) * columns + column
                if start > 0:
                    tiles.resume(kept, there, columns)
                else:
                    tiles.clear()
                left, right = row * deep // 16, column * deep // 16
                add_products(block, left, packed, right, deep, square, bias, flat, columns, later)
                if last:
                    tiles.keep(square, 0, SIDE)
                    later = SIDE, column, there
                else:
                    tiles.keep(kept, there, columns)
        top = tiles.next_ticket(ticket) * BLOCK
    write(square, bias, flat, columns, later)
    tiles.release()
    fence()


@njit
def add_products(block, left, packed, right, deep, square, bias, out, stride, later):
    """To the sums: two tiles' rows from ``left`` on times two tiles' columns from ``right`` on.

    Meanwhile what is left to do for the square before is done, which costs nothing beside the matrix unit's work: as
    many of its rows as ``later`` says are written, ``stride`` apart; ``later`` has the column of their bias and the
    place of the first in out, too.
    """
    rows, column, there = later
    each, row = (rows * TILE + deep - 1) // deep, 0
    for k in range(0, deep, TILE):
        tiles.add_products(block, left + k, left + deep + k, packed, right + k, right + deep + k)
        for _ in range(min(each, rows - row)):
            tiles.write_row(square, row * SIDE, bias, column, out, there + row * stride)
            row += 1


@njit
def write(square, bias, out, stride, later):
    """What is left to do for the last square."""
    rows, column, there = later
    for row in range(rows):
        tiles.write_row(square, row * SIDE, bias, column, out, there + row * stride)
