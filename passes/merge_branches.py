"""Merge parallel convolutions, or products with matrices, that are added into one.

Why: re-parameterised networks (RepVGG, MobileOne) are exported with the branches that they were
trained with: 3x3, 1x1 and the identity; one kernel computes their sum.
Numerics: rounding.
Needs: constant weights, equal strides and groups, the smaller window within the larger one.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np

from graphopt import ir
from graphopt.passes._linear import Floats, batchnorm_factors, floats, narrowed
from graphopt.rewriting import Op, rewrite

_TYPES = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE)
_MOST = 8  # operands of a Sum


@dataclass(frozen=True)
class _Branch:
    """weights * x + bias, the window beginning `before` elements ahead of each output's place."""

    x: ir.Value
    weights: Floats
    bias: Floats | None
    strides: tuple[int, ...]
    before: tuple[int, ...]
    group: int
    node: ir.Node | None


@rewrite.on("Add", "Sum", benefit=4)
def merge_branches(op: Op, node: ir.Node) -> ir.Value | None:
    """conv(x) + conv(x), conv(x) + x, conv(x) + batchnorm(x)."""
    if op.dtype(node.outputs[0]) not in _TYPES or len(node.inputs) > _MOST:
        return None
    for first, second in itertools.permutations(node.inputs, 2):
        if first is None or second is None or first is second:
            continue
        wide = _convolution(op, first)
        if wide is None:
            continue
        narrow = _convolution(op, second) or _identity(op, second, wide)
        if narrow is None or narrow.x is not wide.x or op.shape(first) != op.shape(second):
            continue
        weights = _sum(wide, narrow)
        if weights is None or wide.node is None:
            continue
        biases = [b.bias for b in (wide, narrow) if b.bias is not None]
        dtype = op.dtype(wide.x)
        inputs: list[Any] = [wide.x, op.initializer(narrowed(weights, dtype), "weight")]
        if biases:
            inputs.append(op.initializer(narrowed(np.sum(biases, axis=0), dtype), "bias"))
        both = op.build("Conv", inputs, wide.node.attributes)[0]
        rest = [v for v in node.inputs if v is not first and v is not second]
        return op.Sum(both, *rest) if rest else both
    return None


@rewrite.on("Add", benefit=4)
def merge_products(op: Op, node: ir.Node) -> ir.Value | None:
    """x A + x B is x (A + B), x A + x is x (A + I), and x A + y A is (x + y) A."""
    first, second = node.inputs
    if first is None or second is None or first is second:
        return None
    left, right = _product(op, first), _product(op, second)
    if left is None and right is None:
        return None
    if left is not None and right is not None and np.array_equal(left[1], right[1]):
        shape = op.shape(left[0])
        if left[0] is not right[0] and shape is not None and shape == op.shape(right[0]):
            maker = first.producer()
            return None if maker is None else op.MatMul(op.Add(left[0], right[0]), maker.inputs[1])
    x, weights = left or right or (None, None)
    if x is None or weights is None or op.dtype(x) not in _TYPES or op.rank(x) in (None, 1):
        return None
    if left is None or right is None:
        same = second is x if left is not None else first is x
        other = np.eye(*weights.shape) if same and len({*weights.shape}) == 1 else None
    else:
        other = right[1] if right[0] is x else None
    if other is None or other.shape != weights.shape:
        return None
    return op.MatMul(x, op.initializer(narrowed(weights + other, op.dtype(x)), "weight"))


def _product(op: Op, value: ir.Value) -> tuple[ir.Value, Floats] | None:
    """(x, A) of a product x A, with a constant matrix, which nothing else uses."""
    node = value.producer()
    if node is None or node.op_type != "MatMul" or node.domain or op.uses(value) != 1:
        return None
    x, weights = node.inputs[0], floats(op, node.inputs[1])
    return None if x is None or weights is None or weights.ndim != 2 else (x, weights)


def _convolution(op: Op, value: ir.Value | None) -> _Branch | None:
    """The convolution that makes a value which nothing else uses."""
    node = None if value is None else value.producer()
    if value is None or node is None or node.op_type != "Conv" or node.domain:
        return None
    x, weights = node.inputs[0], floats(op, node.inputs[1])
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    biases = floats(op, bias)
    if x is None or weights is None or op.uses(value) != 1 or (bias is not None and biases is None):
        return None
    rank = weights.ndim - 2
    strides = op.attr(node, "strides") or [1] * rank
    pads = op.attr(node, "pads") or [0] * 2 * rank
    if set(op.attr(node, "dilations") or [1]) != {1} or op.attr(node, "auto_pad", "") not in (
        "",
        "NOTSET",
    ):
        return None
    group = int(op.attr(node, "group", 1))
    return _Branch(x, weights, biases, tuple(strides), tuple(pads[:rank]), group, node)


def _identity(op: Op, value: ir.Value, wide: _Branch) -> _Branch | None:
    """A tensor, or the batch normalization of one, as a convolution of it like another one."""
    x, scale, bias = value, np.ones(1), None
    node = value.producer()
    if node is not None and node.op_type == "BatchNormalization" and not node.domain:
        source = node.inputs[0]
        if source is not wide.x or op.uses(value) != 1 or len(node.outputs) > 1:
            return None
        x, (scale, bias) = wide.x, batchnorm_factors(op, node)
    channels, each = wide.weights.shape[:2]
    if channels != each * wide.group or set(wide.strides) != {1}:
        return None
    spread = (1,) * (wide.weights.ndim - 2)
    weights = np.zeros((channels, each, *spread))
    places = list(range(channels))
    filled = np.broadcast_to(scale, channels).reshape(-1, *spread)
    weights[places, [place % each for place in places]] = filled
    return _Branch(x, weights, bias, wide.strides, (0,) * len(spread), wide.group, None)


def _sum(wide: _Branch, narrow: _Branch) -> Floats | None:
    """The weights of both, those of the smaller window where they lie in the larger one."""
    a, b = wide.weights, narrow.weights
    if a.shape[:2] != b.shape[:2] or wide.strides != narrow.strides or wide.group != narrow.group:
        return None
    starts = [p - q for p, q in zip(wide.before, narrow.before, strict=True)]
    ends = [s + size for s, size in zip(starts, b.shape[2:], strict=True)]
    if min(starts) < 0 or any(e > size for e, size in zip(ends, a.shape[2:], strict=True)):
        return None
    total = a.copy()
    inside = tuple(slice(s, e) for s, e in zip(starts, ends, strict=True))
    total[(slice(None), slice(None), *inside)] += b
    return total
