"""Merge products of one tensor with several constant matrices into one product and a Split.

Why: queries, keys and values are one larger product, which runs better than three.
Numerics: exact up to the order in which a kernel sums; rounding.
Needs: three matrices or more, or two that each have a bias; matrices of moderate size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from graphopt import ir
from graphopt.passes._slices import split
from graphopt.rewriting import Op, Refuse, rewrite

_MOST_BYTES = 64 << 20  # a merged matrix is a copy in memory, whatever file the parts are in

_FEWEST_GEMMS = 3  # a Gemm and a Split in place of two are no fewer

_MOST_USES = 64  # each product looks at all others


@dataclass(frozen=True)
class _Branch:
    """A product, with the addition of a bias where it has one."""

    product: ir.Node
    weights: ir.Array
    addition: ir.Node | None
    bias: ir.Array | None

    @property
    def result(self) -> ir.Value:
        return (self.addition or self.product).outputs[0]


@rewrite.on("MatMul")
def merge_matmuls(op: Op, node: ir.Node) -> dict[ir.Value, ir.Value] | None:
    """x A, x B, x C are parts of x [A B C]; their biases are parts of one bias."""
    x = node.inputs[0]
    own = None if x is None else _branch(op, node)
    rank = None if x is None else op.rank(x)
    if x is None or own is None or rank is None or op.uses(x) > _MOST_USES:
        return None
    users = [u for u in dict.fromkeys(x.consumers()) if u.graph is node.graph]
    branches = [b for u in users if (b := _branch(op, u)) is not None and _alike(own, b)]
    if len(branches) < (2 if own.bias is not None else 3):
        return None
    if sum(b.weights.nbytes for b in branches) > _MOST_BYTES:
        raise Refuse("the merged matrix would be large")
    widths = [b.weights.shape[1] for b in branches]
    weights = np.concatenate([b.weights for b in branches], axis=1)
    value = op.MatMul(x, op.initializer(weights, "weight"))
    if own.bias is not None:
        biases: list[Any] = [
            np.broadcast_to(b.bias.reshape(-1), (width,))
            for b, width in zip(branches, widths, strict=True)
            if b.bias is not None
        ]
        value = op.Add(value, op.initializer(np.concatenate(biases), "bias"))
    parts = split(op, value, rank - 1, widths)
    return {b.result: part for b, part in zip(branches, parts, strict=True)}


@rewrite.on("Gemm")
def merge_gemms_of_input(op: Op, node: ir.Node) -> dict[ir.Value, ir.Value] | None:
    """The same of Gemms, with their biases."""
    x, own = node.inputs[0], _gemm(op, node)
    if x is None or own is None or op.uses(x) > _MOST_USES:
        return None
    users = [u for u in dict.fromkeys(x.consumers()) if u.graph is node.graph]
    branches = [b for u in users if (b := _gemm(op, u)) is not None and _alike(own, b)]
    if len(branches) < _FEWEST_GEMMS:
        return None
    if sum(b.weights.nbytes for b in branches) > _MOST_BYTES:
        raise Refuse("the merged matrix would be large")
    widths = [b.weights.shape[1] for b in branches]
    inputs: list[Any] = [x, op.initializer(np.concatenate([b.weights for b in branches], axis=1))]
    biases = [b.bias for b in branches if b.bias is not None]
    if biases:
        inputs.append(op.initializer(np.concatenate(biases), "bias"))
    parts = split(op, op.Gemm(*inputs), 1, widths)
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
    width = weights.shape[1]
    if bias is not None:
        if bias.size not in (1, width) or bias.size != (bias.shape[-1] if bias.ndim else 1):
            return None
        bias = np.broadcast_to(bias.reshape(-1), (width,))
    return _Branch(node, weights, None, bias)


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
        if bias is not None and _is_bias(bias, weights.shape[1], op.rank(product)):
            return _Branch(node, weights, addition, bias)
    return _Branch(node, weights, None, None)


def _is_bias(values: ir.Array, width: int, rank: int | None) -> bool:
    """Whether an addend of a product of that rank varies along its last axis alone."""
    last = values.shape[-1] if values.ndim else 1
    return rank is not None and values.ndim <= rank and values.size == last in (1, width)
