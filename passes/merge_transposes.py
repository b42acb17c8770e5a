"""Merge pairs of Transposes, and make those that move no data a Reshape.

Why: layout conversions of exporters undo each other; moving an axis of size 1 moves nothing.
Numerics: exact.
Needs: for the Reshape, the shape up to one dimension.
"""

from __future__ import annotations

from graphopt import ir
from graphopt.passes._layout import composed, is_identity, permutation
from graphopt.passes._views import reshaped
from graphopt.rewriting import Op, rewrite


@rewrite.on("Transpose", benefit=2)
def merge_transposes(op: Op, node: ir.Node) -> ir.Value | None:
    """Two Transposes are one, or none."""
    value = node.inputs[0]
    perm = None if value is None else permutation(op, node)
    if value is None or perm is None:
        return None
    if is_identity(perm):
        return value
    inner = value.producer()
    if inner is None or inner.op_type != "Transpose" or inner.domain:
        return None
    source, first = inner.inputs[0], permutation(op, inner)
    if source is None or first is None:
        return None
    both = composed(first, perm)
    return source if is_identity(both) else op.Transpose(source, perm=both)


@rewrite.on("Transpose")
def transpose_as_reshape(op: Op, node: ir.Node) -> ir.Value | None:
    """A Transpose that keeps the order of all axes larger than 1 is a view."""
    value = node.inputs[0]
    before = None if value is None else op.shape(value)
    perm = permutation(op, node)
    if value is None or before is None or perm is None:
        return None
    moved = [axis for axis in perm if before[axis] != 1]
    if moved != sorted(moved):
        return None
    return reshaped(op, value, tuple(before[axis] for axis in perm))
