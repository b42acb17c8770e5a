"""Take Neg, Not, Abs and simple powers into the operators around them, or write them cheaper.

Why: a kernel goes, or a power, which takes ten times as long, becomes a product.
Numerics: exact, up to the sign of zeros.
Needs: nothing else may use what goes.
"""

from __future__ import annotations

import numpy as np

from graphopt import ir
from graphopt.rewriting import Op, Refuse, rewrite

_OPPOSITES = {
    "Less": "GreaterOrEqual",
    "LessOrEqual": "Greater",
    "Greater": "LessOrEqual",
    "GreaterOrEqual": "Less",
}
_COMPARED = (ir.DataType.INT32, ir.DataType.INT64)
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
        if source is None or array is None or not _is_float(op, source):
            continue
        inputs: list[ir.Value] = [source, op.initializer(np.negative(array.astype(array.dtype)))]
        return op.build(node.op_type, inputs if index == 0 else inputs[::-1])[0]
    return None


@rewrite.on("Neg")
def negated_difference(op: Op, node: ir.Node) -> ir.Value | None:
    """-(a - b) is b - a; -(x c) and -(x / c) take the sign into the constant."""
    value = node.inputs[0]
    for kind in ("Sub", "Mul", "Div"):
        if op.opset < 7 or value is None or _inner(op, value, kind) is None:
            continue
        inner = value.producer()
        first, second = (None, None) if inner is None else inner.inputs
        if kind == "Sub":
            return op.Sub(second, first)
        for index, operand in enumerate((first, second)):
            array = op.const(operand)
            if array is not None and _is_float(op, value) and not _taken_up(node):
                inputs: list[ir.Value | None] = [first, second]
                inputs[index] = op.initializer(np.negative(array))
                return op.build(kind, inputs)[0]
    return None


def _is_float(op: Op, value: ir.Value) -> bool:
    dtype = op.dtype(value)
    return dtype is not None and dtype.is_floating_point()


def _taken_up(node: ir.Node) -> bool:
    """Whether the sign goes anyway: into a sum, or with that of another factor."""
    return any(
        user.op_type in ("Add", "Sub")
        or any(
            (maker := value.producer()) is not None and maker is not node and maker.op_type == "Neg"
            for value in user.inputs
            if value is not None
        )
        for user in node.outputs[0].consumers()
    )


@rewrite.on("Abs", "Cos", "Cosh")
def even_function(op: Op, node: ir.Node) -> ir.Value | None:
    """The sign of x does not matter to |x|, cos(x) and cosh(x)."""
    value = node.inputs[0]
    source = _inner(op, value, "Neg")
    if source is None and node.op_type != "Abs":
        source = _inner(op, value, "Abs")
    return None if source is None else op.build(node.op_type, [source])[0]


@rewrite.on("Mul")
def squared_sign(op: Op, node: ir.Node) -> ir.Value | None:
    """|x| |x| is x x."""
    value = node.inputs[0]
    maker = None if value is None else value.producer()
    if value is None or maker is None or value is not node.inputs[1] or op.uses(value) != 2:
        return None
    if maker.op_type not in ("Abs", "Neg") or maker.domain:
        return None
    return op.Mul(maker.inputs[0], maker.inputs[0])


@rewrite.on("Not")
def negated_comparison(op: Op, node: ir.Node) -> ir.Value | None:
    """Not a < b is a >= b for integers; a NaN is neither."""
    value = node.inputs[0]
    for kind, other in _OPPOSITES.items():
        inner = None if _inner(op, value, kind) is None or value is None else value.producer()
        if inner is None or inner.inputs[0] is None or op.opset < 12:
            continue
        dtype = op.dtype(inner.inputs[0])
        return op.build(other, inner.inputs)[0] if dtype in _COMPARED else None
    return None


@rewrite.on("Or")
def comparison_or_equal(op: Op, node: ir.Node) -> ir.Value | None:
    """a < b or a = b is a <= b."""
    for first, second in (node.inputs, node.inputs[::-1]):
        equal = None if second is None or op.uses(second) != 1 else second.producer()
        if equal is None or equal.op_type != "Equal" or equal.domain or op.opset < 12:
            continue
        for kind in ("Less", "Greater"):
            if first is None or _inner(op, first, kind) is None:
                continue
            strict, left = first.producer(), equal.inputs[0]
            known = left is not None and op.dtype(left) in (*_FLOATS, *_COMPARED)
            if strict is not None and known and {*strict.inputs} == {*equal.inputs}:
                return op.build(f"{kind}OrEqual", strict.inputs)[0]
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
    short = dtype == ir.DataType.BFLOAT16 and op.opset >= 13
    if x is None or not (short or dtype in _FLOATS) or op.shape(x) != op.shape(node.outputs[0]):
        return None
    if exponent not in (2, -1, 0.5) or ir.constant(x) is not None:
        return None
    users = [user.op_type for user in node.outputs[0].consumers()]
    if exponent == 2:
        if any(kind in ("ReduceMean", "ReduceSum") for kind in users):
            raise Refuse("runtimes fuse it as a part of a normalization")
        return op.Mul(x, x)
    return op.Reciprocal(x) if exponent == -1 else op.Sqrt(x)
