"""Take Neg, Not and simple powers into the operators around them, or write them more cheaply.

Why: a kernel goes, or a power, which takes ten times as long, becomes a product.
Numerics: exact, up to the sign of zeros.
Needs: nothing else may use what goes.
"""

from __future__ import annotations

import numpy as np

from graphopt import ir
from graphopt.rewriting import Op, Refuse, rewrite

_FLOATS = (ir.DataType.FLOAT, ir.DataType.DOUBLE, ir.DataType.FLOAT16)


def _inner(op: Op, value: ir.Value | None, op_type: str) -> ir.Value | None:
    """The operand of an operator whose result nothing else uses."""
    node = None if value is None else value.producer()
    if value is None or node is None or node.op_type != op_type or node.domain:
        return None
    return node.inputs[0] if op.uses(value) == 1 else None


@rewrite.on("Add", "Sub")
def negated_term(op: Op, node: ir.Node) -> ir.Value | None:
    """a + (-b) is a - b, a - (-b) is a + b."""
    if op.opset < 7:
        return None
    first, second = node.inputs
    source = _inner(op, second, "Neg")
    if source is not None:
        return op.Sub(first, source) if node.op_type == "Add" else op.Add(first, source)
    source = _inner(op, first, "Neg") if node.op_type == "Add" else None
    return None if source is None else op.Sub(second, source)


@rewrite.on("Mul", "Div")
def negated_factor(op: Op, node: ir.Node) -> ir.Value | None:
    """(-a) c is a (-c), for a constant; (-a) (-b) is a b."""
    first, second = node.inputs
    if op.opset < 7 or first is None or second is None:
        return None
    sources = [_inner(op, v, "Neg") for v in (first, second)]
    if sources[0] is not None and sources[1] is not None:
        return op.build(node.op_type, sources)[0]
    for index, source in enumerate(sources):
        array = op.const((first, second)[1 - index])
        if source is None or array is None or array.dtype.kind != "f":
            continue
        inputs: list[ir.Value] = [source, op.initializer(np.negative(array.astype(array.dtype)))]
        return op.build(node.op_type, inputs if index == 0 else inputs[::-1])[0]
    return None


@rewrite.on("Where")
def negated_condition(op: Op, node: ir.Node) -> ir.Value | None:
    """What is chosen where not c is what is not chosen where c."""
    condition, chosen, other = node.inputs
    maker = None if condition is None else condition.producer()
    if maker is None or maker.op_type != "Not" or maker.domain:
        return None
    return op.Where(maker.inputs[0], other, chosen)


@rewrite.on("Pow")
def simple_power(op: Op, node: ir.Node) -> ir.Value | None:
    """The square is a product, the power -1 a Reciprocal, the power 1/2 a Sqrt."""
    x, power = node.inputs
    exponent, dtype = op.scalar(power), None if x is None else op.dtype(x)
    if x is None or dtype not in _FLOATS or op.shape(x) != op.shape(node.outputs[0]):
        return None
    if exponent not in (2, -1, 0.5) or ir.constant(x) is not None:
        return None
    users = [user.op_type for user in node.outputs[0].consumers()]
    if exponent == 2:
        if any(kind in ("ReduceMean", "ReduceSum") for kind in users):
            raise Refuse("runtimes fuse it as a part of a normalization")
        return op.Mul(x, x)
    return op.Reciprocal(x) if exponent == -1 else op.Sqrt(x)
