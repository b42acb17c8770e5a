"""Fuse root-mean-square normalization from its parts into RMSNormalization.

Why: six kernels over the same tensor become one.
Numerics: rounding.
Needs: opset 23, a normalization over the last axes, whose sizes are known.
"""

from __future__ import annotations

from graphopt import ir
from graphopt.passes._algebra import Reader
from graphopt.passes._normalization import affine, divided_by_root, mean_axes, normalized, squared
from graphopt.rewriting import Op, Refuse, rewrite


@rewrite.on("Div", "Mul", benefit=6)
def fuse_rmsnorm(op: Op, node: ir.Node) -> ir.Value | None:
    """x / sqrt(mean(x^2) + epsilon), without scale yet."""
    for index in (0, 1)[: 1 if node.op_type == "Div" else 2]:
        reader = Reader(op, node)
        x = node.inputs[index]
        power = None if x is None else divided_by_root(reader, node, index)
        if x is None or power is None:
            continue
        mean = reader.take(power[1], "ReduceMean")
        axes = None if mean is None else mean_axes(op, mean)
        if mean is None or axes is None or squared(reader, mean.inputs[0]) is not x:
            continue
        outside = reader.outside()
        if outside is not None:
            raise Refuse(f"{outside!r} is used elsewhere")
        if op.opset < 23:
            raise Refuse("needs opset 23")
        return normalized(op, "RMSNormalization", x, axes, power[0])
    return None


@rewrite.on("Mul", benefit=2)
def fuse_rmsnorm_scale(op: Op, node: ir.Node) -> ir.Value | None:
    """A scale after RMSNormalization becomes its own."""
    return affine(op, node, "RMSNormalization")
