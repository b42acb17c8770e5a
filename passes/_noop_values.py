"""Elementwise operators that give back what they get: neutral operands, pairs, useless casts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from graphopt import ir
from graphopt.rewriting import Op, Rule, rewrite

_COPIES = ("Expand", "Reshape", "Unsqueeze", "Squeeze", "Flatten", "Transpose", "Tile", "Identity")

_NEUTRAL: dict[str, tuple[float, tuple[int, ...]]] = {
    "Add": (0, (0, 1)),
    "Sub": (0, (1,)),
    "Mul": (1, (0, 1)),
    "Div": (1, (1,)),
    "Pow": (1, (1,)),
    "And": (True, (0, 1)),
    "Or": (False, (0, 1)),
    "Xor": (False, (0, 1)),
    "BitwiseOr": (0, (0, 1)),
    "BitwiseXor": (0, (0, 1)),
    "BitShift": (0, (1,)),
    "PRelu": (1, (1,)),
}
"""The number that does nothing, and at which operands."""

_ROUNDINGS = ("Ceil", "Floor", "Round")
_NONNEGATIVE = ("Abs", "Relu", "Sigmoid", "HardSigmoid", "Softmax", "Exp", "Softplus")

_FLOATS: dict[ir.DataType, tuple[int, int, int]] = {
    ir.DataType.FLOAT8E4M3FN: (4, 8, -9),
    ir.DataType.FLOAT8E4M3FNUZ: (4, 7, -10),
    ir.DataType.FLOAT8E5M2: (3, 15, -16),
    ir.DataType.FLOAT8E5M2FNUZ: (3, 15, -17),
    ir.DataType.FLOAT16: (11, 15, -24),
    ir.DataType.BFLOAT16: (8, 127, -133),
    ir.DataType.FLOAT: (24, 127, -149),
    ir.DataType.DOUBLE: (53, 1023, -1074),
}
"""Significant bits, exponent of the largest number, exponent of the smallest one."""

_INFINITE = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.FLOAT, ir.DataType.DOUBLE)


def same_shape(op: Op, a: ir.Value, b: ir.Value) -> bool:
    """Whether two values are proven to have the same shape."""
    shape = op.shape(a)
    return shape is not None and shape == op.shape(b)


def is_uniform(op: Op, value: ir.Value | None, number: float, depth: int = 4) -> bool:
    """Whether every element is known to be a number: a constant, or one that was spread out."""
    tensor = ir.constant(value)
    if tensor is not None:
        if tensor.size == 0 or tensor.dtype == ir.DataType.STRING:
            return False
        array = tensor.numpy()
        return bool(array.flat[0] == number) and bool(np.all(array == number))
    node = None if value is None else value.producer()
    if node is None or node.domain != "":
        return False
    if node.op_type == "ConstantOfShape":
        fill = op.attr(node, "value")
        return number == 0 if fill is None else bool(np.all(fill.numpy() == number))
    return bool(depth and node.op_type in _COPIES) and is_uniform(
        op, node.inputs[0], number, depth - 1
    )


def _keeps_shape(op: Op, node: ir.Node, kept: ir.Value, other: ir.Value) -> bool:
    """Whether an operand decides the result's shape alone."""
    small, large = op.shape(other), op.shape(kept)
    if small == () or same_shape(op, kept, node.outputs[0]):
        return True
    if op.opset < 7:  # broadcasting went one way then
        return kept is node.inputs[0]
    if small is None or large is None or len(small) > len(large):
        return False
    tail = large[len(large) - len(small) :]
    return all(have in (1, want) for have, want in zip(small, tail, strict=True))


@rewrite.on(*_NEUTRAL)
def neutral_operand(op: Op, node: ir.Node) -> ir.Value | None:
    """x + 0, x * 1, x and true, …"""
    number, positions = _NEUTRAL[node.op_type]
    for position in positions:
        other, kept = node.inputs[position], node.inputs[1 - position]
        if other is None or kept is None or ir.constant(kept) is not None:
            continue
        if is_uniform(op, other, number) and _keeps_shape(op, node, kept, other):
            return kept
    return None


@rewrite.on("Neg", "Not", "BitwiseNot")
def undone(op: Op, node: ir.Node) -> ir.Value | None:
    """Neg of Neg, Not of Not."""
    before = _producer(node)
    return before.inputs[0] if before is not None and before.op_type == node.op_type else None


@rewrite.on("Abs", "Relu", "Sign", *_ROUNDINGS)
def done_before(op: Op, node: ir.Node) -> ir.Value | None:
    """Relu of Relu, Floor of Ceil, Abs of Exp, …"""
    before = _producer(node)
    if before is None:
        return None
    if node.op_type in _ROUNDINGS:
        return node.inputs[0] if before.op_type in _ROUNDINGS else None
    if before.op_type == node.op_type:
        return node.inputs[0]
    dtype = op.dtype(node.outputs[0])
    if node.op_type == "Sign" or dtype is None or not dtype.is_floating_point():
        return None
    return node.inputs[0] if before.op_type in _NONNEGATIVE else None


