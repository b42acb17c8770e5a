"""Tensors of dtypes that numpy has only through ml_dtypes, to and from ONNX Runtime's values.

Elements of less than a byte lie in it side by side, the first in the lowest bits (ONNX IR
specification, "Tensor element types"); ml_dtypes gives each a byte of its own.
"""

from __future__ import annotations

import ctypes
import importlib
import math
from typing import Any

import numpy as np

from graphopt.backends import Array, Output

_NUMBERS = {
    # of TensorProto's element types, by which ONNX Runtime knows them
    "bfloat16": 16,
    "float8_e4m3fn": 17,
    "float8_e4m3fnuz": 18,
    "float8_e5m2": 19,
    "float8_e5m2fnuz": 20,
    "uint4": 21,
    "int4": 22,
    "float8_e8m0fnu": 24,
    "uint2": 25,
    "int2": 26,
}
_NAMES = {number: name for name, number in _NUMBERS.items()}


def to_ort_value(feed: Any) -> Any:
    """An OrtValue of an array, on the CPU."""
    kind: Any = importlib.import_module("onnxruntime").OrtValue
    number = _NUMBERS.get(feed.dtype.name)
    if number is None:
        return kind.ortvalue_from_numpy(feed)
    bits = _bits(feed.dtype.name)
    if bits == 8 * feed.dtype.itemsize:
        return kind.ortvalue_from_numpy_with_onnx_type(feed, number)
    value = kind.ortvalue_from_shape_and_type(list(feed.shape), number, "cpu")
    data = pack(feed, bits).tobytes()
    ctypes.memmove(value.data_ptr(), data, len(data))
    return value


def from_ort_value(value: Any) -> Output:
    """An array out of an OrtValue, also of a dtype for which `OrtValue.numpy` has no answer."""
    name = _NAMES.get(value.element_type())
    if name is None:
        result: Output = value.numpy()
        return result
    dtype: np.dtype[Any] = np.dtype(getattr(importlib.import_module("ml_dtypes"), name))
    shape, bits = tuple(value.shape()), _bits(name)
    count = math.prod(shape)
    raw = ctypes.string_at(value.data_ptr(), -(-count * bits // 8)) if count else b""
    if bits == 8 * dtype.itemsize:
        return np.frombuffer(raw, dtype).reshape(shape).copy()
    numbers = unpack(np.frombuffer(raw, np.uint8), bits, count, signed=name.startswith("int"))
    return numbers.astype(dtype).reshape(shape)


def pack(array: Array, bits: int) -> Array:
    """The low bits of integers, side by side in bytes."""
    each = 8 // bits
    flat = array.astype(np.int8).view(np.uint8).ravel() & ((1 << bits) - 1)
    padded = np.pad(flat, (0, -flat.size % each)).reshape(-1, each)
    shifted: Array = padded << (bits * np.arange(each, dtype=np.uint8))
    packed: Array = np.bitwise_or.reduce(shifted, axis=1)
    return packed


def unpack(data: Array, bits: int, count: int, *, signed: bool) -> Array:
    """The inverse, as int8."""
    shifts = bits * np.arange(8 // bits, dtype=np.uint8)
    flat = ((data[:, None] >> shifts) & ((1 << bits) - 1)).ravel()[:count].astype(np.int8)
    top = np.int8(1 << (bits - 1))
    return (flat ^ top) - top if signed else flat


def _bits(name: str) -> int:
    if name.endswith(("int4", "int2")):
        return int(name[-1])
    return 16 if name == "bfloat16" else 8
