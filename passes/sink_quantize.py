"""Move DequantizeLinear down and QuantizeLinear up across operators that only move data.

Why: what is moved is a quarter of the size in integers, and the pair comes to stand at the operator
that computes, where runtimes look for it to take an integer kernel.
Numerics: exact.
Needs: opset 13, 8-bit integers, one scale and zero point for the whole tensor (an axis of them only
across Transpose); nothing else may use the floats in between. Operands of a Concat need the same.
"""

from __future__ import annotations

from typing import cast

import numpy as np

from graphopt import ir
from graphopt.passes._quantized import Parameters, parameters
from graphopt.rewriting import Op, rewrite

_BYTES = (ir.DataType.INT8, ir.DataType.UINT8)
_VIEWS = ("Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten")
_SMALLER = ("Slice", "Gather", "MaxPool")
_LARGER = ("Expand", "Tile")
_OPSET = 13


@rewrite.on(*_VIEWS, *_SMALLER)
def sink_dequantize(op: Op, node: ir.Node) -> ir.Value | None:
    """A move of dequantized integers: the move of the integers, then dequantized."""
    value = node.inputs[0]
    floats = _single(op, value, "DequantizeLinear")
    if floats is None or len(node.outputs) > 1 or op.opset < _OPSET:
        return None
    known = parameters(op, floats)
    if known is None or known.dtype not in _BYTES:
        return None
    attributes = dict(floats.attributes)
    if known.scale.size > 1:
        axis = _axis_after(op, node, floats)
        if axis is None:
            return None
        attributes["axis"] = ir.Attr("axis", ir.AttributeType.INT, axis)
    made = op.build(node.op_type, [floats.inputs[0], *node.inputs[1:]], node.attributes)[0]
    return op.build("DequantizeLinear", [made, *floats.inputs[1:]], attributes)[0]


@rewrite.on("QuantizeLinear")
def lift_quantize(op: Op, node: ir.Node) -> ir.Value | None:
    """A move whose result is quantized: what is moved is quantized, and the integers are moved."""
    value = node.inputs[0]
    move = _single(op, value, *_VIEWS, *_LARGER, "MaxPool")
    if move is None or len(move.outputs) > 1 or op.opset < _OPSET:
        return None
    known = parameters(op, node)
    if known is None or known.dtype not in _BYTES or known.scale.size > 1:
        return None
    source = move.inputs[0]
    if source is None or ir.constant(source) is not None:
        return None
    made = op.build("QuantizeLinear", [source, *node.inputs[1:]], node.attributes)[0]
    return op.build(move.op_type, [made, *move.inputs[1:]], move.attributes)[0]


@rewrite.on("Concat", benefit=2)
def sink_dequantize_concat(op: Op, node: ir.Node) -> ir.Value | None:
    """A Concat of integers that are dequantized alike."""
    found: list[tuple[ir.Node, Parameters]] = []
    for value in node.inputs:
        floats = _single(op, value, "DequantizeLinear")
        known = None if floats is None else parameters(op, floats)
        if floats is None or known is None or known.scale.size > 1 or known.dtype not in _BYTES:
            return None
        found.append((floats, known))
    if len(found) < 2 or op.opset < _OPSET:
        return None
    first = found[0][1]
    if not all(first.same(known) for _, known in found):
        return None
    made = op.build("Concat", [floats.inputs[0] for floats, _ in found], node.attributes)[0]
    pair = found[0][0]
    return op.build("DequantizeLinear", [made, *pair.inputs[1:]], pair.attributes)[0]


def _single(op: Op, value: ir.Value | None, *op_types: str) -> ir.Node | None:
    """The node of one of these types that makes a value which nothing else uses."""
    node = None if value is None else value.producer()
    if value is None or node is None or node.domain or node.op_type not in op_types:
        return None
    return node if op.uses(value) == 1 else None


def _axis_after(op: Op, node: ir.Node, floats: ir.Node) -> int | None:
    """Where the axis of the scales is after a Transpose; None for other moves."""
    rank = op.rank(node.outputs[0])
    if node.op_type != "Transpose" or rank is None:
        return None
    perm = cast("tuple[int, ...]", op.attr(node, "perm", tuple(reversed(range(rank)))))
    axis = int(op.attr(floats, "axis", 1))
    return int(np.argmax(np.asarray(perm) == axis % rank))