@rewrite.on("Max", "Min", "Sum", "Mean", "And", "Or", "BitwiseAnd", "BitwiseOr")
def one_operand(op: Op, node: ir.Node) -> ir.Value | None:
    """Max, Min, Sum or Mean of one; Max of x and x; a Sum of two is an Add."""
    first = node.inputs[0]
    if node.op_type == "Sum" and len(node.inputs) == 2 and op.opset >= 8:
        return op.Add(*node.inputs)
    if len(node.inputs) == 1:
        return first
    adds = node.op_type in ("Sum", "Mean")
    return None if adds or any(v is not first for v in node.inputs) else first


@rewrite.on("Where")
def known_choice(op: Op, node: ir.Node) -> ir.Value | None:
    """Where with a constant condition, or with twice the same value."""
    condition, yes, no = node.inputs
    for chosen, answer in ((yes, True), (no, False)):
        known = yes is no or is_uniform(op, condition, answer)
        if known and chosen is not None and same_shape(op, chosen, node.outputs[0]):
            return chosen
    return None


@rewrite.on("Clip", "LeakyRelu")
def no_bounds(op: Op, node: ir.Node) -> ir.Value | None:
    """Clip without bounds, LeakyRelu of slope 1.

    Before opset 11 the schema gives a bound that is left out a number of its own.
    """
    if node.op_type == "LeakyRelu":
        return node.inputs[0] if op.attr(node, "alpha", 0.01) == 1 else None
    return node.inputs[0] if op.opset >= 11 and not any(node.inputs[1:]) else None


@rewrite.on("Dropout")
def inference_dropout(op: Op, node: ir.Node) -> Sequence[ir.Value | None] | None:
    """Dropout that drops nothing; a mask that is used becomes a constant where its shape is."""
    data, *rest = node.inputs
    ratio, training = (*rest, None, None)[:2]
    if op.opset < 7 and not op.attr(node, "is_test", 0):
        return None
    if training is not None and op.scalar(training) is not False and op.scalar(ratio) != 0:
        return None
    mask = node.outputs[1] if len(node.outputs) > 1 else None
    if mask is None or not op.uses(mask) or op.dtype(mask) != ir.DataType.BOOL or data is None:
        return [data]
    sizes = [size for size in op.shape(data) or () if isinstance(size, int)]
    if op.rank(data) != len(sizes) or np.prod(sizes, dtype=object) > op.context.fold_bytes:
        return [data]
    return [data, op.initializer(np.ones(sizes, np.bool_), "mask")]


@rewrite.on("CastLike")
def cast_like(op: Op, node: ir.Node) -> ir.Value | None:
    """CastLike of a known type is a Cast, and the tensor that only gave its type is free."""
    data, like = node.inputs
    dtype = None if like is None else op.dtype(like)
    if dtype is None:
        return None
    return op.Cast(data, to=int(dtype), saturate=op.attr(node, "saturate"))


@rewrite.on("Cast")
def useless_cast(op: Op, node: ir.Node) -> ir.Value | None:
    """Cast to the type it has, and a Cast of a Cast that lost nothing."""
    data = node.inputs[0]
    wanted = _target(node)
    if data is None or wanted is None:
        return None
    if op.dtype(data) == wanted:
        return data
    before = _producer(node)
    source = before.inputs[0] if before is not None and before.op_type == "Cast" else None
    if before is None or source is None:
        return None
    first, between = op.dtype(source), _target(before)
    if first is None or between is None or not _lossless(first, between, wanted):
        return None
    if first == wanted:
        return source
    names = ("saturate", "round_mode")
    return op.build("Cast", [source], {"to": int(wanted), **_given(op, node, names)})[0]


def _given(op: Op, node: ir.Node, names: Sequence[str]) -> dict[str, Any]:
    return {name: op.attr(node, name) for name in names if name in node.attributes}


def _target(node: ir.Node) -> ir.DataType | None:
    to = ir.attribute(node, "to")
    return ir.DataType(to) if isinstance(to, int) else None


def _producer(node: ir.Node) -> ir.Node | None:
    """What makes the first input, if it is an operator of ONNX's own domain."""
    value = node.inputs[0]
    before = None if value is None else value.producer()
    return before if before is not None and before.domain == "" else None


def _lossless(first: ir.DataType, between: ir.DataType, last: ir.DataType) -> bool:
    """Whether a Cast between two others changes nothing of what comes out at the end."""
    if last == ir.DataType.STRING or first == ir.DataType.STRING:
        return False
    if last == ir.DataType.BOOL and first.is_integer() and between in _INFINITE:
        return True
    return _represents(between, first)


def _represents(wide: ir.DataType, narrow: ir.DataType) -> bool:
    """Whether a type has every value of another one."""
    if wide == narrow or (narrow == ir.DataType.BOOL and (wide.is_integer() or wide in _FLOATS)):
        return True
    if narrow in _FLOATS and wide in _INFINITE:
        digits, top, bottom = _FLOATS[wide]
        return (
            digits >= _FLOATS[narrow][0]
            and top >= _FLOATS[narrow][1]
            and bottom <= _FLOATS[narrow][2]
        )
    if not narrow.is_integer():
        return False
    bits = narrow.bitwidth - narrow.is_signed()
    if wide in _INFINITE:
        return bits <= _FLOATS[wide][0]
    if not wide.is_integer() or narrow.is_signed() > wide.is_signed():
        return False
    return bits <= wide.bitwidth - wide.is_signed()


RULES: tuple[Rule, ...] = (
    neutral_operand,
    undone,
    done_before,
    one_operand,
    known_choice,
    no_bounds,
    inference_dropout,
    cast_like,
    useless_cast,
)
