"""Fuse the division by an L1 or L2 norm into LpNormalization.

Why: two to five kernels over the same tensor become one.
Numerics: rounding; a vector of zeros gives zeros, where 0 / 0 gives NaN, and vectors shorter than
an epsilon up to 1e-10 that keeps the divisor from being 0 get length 1. So only level 3 has it.
Needs: float32, one axis.
"""

from __future__ import annotations

from graphopt import ir
from graphopt.passes._algebra import Reader
from graphopt.passes._layout import reduced_axes
from graphopt.passes._normalization import squared
from graphopt.rewriting import Op, Refuse, rewrite

_SMALLEST = 1e-10


@rewrite.on("Div", benefit=3)
def fuse_lpnorm(op: Op, node: ir.Node) -> ir.Value | None:
    """x / norm(x), the norm as ReduceL1, ReduceL2 or the root of a sum of squares."""
    x, norm = node.inputs
    rank = None if x is None else op.rank(x)
    if x is None or rank is None or ir.constant(x) is not None:
        return None
    reader = Reader(op, node)
    norm = _unbounded(op, reader, norm)
    reduction = reader.take(norm, "ReduceL1", "ReduceL2", "Sqrt")
    source = None if reduction is None else reduction.inputs[0]
    if reduction is not None and reduction.op_type == "Sqrt":
        reduction = reader.take(source, "ReduceSumSquare", "ReduceSum")
        source = None if reduction is None else reduction.inputs[0]
        if reduction is not None and reduction.op_type == "ReduceSum":
            source = squared(reader, source)
    if reduction is None or source is not x:
        return None
    axes = reduced_axes(op, reduction, rank)
    if axes is None or len(axes) != 1 or not op.attr(reduction, "keepdims", 1):
        return None
    reader.require_unneeded()
    if op.dtype(x) != ir.DataType.FLOAT:
        raise Refuse("needs float32")
    if op.target.device == "cpu" and axes[0] != rank - 1:
        raise Refuse("ONNX Runtime is slower with it along other axes than the last")
    order = 1 if reduction.op_type == "ReduceL1" else 2
    return op.LpNormalization(x, axis=axes[0], p=order)


def _unbounded(op: Op, reader: Reader, norm: ir.Value | None) -> ir.Value | None:
    """A norm without the tiny number that it is kept above."""
    clip = reader.take(norm, "Clip", "Max", "Relu")
    if clip is None or clip.op_type == "Relu":
        return norm if clip is None else clip.inputs[0]
    low: float | None = None
    inner = clip.inputs[0]
    if clip.op_type == "Max" and len(clip.inputs) == 2:
        low = reader.number(clip.inputs[1])
        if low is None:
            inner, low = clip.inputs[1], reader.number(clip.inputs[0])
    elif clip.op_type == "Clip" and op.opset >= 11:
        bounds = [*clip.inputs, None, None][1:3]
        low = reader.number(bounds[0]) if bounds[1] is None else None
    elif clip.op_type == "Clip" and "max" not in clip.attributes:
        low = op.attr(clip, "min")
    return inner if low is not None and 0 <= low <= _SMALLEST else None
