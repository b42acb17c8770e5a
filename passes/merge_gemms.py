"""Merge two linear operators with constant weights, one after the other, into one.

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


@rewrite.on("MatMul", benefit=2)
def merge_layers(op: Op, node: ir.Node) -> ir.Value | None:
    """(x A + a) B is x (A B) + a B, on tensors of any rank."""
    between = node.inputs[0]
    addition = None if between is None else between.producer()
    if between is None or addition is None or addition.op_type != "Add" or addition.domain:
        return None
    outer = _weights(op, node)
    for index in (0, 1):
        value, shift = addition.inputs[index], floats(op, addition.inputs[1 - index])
        first = None if value is None else value.producer()
        if value is None or first is None or first.op_type != "MatMul" or first.domain:
            continue
        x, inner = first.inputs[0], _weights(op, first)
        if x is None or inner is None or outer is None or shift is None or op.uses(value) != 1:
            continue
        (rows, middle), columns = inner.shape, outer.shape[1]
        known = shift.ndim and shift.shape[-1] == shift.size == middle
        if not known or op.uses(between) != 1 or op.rank(value) != op.rank(between):
            return None
        if rows * columns >= rows * middle + middle * columns:
            raise Refuse("the two are cheaper than their product")
        dtype = op.dtype(between)
        product = op.MatMul(x, op.initializer(narrowed(inner @ outer, dtype), "weight"))
        return op.Add(product, op.initializer(narrowed(shift.reshape(-1) @ outer, dtype), "bias"))
    return None


@rewrite.on("Conv", benefit=2)
def merge_pointwise(op: Op, node: ir.Node) -> ir.Value | None:
    """A convolution whose window is one element, before or after another one."""
    between = node.inputs[0]
    first = None if between is None else between.producer()
    if between is None or first is None or first.op_type != "Conv" or first.domain:
        return None
    inner, outer = floats(op, first.inputs[1]), floats(op, node.inputs[1])
    if inner is None or outer is None or op.uses(between) != 1 or first.inputs[0] is None:
        return None
    if any(op.attr(n, "group", 1) != 1 for n in (first, node)):
        return None
    if _pointwise(op, node, outer):
        merged = np.tensordot(outer.reshape(outer.shape[:2]), inner, (1, 0))
        attributes = first.attributes
    elif _pointwise(op, first, inner):
        merged = np.moveaxis(np.tensordot(outer, inner.reshape(inner.shape[:2]), (1, 0)), -1, 1)
        attributes = node.attributes
    else:
        return None
    if merged.size >= inner.size + outer.size:
        raise Refuse("the two are cheaper than their product")
    biases = [floats(op, v) for n in (first, node) for v in n.inputs[2:3]]
    if any(bias is None for bias in biases):
        return None
    shift = _shift(op, first, node, outer)
    dtype = op.dtype(between)
    inputs: list[ir.Value | None] = [first.inputs[0]]
    inputs.append(op.initializer(narrowed(merged, dtype), "weight"))
    if shift is not None:
        inputs.append(op.initializer(narrowed(shift, dtype), "bias"))
    return op.build("Conv", inputs, attributes)[0]


def _pointwise(op: Op, node: ir.Node, weights: Floats) -> bool:
    """Whether a Conv sees one element at a time, and each."""
    moves = (*weights.shape[2:], *(op.attr(node, "strides") or ()))
    return all(size == 1 for size in moves) and not any(op.attr(node, "pads") or ())


def _shift(op: Op, first: ir.Node, node: ir.Node, outer: Floats) -> Floats | None:
    """What the first bias becomes behind the second Conv, and the second's own.

    Raises:
        Refuse: the second Conv pads with zeros what would have to be the first bias.
    """
    own = floats(op, node.inputs[2]) if len(node.inputs) > 2 else None
    bias = floats(op, first.inputs[2]) if len(first.inputs) > 2 else None
    if bias is None:
        return own
    padded = op.attr(node, "auto_pad", "NOTSET") not in ("NOTSET", "VALID")
    if padded or any(op.attr(node, "pads") or ()):
        raise Refuse("the second one pads what the first one shifts")
    passed = np.tensordot(outer.sum(axis=tuple(range(2, outer.ndim))), bias, (1, 0))
    return passed if own is None else passed + own


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
