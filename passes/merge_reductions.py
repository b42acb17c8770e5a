"""Merge reductions with reductions, and with the views that add or drop what they reduced.

Why: means over rows of means over columns are means over both; a Squeeze after a reduction is an
attribute of it.
Numerics: rounding.
Needs: axes that are known; nothing else may use what is between.
"""

from __future__ import annotations

from typing import Any

from graphopt import ir
from graphopt.passes._layout import REDUCTIONS, reduced_axes
from graphopt.passes._views import VIEWS
from graphopt.rewriting import Op, Refuse, rewrite

_REPEATED = frozenset({"ReduceMax", "ReduceMean", "ReduceMin", "ReduceProd", "ReduceSum"})
"""What is the same on parts first and then on their results."""


@rewrite.on(*sorted(_REPEATED), benefit=2)
def reduce_reduced(op: Op, node: ir.Node) -> ir.Value | None:
    """Reductions of one kind over different axes."""
    value = node.inputs[0]
    inner = None if value is None else value.producer()
    if value is None or inner is None or inner.op_type != node.op_type or inner.domain:
        return None
    source = inner.inputs[0]
    rank = None if source is None else op.rank(source)
    keeps = [bool(op.attr(n, "keepdims", 1)) for n in (inner, node)]
    if source is None or rank is None or keeps[0] != keeps[1] or op.uses(value) != 1:
        return None
    if node.op_type == "ReduceMean" and not _is_float(op, source):
        raise Refuse("means of integers are rounded")
    first = reduced_axes(op, inner, rank)
    second = reduced_axes(op, node, rank if keeps[0] else rank - len(first or []))
    if not first or not second:
        return None
    left = [axis for axis in range(rank) if keeps[0] or axis not in first]
    axes = sorted({*first, *(left[axis] for axis in second)})
    return _reduced(op, node.op_type, source, axes, keeps[0])


def _is_float(op: Op, value: ir.Value) -> bool:
    dtype = op.dtype(value)
    return dtype is not None and dtype.is_floating_point()


@rewrite.on(*VIEWS, benefit=2)
def view_reduced(op: Op, node: ir.Node) -> ir.Value | None:
    """A view after a reduction that drops or adds the axes that it reduced."""
    value = node.inputs[0]
    inner = None if value is None else value.producer()
    if value is None or inner is None or inner.op_type not in REDUCTIONS or inner.domain:
        return None
    source = inner.inputs[0]
    before = None if source is None else op.shape(source)
    after = op.shape(node.outputs[0])
    if source is None or before is None or after is None or op.uses(value) != 1:
        return None
    axes = reduced_axes(op, inner, len(before))
    keeps = not op.attr(inner, "keepdims", 1)
    if not axes:
        return None
    kept = [1 if axis in axes else size for axis, size in enumerate(before)]
    dropped = [size for axis, size in enumerate(before) if axis not in axes]
    if list(after) != (kept if keeps else dropped):
        return None
    return _reduced(op, inner.op_type, source, sorted(axes), keeps)


def _reduced(op: Op, op_type: str, source: ir.Value, axes: list[int], keeps: bool) -> ir.Value:
    attributes: dict[str, Any] = {"keepdims": int(keeps)}
    if op.opset >= 18 or (op_type == "ReduceSum" and op.opset >= 13):
        return op.build(op_type, [source, axes], attributes)[0]
    return op.build(op_type, [source], {**attributes, "axes": axes})[0]
