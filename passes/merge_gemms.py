"""Merge two matrix products with constant weights, one after the other, into one.

Why: without an activation between them they are a single linear map.
Numerics: rounding.
Needs: weights whose product takes fewer multiplications than the two do; nothing else may use
what is between them.
"""

from __future__ import annotations

import numpy as np

from graphopt import ir
from graphopt.passes._linear import Floats, floats, narrowed
from graphopt.rewriting import Op, Refuse, rewrite


@rewrite.on("Gemm", "MatMul", benefit=2)
def merge_gemms(op: Op, node: ir.Node) -> ir.Value | None:
    """(x A + a) B + b is x (A B) + (a B + b)."""
    between = node.inputs[0]
    first = None if between is None else between.producer()
    if between is None or first is None or first.domain:
        return None
    if first.op_type not in ("Gemm", "MatMul"):
        return None
    x = first.inputs[0]
    inner, outer = _weights(op, first), _weights(op, node)
    dtype = op.dtype(between)
    if x is None or inner is None or outer is None or op.rank(x) is None:
        return None
    if op.uses(between) != 1:
        raise Refuse(f"{between.name!r} is used elsewhere")
    (rows, middle), columns = inner.shape, outer.shape[1]
    if rows * columns >= rows * middle + middle * columns:
        raise Refuse("the two are cheaper than their product")
    weights = op.initializer(narrowed(inner @ outer, dtype), "weight")
    if "Gemm" not in (first.op_type, node.op_type):
        return op.MatMul(x, weights)
    shift, added = _bias(op, first, middle), _bias(op, node, columns)
    if shift is None and added is None:
        return op.Gemm(x, weights)
    total = np.zeros(columns) if added is None else added
    total = total if shift is None else shift @ outer + total
    return op.Gemm(x, weights, op.initializer(narrowed(total, dtype), "bias"))


def _weights(op: Op, node: ir.Node) -> Floats | None:
    """The matrix that a node multiplies its first operand by from the right, or None."""
    weights = floats(op, node.inputs[1])
    if weights is None or weights.ndim != 2:
        return None
    if node.op_type == "MatMul":
        return weights
    if op.attr(node, "transA", 0):
        return None
    turned: Floats = weights.T if op.attr(node, "transB", 0) else weights
    return turned * float(op.attr(node, "alpha", 1.0))


def _bias(op: Op, node: ir.Node, count: int) -> Floats | None:
    """The number that a Gemm adds to each column; None where it adds nothing.

    Raises:
        Refuse: it is not constant, or differs from row to row.
    """
    value = node.inputs[2] if len(node.inputs) > 2 else None
    if node.op_type == "MatMul" or value is None:
        return None
    bias = floats(op, value)
    if bias is None:
        raise Refuse("its bias is not constant")
    if bias.size not in (1, count) or (bias.ndim and bias.shape[-1] != bias.size):
        raise Refuse("its bias differs from row to row")
    return np.broadcast_to(bias.reshape(-1) * float(op.attr(node, "beta", 1.0)), (count,))
