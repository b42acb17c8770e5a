"""Write quantization that TensorRT does not know as arithmetic in floats.

Why: it takes signed integers and 8-bit floats around zero only; biases in int32, zero points other
than 0 and unsigned integers stop it, or saturate where the model does not.
Numerics: rounding.
Needs: constant float32 scales and constant zero points.
"""

from __future__ import annotations

import numpy as np

from graphopt import ir
from graphopt.rewriting import Op, Refuse, rewrite

_KNOWN = frozenset({"INT8", "INT4", "FLOAT8E4M3FN", "FLOAT4E2M1"})
_MOVES = ("Flatten", "Reshape", "Squeeze", "Transpose", "Unsqueeze")
_INTEGERS = frozenset({"INT8", "UINT8", "INT16", "UINT16", "INT32", "INT4", "UINT4"})


@rewrite.on("DequantizeLinear")
def convert_dequantize(op: Op, node: ir.Node) -> ir.Value | None:
    """DequantizeLinear(x, s, z) -> (x - z) s, a constant where x is one."""
    x = node.inputs[0]
    kind = None if x is None else op.dtype(x)
    if x is None or kind is None or _is_known(op, node, kind):
        return None
    scale, zero = _parameters(op, node, kind)
    constant = op.const(x)
    if constant is not None:
        scale, zero = (_spread(op, node, a, constant.shape) for a in (scale, zero))
        whole: ir.Array = np.subtract(constant.astype(np.int64), zero)
        floats: ir.Array = np.multiply(whole.astype(np.float32), scale)
        return op.initializer(floats.astype(np.float32), "dequantized")
    if op.attr(node, "block_size", 0):
        raise Refuse("it is blocked and not constant")
    floats_of = _before_cast(op, x)
    if floats_of is None:
        floats_of = op.Cast(x, to=int(ir.DataType.FLOAT))
    scale, zero = (_broadcast(op, node, a, x) for a in (scale, zero))
    if zero.any():
        floats_of = op.Sub(floats_of, zero.astype(np.float32))
    return op.Mul(floats_of, scale)


@rewrite.on("QuantizeLinear")
def convert_quantize(op: Op, node: ir.Node) -> ir.Value | None:
    """QuantizeLinear(x, s, z) -> Cast(Clip(Round(x / s) + z))."""
    x, kind = node.inputs[0], op.dtype(node.outputs[0])
    if x is None or kind is None or _is_known(op, node, kind):
        return None
    if op.dtype(x) != ir.DataType.FLOAT:
        raise Refuse("what it quantizes is not float32")
    if op.attr(node, "block_size", 0):
        raise Refuse("it is blocked and not constant")
    scale, zero = _parameters(op, node, kind)
    scale, zero = (_broadcast(op, node, a, x) for a in (scale, zero))
    low, high = _range(kind)
    value = op.Round(op.Div(x, scale))
    if zero.any():
        value = op.Add(value, zero.astype(np.float32))
    return op.Cast(op.Clip(value, float(low), float(high)), to=int(kind))


@rewrite.on(*_MOVES)
def move_floats(op: Op, node: ir.Node) -> ir.Value | None:
    """Reshape(x) -> Cast(Reshape(Cast(x))) for bytes that are only moved: TensorRT moves none."""
    x = node.inputs[0]
    kind = None if x is None else op.dtype(x)
    if x is None or kind is None or kind.name not in ("UINT8", "UINT16", "INT16"):
        return None
    floats = _before_cast(op, x)
    if floats is None:
        floats = op.Cast(x, to=int(ir.DataType.FLOAT))
    moved = op.build(node.op_type, [floats, *node.inputs[1:]], node.attributes)[0]
    return op.Cast(moved, to=int(kind))


def _is_known(op: Op, node: ir.Node, kind: ir.DataType) -> bool:
    """Whether TensorRT takes it as it is."""
    if kind.name not in _KNOWN:
        return kind.name not in _INTEGERS  # what else there is, is not written as arithmetic
    zero = node.inputs[2] if len(node.inputs) > 2 else None
    array = op.const(zero)
    return zero is None or (array is not None and not np.asarray(array, np.float32).any())


def _parameters(op: Op, node: ir.Node, kind: ir.DataType) -> tuple[ir.Array, ir.Array]:
    """Scale (float32) and zero point (int64)."""
    scale = op.const(node.inputs[1])
    given = node.inputs[2] if len(node.inputs) > 2 else None
    zero = op.const(given)
    if scale is None or (given is not None and zero is None):
        raise Refuse("its scale or zero point is not constant")
    if scale.dtype != np.float32:
        raise Refuse("its scale is not float32")
    if zero is None:
        zero = np.zeros(scale.shape, np.int64)
    return scale, zero.astype(np.int64)


def _spread(op: Op, node: ir.Node, array: ir.Array, shape: tuple[int, ...]) -> ir.Array:
    """Scales of an axis, or of blocks along it, in a form that broadcasts to a shape."""
    axis: int = op.attr(node, "axis", 1)
    block: int = op.attr(node, "block_size", 0)
    if array.size == 1:
        return array.reshape(())
    if block:
        repeated: ir.Array = np.repeat(array, block, axis)
        return repeated.take(np.arange(shape[axis]), axis)
    sizes = [1] * len(shape)
    sizes[axis] = -1
    return array.reshape(sizes)


def _broadcast(op: Op, node: ir.Node, array: ir.Array, value: ir.Value) -> ir.Array:
    """The same for a value of which at least the rank is known."""
    rank = 0 if array.size == 1 else op.rank(value)
    if rank is None:
        raise Refuse("its rank is not known")
    return _spread(op, node, array, (1,) * rank)


def _before_cast(op: Op, value: ir.Value) -> ir.Value | None:
    """The floats that this pass made integers of: they are whole and within range."""
    cast = value.producer()
    kind = op.dtype(value)
    source = None if cast is None or cast.op_type != "Cast" or cast.domain else cast.inputs[0]
    if source is None or kind is None or kind.name not in _INTEGERS:
        return None
    maker = source.producer()
    while maker is not None and maker.op_type in _MOVES and maker.inputs[0] is not None:
        maker = maker.inputs[0].producer()
    if maker is None or maker.domain or maker.inputs[0] is None:
        return None
    if maker.op_type == "Cast":
        return source if op.dtype(maker.inputs[0]) == kind else None
    if maker.op_type != "Clip" or len(maker.inputs) < 3:
        return None
    bounds = tuple(op.scalar(bound) for bound in maker.inputs[1:3])
    rounded = maker.inputs[0].producer()
    if rounded is not None and rounded.op_type == "Add" and rounded.inputs[0] is not None:
        zero = op.const(rounded.inputs[1])
        if zero is None or np.any(zero != np.rint(zero)):
            return None
        rounded = rounded.inputs[0].producer()
    if rounded is None or rounded.op_type != "Round":
        return None
    return source if bounds == tuple(map(float, _range(kind))) else None


def _range(kind: ir.DataType) -> tuple[int, int]:
    """The least and the greatest number of an integer type."""
    bits = int(kind.name.lstrip("UINT"))
    return (0, (1 << bits) - 1) if kind.name[0] == "U" else (-(1 << bits - 1), (1 << bits - 1) - 1)
