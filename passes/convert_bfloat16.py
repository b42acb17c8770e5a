"""Compute in bfloat16 what has operators for it, and the rest as before.

Why: half the memory at float32's range, which devices with bfloat16 arithmetic multiply fast.
Numerics: lossy.
Needs: float32 in the model, and a runtime for bfloat16: ONNX Runtime's CPU has few such kernels.
Opset 13 or newer. Sums of squares, positions, sizes and angles stay float32, and so does what is
quantized and what ONNX defines no bfloat16 for.
"""

from __future__ import annotations

from dataclasses import dataclass

from graphopt import ir
from graphopt.context import Context
from graphopt.pass_manager import Pass
from graphopt.passes._narrow import narrow


@dataclass(frozen=True)
class ConvertBfloat16(Pass):
    """Converts main graph and bodies of control flow."""

    lossy = True
    keep: tuple[str, ...] = ()
    """Operator types and patterns of node names that stay float32."""
    keep_io: bool = True
    """Inputs and outputs of the model stay float32."""

    def run(self, context: Context) -> None:
        narrow(context, ir.DataType.BFLOAT16, self.keep, self.keep_io, data=False)
