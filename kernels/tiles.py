"""Intel's matrix unit (AMX) for numba: eight tile registers, each 16 rows of 64 bytes.

Tiles 0 to 3 hold float32 sums, a square of 32 x 32 numbers; 4 and 5 the first factor's rows for it, 6 and 7 the
second's columns, each for 32 places of the sum. A tile in memory is 512 bf16 numbers: of the first factor 16 rows of 32
numbers; of the second 16 columns, two places of each beside each other, for that is how the unit wants them. Arrays are
flat, and places in them counted in numbers, unchecked.
"""

import ctypes
import sys
from functools import cache

import llvmlite.binding
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

TILE = 512
"""bf16 numbers."""
SIDE = 32
"""Rows and columns of the square of sums, and places of the sum that a step adds."""
_ROWS, _BYTES = 16, 64
_ARCH_PRCTL, _REQUEST_PERMISSION, _TILE_DATA = 158, 0x1023, 18  # of the x86-64 kernel
_BYTE, _SHORT, _WORD, _LONG = (ir.IntType(bits) for bits in (8, 16, 32, 64))
_LANES = ir.VectorType(_WORD, _ROWS)
_FLOATS = ir.VectorType(ir.FloatType(), _ROWS)


class _BFloat(ir.Type):
    """LLVM's type, which llvmlite does not name."""

    def _to_string(self) -> str:
        return "bfloat"


_BFLOATS = ir.VectorType(_BFloat(), _ROWS)


@cache
def available() -> bool:
    """Whether the processor has the unit and its bf16 products, and the system lets this process use it.

    To be asked before anything here is compiled or called: an instruction that is not allowed ends the process.
    """
    if sys.platform != "linux" or not llvmlite.binding.get_host_cpu_features().get("amx-bf16"):
        return False
    llvmlite.binding.initialize_native_asmparser()  # for ``write_row``
    return ctypes.CDLL(None).syscall(_ARCH_PRCTL, _REQUEST_PERMISSION, _TILE_DATA) == 0


def _call(builder, name, *arguments):
    """One of LLVM's own functions for the unit, which give nothing."""
    kind = ir.FunctionType(ir.VoidType(), [argument.type for argument in arguments])
    builder.call(cgutils.get_or_insert_function(builder.module, kind, f"llvm.x86.{name}"), arguments)


def _tile(number):
    return ir.Constant(_BYTE, number)


def _place(context, builder, signature, arguments, array, place):
    """Pointer to the number at a place of a flat array: both by where they stand among the arguments."""
    data = context.make_array(signature.args[array])(context, builder, arguments[array]).data
    return builder.gep(data, [context.cast(builder, arguments[place], signature.args[place], types.intp)])


def _bytes(builder, pointer):
    return builder.bitcast(pointer, _BYTE.as_pointer())


@intrinsic
def configure(typingctx):
    """configure(): this thread's tiles, all of them full. ``release`` must follow."""

    def generate(context, builder, signature, arguments):
        # Palette 1; bytes a row of each tile from 16 on, rows from 48 on.
        widths = b"".join(_BYTES.to_bytes(2, "little") for _ in range(8)).ljust(32, b"\0")
        image = (b"\1".ljust(16, b"\0") + widths + bytes([_ROWS] * 8)).ljust(64, b"\0")
        there = cgutils.alloca_once_value(builder, cgutils.make_bytearray(image))
        _call(builder, "ldtilecfg", _bytes(builder, there))
        return context.get_dummy_value()

    return types.none(), generate


@intrinsic
def release(typingctx):
    """release(): back to a thread without tiles, whose switches are cheap."""

    def generate(context, builder, signature, arguments):
        _call(builder, "tilerelease")
        return context.get_dummy_value()

    return types.none(), generate


@intrinsic
def clear(typingctx):
    """clear(): all sums 0."""

    def generate(context, builder, signature, arguments):
        for number in range(4):
            _call(builder, "tilezero", _tile(number))
        return context.get_dummy_value()

    return types.none(), generate


