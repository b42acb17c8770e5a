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

from graphopt import ir
from graphopt.backends._tvm_call import Call, binding, is_call, is_constant
from graphopt.backends._tvm_indices import sizes

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


@dataclass(frozen=True)
class _Quantized:
    """Integers with their scale and zero point, and the axis along which those differ."""

    value: Any
    scale: Any = dataclasses.field(default_factory=lambda: np.ones((), np.float32))
    """An array."""
    zero: Any = None
    """A Relax tensor, or None for 0."""
    axis: int = 1

    @property
    def zeros(self) -> Any:
        """The zero points as an array; None where they are known at run time only."""
        if self.zero is None:
            return np.zeros((), np.int64)
        return self.zero.value.numpy().astype(np.int64) if is_constant(self.zero) else None

    def difference(self, call: Call) -> Any:
        """The integers less their one zero point, as int16."""
        wide = call.emit(_op.astype(self.value, "int16"))
        zeros = self.zeros
        if zeros is not None and not zeros.any():
            return wide
        if zeros is not None:
            return call.emit(_op.subtract(wide, _number(zeros.ravel()[0], wide, "int16")))
        shape = (1,) * wide.ty.ndim
        return call.emit(_op.subtract(wide, _op.reshape(_op.astype(self.zero, "int16"), shape)))

    def reach(self) -> int:
        """The largest difference from the zero point."""
        info, zeros = np.iinfo(str(self.value.ty.dtype)), self.zeros
        if zeros is None:
            return int(info.max - info.min)
        return max(info.max - int(zeros.ravel()[0]), int(zeros.ravel()[0]) - info.min)


def product(call: Call, axis: int, groups: int = 1) -> Product | None:
    """The first two inputs of a node as integers; None where they are no such thing.

    Args:
        call: whose second input is constant below a DequantizeLinear.
        axis: of the second input that scales may differ along.
        groups: of a convolution; more than one are summed as floats, exactly.
    """
    left, right = _below(call, 0), _below(call, 1)
    return None if left is None or right is None else _product(call, left, right, axis, groups)


def integers(call: Call, axis: int, groups: int = 1) -> Product | None:
    """As `product`, of MatMulInteger or ConvInteger: what its inputs are themselves."""
    left = _Quantized(call.inputs[0], zero=call.get(2))
    return _product(
        call, left, _Quantized(call.inputs[1], zero=call.get(3), axis=axis), axis, groups
    )


def linear(call: Call, axis: int, groups: int = 1) -> Product | None:
    """As `product`, of QLinearMatMul or QLinearConv, whose inputs have theirs beside them."""
    left, right = (_with_scale(call.inputs[k : k + 3], axis) for k in (0, 3))
    return None if left is None or right is None else _product(call, left, right, axis, groups)


def _product(
    call: Call, left: _Quantized, right: _Quantized, axis: int, groups: int
) -> Product | None:
    zeros = right.zeros
    if left.scale.size != 1 or not is_constant(right.value) or zeros is None:
        return None
    if left.zero is not None and sizes(left.zero) not in ([], [1]):
        return None
    weights = right.value.value.numpy().astype(np.int16)
    if right.scale.size > 1 and right.axis % weights.ndim != axis:
        return None
    shape = [1] * weights.ndim
    shape[axis] = zeros.size
    weights -= zeros.astype(np.int16).reshape(shape)
    dtype = "int32"
    if groups > 1:
        sums = np.abs(weights.astype(np.int64)).sum(tuple(set(range(weights.ndim)) - {axis}))
        if sums.max(initial=0) * left.reach() >= _WHOLE:
            return None
        dtype = "float32"
    small = weights.min(initial=0) >= -128 and weights.max(initial=0) <= 127
    return Product(
        left.difference(call),
        relax.const(weights.astype(np.int8) if small else weights),
        (left.scale.ravel()[0] * right.scale.ravel()).astype(np.float32),
        dtype,
    )


