"""Store weights in two grids a channel: fine steps around zero, coarse ones for the tails.

Why: most weights are small and a few are large. With two scales a channel instead of one, 4 bits
keep half a decibel more of weights that are spread as a bell, and four where tails are heavy, for
a few bytes a channel. Any runtime loads it: Cast, Clip, Mul and Add, and BitShift where codes are
packed. The file is smaller, the model in memory is not.
Numerics: lossy; the report says how far results moved.
Needs: opset 11; 4-bit codes are stored as such from opset 21.

See `graphopt.quantizer.piecewise`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from graphopt import ir
from graphopt.context import Context
from graphopt.errors import InputError
from graphopt.gram import LINEAR
from graphopt.pass_manager import Pass
from graphopt.passes._stored import Unpacking, candidates, require_packing
from graphopt.quantizer import piecewise
from graphopt.quantizer.insertion import weight_axis

_INT4 = 21


@dataclass(frozen=True)
class QuantizePiecewise(Pass):
    """Piecewise linear quantization of each weight of at least `min_elements`.

    `keep` lists patterns of nodes and weights to leave alone.
    """

    lossy: ClassVar[bool] = True
    bits: int = 4
    """3 to 8."""
    min_elements: int = 1024
    keep: tuple[str, ...] = ()

    def run(self, context: Context) -> None:
        if not 3 <= self.bits <= 8:
            raise InputError(f"quantize-piecewise: bits is 3 to 8, not {self.bits}")
        require_packing(context, self.name)
        for value in candidates(context, self.min_elements, self.keep):
            self._store(Unpacking(context, value), value)

    def _store(self, made: Unpacking, value: ir.Value) -> None:
        weights, dtype = ir.array(value), value.dtype
        assert weights is not None and dtype is not None
        if not np.isfinite(weights.astype(np.float32)).all():
            made.refuse("it is not finite")
            return
        axis = _axis(value, weights.ndim)
        channels = weights.shape[axis]
        if weights.size * self.bits / 8 + 2 * channels * dtype.itemsize >= 0.9 * weights.nbytes:
            made.refuse("its scales would be as large as it is")
            return
        moved = np.moveaxis(weights, axis, 0)
        codes, fine, coarse = piecewise.codes(moved.reshape(channels, -1), self.bits)
        whole = np.moveaxis(codes.reshape(moved.shape), 0, axis)
        along = [channels if a == axis else 1 for a in range(weights.ndim)]
        kind = dtype.numpy()
        # Both products are written as one of all codes and one of the centre's.
        tail = made.constant(coarse.reshape(along).astype(kind))
        centre = made.constant((fine - coarse).reshape(along).astype(kind))
        code = self._codes(made, whole, dtype)
        inner = self._centre(made, code, kind)
        found = made.op("Add", made.op("Mul", code, tail), made.op("Mul", inner, centre))
        made.finish(found, "piecewise")

    def _codes(self, made: Unpacking, codes: piecewise.Codes, dtype: ir.DataType) -> ir.Value:
        """The codes as floats, stored in as many bits as they have."""
        if self.bits == 8 or (self.bits == 4 and made.opset >= _INT4):
            stored = ir.DataType.INT8 if self.bits == 8 else ir.DataType.INT4
            return made.op("Cast", made.constant(codes.astype(stored.numpy())), to=dtype.value)
        half = 1 << (self.bits - 1)
        index = made.indices((codes.astype(np.int16) + half).astype(np.uint8), self.bits)
        signed = made.op("Sub", index, made.constant(np.array(half, np.int32)))
        shape = made.constant(np.array(codes.shape, np.int64))
        return made.op("Reshape", made.op("Cast", signed, to=dtype.value), shape)

    def _centre(self, made: Unpacking, code: ir.Value, kind: np.dtype[np.generic]) -> ir.Value:
        """Codes cut off where the tails begin."""
        bound = piecewise.limit(self.bits)
        low, high = (made.constant(np.array(b, kind)) for b in (-bound, bound))
        return made.op("Clip", code, low, high)


def _axis(value: ir.Value, rank: int) -> int:
    """The axis of a weight's output channels; rows where what takes it has none."""
    for node, index in value.uses():
        if node.op_type in LINEAR and index == 1:
            return weight_axis(node) % rank
    return 0
