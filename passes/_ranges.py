"""What is known of the numbers in a tensor from the operator that makes it."""

from __future__ import annotations

from graphopt import ir
from graphopt.rewriting import Op

_NOT_NEGATIVE = frozenset({"Relu", "Sigmoid", "Softmax", "Exp", "Abs", "Sqrt", "HardSigmoid"})
_PASSING = frozenset(
    {
        *("Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose", "Identity", "Slice", "Gather"),
        *("MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool", "Expand", "Tile"),
    }
)
"""Operators whose result holds nothing but numbers of, or averages over, their first operand."""

_DEPTH = 8


def never_negative(op: Op, value: ir.Value, depth: int = _DEPTH) -> bool:
    """Whether no element of a tensor can be below 0 (NaN apart)."""
    node = value.producer()
    if node is None or node.domain or not depth:
        return False
    if node.op_type in _NOT_NEGATIVE:
        return True
    if node.op_type == "Clip":
        low = op.attr(node, "min")
        if len(node.inputs) > 1 and node.inputs[1] is not None:
            low = op.scalar(node.inputs[1])
        return low is not None and low >= 0
    if node.op_type in _PASSING:
        inputs = node.inputs[:1]
    elif node.op_type in ("Concat", "Add", "Mul", "Min"):
        inputs = node.inputs
    else:
        return False
    return all(v is not None and never_negative(op, v, depth - 1) for v in inputs)
