"""Fuse the product of a one-hot encoding with a constant matrix into Gather.

Why: it picks rows; the product multiplies all the others by zero.
Numerics: exact where the weights are finite.
Needs: opset 12, an encoding by comparison with 0, 1, 2 ..., as JAX writes it.
"""

from __future__ import annotations

import numpy as np

from graphopt import ir
from graphopt.rewriting import Op, Refuse, rewrite

_INTEGERS = (ir.DataType.INT32, ir.DataType.INT64)


@rewrite.on("MatMul", benefit=3)
def fuse_one_hot(op: Op, node: ir.Node) -> ir.Value | None:
    """Cast(Equal(i, [0, 1, ...])) @ W -> Gather(W with a row of zeros, i or that row's number)."""
    table = op.const(node.inputs[1])
    encoded = node.inputs[0]
    cast = None if encoded is None else encoded.producer()
    if encoded is None or cast is None or cast.op_type != "Cast" or cast.domain:
        return None
    compared = None if cast.inputs[0] is None else cast.inputs[0].producer()
    if table is None or table.ndim != 2 or compared is None or compared.op_type != "Equal":
        return None
    for ids, numbers in (compared.inputs, reversed(compared.inputs)):
        counted = op.const(numbers)
        if counted is None or ids is None or counted.size != len(table):
            continue
        if counted.shape[-1:] != (counted.size,):
            continue
        if not np.array_equal(counted.reshape(-1), np.arange(len(table))):
            continue
        return _gathered(op, ids, encoded, table)
    return None


def _gathered(op: Op, ids: ir.Value, encoded: ir.Value, table: ir.Array) -> ir.Value:
    shape, dtype, wide = op.shape(ids), op.dtype(ids), op.shape(encoded)
    if shape is None or wide is None or not shape or shape[-1] != 1 or len(shape) != len(wide):
        raise Refuse("the numbers have no last axis of one")
    if dtype is None or dtype not in _INTEGERS or op.opset < 12:
        raise Refuse("the numbers are no integers, or the opset is below 12")
    if not np.all(np.isfinite(table.astype(np.float64))):
        raise Refuse("a weight is not finite")
    count = len(table)
    # what no number equals picks zeros: a further row, for all that is outside
    rows = op.initializer(np.concatenate([table, np.zeros_like(table[:1])]), "rows")
    flat = op.Squeeze(ids, [-1]) if op.opset >= 13 else op.Squeeze(ids, axes=[len(shape) - 1])
    last = op.initializer(np.asarray(count, dtype.numpy()), "outside")
    return op.Gather(rows, op.Where(op.Less(flat, 0), last, op.Min(flat, last)), axis=0)
