"""Operators that TVM's importer lacks or gets wrong, in terms of Relax."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import numpy as np

from graphopt.backends import _tvm_convolutions, _tvm_quantized, _tvm_recurrent, _tvm_trees
from graphopt.backends._tvm_call import Call, is_constant
from graphopt.backends._tvm_indices import number
from graphopt.backends._tvm_shapes import ENDLESS

relax: Any = importlib.import_module("tvm.relax")
_op: Any = relax.op


Converter = Callable[[Call], Any]
"""None in place of a result is for the importer's own converter."""


def _reshape(call: Call) -> Any:
    return _op.reshape(call.inputs[0], relax.ShapeExpr(call.shape()))


def _expand(call: Call) -> Any:
    return _op.broadcast_to(call.inputs[0], relax.ShapeExpr(call.shape()))


def _constant_of_shape(call: Call) -> Any:
    tensor = call.attribute("value", None)
    array = np.zeros(1, np.float32) if tensor is None else tensor.numpy()
    value = relax.const(array.reshape(()))
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


def _affine(call: Call) -> Any:
    alpha = np.float32(call.attribute("alpha", 1.0))
    beta = np.float32(call.attribute("beta", 0.0))
    return _op.add(_op.multiply(call.inputs[0], relax.const(alpha)), relax.const(beta))


def _chain(function: Callable[[Any, Any], Any]) -> Converter:
    """Of any number of inputs, two at a time: the importer stacks them."""

    def convert(call: Call) -> Any:
        total = call.inputs[0]
        for value in call.inputs[1:]:
            total = call.emit(function(total, value))
        return total

    return convert


def _clip(call: Call) -> Any:
    """By maximum and minimum with tensors of the same rank, which changes of layout pass."""
    x = call.inputs[0]
    for index, name, function in ((1, "min", _op.maximum), (2, "max", _op.minimum)):
        bound, given = call.get(index), call.attribute(name, None)
        if bound is None and given is not None:
            bound = relax.const(np.asarray(given, str(x.ty.dtype)))
        if bound is not None:
            x = call.emit(function(x, _ranked(bound, x)))
    return x


def _leaky_relu(call: Call) -> Any:
    x, alpha = call.inputs[0], np.float32(call.attribute("alpha", 0.01))
    slope = _ranked(relax.const(np.asarray(alpha, str(x.ty.dtype))), x)
    scaled = call.emit(_op.multiply(x, slope))
    return _op.maximum(x, scaled) if 0 <= alpha <= 1 else _op.where(_positive(x), x, scaled)


def _positive(x: Any) -> Any:
    return _op.greater(x, _ranked(relax.const(np.zeros((), str(x.ty.dtype))), x))


def _ranked(scalar: Any, like: Any) -> Any:
    """A scalar as a tensor of the rank of another."""
    if is_constant(scalar):
        return relax.const(scalar.value.numpy().reshape((1,) * like.ty.ndim))
    return _op.reshape(scalar, (1,) * like.ty.ndim)


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
        array = indices.value.numpy()
        if not (array >= 0).all():
            known = number(size)
            if known is None:
                raise NotImplementedError("negative constant indices into an unknown size")
            indices = relax.const(np.where(array < 0, array + known, array))
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


def _first_only(call: Call) -> None:
    """The importer's converter, which makes up the other outputs."""
    if any(value.name for value in call.node.outputs[1:]):
        raise NotImplementedError("outputs besides the first")


def _mod(call: Call) -> None:
    """The importer's converter, which is wrong for infinities and the sign of zero."""
    if str(call.inputs[0].ty.dtype).startswith("float"):
        raise NotImplementedError("remainders of floats")


def _is_infinite(call: Call) -> None:
    """The importer's converter, which takes infinities of both signs."""
    if not (call.attribute("detect_negative", 1) and call.attribute("detect_positive", 1)):
        raise NotImplementedError("infinities of one sign")


def _shift(call: Call) -> None:
    """The importer's converter; what a CPU does with too many places is its own affair."""
    x, places = call.inputs
    if not is_constant(places):
        raise NotImplementedError("numbers of places that are computed")
    array = places.value.numpy()
    if (array < 0).any() or (array >= 8 * np.dtype(str(x.ty.dtype)).itemsize).any():
        raise NotImplementedError("a shift by as many places as there are, or more")


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
    ("", "Reshape"): _reshape,
    ("", "Flatten"): _reshape,
    ("", "Unsqueeze"): _reshape,
    ("", "Squeeze"): _reshape,
    ("", "Expand"): _expand,
    ("", "ConstantOfShape"): _constant_of_shape,
    ("", "Range"): _range,
    ("", "Conv"): _tvm_convolutions.conv,
    ("", "ConvTranspose"): _tvm_convolutions.conv_transpose,
    ("", "Clip"): _clip,
    ("", "LeakyRelu"): _leaky_relu,
    ("", "Max"): _chain(_op.maximum),
    ("", "Min"): _chain(_op.minimum),
    ("", "Sum"): _chain(_op.add),
    ("", "DequantizeLinear"): _tvm_quantized.dequantize,
    ("", "QuantizeLinear"): _tvm_quantized.quantize,
    ("", "MatMul"): _tvm_quantized.matmul,
    ("", "Gemm"): _tvm_quantized.gemm,
    ("", "DynamicQuantizeLinear"): _tvm_quantized.dynamic_quantize,
    ("", "MatMulInteger"): _tvm_quantized.matmul_integer,
    ("", "QLinearMatMul"): _tvm_quantized.qlinear_matmul,
    ("", "ConvInteger"): _tvm_convolutions.conv_integer,
    ("", "QLinearConv"): _tvm_convolutions.qlinear_conv,
    ("", "Gather"): _gather,
    ("", "Slice"): _slice,
    ("", "LayerNormalization"): _first_only,
    ("", "Mod"): _mod,
    ("", "IsInf"): _is_infinite,
    ("", "BitShift"): _shift,
    ("", "Resize"): _resize,
    ("", "LSTM"): _tvm_recurrent.convert,
    ("", "GRU"): _tvm_recurrent.convert,
    ("", "RNN"): _tvm_recurrent.convert,
    ("", "ImageScaler"): _image_scaler,
    ("", "Crop"): _crop,
    ("", "Affine"): _affine,
    ("ai.onnx.ml", "TreeEnsembleRegressor"): _tvm_trees.regressor,
    ("ai.onnx.ml", "TreeEnsembleClassifier"): _tvm_trees.classifier,
    ("ai.onnx.ml", "Scaler"): _tvm_trees.scaler,
    ("ai.onnx.ml", "ArrayFeatureExtractor"): _tvm_trees.extract,
}
"""By domain and operator; these come before the importer's own."""
