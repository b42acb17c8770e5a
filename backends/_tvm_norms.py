"""Normalizations and reductions that TVM's importer lacks or gets wrong, in terms of Relax."""

from __future__ import annotations

import importlib
from typing import Any

from graphopt.backends._tvm_call import Call, Converter, is_constant

relax: Any = importlib.import_module("tvm.relax")
_op: Any = relax.op


def _epsilon(call: Call, like: Any) -> Any:
    return relax.const(call.attribute("epsilon", 1e-5), str(like.ty.dtype))


def _moments(call: Call, x: Any, axes: list[int]) -> tuple[Any, Any, Any]:
    """Mean, the difference from it, and its mean square: means of squares would cancel."""
    mean = call.emit(_op.mean(x, axes, keepdims=True))
    centred = call.emit(_op.subtract(x, mean))
    return mean, centred, call.emit(_op.mean(_op.multiply(centred, centred), axes, keepdims=True))


def _layer(call: Call) -> Any:
    """The importer's converter, or the parts where mean and inverse deviation are wanted too."""
    if not any(value.name for value in call.node.outputs[1:]):
        return None
    x, scale, bias = call.inputs[0], call.inputs[1], call.get(2)
    dtype = str(x.ty.dtype)
    wide = call.emit(_op.astype(x, "float32")) if dtype != "float32" else x
    axes = list(range(int(call.attribute("axis", -1)) % x.ty.ndim, x.ty.ndim))
    mean, centred, variance = _moments(call, wide, axes)
    inverse = call.emit(_op.rsqrt(_op.add(variance, _epsilon(call, wide))))
    y = call.emit(_op.astype(_op.multiply(centred, inverse), dtype))
    y = call.emit(_op.multiply(y, scale))
    if bias is not None:
        y = call.emit(_op.add(y, bias))
    return relax.Tuple([y, mean, inverse])


def _root_mean_square(call: Call) -> Any:
    """Along the last axes, from any on; computed in float32."""
    x, scale = call.inputs
    dtype = str(x.ty.dtype)
    axes = list(range(int(call.attribute("axis", -1)) % x.ty.ndim, x.ty.ndim))
    wide = call.emit(_op.astype(x, "float32")) if dtype in ("float16", "bfloat16") else x
    square = call.emit(_op.mean(_op.multiply(wide, wide), axes, keepdims=True))
    inverse = call.emit(_op.rsqrt(_op.add(square, _epsilon(call, wide))))
    y = call.emit(_op.multiply(wide, inverse))
    return _op.multiply(call.emit(_op.astype(y, dtype)), _op.astype(scale, dtype))


def _batch(call: Call) -> Any:
    """The importer's converter; while training by the batch's own mean and variance."""
    if not call.attribute("training_mode", 0):
        return None
    x, scale, bias, mean, variance = call.inputs
    if len({str(value.ty.dtype) for value in call.inputs}) > 1:
        raise NotImplementedError("training in several types")
    shape = [1, -1, *[1] * (x.ty.ndim - 2)]
    axes = [0, *range(2, x.ty.ndim)]
    own, centred, square = _moments(call, x, axes)
    inverse = call.emit(_op.rsqrt(_op.add(square, _epsilon(call, x))))
    y = _op.multiply(_op.multiply(centred, inverse), _op.reshape(scale, shape))
    results = [call.emit(_op.add(y, _op.reshape(bias, shape)))]
    momentum = float(call.attribute("momentum", 0.9))
    for old, new in ((mean, own), (variance, square)):
        kept = _op.multiply(old, relax.const(momentum, str(x.ty.dtype)))
        new = _op.multiply(new, relax.const(1 - momentum, str(x.ty.dtype)))
        results.append(call.emit(_op.add(kept, _op.reshape(call.emit(new), [-1]))))
    return relax.Tuple(results)


def _lp(call: Call) -> Any:
    """Divided by the sum of absolute values or the root of that of squares; zero stays zero."""
    x, axis = call.inputs[0], [int(call.attribute("axis", -1))]
    if int(call.attribute("p", 2)) == 1:
        size = _op.sum(_op.abs(x), axis, keepdims=True)
    else:
        size = _op.sqrt(_op.sum(_op.multiply(x, x), axis, keepdims=True))
    zero = relax.const(0.0, str(x.ty.dtype))
    size = call.emit(size)
    return _op.where(_op.equal(size, zero), zero, _op.divide(x, size))


def _extreme(call: Call) -> Any:
    """The importer's converter; of truth values by numbers."""
    x, name = call.inputs[0], call.node.op_type
    if str(x.ty.dtype) != "bool":
        return None
    axes = call.attribute("axes", None)
    given = call.get(1)
    if given is not None:
        if not is_constant(given):
            raise NotImplementedError("axes that are computed")
        axes = given.value.numpy().ravel().tolist()
    if not axes and call.attribute("noop_with_empty_axes", 0):
        return x
    reduce = _op.max if name == "ReduceMax" else _op.min
    keep = bool(call.attribute("keepdims", 1))
    axes = [int(axis) for axis in axes] if axes else None
    found = reduce(_op.astype(x, "int8"), axes, keepdims=keep)
    return _op.greater(found, relax.const(0, "int8"))  # that of none is the smallest or largest


def _place(call: Call) -> Any:
    """The importer's converter; where nothing is beyond the smallest number, the first element."""
    if call.attribute("select_last_index", 0):
        return None
    x, axis = call.inputs[0], int(call.attribute("axis", 0))
    find = _op.argmax if call.node.op_type == "ArgMax" else _op.argmin
    place = find(x, axis % x.ty.ndim, bool(call.attribute("keepdims", 1)))
    return _op.maximum(place, relax.const(0, "int64"))


NORMALIZATIONS: dict[str, Converter] = {
    "ArgMax": _place,
    "ArgMin": _place,
    "BatchNormalization": _batch,
    "LayerNormalization": _layer,
    "LpNormalization": _lp,
    "RMSNormalization": _root_mean_square,
    "ReduceMax": _extreme,
    "ReduceMin": _extreme,
}
"""By operator of the standard's domain."""
