"""Take sequences apart that are built in the model: elements, lengths, insertions, concatenations.

Why: torch's lists of tensors become sequences, which no runtime fuses across.
Numerics: exact.
Needs: known positions and lengths.
"""

from __future__ import annotations

import numpy as np

from graphopt import ir
from graphopt.passes._slices import split
from graphopt.passes._views import axes_arguments
from graphopt.rewriting import Op, rewrite

_DEPTH = 64


def _elements(op: Op, sequence: ir.Value | None, depth: int = _DEPTH) -> list[ir.Value] | None:
    """The members of a sequence, where the operators that build it list them."""
    node = None if sequence is None else sequence.producer()
    if node is None or node.domain or not depth:
        return None
    if node.op_type == "SequenceConstruct":
        return [value for value in node.inputs if value is not None]
    if node.op_type == "SequenceEmpty":
        return []
    if node.op_type not in ("SequenceInsert", "SequenceErase"):
        return None
    members = _elements(op, node.inputs[0], depth - 1)
    inserting = node.op_type == "SequenceInsert"
    place = node.inputs[1 + inserting] if len(node.inputs) > 1 + inserting else None
    if members is None:
        return None
    index = len(members) - (not inserting) if place is None else op.scalar(place)
    if not isinstance(index, int) or not -len(members) <= index < len(members) + inserting:
        return None
    if not inserting:
        del members[index]
        return members
    added = node.inputs[1]
    if added is None:
        return None
    members.insert(index, added)
    return members


@rewrite.on("SequenceAt")
def element_of_list(op: Op, node: ir.Node) -> ir.Value | None:
    """An element, by a known position, of a sequence that is built of its elements."""
    elements, index = _elements(op, node.inputs[0]), op.scalar(node.inputs[1])
    if elements is None or not isinstance(index, int):
        return None
    return elements[index] if -len(elements) <= index < len(elements) else None


@rewrite.on("SequenceLength")
def length_of_list(op: Op, node: ir.Node) -> ir.Value | None:
    """How many elements there are."""
    elements = _elements(op, node.inputs[0])
    if elements is None:
        return None
    return op.initializer(np.asarray(len(elements), np.int64), "length")


@rewrite.on("ConcatFromSequence")
def concat_of_list(op: Op, node: ir.Node) -> ir.Value | None:
    """The elements side by side, or stacked along a new axis."""
    elements, axis = _elements(op, node.inputs[0]), op.attr(node, "axis")
    if not elements:
        return _unsplit(op, node)
    if op.attr(node, "new_axis", 0):
        more, attributes = axes_arguments(op, [axis])
        elements = [op.Unsqueeze(element, *more, **attributes) for element in elements]
    return op.Concat(*elements, axis=axis)


def _unsplit(op: Op, node: ir.Node) -> ir.Value | None:
    """What a SplitToSequence cuts along the axis along which a node puts it together again."""
    made = None if node.inputs[0] is None else node.inputs[0].producer()
    if made is None or made.op_type != "SplitToSequence" or made.domain or made.inputs[0] is None:
        return None
    rank, stacked = op.rank(made.inputs[0]), bool(op.attr(node, "new_axis", 0))
    dropped = len(made.inputs) < 2 and not op.attr(made, "keepdims", 1)
    if rank is None or stacked != dropped:
        return None
    axes = [int(op.attr(n, "axis", 0)) % rank for n in (made, node)]
    return made.inputs[0] if axes[0] == axes[1] else None


@rewrite.on("SplitToSequence")
def split_into_elements(op: Op, node: ir.Node) -> dict[ir.Value, ir.Value] | None:
    """A sequence of parts of which each use takes one, by a known position, is a Split."""
    value, sequence = node.inputs[0], node.outputs[0]
    shape = None if value is None else op.shape(value)
    users = sequence.consumers()
    if value is None or not shape or sequence.is_graph_output() or not users:
        return None
    axis = int(op.attr(node, "axis", 0)) % len(shape)
    lengths = _lengths(op, node, shape[axis])
    if lengths is None:
        return None
    places: dict[ir.Node, int] = {}
    for user in users:
        index = op.scalar(user.inputs[1]) if user.op_type == "SequenceAt" else None
        if not isinstance(index, int) or not -len(lengths) <= index < len(lengths):
            return None
        if user.graph is not node.graph:
            return None
        places[user] = index % len(lengths)
    parts = split(op, value, axis, lengths)
    if len(node.inputs) < 2 and not op.attr(node, "keepdims", 1):
        more, attributes = axes_arguments(op, [axis])
        parts = [op.Squeeze(part, *more, **attributes) for part in parts]
    return {user.outputs[0]: parts[index] for user, index in places.items()}


def _lengths(op: Op, node: ir.Node, size: object) -> list[int] | None:
    """The sizes of the parts that an axis of a known size is cut into."""
    if not isinstance(size, int) or not size:
        return None
    if len(node.inputs) < 2 or node.inputs[1] is None:
        return [1] * size
    given = op.const(node.inputs[1])
    if given is None:
        return None
    if given.ndim:
        return [int(part) for part in given.tolist()]
    each = int(given.item())
    return [min(each, size - start) for start in range(0, size, each)] if each > 0 else None
