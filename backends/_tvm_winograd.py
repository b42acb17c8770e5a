"""Convolutions of 3x3 windows by Winograd's minimal filtering, F(2x2, 3x3).

Squares of 2x2 outputs are 16 products instead of 36 (Lavin and Gray, "Fast Algorithms for
Convolutional Neural Networks", 2016): 4x4 inputs and the weights are transformed, products summed
over the channels, and sums transformed back. The transforms only add, subtract and halve, so that
results are as exact as direct sums. Larger squares would need fewer products and lose digits. An
infinite input makes NaN of all outputs of its square.

A group of rows of squares is transformed at a time; then each block of columns is multiplied and
transformed back while it is in the nearest cache.
"""

from __future__ import annotations

import importlib
import math
from typing import Any

import numpy as np

from graphopt.backends._tvm_indices import ceil, extents
from graphopt.backends._tvm_loops import Machine, children, elementwise, extent, parallel
from graphopt.backends._tvm_products import last_alike
from graphopt.backends._tvm_stages import Window, pack, tile_attrs
from graphopt.backends._tvm_tiles import Tile

te: Any = importlib.import_module("tvm.te")
tirx: Any = importlib.import_module("tvm.tirx")

SUMS = "winograd"
"""The block that sums, by which its schedule knows the function."""
_SIDE, _OUT = 4, 2
"""Sides of the squares that are read and written."""
_WEIGHTS = np.array([[2, 0, 0], [1, 1, 1], [1, -1, 1], [0, 0, 2]], np.float64) / 2


def transformed(kernel: Any, tile: Tile) -> Any:
    """Weights [3, 3, inner, outer] as [blocks, 16, inner, columns of a tile]."""
    full = np.einsum("iy,jx,yxco->ijco", _WEIGHTS, _WEIGHTS, kernel.astype(np.float64))
    return pack(full.reshape(_SIDE**2, *kernel.shape[2:]).astype(kernel.dtype), tile)


