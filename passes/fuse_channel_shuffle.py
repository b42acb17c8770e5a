"""Fold a reordering of channels into the weights of the Conv before or after it.

Why: a channel shuffle (Reshape, Transpose, Reshape), or a Gather of all channels, copies the whole
tensor; the rows or columns of constant weights are put in another order for nothing.
Numerics: rounding, as the kernel sums in another order.
Needs: constant weights and one group; nothing else may use what is between.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from graphopt import ir
from graphopt.passes._chains import chain_above, replayed
from graphopt.passes._layout import permutation
from graphopt.rewriting import Op, rewrite

_Order = npt.NDArray[np.int64]


@rewrite.on("Reshape", "Gather", benefit=2)
def shuffle_after(op: Op, node: ir.Node) -> ir.Value | None:
    """What makes the channels makes them in the order that they are put in."""
    found = _reordered(op, node)
    chain = None if found is None else chain_above(op, found[0])
    conv = None if chain is None else chain[1].producer()
    if found is None or chain is None or conv is None or not _is_plain(op, conv):
        return None
    weights, order = op.const(conv.inputs[1]), found[1]
    biases = [op.const(value) for value in conv.inputs[2:3]]
    if weights is None or len(weights) != len(order) or op.uses(chain[1]) != 1:
        return None
    operands: list[Any] = [conv.inputs[0], op.initializer(weights[order], "weight")]
    for bias in biases:
        if bias is None:
            return None
        operands.append(op.initializer(bias[order], "bias"))
    return replayed(op, chain[0], op.build("Conv", operands, conv.attributes)[0])


@rewrite.on("Conv", benefit=2)
def shuffle_before(op: Op, node: ir.Node) -> ir.Value | None:
    """Channels are taken from where they were before they were put in order."""
    chain = chain_above(op, node.inputs[0])
    last = None if chain is None else chain[1].producer()
    found = None if last is None or chain is None else _reordered(op, last)
    weights = op.const(node.inputs[1])
    if chain is None or found is None or weights is None or not _is_plain(op, node):
        return None
    if op.uses(chain[1]) != 1 or weights.shape[1] != len(found[1]):
        return None
    source = replayed(op, chain[0], found[0])
    moved = op.initializer(np.ascontiguousarray(weights[:, np.argsort(found[1])]), "weight")
    return op.build("Conv", [source, moved, *node.inputs[2:]], node.attributes)[0]


def _is_plain(op: Op, node: ir.Node) -> bool:
    return node.op_type == "Conv" and not node.domain and op.attr(node, "group", 1) == 1


def _reordered(op: Op, node: ir.Node) -> tuple[ir.Value, _Order] | None:
    """(x, order) where channel c of a node's result is channel order[c] of x."""
    if node.domain or node.inputs[0] is None:
        return None
    if node.op_type == "Gather":
        shape, order = op.shape(node.inputs[0]), op.const(node.inputs[1])
        if not shape or len(shape) < 3 or int(op.attr(node, "axis", 0)) % len(shape) != 1:
            return None
        count = shape[1]
        if order is None or order.ndim != 1 or not isinstance(count, int) or len(order) != count:
            return None
        places = order.astype(np.int64) % count
        return (node.inputs[0], places) if {*places.tolist()} == {*range(count)} else None
    return _shuffled(op, node) if node.op_type == "Reshape" else None


def _shuffled(op: Op, node: ir.Node) -> tuple[ir.Value, _Order] | None:
    """The same of a Reshape that ends a channel shuffle."""
    move = None if node.inputs[0] is None else node.inputs[0].producer()
    view = None if move is None or move.inputs[0] is None else move.inputs[0].producer()
    if move is None or view is None or (move.op_type, view.op_type) != ("Transpose", "Reshape"):
        return None
    x = view.inputs[0]
    values = (x, view.outputs[0], node.outputs[0])
    before, parts, after = (None if v is None else op.shape(v) for v in values)
    if x is None or before is None or parts is None or before != after or len(before) < 3:
        return None
    wanted = [0, 2, 1, *range(3, len(parts))]
    if len(parts) != len(before) + 1 or permutation(op, move) != wanted:
        return None
    groups, each = parts[1], parts[2]
    if not isinstance(groups, int) or not isinstance(each, int) or groups * each != before[1]:
        return None
    if (parts[0], *parts[3:]) != (before[0], *before[2:]):
        return None
    if any(op.uses(n.outputs[0]) != 1 for n in (view, move)):
        return None
    return x, np.arange(groups * each).reshape(groups, each).T.reshape(-1)
