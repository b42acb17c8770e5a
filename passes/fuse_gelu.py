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
    total = reader.take(value, "Add")
    if total is None:
        return None
    for curve, constant in (total.inputs, reversed(total.inputs)):
        height = reader.number(constant)
        if height is None:
            continue
        factor, tensors = reader.factors(curve)
        if len(tensors) != 1 or not reader.near(factor, height, None):
            continue
        function = reader.take(tensors[0], "Erf", "Tanh")
        if function is None:
            continue
        inner = function.inputs[0]
        if function.op_type == "Erf":
            found = reader.is_polynomial(inner, x, {1: math.sqrt(0.5)})
            return (height, None) if found else None
        slope = math.sqrt(2 / math.pi)
        found = reader.is_polynomial(inner, x, {1: slope, 3: slope * _CUBIC})
        return (height, "tanh") if found else None
    return None