@intrinsic
def add_products(typingctx, a, first, second, b, left, right):
    """add_products(a, first, second, b, left, right): to the sums, the products of two tiles of a and two of b."""

    def generate(context, builder, signature, arguments):
        stride = ir.Constant(_LONG, _BYTES)
        for number, (array, place) in enumerate(((0, 1), (0, 2), (3, 4), (3, 5)), start=4):
            there = _place(context, builder, signature, arguments, array, place)
            _call(builder, "tileloadd64", _tile(number), _bytes(builder, there), stride)
        for number in range(4):
            _call(builder, "tdpbf16ps", _tile(number), _tile(4 + number // 2), _tile(6 + number % 2))
        return context.get_dummy_value()

    return types.none(a, first, second, b, left, right), generate


def _define_move(name: str):
    """An intrinsic that moves the sums to memory, or back."""

    @intrinsic
    def move(typingctx, sums, place, stride):
        def generate(context, builder, signature, arguments):
            stride = context.cast(builder, arguments[2], signature.args[2], types.intp)
            first = _place(context, builder, signature, arguments, 0, 1)
            down = builder.gep(first, [builder.mul(stride, ir.Constant(_LONG, _ROWS))])
            wide = builder.mul(stride, ir.Constant(_LONG, 4))
            for number in range(4):
                there = builder.gep(down if number // 2 else first, [ir.Constant(_LONG, _ROWS * (number % 2))])
                _call(builder, name, _tile(number), _bytes(builder, there), wide)
            return context.get_dummy_value()

        return types.none(sums, place, stride), generate

    return move


keep, resume = _define_move("tilestored64"), _define_move("tileloadd64")
"""keep(sums, place, stride): the square of sums to float32 memory whose rows are ``stride`` numbers apart; or back."""


@intrinsic
def write_row(typingctx, sums, place, bias, column, out, there):
    """write_row(sums, place, bias, column, out, there): SIDE sums plus bias, rounded to bf16, straight to memory.

    ``bias`` is float32 from ``column`` on; the address of ``out[there]`` must be a multiple of 64 bytes, and
    ``simd.fence`` must follow before another thread reads it.
    """

    def generate(context, builder, signature, arguments):
        given = _place(context, builder, signature, arguments, 0, 1)
        biases = _place(context, builder, signature, arguments, 2, 3)
        halves = []
        for half in range(2):
            theres = (builder.gep(numbers, [ir.Constant(_LONG, _ROWS * half)]) for numbers in (given, biases))
            value, plus = (builder.load(builder.bitcast(there, _FLOATS.as_pointer()), align=4) for there in theres)
            rounded = builder.fptrunc(builder.fadd(value, plus), _BFLOATS)
            halves.append(builder.bitcast(rounded, ir.VectorType(_SHORT, _ROWS)))
        row = builder.shuffle_vector(*halves, ir.Constant(ir.VectorType(_WORD, SIDE), list(range(SIDE))))
        target = _place(context, builder, signature, arguments, 4, 5)
        # LLVM has no such store for bf16 numbers, and forgets that it was to be one.
        kind = ir.FunctionType(ir.VoidType(), [target.type, row.type])
        builder.asm(kind, "vmovntdq $1, ($0)", "r,v,~{memory}", [target, row], side_effect=True)
        return context.get_dummy_value()

    return types.none(sums, place, bias, column, out, there), generate


def _rows_of_pairs(builder, source, stride):
    """16 rows of 32 numbers each: a pair of places is a lane already."""
    for row in range(_ROWS):
        there = builder.gep(source, [builder.mul(stride, ir.Constant(_LONG, row))])
        yield builder.load(builder.bitcast(there, _LANES.as_pointer()), align=2)


def _pairs_of_rows(builder, source, stride):
    """32 rows of 16 numbers each, two and two interleaved: a pair of places becomes a lane."""
    half = ir.VectorType(_SHORT, _ROWS)
    order = ir.Constant(ir.VectorType(_WORD, 2 * _ROWS), [i + k for i in range(_ROWS) for k in (0, _ROWS)])
    for row in range(_ROWS):
        theres = (builder.gep(source, [builder.mul(stride, ir.Constant(_LONG, 2 * row + i))]) for i in range(2))
        upper, lower = (builder.load(builder.bitcast(there, half.as_pointer()), align=2) for there in theres)
        yield builder.bitcast(builder.shuffle_vector(upper, lower, order), _LANES)


def _transposed(builder, vectors):
    """Interleaving the first half of the vectors with the second, four times, is a transposition."""
    low = [place for i in range(_ROWS // 2) for place in (i, _ROWS + i)]
    masks = [ir.Constant(_LANES, [p + k for p in low]) for k in (0, _ROWS // 2)]
    for _ in range(_ROWS.bit_length() - 1):
        pairs = zip(vectors[: _ROWS // 2], vectors[_ROWS // 2 :], strict=True)
        vectors = [builder.shuffle_vector(a, b, mask) for a, b in pairs for mask in masks]
    return vectors


def _define_pack(read, transposed: bool):
    """An intrinsic that makes one tile."""

    @intrinsic
    def pack(typingctx, source, first, stride, target, place):
        def generate(context, builder, signature, arguments):
            stride = context.cast(builder, arguments[2], signature.args[2], types.intp)
            vectors = list(read(builder, _place(context, builder, signature, arguments, 0, 1), stride))
            if transposed:
                vectors = _transposed(builder, vectors)
            there = _place(context, builder, signature, arguments, 3, 4)
            for row, vector in enumerate(vectors):
                to = builder.gep(there, [ir.Constant(_LONG, row * SIDE)])
                builder.store(vector, builder.bitcast(to, _LANES.as_pointer()), align=_BYTES)
            return context.get_dummy_value()

        return types.none(source, first, stride, target, place), generate

    return pack


pack_rows, pack_rows_of_transposed = _define_pack(_rows_of_pairs, False), _define_pack(_pairs_of_rows, True)
"""pack_rows(source, first, stride, target, place): a tile of the first factor, from its corner ``source[first]``.

``stride`` numbers lie between the factor's rows, or of its transposed.
"""
pack_columns, pack_columns_of_transposed = _define_pack(_pairs_of_rows, False), _define_pack(_rows_of_pairs, True)
"""Likewise a tile of the second factor."""


@intrinsic
def next_ticket(typingctx, counter):
    """next_ticket(counter) -> int64: counter[0], which becomes one more; each number goes to one thread."""

    def generate(context, builder, signature, arguments):
        data = context.make_array(signature.args[0])(context, builder, arguments[0]).data
        return builder.atomic_rmw("add", data, ir.Constant(_LONG, 1), "monotonic")

    return types.int64(counter), generate
