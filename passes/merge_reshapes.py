"""Merge chains of Reshape, Flatten, Squeeze and Unsqueeze.

Why: exporters write views one axis at a time; only the last shape matters, and a chain that comes
back to the first one is nothing at all.
Numerics: exact.
Needs: the shapes before and after, up to one dimension (Reshape's -1).
"""

from __future__ import annotations

from graphopt import ir
from graphopt.passes._views import VIEWS, free_of_zeros, is_view, reshaped, resqueezed
from graphopt.rewriting import Op, rewrite


@rewrite.on(*VIEWS)
def merge_reshapes(op: Op, node: ir.Node) -> ir.Value | None:
    """A view of views is one view of the first's input, or that input itself."""
    source = node.inputs[0]
    length = 0
    while source is not None and is_view(producer := source.producer()):
        assert producer is not None
        source = producer.inputs[0]
        length += 1
    if source is None:
        return None
    after = op.shape(node.outputs[0])
    if after is not None and op.shape(source) == after:
        return source
    if not length:
        return None
    if after is not None:
        makers = (reshaped, resqueezed) if node.op_type == "Reshape" else (resqueezed, reshaped)
        for make in makers:
            view = make(op, source, after)
            if view is not None:
                return view
    if node.op_type == "Reshape" and free_of_zeros(op, node):
        return op.Reshape(source, node.inputs[1], allowzero=op.attr(node, "allowzero"))
    return None
