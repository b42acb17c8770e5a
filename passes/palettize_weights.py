"""Store weights as indices into a palette of few values.

Why: 16 values fit most weights well, and an index takes 4 bits. Every runtime that has BitShift,
Gather and Cast loads it; the file is smaller, the model in memory is not.
Numerics: lossy; the report says how far results moved.
Needs: opset 11; 4-bit indices are stored as such from opset 21.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from graphopt import ir
from graphopt.context import Context
from graphopt.errors import InputError
from graphopt.pass_manager import Pass
from graphopt.passes._stored import Unpacking, candidates, require_packing
from graphopt.quantizer import palettes

_UINT4 = 21


@dataclass(frozen=True)
class PalettizeWeights(Pass):
    """Each weight of at least `min_elements` gets a palette of 2**bits values.

    `group` output channels share one (0: all of them do), with `vector` values to an index: 4
    values at 8 bits take 2 bits each. `keep` lists patterns of nodes and weights to leave alone.
    """

    lossy = True
    bits: int = 4
    group: int = 0
    vector: int = 1
    min_elements: int = 1024
    keep: tuple[str, ...] = ()

    def run(self, context: Context) -> None:
        if not 1 <= self.bits <= 8:
            raise InputError(f"palettize-weights: bits is 1 to 8, not {self.bits}")
        if self.group < 0 or self.vector < 1 or (self.group and self.vector > 1):
            raise InputError(
                "palettize-weights: group is 0 or more, vector 1 or more, and not both are set"
            )
        require_packing(context, self.name)
        for value in candidates(context, self.min_elements, self.keep):
            self._store(Unpacking(context, value), value)

    def _store(self, made: Unpacking, value: ir.Value) -> None:
        weights, dtype = ir.array(value), value.dtype
        assert weights is not None and dtype is not None
        single = weights.astype(np.float32)
        if not np.isfinite(single).all():
            made.refuse("it is not finite")
            return
        if self.vector > 1 and weights.size % self.vector:
            made.refuse(f"its {weights.size} values are no multiple of {self.vector}")
            return
        palette, index = self._clustered(single)
        stored = palette.size * dtype.itemsize + index.size * self.bits / 8
        if stored >= 0.9 * weights.nbytes:
            made.refuse("its palette would be as large as it is")
            return
        entries = made.constant(palette.astype(dtype.numpy()))
        places = self._indices(made, index)
        if palette.ndim == 1 or self.vector > 1:
            result = made.op("Gather", entries, places)
        else:
            places = made.op("Reshape", places, made.constant(np.array(index.shape, np.int64)))
            result = made.op("GatherElements", entries, places, axis=1)
        shape = made.constant(np.array(weights.shape, np.int64))
        made.finish(made.op("Reshape", result, shape), "palette")

    def _clustered(self, weights: palettes.Floats) -> tuple[palettes.Floats, palettes.Bytes]:
        """Palette and indices: of one palette [n] of values or vectors; of several [g, n / g]."""
        count = 2**self.bits
        if self.vector > 1:
            return palettes.cluster_vectors(weights.reshape(-1, self.vector), count)
        channels = weights.shape[0]
        if not self.group or channels % self.group or channels == self.group:
            return palettes.cluster(weights.ravel(), count)
        found = [
            palettes.cluster(row, count) for row in weights.reshape(channels // self.group, -1)
        ]
        return np.stack([entries for entries, _ in found]), np.stack(
            [places for _, places in found]
        )

    def _indices(self, made: Unpacking, index: palettes.Bytes) -> ir.Value:
        """The indices as a flat int32 value, stored in as many bits as they have."""
        if self.bits == 4 and made.opset >= _UINT4:
            packed = made.constant(index.ravel().astype(ir.DataType.UINT4.numpy()))
            return made.op("Cast", packed, to=ir.DataType.INT32.value)
        return made.indices(index, self.bits)
