"""Fold additions and multiplications by constants into the linear operator beside them.

Why: a scale or shift per channel costs a pass over the tensor, in the weights it costs nothing.
Numerics: rounding.
Needs: constant weights (for a shift after it, a constant bias or none); before a Conv, a shift
needs that it has no padding.
"""

from __future__ import annotations

import numpy as np

from graphopt import ir
from graphopt.passes._linear import (
    LINEAR,
    Floats,
    along,
    channel_axis,
    channels,
    floats,
    input_channels,
    linear_producer,
    narrowed,
    prescaled,
    rescaled,
)
from graphopt.rewriting import Op, Refuse, rewrite

_AFFINE = ("Add", "Sub", "Mul", "Div")


@rewrite.on(*_AFFINE)
def fuse_conv_affine(op: Op, node: ir.Node) -> ir.Value | None:
    """Fold an operation into the linear operator before it."""
    for index in (0, 1):
        producer = linear_producer(op, node.inputs[index])
        operand = floats(op, node.inputs[1 - index])
        if producer is None or operand is None or _constant_result(producer):
            continue
        axis, count = channel_axis(op, producer), channels(op, producer)
        rank = op.rank(producer.outputs[0])
        if axis is None or count is None or rank is None:
            raise Refuse("its number of channels is unknown")
        values = along(operand, rank, axis, count)
        if values is None:
            raise Refuse("the operand varies along other axes than the channels")
        factors = _factors(node.op_type, values, swapped=index == 1)
        if factors is None or (producer.op_type == "MatMul" and factors[1] is not None):
            return None
        return rescaled(op, producer, *factors)
    return None


@rewrite.on("Neg")
def fuse_conv_negation(op: Op, node: ir.Node) -> ir.Value | None:
    """Fold a change of sign into the linear operator before it."""
    producer = linear_producer(op, node.inputs[0])
    count = None if producer is None else channels(op, producer)
    if producer is None or count is None or floats(op, producer.inputs[1]) is None:
        return None
    return rescaled(op, producer, np.full(count, -1.0), None)


@rewrite.on("Mul", "Div")
def fuse_layer_scale(op: Op, node: ir.Node) -> ir.Value | None:
    """Fold a scale of each column into the product of matrices before an addition."""
    for index in (0, 1)[: 2 if node.op_type == "Mul" else 1]:
        total, operand = node.inputs[index], floats(op, node.inputs[1 - index])
        addition = None if total is None else total.producer()
        if total is None or operand is None or addition is None or addition.op_type != "Add":
            continue
        if addition.domain or op.uses(total) != 1 or operand.size == 1:
            continue
        for place in (0, 1):
            product = linear_producer(op, addition.inputs[place])
            shift = floats(op, addition.inputs[1 - place])
            if product is None or product.op_type != "MatMul" or shift is None:
                continue
            axis, count, rank = channel_axis(op, product), channels(op, product), op.rank(total)
            if axis is None or count is None or rank is None:
                return None
            if rank != op.rank(product.outputs[0]):
                return None
            each = along(operand, rank, axis, count)
            if each is None or along(shift, rank, axis, count) is None:
                return None
            scale = each if node.op_type == "Mul" else _inverse(each)
            scaled = narrowed(shift.reshape(-1) * scale, op.dtype(total))
            return op.Add(rescaled(op, product, scale, None), op.initializer(scaled))
    return None


def _inverse(values: Floats) -> Floats:
    if np.any(values == 0):
        raise Refuse("it divides by zero")
    return 1 / values


@rewrite.on(*sorted(LINEAR))
def fuse_affine_conv(op: Op, node: ir.Node) -> ir.Value | None:
    """Fold an operation into the linear operator after it."""
    value = node.inputs[0]
    before = None if value is None else value.producer()
    if value is None or before is None or before.op_type not in _AFFINE or before.domain:
        return None
    place = input_channels(op, node)
    if place is None or op.uses(value) != 1:
        return None
    for index in (0, 1):
        source, operand = before.inputs[index], floats(op, before.inputs[1 - index])
        if source is None or operand is None or op.shape(source) != op.shape(value):
            continue
        values = along(operand, op.rank(source) or 0, *place)
        if values is None:
            continue
        if _is_curve(source):
            raise Refuse("it is the last factor of a GELU, which runtimes fuse as it stands")
        if values.size > 1 and _is_normalized(source):
            raise Refuse("it is the scale of a normalization, which runtimes fuse as it stands")
        factors = _factors(before.op_type, values, swapped=index == 1)
        if factors is None or (node.op_type == "MatMul" and factors[1] is not None):
            return None
        scale, shift = factors
        ones, zeros = np.ones(place[1]), np.zeros(place[1])
        return prescaled(
            op, node, source, ones if scale is None else scale, zeros if shift is None else shift
        )
    return None


def _is_curve(value: ir.Value) -> bool:
    """Whether a value is x * (1 + erf(...)) or x * (1 + tanh(...))."""
    product = value.producer()
    if product is None or product.op_type != "Mul":
        return False
    sums = [v.producer() for v in product.inputs if v is not None]
    return any(
        n is not None
        and n.op_type == "Add"
        and any(v is not None and _made_by(v, "Erf", "Tanh") for v in n.inputs)
        for n in sums
    )


def _is_normalized(value: ir.Value) -> bool:
    """Whether a value is x / sqrt(...)."""
    quotient = value.producer()
    if quotient is None or quotient.op_type != "Div":
        return False
    divisor = quotient.inputs[1]
    return divisor is not None and _made_by(divisor, "Sqrt")


def _made_by(value: ir.Value, *op_types: str) -> bool:
    node = value.producer()
    return node is not None and node.op_type in op_types


def _constant_result(node: ir.Node) -> bool:
    return all(value is None or ir.constant(value) is not None for value in node.inputs)


def _factors(
    op_type: str, values: Floats, *, swapped: bool
) -> tuple[Floats | None, Floats | None] | None:
    """(scale, shift) that `x OP values` (swapped: `values OP x`) applies to x; None if neither."""
    if not np.all(np.isfinite(values)):
        raise Refuse("the constant is not finite")
    if op_type == "Add":
        return None, values
    if op_type == "Mul":
        return values, None
    if op_type == "Sub":
        return (np.full(values.shape, -1.0), values) if swapped else (None, -values)
    if swapped:
        return None
    return _inverse(values), None
