"""Converters of quantized operators: integers stay integers where ONNX says what they stand for.

An operator whose inputs come from DequantizeLinear is computed with the integers below, and its
sums are multiplied with both scales (Jacob et al., "Quantization and Training of Neural Networks
for Efficient Integer-Arithmetic-Only Inference", 2018, section 2.2). What rescales and rounds
again is fused to the kernel that sums.
"""

from __future__ import annotations

import dataclasses
import importlib
from dataclasses import dataclass
from typing import Any

import numpy as np

from graphopt.backends._tvm_call import Call, is_constant

relax: Any = importlib.import_module("tvm.relax")
_op: Any = relax.op

_BYTES = ("int8", "uint8")
_WHOLE = 2**24
"""Up to here float32 holds every integer."""


@dataclass(frozen=True)
class Product:
    """The operands of a product of integers, and what its sums have to be multiplied with."""

    left: Any
    """int16 elements less their zero point."""
    right: Any
    """A constant, less its zero point: int8, or int16 where that is out of range."""
    scale: Any
    """float32, of one element or one per column."""
    dtype: str
    """Of the sums."""

    def scaled(self, call: Call, sums: Any, axis: int) -> Any:
        """The sums as floats, their columns counted by an axis."""
        if self.dtype != "float32":
            sums = call.emit(_op.astype(sums, "float32"))
        shape = [1] * sums.ty.ndim
        shape[axis] = self.scale.size
        return call.emit(_op.multiply(sums, relax.const(self.scale.reshape(shape))))


def product(call: Call, axis: int, groups: int = 1) -> Product | None:
    """The first two inputs of a node as integers; None where they are no such thing.

    Args:
        call: whose second input is constant below a DequantizeLinear.
        axis: of the second input that scales may differ along.
        groups: of a convolution; more than one are summed as floats, exactly.
    """
    left, right = _below(call, 0), _below(call, 1)
    if left is None or right is None or left.scale.size != 1 or not is_constant(right.value):
        return None
    weights = right.value.value.numpy().astype(np.int16)
    if right.scale.size > 1 and right.axis % weights.ndim != axis:
        return None
    shape = [1] * weights.ndim
    shape[axis] = right.zero.size
    weights -= right.zero.astype(np.int16).reshape(shape)
    dtype = "int32"
    if groups > 1:
        sums = np.abs(weights.astype(np.int64)).sum(tuple(set(range(weights.ndim)) - {axis}))
        if sums.max(initial=0) * _reach(left) >= _WHOLE:
            return None
        dtype = "float32"
    small = weights.min(initial=0) >= -128 and weights.max(initial=0) <= 127
    return Product(
        _difference(call, left.value, int(left.zero.ravel()[0])),
        relax.const(weights.astype(np.int8) if small else weights),
        (left.scale.ravel()[0] * right.scale.ravel()).astype(np.float32),
        dtype,
    )


@dataclass(frozen=True)
class _Quantized:
    """The integers below a DequantizeLinear, its constant scale and zero point, and their axis."""

    value: Any
    scale: Any
    zero: Any
    axis: int


def _below(call: Call, index: int) -> _Quantized | None:
    node = call.node.inputs[index]
    source = None if node is None else node.producer()
    if source is None or (source.domain, source.op_type) != ("", "DequantizeLinear"):
        return None
    inputs = [None if value is None else call.values[value.name or ""] for value in source.inputs]
    below = dataclasses.replace(call, inputs=inputs, node=source)
    value, scale, zero = (below.get(position) for position in range(3))
    if str(value.ty.dtype) not in _BYTES or not is_constant(scale):
        return None
    if not (zero is None or is_constant(zero)) or str(scale.ty.dtype) != "float32":
        return None
    factors = scale.value.numpy()
    if factors.ndim > 1 or below.attribute("block_size", 0):
        return None
    zeros = np.zeros(1, np.int64) if zero is None else zero.value.numpy().astype(np.int64)
    return _Quantized(value, factors, zeros, below.attribute("axis", 1))


def _reach(left: _Quantized) -> int:
    """The largest difference from a zero point."""
    info, zero = np.iinfo(str(left.value.ty.dtype)), int(left.zero.ravel()[0])
    return max(info.max - zero, zero - info.min)


def _difference(call: Call, value: Any, zero: int) -> Any:
    wide = call.emit(_op.astype(value, "int16"))
    if not zero:
        return wide
    return call.emit(_op.subtract(wide, _number(zero, value, "int16")))


def _number(value: Any, like: Any, dtype: str) -> Any:
    """A constant of the rank of a tensor, which changes of layout pass."""
    return relax.const(np.full((1,) * like.ty.ndim, value, dtype))


