"""Merge Pad, Tile and Expand with one of their kind, and take parts of a Concat from its operands.

Why: each of them copies the whole tensor.
Numerics: exact.
Needs: constant amounts; parts that lie within single operands.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from graphopt import ir
from graphopt.dims import DimLike
from graphopt.passes._slices import END, Span, sliced, spans
from graphopt.rewriting import Op, rewrite


def _same_kind(op: Op, node: ir.Node) -> ir.Node | None:
    """The node of the same operator that makes what a node takes, and nothing else takes."""
    value = node.inputs[0]
    inner = None if value is None else value.producer()
    if value is None or inner is None or inner.op_type != node.op_type or inner.domain:
        return None
    return inner if op.uses(value) == 1 else None


@rewrite.on("Pad")
def pad_padded(op: Op, node: ir.Node) -> ir.Value | None:
    """Constant borders of the same number around borders."""
    inner = _same_kind(op, node)
    found = [_borders(op, n) for n in (inner, node) if n is not None]
    if inner is None or len(found) < 2 or found[0] is None or found[1] is None:
        return None
    (first, number), (second, other) = found[0], found[1]
    if number != other or len(first) != len(second) or min(*first, *second) < 0:
        return None
    total = [a + b for a, b in zip(first, second, strict=True)]
    if op.opset < 11:
        return op.build("Pad", inner.inputs[:1], {**node.attributes, "pads": total})[0]
    return op.Pad(inner.inputs[0], total, *inner.inputs[2:3])


def _borders(op: Op, node: ir.Node) -> tuple[list[int], object] | None:
    if op.opset < 11:
        amounts = op.attr(node, "pads")
        plain = op.attr(node, "mode", "constant") == "constant"
        return (list(amounts), op.attr(node, "value", 0.0)) if amounts and plain else None
    pads = op.const(node.inputs[1]) if len(node.inputs) > 1 else None
    number = node.inputs[2] if len(node.inputs) > 2 else None
    value = 0 if number is None else op.scalar(number)
    if pads is None or value is None or op.attr(node, "mode", "constant") != "constant":
        return None
    return None if len(node.inputs) > 3 and node.inputs[3] is not None else (pads.tolist(), value)


@rewrite.on("Slice")
def slice_padded(op: Op, node: ir.Node) -> ir.Value | None:
    """A part of a padded tensor that has nothing of the borders is a part of the tensor."""
    value, taken = node.inputs[0], spans(op, node)
    pad = None if value is None else value.producer()
    if value is None or taken is None or pad is None or pad.op_type != "Pad" or pad.domain:
        return None
    source, found = pad.inputs[0], _borders(op, pad)
    before = None if source is None else op.shape(source)
    if source is None or found is None or before is None or min(found[0]) < 0:
        return None
    rest = dict(taken)
    for axis, size in enumerate(before):
        low, high = found[0][axis], found[0][len(before) + axis]
        if not low and not high:
            continue
        inside = _inside(taken.get(axis), size, low, high)
        if inside is None:
            return None
        rest[axis] = inside
        if inside == Span(0, END, 1):
            del rest[axis]
    return sliced(op, source, rest) if rest else source


def _inside(span: Span | None, size: DimLike, low: int, high: int) -> Span | None:
    """What a Slice of a padded axis takes of the axis itself; None where it takes its borders."""
    if span is None or span.step != 1:
        return None
    if not isinstance(size, int):
        to_end = span.end >= END // 2 if not high else span.end == -high
        return Span(0, END, 1) if span.start == low and to_end else None
    found = span.resolved(low + size + high)
    if found is None or not low <= found.start < found.end <= low + size:
        return None
    if (found.start, found.end) == (low, low + size):
        return Span(0, END, 1)
    return Span(found.start - low, found.end - low, 1)


@rewrite.on("Tile")
def tile_tiled(op: Op, node: ir.Node) -> ir.Value | None:
    """Copies of copies."""
    inner = _same_kind(op, node)
    if inner is None or op.opset < 6:
        return None
    first, second = op.const(inner.inputs[1]), op.const(node.inputs[1])
    if first is None or second is None:
        return None
    total = first.astype(np.int64) * second.astype(np.int64)
    return op.Tile(inner.inputs[0], total)


@rewrite.on("Expand")
def expand_expanded(op: Op, node: ir.Node) -> ir.Value | None:
    """An Expand to a known shape, whatever is expanded before."""
    inner, shape = _same_kind(op, node), op.shape(node.outputs[0])
    if inner is None or shape is None or not all(isinstance(size, int) for size in shape):
        return None
    return op.Expand(inner.inputs[0], [int(str(size)) for size in shape])


@rewrite.on("Slice")
def slice_joined(op: Op, node: ir.Node) -> ir.Value | None:
    """A part of a Concat that lies within one operand is a part of that."""
    taken = spans(op, node)
    joined = _joined(op, node.inputs[0])
    if taken is None or joined is None or joined[0] not in taken or ir.constant(node.outputs[0]):
        return None
    axis, operands, sizes = joined
    span = taken[axis].resolved(sum(sizes))
    if span is None or span.step != 1 or span.end <= span.start:
        return None
    start = 0
    for operand, size in zip(operands, sizes, strict=True):
        if start <= span.start and span.end <= start + size:
            inside = Span(span.start - start, span.end - start, 1)
            rest = {a: s for a, s in taken.items() if a != axis}
            if (inside.start, inside.end) != (0, size):
                rest[axis] = inside
            return sliced(op, operand, rest) if rest else operand
        start += size
    return None


@rewrite.on("Split")
def split_joined(op: Op, node: ir.Node) -> list[ir.Value | None] | None:
    """Parts of a Concat that are operands of it."""
    joined = _joined(op, node.inputs[0])
    if joined is None:
        return None
    axis, operands, sizes = joined
    rank = op.rank(operands[0])
    if rank is None or op.attr(node, "axis", 0) % rank != axis:
        return None
    places: dict[int, tuple[ir.Value, int]] = {}
    start = 0
    for operand, size in zip(operands, sizes, strict=True):
        places[start] = operand, size
        start += size
    start, found = 0, list[ir.Value | None]()
    for output in node.outputs:
        length = (op.shape(output) or (None,) * rank)[axis]
        if not isinstance(length, int):
            return None
        place = places.get(start)
        found.append(place[0] if place is not None and place[1] == length else None)
        start += length
    return found if any(v is not None for v in found) else None


def _joined(op: Op, value: ir.Value | None) -> tuple[int, Sequence[ir.Value], list[int]] | None:
    """(axis, operands, their sizes along it) of a Concat of tensors of known sizes."""
    node = None if value is None else value.producer()
    rank = None if value is None else op.rank(value)
    if value is None or node is None or node.op_type != "Concat" or node.domain or not rank:
        return None
    if op.values(value) is not None:
        return None  # a shape: what computes with it is known element by element
    axis = int(op.attr(node, "axis", 0)) % rank
    operands = [v for v in node.inputs if v is not None]
    sizes = [(op.shape(v) or (None,) * rank)[axis] for v in operands]
    known = [size for size in sizes if isinstance(size, int)]
    return (axis, operands, known) if len(known) == len(sizes) else None


@rewrite.on("ScatterND")
def scatter_over_all(op: Op, node: ir.Node) -> ir.Value | None:
    """Updates of every element, each at its own place, are the result."""
    data, indices, updates = node.inputs
    places = op.const(indices)
    if data is None or updates is None or places is None or not places.ndim:
        return None
    if op.attr(node, "reduction", "none") != "none" or op.shape(data) != op.shape(updates):
        return None
    depth, shape = places.shape[-1], op.shape(data) or ()
    if not depth or not all(isinstance(size, int) for size in shape[:depth]):
        return None
    sizes = [int(str(size)) for size in shape[:depth]]
    if places.shape[:-1] != tuple(sizes):
        return None
    grid = np.moveaxis(np.indices(sizes), 0, -1)
    found = places.astype(np.int64)
    return updates if np.array_equal(np.where(found < 0, found + sizes, found), grid) else None


@rewrite.on("ScatterElements", "Scatter")
def scatter_elements_over_all(op: Op, node: ir.Node) -> ir.Value | None:
    """Updates of every element along an axis, in order, are the result."""
    data, indices, updates = node.inputs
    places = op.const(indices)
    if data is None or updates is None or places is None or not places.ndim:
        return None
    if op.attr(node, "reduction", "none") != "none" or op.shape(data) != places.shape:
        return None
    axis = int(op.attr(node, "axis", 0)) % places.ndim
    size = places.shape[axis]
    order = np.moveaxis(np.indices(places.shape), 0, -1)[..., axis]
    return updates if np.array_equal(places.astype(np.int64) % size, order) else None
