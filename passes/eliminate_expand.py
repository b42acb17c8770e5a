"""Drop Expand, Tile and ConstantOfShape before operators that broadcast, and copies in constants.

Why: the repeated copy of the tensor is never made; a number that is written as a whole tensor is
seen as the number that it is.
Numerics: exact.
Needs: shapes that prove that the other operand broadcasts to the same result.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from graphopt import ir
from graphopt.dims import DimLike, broadcast
from graphopt.passes._chains import chain_above, replayed
from graphopt.passes._layout import BROADCASTING
from graphopt.rewriting import Op, rewrite

_Dims = tuple[DimLike, ...]
_SPREADING = sorted(BROADCASTING - {"Clip", "PRelu", "BitShift"})
_AFFINE = ("Add", "Sub", "Mul", "Div")
_LARGEST = 1 << 22  # elements of a constant that are looked at


@rewrite.on(*_SPREADING)
def eliminate_expand(op: Op, node: ir.Node) -> ir.Value | None:
    """Take what an operand repeats, where the result has the same shape."""
    if node.op_type in ("Sum", "Mean", "Max", "Min") and op.opset < 8:
        return None
    wanted = op.shape(node.outputs[0])
    if wanted is None:
        return None
    for index, value in enumerate(node.inputs):
        found = chain_above(op, value)
        source = None if found is None else _repeated(op, found[1])
        if source is None or found is None or (found[0] and op.uses(found[1]) != 1):
            continue
        inputs = list(node.inputs)
        inputs[index] = replayed(op, found[0], source)
        if _together(op, inputs) == wanted:
            return op.build(node.op_type, inputs, node.attributes)[0]
    return None


@rewrite.on(*_SPREADING)
def shrink_constant(op: Op, node: ir.Node) -> ir.Value | None:
    """A constant whose elements repeat along an axis needs them once.

    The scales and shifts that run along one axis of a larger tensor stay: normalizations and
    matrix products take them as they are.
    """
    wanted = op.shape(node.outputs[0])
    if wanted is None or op.opset < 8:
        return None
    for index, value in enumerate(node.inputs):
        constant = op.const(value)
        if constant is None or not 1 < constant.size <= _LARGEST or constant.dtype.itemsize > 8:
            continue
        if constant.size in constant.shape and len(wanted) > 1 and node.op_type in _AFFINE:
            continue
        small = _unrepeated(constant)
        if small.size == constant.size:
            continue
        inputs = list(node.inputs)
        inputs[index] = op.initializer(small)
        if _together(op, inputs) == wanted:
            return op.build(node.op_type, inputs, node.attributes)[0]
    return None


def _unrepeated(array: ir.Array) -> ir.Array:
    """An array with size 1 along the axes along which it only repeats itself."""
    for axis in range(array.ndim):
        first = np.take(array, [0], axis)
        if array.shape[axis] > 1 and bool(np.all(_bits(array) == _bits(first))):
            array = first
    return array


def _bits(array: ir.Array) -> ir.Array:
    """What distinguishes -0 from 0, and knows NaN again; text as it is."""
    if array.dtype == object:
        return array
    return np.ascontiguousarray(array).view(f"V{array.dtype.itemsize}")


def _repeated(op: Op, value: ir.Value) -> ir.Value | None:
    """What a value repeats along axes of size 1, or None."""
    node = value.producer()
    if node is None or node.domain or node.op_type not in ("Expand", "Tile", "ConstantOfShape"):
        return None
    if node.op_type == "ConstantOfShape":
        element = op.attr(node, "value")
        number = np.zeros((), np.float32) if element is None else element.numpy().reshape(())
        return op.initializer(number)
    source = node.inputs[0]
    before = None if source is None else op.shape(source)
    after = op.shape(value)
    if before is None or after is None:
        return None
    if node.op_type == "Expand":
        return source
    pairs = zip(before, after, strict=True)
    return source if all(old in (1, new) for old, new in pairs) else None


def _together(op: Op, operands: Sequence[ir.Value | None]) -> _Dims | None:
    """The shape that operands broadcast to, or None."""
    found = [None if v is None else op.shape(v) for v in operands]
    shapes = [shape for shape in found if shape is not None]
    if len(shapes) < len(found):
        return None
    rank = max(len(shape) for shape in shapes)
    total: list[DimLike] = [1] * rank
    for shape in shapes:
        for axis, dim in enumerate(shape, rank - len(shape)):
            try:
                total[axis] = broadcast(total[axis], dim)
            except ValueError:
                return None
    return tuple(total)
