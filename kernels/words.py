"""Machine words for bit streams: what a decoder needs of the processor and numba does not offer.

Two instructions (a word of eight bytes in network order, the zeros before its first one) and short tuples that stay in
registers: a filter of a known length then takes its past from there, and each step waits only for the step before.
"""

from llvmlite import ir
from numba import types
from numba.extending import intrinsic


@intrinsic
def big_endian_word(typingctx, data, at):
    """big_endian_word(data, at) -> uint64: data[at : at + 8] of a C-contiguous uint8 array; nothing is checked."""

    def generate(context, builder, signature, arguments):
        array = context.make_array(signature.args[0])(context, builder, arguments[0])
        place = context.cast(builder, arguments[1], signature.args[1], types.intp)
        word = builder.bitcast(builder.gep(array.data, [place]), ir.IntType(64).as_pointer())
        return builder.bswap(builder.load(word, align=1))

    return types.uint64(data, at), generate


@intrinsic
def leading_zeros(typingctx, word):
    """leading_zeros(word) -> int64: zeros before the first one of a uint64; 64 where there is none."""

    def generate(context, builder, signature, arguments):
        return builder.ctlz(arguments[0], ir.Constant(ir.IntType(1), 0))

    return types.int64(types.uint64), generate


@intrinsic(prefer_literal=True)
def first_of(typingctx, array, count):
    """first_of(array, count) -> tuple: the first ``count``, a literal, numbers of an int64 array."""
    size = count.literal_value

    def generate(context, builder, signature, arguments):
        start = context.make_array(signature.args[0])(context, builder, arguments[0]).data
        numbers = [builder.load(builder.gep(start, [ir.Constant(ir.IntType(64), i)])) for i in range(size)]
        return context.make_tuple(builder, signature.return_type, numbers)

    return types.UniTuple(types.int64, size)(array, count), generate


@intrinsic
def dot(typingctx, a, b):
    """dot(a, b) -> int64: sum of the products of two tuples, the last first: a[0] * b[0] is waited for least."""

    def generate(context, builder, signature, arguments):
        total = ir.Constant(ir.IntType(64), 0)
        for i in reversed(range(signature.args[0].count)):
            left, right = (builder.extract_value(argument, i) for argument in arguments)
            total = builder.add(total, builder.mul(left, right))
        return total

    return types.int64(a, b), generate
