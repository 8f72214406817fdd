"""A vector of float32 lanes as a numba type: ``a * b + c`` on LANES numbers at once.

Kaldi's frames are independent, so the fast path gives every lane of a SIMD register its own frame and runs the same
scalar program on all of them. Loop vectorisers do not find that by themselves in a butterfly (they cannot prove that
its eight rows do not overlap), so the vector is made explicit: numba sees one more number type, LLVM sees
``<LANES x float>`` and maps it to whatever registers the machine has.

Products and sums may be contracted to a fused multiply-add; nothing else about IEEE arithmetic is relaxed.
"""

import math
import operator

import llvmlite.binding
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, lower_builtin, models, register_model, type_callable

# One AVX-512 register, or one AVX register (two registers of NEON or SSE).
LANES = 16 if llvmlite.binding.get_host_cpu_features().get("avx512f") else 8
VECTOR_BYTES = 4 * LANES
_VECTOR = ir.VectorType(ir.FloatType(), LANES)

_CONTRACT = ("contract",)
_POWER = [math.log(2.0) ** i / math.factorial(i) for i in range(6)]


class Lanes(types.Type):
    """The type of LANES float32 numbers."""

    def __init__(self):
        super().__init__(name=f"float32x{LANES}")


lanes = Lanes()


@register_model(Lanes)
class LanesModel(models.PrimitiveModel):
    """In LLVM a Lanes value is one vector."""

    def __init__(self, manager, numba_type):
        super().__init__(manager, numba_type, _VECTOR)


def _index(context, builder, signature, arguments, places):
    """The integer arguments at these places, as machine words."""
    return [context.cast(builder, arguments[i], signature.args[i], types.intp) for i in places]


def _address(context, builder, array_type, array, element):
    """Pointer to one element of a C-contiguous array, counted from its first."""
    return builder.gep(context.make_array(array_type)(context, builder, array).data, [element])


def _address_2d(context, builder, array_type, array, row, column):
    """Pointer to array[row, column]."""
    width = builder.extract_value(context.make_array(array_type)(context, builder, array).shape, 1)
    return _address(context, builder, array_type, array, builder.add(builder.mul(row, width), column))


def _load(builder, pointer):
    """LANES numbers from a pointer to float32, or to int16, which become float32."""
    if pointer.type.pointee == ir.FloatType():
        return builder.load(builder.bitcast(pointer, _VECTOR.as_pointer()), align=4)
    whole = ir.VectorType(ir.IntType(16), LANES)
    return builder.sitofp(builder.load(builder.bitcast(pointer, whole.as_pointer()), align=2), _VECTOR)


def _store(builder, value, pointer):
    builder.store(value, builder.bitcast(pointer, _VECTOR.as_pointer()), align=4)


def _call_llvm(builder, name, arguments, suffix=""):
    """One of LLVM's own functions that give a vector."""
    kind = ir.FunctionType(_VECTOR, [argument.type for argument in arguments])
    function = cgutils.get_or_insert_function(builder.module, kind, f"llvm.{name}.v{LANES}f32{suffix}")
    return builder.call(function, arguments)


@intrinsic
def load(typingctx, array, row, column):
    """load(array, row, column) -> Lanes: array[row, column : column + LANES] of a C-contiguous float32 (R, C)."""

    def generate(context, builder, signature, arguments):
        row, column = _index(context, builder, signature, arguments, (1, 2))
        return _load(builder, _address_2d(context, builder, signature.args[0], arguments[0], row, column))

    return lanes(array, row, column), generate


def _define_load_but(lane: int):
    """An intrinsic as ``load`` that leaves one lane alone: its number need not even be in the array."""

    @intrinsic
    def load_but(typingctx, array, row, column, other):
        def generate(context, builder, signature, arguments):
            row, column = _index(context, builder, signature, arguments, (1, 2))
            there = _address_2d(context, builder, signature.args[0], arguments[0], row, column)
            there = builder.bitcast(there, _VECTOR.as_pointer())
            wanted = ir.Constant(ir.VectorType(cgutils.bool_t, LANES), [i != lane for i in range(LANES)])
            return _call_llvm(builder, "masked.load", [there, cgutils.int32_t(4), wanted, arguments[3]], ".p0")

        return lanes(array, row, column, other), generate

    return load_but


load_but_first, load_but_last = _define_load_but(0), _define_load_but(LANES - 1)
"""load_but_first(array, row, column, other) -> Lanes: as ``load``, but the first lane is ``other``'s; or the last."""


