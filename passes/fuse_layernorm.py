"""Fuse layer normalization from its parts into LayerNormalization.

Why: eight to ten kernels over the same tensor become one.
Numerics: rounding.
Needs: opset 17, a normalization over the last axes, whose sizes are known.
"""

from __future__ import annotations

from graphopt import ir
from graphopt.passes._algebra import Reader
from graphopt.passes._linear import floats, narrowed
from graphopt.passes._normalization import (
    affine,
    divided_by_root,
    mean_axes,
    normalized,
    scale_behind_root,
    squared,
)
from graphopt.rewriting import Op, Refuse, rewrite


@rewrite.on("Div", "Mul", benefit=7)
def fuse_layernorm(op: Op, node: ir.Node) -> ir.Value | None:
    """(x - mean(x)) / sqrt(mean((x - mean(x))^2) + epsilon), without scale and bias yet."""
    for index in (0, 1)[: 1 if node.op_type == "Div" else 2]:
        reader = Reader(op, node)
        variance = divided_by_root(reader, node, index)
        source = None if variance is None else centred(op, reader, node.inputs[index])
        if variance is None or source is None:
            continue
        epsilon, spread = variance
        mean = reader.take(spread, "ReduceMean")
        square = None if mean is None else squared(reader, mean.inputs[0])
        if mean is None or square is None:
            continue
        if square is not node.inputs[index] and centred(op, reader, square) != source:
            continue
        x, axes = source
        if mean_axes(op, mean) != axes:
            continue
        reader.require_unneeded()
        if op.opset < 17:
            raise Refuse("needs opset 17")
        return normalized(op, "LayerNormalization", x, axes, epsilon)
    return None


def centred(op: Op, reader: Reader, value: ir.Value | None) -> tuple[ir.Value, list[int]] | None:
    """(x, axes) where a value is x - mean of x over axes."""
    difference = reader.take(reader.uncast(value), "Sub")
    x = None if difference is None else difference.inputs[0]
    mean = None if difference is None else reader.take(difference.inputs[1], "ReduceMean")
    if x is None or mean is None or mean.inputs[0] is not x:
        return None
    axes = mean_axes(op, mean)
    return None if axes is None else (x, axes)


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


@rewrite.on("Mul", "Add", benefit=2)
def fuse_layernorm_affine(op: Op, node: ir.Node) -> ir.Value | None:
    """A scale or bias after LayerNormalization becomes its own."""
    return affine(op, node, "LayerNormalization")


@rewrite.on("Cast", benefit=3)
def fuse_layernorm_casts(op: Op, node: ir.Node) -> ir.Value | None:
    """Casts to float32 and back around a LayerNormalization, which computes in it anyway."""
    return around_casts(op, node, "LayerNormalization")


def around_casts(op: Op, node: ir.Node, op_type: str) -> ir.Value | None:
    """A normalization without the casts before it and, at the root, after it."""
    value = node.inputs[0]
    norm = None if value is None else value.producer()
    if value is None or norm is None or norm.op_type != op_type or norm.domain:
        return None
    wide = norm.inputs[0]
    widening = None if wide is None else wide.producer()
    if widening is None or widening.op_type != "Cast" or widening.domain or op.uses(value) != 1:
        return None
    x = widening.inputs[0]
    return None if x is None else narrowed_norm(op, node, norm, x)


def narrowed_norm(op: Op, node: ir.Node, norm: ir.Node, x: ir.Value) -> ir.Value | None:
    """A float32 normalization of x, cast to float16 or bfloat16, done on the narrow x."""
    to = op.dtype(x)
    narrow = to is not None and to in (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
    if not narrow or op.attr(node, "to") != to:
        return None
    operands: list[ir.Value] = []
    for value in norm.inputs[1:]:
        numbers = floats(op, value)
        if numbers is None:
            return None
        operands.append(op.initializer(narrowed(numbers, to), "weight"))
    return op.build(norm.op_type, [x, *operands], norm.attributes)[0]
