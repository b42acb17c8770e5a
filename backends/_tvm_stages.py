"""The stages around a product: what a convolution sees, padded copies, packed weights, results."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from graphopt.backends._tvm_dots import Conversion, Dot
from graphopt.backends._tvm_indices import (
    ceil,
    divides,
    extents,
    fits,
    is_plain,
    ravel,
    simple,
    unravel,
)
from graphopt.backends._tvm_indices import product as count
from graphopt.backends._tvm_tiles import Tile

te: Any = importlib.import_module("tvm.te")
tirx: Any = importlib.import_module("tvm.tirx")

FUSABLE = {"op_pattern": 4}
"""TVM's number for operators that elementwise ones may be fused to."""


@dataclass(frozen=True)
class Window:
    """What a convolution sees of its input for one output."""

    size: tuple[int, int]
    strides: tuple[int, int]
    dilation: tuple[int, int]
    pads: tuple[int, int, int, int]
    """Top, left, bottom, right."""

    @classmethod
    def of(cls, attrs: Any, kernel: Sequence[int]) -> Window:
        """Of a Relax convolution's attributes and its HWIO weights' shape."""
        top, left, bottom, right = (int(pad) for pad in attrs.padding)
        sy, sx = (int(stride) for stride in attrs.strides)
        dy, dx = (int(step) for step in attrs.dilation)
        return cls((kernel[0], kernel[1]), (sy, sx), (dy, dx), (top, left, bottom, right))

    def is_pointwise(self) -> bool:
        """Whether each output depends on one position, which has the same index."""
        return self.size == (1, 1) and self.strides == (1, 1) and not any(self.pads)

    def output(self, high: Any, wide: Any) -> tuple[Any, Any]:
        """Height and width of the output for those of the input."""
        sizes: list[Any] = []
        for axis, extent in enumerate((high, wide)):
            reach = (self.size[axis] - 1) * self.dilation[axis] + 1
            total = extent + self.pads[axis] + self.pads[axis + 2] - reach
            sizes.append(simple(total // self.strides[axis] + 1))
        return sizes[0], sizes[1]

    def at(self, y: Any, x: Any, dy: Any, dx: Any) -> tuple[Any, Any]:
        """Position in the padded input that output (y, x) multiplies with weight (dy, dx)."""
        return (
            y * self.strides[0] + dy * self.dilation[0],
            x * self.strides[1] + dx * self.dilation[1],
        )

    def padded(
        self,
        x: Any,
        shape: list[Any],
        width: Any,
        channels: int | None = None,
        conversion: Conversion | None = None,
    ) -> Any:
        """The input with its border, as far to the right as `width` outputs reach."""
        change = conversion or _as_it_is(x)
        n, high, wide, depth = shape
        rows, _ = self.output(high, wide)
        top, left = self.pads[:2]
        tall = (rows - 1) * self.strides[0] + (self.size[0] - 1) * self.dilation[0] + 1
        broad = (width - 1) * self.strides[1] + (self.size[1] - 1) * self.dilation[1] + 1
        deep = depth if channels is None else channels
        enough = fits(tall, high) and fits(broad, wide)
        if top == left == 0 and enough and deep == depth and change.dtype == str(x.dtype):
            return x

        def value(b: Any, i: Any, j: Any, c: Any) -> Any:
            inside = [i >= top, i < top + high, j >= left, j < left + wide]
            if deep != depth:
                inside.append(c < depth)
            element = change.element(x(b, i - top, j - left, c))
            fill = tirx.const(change.fill, change.dtype)
            return tirx.if_then_else(tirx.all(*inside), element, fill)

        return te.compute((n, simple(tall), simple(broad), deep), value, name="padded")


def _as_it_is(x: Any) -> Conversion:
    return Conversion(str(x.dtype), lambda element: element)


def pack(weights: Any, tile: Tile) -> Any:
    """Weights [..., columns] as [blocks, ..., columns of a tile]; the last ends in zeros."""
    *rest, columns = weights.shape
    blocks = -(-columns // tile.columns)
    full = np.zeros((*rest, blocks * tile.columns), weights.dtype)
    full[..., :columns] = weights
    cut = full.reshape(*rest, blocks, tile.columns)
    return np.ascontiguousarray(np.moveaxis(cut, -2, 0))


def tile_attrs(tile: Tile, flat: bool, key: str = "", dot: Dot | None = None) -> dict[str, Any]:
    """What the schedule has to know of a product."""
    name = "" if dot is None else dot.name
    if dot is not None and name:
        dot.register()
    return {
        "kernel": key,
        "dot": name,
        "rows": tile.rows,
        "vectors": tile.vectors,
        "lanes": tile.lanes,
        "unroll": tile.unroll,
        "rows_first": int(tile.rows_first),
        "band": tile.band,
        "flat": int(flat),
    }


def row_product(
    x: Any,
    w: Any,
    columns: int,
    tile: Tile,
    key: str,
    summand: Callable[[Callable[[Any], Any], Any, Any], Any],
    deep: int | None = None,
    conversion: Conversion | None = None,
    dot: Dot | None = None,
) -> Any:
    """The product of a tensor's rows with packed columns [blocks, ...], in tiles.

    `summand` makes a sum of what reads an element of the row, a block and a lane. Rows are `deep`
    elements long, of what a conversion makes of them.
    """
    a = extents(x)
    rows = count(a[:-1])
    exact = divides(tile.rows, rows)
    flat = exact or is_plain(a[:-1])
    change = conversion or _as_it_is(x)
    if exact and change.dtype == str(x.dtype) and (deep is None or deep == a[-1]):
        source: Any = None
    elif flat:
        source = _copied_rows(x, a, rows, tile, deep, conversion)
    else:  # rows of several symbolic axes: tiles along the last of them
        longer = {} if deep is None else {-1: deep}
        source = extended(x, {-2: ceil(a[-2], tile.rows), **longer}, conversion)

    def element(*index: Any) -> Any:
        *row, block, lane = index

        def read(k: Any) -> Any:
            return x(*unravel(row[0], a[:-1]), k) if source is None else source(*row, k)

        return summand(read, block, lane)

    high = [ceil(rows, tile.rows)] if flat else [*a[:-2], ceil(a[-2], tile.rows)]
    shape = (*high, w.shape[0], tile.columns)
    product = te.compute(shape, element, name="product", attrs=tile_attrs(tile, flat, key, dot))
    finish = _flat_result if flat else result
    return finish(product, [*a[:-1], columns], tile)


def _copied_rows(
    x: Any,
    shape: list[Any],
    rows: Any,
    tile: Tile,
    depth: int | None = None,
    conversion: Conversion | None = None,
) -> Any:
    """The rows of a tensor as a matrix that ends with a tile, `depth` elements each."""
    change = conversion or _as_it_is(x)
    deep = shape[-1] if depth is None else depth

    def value(row: Any, k: Any) -> Any:
        inside = [row < rows] + ([] if depth is None else [k < shape[-1]])
        element = change.element(x(*unravel(row, shape[:-1]), k))
        return tirx.if_then_else(tirx.all(*inside), element, tirx.const(change.fill, change.dtype))

    return te.compute((ceil(rows, tile.rows), deep), value, name="padded")


def extended(x: Any, sizes: Mapping[int, Any], conversion: Conversion | None = None) -> Any:
    """A tensor with something appended along axes, by their numbers from the last, -1."""
    change = conversion or _as_it_is(x)
    shape = list(x.shape)
    for axis, size in sizes.items():
        shape[axis] = size

    def value(*index: Any) -> Any:
        inside = [index[len(index) + axis] < x.shape[len(index) + axis] for axis in sizes]
        fill = tirx.const(change.fill, change.dtype)
        return tirx.if_then_else(tirx.all(*inside), change.element(x(*index)), fill)

    return te.compute(shape, value, name="padded")


def result(product: Any, shape: list[Any], tile: Tile) -> Any:
    """The product without its blocks."""

    def value(*index: Any) -> Any:
        *outer, column = index
        return product(*outer, column // tile.columns, column % tile.columns)

    return te.compute(shape, value, name="result")


def _flat_result(product: Any, shape: list[Any], tile: Tile) -> Any:
    """The product without its blocks, its rows as several axes."""

    def value(*index: Any) -> Any:
        *outer, column = index
        row = ravel(outer, shape[:-1])
        return product(row, column // tile.columns, column % tile.columns)

    return te.compute(shape, value, name="result")
