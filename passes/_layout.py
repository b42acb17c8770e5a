"""How operators look when their tensors' axes are permuted.

`moved(op, node, perm, inputs)` builds the node that computes `Transpose(node, perm)` from inputs
that are permuted already: element-wise operators are the same, those with axes have others.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from graphopt import ir
from graphopt.passes._slices import sliced, spans
from graphopt.rewriting import Op

Perm = list[int]

UNARY = frozenset(
    {
        *("Abs", "Acos", "Acosh", "Asin", "Asinh", "Atan", "Atanh", "BitwiseNot", "Cast", "Ceil"),
        *("Celu", "Cos", "Cosh", "Elu", "Erf", "Exp", "Floor", "Gelu", "HardSigmoid", "HardSwish"),
        *("Identity", "IsInf", "IsNaN", "LeakyRelu", "Log", "Mish", "Neg", "Not", "Reciprocal"),
        *("Relu", "Round", "Selu", "Shrink", "Sigmoid", "Sign", "Sin", "Sinh", "Softplus"),
        *("Softsign", "Sqrt", "Swish", "Tan", "Tanh", "ThresholdedRelu"),
    }
)
"""One tensor in, one of the same shape out, element by element."""

BROADCASTING = frozenset(
    {
        *(
            "Add",
            "And",
            "BitwiseAnd",
            "BitwiseOr",
            "BitwiseXor",
            "BitShift",
            "Clip",
            "Div",
            "Equal",
        ),
        *("Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Max", "Mean", "Min", "Mod", "Mul"),
        *("Or", "PRelu", "Pow", "Sub", "Sum", "Where", "Xor"),
    }
)
"""Element by element over operands that broadcast."""

REDUCTIONS = frozenset(
    {
        *("ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceMax", "ReduceMean"),
        *("ReduceMin", "ReduceProd", "ReduceSum", "ReduceSumSquare"),
    }
)


def permutation(op: Op, node: ir.Node) -> Perm | None:
    """What a Transpose does; None where it reverses a tensor of unknown rank."""
    perm = op.attr(node, "perm")
    if perm is not None:
        return list(perm)
    rank = None if node.inputs[0] is None else op.rank(node.inputs[0])
    return None if rank is None else list(range(rank))[::-1]


def view_permutation(op: Op, node: ir.Node) -> Perm | None:
    """The permutation that a Reshape does of axes of size 1 only; None where it does none."""
    value = node.inputs[0]
    before = None if value is None else op.shape(value)
    after = op.shape(node.outputs[0])
    if before is None or after is None or len(before) != len(after) or before == after:
        return None
    large = [axis for axis, size in enumerate(before) if size != 1]
    small = [axis for axis, size in enumerate(before) if size == 1]
    if [before[axis] for axis in large] != [size for size in after if size != 1]:
        return None
    return [(small if size == 1 else large).pop(0) for size in after]


def composed(first: Perm, second: Perm) -> Perm:
    """The one permutation that does `first`, then `second`."""
    return [first[axis] for axis in second]


def inverted(perm: Perm) -> Perm:
    """The permutation that undoes another."""
    return [perm.index(axis) for axis in range(len(perm))]


def is_identity(perm: Perm) -> bool:
    """Whether a permutation moves nothing."""
    return perm == list(range(len(perm)))


def transposed(op: Op, value: ir.Value, perm: Perm) -> ir.Value:
    """The value with its axes permuted: itself, or a new Transpose."""
    return value if is_identity(perm) else op.Transpose(value, perm=perm)


def reduced_axes(op: Op, node: ir.Node, rank: int) -> list[int] | None:
    """The axes of a reduction as non-negative numbers; None where they are not known."""
    axes = op.attr(node, "axes")
    if len(node.inputs) > 1 and node.inputs[1] is not None:
        known = op.const(node.inputs[1])
        if known is None:
            return None
        axes = known.reshape(-1).tolist()
    if not axes:
        return [] if op.attr(node, "noop_with_empty_axes", 0) else list(range(rank))
    return [axis % rank for axis in axes]


def layout_inputs(op: Op, node: ir.Node, rank: int) -> list[int] | None:
    """Indices of the inputs that a permuted node needs permuted; None where it cannot be.

    `rank` is that of the node's output. Operands of a single element are none of them.
    """
    kind = node.op_type
    if node.domain or len(node.outputs) != 1:
        return None
    if kind in UNARY:
        return [0]
    if kind in BROADCASTING:
        found: list[int] = []
        for index, value in enumerate(node.inputs):
            if value is None or op.size(value) == 1:
                continue
            if op.rank(value) != rank and op.const(value) is None:
                return None
            found.append(index)
        return found
    if kind == "Concat":
        return list(range(len(node.inputs)))
    if kind in ("Softmax", "LogSoftmax"):
        return [0] if op.opset >= 13 else None
    if kind in REDUCTIONS:
        kept = op.attr(node, "keepdims", 1) == 1
        return [0] if kept and reduced_axes(op, node, rank) is not None else None
    if kind == "Pad":
        full = len(node.inputs) < 4 or node.inputs[3] is None
        return [0] if full and _pads(op, node) is not None else None
    if kind == "Slice":
        return None if spans(op, node) is None else [0]
    if kind in ("ArgMax", "ArgMin"):
        return [0] if op.attr(node, "keepdims", 1) == 1 else None
    if kind in ("QuantizeLinear", "DequantizeLinear"):
        scale = node.inputs[1]
        return [0] if scale is not None and op.size(scale) == 1 else None
    return None


def moved(op: Op, node: ir.Node, perm: Perm, inputs: Sequence[ir.Value | None]) -> ir.Value:
    """The node on permuted inputs; only for nodes of which `layout_inputs` says that it can be."""
    kind = node.op_type
    attributes: dict[str, Any] = dict(node.attributes)
    operands: list[Any] = list(inputs)
    if kind in ("Concat", "Softmax", "LogSoftmax"):
        axis = op.attr(node, "axis", -1) % len(perm)
        attributes["axis"] = perm.index(axis)
    elif kind in ("ArgMax", "ArgMin"):
        attributes["axis"] = perm.index(op.attr(node, "axis", 0) % len(perm))
    elif kind == "Slice":
        taken = spans(op, node) or {}
        return sliced(op, operands[0], {perm.index(axis): span for axis, span in taken.items()})
    elif kind in REDUCTIONS:
        axes = reduced_axes(op, node, len(perm)) or []
        new = sorted(perm.index(axis) for axis in axes)
        if "axes" in attributes:
            attributes["axes"] = new
        elif len(operands) > 1 and operands[1] is not None:
            operands[1] = new
    elif kind == "Pad":
        pads = _pads(op, node) or []
        half = len(perm)
        new = [pads[axis] for axis in perm] + [pads[half + axis] for axis in perm]
        if "pads" in attributes:
            attributes["pads"] = new
        else:
            operands[1] = new
    return op.build(kind, operands, attributes)[0]


def moved_constant(op: Op, value: ir.Value, perm: Perm) -> ir.Value | None:
    """A constant with its axes permuted, 1s put before a lower rank; None where it is none."""
    array = op.const(value)
    if array is None or array.ndim > len(perm):
        return None
    if array.size == 1:
        return value
    full = array.reshape((1,) * (len(perm) - array.ndim) + array.shape)
    return op.initializer(np.transpose(full, perm), "transposed")


def _pads(op: Op, node: ir.Node) -> list[int] | None:
    pads: list[int] | None = op.attr(node, "pads")
    if pads is None and len(node.inputs) > 1:
        known = op.const(node.inputs[1])
        pads = None if known is None else known.tolist()
    return pads
