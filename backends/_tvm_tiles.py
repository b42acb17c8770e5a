"""Registers of a CPU and the tiles of a product that keep them busy.

A product's inner loop multiplies `rows` broadcast elements with `columns` vectors and holds all
sums in registers (Goto and van de Geijn, "Anatomy of High-Performance Matrix Multiplication",
2008). Loads per multiplication are (rows + columns) / (rows * columns); too few sums at a time
leave the multipliers idle for their latency.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import astuple, dataclass, replace

from graphopt.backends._tvm_dots import Dot, dots
from graphopt.target import Target

_BITS = {"float64": 64, "float32": 32, "float16": 16, "int32": 32, "int8": 32, "uint8": 32}
_MOST_UNROLLED = 8
_BAND = 8
_IN_FLIGHT = 8
"""Sums that hide the latency of a multiplication: four cycles of two units."""
_NEAR = 1 << 19
"""Bytes of the nearer caches that transformed squares may take."""
_MANY_REGISTERS = 32
"""What a square of vectors and its transform need."""
_FEW_SQUARES = 32
"""Products with fewer rows take as long as reading the weights."""
_FORTH, _BACK = 40, 24
"""What it costs to transform a channel of a square, and an output of it, in multiplications."""
_MANY = 1 << 19
"""Elements of a product that do not stay in the cache of a core."""


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
    """The block of a product that is summed in registers, and the loops around it."""

    rows: int
    vectors: int
    lanes: int
    unroll: int = 1
    """Rounds of the sum that are written out, where their number is a multiple of it."""
    rows_first: bool = False
    """Whether rows get all their columns before the next rows, not columns all their rows."""
    band: int = 0
    """Rows of a depthwise convolution's input that are padded at a time; 0 to read it in place.

    With squares: rows of them that are transformed at a time.
    """
    squares: bool = False
    """Whether rows are squares of outputs, by Winograd's way, and not outputs."""

    @property
    def columns(self) -> int:
        """Elements of a row of the tile."""
        return self.vectors * self.lanes

    def __str__(self) -> str:
        return "x".join(str(int(value)) for value in astuple(self))

    @classmethod
    def parse(cls, text: str) -> Tile:
        """What `str` made text of; ValueError or TypeError for anything else."""
        rows, vectors, lanes, unroll, first, band, squares = map(int, text.split("x"))
        return cls(rows, vectors, lanes, unroll, bool(first), band, bool(squares))

    def near(self) -> Iterator[Tile]:
        """Those that differ in one thing; whether the registers hold them is not asked."""
        if not self.squares:
            yield replace(self, rows_first=not self.rows_first)
        if self.band:
            for band in {2 * self.band, max(self.band // 2, 1)} - {self.band}:
                yield replace(self, band=band)
        else:
            for unroll in (2 * self.unroll, self.unroll // 2):
                if 1 <= unroll <= _MOST_UNROLLED:
                    yield replace(self, unroll=unroll)
        for change in (1, -1, 2, -2):
            yield replace(self, rows=self.rows + change)
        for change in (1, -1):
            yield replace(self, vectors=self.vectors + change)


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


def depthwise(
    rows: int | None, columns: int, registers: Registers, dtype: str, window: int, in_place: bool
) -> list[Tile]:
    """Tiles of a depthwise convolution, whose rows share most of what they see.

    The input is read in place, and only tiles at its edges ask where they are, unless sizes are
    unknown, elements have to be converted, or vectors would reach beyond the channels: a copy of
    it costs as much as the convolution.

    Args:
        rows: outputs that are side by side; None if unknown.
        columns: channels.
        registers: of the CPU.
        dtype: of the sums.
        window: positions that an output sees.
        in_place: whether the input may be read so.
    """
    widest = registers.lanes(dtype)
    lanes, whole = vector(columns, widest), math.gcd(columns, widest)
    if in_place and 2 * whole >= widest:
        lanes = whole
    tiles: list[Tile] = []
    for vectors in range(1, min(4, -(-columns // lanes)) + 1):
        most = max(1, min(registers.sums(vectors) // vectors, 12, rows or 12))
        band = 0 if in_place and columns % (vectors * lanes) == 0 else _BAND
        tiles += [Tile(height, vectors, lanes, band=band) for height in range(1, most + 1)]
    preferred = _depthwise(rows, columns, lanes, registers, window)
    return sorted(
        tiles,
        key=lambda tile: (tile.vectors != preferred.vectors, abs(tile.rows - preferred.rows)),
    )


def squares(
    high: int, wide: int, inner: int, outer: int, registers: Registers, direct: Tile
) -> tuple[list[Tile], bool]:
    """Tiles for Winograd's way, and whether it should be faster than the direct one.

    Args:
        high: outputs above each other.
        wide: outputs that are side by side.
        inner: channels.
        outer: columns.
        registers: of the CPU.
        direct: the tile of the other way.
    """
    lanes, across = registers.lanes("float32"), -(-wide // 2)
    if outer % lanes or 2 * math.gcd(inner, lanes) < lanes or registers.count < _MANY_REGISTERS:
        return [], False
    many = 64 * inner * outer > 2 * _NEAR
    band = max(1, _NEAR // (64 * inner * across)) if many else 1
    tiles = [
        Tile(rows, vectors, lanes, band=band, squares=True)
        for vectors in range(1, 5)
        for rows in range(1, min(across, registers.sums(vectors) // vectors, 16) + 1)
        if outer % (vectors * lanes) == 0
    ]

    def cost(tile: Tile) -> float:
        return _cost(across, outer, tile) + 0.008 * max(tile.rows * tile.vectors - 14, 0)

    tiles.sort(key=lambda tile: (round(cost(tile), 9), tile.vectors))
    if many and across * -(-high // 2) < _FEW_SQUARES:
        return tiles, False  # memory is the limit, and there are 16 weights for 9
    gain = 18 * _cost(wide, outer, direct) - 8 * cost(tiles[0])
    return tiles, inner * outer * gain > _FORTH * inner + _BACK * outer


def _depthwise(
    wide: int | None, channels: int, lanes: int, registers: Registers, window: int
) -> Tile:
    vectors = 2 if channels % (2 * lanes) == 0 and window <= 9 else 1
    most = min(registers.sums(vectors) // vectors, 8)
    if wide is None:
        return Tile(4, vectors, lanes)
    fits = [rows for rows in range(1, most + 1) if wide % rows == 0]
    if fits[-1] == 1 and wide > 3:  # better some columns too many than one at a time
        fits = [min(range(3, most + 1), key=lambda rows: (-(-wide // rows) * rows, -rows))]
    return Tile(fits[-1], vectors, lanes)


def _cost(rows: int | None, columns: int, tile: Tile) -> float:
    """Time per useful multiplication, in a unit of its own."""
    width = tile.columns
    waste = -(-columns // width) * width / columns
    if rows is not None:
        waste *= -(-rows // tile.rows) * tile.rows / rows
        if rows % tile.rows:  # rows are copied to a buffer that ends with the tile
            waste *= 1.03 + 6 / columns
        if columns > width and rows * columns > _MANY:
            waste *= 1.05  # another pass over more than the nearer caches hold
    sums = tile.rows * tile.vectors
    loads = (tile.rows + tile.vectors) / sums
    idle = max(1.0, _IN_FLIGHT / sums)
    # columns come from further away than what is broadcast, each once for all rows
    # code that is long, and rows that no prefetcher follows
    far = 0.0015 * max(sums - 16, 0) + 0.004 * max(tile.rows - 16, 0)
    return waste * (max(idle, 0.5 + loads / 2) + 0.15 * loads + 0.1 / tile.rows + far)
