"""Merge parallel convolutions that are added into one convolution.

Why: re-parameterised networks (RepVGG, MobileOne) are exported with the branches that they were
trained with: 3x3, 1x1 and the identity; one kernel computes their sum.
Numerics: rounding.
Needs: constant weights, equal strides and groups, the smaller window within the larger one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from graphopt import ir
from graphopt.passes._linear import Floats, batchnorm_factors, floats, narrowed
from graphopt.rewriting import Op, rewrite


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
    if len(node.inputs) != 2 or op.dtype(node.outputs[0]) != ir.DataType.FLOAT:
        return None
    for first, second in (node.inputs, node.inputs[::-1]):
        wide = _convolution(op, first)
        if wide is None or first is None or second is None:
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
        return op.build("Conv", inputs, wide.node.attributes)[0]
    return None


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
