"""Matrix products and convolutions as the schedules want them, in TVM's tensor expressions.

All are one form: `product[row, block, lane] = sum over k of left[row, k] * right[block, k, lane]`,
with the columns cut into blocks as wide as a register tile. Constant weights are laid out so while
compiling. Where tiles do not fit the rows, the left side is copied to a buffer (`padded`) that ends
with a tile, so that the inner loop never asks where the edge is; only the last stage (`result`),
which elementwise operators are fused to, does.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from graphopt.backends import _tvm_integers as integers
from graphopt.backends import _tvm_winograd as winograd
from graphopt.backends._tvm_call import constant
from graphopt.backends._tvm_indices import (
    ceil,
    divides,
    extents,
    number,
    same,
    sizes,
    unit,
)
from graphopt.backends._tvm_stages import (
    FUSABLE,
    Window,
    extended,
    pack,
    result,
    row_product,
    tile_attrs,
)
from graphopt.backends._tvm_tiles import Registers, Tile, depthwise, ranked, squares

te: Any = importlib.import_module("tvm.te")
tirx: Any = importlib.import_module("tvm.tirx")
relax: Any = importlib.import_module("tvm.relax")
topi: Any = importlib.import_module("tvm.topi")

_FLOATS = ("float32", "float16", "float64")


@dataclass(frozen=True)
class Kernels:
    """Legalizations for one CPU."""

    registers: Registers
    tiles: Mapping[str, Tile] = field(default_factory=dict[str, Tile])
    """Tiles that were measured to be better than the rules', by kernel."""
    seen: dict[str, list[Tile]] = field(default_factory=dict[str, list[Tile]])
    """Filled with the kernels that have tiles to choose from, the rules' first."""

    def table(self) -> dict[str, Any]:
        """By the name of the Relax operator."""
        return {"relax.matmul": self.matmul, "relax.nn.conv2d": self.conv2d}

    def matmul(self, builder: Any, call: Any) -> Any:
        """A product with a constant matrix, or of two stacks of matrices."""
        whole = integers.matmul(self, builder, call)
        if whole is not None:
            return whole
        left, right = call.args
        shapes = [sizes(value) for value in (left, right)]
        dtype = str(left.ty.dtype)
        if any(shape is None for shape in shapes) or dtype not in _FLOATS:
            return default("relax.matmul")(builder, call)
        a, b = [list(shape or ()) for shape in shapes]
        matrix = constant(builder, right)
        if len(b) == 2 and matrix is not None and len(a) >= 2:
            return self._dense(builder, left, matrix, a, dtype)
        alike = len(a) == len(b) >= 2 and all(map(same, a[:-2], b[:-2]))
        single = number(a[-2]) == 1 and number(b[-1]) is None
        if not alike or single:  # a copy of the matrix to whole tiles would cost more than one row
            return default("relax.matmul")(builder, call)
        return self._stacked(builder, left, right, a, b, dtype)

    def tile(self, kernel: str, rows: int | None, columns: int, dtype: str, lanes: int = 0) -> Tile:
        """The tile of a kernel, with so many lanes if given: of those measured, else the rules'."""
        return self._chosen(kernel, ranked(rows, columns, self.registers, dtype, lanes))

    def _chosen(self, kernel: str, tiles: list[Tile]) -> Tile:
        self.seen[kernel] = tiles
        return self.tiles.get(kernel, tiles[0])

    def _dense(self, builder: Any, left: Any, matrix: Any, a: list[Any], dtype: str) -> Any:
        columns = int(matrix.shape[1])
        key = f"dense {a} {columns} {dtype}"
        tile = self.tile(key, unit(a[:-1]), columns, dtype)
        packed = relax.const(pack(matrix, tile))

        def compute(x: Any, w: Any) -> Any:
            k = te.reduce_axis((0, extents(x)[-1]), "k")

            def summand(read: Any, block: Any, lane: Any) -> Any:
                return te.sum(read(k) * w(block, k, lane), axis=[k])

            return row_product(x, w, columns, tile, key, summand)

        return builder.call_te(
            compute, left, packed, primfunc_name_hint="dense", primfunc_attrs=FUSABLE
        )

    def _stacked(
        self, builder: Any, left: Any, right: Any, a: list[Any], b: list[Any], dtype: str
    ) -> Any:
        key = f"matmul {a} {b} {dtype}"
        tile = self.tile(key, number(a[-2]), number(b[-1]) or 64, dtype)

        def compute(x: Any, y: Any) -> Any:
            *stack, rows, inner = extents(x)
            columns = extents(y)[-1]
            high = divides(tile.rows, rows)
            wide = divides(tile.columns, columns)
            left_ = x if high else extended(x, {-2: ceil(rows, tile.rows)})
            right_ = y if wide else extended(y, {-1: ceil(columns, tile.columns)})
            k = te.reduce_axis((0, inner), "k")

            def summand(*index: Any) -> Any:
                *outer, row, column = index
                return te.sum(left_(*outer, row, k) * right_(*outer, k, column), axis=[k])

            def value(*index: Any) -> Any:
                return product(*index)

            shape = (*stack, ceil(rows, tile.rows), ceil(columns, tile.columns))
            attrs = {**tile_attrs(tile, False, key), "stacked": 1}
            product = te.compute(shape, summand, name="product", attrs=attrs)
            return te.compute([*stack, rows, columns], value, name="result")

        return builder.call_te(
            compute, left, right, primfunc_name_hint="matmul", primfunc_attrs=FUSABLE
        )

    def conv2d(self, builder: Any, call: Any) -> Any:
        """Channels last with constant weights; depthwise, grouped or plain."""
        data, weights = call.args
        attrs = call.attrs
        shape, dtype = sizes(data), str(call.ty.dtype)
        if attrs.data_layout == "NCHW" and constant(builder, weights) is not None:
            return self._channels_first(builder, call)
        usual = attrs.data_layout == "NHWC" and attrs.kernel_layout == "HWIO"
        kernel, groups = constant(builder, weights), int(attrs.groups)
        if shape is None or kernel is None or not usual:
            return default("relax.nn.conv2d")(builder, call)
        if dtype == "int32" and groups == 1:
            return integers.conv2d(self, builder, call)
        if dtype not in _FLOATS:
            return default("relax.nn.conv2d")(builder, call)
        narrow = number(shape[2]) == 1 == number(call.ty.shape.values[2])
        if narrow and kernel.shape[1] == 1 and number(shape[1]) != 1:
            return self._turned(builder, call, kernel, shape)
        window = Window.of(attrs, kernel.shape)
        _, _, inner, outer = kernel.shape
        channels = int(shape[3])
        if groups == channels == outer and inner == 1:
            return self._depthwise(builder, data, kernel, window, shape, dtype)
        if groups > 1:
            return self._spatial(builder, data, kernel, window, shape, groups, dtype)
        if window.is_pointwise():
            return self._pointwise(builder, data, kernel, shape, dtype)
        return self._spatial(builder, data, kernel, window, shape, 1, dtype)

    def _channels_first(self, builder: Any, call: Any) -> Any:
        """Between two transpositions, where the layout of the whole model could not be changed."""
        data, weights = call.args
        kernel = constant(builder, weights).transpose(2, 3, 1, 0)
        last = builder.emit(builder.call_te(topi.transpose, data, [0, 2, 3, 1]))
        result = builder.emit(self._channels_last(builder, call, last, kernel))
        return builder.call_te(topi.transpose, result, [0, 3, 1, 2])

    def _turned(self, builder: Any, call: Any, kernel: Any, shape: list[Any]) -> Any:
        """One position wide: its rows, one after the other in memory, as columns."""
        n, high, wide, channels = shape
        data = builder.emit(builder.call_te(topi.reshape, call.args[0], (n, wide, high, channels)))
        turned = kernel.transpose(1, 0, 2, 3)
        result = builder.emit(self._channels_last(builder, call, data, turned, turn=True))
        return builder.call_te(topi.reshape, result, list(call.ty.shape.values))

    def _channels_last(
        self, builder: Any, call: Any, data: Any, kernel: Any, turn: bool = False
    ) -> Any:
        """A convolution with another one's attributes, those of its two axes exchanged or not."""
        attrs, step = call.attrs, -1 if turn else 1
        top, left, bottom, right = attrs.padding
        plain = relax.op.nn.conv2d(
            data,
            relax.const(np.ascontiguousarray(kernel)),
            list(attrs.strides)[::step],
            [left, top, right, bottom] if turn else [top, left, bottom, right],
            list(attrs.dilation)[::step],
            int(attrs.groups),
            "NHWC",
            "HWIO",
            out_dtype=str(call.ty.dtype),
        )
        return self.conv2d(builder, builder.normalize(plain))

    def _pointwise(self, builder: Any, data: Any, kernel: Any, shape: list[Any], dtype: str) -> Any:
        return self._dense(builder, data, kernel.reshape(kernel.shape[2:]), shape, dtype)

    def _spatial(
        self,
        builder: Any,
        data: Any,
        kernel: Any,
        window: Window,
        shape: list[Any],
        groups: int,
        dtype: str,
    ) -> Any:
        _, wide = window.output(shape[1], shape[2])
        inner, outer = kernel.shape[2:]
        key = f"conv2d {shape} {kernel.shape} {window} {groups} {dtype}"
        tiles = ranked(number(wide), outer // groups, self.registers, dtype)
        if groups == 1 and str(data.ty.dtype) == dtype == "float32":
            tiles = self._with_squares(tiles, window, shape, inner, outer)
        tile = self._chosen(key, tiles)
        if tile.squares:
            return _winograd(builder, data, kernel, window, tile, key)
        if groups > 1:  # blocks must not cross from one group to the next
            lanes = math.gcd(outer // groups, tile.lanes)
            vectors = math.gcd(outer // groups // lanes, tile.vectors)
            tile = replace(tile, vectors=vectors, lanes=lanes)
        packed = relax.const(pack(kernel.astype(dtype), tile))
        left = integers.bordered(builder, data)
        per_group = outer // groups // tile.columns if groups > 1 else 0

        def compute(x: Any, w: Any) -> Any:
            shape = extents(x)
            high, wide = window.output(shape[1], shape[2])
            width = ceil(wide, tile.rows)
            source = window.padded(x, shape, width, conversion=left.as_floats(dtype))
            dy, dx = (
                te.reduce_axis((0, size), name)
                for size, name in zip(window.size, "yx", strict=True)
            )
            k = te.reduce_axis((0, inner), "k")

            def summand(n: Any, y: Any, x_: Any, block: Any, lane: Any) -> Any:
                channel = k if groups == 1 else block // per_group * inner + k
                value = source(n, *window.at(y, x_, dy, dx), channel)
                return te.sum(value * w(block, dy, dx, k, lane), axis=[dy, dx, k])

            full = (shape[0], high, width, w.shape[0], tile.columns)
            product = te.compute(full, summand, name="product", attrs=tile_attrs(tile, False, key))
            return result(product, [shape[0], high, wide, outer], tile)

        return builder.call_te(
            compute, left.value, packed, primfunc_name_hint="conv2d", primfunc_attrs=FUSABLE
        )

    def _with_squares(
        self, tiles: list[Tile], window: Window, shape: list[Any], inner: int, outer: int
    ) -> list[Tile]:
        """The better of the direct way and Winograd's first, where there are both."""
        fits = window.size == (3, 3) and window.strides == window.dilation == (1, 1)
        high, wide = map(number, window.output(shape[1], shape[2]))
        if not fits or high is None or wide is None:
            return tiles
        others, better = squares(high, wide, inner, outer, self.registers, tiles[0])
        first, second = (others, tiles) if better else (tiles, others)
        return [*first[:1], *second[:1], *first[1:], *second[1:]]

    def _depthwise(
        self, builder: Any, data: Any, kernel: Any, window: Window, shape: list[Any], dtype: str
    ) -> Any:
        _, wide = window.output(shape[1], shape[2])
        channels = kernel.shape[3]
        key = f"depthwise {shape} {window} {dtype}"
        area = window.size[0] * window.size[1]
        left = integers.bordered(builder, data)
        static = None not in map(number, shape[1:3])
        in_place = static and str(left.value.ty.dtype) == dtype
        tiles = depthwise(number(wide), channels, self.registers, dtype, area, in_place)
        tile = self._chosen(key, tiles)
        packed = relax.const(pack(kernel.astype(dtype)[:, :, 0, None, :], tile)[:, :, :, 0])

        def compute(x: Any, w: Any) -> Any:
            shape = extents(x)
            high, wide = window.output(shape[1], shape[2])
            width = ceil(wide, tile.rows)
            blocks = -(-channels // tile.columns)
            deep = blocks * tile.columns
            source = window.padded(x, shape, width, deep, left.as_floats(dtype))
            dy, dx = (
                te.reduce_axis((0, size), name)
                for size, name in zip(window.size, "yx", strict=True)
            )

            def summand(n: Any, y: Any, x_: Any, block: Any, lane: Any) -> Any:
                channel = block * tile.columns + lane
                value = source(n, *window.at(y, x_, dy, dx), channel)
                return te.sum(value * w(block, dy, dx, lane), axis=[dy, dx])

            full = (shape[0], high, width, blocks, tile.columns)
            attrs = {**tile_attrs(tile, False, key), "depthwise": 1}
            product = te.compute(full, summand, name="product", attrs=attrs)
            return result(product, [shape[0], high, wide, channels], tile)

        return builder.call_te(
            compute, left.value, packed, primfunc_name_hint="depthwise", primfunc_attrs=FUSABLE
        )


def _winograd(builder: Any, data: Any, kernel: Any, window: Window, tile: Tile, key: str) -> Any:
    def compute(x: Any, w: Any) -> Any:
        return winograd.convolve(x, w, window, kernel.shape[3], tile, key)

    packed = relax.const(winograd.transformed(kernel, tile))
    return builder.call_te(
        compute, data, packed, primfunc_name_hint="conv2d", primfunc_attrs=FUSABLE
    )


def default(name: str) -> Any:
    """TVM's own legalization of an operator."""
    legalize: Any = importlib.import_module("tvm.ir").Op.get(name).get_attr("FLegalize")
    return legalize