def convolve(x: Any, w: Any, window: Window, outer: int, tile: Tile, key: str) -> Any:
    """The convolution of an image, channels last, with transformed weights, as a tensor.

    Args:
        x: [n, high, wide, channels].
        w: what `transformed` made of the weights.
        window: of size 3x3, with strides and dilation of 1.
        outer: columns of the weights.
        tile: rows are squares side by side.
        key: the kernel's name.
    """
    n, high, wide, inner = extents(x)
    tall, broad = window.output(high, wide)
    top, left = window.pads[:2]
    down = -(-tall // _OUT)
    across = ceil(-(-broad // _OUT), tile.rows)
    shape = (n, down, across)

    def bordered(b: Any, i: Any, j: Any, c: Any) -> Any:
        inside = tirx.all(i >= top, i < top + high, j >= left, j < left + wide)
        return tirx.if_then_else(inside, x(b, i - top, j - left, c), tirx.const(0, x.dtype))

    size = (n, _OUT * down + 2, _OUT * across + 2, inner)
    padded = te.compute(size, bordered, name="padded")

    def down_in(b: Any, v: Any, u: Any, p: Any, q: Any, c: Any) -> Any:
        at = [padded(b, _OUT * v + r, _OUT * u + q, c) for r in range(_SIDE)]
        return _forth(p, at)

    rows = te.compute((*shape, _SIDE, _SIDE, inner), down_in, name="half")

    def across_in(b: Any, v: Any, p: Any, u: Any, c: Any) -> Any:
        at = [rows(b, v, u, p // _SIDE, q, c) for q in range(_SIDE)]
        return _forth(p % _SIDE, at)

    squares = te.compute((n, down, _SIDE**2, across, inner), across_in, name="squares")
    k = te.reduce_axis((0, inner), "k")

    def summand(b: Any, v: Any, u: Any, block: Any, p: Any, lane: Any) -> Any:
        return te.sum(squares(b, v, p, u, k) * w(block, p, k, lane), axis=[k])

    full = (*shape, w.shape[0], _SIDE**2, tile.columns)
    sums = te.compute(full, summand, name=SUMS, attrs=tile_attrs(tile, False, key))

    def down_out(b: Any, v: Any, u: Any, block: Any, p: Any, q: Any, lane: Any) -> Any:
        at = [sums(b, v, u, block, _SIDE * r + q, lane) for r in range(_SIDE)]
        return _back(p, at)

    half = te.compute((*full[:4], _OUT, _SIDE, tile.columns), down_out, name="back")

    def across_out(b: Any, y: Any, x_: Any, column: Any) -> Any:
        block, lane = column // tile.columns, column % tile.columns
        at = [half(b, y // _OUT, x_ // _OUT, block, y % _OUT, q, lane) for q in range(_SIDE)]
        return _back(x_ % _OUT, at)

    return te.compute((n, tall, broad, outer), across_out, name="result")


def _forth(p: Any, at: list[Any]) -> Any:
    """Row p of the transform of four inputs."""
    rows = (at[0] - at[2], at[1] + at[2], at[2] - at[1], at[1] - at[3])
    return _select(p, rows)


def _back(p: Any, at: list[Any]) -> Any:
    """Row p of the transform of four sums."""
    return _select(p, (at[0] + at[1] + at[2], at[1] - at[2] - at[3]))


def _select(p: Any, values: tuple[Any, ...]) -> Any:
    *others, chosen = values
    for index in reversed(range(len(others))):
        chosen = tirx.Select(p == index, others[index], chosen)
    return chosen


def schedule(s: Any, machine: Machine) -> tuple[Any, str]:
    """Schedule a function with a block of `SUMS`; what follows is computed with its squares.

    Returns the function and the kernel's name.

    Raises:
        RuntimeError: a step that TVM refuses.
    """
    blocks = children(s)
    names = [str(s.get(block).name_hint) for block in blocks]
    sums, half, back, squares = (s.get_sblock(name) for name in (SUMS, "half", "back", "squares"))
    annotations = s.get(sums).annotations
    key = str(annotations["kernel"])
    tile = {str(k): int(v) for k, v in annotations.items() if k not in ("kernel", "dot")}
    for name in ("kernel", "dot"):
        s.unannotate(sums, name)
    at = names.index("back") + 1
    for block, name in zip(blocks[:at], names[:at], strict=True):
        if name not in (SUMS, "half", "back", "squares"):
            s.compute_inline(block)
    tail = blocks[at:]
    result = last_alike(s, tail)
    for block in tail[:-1]:
        if block is not result:
            s.compute_inline(block)
    n, y, x, column = s.get_loops(result)
    down, inside = s.split(y, [None, _OUT])
    share = -(-extent(s, down) // machine.threads)
    chunks, row = s.split(down, [None, min(tile["band"], share)])
    groups, across, beside = s.split(x, [None, tile["rows"], _OUT])
    block, vector, lane = s.split(column, [None, tile["vectors"], tile["lanes"]])
    order = [n, chunks, block, row, groups]
    s.reorder(*order, across, vector, inside, beside, lane)
    s.compute_at(back, vector, preserve_unit_loops=True)
    s.compute_at(sums, groups, preserve_unit_loops=True)
    s.compute_at(squares, chunks, preserve_unit_loops=True)
    s.set_scope(back, 0, "local")
    _write_out(s, s.get_loops(back)[len(order) + 2 :])
    _write_out(s, [inside, beside, lane])
    _transform(s, squares, half, order.index(chunks) + 1, tile["lanes"])
    _, taken = parallel(s, [n, chunks], machine.threads)
    _sum(s, sums, len(order) - taken + 1, tile)
    if result is not tail[-1]:
        elementwise(s, tail[-1], machine)
    return s.mod["main"], key


def _write_out(s: Any, loops: list[Any]) -> None:
    """The last loop in a vector, the others unrolled."""
    for loop in loops[:-1]:
        s.unroll(loop)
    s.vectorize(loops[-1])


def _transform(s: Any, squares: Any, half: Any, depth: int, lanes: int) -> None:
    """Inputs to squares: a vector of channels of a square in registers."""
    *outer, p, across, channel = s.get_loops(squares)[depth:]
    width = math.gcd(extent(s, channel), lanes)
    channels, lane = s.split(channel, [None, width])
    s.reorder(*outer, across, channels, p, lane)
    s.compute_at(half, channels, preserve_unit_loops=True)
    s.set_scope(half, 0, "local")
    _write_out(s, s.get_loops(half)[depth + len(outer) + 2 :])
    _write_out(s, [p, lane])


def _sum(s: Any, sums: Any, depth: int, tile: dict[str, int]) -> None:
    """The products of a group of squares, one position in them after the other."""
    *outer, across, block, p, lane, k = s.get_loops(sums)[depth:]
    vectors, lanes = s.split(lane, [None, tile["lanes"]])
    s.reorder(*outer, block, p, k, across, vectors, lanes)
    kept = s.cache_write(sums, 0, "local")
    s.reverse_compute_at(kept, p)
    _write_out(s, [across, vectors, lanes])
    *inner, last = s.get_loops(kept)[depth + 1 :]
    _write_out(s, [*inner, *s.split(last, [None, tile["lanes"]])])
    start = s.decompose_reduction(sums, k)
    _write_out(s, s.get_loops(start)[depth + len(outer) + 2 :])
