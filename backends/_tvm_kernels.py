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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from graphopt.backends._tvm_call import constant
from graphopt.backends._tvm_indices import (
    ceil,
    divides,
    extents,
    fits,
    number,
    ravel,
    same,
    simple,
    sizes,
    unit,
    unravel,
)
from graphopt.backends._tvm_indices import product as product_of
from graphopt.backends._tvm_tiles import Registers, Tile, ranked, vector

te: Any = importlib.import_module("tvm.te")
tirx: Any = importlib.import_module("tvm.tirx")
relax: Any = importlib.import_module("tvm.relax")
topi: Any = importlib.import_module("tvm.topi")

_FUSABLE = 4
"""TVM's number for operators that elementwise ones may be fused to."""
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
        if not alike:
            return default("relax.matmul")(builder, call)
        return self._stacked(builder, left, right, a, b, dtype)

    def _tile(self, kernel: str, rows: int | None, columns: int, dtype: str) -> Tile:
        """The tile of a kernel: of those measured, else the rules'."""
        self.seen[kernel] = ranked(rows, columns, self.registers, dtype)
        return self.tiles.get(kernel, self.seen[kernel][0])

    def _dense(self, builder: Any, left: Any, matrix: Any, a: list[Any], dtype: str) -> Any:
        columns = int(matrix.shape[1])
        key = f"dense {a} {columns} {dtype}"
        tile = self._tile(key, unit(a[:-1]), columns, dtype)
        packed = relax.const(pack(matrix, tile))

        def compute(x: Any, w: Any) -> Any:
            a = extents(x)
            rows = product_of(a[:-1])
            exact = divides(tile.rows, rows)
            # TVM proves that a symbolic number of rows is covered where no known size is among them
            flat = exact or number(rows) is not None or all(number(s) is None for s in a[:-1])
            if exact:
                source: Any = None
            elif flat:
                source = _copied_rows(x, a, rows, tile)
            else:  # rows of several symbolic axes: tiles along the last of them
                source = _extended(x, -2, ceil(a[-2], tile.rows))
            k = te.reduce_axis((0, a[-1]), "k")

            def summand(*index: Any) -> Any:
                *row, block, lane = index
                value = x(*unravel(row[0], a[:-1]), k) if source is None else source(*row, k)
                return te.sum(value * w(block, k, lane), axis=[k])

            high = [ceil(rows, tile.rows)] if flat else [*a[:-2], ceil(a[-2], tile.rows)]
            shape = (*high, w.shape[0], tile.columns)
            product = te.compute(shape, summand, name="product", attrs=_tile_attrs(tile, flat, key))
            result = _flat_result if flat else _result
            return result(product, [*a[:-1], columns], tile)

        return builder.call_te(
            compute, left, packed, primfunc_name_hint="dense", primfunc_attrs=_ATTRIBUTES
        )

    def _stacked(
        self, builder: Any, left: Any, right: Any, a: list[Any], b: list[Any], dtype: str
    ) -> Any:
        key = f"matmul {a} {b} {dtype}"
        tile = self._tile(key, number(a[-2]), number(b[-1]) or 64, dtype)

        def compute(x: Any, y: Any) -> Any:
            *stack, rows, inner = extents(x)
            columns = extents(y)[-1]
            high = divides(tile.rows, rows)
            wide = divides(tile.columns, columns)
            left_ = x if high else _extended(x, -2, ceil(rows, tile.rows))
            right_ = y if wide else _extended(y, -1, ceil(columns, tile.columns))
            k = te.reduce_axis((0, inner), "k")

            def summand(*index: Any) -> Any:
                *outer, row, column = index
                return te.sum(left_(*outer, row, k) * right_(*outer, k, column), axis=[k])

            def value(*index: Any) -> Any:
                return product(*index)

            shape = (*stack, ceil(rows, tile.rows), ceil(columns, tile.columns))
            attrs = {**_tile_attrs(tile, False, key), "stacked": 1}
            product = te.compute(shape, summand, name="product", attrs=attrs)
            return te.compute([*stack, rows, columns], value, name="result")

        return builder.call_te(
            compute, left, right, primfunc_name_hint="matmul", primfunc_attrs=_ATTRIBUTES
        )

    def conv2d(self, builder: Any, call: Any) -> Any:
        """Channels last with constant weights; depthwise, grouped or plain."""
        data, weights = call.args
        attrs = call.attrs
        shape, dtype = sizes(data), str(data.ty.dtype)
        if attrs.data_layout == "NCHW" and constant(builder, weights) is not None:
            return self._channels_first(builder, call)
        usual = attrs.data_layout == "NHWC" and attrs.kernel_layout == "HWIO"
        kernel, groups = constant(builder, weights), int(attrs.groups)
        if shape is None or kernel is None or not usual or dtype not in _FLOATS:
            return default("relax.nn.conv2d")(builder, call)
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
        attrs = call.attrs
        plain = relax.op.nn.conv2d(
            last,
            relax.const(np.ascontiguousarray(kernel)),
            attrs.strides,
            attrs.padding,
            attrs.dilation,
            int(attrs.groups),
            "NHWC",
            "HWIO",
        )
        result = builder.emit(self.conv2d(builder, builder.normalize(plain)))
        return builder.call_te(topi.transpose, result, [0, 3, 1, 2])

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
        tile = self._tile(key, number(wide), outer // groups, dtype)
        if groups > 1:  # blocks must not cross from one group to the next
            lanes = math.gcd(outer // groups, tile.lanes)
            vectors = math.gcd(outer // groups // lanes, tile.vectors)
            tile = Tile(tile.rows, vectors, lanes)
        packed = relax.const(pack(kernel, tile))
        per_group = outer // groups // tile.columns if groups > 1 else 0

        def compute(x: Any, w: Any) -> Any:
            shape = extents(x)
            high, wide = window.output(shape[1], shape[2])
            width = ceil(wide, tile.rows)
            source = window.padded(x, shape, width)
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
            product = te.compute(full, summand, name="product", attrs=_tile_attrs(tile, False, key))
            return _result(product, [shape[0], high, wide, outer], tile)

        return builder.call_te(
            compute, data, packed, primfunc_name_hint="conv2d", primfunc_attrs=_ATTRIBUTES
        )

    def _depthwise(
        self, builder: Any, data: Any, kernel: Any, window: Window, shape: list[Any], dtype: str
    ) -> Any:
        _, wide = window.output(shape[1], shape[2])
        channels = kernel.shape[3]
        lanes = vector(channels, self.registers.lanes(dtype))
        tile = _depthwise_tile(number(wide), channels, lanes, self.registers, window)
        packed = relax.const(pack(kernel[:, :, 0, None, :], tile)[:, :, :, 0])

        def compute(x: Any, w: Any) -> Any:
            shape = extents(x)
            high, wide = window.output(shape[1], shape[2])
            width = ceil(wide, tile.rows)
            blocks = -(-channels // tile.columns)
            source = window.padded(x, shape, width, blocks * tile.columns)
            dy, dx = (
                te.reduce_axis((0, size), name)
                for size, name in zip(window.size, "yx", strict=True)
            )

            def summand(n: Any, y: Any, x_: Any, block: Any, lane: Any) -> Any:
                channel = block * tile.columns + lane
                value = source(n, *window.at(y, x_, dy, dx), channel)
                return te.sum(value * w(block, dy, dx, lane), axis=[dy, dx])

            full = (shape[0], high, width, blocks, tile.columns)
            attrs = {**_tile_attrs(tile, False), "depthwise": 1}
            product = te.compute(full, summand, name="product", attrs=attrs)
            return _result(product, [shape[0], high, wide, channels], tile)

        return builder.call_te(
            compute, data, packed, primfunc_name_hint="depthwise", primfunc_attrs=_ATTRIBUTES
        )


_ATTRIBUTES = {"op_pattern": _FUSABLE}


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

    def padded(self, x: Any, shape: list[Any], width: Any, channels: int | None = None) -> Any:
        """The input with its border, as far to the right as `width` outputs reach."""
        n, high, wide, depth = shape
        rows, _ = self.output(high, wide)
        top, left = self.pads[:2]
        tall = (rows - 1) * self.strides[0] + (self.size[0] - 1) * self.dilation[0] + 1
        broad = (width - 1) * self.strides[1] + (self.size[1] - 1) * self.dilation[1] + 1
        deep = depth if channels is None else channels
        enough = fits(tall, high) and fits(broad, wide)
        if top == left == 0 and enough and deep == depth:
            return x

        def value(b: Any, i: Any, j: Any, c: Any) -> Any:
            inside = [i >= top, i < top + high, j >= left, j < left + wide]
            if deep != depth:
                inside.append(c < depth)
            zero = tirx.const(0, x.dtype)
            return tirx.if_then_else(tirx.all(*inside), x(b, i - top, j - left, c), zero)

        return te.compute((n, simple(tall), simple(broad), deep), value, name="padded")


def pack(weights: Any, tile: Tile) -> Any:
    """Weights [..., columns] as [blocks, ..., columns of a tile]; the last ends in zeros."""
    *rest, columns = weights.shape
    blocks = -(-columns // tile.columns)
    full = np.zeros((*rest, blocks * tile.columns), weights.dtype)
    full[..., :columns] = weights
    cut = full.reshape(*rest, blocks, tile.columns)
    return np.ascontiguousarray(np.moveaxis(cut, -2, 0))


def _tile_attrs(tile: Tile, flat: bool, key: str = "") -> dict[str, Any]:
    """What the schedule has to know of a product."""
    return {
        "kernel": key,
        "rows": tile.rows,
        "vectors": tile.vectors,
        "lanes": tile.lanes,
        "flat": int(flat),
    }


def _copied_rows(x: Any, shape: list[Any], rows: Any, tile: Tile) -> Any:
    """The rows of a tensor as a matrix that ends with a tile."""

    def value(row: Any, k: Any) -> Any:
        inside = x(*unravel(row, shape[:-1]), k)
        return tirx.if_then_else(row < rows, inside, tirx.const(0, x.dtype))

    return te.compute((ceil(rows, tile.rows), shape[-1]), value, name="padded")


def _extended(x: Any, axis: int, size: Any) -> Any:
    """A tensor with zeros appended along one of its two last axes."""
    shape = list(x.shape)
    whole = shape[axis]
    shape[axis] = size

    def value(*index: Any) -> Any:
        inside = index[len(index) + axis] < whole
        return tirx.if_then_else(inside, x(*index), tirx.const(0, x.dtype))

    return te.compute(shape, value, name="padded")


def _result(product: Any, shape: list[Any], tile: Tile) -> Any:
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


def _depthwise_tile(
    wide: int | None, channels: int, lanes: int, registers: Registers, window: Window
) -> Tile:
    """Sums for some outputs side by side, which share most of what they see."""
    vectors = 2 if channels % (2 * lanes) == 0 and window.size[0] * window.size[1] <= 9 else 1
    most = min(registers.sums(vectors) // vectors, 8)
    if wide is None:
        return Tile(4, vectors, lanes)
    fits = [rows for rows in range(1, most + 1) if wide % rows == 0]
    if fits[-1] < 3 and wide > 3:  # better some columns too many than one at a time
        fits = [min(range(3, most + 1), key=lambda rows: (-(-wide // rows) * rows, -rows))]
    return Tile(fits[-1], vectors, lanes)


def default(name: str) -> Any:
    """TVM's own legalization of an operator."""
    legalize: Any = importlib.import_module("tvm.ir").Op.get(name).get_attr("FLegalize")
    return legalize
