"""Take the squared distances of a Scan, one by one to points, from the differences of all pairs.

Why: a compiler that fuses the differences into the sums makes one kernel of it; a Scan falls back.
Numerics: exact.
Needs: opset 13; a target that computes all differences only as it adds them up, or room for them.
"""

from __future__ import annotations

from graphopt import ir
from graphopt.passes._distances import distances
from graphopt.rewriting import Op, rewrite

_OPSET = 13


@rewrite.on("Scan", benefit=3)
def expand_cdist(op: Op, node: ir.Node) -> dict[ir.Value, ir.Value] | None:
    """Over rows p of P, with x as the state: sum((x - p)^2) -> sum((x[None] - P[:, None])^2)."""
    found = distances(op, node) if op.opset >= _OPSET else None
    if found is None:
        return None
    x, points = found
    pairs = op.Sub(op.Unsqueeze(x, [0]), op.Unsqueeze(points, [1]))
    if op.opset >= 18:
        squares = op.ReduceSumSquare(pairs, [2], keepdims=0)
    else:
        squares = op.ReduceSumSquare(pairs, axes=[2], keepdims=0)
    return {node.outputs[0]: x, node.outputs[1]: squares}
