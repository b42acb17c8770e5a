"""Grids of integers or small floats: scale and zero point from a range, and rounding to them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from graphopt import ir
from graphopt.errors import InputError

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float32]

_LIMITS = {
    ir.DataType.INT2: (-2, 1),
    ir.DataType.UINT2: (0, 3),
    ir.DataType.INT4: (-8, 7),
    ir.DataType.UINT4: (0, 15),
    ir.DataType.INT8: (-128, 127),
    ir.DataType.UINT8: (0, 255),
    ir.DataType.INT16: (-32768, 32767),
    ir.DataType.UINT16: (0, 65535),
    ir.DataType.INT32: (-(2**31), 2**31 - 1),
}
_FLOATS = (ir.DataType.FLOAT8E4M3FN, ir.DataType.FLOAT8E5M2)
_LARGEST = 448
"""What the end of a range becomes: the largest e4m3. e5m2 goes on to 57344, but its steps are as
fine anywhere, and ONNX Runtime makes integers of biases that overflow where scales are tiny."""
_NAMES = {
    **{kind.name.lower(): kind for kind in _LIMITS if kind != ir.DataType.INT32},
    "fp8": ir.DataType.FLOAT8E4M3FN,
    "e4m3": ir.DataType.FLOAT8E4M3FN,
    "e5m2": ir.DataType.FLOAT8E5M2,
}
_SMALLEST = np.float32(2.0**-100)
"""Of a scale: far below it, scales and their products stop being normal floats."""


def parse_type(name: str) -> ir.DataType:
    """The type of `int8`, `uint8`, `int16`, `e4m3` … InputError lists them."""
    kind = _NAMES.get(name.lower())
    if kind is None:
        raise InputError(f"no quantized type is named {name!r}: there are {', '.join(_NAMES)}")
    return kind


def opset_for(dtype: ir.DataType) -> int:
    """The opset from which on QuantizeLinear and DequantizeLinear know a type."""
    if dtype in (ir.DataType.INT8, ir.DataType.UINT8):
        return 13  # with an axis; 10 without
    if dtype in (ir.DataType.INT2, ir.DataType.UINT2):
        return 25
    return 19 if dtype in _FLOATS else 21


@dataclass(frozen=True)
class Grid:
    """The values that a tensor is rounded to, up to its scale and zero point."""

    dtype: ir.DataType
    symmetric: bool = False
    """Zero is the integer 0, or the middle of an unsigned type."""
    reduced: bool = False
    """One bit less: for processors that add up two products of 8 bits in 16."""
    power_of_two: bool = False
    """Scales are 2**k, rounded up: for hardware that shifts instead of multiplying."""

    @property
    def limits(self) -> tuple[int, int]:
        """The lowest and highest integer; for small floats the range in steps of the scale."""
        if self.dtype in _FLOATS:
            return -_LARGEST, _LARGEST
        low, high = _LIMITS[self.dtype]
        if self.reduced:
            return (low // 2, high // 2)
        return low, high

    @property
    def levels(self) -> int:
        """How many values there are."""
        if self.dtype in _FLOATS:
            return 256
        low, high = self.limits
        return high - low + 1

    @property
    def floating(self) -> bool:
        """Whether the values are small floats."""
        return self.dtype in _FLOATS

    def parameters(self, low: Any, high: Any) -> tuple[Floats, Array]:
        """Scales and zero points for ranges, of any shape; zero is always representable."""
        low = np.minimum(np.asarray(low, np.float64), 0)
        high = np.maximum(np.asarray(high, np.float64), 0)
        lowest, highest = self.limits
        if self.symmetric or self.floating:
            middle = 0 if lowest < 0 else (highest + 1) // 2
            reach = np.maximum(high, -low) / (highest - middle)
            scale = self._scale(reach)
            return scale, np.full(scale.shape, middle, np.int64)
        scale = self._scale((high - low) / (highest - lowest))
        zero = np.rint(lowest - low / scale.astype(np.float64)).astype(np.int64)
        return scale, np.clip(zero, lowest, highest)

    def quantize(self, values: Array, scale: Array, zero: Array) -> ir.TensorProtocol:
        """Values rounded, as a tensor of the grid's type; scale and zero point broadcast."""
        scaled = values.astype(np.float64) / np.asarray(scale, np.float64)
        lowest, highest = self.limits
        if self.floating:
            kept = np.clip(scaled, lowest, highest).astype(self.dtype.numpy())
            return ir.Tensor(kept, dtype=self.dtype)
        whole = np.clip(np.rint(scaled) + zero, lowest, highest)
        return ir.Tensor(whole.astype(self.dtype.numpy()), dtype=self.dtype)

    def zero_point(self, zero: Array) -> ir.TensorProtocol:
        """A zero point as a tensor of the grid's type."""
        return ir.Tensor(np.asarray(zero).astype(self.dtype.numpy()), dtype=self.dtype)

    def least_scale(self, scale: npt.NDArray[np.floating[Any]]) -> Floats:
        """The smallest scales of the grid that are no less than those, of any shape."""
        if self.power_of_two:
            fraction, exponent = np.frexp(scale)
            scale = np.ldexp(1.0, np.where(fraction > 0.5, exponent, exponent - 1))
        return scale.astype(np.float32)

    def _scale(self, reach: npt.NDArray[np.float64]) -> Floats:
        scale = self.least_scale(reach)
        return np.where(scale < _SMALLEST, np.float32(1.0), scale).astype(np.float32)
