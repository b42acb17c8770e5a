"""Move Reshape, Squeeze, Unsqueeze and Flatten across element-wise operators to where they merge.

Why: a view before an operator and one after it are one view, or none; operands that are viewed
alike can be viewed once, together.
Numerics: exact.
Needs: the shapes before and after, up to one dimension.
"""

from __future__ import annotations

from typing import Any

from graphopt import ir
from graphopt.passes._chains import chain_above, replayed
from graphopt.passes._layout import BROADCASTING
from graphopt.passes._views import VIEWS, is_view, reshaped
from graphopt.rewriting import Op, rewrite


@rewrite.on(*VIEWS)
def merge_views_across(op: Op, node: ir.Node) -> ir.Value | None:
    """A view of operators on a view: the operators on its source, and one view at most."""
    found = chain_above(op, node.inputs[0])
    if found is None or not found[0]:
        return None
    nodes, value = found
    view, after = value.producer(), op.shape(node.outputs[0])
    source = view.inputs[0] if view is not None and is_view(view) else None
    if source is None or after is None or op.uses(value) != 1:
        return None
    before = op.shape(source)
    if before is None:
        return None
    result = replayed(op, nodes, source)
    return result if before == after else reshaped(op, result, after)


@rewrite.on(*sorted(BROADCASTING - {"Clip", "PRelu", "BitShift"}))
def push_views_down(op: Op, node: ir.Node) -> ir.Value | None:
    """An operator on operands that are viewed alike: the view of the operator's result."""
    after = op.shape(node.outputs[0])
    if after is None or len(node.inputs) < 2:
        return None
    inputs: list[Any] = []
    views: set[ir.Value] = set()
    shapes: list[object] = []
    for operand in node.inputs:
        found = chain_above(op, operand)
        if found is None or op.shape(operand or found[1]) != after:
            return None
        nodes, value = found
        view = value.producer()
        source = view.inputs[0] if view is not None and is_view(view) else None
        if source is None or op.uses(value) > (2 if operand is value else 1):
            return None
        views.add(value)
        shapes.append(op.shape(source))
        inputs.append((nodes, source))
    if len(views) < 2 or shapes[0] is None or any(shape != shapes[0] for shape in shapes):
        return None
    operands = [replayed(op, nodes, source) for nodes, source in inputs]
    return reshaped(op, op.build(node.op_type, operands, node.attributes)[0], after)
