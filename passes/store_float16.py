"""Store float32 weights as float16, and compute as before.

Why: half the file, for a thousandth of the precision, whatever the runtime computes in.
Numerics: lossy; the report says how far results moved.
Needs: opset 7. Weights beyond the range of float16 stay as they are.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from graphopt import ir
from graphopt.context import Context
from graphopt.pass_manager import Pass
from graphopt.passes._stored import Unpacking, candidates

_LARGEST = float(np.finfo(np.float16).max)


@dataclass(frozen=True)
class StoreFloat16(Pass):
    """Each weight of at least `min_elements` is float16 with a Cast, but for those in `keep`."""

    lossy = True
    min_elements: int = 256
    keep: tuple[str, ...] = ()

    def run(self, context: Context) -> None:
        for value in candidates(context, self.min_elements, self.keep):
            if value.dtype in (ir.DataType.FLOAT, ir.DataType.DOUBLE):
                self._store(Unpacking(context, value), value)

    def _store(self, made: Unpacking, value: ir.Value) -> None:
        weights = ir.array(value)
        assert weights is not None and value.dtype is not None
        if not float(np.abs(weights).max()) <= _LARGEST:
            made.refuse("it is not finite, or beyond the range of float16")
            return
        half = made.constant(weights.astype(np.float16))
        made.finish(made.op("Cast", half, to=value.dtype.value), "float16")
