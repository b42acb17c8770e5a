"""Compute in float32 what is float16 or bfloat16.

Why: processors without arithmetic for them convert at every operator, or have no kernel at all.
Numerics: rounding. Results lie nearer to the exact ones; what overflowed does not any more.
Needs: nothing. Inputs and outputs keep their types.
"""

from __future__ import annotations

from dataclasses import dataclass

from graphopt import ir
from graphopt.context import Context
from graphopt.pass_manager import Pass
from graphopt.passes._narrow import note_converted
from graphopt.passes._precision import Precision

_HALF = frozenset({ir.DataType.FLOAT16, ir.DataType.BFLOAT16})


@dataclass(frozen=True)
class ConvertFloat32(Pass):
    """Converts main graph and bodies of control flow."""

    keep_io: bool = True
    """Inputs and outputs of the model stay as they are."""

    def run(self, context: Context) -> None:
        if context.exhausted:
            return
        precision = Precision(context, _HALF, ir.DataType.FLOAT, self.keep_io)
        if precision.needed:
            precision.settle()
            note_converted(precision)
