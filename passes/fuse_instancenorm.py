"""Fuse instance normalization from its parts into InstanceNormalization.

Why: eight kernels over the same tensor become one, at any opset.
Numerics: rounding.
Needs: a normalization over all axes behind the second, of four or five; a known number of channels.
"""

from __future__ import annotations

import numpy as np

from graphopt import ir
from graphopt.passes._algebra import Reader
from graphopt.passes._linear import along, floats, narrowed
from graphopt.passes._normalization import divided_by_root, mean_axes, squared
from graphopt.passes.fuse_layernorm import centred
from graphopt.rewriting import Op, Refuse, rewrite

_TYPES = (ir.DataType.FLOAT, ir.DataType.FLOAT16)


@rewrite.on("Div", "Mul", benefit=8)
def fuse_instancenorm(op: Op, node: ir.Node) -> ir.Value | None:
    """(x - mean(x)) / sqrt(mean((x - mean(x))^2) + epsilon) for each instance and channel."""
    for index in (0, 1)[: 1 if node.op_type == "Div" else 2]:
        reader = Reader(op, node)
        variance = divided_by_root(reader, node, index)
        source = None if variance is None else centred(op, reader, node.inputs[index])
        if variance is None or source is None:
            continue
        epsilon, spread = variance
        mean = reader.take(spread, "ReduceMean")
        square = None if mean is None else squared(reader, mean.inputs[0])
        if mean is None or square is None or mean_axes(op, mean) != source[1]:
            continue
        if square is not node.inputs[index] and centred(op, reader, square) != source:
            continue
        reader.require_unneeded()
        return _normalized(op, node, source[0], source[1], epsilon)
    return None


def _normalized(
    op: Op, node: ir.Node, x: ir.Value, axes: list[int], epsilon: float
) -> ir.Value | None:
    shape, dtype = op.shape(x), op.dtype(x)
    if shape is None or dtype is None or len(shape) not in (4, 5) or axes[0] != 2:
        return None
    channels = shape[1]
    if not isinstance(channels, int) or _scaled_inside(op, node):
        return None
    if dtype not in _TYPES:
        raise Refuse("ONNX Runtime does not have it in this type")
    ones = op.initializer(np.ones(channels, dtype.numpy()), "scale")
    zeros = op.initializer(np.zeros(channels, dtype.numpy()), "bias")
    return op.InstanceNormalization(x, ones, zeros, epsilon=epsilon)


def _scaled_inside(op: Op, node: ir.Node) -> bool:
    """Whether a scale follows that varies along a normalized axis: a layer normalization."""
    users = node.outputs[0].consumers()
    if len(users) != 1 or users[0].op_type != "Mul":
        return False
    others = [op.shape(v) or () for v in users[0].inputs if v is not node.outputs[0] and v]
    return any(size != 1 for shape in others for size in shape[-2:])


@rewrite.on("Mul", "Add", benefit=3)
def fuse_instancenorm_affine(op: Op, node: ir.Node) -> ir.Value | None:
    """A scale or bias for each channel after InstanceNormalization becomes its own."""
    return channel_affine(op, node, "InstanceNormalization")


def channel_affine(op: Op, node: ir.Node, op_type: str) -> ir.Value | None:
    """Take a Mul or Add of one number a channel into a normalization's scale or bias."""
    for index in (0, 1):
        value, operand = node.inputs[index], node.inputs[1 - index]
        norm = None if value is None else value.producer()
        if value is None or norm is None or norm.op_type != op_type or norm.domain:
            continue
        numbers, dtype = floats(op, operand), op.dtype(value)
        scale, bias = floats(op, norm.inputs[1]), floats(op, norm.inputs[2])
        shape = op.shape(value)
        if numbers is None or scale is None or bias is None or shape is None:
            return None
        if op.uses(value) != 1 or op.shape(node.outputs[0]) != shape:
            return None
        each = along(numbers, len(shape), 1, len(scale))
        if each is None:
            raise Refuse("what follows does not vary along the channels alone")
        if node.op_type == "Mul":
            scale, bias = scale * each, bias * each
        else:
            bias = bias + each
        operands = [op.initializer(narrowed(v, dtype), "weight") for v in (scale, bias)]
        return op.build(op_type, [norm.inputs[0], *operands], norm.attributes)[0]
    return None