def matmul(call: Call) -> Any:
    """MatMul of integers with a constant matrix; None for the importer's."""
    right = call.inputs[1]
    if right.ty.ndim != 2 or call.inputs[0].ty.ndim < 2:
        return None
    found = product(call, 1)
    if found is None:
        return None
    sums = call.emit(_op.matmul(found.left, found.right, out_dtype=found.dtype))
    return found.scaled(call, sums, -1)


def gemm(call: Call) -> Any:
    """Gemm of integers with a constant matrix; None for the importer's."""
    turned = call.attribute("transB", 0)
    alpha, beta = call.attribute("alpha", 1.0), call.attribute("beta", 1.0)
    if call.attribute("transA", 0):
        return None
    found = product(call, 0 if turned else 1)
    if found is None:
        return None
    matrix = found.right.value.numpy()
    right = relax.const(np.ascontiguousarray(matrix.T)) if turned else found.right
    sums = call.emit(_op.matmul(found.left, right, out_dtype=found.dtype))
    result = found.scaled(call, sums, -1)
    if alpha != 1.0:
        result = call.emit(_op.multiply(result, relax.const(np.float32(alpha))))
    bias = call.get(2)
    if bias is None:
        return result
    if beta != 1.0:
        bias = call.emit(_op.multiply(bias, relax.const(np.float32(beta))))
    return _op.add(result, bias)


def quantize(call: Call) -> Any:
    """QuantizeLinear to 8 or 16 bits with one constant scale; None for the importer's."""
    x, scale, zero = call.inputs[0], call.inputs[1], call.get(2)
    if not is_constant(scale) or not (zero is None or is_constant(zero)):
        return None
    factor, dtype = scale.value.numpy(), "uint8" if zero is None else str(zero.ty.dtype)
    if factor.size != 1 or dtype not in (*_BYTES, "int16", "uint16"):
        return None
    if str(x.ty.dtype) != "float32" or factor.dtype != np.float32:
        return None
    offset = 0 if zero is None else int(zero.value.numpy().ravel()[0])
    info = np.iinfo(dtype)
    y = call.emit(_op.divide(x, _number(factor.ravel()[0], x, "float32")))
    y = call.emit(_op.round(y))
    if offset:
        y = call.emit(_op.add(y, _number(offset, x, "float32")))
    y = call.emit(_op.maximum(y, _number(info.min, x, "float32")))
    y = call.emit(_op.minimum(y, _number(info.max, x, "float32")))
    return _op.astype(y, dtype)


def dequantize(call: Call) -> Any:
    """Constant weights become floats; of others one scale for all or one per index of an axis."""
    x, scale, zero = call.inputs[0], call.inputs[1], call.get(2)
    if is_constant(x) and is_constant(scale) and (zero is None or is_constant(zero)):
        return relax.const(_dequantized(call, x, scale, zero))
    if call.attribute("block_size", 0) and scale.ty.ndim:
        raise NotImplementedError("scales by block of what is no constant")
    dtype = scale.ty.dtype
    axis = int(call.attribute("axis", 1)) % max(x.ty.ndim, 1)
    shape = [1] * x.ty.ndim
    if scale.ty.ndim == 1 and x.ty.ndim:
        shape[axis] = -1
    value = _op.astype(x, dtype)
    if zero is not None:
        value = call.emit(_op.subtract(value, _shaped(zero, shape, dtype)))
    return _op.multiply(value, _shaped(scale, shape, dtype))


def _shaped(value: Any, shape: list[int], dtype: Any) -> Any:
    """Of a dtype and a shape; a constant stays one."""
    if is_constant(value):
        return relax.const(value.value.numpy().astype(str(dtype)).reshape(shape))
    return _op.reshape(_op.astype(value, dtype), shape)


def _dequantized(call: Call, x: Any, scale: Any, zero: Any) -> Any:
    array, factors = x.value.numpy(), scale.value.numpy()
    offsets = np.zeros_like(factors) if zero is None else zero.value.numpy().astype(factors.dtype)
    axis = int(call.attribute("axis", 1)) % max(array.ndim, 1)
    block = int(call.attribute("block_size", 0))
    if factors.ndim == array.ndim and block:
        size = array.shape[axis]
        every = np.arange(int(size)) // block
        factors, offsets = (np.take(part, every, axis) for part in (factors, offsets))
    elif factors.size > 1:
        shape = [-1 if index == axis else 1 for index in range(array.ndim)]
        factors, offsets = factors.reshape(shape), offsets.reshape(shape)
    else:
        factors, offsets = factors.reshape(()), offsets.reshape(())
    return np.asarray((array.astype(factors.dtype) - offsets) * factors)