def _below(call: Call, index: int) -> _Quantized | None:
    node = call.node.inputs[index]
    source = None if node is None else node.producer()
    if source is None or (source.domain, source.op_type) != ("", "DequantizeLinear"):
        return None
    inputs = [None if value is None else call.values[value.name or ""] for value in source.inputs]
    below = dataclasses.replace(call, inputs=inputs, node=source)
    return (
        None
        if below.attribute("block_size", 0)
        else _with_scale(inputs, below.attribute("axis", 1))
    )


def _with_scale(inputs: list[Any], axis: int) -> _Quantized | None:
    """A tensor, a scale and perhaps a zero point: bytes, and constants in float32."""
    value, scale = inputs[:2]
    zero = inputs[2] if len(inputs) > 2 else None
    if str(value.ty.dtype) not in _BYTES or not is_constant(scale):
        return None
    if str(scale.ty.dtype) != "float32" or scale.ty.ndim > 1:
        return None
    if zero is not None and not is_constant(zero):
        return None
    return _Quantized(value, scale.value.numpy(), zero, axis)


def _number(value: Any, like: Any, dtype: str = "float32") -> Any:
    """A constant of the rank of a tensor, which changes of layout pass."""
    return relax.const(np.full((1,) * like.ty.ndim, value, dtype))


def matmul(call: Call) -> Any:
    """MatMul of integers with a constant matrix; None for the importer's."""
    found = product(call, 1) if _has_matrix(call, 1) else None
    if found is None:
        return None
    sums = call.emit(_op.matmul(found.left, found.right, out_dtype=found.dtype))
    return found.scaled(call, sums, -1)


def matmul_integer(call: Call) -> Any:
    """MatMulInteger with a constant matrix; None for the importer's."""
    found = integers(call, 1) if _has_matrix(call, 1) else None
    return None if found is None else _op.matmul(found.left, found.right, out_dtype=found.dtype)


def qlinear_matmul(call: Call) -> Any:
    """QLinearMatMul with a constant matrix."""
    found = linear(call, 1) if _has_matrix(call, 3) else None
    if found is None:
        raise NotImplementedError(_NO_CONSTANTS)
    sums = call.emit(_op.matmul(found.left, found.right, out_dtype=found.dtype))
    return requantized(call, found.scaled(call, sums, -1))


def requantized(call: Call, x: Any) -> Any:
    """Floats as QLinearMatMul and QLinearConv put them out."""
    result = _quantize(call, x, call.inputs[6], call.inputs[7])
    if result is None:
        raise NotImplementedError(_NO_CONSTANTS)
    return result


_NO_CONSTANTS = "scales, zero points and weights that are no constants, or not of 8 bits"


def _has_matrix(call: Call, index: int) -> bool:
    return bool(call.inputs[index].ty.ndim == 2 and call.inputs[0].ty.ndim >= 2)


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


def dynamic_quantize(call: Call) -> Any:
    """DynamicQuantizeLinear of float32; None for the importer's.

    Divides by the scale: a product with its inverse rounds some ties the other way.
    """
    x = call.inputs[0]
    if str(x.ty.dtype) != "float32":
        return None
    none, whole = relax.const(0.0, "float32"), relax.const(255.0, "float32")
    high = call.emit(_op.maximum(call.emit(_op.max(x)), none))
    low = call.emit(_op.minimum(call.emit(_op.min(x)), none))
    span = call.emit(_op.subtract(high, low))
    flat = call.emit(_op.equal(span, none))
    scale = call.emit(_op.where(flat, relax.const(1.0, "float32"), _op.divide(span, whole)))
    offset = call.emit(_op.round(call.emit(_op.divide(call.emit(_op.subtract(none, low)), scale))))
    offset = call.emit(_op.minimum(offset, whole))
    least = call.emit(_op.subtract(relax.const(float(_WHOLE_FROM), "float32"), offset))
    y = call.emit(_op.add(call.emit(_op.divide(x, scale)), _number(_WHOLE_FROM, x)))
    y = call.emit(_op.minimum(call.emit(_op.maximum(y, least)), call.emit(_op.add(least, whole))))
    y = call.emit(_op.subtract(y, least))
    integers = [call.emit(_op.astype(value, "uint8")) for value in (y, offset)]
    return relax.Tuple([integers[0], scale, integers[1]])


