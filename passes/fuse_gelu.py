"""Fuse GELU, by erf or by tanh, into Gelu.

Why: five to eight kernels over the same tensor become one.
Numerics: rounding.
Needs: opset 20.
"""

from __future__ import annotations

import math

from graphopt import ir
from graphopt.passes._algebra import Reader
from graphopt.rewriting import Op, Refuse, rewrite

_CUBIC = 0.044715


@rewrite.on("Mul", "Div", benefit=5)
def fuse_gelu(op: Op, node: ir.Node) -> ir.Value | None:
    """0.5 x (1 + erf(x / sqrt(2))), or 0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))).

    The factors may stand in any order and grouping, the cube as a power or as products.
    """
    for first in (0, 1):
        reader = Reader(op, node)
        scale, tensors = reader.factors(node.outputs[0])
        if len(tensors) != 2:
            return None
        x = tensors[first]
        bell = _bell(reader, tensors[1 - first], x)
        if bell is None or not reader.near(scale * bell[0], 0.5, op.dtype(x)):
            continue
        reader.require_unneeded()
        if op.opset < 20:
            raise Refuse("needs opset 20")
        if op.dtype(x) == ir.DataType.DOUBLE:
            raise Refuse("ONNX Runtime does not have it in double precision")
        return op.Gelu(x, approximate=bell[1])
    return None


def _bell(reader: Reader, value: ir.Value, x: ir.Value) -> tuple[float, str | None] | None:
    """(c, approximation) where the value is c (1 + erf(...)) or c (1 + tanh(...)) of x."""
    total = reader.take(value, "Add", "Sub")
    if total is None:
        return _steep_bell(reader, value, x)
    if total.op_type == "Sub":  # the functions are odd
        height, negated = reader.number(total.inputs[0]), total.inputs[1]
        return None if height is None else _curve(reader, negated, height, x, -1.0)
    for curve, constant in (total.inputs, reversed(total.inputs)):
        height = reader.number(constant)
        if height is None:
            continue
        found = _curve(reader, curve, height, x, 1.0)
        if found is not None:
            return found
    return None


def _curve(
    reader: Reader, curve: ir.Value | None, height: float, x: ir.Value, sign: float
) -> tuple[float, str | None] | None:
    """(height, approximation) where a value is height erf(...) or tanh(...) of x, or of -x."""
    factor, tensors = reader.factors(curve)
    if len(tensors) != 1 or not reader.near(abs(factor), height, None):
        return None
    sign = math.copysign(sign, sign * factor)
    function = reader.take(tensors[0], "Erf", "Tanh")
    if function is None:
        return None
    inner = function.inputs[0]
    if function.op_type == "Erf":
        found = reader.is_polynomial(inner, x, {1: sign * math.sqrt(0.5)})
        return (height, None) if found else None
    slope = sign * math.sqrt(2 / math.pi)
    found = reader.is_polynomial(inner, x, {1: slope, 3: slope * _CUBIC})
    return (height, "tanh") if found else None


def _steep_bell(reader: Reader, value: ir.Value, x: ir.Value) -> tuple[float, str | None] | None:
    """As `_bell`, of a Sigmoid: (1 + tanh(u)) / 2 is sigmoid(2 u)."""
    sigmoid = reader.take(value, "Sigmoid")
    slope = 2 * math.sqrt(2 / math.pi)
    wanted = {1: slope, 3: slope * _CUBIC}
    if sigmoid is None or not reader.is_polynomial(sigmoid.inputs[0], x, wanted):
        return None
    return 0.5, "tanh"
