"""Merge chains of Relu, Clip, Min and Max into one Clip, and drop what binds nothing.

Why: a bound on a bound is one bound; two kernels become one.
Numerics: exact.
Needs: bounds that are constant numbers; below opset 12, floats.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from graphopt import ir
from graphopt.passes._ranges import limits, never_negative
from graphopt.rewriting import Op, Refuse, rewrite

_STEPS = 4  # operators above a bound that are asked for their ranges
_BOUNDING = ("Relu", "Clip", "Min", "Max")
_FLOATS = (ir.DataType.FLOAT, ir.DataType.DOUBLE, ir.DataType.FLOAT16)


@dataclass(frozen=True)
class _Bounds:
    """What a chain of bounds does to x: min(max(x, low), high)."""

    low: float
    high: float

    def then(self, other: _Bounds) -> _Bounds:
        """These bounds, then others."""
        return _Bounds(
            min(max(self.low, other.low), other.high), min(max(self.high, other.low), other.high)
        )


@rewrite.on(*_BOUNDING)
def merge_clips(op: Op, node: ir.Node) -> ir.Value | None:
    """Bounds of a value that is bounded already."""
    outer = _bounds(op, node)
    if outer is None:
        return None
    value, bounds = outer
    low, high = limits(op, value, _STEPS)
    if bounds.low <= low and high <= bounds.high:
        return value
    inner = value.producer()
    if inner is None or inner.domain or inner.op_type not in _BOUNDING:
        return None
    found = _bounds(op, inner)
    if found is None:
        return None
    source, first = found
    total = first.then(bounds)
    if total == first:
        return value
    if op.uses(value) != 1:
        raise Refuse(f"{value.name!r} is used elsewhere")
    return _clip(op, source, total)


@rewrite.on("Abs")
def absolute(op: Op, node: ir.Node) -> ir.Value | None:
    """The absolute value of what is never negative."""
    value = node.inputs[0]
    return value if value is not None and never_negative(op, value) else None


@rewrite.on("Max", "Min")
def more_operands(op: Op, node: ir.Node) -> ir.Value | None:
    """The largest of the largest is the largest of all."""
    inputs: list[ir.Value | None] = []
    for value in node.inputs:
        inner = None if value is None else value.producer()
        if value is None or inner is None or inner.op_type != node.op_type or op.opset < 8:
            inputs.append(value)
            continue
        alone = not inner.domain and op.uses(value) == 1
        inputs += inner.inputs if alone else [value]
    if len(inputs) == len(node.inputs):
        return None
    return op.build(node.op_type, list(dict.fromkeys(inputs)))[0]


@rewrite.on("Max")
def maximum_with_zero(op: Op, node: ir.Node) -> ir.Value | None:
    """max(x, 0) is Relu, which runtimes fuse."""
    found = _bounds(op, node)
    if found is None or found[1] != _Bounds(0.0, math.inf) or op.dtype(found[0]) not in _FLOATS:
        return None
    return op.Relu(found[0])


def _bounds(op: Op, node: ir.Node) -> tuple[ir.Value, _Bounds] | None:
    """What is bounded, and by what; None where the bounds are not constant numbers."""
    x = node.inputs[0]
    if node.op_type == "Relu":
        return None if x is None else (x, _Bounds(0.0, math.inf))
    if node.op_type == "Clip":
        bounds = _clip_bounds(op, node)
        return None if x is None or bounds is None or bounds.low > bounds.high else (x, bounds)
    if len(node.inputs) != 2:
        return None
    for index in (0, 1):
        value, limit = node.inputs[index], op.scalar(node.inputs[1 - index])
        if value is None or not isinstance(limit, int | float) or math.isnan(limit):
            continue
        if op.rank(value) is None or op.rank(value) != op.rank(node.outputs[0]):
            continue
        low = node.op_type == "Max"
        return value, _Bounds(limit, math.inf) if low else _Bounds(-math.inf, limit)
    return None


def _clip_bounds(op: Op, node: ir.Node) -> _Bounds | None:
    if op.opset < 11:
        return _Bounds(op.attr(node, "min", -math.inf), op.attr(node, "max", math.inf))
    limits = [-math.inf, math.inf]
    for index, value in enumerate(node.inputs[1:3]):
        if value is not None:
            number = op.scalar(value)
            if not isinstance(number, int | float) or math.isnan(number):
                return None
            limits[index] = number
    return _Bounds(*limits)


def _clip(op: Op, x: ir.Value, bounds: _Bounds) -> ir.Value:
    """One node that bounds x."""
    dtype = op.dtype(x)
    floating = dtype in _FLOATS
    if dtype is None or not (floating or op.opset >= 12):
        raise Refuse("needs opset 12 for integers")
    if floating and (bounds.low, bounds.high) == (0.0, math.inf):
        return op.Relu(x)
    low = bounds.low if bounds.low > -math.inf else None
    high = bounds.high if bounds.high < math.inf else None
    if op.opset < 12 and dtype == ir.DataType.DOUBLE:
        raise Refuse("ONNX Runtime does not have it in double precision before opset 12")
    if op.opset < 11:
        return op.Clip(x, min=low, max=high)
    operands = [
        None if limit is None else op.initializer(np.asarray(limit, dtype.numpy()), hint)
        for limit, hint in ((low, "min"), (high, "max"))
    ]
    while operands and operands[-1] is None:
        operands.pop()
    return op.Clip(x, *operands)
