"""Operators that TVM's importer lacks or gets wrong, in terms of Relax."""

from __future__ import annotations

import importlib
import operator
from typing import Any

import numpy as np

from graphopt.backends import (
    _tvm_convolutions,
    _tvm_quantized,
    _tvm_recurrent,
    _tvm_trees,
    _tvm_vectors,
)
from graphopt.backends._tvm_call import Call, Converter, is_constant, tensor
from graphopt.backends._tvm_elementwise import ELEMENTWISE
from graphopt.backends._tvm_indices import number, sizes
from graphopt.backends._tvm_norms import NORMALIZATIONS
from graphopt.backends._tvm_shapes import ENDLESS

relax: Any = importlib.import_module("tvm.relax")
_op: Any = relax.op


def _reshape(call: Call) -> Any:
    return _op.reshape(call.inputs[0], relax.ShapeExpr(call.shape()))


def _expand(call: Call) -> Any:
    return _op.broadcast_to(call.inputs[0], relax.ShapeExpr(call.shape()))


def _constant_of_shape(call: Call) -> Any:
    given = call.attribute("value", None)
    array = np.zeros(1, np.float32) if given is None else given.numpy()
    value = tensor(array.reshape(()))
    return _op.full(relax.ShapeExpr(call.shape()), value)


def _range(call: Call) -> Any:
    (length,) = call.shape()
    start, _, step = call.inputs
    dtype = start.ty.dtype
    count = _op.arange(0, length, 1, "int64")
    return _op.add(_op.multiply(_op.astype(count, dtype), step), start)


def _image_scaler(call: Call) -> Any:
    bias = np.array(call.attribute("bias", ()), np.float32).reshape(1, -1, 1, 1)
    scale = np.float32(call.attribute("scale", 1.0))
    return _op.add(_op.multiply(call.inputs[0], relax.const(scale)), relax.const(bias))


def _crop(call: Call) -> Any:
    left, top, right, bottom = call.attribute("border", ())
    shape = call.inputs[0].ty.shape
    ends = [shape[2] - bottom, shape[3] - right]
    scale = call.attribute("scale", ())
    if scale:
        ends = [top + scale[0], left + scale[1]]
    return _op.strided_slice(call.inputs[0], [2, 3], [top, left], ends)


def _gather(call: Call) -> Any:
    """Out of range reads the nearest element: TVM itself would read beyond the tensor."""
    data, indices = call.inputs
    axis = int(call.attribute("axis", 0))
    if isinstance(data.ty, relax.ShapeType):
        data = _op.shape_to_tensor(data)
    if isinstance(indices.ty, relax.ShapeType):
        indices = _op.shape_to_tensor(indices)
    data, indices = call.emit(data), call.emit(indices) if not is_constant(indices) else indices
    axis += data.ty.ndim if axis < 0 else 0
    size = data.ty.shape[axis]
    if is_constant(indices):
        array, known = indices.value.numpy(), number(size)
        if known is not None:
            indices = tensor(np.where(array < 0, array + known, array))
        if known is not None or (array >= 0).all():
            return _op.take(data, indices, axis, mode="clip")
    zero = relax.const(0, indices.ty.dtype)
    whole = _op.astype(
        _op.squeeze(_op.shape_to_tensor(relax.ShapeExpr([size])), [0]), indices.ty.dtype
    )
    wrapped = _op.where(_op.less(indices, zero), _op.add(indices, whole), indices)
    return _op.take(data, wrapped, axis, mode="clip")


def _slice(call: Call) -> Any:
    """By constants, along the axes that it cuts; None, for the importer's, where others are given.

    The importer cuts along all, and where a size is free nothing is known of it after that.
    """
    x = call.inputs[0]
    given = [call.get(index) for index in range(1, 5)]
    if not isinstance(x.ty, relax.TensorType) or x.ty.shape is None or given[0] is None:
        return None
    if not all(value is None or is_constant(value) for value in given):
        return None
    starts, ends, axes, steps = (
        None if value is None else [int(n) for n in value.value.numpy().ravel()] for value in given
    )
    starts, ends = starts or [], ends or []
    axes = list(range(len(starts))) if axes is None else [axis % x.ty.ndim for axis in axes]
    steps = [1] * len(starts) if steps is None else steps
    cuts = [
        cut
        for cut in zip(axes, starts, ends, steps, strict=True)
        if not _is_whole(number(x.ty.shape[cut[0]]), *cut[1:])
    ]
    if not cuts:
        return x
    if any(step < 1 for *_, step in cuts):
        return None
    return _op.strided_slice(x, *([int(n) for n in part] for part in zip(*cuts, strict=True)))


