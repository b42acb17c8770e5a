"""Fuse root-mean-square normalization from its parts into RMSNormalization.

Why: six kernels over the same tensor become one.
Numerics: rounding.
Needs: opset 23, a normalization over the last axes, whose sizes are known.
"""

from __future__ import annotations

from graphopt import ir
from graphopt.passes._algebra import Reader
from graphopt.passes._normalization import (
    affine,
    around_casts,
    divided_by_root,
    mean_square,
    normalized,
    scale_behind_root,
)
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
        found = mean_square(op, reader, power[1])
        if found is None:
            continue
        scale = None if found[0] is x else _scaled(op, reader, x, found[0])
        if found[0] is not x and scale is None:
            continue
        x, axes = found
        reader.require_unneeded()
        if op.opset < 23:
            raise Refuse("needs opset 23")
        result = normalized(op, "RMSNormalization", x, axes, power[0])
        return result if scale is None or result is None else op.Mul(result, scale)
    return None


def _scaled(op: Op, reader: Reader, value: ir.Value, x: ir.Value) -> ir.Value | None:
    """The constant that a value is x multiplied by."""
    product = reader.take(value, "Mul")
    for operand, scale in () if product is None else (product.inputs, product.inputs[::-1]):
        if operand is x and ir.constant(scale) is not None and op.shape(value) == op.shape(x):
            return scale
    return None


@rewrite.on("Mul", benefit=1)
def rmsnorm_scale_last(op: Op, node: ir.Node) -> ir.Value | None:
    """x (r c) is (x r) c, r being the reciprocal of a root."""
    return scale_behind_root(op, node)


@rewrite.on("Cast", benefit=3)
def fuse_rmsnorm_casts(op: Op, node: ir.Node) -> ir.Value | None:
    """Casts to float32 and back around an RMSNormalization, which computes in it anyway."""
    return around_casts(op, node, "RMSNormalization")


@rewrite.on("Mul", benefit=2)
def fuse_rmsnorm_scale(op: Op, node: ir.Node) -> ir.Value | None:
    """A scale after RMSNormalization becomes its own."""
    return affine(op, node, "RMSNormalization")
