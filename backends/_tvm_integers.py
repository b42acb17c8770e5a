"""Products and convolutions of small integers, summed exactly.

The importer writes them as operators on 16-bit differences, `int16(x) - zero`, which every change
of layout passes. Here the 8-bit tensor below the difference is found again and multiplied as it is:
`sum((x - zero) w) = sum(x w) - zero sum(w)`, and the border of a convolution is filled with the
zero point (Jacob et al., "Quantization and Training of Neural Networks for Efficient
Integer-Arithmetic-Only Inference", 2018, section 2.3).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from graphopt.backends._tvm_call import binding, constant, is_call
from graphopt.backends._tvm_dots import Conversion, Dot, best
from graphopt.backends._tvm_indices import (
    ceil,
    extents,
    number,
    sizes,
    unit,
)
from graphopt.backends._tvm_stages import (
    FUSABLE,
    Window,
    result,
    row_product,
    tile_attrs,
)
from graphopt.backends._tvm_tiles import Registers, Tile

te: Any = importlib.import_module("tvm.te")
tirx: Any = importlib.import_module("tvm.tirx")
relax: Any = importlib.import_module("tvm.relax")
topi: Any = importlib.import_module("tvm.topi")


class Tiles(Protocol):
    """What chooses tiles for a CPU."""

    @property
    def registers(self) -> Registers:
        """Of the CPU."""
        ...

    def tile(self, kernel: str, rows: int | None, columns: int, dtype: str, lanes: int = 0) -> Tile:
        """The tile of a kernel."""
        ...


BYTES = ("int8", "uint8")
_DATA = (*BYTES, "int16")


@dataclass(frozen=True)
class Operand:
    """The left side of a product: elements less their zero point."""

    value: Any
    dtype: str
    zero: Any
    """An int, or a Relax tensor of one element."""

    @classmethod
    def of(cls, builder: Any, value: Any) -> Operand:
        """What a tensor is the 16-bit difference of; the tensor itself where it is none."""
        return _difference(builder, value) or cls(value, str(value.ty.dtype), 0)

    def as_floats(self, dtype: str) -> Conversion:
        """Its differences as floats, for sums that those hold exactly; floats as they are."""
        zero = self.zero

        def element(x: Any) -> Any:
            value = x.astype(dtype)
            return value - tirx.const(zero, dtype) if zero else value

        return Conversion(dtype, element)


def _difference(builder: Any, value: Any) -> Operand | None:
    found = binding(builder, value)
    for name, move in _MOVES.items():
        if is_call(found, name):
            inner = _difference(builder, found.args[0])
            if inner is None or not isinstance(inner.zero, int):
                return None
            moved = builder.emit(move(builder, inner.value, found))
            return Operand(moved, inner.dtype, inner.zero)
    zero: Any = 0
    if is_call(found, "relax.subtract"):
        zero = constant(builder, found.args[1])
        zero = found.args[1] if zero is None else int(zero.ravel()[0])
        found = binding(builder, found.args[0])
    if not is_call(found, "relax.astype") or str(found.args[0].ty.dtype) not in BYTES:
        return None
    return Operand(found.args[0], str(found.args[0].ty.dtype), zero)


def _permuted(builder: Any, value: Any, call: Any) -> Any:
    return builder.call_te(topi.transpose, value, [int(axis) for axis in call.attrs.axes])


def _reshaped(builder: Any, value: Any, call: Any) -> Any:
    return builder.call_te(topi.reshape, value, list(call.ty.shape.values))


_MOVES = {"relax.permute_dims": _permuted, "relax.reshape": _reshaped}
KEPT = ("relax.astype", "relax.subtract", *_MOVES)
"""Operators on 16-bit integers that `Operand` looks through."""


def keep(otherwise: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """A legalization that leaves 16-bit operators for `Operand` to look through."""

    def legalize(builder: Any, call: Any) -> Any:
        known = constant(builder, call.args[0]) is not None
        return call if str(call.ty.dtype) == "int16" and not known else otherwise(builder, call)

    return legalize


def bordered(builder: Any, value: Any) -> Operand:
    """As `Operand.of`, with a zero point that a border can be filled with."""
    operand = Operand.of(builder, value)
    return operand if isinstance(operand.zero, int) else Operand(value, str(value.ty.dtype), 0)


def matmul(tiles: Tiles, builder: Any, call: Any) -> Any:
    """A product of integers with a constant matrix; None for anything else."""
    left, right = call.args
    shape, matrix = sizes(left), constant(builder, right)
    if str(call.ty.dtype) != "int32" or str(left.ty.dtype) not in _DATA:
        return None
    if shape is None or len(shape) < 2 or matrix is None or matrix.ndim != 2:
        return None
    return _dense(tiles, builder, Operand.of(builder, left), matrix, list(shape))


def conv2d(tiles: Tiles, builder: Any, call: Any) -> Any:
    """A convolution of integers with constant weights, channels last, in one group."""
    kernel, shape = constant(builder, call.args[1]), sizes(call.args[0])
    window = Window.of(call.attrs, kernel.shape)
    operand = bordered(builder, call.args[0])
    if window.is_pointwise():
        matrix = kernel.reshape(kernel.shape[2:])
        return _dense(tiles, builder, operand, matrix, list(shape or ()))
    return _spatial(tiles, builder, operand, kernel, window, list(shape or ()))


def _dense(tiles: Tiles, builder: Any, left: Operand, matrix: Any, a: list[Any]) -> Any:
    columns = int(matrix.shape[1])
    dot = best(tiles.registers.dots, left.dtype, str(matrix.dtype))
    key = f"dense {a} {columns} {left.dtype} {matrix.dtype}"
    tile = tiles.tile(key, unit(a[:-1]), columns, "int32", dot.lanes)
    conversion = dot.conversion(left.dtype, 0)
    deep = int(ceil(matrix.shape[0], dot.group))

    def compute(x: Any, w: Any, *offset: Any) -> Any:
        depth = dot.depth(deep)

        def summand(read: Any, block: Any, lane: Any) -> Any:
            weight = w(block, *dot.weight(depth, lane))
            value = read(dot.term(depth))
            return te.sum(value.astype("int32") * weight.astype("int32"), axis=depth)

        product = row_product(x, w, columns, tile, key, summand, deep, conversion, dot)
        return _less(product, offset)

    return builder.call_te(
        compute,
        left.value,
        relax.const(dot.pack(matrix, -(-columns // tile.columns), tile.columns)),
        *_offset(builder, matrix, left, dot),
        primfunc_name_hint="dense",
        primfunc_attrs=FUSABLE,
    )


def _spatial(
    tiles: Tiles, builder: Any, data: Operand, kernel: Any, window: Window, shape: list[Any]
) -> Any:
    _, wide = window.output(shape[1], shape[2])
    inner, outer = kernel.shape[2:]
    dot = best(tiles.registers.dots, data.dtype, str(kernel.dtype))
    key = f"conv2d {shape} {kernel.shape} {window} {data.dtype} {kernel.dtype}"
    tile = tiles.tile(key, number(wide), outer, "int32", dot.lanes)
    deep = int(ceil(inner, dot.group))

    def compute(x: Any, w: Any, *offset: Any) -> Any:
        shape = extents(x)
        high, wide = window.output(shape[1], shape[2])
        width = ceil(wide, tile.rows)
        source = window.padded(x, shape, width, deep, dot.conversion(data.dtype, data.zero))
        dy, dx = (
            te.reduce_axis((0, size), name) for size, name in zip(window.size, "yx", strict=True)
        )
        depth = dot.depth(deep)

        def summand(n: Any, y: Any, x_: Any, block: Any, lane: Any) -> Any:
            value = source(n, *window.at(y, x_, dy, dx), dot.term(depth))
            weight = w(block, dy, dx, *dot.weight(depth, lane))
            return te.sum(value.astype("int32") * weight.astype("int32"), axis=[dy, dx, *depth])

        full = (shape[0], high, width, w.shape[0], tile.columns)
        attrs = tile_attrs(tile, False, key, dot)
        product = te.compute(full, summand, name="product", attrs=attrs)
        return _less(result(product, [shape[0], high, wide, outer], tile), offset)

    return builder.call_te(
        compute,
        data.value,
        relax.const(dot.pack(kernel, -(-outer // tile.columns), tile.columns)),
        *_offset(builder, kernel, data, dot),
        primfunc_name_hint="conv2d",
        primfunc_attrs=FUSABLE,
    )


def _offset(builder: Any, weights: Any, left: Operand, dot: Dot) -> list[Any]:
    """What the sums of products are too large by, per column; nothing where it is zero."""
    sums = weights.astype(np.int64).reshape(-1, weights.shape[-1]).sum(0)
    shift = dot.shift(left.dtype)
    if isinstance(left.zero, int):
        zero = left.zero + shift
        return [relax.const((sums * zero).astype(np.int32))] if zero else []

    def shifted(zero: Any) -> Any:
        def value(_: Any) -> Any:
            return zero(*[0] * len(zero.shape)).astype("int32") + shift

        return te.compute((1,), value, name="zero")

    zero = builder.emit_te(shifted, left.zero)
    return [relax.const(sums.astype(np.int32)), zero]


def _less(product: Any, offset: tuple[Any, ...]) -> Any:
    """The product less its offset: a row, or a row times a number."""
    if not offset:
        return product

    def value(*index: Any) -> Any:
        below = offset[0](index[-1])
        return product(*index) - (below if len(offset) == 1 else below * offset[1](0))

    return te.compute(product.shape, value, name="exact")