def _is_whole(size: int | None, start: int, end: int, step: int) -> bool:
    return step == 1 and start == 0 and end >= (ENDLESS if size is None else size)


def _dropout(call: Call) -> None:
    """The importer's converter, which drops nothing."""
    training = call.get(2)
    if training is not None and not (is_constant(training) and not training.value.numpy().any()):
        raise NotImplementedError("dropout while training")


def _suppression(_: Call) -> None:
    raise NotImplementedError("TVM suppresses boxes that overlap by the threshold itself as well")


def _roi_align(call: Call) -> None:
    """The importer's converter, whose maxima are of other numbers."""
    if call.attribute("mode", "avg") != "avg":
        raise NotImplementedError("maxima of regions")


def _space_to_depth(call: Call) -> Any:
    """Columns, rows, depth: the order of channels that the importer does not know."""
    if call.attribute("mode", "DCR") == "DCR":
        return None
    n, c, h, w = call.inputs[0].ty.shape.values
    size = int(call.attribute("blocksize", 1))
    x = call.emit(_op.reshape(call.inputs[0], (n, c, h // size, size, w // size, size)))
    x = call.emit(_op.permute_dims(x, [0, 1, 3, 5, 2, 4]))
    return _op.reshape(x, (n, c * size * size, h // size, w // size))


def _one_hot(call: Call) -> Any:
    """By comparison; indices below zero count from the end, those out of range are nowhere."""
    indices, depth, values = call.inputs
    if not (is_constant(depth) and is_constant(values)):
        raise NotImplementedError("a depth or values that are computed")
    (count,) = depth.value.numpy().ravel().tolist()
    off, on = (tensor(part) for part in values.value.numpy())
    axis = int(call.attribute("axis", -1)) % (indices.ty.ndim + 1)
    shape = [-1 if index == axis else 1 for index in range(indices.ty.ndim + 1)]
    numbers = np.arange(int(count)).reshape(shape)
    indices = call.emit(_op.expand_dims(_op.astype(indices, "int64"), axis))
    found = [_op.equal(indices, tensor(row)) for row in (numbers, numbers - int(count))]
    return _op.where(_op.logical_or(*found), on, off)


def _cumulative(function: Any) -> Converter:
    """Running sums or products, in float32 for floats of 16 bits."""

    def convert(call: Call) -> Any:
        x, axis = call.inputs
        if not is_constant(axis):
            raise NotImplementedError("an axis that is computed")
        along, dtype = int(axis.value.numpy().item()), str(x.ty.dtype)
        narrow, reverse = dtype in ("float16", "bfloat16"), call.attribute("reverse", 0)
        x = call.emit(_op.astype(x, "float32")) if narrow else x
        x = call.emit(_op.flip(x, along)) if reverse else x
        x = call.emit(function(x, along, exclusive=bool(call.attribute("exclusive", 0))))
        x = call.emit(_op.flip(x, along)) if reverse else x
        return _op.astype(x, dtype) if narrow else x

    return convert


def _concat(call: Call) -> Any:
    """Of tensors whose other sizes TVM cannot tell to be equal."""
    first = sizes(call.inputs[0])
    if first is None or len(first) < 2:
        return None
    axis = int(call.attribute("axis", 0)) % len(first)
    wanted = call.sizes.shape(call.node.outputs[0]) or first
    parts = [call.matched(value, wanted, axis) for value in call.inputs]
    return None if all(map(operator.is_, parts, call.inputs)) else _op.concat(parts, axis)


def _split(call: Call) -> Any:
    """By constant sizes, of which some may be zero."""
    wanted: Any = call.get(1)
    if wanted is not None and not is_constant(wanted):
        return None
    given = call.attribute("split", ()) if wanted is None else wanted.value.numpy().ravel()
    widths = [int(n) for n in given]
    if all(widths):
        return None
    axis, x = int(call.attribute("axis", 0)) % call.inputs[0].ty.ndim, call.inputs[0]
    ends = np.cumsum(widths).tolist()
    parts = [
        _op.strided_slice(x, [axis], [end - width], [end])
        for width, end in zip(widths, ends, strict=True)
    ]
    return relax.Tuple([call.emit(part) for part in parts])


def _resize(call: Call) -> None:
    """The importer's converter, which computes with the sizes in place of the scales."""
    for name, plain in (("antialias", 0), ("exclude_outside", 0)):
        if call.attribute(name, plain) != plain:
            raise NotImplementedError(name)
    x, scales = call.inputs[0], call.get(2)
    if call.get(3) is not None or scales is None:
        return
    if not is_constant(scales):
        raise NotImplementedError("scales that are computed")
    for size, scale in zip(x.ty.shape.values, scales.value.numpy().ravel().tolist(), strict=False):
        known = number(size)
        if (scale if known is None else known * scale) % 1:
            raise NotImplementedError("scales that give no whole sizes")


OPERATORS: dict[tuple[str, str], Converter] = {
    **{("", name): converter for name, converter in (ELEMENTWISE | NORMALIZATIONS).items()},
    ("", "Reshape"): _reshape,
    ("", "Flatten"): _reshape,
    ("", "Unsqueeze"): _reshape,
    ("", "Squeeze"): _reshape,
    ("", "Expand"): _expand,
    ("", "ConstantOfShape"): _constant_of_shape,
    ("", "Range"): _range,
    ("", "Conv"): _tvm_convolutions.conv,
    ("", "ConvTranspose"): _tvm_convolutions.conv_transpose,
    ("", "DequantizeLinear"): _tvm_quantized.dequantize,
    ("", "QuantizeLinear"): _tvm_quantized.quantize,
    ("", "MatMul"): _tvm_quantized.matmul,
    ("", "Gemm"): _tvm_quantized.gemm,
    ("", "DynamicQuantizeLinear"): _tvm_quantized.dynamic_quantize,
    ("", "MatMulInteger"): _tvm_quantized.matmul_integer,
    ("", "QLinearMatMul"): _tvm_quantized.qlinear_matmul,
    ("", "ConvInteger"): _tvm_convolutions.conv_integer,
    ("", "QLinearConv"): _tvm_convolutions.qlinear_conv,
    ("", "Concat"): _concat,
    ("", "Gather"): _gather,
    ("", "Slice"): _slice,
    ("", "Resize"): _resize,
    ("", "CumProd"): _cumulative(_op.cumprod),
    ("", "CumSum"): _cumulative(_op.cumsum),
    ("", "Dropout"): _dropout,
    ("", "NonMaxSuppression"): _suppression,
    ("", "OneHot"): _one_hot,
    ("", "RoiAlign"): _roi_align,
    ("", "SpaceToDepth"): _space_to_depth,
    ("", "Split"): _split,
    ("", "LSTM"): _tvm_recurrent.convert,
    ("", "GRU"): _tvm_recurrent.convert,
    ("", "RNN"): _tvm_recurrent.convert,
    ("", "ImageScaler"): _image_scaler,
    ("", "Crop"): _crop,
    ("ai.onnx.ml", "TreeEnsembleRegressor"): _tvm_trees.regressor,
    ("ai.onnx.ml", "TreeEnsembleClassifier"): _tvm_trees.classifier,
    ("ai.onnx.ml", "Scaler"): _tvm_trees.scaler,
    ("ai.onnx.ml", "ArrayFeatureExtractor"): _tvm_trees.extract,
    ("ai.onnx.ml", "SVMClassifier"): _tvm_vectors.svm_classifier,
    ("ai.onnx.ml", "SVMRegressor"): _tvm_vectors.svm_regressor,
    ("ai.onnx.ml", "LinearClassifier"): _tvm_vectors.linear_classifier,
    ("ai.onnx.ml", "LinearRegressor"): _tvm_vectors.linear_regressor,
    ("ai.onnx.ml", "Normalizer"): _tvm_vectors.normalizer,
}
"""By domain and operator; these come before the importer's own."""
