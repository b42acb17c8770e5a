"""Drop bounds, pairs and moves in floating point that a QuantizeLinear makes superfluous.

Why: saturation bounds anyway; a view or a permutation of integers needs no trip through floats.
Numerics: exact.
Needs: constant scales and zero points; the same ones on both sides of what is moved.
"""

from __future__ import annotations

import numpy as np

from graphopt import ir
from graphopt.passes._quantized import RANGES, parameters
from graphopt.rewriting import Op, rewrite

_MOVING = frozenset({"Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten"})


@rewrite.on("QuantizeLinear")
def drop_clip_before_quantize(op: Op, node: ir.Node) -> ir.Value | None:
    """A Relu or Clip whose bounds are those at which the integers saturate."""
    value = node.inputs[0]
    bound = None if value is None else value.producer()
    if value is None or bound is None or bound.domain or op.uses(value) != 1:
        return None
    if bound.op_type not in ("Relu", "Clip"):
        return None
    known = parameters(op, node)
    limits = (0.0, np.inf) if bound.op_type == "Relu" else _clip_bounds(op, bound)
    if known is None or limits is None or limits[0] > limits[1]:
        return None
    lowest, highest = RANGES[known.dtype]
    with np.errstate(over="ignore", invalid="ignore"):
        low = np.rint(np.float32(limits[0]) / known.scale) + known.zero
        high = np.rint(np.float32(limits[1]) / known.scale) + known.zero
    if np.all(low <= lowest) and np.all(high >= highest):
        return op.build("QuantizeLinear", [bound.inputs[0], *node.inputs[1:]], node.attributes)[0]
    return None


@rewrite.on("QuantizeLinear", benefit=3)
def quantize_what_was_quantized(op: Op, node: ir.Node) -> ir.Value | None:
    """Integers as floats and back with the same scale, moved or not."""
    value = node.inputs[0]
    move = None if value is None else value.producer()
    if value is None or move is None or move.domain:
        return None
    if move.op_type == "DequantizeLinear":
        return move.inputs[0] if _same(op, move, node) else None
    source = move.inputs[0] if move.op_type in _MOVING and op.uses(value) == 1 else None
    floats = None if source is None else source.producer()
    if floats is None or floats.op_type != "DequantizeLinear" or floats.domain:
        return None
    if not _same(op, floats, node) or op.opset < 13:
        return None
    known = parameters(op, node)
    if known is None or known.scale.size != 1:
        return None
    return op.build(move.op_type, [floats.inputs[0], *move.inputs[1:]], move.attributes)[0]


def _same(op: Op, dequantize: ir.Node, quantize: ir.Node) -> bool:
    """Whether a pair is a trip of integers to floats and back without loss."""
    first, second = parameters(op, dequantize), parameters(op, quantize)
    return first is not None and second is not None and first.same(second)


def _clip_bounds(op: Op, node: ir.Node) -> tuple[float, float] | None:
    low, high = op.attr(node, "min", -np.inf), op.attr(node, "max", np.inf)
    if op.opset >= 11:
        limits = [-np.inf, np.inf]
        for index, value in enumerate(node.inputs[1:3]):
            if value is not None:
                number = op.scalar(value)
                if not isinstance(number, float):
                    return None
                limits[index] = number
        low, high = limits
    return float(low), float(high)
