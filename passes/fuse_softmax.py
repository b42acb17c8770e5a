"""Fuse Softmax and LogSoftmax from their parts.

Why: five kernels over the same tensor become one, which does not overflow either.
Numerics: rounding.
Needs: sums over one axis that is known; below opset 13, the last one.
"""

from __future__ import annotations

from graphopt import ir
from graphopt.passes._layout import reduced_axes
from graphopt.passes._vendor import permutes_around
from graphopt.rewriting import Attribute, Op, Refuse, rewrite


@rewrite.on("Div", "Mul", benefit=5)
def fuse_softmax(op: Op, node: ir.Node) -> ir.Value | None:
    """exp(x - max(x)) / sum(exp(x - max(x))), or without the maximum."""
    for index in (0, 1)[: 1 if node.op_type == "Div" else 2]:
        power, norm = node.inputs[index], node.inputs[1 - index]
        if node.op_type == "Mul":
            inverse = _only(op, norm, "Reciprocal")
            norm = None if inverse is None else inverse.inputs[0]
        total = _only(op, norm, "ReduceSum")
        if power is None or total is None or total.inputs[0] is not power:
            continue
        exponential = power.producer()
        if exponential is None or exponential.op_type != "Exp" or exponential.domain:
            continue
        axis = _axis(op, total, power)
        x = exponential.inputs[0]
        if axis is None or x is None:
            continue
        if op.uses(power) != 2:
            raise Refuse(f"{power.name!r} is used elsewhere")
        if permutes_around(op, x, axis):
            raise Refuse("ONNX Runtime would permute around it, which takes longer")
        return op.Softmax(_without_maximum(op, x, axis), axis=_checked(op, x, axis))
    return None


@rewrite
def fuse_log_softmax(op: Op, x: ir.Value, axis: Attribute) -> ir.Value:
    """The logarithm of a Softmax."""
    return op.Log(op.Softmax(x, axis=axis))


@fuse_log_softmax.replace
def _(op: Op, x: ir.Value, axis: Attribute) -> ir.Value:
    return op.LogSoftmax(x, axis=axis)


@rewrite
def fuse_exp_log_softmax(op: Op, x: ir.Value, axis: Attribute) -> ir.Value:
    """The exponential of a LogSoftmax."""
    return op.Exp(op.LogSoftmax(x, axis=axis))


@fuse_exp_log_softmax.replace
def _(op: Op, x: ir.Value, axis: Attribute) -> ir.Value:
    return op.Softmax(x, axis=axis)


@rewrite.on("Sub", benefit=4)
def fuse_log_sum(op: Op, node: ir.Node) -> ir.Value | None:
    """x - log(sum(exp(x))), x being what is left of a maximum or not."""
    x, norm = node.inputs[0], node.inputs[1]
    total = _only(op, norm, "ReduceLogSumExp")
    if total is None:
        logarithm = _only(op, norm, "Log")
        total = None if logarithm is None else _only(op, logarithm.inputs[0], "ReduceSum")
        power = None if total is None else _only(op, total.inputs[0], "Exp")
        source = None if power is None else power.inputs[0]
    else:
        source = total.inputs[0]
    if total is None or x is None or source is not x:
        return None
    axis = _axis(op, total, x)
    if axis is None:
        return None
    if op.uses(x) == 2:
        x = _without_maximum(op, x, axis)
    return op.LogSoftmax(x, axis=_checked(op, x, axis))


@rewrite.on("Add", benefit=4)
def fuse_log_sum_exp(op: Op, node: ir.Node) -> ir.Value | None:
    """max(x) + log(sum(exp(x - max(x))))."""
    for peak, rest in (node.inputs, node.inputs[::-1]):
        logarithm = _only(op, rest, "Log")
        total = None if logarithm is None else _only(op, logarithm.inputs[0], "ReduceSum")
        power = None if total is None else _only(op, total.inputs[0], "Exp")
        difference = None if power is None else _only(op, power.inputs[0], "Sub")
        maximum = None if peak is None else peak.producer()
        if total is None or difference is None or maximum is None:
            continue
        x = difference.inputs[0]
        if x is None or difference.inputs[1] is not peak or maximum.op_type != "ReduceMax":
            continue
        axis = _axis(op, total, x)
        if maximum.domain or maximum.inputs[0] is not x or axis is None:
            continue
        if _axis(op, maximum, x) != axis:
            continue
        if op.opset >= 18:
            return op.ReduceLogSumExp(x, [axis], keepdims=1)
        return op.ReduceLogSumExp(x, axes=[axis], keepdims=1)
    return None


def _only(op: Op, value: ir.Value | None, op_type: str) -> ir.Node | None:
    """The producer of a value that nothing else uses, if it is of that type."""
    node = None if value is None else value.producer()
    if value is None or node is None or node.op_type != op_type or node.domain:
        return None
    return node if op.uses(value) == 1 else None


def _axis(op: Op, reduction: ir.Node, x: ir.Value) -> int | None:
    """The only axis of a reduction that keeps its dimensions, counted from the front."""
    rank = op.rank(x)
    if rank is None or not op.attr(reduction, "keepdims", 1):
        return None
    axes = reduced_axes(op, reduction, rank)
    return axes[0] if axes is not None and len(axes) == 1 else None


def _checked(op: Op, x: ir.Value, axis: int) -> int:
    if op.opset < 13 and axis + 1 != op.rank(x):
        raise Refuse("needs opset 13 for an axis that is not the last")
    return axis


def _without_maximum(op: Op, x: ir.Value, axis: int) -> ir.Value:
    """What a maximum over the axis is subtracted from, where x is such a difference."""
    difference = x.producer()
    if difference is None or difference.op_type != "Sub" or difference.domain:
        return x
    source, maximum = difference.inputs
    peak = _only(op, maximum, "ReduceMax")
    if source is None or peak is None or peak.inputs[0] is not source:
        return x
    return source if _axis(op, peak, source) == axis else x