def _define_function(llvms: str, count: int):
    """An intrinsic of one vector or two that is one of LLVM's own functions."""

    def generate(context, builder, signature, arguments):
        return _call_llvm(builder, llvms, arguments)

    if count == 1:

        @intrinsic
        def of_vectors(typingctx, vector):
            return lanes(vector), generate

    else:

        @intrinsic
        def of_vectors(typingctx, a, b):
            return lanes(a, b), generate

    return of_vectors


square_root = _define_function("sqrt", 1)
"""square_root(vector) -> Lanes."""
largest = _define_function("maxnum", 2)
"""largest(a, b) -> Lanes: of each lane the larger number."""


def _define_reduction(llvms: str, start: float | None = None):
    """An intrinsic that makes one number of all lanes, in any order."""

    @intrinsic
    def over_lanes(typingctx, vector):
        def generate(context, builder, signature, arguments):
            number = ir.FloatType()
            given = ([] if start is None else [ir.Constant(number, start)]) + list(arguments)
            kind = ir.FunctionType(number, [value.type for value in given])
            function = cgutils.get_or_insert_function(builder.module, kind, f"llvm.vector.reduce.{llvms}.v{LANES}f32")
            return builder.call(function, given, fastmath=("reassoc",))

        return types.float32(vector), generate

    return over_lanes


sum_of = _define_reduction("fadd", -0.0)
"""sum_of(vector) -> float32."""
largest_of = _define_reduction("fmax")
"""largest_of(vector) -> float32."""


@intrinsic
def power_of_2(typingctx, vector):
    """power_of_2(vector) -> Lanes: 2 to the power of each, within 4 millionths of it, from -126 to 127.

    Below -126 as of -126. A polynomial of what is left of the nearest integer, which goes into the exponent.
    """

    def generate(context, builder, signature, arguments):
        def every(value):
            return ir.Constant(_VECTOR, [value] * LANES)

        words = ir.VectorType(cgutils.int32_t, LANES)
        # A NaN is not less than anything, and stays.
        given = builder.select(builder.fcmp_ordered("<", arguments[0], every(-126.0)), every(-126.0), arguments[0])
        whole = _call_llvm(builder, "rint", [given])
        left = builder.fsub(given, whole)
        value = every(_POWER[-1])
        for coefficient in reversed(_POWER[:-1]):
            value = builder.fadd(builder.fmul(value, left, flags=_CONTRACT), every(coefficient), flags=_CONTRACT)
        exponent = builder.shl(builder.fptosi(whole, words), ir.Constant(words, [23] * LANES))
        return builder.bitcast(builder.add(builder.bitcast(value, words), exponent), _VECTOR)

    return lanes(vector), generate


@intrinsic
def store(typingctx, array, row, column, value):
    """store(array, row, column, value): array[row, column : column + LANES] = value."""

    def generate(context, builder, signature, arguments):
        row, column = _index(context, builder, signature, arguments, (1, 2))
        _store(builder, arguments[3], _address_2d(context, builder, signature.args[0], arguments[0], row, column))
        return context.get_dummy_value()

    return types.none(array, row, column, value), generate


@intrinsic
def load_bf16(typingctx, array, row, column):
    """load_bf16(array, row, column) -> Lanes: as ``load`` from bf16 numbers, which numba sees as uint16."""

    def generate(context, builder, signature, arguments):
        row, column = _index(context, builder, signature, arguments, (1, 2))
        there = _address_2d(context, builder, signature.args[0], arguments[0], row, column)
        halves = builder.load(builder.bitcast(there, ir.VectorType(ir.IntType(16), LANES).as_pointer()), align=2)
        words = ir.VectorType(cgutils.int32_t, LANES)
        upper = builder.shl(builder.zext(halves, words), ir.Constant(words, [16] * LANES))
        return builder.bitcast(upper, _VECTOR)

    return lanes(array, row, column), generate


