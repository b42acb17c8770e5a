"""Drop bounds, pairs and moves in floating point that a QuantizeLinear makes superfluous.

Why: saturation bounds anyway; a view or a permutation of integers needs no trip through floats.
Numerics: exact.
Needs: constant scales and zero points; the same ones on both sides of what is moved.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from graphopt import ir
from graphopt.rewriting import Op, rewrite

_RANGES = {
    ir.DataType.UINT8: (0, 255),
    ir.DataType.INT8: (-128, 127),
    ir.DataType.UINT16: (0, 65535),
    ir.DataType.INT16: (-32768, 32767),
}
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
    parameters = _parameters(op, node)
    limits = (0.0, np.inf) if bound.op_type == "Relu" else _clip_bounds(op, bound)
    if parameters is None or limits is None or limits[0] > limits[1]:
        return None
    scale, zero, dtype = parameters
    lowest, highest = _RANGES[dtype]
    with np.errstate(over="ignore", invalid="ignore"):
        low = np.rint(np.float32(limits[0]) / scale) + zero
        high = np.rint(np.float32(limits[1]) / scale) + zero
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
    parameters = _parameters(op, node)
    if parameters is None or parameters[0].size != 1:
        return None
    return op.build(move.op_type, [floats.inputs[0], *move.inputs[1:]], move.attributes)[0]


def _same(op: Op, dequantize: ir.Node, quantize: ir.Node) -> bool:
    """Whether a pair is a trip of integers to floats and back without loss."""
    first, second = _parameters(op, dequantize), _parameters(op, quantize)
    if first is None or second is None or first[2] != second[2]:
        return False
    axes = [op.attr(n, "axis", 1) for n in (dequantize, quantize)]
    return (
        np.array_equal(first[0], second[0])
        and np.array_equal(first[1], second[1])
        and (axes[0] == axes[1] or first[0].size == 1)
    )


def _parameters(
    op: Op, node: ir.Node
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64], ir.DataType] | None:
    """(scale, zero point, integer type) where they are constant, the scale being float32."""
    quantized = node.outputs[0] if node.op_type == "QuantizeLinear" else node.inputs[0]
    dtype = None if quantized is None else op.dtype(quantized)
    scale: Any = op.const(node.inputs[1])
    if scale is None or scale.dtype != np.float32 or dtype is None or dtype not in _RANGES:
        return None
    if op.attr(node, "block_size", 0) or not np.all(np.isfinite(scale) & (scale > 0)):
        return None
    given = node.inputs[2] if len(node.inputs) > 2 else None
    if given is None:
        return scale, np.zeros(np.shape(scale), np.int64), dtype
    zero = op.const(given)
    if zero is None:
        return None
    return np.asarray(scale, np.float32), zero.astype(np.int64), dtype


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
