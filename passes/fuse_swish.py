"""Fuse x * sigmoid(x), also called SiLU or quick GELU, into Swish.

Why: two or three kernels over the same tensor become one.
Numerics: rounding.
Needs: opset 24, and a runtime that has the operator: ONNX Runtime 1.32 does not, so this pass runs
only when it is asked for.
"""

from __future__ import annotations

from graphopt import ir
from graphopt.rewriting import Const, Op, Refuse, rewrite


@rewrite
def fuse_swish(op: Op, x: ir.Value) -> ir.Value:
    """x sigmoid(x)"""
    return op.Mul(x, op.Sigmoid(x))


@fuse_swish.replace
def _(op: Op, x: ir.Value) -> ir.Value:
    if op.opset < 24:
        raise Refuse("needs opset 24")
    return op.Swish(x)


@rewrite
def fuse_quick_gelu(op: Op, x: ir.Value, slope: Const) -> ir.Value:
    """x sigmoid(slope x)"""
    return op.Mul(x, op.Sigmoid(op.Mul(x, slope)))


@fuse_quick_gelu.replace
def _(op: Op, x: ir.Value, slope: Const) -> ir.Value | None:
    alpha = op.scalar(slope)
    if alpha is None:
        return None
    if op.opset < 24:
        raise Refuse("needs opset 24")
    return op.Swish(x, alpha=float(alpha))
