"""Fuse a residual sum and the normalization after it into SkipLayerNormalization.

Why: one kernel in place of two or three, where the provider's is a good one: a GPU's. ONNX
Runtime's CPU kernel takes 2 to 7 times as long as its parts (see split-skip-layernorm).
Numerics: rounding.
Needs: ONNX Runtime (com.microsoft), float or float16, a normalization over the last axis of a
tensor of two or three axes.
"""

from __future__ import annotations

from typing import Any

from graphopt import ir
from graphopt.passes._vendor import MICROSOFT
from graphopt.rewriting import Op, Refuse, rewrite

_TYPES = (ir.DataType.FLOAT, ir.DataType.FLOAT16)


@rewrite.on("LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization", benefit=3)
def fuse_skip_layernorm(op: Op, node: ir.Node) -> dict[ir.Value, ir.Value] | None:
    """LayerNormalization(x + skip) -> SkipLayerNormalization(x, skip), the sum a further output."""
    total, scale = node.inputs[0], node.inputs[1]
    add = None if total is None else total.producer()
    if total is None or scale is None or add is None or add.op_type != "Add" or add.domain:
        return None
    shape = op.shape(total)
    if (
        shape is None
        or len(shape) not in (2, 3)
        or op.attr(node, "axis", -1) % len(shape) != (len(shape) - 1)
    ):
        return None
    if any(op.shape(value) != shape for value in add.inputs if value is not None):
        return None
    if MICROSOFT not in op.target.domains:
        raise Refuse(f"the target has no operators of {MICROSOFT}")
    if op.dtype(total) not in _TYPES or op.rank(scale) != 1:
        raise Refuse("there is no kernel for its type")
    if any(op.uses(value) for value in node.outputs[1:]):
        raise Refuse("its mean or deviation is used")
    x, skip = add.inputs
    simple = node.op_type != "LayerNormalization"
    operands: list[Any] = [x, skip, scale]
    if not simple:
        operands.append(node.inputs[2] if len(node.inputs) > 2 else None)
    name = "SkipSimplifiedLayerNormalization" if simple else "SkipLayerNormalization"
    made = op.build(
        name, operands, {"epsilon": op.attr(node, "epsilon", 1e-5)}, domain=MICROSOFT, outputs=4
    )
    result = {node.outputs[0]: made[0]}
    if op.uses(total) > 1:
        result[total] = made[3]
    return result
