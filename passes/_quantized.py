"""Scales and zero points of QuantizeLinear and DequantizeLinear."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from graphopt import ir
from graphopt.rewriting import Op

RANGES = {
    ir.DataType.UINT8: (0, 255),
    ir.DataType.INT8: (-128, 127),
    ir.DataType.UINT16: (0, 65535),
    ir.DataType.INT16: (-32768, 32767),
}


@dataclass(frozen=True)
class Parameters:
    """How integers stand for floats: (integer - zero) * scale."""

    scale: npt.NDArray[np.float32]
    zero: npt.NDArray[np.int64]
    dtype: ir.DataType
    axis: int

    def same(self, other: Parameters) -> bool:
        """Whether the same integers stand for the same floats."""
        return (
            self.dtype == other.dtype
            and np.array_equal(self.scale, other.scale)
            and np.array_equal(self.zero, other.zero)
            and (self.axis == other.axis or self.scale.size == 1)
        )


def parameters(op: Op, node: ir.Node) -> Parameters | None:
    """Those of a node, where they are constant and finite and the scale is float32."""
    quantized = node.outputs[0] if node.op_type == "QuantizeLinear" else node.inputs[0]
    dtype = None if quantized is None else op.dtype(quantized)
    scale: Any = op.const(node.inputs[1])
    if scale is None or scale.dtype != np.float32 or dtype is None or dtype not in RANGES:
        return None
    if op.attr(node, "block_size", 0) or not np.all(np.isfinite(scale) & (scale > 0)):
        return None
    zero: npt.NDArray[np.int64] = np.zeros(np.shape(scale), np.int64)
    given = node.inputs[2] if len(node.inputs) > 2 else None
    if given is not None:
        known = op.const(given)
        if known is None:
            return None
        zero = known.astype(np.int64)
    return Parameters(np.asarray(scale, np.float32), zero, dtype, int(op.attr(node, "axis", 1)))
