"""Let a Conv of few output channels make several neighbouring columns at once.

Why: ONNX Runtime makes 8 or 16 channels at a time, however few there are. r columns as r times the
channels fill these lanes: the kernel is r-1 wider, the positions are r times fewer. 3 channels of
9x9 on 720x720, 16 lanes: 0.33 of the time (measured on Zen 5).
Numerics: rounding; where a value is not finite, columns beside its own become NaN.
Needs: ONNX Runtime's CPU on x86, float, constant weights, one group, strides and dilations of 1, a
known width that r divides.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from graphopt import ir
from graphopt.passes._linear import floats
from graphopt.passes._vendor import has_blocked_layout
from graphopt.rewriting import Op, Refuse, rewrite

_GAIN = 0.6
"""The most that the multiplications may cost, of before: the columns have to be put in place."""
_PER_ELEMENT = 100
"""Multiplications that take as long as to move an element of the result twice."""
_AT_LEAST = 1_000_000
"""Multiplications that take as long as to start three more operators twice."""


@rewrite.on("Conv")
def widen_conv(op: Op, node: ir.Node) -> ir.Value | None:
    """Conv(x, W) -> Reshape(Transpose(Reshape(Conv(x, W shifted by 0..r-1, strides [1, r]))))."""
    x, weights = node.inputs[0], floats(op, node.inputs[1])
    lanes = op.target.alignment
    if x is None or weights is None or weights.ndim != 4 or 2 * weights.shape[0] > lanes:
        return None
    if not has_blocked_layout(op.target) or op.dtype(x) != ir.DataType.FLOAT:
        return None
    plain = all(set(op.attr(node, name) or [1]) == {1} for name in ("strides", "dilations"))
    if not plain or op.attr(node, "group", 1) != 1:
        return None
    if op.attr(node, "auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
        return None
    shape = op.shape(node.outputs[0])
    width = None if shape is None else shape[3]
    if shape is None or not isinstance(width, int) or not isinstance(shape[2], int):
        raise Refuse("the size of its result is unknown")
    columns = _columns(weights.shape, width, lanes)
    if columns is None:
        raise Refuse("its kernel is too narrow to gain")
    channels, depth, height, span = weights.shape
    saved = lanes * depth * height * (span - (span + columns - 1) / columns)
    if saved < _PER_ELEMENT * channels or saved * shape[2] * width < _AT_LEAST:
        raise Refuse("it is too small to gain")
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    biases = floats(op, bias)
    if bias is not None and biases is None:
        raise Refuse("its bias is not constant")
    wide = np.zeros((channels, columns, depth, height, span + columns - 1), np.float32)
    for column in range(columns):
        wide[:, column, :, :, column : column + span] = weights
    operands: list[Any] = [x, op.initializer(wide.reshape(-1, *wide.shape[2:]), "weight")]
    if biases is not None:
        operands.append(op.initializer(np.repeat(biases, columns).astype(np.float32), "bias"))
    attributes: dict[str, Any] = {"strides": [1, columns], "kernel_shape": list(wide.shape[3:])}
    attributes["pads"] = op.attr(node, "pads")
    rows = shape[2]
    made = op.build("Conv", operands, attributes)[0]
    apart = op.Reshape(made, [0, channels, columns, rows, width // columns])
    return op.Reshape(op.Transpose(apart, perm=[0, 1, 3, 4, 2]), [0, channels, rows, width])


def _columns(weights: tuple[int, ...], width: int, lanes: int) -> int | None:
    """How many columns at once cost least; None where that gains too little."""
    channels, _, _, span = weights
    costs = {
        count: (span + count - 1) / (span * count)
        for count in range(2, lanes // channels + 1)
        if width % count == 0
    }
    best = min(costs, key=lambda count: costs[count], default=None)
    return best if best is not None and costs[best] <= _GAIN else None
