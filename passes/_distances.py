"""Scans that take squared distances to points one by one."""

from __future__ import annotations

from graphopt import ir
from graphopt.rewriting import Op, Refuse

_WHERE = ("axes", "directions")


def distances(op: Op, node: ir.Node) -> tuple[ir.Value, ir.Value] | None:
    """(x, P) where a Scan over rows p of P takes sum((x - p)^2) along the last axis, else None.

    Raises:
        Refuse: one of them is no matrix.
    """
    body = next(ir.subgraphs(node), None)
    if (
        body is None
        or op.attr(node, "num_scan_inputs") != 1
        or len(node.inputs) != 2
        or len(body.inputs) != 2
    ):
        return None
    if any(op.attr(node, f"scan_{side}put_{what}") for side in ("in", "out") for what in _WHERE):
        return None
    state, row = body.inputs
    if len(body.outputs) != 2 or ir.behind_identities(body.outputs[0]) is not state:
        return None
    if not _is_square_distance(op, body.outputs[1], state, row):
        return None
    x, points = node.inputs
    if x is None or points is None or op.rank(x) != 2 or op.rank(points) != 2:
        raise Refuse("the points are no matrix")
    return x, points


def _is_square_distance(op: Op, value: ir.Value, state: ir.Value, row: ir.Value) -> bool:
    total = value.producer()
    if total is None or total.op_type != "ReduceSumSquare" or op.attr(total, "keepdims", 1):
        return False
    axes = op.attr(total, "axes")
    if len(total.inputs) > 1:
        known = op.const(total.inputs[1])
        axes = None if known is None else known.tolist()
    difference = None if total.inputs[0] is None else total.inputs[0].producer()
    if list(axes or []) not in ([1], [-1]) or difference is None or difference.op_type != "Sub":
        return False
    return {ir.behind_identities(x) for x in difference.inputs if x is not None} == {state, row}
