"""Converters of convolutions that the importer, or the schedules, would rather have otherwise.

One axis becomes two, of which the first is 1; a transposed convolution becomes a plain one of the
input with zeros between its elements (Dumoulin and Visin, "A guide to convolution arithmetic for
deep learning", 2016).
"""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np

from graphopt.backends import _tvm_quantized
from graphopt.backends._tvm_call import Call, is_constant, tensor
from graphopt.backends._tvm_indices import number

relax: Any = importlib.import_module("tvm.relax")
_op: Any = relax.op


def conv(call: Call) -> Any:
    """Conv of any number of axes."""
    integers = _tvm_quantized.product(call, 0, int(call.attribute("group", 1)))
    if integers is None:
        return _biased(call, _convolved(call, *call.inputs[:2]), call.get(2))
    return _biased(call, _scaled(call, integers), call.get(2))


def conv_integer(call: Call) -> Any:
    """ConvInteger with constant weights."""
    found = _tvm_quantized.integers(call, 0, int(call.attribute("group", 1)))
    if found is None:
        raise NotImplementedError("weights and zero points that are no constants")
    return _op.astype(_convolved(call, found.left, found.right, found.dtype), "int32")


def qlinear_conv(call: Call) -> Any:
    """QLinearConv with constant weights; its bias is in units of the sums."""
    found = _tvm_quantized.linear(call, 0, int(call.attribute("group", 1)))
    bias = call.get(8)
    if found is None or not (bias is None or is_constant(bias)):
        raise NotImplementedError("weights, scales and zero points that are no constants")
    result = _scaled(call, found)
    if bias is not None:
        floats = bias.value.numpy() * found.scale
        result = call.emit(_biased(call, result, relax.const(floats.astype(np.float32))))
    return _tvm_quantized.requantized(call, result)


def _scaled(call: Call, integers: _tvm_quantized.Product) -> Any:
    sums = _convolved(call, integers.left, integers.right, integers.dtype)
    return integers.scaled(call, sums, 1)


def _convolved(call: Call, x: Any, weights: Any, dtype: str | None = None) -> Any:
    axes = x.ty.ndim - 2
    if axes > 2:
        raise NotImplementedError(f"a convolution over {axes} axes")
    shape = [int(size) for size in weights.ty.shape.values]
    groups = int(call.attribute("group", 1))
    strides = list(call.attribute("strides", [1] * axes))
    dilations = list(call.attribute("dilations", [1] * axes))
    pads = _pads(call, x, shape[2:], strides, dilations)
    if axes == 1:
        n, c, w = x.ty.shape.values
        x = call.emit(_op.reshape(x, (n, c, 1, w)))
        weights = _reshaped(call, weights, (*shape[:2], 1, shape[2]))
        strides, dilations, pads = [1, *strides], [1, *dilations], [0, pads[0], 0, pads[1]]
    result = call.emit(
        _op.nn.conv2d(x, weights, strides, pads, dilations, groups=groups, out_dtype=dtype)
    )
    if axes == 1:
        n, c, _, w = result.ty.shape.values
        result = call.emit(_op.reshape(result, (n, c, w)))
    return result