def quantize(call: Call) -> Any:
    """QuantizeLinear to 8 or 16 bits with one constant scale; None for the importer's."""
    return _quantize(call, call.inputs[0], call.inputs[1], call.get(2))


def _quantize(call: Call, x: Any, scale: Any, zero: Any) -> Any:
    if not is_constant(scale) or not (zero is None or is_constant(zero)):
        return None
    factor, dtype = scale.value.numpy(), "uint8" if zero is None else str(zero.ty.dtype)
    if factor.size != 1 or dtype not in (*_BYTES, "int16", "uint16"):
        return None
    if str(x.ty.dtype) != "float32" or factor.dtype != np.float32:
        return None
    offset = 0 if zero is None else int(zero.value.numpy().ravel()[0])
    info = np.iinfo(dtype)
    y = call.emit(_op.add(_divided(call, x, float(factor.ravel()[0])), _number(_WHOLE_FROM, x)))
    y = call.emit(_op.maximum(y, _number(_WHOLE_FROM + info.min - offset, x)))
    y = call.emit(_op.minimum(y, _number(_WHOLE_FROM + info.max - offset, x)))
    y = call.emit(_op.subtract(y, _number(_WHOLE_FROM - offset, x)))
    return _op.astype(y, dtype)


_WHOLE_FROM = 3 << 22
"""Floats beside it are whole, so that adding it rounds, halves to even numbers. TVM's own rounding
takes vectors apart; bounds go between this and its subtraction, which TVM would take together."""


def _divided(call: Call, x: Any, divisor: float) -> Any:
    """A tensor by a number; of sums that are used for nothing else, their scales and bias are."""
    source = call.node.inputs[0]
    while source is not None and _is_used_once(source):
        node = source.producer()
        if node is None or node.domain or node.op_type not in ("Relu", *_SUMS):
            break
        if node.op_type in _SUMS:
            found = _with_scale_divided(call, x, divisor)
            return _plainly_divided(call, x, divisor) if found is None else found
        source = node.inputs[0]
    return _plainly_divided(call, x, divisor)


_SUMS = ("Conv", "Gemm", "MatMul")


def _is_used_once(value: ir.Value) -> bool:
    return len(list(value.uses())) == 1 and not value.is_graph_output()


def _plainly_divided(call: Call, x: Any, divisor: float) -> Any:
    return call.emit(_op.divide(x, _number(divisor, x)))


def _with_scale_divided(call: Call, x: Any, divisor: float) -> Any:
    """`relu(sums * scale + bias) / divisor` with the constants divided; None where x is not so."""
    found = binding(call.builder, x)
    if is_call(found, "relax.nn.relu"):
        inner = _with_scale_divided(call, found.args[0], divisor)
        return None if inner is None else call.emit(_op.nn.relu(inner))
    is_sum = is_call(found, "relax.add")
    if not (is_sum or is_call(found, "relax.multiply")) or not is_constant(found.args[1]):
        return None
    divided = relax.const((found.args[1].value.numpy() / divisor).astype(np.float32))
    if not is_sum:
        return call.emit(_op.multiply(found.args[0], divided))
    inner = _with_scale_divided(call, found.args[0], divisor)
    return None if inner is None else call.emit(_op.add(inner, divided))


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
    value, before = _op.astype(x, dtype), binding(call.builder, x)
    ends = (call.node.inputs[0], call.node.outputs[0])
    alone = all(end is not None and _is_used_once(end) for end in ends)
    if alone and is_call(before, "relax.astype"):
        whole = before.args[0]  # what was rounded for one reader need not become an integer
        value = whole if str(whole.ty.dtype) == str(dtype) else value
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
