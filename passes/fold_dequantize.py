"""Compute DequantizeLinear of a constant weight, where ONNX Runtime would do it in every run.

Why: a Conv whose input stays float has no kernel for quantized weights; that they are not constant
keeps ONNX Runtime from its blocked layout, which costs far more than the conversion.
Numerics: exact.
Needs: ONNX Runtime's CPU, a Conv or ConvTranspose, an input that is not quantized.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from graphopt import ir
from graphopt.rewriting import Op, Refuse, rewrite

_MOST_BYTES = 16 << 20
"""Of float weights per operator: beyond it, what is read from memory decides."""


@rewrite.on("Conv", "ConvTranspose")
def fold_dequantize(op: Op, node: ir.Node) -> ir.Value | None:
    """Conv(x, DequantizeLinear(w, s, z)) -> Conv(x, (w - z) s)."""
    weight = node.inputs[1]
    source = None if weight is None else weight.producer()
    if weight is None or source is None or source.op_type != "DequantizeLinear" or source.domain:
        return None
    if op.target.device != "cpu":
        return None
    parts = [op.const(value) for value in source.inputs]
    if any(part is None for part in parts) or op.attr(source, "block_size", 0):
        return None
    before = None if node.inputs[0] is None else node.inputs[0].producer()
    if before is not None and before.op_type == "DequantizeLinear":
        raise Refuse("its input is quantized too, for which there are integer kernels")
    values, scale = parts[0], parts[1]
    assert values is not None and scale is not None
    if 4 * values.size > _MOST_BYTES:
        raise Refuse("as floats its weights would be large")
    axis = op.attr(source, "axis", 1)
    spread = [1] * values.ndim
    if scale.size > 1:
        spread[axis] = -1
    levels: Any = values.astype(np.int32)
    zero = parts[2] if len(parts) > 2 else None
    if zero is not None:
        levels = levels - zero.astype(np.int32).reshape(spread)
    factors: Any = scale.reshape(spread)
    made = op.initializer(levels.astype(scale.dtype) * factors, "weight")
    return op.build(node.op_type, [node.inputs[0], made, *node.inputs[2:]], node.attributes)[0]
