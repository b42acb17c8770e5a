"""Omit initial states of recurrent layers that are all zero.

Why: exporters compute a tensor of zeros of the batch's size, five to ten nodes of shape
arithmetic; an omitted state is zero by the operator's definition.
Numerics: exact.
Needs: nothing.
"""

from __future__ import annotations

import numpy as np

from graphopt import ir
from graphopt.rewriting import Op, rewrite

_SHAPING = frozenset(
    ["Cast", "Expand", "Gather", "Reshape", "Slice", "Squeeze", "Tile", "Transpose", "Unsqueeze"]
)
"""Operators whose output holds elements of their first input only."""

_STATES = {"GRU": (5,), "LSTM": (5, 6), "RNN": (5,)}
_MOST_ELEMENTS = 1 << 20


def is_zero(op: Op, value: ir.Value) -> bool:
    """Whether every element of a value is zero, whatever its shape."""
    while True:
        constant = ir.constant(value)
        if constant is not None:
            return constant.size <= _MOST_ELEMENTS and not np.any(constant.numpy())
        node = value.producer()
        if node is None or node.domain:
            return False
        if node.op_type == "ConstantOfShape":
            fill = node.attributes.get("value")
            return fill is None or (not fill.is_ref() and not np.any(fill.as_tensor().numpy()))
        if node.op_type == "Concat":
            return all(v is not None and is_zero(op, v) for v in node.inputs)
        first = node.inputs[0] if node.op_type in _SHAPING else None
        if first is None:
            return False
        value = first


@rewrite.on("GRU", "LSTM", "RNN")
def eliminate_zero_state(op: Op, node: ir.Node) -> list[ir.Value | None] | None:
    """Rebuild the layer without the states that are zero."""
    inputs = list(node.inputs)
    for index in _STATES[node.op_type]:
        state = inputs[index] if index < len(inputs) else None
        if state is not None and is_zero(op, state):
            inputs[index] = None
    if inputs == list(node.inputs):
        return None
    while inputs[-1] is None:
        inputs.pop()
    outputs = op.build(node.op_type, inputs, node.attributes, outputs=len(node.outputs))
    return list(outputs)
