"""Fuse group normalization from its parts into GroupNormalization.

Why: a normalization between two Reshapes, a scale and a bias are one operator.
Numerics: rounding.
Needs: opset 21; a target other than a CPU, where ONNX Runtime 1.32 takes 1.5 to 1.9 times as long
for it, as it computes it from its parts.
"""

from __future__ import annotations

import numpy as np

from graphopt import ir
from graphopt.passes._linear import floats, narrowed
from graphopt.passes.fuse_instancenorm import channel_affine
from graphopt.rewriting import Op, Refuse, rewrite


@rewrite.on("Reshape", benefit=3)
def fuse_groupnorm(op: Op, node: ir.Node) -> ir.Value | None:
    """InstanceNormalization of groups of channels, which are channels again after it."""
    value = node.inputs[0]
    norm = None if value is None else value.producer()
    if value is None or norm is None or norm.op_type != "InstanceNormalization" or norm.domain:
        return None
    groups = norm.inputs[0]
    view = None if groups is None else groups.producer()
    x = view.inputs[0] if view is not None and view.op_type == "Reshape" else None
    shape, grouped = (None if v is None else op.shape(v) for v in (x, groups))
    if x is None or not shape or not grouped or len(shape) < 3 or len(grouped) != 3:
        return None
    if shape != op.shape(node.outputs[0]):
        return None
    channels, count = shape[1], grouped[1]
    if not isinstance(channels, int) or not isinstance(count, int) or channels % count:
        return None
    if grouped[0] != shape[0] or op.uses(value) != 1 or op.uses(groups or x) != 1:
        return None
    scale, bias = floats(op, norm.inputs[1]), floats(op, norm.inputs[2])
    if scale is None or bias is None:
        return None
    if op.opset < 21:
        raise Refuse("needs opset 21")
    if op.target.device == "cpu":
        raise Refuse("ONNX Runtime is slower with it on a CPU")
    each = [np.repeat(values, channels // count) for values in (scale, bias)]
    operands = [op.initializer(narrowed(v, op.dtype(x)), "weight") for v in each]
    attributes = {**norm.attributes, "num_groups": count}
    return op.build("GroupNormalization", [x, *operands], attributes)[0]


@rewrite.on("Mul", "Add", benefit=3)
def fuse_groupnorm_affine(op: Op, node: ir.Node) -> ir.Value | None:
    """A scale or bias for each channel after GroupNormalization becomes its own."""
    return channel_affine(op, node, "GroupNormalization")
