"""Registers of a CPU and the tiles of a product that keep them busy.

A product's inner loop multiplies `rows` broadcast elements with `columns` vectors and holds all
sums in registers (Goto and van de Geijn, "Anatomy of High-Performance Matrix Multiplication",
2008). Loads per multiplication are (rows + columns) / (rows * columns); too few sums at a time
leave the multipliers idle for their latency.
"""

from __future__ import annotations

from dataclasses import dataclass

from graphopt.backends._tvm_dots import Dot, dots
from graphopt.target import Target

_BITS = {"float64": 64, "float32": 32, "float16": 16, "int32": 32, "int8": 32, "uint8": 32}
_IN_FLIGHT = 8
"""Sums that hide the latency of a multiplication: four cycles of two units."""


@dataclass(frozen=True)
class Registers:
    """The vector registers of a CPU."""

    bits: int
    count: int
    memory_operands: bool
    """Whether a multiplication broadcasts an element from memory by itself."""
    dots: tuple[Dot, ...]
    """What multiplies small integers."""

    @classmethod
    def of(cls, target: Target) -> Registers:
        """Those of a target's widest instructions."""
        found = dots(target)
        if "avx512f" in target.isa:
            return cls(512, 32, True, found)
        if "avx2" in target.isa:
            return cls(256, 16, False, found)
        return cls(128, 32 if target.arch == "aarch64" else 16, False, found)

    def lanes(self, dtype: str) -> int:
        """Elements of a dtype in a register; 1 for dtypes that are not computed in vectors."""
        return self.bits // _BITS[dtype] if dtype in _BITS else 1

    def sums(self, columns: int) -> int:
        """Registers that are left for sums beside the columns and what is broadcast."""
        return self.count - columns - (1 if self.memory_operands else 2)


@dataclass(frozen=True)
class Tile:
    """The block of a product that is summed in registers."""

    rows: int
    vectors: int
    lanes: int

    @property
    def columns(self) -> int:
        """Elements of a row of the tile."""
        return self.vectors * self.lanes


def vector(columns: int, widest: int) -> int:
    """Lanes for rows of so many columns: fewer than the widest where most would be idle."""
    lanes = widest
    while lanes > 2 and lanes // 2 >= columns % lanes > 0 and columns < 4 * lanes:
        lanes //= 2
    return lanes


def ranked(
    rows: int | None, columns: int, registers: Registers, dtype: str, lanes: int = 0
) -> list[Tile]:
    """Tiles that fit the registers, the one that should waste least first.

    Args:
        rows: of the product, those that are one after the other in memory; None if unknown.
        columns: of the product.
        registers: of the CPU.
        dtype: of the sums.
        lanes: that an instruction has; 0 where any number will do.
    """
    lanes = lanes or vector(columns, registers.lanes(dtype))
    tiles: list[Tile] = []
    for vectors in range(1, min(8, -(-columns // lanes)) + 1):
        most = max(1, min(30, registers.sums(vectors) // vectors))
        tiles += [
            Tile(height, vectors, lanes)
            for height in range(1, most + 1)
            if rows is None or height <= rows
        ]
    return sorted(tiles, key=lambda tile: (round(_cost(rows, columns, tile), 9), tile.vectors))


def _cost(rows: int | None, columns: int, tile: Tile) -> float:
    """Time per useful multiplication, in a unit of its own."""
    width = tile.columns
    waste = -(-columns // width) * width / columns
    if rows is not None:
        waste *= -(-rows // tile.rows) * tile.rows / rows
        if rows % tile.rows:
            waste *= 1.03  # rows are copied to a buffer that ends with the tile
    sums = tile.rows * tile.vectors
    loads = (tile.rows + tile.vectors) / sums
    idle = max(1.0, _IN_FLIGHT / sums)
    # columns come from further away than what is broadcast, each once for all rows
    return waste * (max(idle, 0.5 + loads / 2) + 0.15 * loads + 0.1 / tile.rows)
