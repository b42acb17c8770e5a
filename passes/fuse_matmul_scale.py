"""Fold a scalar factor into constant weights further up, through what it commutes with.

Why: the scale of attention scores costs a pass over the largest tensor of the model; the weights
that make the queries take it up for nothing.
Numerics: rounding.
Needs: single uses from the weights down to the factor.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from graphopt import ir
from graphopt.passes._linear import Floats, floats, narrowed, rescaled
from graphopt.rewriting import Op, Refuse, rewrite

_MOVING = frozenset(
    {"Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Slice", "Identity", "Expand"}
)
_STEPS = 8


@rewrite.on("Mul", "Div")
def fuse_matmul_scale(op: Op, node: ir.Node) -> ir.Value | None:
    """Scale the constant that the value is a multiple of, and compute it anew from there."""
    for index in (0, 1)[: 2 if node.op_type == "Mul" else 1]:
        value, factor = node.inputs[index], node.inputs[1 - index]
        number = op.scalar(factor)
        if value is None or factor is None or not isinstance(number, float) or not number:
            continue
        rank = op.rank(value)
        if not np.isfinite(number) or rank is None or rank != op.rank(node.outputs[0]):
            continue
        path = _path(op, value, _STEPS)
        if path:
            return _scaled(op, path, number if node.op_type == "Mul" else 1 / number)
    return None


def _path(op: Op, value: ir.Value | None, steps: int) -> list[tuple[ir.Node, int]] | None:
    """Nodes from a value up to constant weights, with the operand that each is followed by.

    The last one's is the index of its weights.
    """
    node = None if value is None else value.producer()
    if value is None or node is None or node.domain or not steps or op.uses(value) != 1:
        return None
    if node.op_type in _MOVING:
        above = _path(op, node.inputs[0], steps - 1)
        return None if above is None else [(node, 0), *above]
    if node.op_type in ("Gemm", "Conv", "ConvTranspose"):
        weights = floats(op, node.inputs[1])
        bias = node.inputs[2] if len(node.inputs) > 2 else None
        known = weights is not None and (bias is None or floats(op, bias) is not None)
        return [(node, 1)] if known else None
    if node.op_type not in ("MatMul", "Add", "Sub"):
        return None
    constants = [floats(op, v) is not None for v in node.inputs]
    if all(constants):
        return None
    if node.op_type == "MatMul" and any(constants):
        return [(node, constants.index(True))]
    if node.op_type != "MatMul" and not any(constants):
        return None
    for index in (0, 1):
        above = None if constants[index] else _path(op, node.inputs[index], steps - 1)
        if above is not None:
            return [(node, index), *above]
    return None


def _scaled(op: Op, path: list[tuple[ir.Node, int]], factor: float) -> ir.Value:
    """Rebuild a path with its weights and addends multiplied by a factor."""
    node, index = path[-1]
    if node.op_type == "MatMul":
        inputs: list[Any] = list(node.inputs)
        inputs[index] = _multiple(op, node.inputs[index], factor)
        value = op.MatMul(*inputs)
    else:
        weights = node.inputs[1]
        shape = None if weights is None else op.shape(node.outputs[0])
        count = None if shape is None else shape[1]
        if not isinstance(count, int):
            raise Refuse("its number of channels is unknown")
        value = rescaled(op, node, np.full(count, factor), None)
    for node, index in reversed(path[:-1]):
        inputs = list(node.inputs)
        inputs[index] = value
        if node.op_type in ("Add", "Sub"):
            inputs[1 - index] = _multiple(op, node.inputs[1 - index], factor)
        value = op.build(node.op_type, inputs, node.attributes)[0]
    return value


def _multiple(op: Op, value: ir.Value | None, factor: float) -> ir.Value:
    numbers: Floats | None = floats(op, value)
    assert numbers is not None and value is not None
    return op.initializer(narrowed(numbers * factor, op.dtype(value)), "scaled")
