"""Fuse what scales and shifts channels before or after a BatchNormalization into it.

Why: models from Caffe and pre-activation networks chain normalizations with scales and biases.
Numerics: rounding.
Needs: constants of one number a channel; nothing else may use what is between.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from graphopt import ir
from graphopt.passes._linear import Floats, along, batchnorm_factors, floats, narrowed
from graphopt.rewriting import Op, rewrite


@rewrite.on("BatchNormalization", benefit=2)
def affine_before(op: Op, node: ir.Node) -> ir.Value | None:
    """A scale, a bias or a BatchNormalization before."""
    value, own = node.inputs[0], _numbers(op, node)
    inner = None if value is None else value.producer()
    if value is None or inner is None or own is None or op.uses(value) != 1:
        return None
    found = _affine(op, inner, len(own[0]))
    if found is None:
        return None
    source, scale, shift = found
    gamma, slope, base = own
    return _normalized(op, node, source, gamma * scale, base + slope * shift)


@rewrite.on("Mul", "Add", benefit=2)
def affine_after(op: Op, node: ir.Node) -> ir.Value | None:
    """A scale or bias after."""
    for value, operand in (node.inputs, node.inputs[::-1]):
        norm = None if value is None else value.producer()
        if value is None or norm is None or norm.op_type != "BatchNormalization" or norm.domain:
            continue
        own, rank, numbers = _numbers(op, norm), op.rank(value), floats(op, operand)
        if own is None or rank is None or numbers is None or op.uses(value) != 1:
            return None
        each = along(numbers, rank, 1, len(own[0]))
        if each is None or op.shape(node.outputs[0]) != op.shape(value):
            return None
        gamma, _, base = own
        if node.op_type == "Mul":
            return _normalized(op, norm, norm.inputs[0], gamma * each, base * each)
        return _normalized(op, norm, norm.inputs[0], gamma, base + each)
    return None


def _normalized(
    op: Op, node: ir.Node, x: ir.Value | None, gamma: Floats, beta: Floats
) -> ir.Value | None:
    """The normalization of x with another scale and bias, and a mean of 0."""
    dtypes = [op.dtype(v) for v in node.inputs[1:4] if v is not None]
    arrays = (gamma, beta, np.zeros_like(beta))
    operands: list[Any] = [
        op.initializer(narrowed(array, dtype), "weight")
        for array, dtype in zip(arrays, dtypes, strict=True)
    ]
    return op.build("BatchNormalization", [x, *operands, node.inputs[4]], node.attributes)[0]


def _affine(op: Op, node: ir.Node, count: int) -> tuple[ir.Value, Floats, Floats] | None:
    """(x, scale, shift) where a node computes scale * x + shift for each channel."""
    if node.op_type == "BatchNormalization":
        own, source = _numbers(op, node), node.inputs[0]
        return None if own is None or source is None else (source, own[1], own[2])
    if node.op_type not in ("Mul", "Add") or node.domain:
        return None
    for source, operand in (node.inputs, node.inputs[::-1]):
        numbers = floats(op, operand)
        rank = None if source is None else op.rank(source)
        if source is None or numbers is None or rank is None:
            continue
        each = along(numbers, rank, 1, count)
        if each is None or op.shape(source) != op.shape(node.outputs[0]):
            continue
        one, zero = np.ones(count), np.zeros(count)
        return (source, each, zero) if node.op_type == "Mul" else (source, one, each)
    return None


def _numbers(op: Op, node: ir.Node) -> tuple[Floats, Floats, Floats] | None:
    """An inference BatchNormalization's scale, and what it multiplies by and adds; or None."""
    gamma = None if node.domain or op.opset < 7 else floats(op, node.inputs[1])
    return None if gamma is None else (gamma, *batchnorm_factors(op, node))
