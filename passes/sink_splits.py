"""Do once before a Split what is done to each of its parts.

Why: queries, keys and values are reshaped and permuted alike; done on all of them at once, two of
three kernels go.
Numerics: exact.
Needs: parts that nothing else uses, and views that divide the axis that is split.
"""

from __future__ import annotations

from collections import Counter

from graphopt import ir
from graphopt.passes._layout import composed, inverted, permutation, transposed
from graphopt.passes._slices import split
from graphopt.passes._views import reshape_target
from graphopt.rewriting import Op, rewrite

_Mapping = dict[ir.Value, ir.Value]


def _users(op: Op, node: ir.Node, op_type: str) -> list[ir.Node] | None:
    """The only user of each part of a Split, where all are of that type."""
    users: list[ir.Node] = []
    for part in node.outputs:
        consumers = part.consumers()
        if op.uses(part) != 1 or not consumers:
            return None
        user = consumers[0]
        if user.op_type != op_type or user.domain or user.graph is not node.graph:
            return None
        if user.inputs[0] is not part:
            return None
        users.append(user)
    return users if len(users) > 1 else None


@rewrite.on("Split", benefit=2)
def reshape_before_split(op: Op, node: ir.Node) -> _Mapping | None:
    """Reshapes that divide the last axis, which is split, into parts of one size."""
    value, users = node.inputs[0], _users(op, node, "Reshape")
    whole = None if value is None else op.shape(value)
    if value is None or users is None or whole is None:
        return None
    rank = len(whole)
    if op.attr(node, "axis", 0) % rank != rank - 1:
        return None
    heads: list[int] = []
    size: object = None
    for user in users:
        shape = op.shape(user.outputs[0])
        if shape is None or len(shape) != rank + 1 or shape[: rank - 1] != whole[: rank - 1]:
            return None
        count = shape[rank - 1]
        if not isinstance(count, int) or (size is not None and shape[rank] != size):
            return None
        size = shape[rank]
        heads.append(count)
    if not isinstance(size, int):
        return None
    target = reshape_target(whole, (*whole[:-1], sum(heads), size))
    if target is None:
        return None
    parts = split(op, op.Reshape(value, target), rank - 1, heads)
    return {user.outputs[0]: part for user, part in zip(users, parts, strict=True)}


@rewrite.on("Split", benefit=2)
def transpose_before_split(op: Op, node: ir.Node) -> _Mapping | None:
    """Transposes of all parts, done before; those that differ are left with the difference."""
    value, users = node.inputs[0], _users(op, node, "Transpose")
    rank = None if value is None else op.rank(value)
    if value is None or users is None or rank is None:
        return None
    perms = [permutation(op, user) or [] for user in users]
    (common, count), *_ = Counter(map(tuple, perms)).most_common(1)
    lengths = _lengths(op, node)
    if count < 2 or len(common) != rank or lengths is None:
        return None
    perm = list(common)
    axis = perm.index(op.attr(node, "axis", 0) % rank)
    parts = split(op, op.Transpose(value, perm=perm), axis, lengths)
    back = inverted(perm)
    return {
        user.outputs[0]: transposed(op, part, composed(back, wanted))
        for user, part, wanted in zip(users, parts, perms, strict=True)
    }


def _lengths(op: Op, node: ir.Node) -> list[int] | None:
    """Sizes of a Split's parts, or None."""
    lengths: list[int] = []
    for part in node.outputs:
        shape = op.shape(part)
        if shape is None:
            return None
        size = shape[int(op.attr(node, "axis", 0)) % len(shape)]
        if not isinstance(size, int):
            return None
        lengths.append(size)
    return lengths
