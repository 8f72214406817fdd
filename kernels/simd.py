"""A vector of float32 lanes as a numba type: ``a * b + c`` on LANES numbers at once.

Kaldi's frames are independent, so the fast path gives every lane of a SIMD register its own frame and runs the same
scalar program on all of them. Loop vectorisers do not find that by themselves in a butterfly (they cannot prove that
its eight rows do not overlap), so the vector is made explicit: numba sees one more number type, LLVM sees
``<LANES x float>`` and maps it to whatever registers the machine has.

Products and sums may be contracted to a fused multiply-add; nothing else about IEEE arithmetic is relaxed.
"""

import operator

import llvmlite.binding
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, lower_builtin, models, register_model, type_callable

# One AVX-512 register, or one AVX register (two registers of NEON or SSE).
LANES = 16 if llvmlite.binding.get_host_cpu_features().get("avx512f") else 8
_VECTOR = ir.VectorType(ir.FloatType(), LANES)


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


def _address(context, builder, array_type, array, row, column):
    """Pointer to the vector that starts at array[row, column]. The array is C-contiguous, its rows any length."""
    view = context.make_array(array_type)(context, builder, array)
    width = builder.extract_value(view.shape, 1)
    offset = builder.add(builder.mul(row, width), column)
    return builder.bitcast(builder.gep(view.data, [offset]), _VECTOR.as_pointer())


@intrinsic
def load(typingctx, array, row, column):
    """load(array, row, column) -> Lanes: array[row, column : column + LANES] of a C-contiguous float32 (R, C)."""

    def generate(context, builder, signature, arguments):
        array_type, *index_types = signature.args
        row, column = (
            context.cast(builder, value, source, types.intp)
            for value, source in zip(arguments[1:], index_types, strict=True)
        )
        return builder.load(_address(context, builder, array_type, arguments[0], row, column), align=4)

    return lanes(array, row, column), generate


@intrinsic
def store(typingctx, array, row, column, value):
    """store(array, row, column, value): array[row, column : column + LANES] = value."""

    def generate(context, builder, signature, arguments):
        array_type, *index_types, _ = signature.args
        row, column = (
            context.cast(builder, index, source, types.intp)
            for index, source in zip(arguments[1:3], index_types, strict=True)
        )
        builder.store(arguments[3], _address(context, builder, array_type, arguments[0], row, column), align=4)
        return context.get_dummy_value()

    return types.none(array, row, column, value), generate


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
