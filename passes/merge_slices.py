"""Merge slices of slices, and slices that share a tensor out into a Split.

Why: each slice is a kernel and a copy; exporters slice one axis at a time.
Numerics: exact.
Needs: constant bounds; for a Split, slices that follow each other over a whole axis of known size.
"""

from __future__ import annotations

from graphopt import ir
from graphopt.passes._slices import Span, sliced, spans, split
from graphopt.rewriting import Op, rewrite

_MOST_USES = 256  # each slice looks at all others


@rewrite.on("Slice", benefit=2)
def merge_slices(op: Op, node: ir.Node) -> ir.Value | None:
    """A slice of a slice is one slice."""
    value = node.inputs[0]
    producer = None if value is None else value.producer()
    if value is None or producer is None or op.uses(value) != 1:
        return None
    first, second = spans(op, producer), spans(op, node)
    source = None if first is None else producer.inputs[0]
    if first is None or second is None or source is None:
        return None
    shape, inner = op.shape(source), op.shape(value)
    if shape is None or inner is None:
        return None
    merged: dict[int, Span] = {**first, **second}
    for axis in first.keys() & second.keys():
        outer, then = first[axis].resolved(shape[axis]), second[axis].resolved(inner[axis])
        if outer is None or then is None:
            return None
        merged[axis] = outer.then(then)
    return sliced(op, source, merged)


@rewrite.on("Slice")
def slices_to_split(op: Op, node: ir.Node) -> dict[ir.Value, ir.Value] | None:
    """Slices of one tensor that together are all of it, each once, are a Split."""
    value = node.inputs[0]
    place = None if value is None else _place(op, node)
    if value is None or place is None or op.uses(value) > _MOST_USES:
        return None
    axis = place[0]
    size = (op.shape(value) or ())[axis]
    if not isinstance(size, int):
        return None
    parts: dict[tuple[int, int], ir.Node] = {}
    for user in value.consumers():
        found = _place(op, user) if user.graph is node.graph else None
        if found is not None and found[0] == axis:
            parts.setdefault(found[1:], user)
    chain = _chain(set(parts), place[1:], size)
    if chain is None:
        return None
    lengths = [end - start for start, end in chain]
    outputs = split(op, value, axis, lengths)
    return {parts[part].outputs[0]: output for part, output in zip(chain, outputs, strict=True)}


def _place(op: Op, node: ir.Node) -> tuple[int, int, int] | None:
    """(axis, start, end) of a Slice along one axis of known size, in steps of 1."""
    taken = spans(op, node)
    shape = None if taken is None or node.inputs[0] is None else op.shape(node.inputs[0])
    if taken is None or shape is None:
        return None
    real: list[tuple[int, int, int]] = []
    for axis, span in taken.items():
        found, size = span.resolved(shape[axis]), shape[axis]
        if found is None or found.step != 1:
            return None
        if not isinstance(size, int):
            if (found.start, found.end) != (0, 2**63 - 1):
                return None
        elif (found.start, found.end) != (0, size):
            real.append((axis, found.start, found.end))
    return real[0] if len(real) == 1 and real[0][1] < real[0][2] else None


def _chain(
    parts: set[tuple[int, int]], own: tuple[int, int], size: int
) -> list[tuple[int, int]] | None:
    """The parts in order, where they cover 0..size without gap or overlap and `own` is one."""
    chain: list[tuple[int, int]] = []
    position = 0
    while position < size:
        following = [part for part in parts if part[0] == position]
        if len(following) != 1:
            return None
        chain.append(following[0])
        position = following[0][1]
    return chain if position == size and own in chain and len(chain) > 1 else None


@rewrite.on("Concat")
def drop_split_concat(op: Op, node: ir.Node) -> ir.Value | None:
    """All parts of a Split, side by side in order along its axis, are what was split."""
    inputs = list(node.inputs)
    for start, value in enumerate(inputs):
        first = None if value is None else value.producer()
        if first is None or first.op_type != "Split" or first.domain or first.inputs[0] is None:
            continue
        rank, end = op.rank(first.inputs[0]), start + len(first.outputs)
        axis, other = op.attr(node, "axis"), op.attr(first, "axis", 0)
        same = axis == other or (rank is not None and axis % rank == other % rank)
        if not same or inputs[start:end] != list(first.outputs):
            continue
        inputs[start:end] = [first.inputs[0]]
        if len(inputs) == 1:
            return first.inputs[0]
        unused = all(op.uses(part) == 1 for part in first.outputs)
        return op.build("Concat", inputs, node.attributes)[0] if unused else None
    return None


@rewrite.on("Split", benefit=2)
def merge_splits(op: Op, node: ir.Node) -> dict[ir.Value, ir.Value] | None:
    """A Split of a part of a Split along the same axis."""
    value = node.inputs[0]
    outer = None if value is None else value.producer()
    if value is None or outer is None or outer.op_type != "Split" or outer.domain:
        return None
    source, rank = outer.inputs[0], op.rank(value)
    if source is None or rank is None or op.uses(value) != 1 or outer.graph is not node.graph:
        return None
    axis = int(op.attr(outer, "axis", 0)) % rank
    if axis != int(op.attr(node, "axis", 0)) % rank:
        return None
    parts: list[ir.Value] = []
    for part in outer.outputs:
        parts += node.outputs if part is value else [part]
    shapes = [op.shape(part) for part in parts]
    sizes = [size for s in shapes if s is not None and isinstance(size := s[axis], int)]
    if len(sizes) < len(parts):
        return None
    return dict(zip(parts, split(op, source, axis, sizes), strict=True))


@rewrite.on("Concat")
def merge_concats(op: Op, node: ir.Node) -> ir.Value | None:
    """A Concat within a Concat along the same axis."""
    rank = op.rank(node.outputs[0])
    axis = op.attr(node, "axis")
    inputs: list[ir.Value | None] = []
    for value in node.inputs:
        inner = None if value is None else value.producer()
        if value is not None and inner is not None and rank is not None and op.uses(value) == 1:
            same = inner.op_type == "Concat" and not inner.domain
            if same and op.attr(inner, "axis") % rank == axis % rank:
                inputs += inner.inputs
                continue
        inputs.append(value)
    if len(inputs) == len(node.inputs):
        return None
    return op.build("Concat", inputs, node.attributes)[0]