@intrinsic
def store_bf16(typingctx, array, row, column, value):
    """store_bf16(array, row, column, value): as ``store``, each rounded to the nearest bf16, of two to the even one."""

    def generate(context, builder, signature, arguments):
        row, column = _index(context, builder, signature, arguments, (1, 2))
        there = _address_2d(context, builder, signature.args[0], arguments[0], row, column)
        # As bf16_cpu.narrow: not all processors round to bf16, and numba has not what LLVM calls in its place.
        words, halves = ir.VectorType(cgutils.int32_t, LANES), ir.VectorType(ir.IntType(16), LANES)
        whole, upper = builder.bitcast(arguments[3], words), ir.Constant(words, [16] * LANES)
        odd = builder.and_(builder.lshr(whole, upper), ir.Constant(words, [1] * LANES))
        rounded = builder.add(builder.add(whole, ir.Constant(words, [0x7FFF] * LANES)), odd)
        rounded = builder.trunc(builder.lshr(rounded, upper), halves)
        builder.store(rounded, builder.bitcast(there, halves.as_pointer()), align=2)
        return context.get_dummy_value()

    return types.none(array, row, column, value), generate


@intrinsic
def store_past_cache(typingctx, array, row, column, value):
    """As ``store``, straight to memory: what is written is not fetched first, and drives nothing out of the cache.

    The address must be a multiple of the vector's size. ``fence`` must follow before another thread reads it.
    """

    def generate(context, builder, signature, arguments):
        row, column = _index(context, builder, signature, arguments, (1, 2))
        there = _address_2d(context, builder, signature.args[0], arguments[0], row, column)
        written = builder.store(arguments[3], builder.bitcast(there, _VECTOR.as_pointer()), align=VECTOR_BYTES)
        written.set_metadata("nontemporal", builder.module.add_metadata([ir.Constant(cgutils.int32_t, 1)]))
        return context.get_dummy_value()

    return types.none(array, row, column, value), generate


@intrinsic
def fence(typingctx):
    """fence(): everything written so far is there for other threads, ``store_past_cache`` included."""

    def generate(context, builder, signature, arguments):
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.none(), generate


@intrinsic
def transpose(typingctx, source, first, stride, target, row, column):
    """transpose(source, first, stride, target, row, column): a square of LANES x LANES numbers, in registers.

    target[row + i, column + j] = source[first + j * stride + i]; ``source`` is 1-D float32 or int16. Interleaving the
    first half of the vectors with the second half, log2(LANES) times, is a transposition.
    """

    def generate(context, builder, signature, arguments):
        first, stride, row, column = _index(context, builder, signature, arguments, (1, 2, 4, 5))
        source_type, target_type = signature.args[0], signature.args[3]
        vectors = []
        for j in range(LANES):
            element = builder.add(first, builder.mul(stride, ir.Constant(stride.type, j)))
            vectors.append(_load(builder, _address(context, builder, source_type, arguments[0], element)))
        word = ir.IntType(32)
        low = [place for i in range(LANES // 2) for place in (i, LANES + i)]
        masks = [ir.Constant(ir.VectorType(word, LANES), [p + k for p in low]) for k in (0, LANES // 2)]
        for _ in range(LANES.bit_length() - 1):
            pairs = zip(vectors[: LANES // 2], vectors[LANES // 2 :], strict=True)
            vectors = [builder.shuffle_vector(a, b, mask) for a, b in pairs for mask in masks]
        for i, vector in enumerate(vectors):
            there = builder.add(row, ir.Constant(row.type, i))
            _store(builder, vector, _address_2d(context, builder, target_type, arguments[3], there, column))
        return context.get_dummy_value()

    return types.none(source, first, stride, target, row, column), generate


@intrinsic
def splat(typingctx, value):
    """splat(value) -> Lanes: one float32 in every lane."""

    def generate(context, builder, signature, arguments):
        number = context.cast(builder, arguments[0], signature.args[0], types.float32)
        single = builder.insert_element(ir.Constant(_VECTOR, ir.Undefined), number, cgutils.int32_t(0))
        zeros = ir.Constant(ir.VectorType(cgutils.int32_t, LANES), [0] * LANES)
        return builder.shuffle_vector(single, ir.Constant(_VECTOR, ir.Undefined), zeros)

    return lanes(value), generate


def _define(operation, instruction: str) -> None:
    """Give a Python operator its meaning on two vectors: one LLVM instruction."""

    @type_callable(operation)
    def type_operation(context):
        def typer(a, b):
            return lanes if isinstance(a, Lanes) and isinstance(b, Lanes) else None

        return typer

    @lower_builtin(operation, Lanes, Lanes)
    def lower_operation(context, builder, signature, arguments):
        return getattr(builder, instruction)(*arguments, flags=("contract",))


_define(operator.add, "fadd")
_define(operator.sub, "fsub")
_define(operator.mul, "fmul")
