"""Rotary position embeddings: the halves of a tensor, and the tables of cosines and sines."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

from graphopt import ir
from graphopt._polynomial import of_atom
from graphopt.dims import DimLike
from graphopt.passes._layout import UNARY, permutation
from graphopt.passes._slices import Span, spans
from graphopt.passes._steps import LinearReader
from graphopt.passes._views import reshaped
from graphopt.rewriting import Op, Refuse

_DEPTH = 12
Dims = tuple[DimLike, ...]


def size_tensor(op: Op, size: DimLike, sources: Sequence[ir.Value]) -> ir.Value:
    """A dimension as a tensor of one element: from graph inputs, so that all layers share it.

    Raises:
        Refuse: no graph input has it, nor has one of `sources`.
    """
    if isinstance(size, int):
        return op.initializer(np.asarray([size], np.int64), "size")
    root = op.node.graph
    inputs = [] if root is None else list(op.context.root(root).inputs)
    terms = [of_atom(atom) for atoms, factor in size.terms for atom in atoms if factor == 1]
    found = [_axis_of(op, inputs, term) for term in terms]
    if sum(terms) == size and None not in found:
        parts = [op.Shape(value, start=axis, end=axis + 1) for value, axis in filter(None, found)]
        return functools.reduce(op.Add, parts)
    place = _axis_of(op, sources, size)
    if place is None:
        raise Refuse("a size has no source")
    return op.Shape(place[0], start=place[1], end=place[1] + 1)


def _axis_of(op: Op, values: Sequence[ir.Value], size: DimLike) -> tuple[ir.Value, int] | None:
    """A value and its axis that have a size."""
    for value in values:
        shape = op.shape(value) or ()
        if size in shape:
            return value, shape.index(size)
    return None


def expanded(op: Op, value: ir.Value, dims: Dims, sources: Sequence[ir.Value]) -> ir.Value:
    """A value expanded to sizes, 1 where it stays; sizes come from inputs or `sources`."""
    if all(isinstance(size, int) for size in dims):
        return op.Expand(value, [int(str(size)) for size in dims])
    return op.Expand(value, op.Concat(*[size_tensor(op, s, sources) for s in dims], axis=0))


def halves_of(
    op: Op, first: ir.Value | None, second: ir.Value | None
) -> tuple[ir.Value, bool] | None:
    """(x, interleaved) where two values are the halves of x along its last axis.

    Interleaved: the elements of even and those of odd places.
    """
    cuts = [None if v is None else v.producer() for v in (first, second)]
    one, two = cuts
    if first is None or second is None or one is None or two is None:
        return None
    x = one.inputs[0]
    shape = None if x is None else op.shape(x)
    viewed = _columns_of(op, first, second)
    if viewed is not None:
        return viewed
    if x is None or not shape or x is not two.inputs[0] or one.domain or two.domain:
        return None
    size = shape[-1]
    if not isinstance(size, int) or size % 2:
        return None
    if one.op_type == "Split":
        axis = op.attr(one, "axis", 0) % len(shape)
        same = one is two and (one.outputs[0], one.outputs[1]) == (first, second)
        sizes = [(op.shape(v) or (None,))[-1] for v in (first, second)]
        return (x, False) if same and axis == len(shape) - 1 and sizes == [size // 2] * 2 else None
    if one.op_type != "Slice" or two.op_type != "Slice":
        return None
    taken = [_last_span(op, node, len(shape), size) for node in (one, two)]
    if taken == [Span(0, size // 2, 1), Span(size // 2, size, 1)]:
        return x, False
    return (x, True) if taken in ([Span(0, size, 2), Span(1, size, 2)],) else None


def _columns_of(op: Op, first: ir.Value, second: ir.Value) -> tuple[ir.Value, bool] | None:
    """As `halves_of`, where an axis of size 2 was made for the halves and is indexed."""
    reader = LinearReader(op)
    one, two = reader.step(first), reader.step(second)
    if one is None or two is None or (one.source, one.axis) != (two.source, two.axis):
        return None
    dims, view = op.shape(one.source), one.source.producer()
    x = view.inputs[0] if view is not None and view.op_type == "Reshape" else None
    shape = None if x is None else op.shape(x)
    if x is None or not dims or not shape or (one.place, two.place) != (0, 1):
        return None
    rank = len(dims)
    if one.axis not in (rank - 1, rank - 2) or dims[one.axis] != 2:
        return None
    same = shape == (*dims[:-2], dims[-2] * dims[-1])
    return (x, one.axis == rank - 1) if same else None


def _last_span(op: Op, node: ir.Node, rank: int, size: int) -> Span | None:
    found = spans(op, node)
    if found is None or set(found) != {rank - 1}:
        return None
    return found[rank - 1].resolved(size)


def rotation_of(op: Op, value: ir.Value | None) -> tuple[ir.Value, bool] | None:
    """(x, interleaved) where a value is x with its halves (a, b) as (-b, a)."""
    joined = joined_halves(op, value)
    if joined is None:
        return None
    first, second, interleaved = joined
    node = first.producer()
    if node is None or node.domain or op.uses(first) != 1:
        return None
    negated = node.inputs[0] if node.op_type == "Neg" else None
    if node.op_type == "Mul":
        pairs = (node.inputs, node.inputs[::-1])
        negated = next((v for v, minus in pairs if op.scalar(minus) == -1), None)
    halves = halves_of(op, second, negated)
    return halves if halves is not None and halves[1] == interleaved else None


def joined_halves(op: Op, value: ir.Value | None) -> tuple[ir.Value, ir.Value, bool] | None:
    """(a, b, interleaved) where a value is the halves a and b joined along its last axis."""
    node = None if value is None else value.producer()
    if value is None or node is None or node.domain:
        return None
    rank = op.rank(value)
    if node.op_type == "Concat":
        last = rank is not None and op.attr(node, "axis", 0) % rank == rank - 1
        first, second = [*node.inputs, None, None][:2]
        if not last or len(node.inputs) != 2 or first is None or second is None:
            return None
        return first, second, False
    if node.op_type != "Reshape" or rank is None:
        return None
    stack = None if node.inputs[0] is None else joined_halves(op, node.inputs[0])
    if stack is None or stack[2] or op.uses(node.inputs[0] or value) != 1:
        return None
    columns = [_without_last(op, v) for v in stack[:2]]
    first, second = columns
    if first is None or second is None or op.shape(first) != op.shape(second):
        return None
    shape = op.shape(value) or ()
    return (first, second, True) if (op.shape(first) or ())[:-1] == shape[:-1] else None


def _without_last(op: Op, value: ir.Value) -> ir.Value | None:
    """What a value is, with an axis of size 1 put behind its last one."""
    node = value.producer()
    if node is None or node.domain or node.op_type not in ("Unsqueeze", "Reshape"):
        return None
    source, shape = node.inputs[0], op.shape(value)
    inner = None if source is None else op.shape(source)
    return source if inner is not None and shape == (*inner, 1) else None


def halved(
    op: Op, value: ir.Value | None, interleaved: bool, axis: int = -1, depth: int = _DEPTH
) -> ir.Value | None:
    """A table whose second half along an axis (counted from the end) repeats the first: that one.

    Interleaved: each number of odd place repeats the one before it.
    """
    shape = None if value is None else op.shape(value)
    if value is None or not shape or not isinstance(shape[axis], int) or not depth:
        return None
    array = op.const(value)
    if array is not None:
        return _halved_constant(op, array, interleaved, axis)
    node = value.producer()
    if node is None or node.domain or len(node.outputs) != 1:
        return None
    if node.op_type == "Concat" and not interleaved:
        along = op.attr(node, "axis", 0) % len(shape) == len(shape) + axis
        if along and len(node.inputs) == 2 and node.inputs[0] is node.inputs[1]:
            return node.inputs[0]
    if interleaved and axis == -1:
        joined = joined_halves(op, value)
        if joined is not None:
            return joined[0] if joined[0] is joined[1] and joined[2] else None
    inputs: list[Any] = list(node.inputs)
    places = _along(op, node, axis)
    if not places:
        return None
    for index, place in places.items():
        inputs[index] = halved(op, inputs[index], interleaved, place, depth - 1)
        if inputs[index] is None:
            return None
    if node.op_type == "Reshape":
        half = [*shape]
        half[axis] = int(str(shape[axis])) // 2
        return reshaped(op, inputs[0], tuple(half))
    return op.build(node.op_type, inputs, node.attributes)[0]


def _halved_constant(op: Op, array: ir.Array, interleaved: bool, axis: int) -> ir.Value | None:
    size, moved = array.shape[axis], np.moveaxis(array, axis, -1)
    if size % 2:
        return None
    first, second = moved[..., : size // 2], moved[..., size // 2 :]
    if interleaved:
        first, second = moved[..., ::2], moved[..., 1::2]
    if not np.array_equal(first, second):
        return None
    return op.initializer(np.moveaxis(first, -1, axis), "half")


def _along(op: Op, node: ir.Node, axis: int) -> dict[int, int] | None:
    """Operands along whose axes a result varies along its own, each counted from the end.

    None for an operator that computes more than that along the axis, or is not known.
    """
    value = node.inputs[0]
    before = None if value is None else op.shape(value)
    after = op.shape(node.outputs[0])
    if not before or not after:
        return None
    rank, kind = len(before), node.op_type
    if kind in UNARY:
        return {0: axis}
    if kind in ("Mul", "Add", "Div", "Sub"):
        shapes = [op.shape(v) or () for v in node.inputs if v is not None]
        return {i: axis for i, s in enumerate(shapes) if len(s) >= -axis and s[axis] != 1}
    if kind == "MatMul" and rank > 1 and op.rank(node.inputs[1] or node.outputs[0]) != 1:
        return {1: -1} if axis == -1 else {0: -2} if axis == -2 else None
    if kind == "Transpose":
        perm = permutation(op, node)
        return None if perm is None else {0: perm[axis] - rank}
    if axis != -1 or before[-1] != after[-1]:
        return None
    if kind in ("Unsqueeze", "Squeeze", "Reshape"):
        return {0: -1}
    if kind == "Gather":
        return {0: -1} if op.attr(node, "axis", 0) % rank != rank - 1 else None
    if kind == "Slice" and len(node.inputs) > 3:
        axes = op.const(node.inputs[3])
        untouched = axes is not None and all(a % rank != rank - 1 for a in axes.tolist())
        return {0: -1} if untouched else None
    return None


def table(op: Op, value: ir.Value, batch: DimLike, heads: int, x: ir.Value) -> ir.Value | None:
    """Cosines or sines that broadcast to x as [B, S, D / 2], `heads` being the axis of heads.

    None where they vary with the head, or their positions are not proven to be those of x.
    """
    shape, dims = op.shape(value), op.shape(x)
    if shape is None or dims is None or len(shape) > 4:
        return None
    full: Dims = (*[1] * (4 - len(shape)), *shape)
    positions = 3 - heads
    if full[heads] != 1 or full[positions] != dims[positions] or full[0] not in (1, batch):
        return None
    flat = reshaped(op, value, (full[0], full[positions], full[3])) if len(shape) != 3 else value
    if len(shape) == 3 and heads == 2:
        flat = reshaped(op, value, (1, full[positions], full[3]))
    if flat is None or full[0] == batch:
        return flat
    return expanded(op, flat, (batch, 1, 1), [x])
