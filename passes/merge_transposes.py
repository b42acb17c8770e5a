"""Merge pairs of Transposes.

Why: layout conversions of exporters undo each other.
Numerics: exact.
Needs: permutations that are known.
"""

from __future__ import annotations

from graphopt import ir
from graphopt.passes._layout import composed, is_identity, permutation
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
