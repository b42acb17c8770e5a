"""Merge gathers of single elements into a Split, and gathers and slices of gathers into one.

Why: each Gather is a kernel and a copy; exporters write `x[:, i:i + 1]` as one.
Numerics: exact.
Needs: constant indices that are all of an axis of known size; no more nodes than before: elements
that lose the axis would each take a Squeeze, unless what is computed of them loses it later.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from graphopt import ir
from graphopt.passes._layout import BROADCASTING, UNARY
from graphopt.passes._slices import END, Span, sliced, spans, split
from graphopt.passes._views import axes_arguments
from graphopt.rewriting import Op, rewrite

_MOST_USES = 256  # each gather looks at all others


@rewrite.on("Unsqueeze", benefit=2)
def gather_unsqueeze(op: Op, node: ir.Node) -> ir.Value | None:
    """One element whose axis comes back at once is a Gather that keeps it."""
    value = node.inputs[0]
    gather = None if value is None else value.producer()
    found = None if gather is None else _place(op, gather)
    if gather is None or found is None or _regained(op, gather, found[0]) is not node:
        return None
    source = gather.inputs[0]
    return None if source is None else op.Gather(source, [found[1]], axis=found[0])


@rewrite.on("GatherND", benefit=2)
def gather_rows(op: Op, node: ir.Node) -> ir.Value | None:
    """Indices into the first axis, put along a last axis of one, are those of a Gather."""
    value, wide = node.inputs[0], node.inputs[1]
    view = None if wide is None else wide.producer()
    if value is None or wide is None or view is None or op.attr(node, "batch_dims", 0):
        return None
    if view.op_type not in ("Unsqueeze", "Reshape") or view.domain or view.inputs[0] is None:
        return None
    inner, outer = op.shape(view.inputs[0]), op.shape(wide)
    if inner is None or outer != (*inner, 1):
        return None
    return op.Gather(value, view.inputs[0])


@rewrite.on("Gather")
def gather_only_element(op: Op, node: ir.Node) -> ir.Value | None:
    """The only element of an axis is what is left without the axis."""
    value, found = node.inputs[0], _place(op, node)
    if value is None or found is None or found[2] or op.values(value) is not None:
        return None
    if (op.shape(value) or ())[found[0]] != 1:
        return None
    more, attributes = axes_arguments(op, [found[0]])
    return op.Squeeze(value, *more, **attributes)


@rewrite.on("Squeeze")
def slice_squeezed(op: Op, node: ir.Node) -> ir.Value | None:
    """A Slice of one element that then loses its axis is a Gather of it."""
    value = node.inputs[0]
    part = None if value is None else value.producer()
    taken = None if part is None else spans(op, part)
    if value is None or part is None or taken is None or len(taken) != 1 or op.uses(value) != 1:
        return None
    (axis, span), *_ = taken.items()
    before, after, source = op.shape(value), op.shape(node.outputs[0]), part.inputs[0]
    if before is None or after is None or source is None or op.values(source) is not None:
        return None
    if before[axis] != 1 or after != (*before[:axis], *before[axis + 1 :]):
        return None
    last = span.start == -1 and span.end >= END // 2
    if span.step != 1 or not (last or span.end == span.start + 1) or span.end == 0:
        return None
    if span.start < 0 and op.opset < 11:
        return None
    return op.Gather(source, op.initializer(np.asarray(span.start, np.int64)), axis=axis)


@rewrite.on("Gather", "Slice", benefit=2)
def part_of_gathered(op: Op, node: ir.Node) -> ir.Value | None:
    """Some of the elements that a Gather took are gathered at once."""
    value = node.inputs[0]
    inner = None if value is None else value.producer()
    if value is None or inner is None or inner.op_type != "Gather" or inner.domain:
        return None
    source, places, rank = inner.inputs[0], op.const(inner.inputs[1]), op.rank(value)
    if source is None or places is None or places.ndim != 1 or rank is None or op.uses(value) != 1:
        return None
    axis = int(op.attr(inner, "axis", 0)) % rank
    if node.op_type == "Gather":
        indices = op.const(node.inputs[1])
        if indices is None or int(op.attr(node, "axis", 0)) % rank != axis or not indices.size:
            return None
        wanted, count = indices.astype(np.int64), len(places)
        if int(wanted.min()) < -count or int(wanted.max()) >= count:
            return None
        return op.Gather(source, op.initializer(places[wanted]), axis=axis)
    taken = spans(op, node)
    if taken is None or set(taken) != {axis}:
        return None
    span = taken[axis].resolved(len(places))
    if span is None:
        return None
    kept = places[span.start : span.end : span.step]
    return op.Gather(source, op.initializer(kept), axis=axis) if kept.size else None


@rewrite.on("Gather")
def gather_of_neighbours(op: Op, node: ir.Node) -> ir.Value | None:
    """Elements that follow each other are a Slice, which merges with others."""
    value, indices = node.inputs[0], op.const(node.inputs[1])
    shape = None if value is None else op.shape(value)
    if value is None or not shape or indices is None or indices.ndim != 1 or len(indices) < 2:
        return None
    axis = int(op.attr(node, "axis", 0)) % len(shape)
    first, places = int(indices[0].item()), indices.astype(np.int64)
    size = shape[axis]
    if first < 0 or not isinstance(size, int) or op.values(value) is not None:
        return None
    if not np.array_equal(places, np.arange(first, first + len(places))):
        return None
    if first + len(places) > size or ir.constant(value) is not None:
        return None
    return sliced(op, value, {axis: Span(first, first + len(places), 1)})


@rewrite.on("Gather")
def gathers_to_split(op: Op, node: ir.Node) -> dict[ir.Value, ir.Value] | None:
    """Gathers of one element each that together are all of an axis are a Split."""
    value, own = node.inputs[0], _place(op, node)
    if value is None or own is None or op.uses(value) > _MOST_USES:
        return None
    if op.values(value) is not None:
        return None  # a shape: what computes with it is known element by element
    axis, size = own[0], (op.shape(value) or ())[own[0]]
    gathers: dict[ir.Node, tuple[int, bool]] = {}
    for user in dict.fromkeys(value.consumers()):
        found = _place(op, user) if user.graph is node.graph else None
        if found is not None and found[0] == axis and user.inputs[0] is value:
            if _regained(op, user, axis) is not None:
                return None  # until it keeps its axis
            gathers[user] = found[1:]
    taken = {index for index, _ in gathers.values()}
    squeezed = {index for index, keeps in gathers.values() if not keeps}
    if not isinstance(size, int) or size < 2 or taken != set(range(size)):
        return None
    if 1 + len(squeezed) > len(gathers):
        return _kept_axis(op, gathers, value, size) if axis == 0 else None
    parts = split(op, value, axis, [1] * size)
    more, attributes = axes_arguments(op, [axis])
    elements = {index: op.Squeeze(parts[index], *more, **attributes) for index in sorted(squeezed)}
    return {
        gather.outputs[0]: parts[index] if keeps else elements[index]
        for gather, (index, keeps) in gathers.items()
    }


def _kept_axis(
    op: Op, gathers: dict[ir.Node, tuple[int, bool]], value: ir.Value, size: int
) -> dict[ir.Value, ir.Value] | None:
    """The operators on elements done with their leading axis, which only the results lose."""
    region, results = _region(op, gathers)
    removed, added = len(gathers), 1 + len(results)
    if not results or added > removed or any(keeps for _, keeps in gathers.values()):
        return None
    parts = split(op, value, 0, [1] * size)
    known = {gather.outputs[0]: parts[index] for gather, (index, _) in gathers.items()}
    for node in region:
        inputs = [None if v is None else known.get(v, v) for v in node.inputs]
        known[node.outputs[0]] = op.build(node.op_type, inputs, node.attributes)[0]
    more, attributes = axes_arguments(op, [0])
    return {result: op.Squeeze(known[result], *more, **attributes) for result in results}


def _region(op: Op, gathers: Iterable[ir.Node]) -> tuple[list[ir.Node], list[ir.Value]]:
    """(operators on elements and their results, what of them is used elsewhere)."""
    inside = dict.fromkeys(gather.outputs[0] for gather in gathers)
    rank = op.rank(next(iter(inside)))
    region: list[ir.Node] = []
    open_values = list(inside)
    while open_values and len(region) < _MOST_USES:
        for user in dict.fromkeys(open_values.pop(0).consumers()):
            if user in region or not _extends(op, user, inside, rank):
                continue
            region.append(user)
            inside[user.outputs[0]] = None
            open_values.append(user.outputs[0])
    results = [
        v
        for v in inside
        if v.is_graph_output() or any(u not in region for u in v.consumers()) or not v.consumers()
    ]
    return region, results


def _extends(op: Op, node: ir.Node, inside: Mapping[ir.Value, None], rank: int | None) -> bool:
    """Whether an operator computes the same of tensors with a further leading axis of size 1."""
    if node.domain or len(node.outputs) != 1 or rank is None or next(ir.subgraphs(node), None):
        return False
    outer = [v for v in node.inputs if v is not None and v not in inside]
    if any(ir.constant(v) is None or (op.rank(v) or 0) > rank for v in outer):
        return False
    if op.rank(node.outputs[0]) != rank or any(op.rank(v) != rank for v in inside):
        return False
    if node.op_type == "MatMul":
        return rank > 1
    return node.op_type in UNARY or node.op_type in BROADCASTING


def _place(op: Op, node: ir.Node) -> tuple[int, int, bool] | None:
    """(axis, index, whether the axis stays) of a Gather of one element of a known axis."""
    if node.op_type != "Gather" or node.domain or node.inputs[0] is None:
        return None
    shape, indices = op.shape(node.inputs[0]), op.const(node.inputs[1])
    if not shape or indices is None or indices.shape not in ((), (1,)):
        return None
    axis: int = op.attr(node, "axis", 0) % len(shape)
    size, index = shape[axis], int(indices.item())
    if not isinstance(size, int) or not -size <= index < size:
        return None
    return axis, index % size, indices.ndim == 1


def _regained(op: Op, gather: ir.Node, axis: int) -> ir.Node | None:
    """The Unsqueeze, alone in using a Gather of one element, that puts its axis back."""
    value = gather.outputs[0]
    rank, users = op.rank(value), value.consumers()
    node = users[0] if op.uses(value) == 1 and users else None
    source = gather.inputs[0]
    full = None if source is None else op.rank(source)
    if node is None or node.op_type != "Unsqueeze" or node.domain or rank is None:
        return None
    axes = op.attr(node, "axes")
    if axes is None and len(node.inputs) > 1:
        constant = op.const(node.inputs[1])
        axes = None if constant is None else constant.reshape(-1).tolist()
    if axes is None or len(axes) != 1 or full is None or full != rank + 1:
        return None
    return node if axes[0] % full == axis and node.graph is gather.graph else None
