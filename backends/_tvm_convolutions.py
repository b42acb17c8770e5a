"""Converters of convolutions that the importer, or the schedules, would rather have otherwise.

One axis becomes two, of which the first is 1; a transposed convolution becomes a plain one, of the
input with zeros between its elements where it is dilated (Dumoulin and Visin, "A guide to
convolution arithmetic for deep learning", 2016).
"""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np

from graphopt.backends import _tvm_quantized
from graphopt.backends._tvm_call import Call, is_constant, tensor
from graphopt.backends._tvm_indices import number

relax: Any = importlib.import_module("tvm.relax")
te: Any = importlib.import_module("tvm.te")
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
    if strides != [1, 1] == dilations and min(pads[:2]) >= 0:
        result = call.emit(_by_phases(call, x, kernel, strides, pads, groups))
        return _biased(call, call.emit(_op.squeeze(result, [2])) if axes == 1 else result, bias)
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


def _by_phases(
    call: Call, x: Any, kernel: Any, strides: list[int], pads: list[int], groups: int
) -> Any:
    """A transposed convolution as one that makes all outputs between two inputs at once.

    With strides s, output `s * m + r` sums inputs `m - a` times weights `s * a + r`: each r is a
    channel of a plain convolution, and no zeros are multiplied (Shi et al., "Is the deconvolution
    layer the same as a convolutional layer?", 2016).
    """
    channels, per_group, *size = kernel.shape
    ends = [max(-pad, 0) for pad in pads[2:]]
    reach = [-(-(k + e) // s) for k, e, s in zip(size, ends, strides, strict=True)]
    fill = [(0, r * s - k) for r, s, k in zip(reach, strides, size, strict=True)]
    full = np.pad(kernel, [(0, 0), (0, 0), *fill])
    (down, across), (sy, sx) = reach, strides
    cut = full.reshape(groups, channels // groups, per_group, down, sy, across, sx)
    phases = cut[:, :, :, ::-1, :, ::-1].transpose(0, 2, 4, 6, 1, 3, 5)
    plain = phases.reshape(groups * per_group * sy * sx, channels // groups, down, across)
    around = [down - 1, across - 1] * 2
    made = call.emit(
        _op.nn.conv2d(x, tensor(np.ascontiguousarray(plain)), padding=around, groups=groups)
    )
    shorter = [k - r * s for k, r, s in zip(size, reach, strides, strict=True)]

    def compute(z: Any) -> Any:
        n, _, high, wide = z.shape
        outputs = [
            extent * step + less - pads[axis] - pads[axis + 2]
            for axis, (extent, step, less) in enumerate(
                zip((high, wide), strides, shorter, strict=True)
            )
        ]

        def value(b: Any, c: Any, i: Any, j: Any) -> Any:
            y, x = i + pads[0], j + pads[1]
            return z(b, (c * sy + y % sy) * sx + x % sx, y // sy, x // sx)

        return te.compute((n, groups * per_group, *outputs), value, name="interleave")

    return call.builder.call_te(compute, made, primfunc_name_hint="interleave")


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