def conv_transpose(call: Call) -> Any:
    """ConvTranspose over one or two axes with constant weights."""
    x, weights, bias = call.inputs[0], call.inputs[1], call.get(2)
    axes = x.ty.ndim - 2
    if axes > 2 or not is_constant(weights):
        raise NotImplementedError("a transposed convolution over three axes, or of two inputs")
    kernel, groups = weights.value.numpy(), int(call.attribute("group", 1))
    strides = [int(s) for s in call.attribute("strides", [1] * axes)]
    dilations = [int(d) for d in call.attribute("dilations", [1] * axes)]
    pads = _transposed_pads(call, kernel.shape[2:], strides, dilations)
    if axes == 1:
        kernel, strides, dilations = np.expand_dims(kernel, 2), [1, *strides], [1, *dilations]
        pads = [0, pads[0], 0, pads[1]]
        x = call.emit(_op.expand_dims(x, 2))
    n, c, high, wide = x.ty.shape.values
    if strides != [1, 1]:
        x = call.emit(_op.reshape(x, (n, c, high, 1, wide, 1)))
        x = call.emit(_op.nn.pad(x, [0] * 7 + [strides[0] - 1] + [0] * 3 + [strides[1] - 1]))
        x = call.emit(_op.reshape(x, (n, c, high * strides[0], wide * strides[1])))
    borders = [(size - 1) * step for size, step in zip(kernel.shape[2:], dilations, strict=True)]
    around = [border - pad for border, pad in zip(borders * 2, pads, strict=True)]
    around[2] -= strides[0] - 1
    around[3] -= strides[1] - 1
    if min(around) < 0:
        ends = [high * strides[0] + min(around[2], 0), wide * strides[1] + min(around[3], 0)]
        x = call.emit(_op.strided_slice(x, [2, 3], [max(-a, 0) for a in around[:2]], ends))
        around = [max(a, 0) for a in around]
    channels, per_group, *size = kernel.shape
    turned = kernel[:, :, ::-1, ::-1].reshape(groups, channels // groups, per_group, *size)
    turned = turned.transpose(0, 2, 1, 3, 4).reshape(groups * per_group, channels // groups, *size)
    plain = tensor(np.ascontiguousarray(turned))
    result = call.emit(_op.nn.conv2d(x, plain, [1, 1], around, dilations, groups=groups))
    return _biased(call, call.emit(_op.squeeze(result, [2])) if axes == 1 else result, bias)


def _biased(call: Call, result: Any, bias: Any) -> Any:
    if bias is None:
        return result
    shape = (1, int(bias.ty.shape[0]), *(1,) * (result.ty.ndim - 2))
    return _op.add(result, _reshaped(call, bias, shape))


def _reshaped(call: Call, value: Any, shape: tuple[int, ...]) -> Any:
    if is_constant(value):
        return tensor(value.value.numpy().reshape(shape))
    return call.emit(_op.reshape(value, shape))


def _pads(
    call: Call, x: Any, kernel: list[int], strides: list[int], dilations: list[int]
) -> list[int]:
    """Pads of a convolution: those before along each axis, then those after."""
    auto = call.attribute("auto_pad", "NOTSET")
    axes = len(kernel)
    if auto in ("NOTSET", "VALID", ""):
        given = list(call.attribute("pads", [0] * 2 * axes))
        return [0] * 2 * axes if auto == "VALID" else given
    before: list[int] = []
    after: list[int] = []
    for axis in range(axes):
        size = number(x.ty.shape.values[axis + 2])
        if size is None:
            raise NotImplementedError(f"auto_pad {auto} of a size known at run time only")
        reach = (kernel[axis] - 1) * dilations[axis] + 1
        outputs = -(-size // strides[axis])
        total = max((outputs - 1) * strides[axis] + reach - size, 0)
        small, large = total // 2, total - total // 2
        before.append(small if auto == "SAME_UPPER" else large)
        after.append(large if auto == "SAME_UPPER" else small)
    return before + after


def _transposed_pads(
    call: Call, kernel: tuple[int, ...], strides: list[int], dilations: list[int]
) -> list[int]:
    """What is cut off before and after along each axis; negative where outputs are added."""
    axes = len(kernel)
    extra = [int(e) for e in call.attribute("output_padding", [0] * axes)]
    wanted = call.attribute("output_shape", None)
    auto = call.attribute("auto_pad", "NOTSET")
    if wanted is None and auto in ("NOTSET", "VALID", ""):
        none = [0] * 2 * axes
        pads = none if auto == "VALID" else list(call.attribute("pads", none))
        return pads[:axes] + [pad - more for pad, more in zip(pads[axes:], extra, strict=True)]
    before: list[int] = []
    after: list[int] = []
    for axis in range(axes):
        reach = (kernel[axis] - 1) * dilations[axis] + 1
        total = reach + extra[axis] - strides[axis]
        if wanted is not None:
            size = number(call.inputs[0].ty.shape.values[axis + 2])
            if size is None:
                raise NotImplementedError("output_shape of a size known at run time only")
            total = strides[axis] * (size - 1) + extra[axis] + reach
            total -= int(wanted[len(wanted) - axes + axis])
        cut = max(total, 0)
        first = cut - cut // 2 if auto == "SAME_LOWER" else cut // 2
        before.append(first)
        after.append(total - first - extra[axis])
    return before + after
