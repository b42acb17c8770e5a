"""Give a bound between convolutions a convolution of its own, which multiplies by one.

Why: ONNX Runtime clips within a convolution of its blocked layout, but a Max or Min by itself has
to leave that layout and return to it: three passes over the tensor in place of one.
Numerics: exact.
Needs: ONNX Runtime's CPU on x86, float, a bound between operators of the blocked layout.
"""

from __future__ import annotations

import numpy as np

from graphopt import ir
from graphopt.passes._vendor import has_blocked_layout
from graphopt.rewriting import Op, rewrite

_BLOCKED = frozenset(
    {"Conv", "FusedConv", "MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool"}
)
_FUSED = frozenset({"Relu", "LeakyRelu", "Sigmoid", "Tanh", "HardSigmoid", "Clip"})


@rewrite.on("Max", "Min")
def convert_max_conv(op: Op, node: ir.Node) -> ir.Value | None:
    """Max(x, c), from one Conv and to another -> Clip(Conv(x, ones, group=channels), c)."""
    if len(node.inputs) != 2 or op.opset < 11 or not has_blocked_layout(op.target):
        return None
    for x, bound in (node.inputs, reversed(node.inputs)):
        limit = op.scalar(bound)
        shape = None if x is None else op.shape(x)
        if limit is None or x is None or shape is None or len(shape) != 4:
            continue
        channels = shape[1]
        if op.dtype(x) != ir.DataType.FLOAT or not isinstance(channels, int):
            continue
        if channels % 8 or not _is_blocked(x) or not _feeds_blocked(node.outputs[0]):
            return None
        ones = op.initializer(np.ones((channels, 1, 1, 1), np.float32), "ones")
        same = op.Conv(x, ones, group=channels, kernel_shape=[1, 1])
        if node.op_type == "Max":
            return op.Clip(same, float(limit))
        return op.Clip(same, None, float(limit))
    return None


def _is_blocked(value: ir.Value) -> bool:
    """Whether an operator of the blocked layout, activated within, makes a value."""
    node = value.producer()
    if node is not None and node.op_type in _FUSED and not node.domain:
        value = node.inputs[0] or value
        node = value.producer()
        return node is not None and node.op_type == "Conv"
    return node is not None and node.op_type in _BLOCKED


def _feeds_blocked(value: ir.Value) -> bool:
    users = [use.node for use in value.uses()]
    return (
        bool(users)
        and not value.is_graph_output()
        and all(user.op_type in _BLOCKED for user in users)
    )
