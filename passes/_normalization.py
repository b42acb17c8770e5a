"""What normalizations have in common: their parts, their scale and bias, casts around them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from graphopt import ir
from graphopt.passes._algebra import Reader
from graphopt.passes._layout import reduced_axes
from graphopt.passes._linear import Floats, along, floats, narrowed
from graphopt.rewriting import Op, Refuse

STASHED = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
"""Types for which computing in float32, as the fused operators do, loses nothing."""


def divided_by_root(
    reader: Reader, node: ir.Node, index: int
) -> tuple[float, ir.Value | None] | None:
    """(epsilon, v) where a Div or Mul is its operand `index` / sqrt(v + epsilon), or None."""
    norm: ir.Value | None = node.inputs[1 - index]
    if node.op_type == "Mul":
        inverse = reader.take(norm, "Reciprocal", "Div", "Pow")
        if inverse is None:
            return None
        if inverse.op_type == "Pow":
            found = reader.number(inverse.inputs[1]) == -0.5
            return _with_epsilon(reader, inverse.inputs[0]) if found else None
        if inverse.op_type == "Div" and reader.number(inverse.inputs[0]) != 1:
            return None
        norm = inverse.inputs[int(inverse.op_type == "Div")]
    root = reader.take(norm, "Sqrt", "Pow")
    if root is None or (root.op_type == "Pow" and reader.number(root.inputs[1]) != 0.5):
        return None
    return _with_epsilon(reader, root.inputs[0])


def _with_epsilon(reader: Reader, value: ir.Value | None) -> tuple[float, ir.Value | None] | None:
    total = reader.take(value, "Add")
    if total is None:
        return None
    for spread, constant in (total.inputs, reversed(total.inputs)):
        epsilon = reader.number(constant)
        if epsilon is not None and epsilon >= 0:
            return epsilon, spread
    return None


def mean_axes(op: Op, node: ir.Node) -> list[int] | None:
    """The axes of a ReduceMean that keeps its dimensions, ascending, if they are the last ones."""
    value = node.inputs[0]
    rank = None if value is None else op.rank(value)
    if rank is None or not op.attr(node, "keepdims", 1):
        return None
    axes = sorted(reduced_axes(op, node, rank) or [])
    return axes if axes and axes == list(range(axes[0], rank)) else None


def mean_square(
    op: Op, reader: Reader, value: ir.Value | None
) -> tuple[ir.Value, list[int]] | None:
    """(x, axes) where a value is the mean of x^2 over the last axes, or a sum that is divided."""
    mean = reader.take(value, "ReduceMean")
    if mean is None:
        scale, tensors = reader.factors(value)
        mean = reader.take(tensors[0], "ReduceSum", "ReduceSumSquare") if tensors else None
        if mean is None or len(tensors) != 1:
            return None
        size = _count(op, mean)
        if size is None or not reader.near(scale * size, 1.0, None):
            return None
    axes = mean_axes(op, mean)
    x = mean.inputs[0] if mean.op_type == "ReduceSumSquare" else squared(reader, mean.inputs[0])
    return None if axes is None or x is None else (x, axes)


def _count(op: Op, reduction: ir.Node) -> int | None:
    """How many elements a reduction over the last axes takes together, or None."""
    axes = mean_axes(op, reduction)
    shape = None if reduction.inputs[0] is None else op.shape(reduction.inputs[0])
    if axes is None or shape is None:
        return None
    sizes = [size for size in shape[axes[0] :] if isinstance(size, int)]
    return math.prod(sizes) if len(sizes) == len(axes) else None


def squared(reader: Reader, value: ir.Value | None) -> ir.Value | None:
    """What a value is the square of."""
    node = reader.take(value, "Pow", "Mul")
    if node is None:
        return None
    if node.op_type == "Mul":
        return node.inputs[0] if node.inputs[0] is node.inputs[1] else None
    return node.inputs[0] if reader.number(node.inputs[1]) == 2 else None


def standardized(op: Op, node: ir.Node) -> tuple[ir.Value, list[int], float] | None:
    """(x, axes, epsilon) where a node is (x - mean(x)) / sqrt(mean((x - mean(x))^2) + epsilon).

    Raises:
        Refuse: something else needs a part of it.
    """
    for index in (0, 1)[: 1 if node.op_type == "Div" else 2]:
        reader = Reader(op, node)
        variance = divided_by_root(reader, node, index)
        source = None if variance is None else centred(op, reader, node.inputs[index])
        if variance is None or source is None:
            continue
        epsilon, spread = variance
        if not _is_variance(op, reader, spread, source, node.inputs[index]):
            continue
        reader.require_unneeded()
        return *source, epsilon
    return None


def _is_variance(
    op: Op,
    reader: Reader,
    spread: ir.Value | None,
    source: tuple[ir.Value, list[int]],
    difference: ir.Value | None,
) -> bool:
    """Whether a value is mean((x - mean(x))^2), or mean(x^2) - mean(x)^2, kept above 0 or not."""
    mean = reader.take(spread, "ReduceMean")
    if mean is not None:
        square = squared(reader, mean.inputs[0])
        same = square is difference or centred(op, reader, square) == source
        return square is not None and same and mean_axes(op, mean) == source[1]
    bounded = reader.take(spread, "Relu")
    apart = reader.take(spread if bounded is None else bounded.inputs[0], "Sub")
    if apart is None or mean_square(op, reader, apart.inputs[0]) != source:
        return False
    mean = reader.take(squared(reader, apart.inputs[1]), "ReduceMean")
    return mean is not None and mean.inputs[0] is source[0] and mean_axes(op, mean) == source[1]


def centred(op: Op, reader: Reader, value: ir.Value | None) -> tuple[ir.Value, list[int]] | None:
    """(x, axes) where a value is x - mean of x over axes."""
    difference = reader.take(reader.uncast(value), "Sub")
    x = None if difference is None else difference.inputs[0]
    mean = None if difference is None else reader.take(difference.inputs[1], "ReduceMean")
    if x is None or mean is None or mean.inputs[0] is not x:
        return None
    axes = mean_axes(op, mean)
    return None if axes is None else (x, axes)


def normalized(
    op: Op, op_type: str, x: ir.Value, axes: list[int], epsilon: float
) -> ir.Value | None:
    """The fused operator with a scale of ones.

    Raises:
        Refuse: a type that it would round, or sizes that are unknown.
    """
    shape, dtype = op.shape(x), op.dtype(x)
    if shape is None or dtype is None or dtype not in STASHED:
        raise Refuse("its type would be computed in float32")
    sizes = shape[axes[0] :]
    if not all(isinstance(size, int) for size in sizes):
        raise Refuse("the size of what it normalizes is unknown")
    ones = op.initializer(np.ones([int(str(size)) for size in sizes], dtype.numpy()), "scale")
    return op.build(op_type, [x, ones], {"axis": axes[0] - len(shape), "epsilon": epsilon})[0]


def scale_behind_root(op: Op, node: ir.Node) -> ir.Value | None:
    """x (r c) is (x r) c, r being the reciprocal of a root: a normalization and its scale."""
    for x, product in (node.inputs, node.inputs[::-1]):
        inner = None if product is None else product.producer()
        if x is None or product is None or inner is None or inner.op_type != "Mul":
            continue
        if inner.domain or op.uses(product) != 1 or op.shape(x) != op.shape(node.outputs[0]):
            continue
        for root, scale in (inner.inputs, inner.inputs[::-1]):
            maker = None if root is None else root.producer()
            if maker is None or maker.op_type != "Reciprocal" or ir.constant(scale) is None:
                continue
            return op.Mul(op.Mul(x, root), scale)
    return None


def affine(op: Op, node: ir.Node, op_type: str) -> ir.Value | None:
    """Take a Mul or Add after a fused normalization into its scale or bias."""
    for index in (0, 1):
        value, operand = node.inputs[index], node.inputs[1 - index]
        norm = None if value is None else value.producer()
        if norm is None or norm.op_type != op_type or norm.domain:
            continue
        if value is None or operand is None or op.uses(value) != 1:
            continue
        return _rescaled(op, node, norm, operand)
    return None


def _rescaled(op: Op, node: ir.Node, norm: ir.Node, operand: ir.Value) -> ir.Value | None:
    scale, dtype = norm.inputs[1], op.dtype(operand)
    shape = None if scale is None else op.shape(scale)
    scales = floats(op, scale)
    if scale is None or shape is None or not all(isinstance(size, int) for size in shape):
        return None
    sizes = tuple(int(str(size)) for size in shape)
    bias = norm.inputs[2] if len(norm.inputs) > 2 else None
    biases = floats(op, bias)
    numbers = floats(op, operand)
    factors = None if numbers is None else _fitted(numbers, sizes)
    same = op.shape(operand) == shape
    new: Any = None
    if node.op_type == "Add":
        if bias is None and same:
            new = [scale, operand]
        elif factors is not None and (bias is None or biases is not None):
            total = factors if biases is None else biases + factors
            new = [scale, op.initializer(narrowed(total, dtype), "bias")]
    elif scales is not None:
        if np.all(scales == 1) and bias is None and same:
            new = [operand]
        elif factors is not None and (bias is None or biases is not None):
            new = [op.initializer(narrowed(scales * factors, dtype), "scale")]
            if biases is not None:
                new.append(op.initializer(narrowed(biases * factors, dtype), "bias"))
    if new is None:
        raise Refuse("what follows does not vary along the normalized axes alone")
    return op.build(norm.op_type, [norm.inputs[0], *new], norm.attributes)[0]


def _fitted(values: Floats, sizes: tuple[int, ...]) -> Floats | None:
    """A constant broadcast to the normalized axes; None where it varies along others."""
    extra = values.ndim - len(sizes)
    if extra > 0:
        if any(size != 1 for size in values.shape[:extra]):
            return None
        values = values.reshape(values.shape[extra:])
    try:
        return np.broadcast_to(values, sizes)
    except ValueError:
        return None


def channel_affine(op: Op, node: ir.Node, op_type: str) -> ir.Value | None:
    """Take a Mul or Add of one number a channel into a normalization's scale or bias."""
    for index in (0, 1):
        value, operand = node.inputs[index], node.inputs[1 - index]
        norm = None if value is None else value.producer()
        if value is None or norm is None or norm.op_type != op_type or norm.domain:
            continue
        numbers, dtype = floats(op, operand), op.dtype(value)
        scale, bias = floats(op, norm.inputs[1]), floats(op, norm.inputs[2])
        shape = op.shape(value)
        if numbers is None or scale is None or bias is None or shape is None:
            return None
        if op.uses(value) != 1 or op.shape(node.outputs[0]) != shape:
            return None
        each = along(numbers, len(shape), 1, len(scale))
        if each is None:
            raise Refuse("what follows does not vary along the channels alone")
        if node.op_type == "Mul":
            scale, bias = scale * each, bias * each
        else:
            bias = bias + each
        operands = [op.initializer(narrowed(v, dtype), "weight") for v in (scale, bias)]
        return op.build(op_type, [norm.inputs[0], *operands], norm.attributes)[0]
    return None


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
    return None if x is None else _narrowed_norm(op, node, norm, x)


def _narrowed_norm(op: Op, node: ir.Node, norm: ir.Node, x: ir.Value) -> ir.Value | None:
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
