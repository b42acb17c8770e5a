"""Fuse instance normalization from its parts into InstanceNormalization.

Why: eight kernels over the same tensor become one, at any opset.
Numerics: rounding.
Needs: a normalization over all axes behind the second; a known number of channels. One over the
last of three axes is a layer normalization where there is that operator and its size is known.
"""

from __future__ import annotations

import numpy as np

from graphopt import ir
from graphopt.passes._normalization import channel_affine, standardized
from graphopt.rewriting import Op, Refuse, rewrite

_TYPES = (ir.DataType.FLOAT, ir.DataType.FLOAT16)


@rewrite.on("Div", "Mul", benefit=8)
def fuse_instancenorm(op: Op, node: ir.Node) -> ir.Value | None:
    """(x - mean(x)) / sqrt(mean((x - mean(x))^2) + epsilon) for each instance and channel."""
    found = standardized(op, node)
    return None if found is None else _normalized(op, node, *found)


def _normalized(
    op: Op, node: ir.Node, x: ir.Value, axes: list[int], epsilon: float
) -> ir.Value | None:
    shape, dtype = op.shape(x), op.dtype(x)
    if shape is None or dtype is None or len(shape) not in (3, 4, 5) or axes[0] != 2:
        return None
    if len(shape) == 3 and isinstance(shape[2], int) and op.opset >= 17:
        return None  # a layer normalization
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
