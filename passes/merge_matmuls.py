"""Merge products of one tensor with several constant matrices into one product and a Split.

Why: queries, keys and values are one larger product, which runs better than three.
Numerics: exact up to the order in which a kernel sums; rounding.
Needs: three matrices or more, or two that each have a bias; matrices of moderate size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from graphopt import ir
from graphopt.passes._linear import siblings
from graphopt.passes._slices import split
from graphopt.rewriting import Op, Refuse, rewrite

_MOST_BYTES = 64 << 20  # a merged matrix is a copy in memory, whatever file the parts are in

_FEWEST = 3  # one product and a Split in place of two are no fewer, unless a bias goes too


@dataclass(frozen=True)
class _Branch:
    """A product, with the addition of a bias where it has one."""

    product: ir.Node
    weights: ir.Array
    addition: ir.Node | None
    bias: ir.Array | None
    """Of as many elements as the matrix has columns."""

    @property
    def result(self) -> ir.Value:
        return (self.addition or self.product).outputs[0]


@rewrite.on("MatMul")
def merge_matmuls(op: Op, node: ir.Node) -> dict[ir.Value, ir.Value] | None:
    """x A, x B, x C are parts of x [A B C]; their biases are parts of one bias."""
    x = node.inputs[0]
    rank = None if x is None else op.rank(x)
    branches = [] if rank is None else siblings(op, node, _branch, _alike)
    if x is None or rank is None or len(branches) < 2:
        return None
    biases = [b.bias for b in branches if b.bias is not None]
    if len(branches) < _FEWEST and not biases:
        return None
    value = op.MatMul(x, _joined(op, branches))
    if biases:
        value = op.Add(value, op.initializer(np.concatenate(biases), "bias"))
    return _dealt(op, value, rank - 1, branches)


@rewrite.on("Gemm")
def merge_gemms_of_input(op: Op, node: ir.Node) -> dict[ir.Value, ir.Value] | None:
    """The same of Gemms, with their biases."""
    x, branches = node.inputs[0], siblings(op, node, _gemm, _alike)
    if x is None or len(branches) < _FEWEST:
        return None
    inputs: list[Any] = [x, _joined(op, branches)]
    biases = [b.bias for b in branches if b.bias is not None]
    if biases:
        inputs.append(op.initializer(np.concatenate(biases), "bias"))
    return _dealt(op, op.Gemm(*inputs), 1, branches)


def _joined(op: Op, branches: Sequence[_Branch]) -> ir.Value:
    """The matrices side by side.

    Raises:
        Refuse: they are large together.
    """
    if sum(b.weights.nbytes for b in branches) > _MOST_BYTES:
        raise Refuse("the merged matrix would be large")
    return op.initializer(np.concatenate([b.weights for b in branches], axis=1), "weight")


def _dealt(
    op: Op, value: ir.Value, axis: int, branches: Sequence[_Branch]
) -> dict[ir.Value, ir.Value]:
    """The parts of a merged result, each in the place of its branch's."""
    parts = split(op, value, axis, [b.weights.shape[1] for b in branches])
    return {b.result: part for b, part in zip(branches, parts, strict=True)}


def _gemm(op: Op, node: ir.Node) -> _Branch | None:
    """A Gemm by a constant matrix, with a constant bias or none, or None."""
    if node.op_type != "Gemm" or node.domain or op.attr(node, "transA", 0):
        return None
    if (op.attr(node, "alpha", 1.0), op.attr(node, "beta", 1.0)) != (1.0, 1.0):
        return None
    weights = op.const(node.inputs[1])
    value = node.inputs[2] if len(node.inputs) > 2 else None
    bias = op.const(value)
    if weights is None or (value is not None and bias is None):
        return None
    weights = weights.T if op.attr(node, "transB", 0) else weights
    if bias is None:
        return _Branch(node, weights, None, None)
    row = _row(bias, weights.shape[1], 2)
    return None if row is None else _Branch(node, weights, None, row)


def _alike(a: _Branch, b: _Branch) -> bool:
    return (
        a.weights.dtype == b.weights.dtype
        and a.weights.shape[0] == b.weights.shape[0]
        and (a.bias is None) == (b.bias is None)
    )


def _branch(op: Op, node: ir.Node) -> _Branch | None:
    """A MatMul whose second operand is a constant matrix, or None."""
    if node.op_type != "MatMul" or node.domain or ir.constant(node.inputs[0]) is not None:
        return None
    tensor = ir.constant(node.inputs[1])
    if tensor is None or len(tensor.shape) != 2 or not tensor.dtype.is_floating_point():
        return None
    weights, product = tensor.numpy(), node.outputs[0]
    consumers = product.consumers()
    addition = consumers[0] if op.uses(product) == 1 and consumers else None
    if addition is not None and addition.op_type == "Add" and addition.graph is node.graph:
        index = list(addition.inputs).index(product)
        bias = op.const(addition.inputs[1 - index])
        row = None if bias is None else _row(bias, weights.shape[1], op.rank(product))
        if row is not None:
            return _Branch(node, weights, addition, row)
    return _Branch(node, weights, None, None)


def _row(values: ir.Array, width: int, rank: int | None) -> ir.Array | None:
    """An addend of a product of that rank, for each column; None where it varies along others."""
    last = values.shape[-1] if values.ndim else 1
    if rank is None or values.ndim > rank or not values.size == last in (1, width):
        return None
    return np.broadcast_to(values.reshape(-1), (width,))
