"""Drop Expand and Tile before operators that broadcast anyway.

Why: the repeated copy of the tensor is never made.
Numerics: exact.
Needs: shapes that prove that the other operand broadcasts to the same result.
"""

from __future__ import annotations

from graphopt import ir
from graphopt.dims import DimLike, broadcast
from graphopt.passes._layout import BROADCASTING
from graphopt.rewriting import Op, rewrite

_Dims = tuple[DimLike, ...]


@rewrite.on(*sorted(BROADCASTING - {"Clip", "PRelu", "BitShift"}))
def eliminate_expand(op: Op, node: ir.Node) -> ir.Value | None:
    """Take what an operand repeats, where the result has the same shape."""
    if node.op_type in ("Sum", "Mean", "Max", "Min") and op.opset < 8:
        return None
    wanted = op.shape(node.outputs[0])
    if wanted is None:
        return None
    for index, value in enumerate(node.inputs):
        source = None if value is None else _repeated(op, value)
        if source is None:
            continue
        inputs = list(node.inputs)
        inputs[index] = source
        shapes = [None if v is None else op.shape(v) for v in inputs]
        known = [shape for shape in shapes if shape is not None]
        if len(known) == len(inputs) and _together(known) == wanted:
            return op.build(node.op_type, inputs, node.attributes)[0]
    return None


def _repeated(op: Op, value: ir.Value) -> ir.Value | None:
    """What a value repeats along axes of size 1, or None."""
    node = value.producer()
    if node is None or node.domain or node.op_type not in ("Expand", "Tile"):
        return None
    source = node.inputs[0]
    before = None if source is None else op.shape(source)
    after = op.shape(value)
    if before is None or after is None:
        return None
    if node.op_type == "Expand":
        return source
    pairs = zip(before, after, strict=True)
    return source if all(old in (1, new) for old, new in pairs) else None


def _together(shapes: list[_Dims]) -> _Dims | None:
    """The shape that operands broadcast to."""
    rank = max(len(shape) for shape in shapes)
    total: list[DimLike] = [1] * rank
    for shape in shapes:
        for axis, dim in enumerate(shape, rank - len(shape)):
            try:
                total[axis] = broadcast(total[axis], dim)
            except ValueError:
                return None
    return tuple(total)
