"""Compute in float16 what float16 can hold, and the rest as before.

Why: half the memory, and devices with float16 arithmetic multiply at least twice as fast.
Numerics: lossy.
Needs: float32 in the model. Ranges are checked on the data given (`--data`), on random inputs
where there is none; nodes whose values float16 cannot hold, sums of squares, positions, sizes and
angles stay float32, and so does what is quantized and what ONNX defines no float16 for. Nodes in
functions stay as they are (`inline-functions` first).

After the idea of Micikevicius et al., Mixed Precision Training (2018): range decides what is
safe, and reductions of many squares are not.
"""

from __future__ import annotations

from dataclasses import dataclass

from graphopt import ir
from graphopt.context import Context
from graphopt.pass_manager import Pass
from graphopt.passes._narrow import narrow


@dataclass(frozen=True)
class ConvertFloat16(Pass):
    """Converts main graph and bodies of control flow; constants beyond the range are clamped."""

    lossy = True
    keep: tuple[str, ...] = ()
    """Operator types and patterns of node names that stay float32."""
    keep_io: bool = True
    """Inputs and outputs of the model stay float32."""
    check_range: bool = True
    """Run the model to see how large its values get."""

    def run(self, context: Context) -> None:
        narrow(context, ir.DataType.FLOAT16, self.keep, self.keep_io, data=self.check_range)
