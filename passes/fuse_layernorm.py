"""Fuse layer normalization from its parts into LayerNormalization.

Why: eight to ten kernels over the same tensor become one.
Numerics: rounding.
Needs: opset 17, a normalization over the last axes, whose sizes are known.
"""

from __future__ import annotations

from graphopt import ir
from graphopt.passes._algebra import Reader
from graphopt.passes._normalization import (
    affine,
    around_casts,
    centred,
    divided_by_root,
    normalized,
    scale_behind_root,
    standardized,
)
from graphopt.rewriting import Op, Refuse, rewrite


@rewrite.on("Div", "Mul", benefit=7)
def fuse_layernorm(op: Op, node: ir.Node) -> ir.Value | None:
    """(x - mean(x)) / sqrt(mean((x - mean(x))^2) + epsilon), without scale and bias yet."""
    found = standardized(op, node)
    if found is None:
        return None
    if op.opset < 17:
        raise Refuse("needs opset 17")
    return normalized(op, "LayerNormalization", *found)


@rewrite.on("Add", benefit=4)
def layernorm_by_terms(op: Op, node: ir.Node) -> ir.Value | None:
    """x s + (b - mean s) is (x - mean) s + b, as TensorFlow writes it."""
    for product, rest in (node.inputs, node.inputs[::-1]):
        first = None if product is None else product.producer()
        last = None if rest is None else rest.producer()
        if first is None or last is None or (first.op_type, last.op_type) != ("Mul", "Sub"):
            continue
        shift, second = last.inputs[0], last.inputs[1]
        inner = None if second is None else second.producer()
        if inner is None or inner.op_type != "Mul" or ir.constant(shift) is None:
            continue
        for x, scale in (first.inputs, first.inputs[::-1]):
            for mean, same in (inner.inputs, inner.inputs[::-1]):
                maker = None if mean is None else mean.producer()
                if scale is not same or maker is None or maker.op_type != "ReduceMean":
                    continue
                if (
                    x is not None
                    and maker.inputs[0] is x
                    and op.shape(x) == op.shape(node.outputs[0])
                ):
                    return op.Add(op.Mul(op.Sub(x, mean), scale), shift)
    return None


@rewrite.on("Mul", benefit=1)
def layernorm_scale_last(op: Op, node: ir.Node) -> ir.Value | None:
    """x (r c) is (x r) c, r being the reciprocal of a root."""
    return scale_behind_root(op, node)


@rewrite.on("Div", "Mul", benefit=1)
def layernorm_scale_first(op: Op, node: ir.Node) -> ir.Value | None:
    """(c (x - mean)) r is c ((x - mean) r), r being the reciprocal of a root; so with a Div."""
    for index in (0, 1)[: 1 if node.op_type == "Div" else 2]:
        scaled, root = node.inputs[index], node.inputs[1 - index]
        product = None if scaled is None else scaled.producer()
        if scaled is None or product is None or product.op_type != "Mul" or op.uses(scaled) != 1:
            continue
        if divided_by_root(Reader(op, node), node, index) is None:
            continue
        for difference, scale in (product.inputs, product.inputs[::-1]):
            if ir.constant(scale) is None or centred(op, Reader(op, node), difference) is None:
                continue
            if difference is not None and op.shape(difference) == op.shape(node.outputs[0]):
                apart = op.build(
                    node.op_type, [difference, root] if not index else [root, difference]
                )
                return op.Mul(apart[0], scale)
    return None


@rewrite.on("RMSNormalization", benefit=2)
def fuse_centred_rmsnorm(op: Op, node: ir.Node) -> ir.Value | None:
    """A normalization by the root of the mean square of x - mean(x)."""
    value, shape = node.inputs[0], op.shape(node.outputs[0])
    reader = Reader(op, node)
    found = centred(op, reader, value)
    if found is None or shape is None:
        return None
    axis = op.attr(node, "axis", -1)
    if found[1] != list(range(axis % len(shape), len(shape))):
        return None
    reader.require_unneeded()
    return op.build("LayerNormalization", [found[0], *node.inputs[1:]], node.attributes)[0]


@rewrite.on("Mul", "Add", benefit=2)
def fuse_layernorm_affine(op: Op, node: ir.Node) -> ir.Value | None:
    """A scale or bias after LayerNormalization becomes its own."""
    return affine(op, node, "LayerNormalization")


@rewrite.on("Cast", benefit=3)
def fuse_layernorm_casts(op: Op, node: ir.Node) -> ir.Value | None:
    """Casts to float32 and back around a LayerNormalization, which computes in it anyway."""
    return around_casts(op, node, "LayerNormalization")
