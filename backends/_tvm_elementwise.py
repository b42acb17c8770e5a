"""Operators on elements that TVM's importer lacks or gets wrong, in terms of Relax."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import numpy as np

from graphopt import ir
from graphopt.backends._tvm_call import Call, Converter, constant, is_constant, tensor

relax: Any = importlib.import_module("tvm.relax")
te: Any = importlib.import_module("tvm.te")
tirx: Any = importlib.import_module("tvm.tirx")
topi: Any = importlib.import_module("tvm.topi")
_op: Any = relax.op


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
            bound = relax.const(given, str(x.ty.dtype))
        if bound is not None:
            x = call.emit(function(x, _ranked(bound, x)))
    return x


def _leaky_relu(call: Call) -> Any:
    x, alpha = call.inputs[0], np.float32(call.attribute("alpha", 0.01))
    slope = _ranked(_like(x, float(alpha)), x)
    scaled = call.emit(_op.multiply(x, slope))
    return _op.maximum(x, scaled) if 0 <= alpha <= 1 else _op.where(_positive(x), x, scaled)


def _positive(x: Any) -> Any:
    return _op.greater(x, _ranked(_like(x, 0.0), x))


def _ranked(scalar: Any, like: Any) -> Any:
    """A scalar as a tensor of the rank of another."""
    if is_constant(scalar):
        return tensor(scalar.value.numpy().reshape((1,) * like.ty.ndim))
    return _op.reshape(scalar, (1,) * like.ty.ndim)


def _like(x: Any, value: float) -> Any:
    """A number of the dtype of a tensor."""
    return relax.const(value, str(x.ty.dtype))


def _hard_sigmoid(call: Call) -> Any:
    x = call.inputs[0]
    alpha, beta = call.attribute("alpha", 0.2), call.attribute("beta", 0.5)
    value = call.emit(_op.add(_op.multiply(x, _like(x, alpha)), _like(x, beta)))
    return _op.minimum(_op.maximum(value, _like(x, 0.0)), _like(x, 1.0))


def _thresholded_relu(call: Call) -> Any:
    x, alpha = call.inputs[0], call.attribute("alpha", 1.0)
    return _op.where(_op.greater(x, _like(x, alpha)), x, _like(x, 0.0))


def _swish(call: Call) -> Any:
    x, alpha = call.inputs[0], call.attribute("alpha", 1.0)
    return _op.multiply(x, _op.sigmoid(_op.multiply(x, _like(x, alpha))))


def _div(call: Call) -> Any:
    """By constants: a multiplication with their inverses, which takes a fraction of the time."""
    x, array = call.inputs[0], constant(call.builder, call.inputs[1])
    if array is None or array.dtype.kind != "f" or is_constant(x):
        return None
    with np.errstate(all="ignore"):
        inverse = (1 / array).astype(array.dtype)
    if not (np.isfinite(inverse) & (np.abs(inverse) >= np.finfo(array.dtype).tiny)).all():
        return None
    return _op.multiply(x, tensor(inverse))


def _exponential(x: Any, slope: float, steepness: float = 1.0, scale: float = 1.0) -> Any:
    """scale * x above zero, scale * slope * (exp(x / steepness) - 1) below."""
    power = _op.exp(_op.multiply(_op.minimum(x, _like(x, 0.0)), _like(x, 1 / steepness)))
    below = _op.multiply(_op.subtract(power, _like(x, 1.0)), _like(x, slope * scale))
    above = x if scale == 1.0 else _op.multiply(x, _like(x, scale))
    return _op.where(_op.greater(x, _like(x, 0.0)), above, below)


def _elu(call: Call) -> Any:
    return _exponential(call.inputs[0], float(call.attribute("alpha", 1.0)))


def _selu(call: Call) -> Any:
    alpha = float(call.attribute("alpha", 1.67326319217681884765625))
    gamma = float(call.attribute("gamma", 1.05070102214813232421875))
    return _exponential(call.inputs[0], alpha, scale=gamma)


def _celu(call: Call) -> Any:
    alpha = float(call.attribute("alpha", 1.0))
    return _exponential(call.inputs[0], alpha, steepness=alpha)


def _cosh(call: Call) -> Any:
    """By halves, which are finite wherever the result is."""
    x, log_2 = call.inputs[0], _like(call.inputs[0], np.log(2.0))
    up, down = _op.subtract(x, log_2), _op.subtract(_op.negative(x), log_2)
    return _op.add(_op.exp(up), _op.exp(down))


def _sinh(call: Call) -> Any:
    """Without a difference, in which small numbers would lose their digits."""
    return _op.multiply(_op.tanh(call.inputs[0]), _cosh(call))


def _sign(call: Call) -> Any:
    """Not a number has no sign."""
    x = call.inputs[0]
    if not str(x.ty.dtype).startswith("float"):
        return None
    zero, one, less = (_like(x, value) for value in (0.0, 1.0, -1.0))
    return _op.where(_op.greater(x, zero), one, _op.where(_op.less(x, zero), less, x))


def _power(call: Call) -> Any:
    """The exponent in the type of the base, which is the result's; integers as floats."""
    base, exponent = call.inputs
    dtype = str(base.ty.dtype)
    if dtype.startswith("float") and dtype == str(exponent.ty.dtype):
        return None
    if dtype.startswith("float") and np.dtype(dtype).itemsize >= 4:
        return _op.power(base, _op.astype(exponent, dtype))
    if not is_constant(exponent) or not dtype.startswith("int"):
        raise NotImplementedError(f"powers of {dtype} to {exponent.ty.dtype}")
    powers = {float(power) for power in exponent.value.numpy().ravel().tolist()}
    if len(powers) != 1 or next(iter(powers)) not in (1, 2, 3, 4):
        raise NotImplementedError(f"powers of {dtype} to {exponent.ty.dtype}")
    result = base
    for _ in range(int(next(iter(powers))) - 1):
        result = _op.multiply(result, base)
    return result


def _mod(call: Call) -> Any:
    """Of floats: the importer's converter is wrong for infinities and the sign of zero.

    C's remainder has the sign of the dividend; without `fmod` it is to have the divisor's.
    """
    dtype = str(call.inputs[0].ty.dtype)
    if "float" not in dtype:
        return None
    wide = "float64" if dtype == "float64" else "float32"  # which has all numbers of 16 bits
    shape = relax.ShapeExpr(call.shape())
    a, b = (call.emit(_op.broadcast_to(_op.astype(x, wide), shape)) for x in call.inputs)
    rest = call.builder.emit_te(_remainder, a, b, primfunc_name_hint="remainder")
    if not call.attribute("fmod", 0):
        zero, backwards = _like(a, 0.0), call.emit(_op.less(b, _like(a, 0.0)))
        other = _op.logical_xor(_op.less(rest, zero), backwards)
        moved = _op.where(other, _op.add(rest, b), rest)
        nothing = _op.where(backwards, _like(a, -0.0), zero)
        rest = _op.where(_op.equal(rest, zero), nothing, moved)
    return _op.astype(rest, dtype)


def _remainder(a: Any, b: Any) -> Any:
    name = "fmodf" if a.dtype == "float32" else "fmod"

    def element(*index: Any) -> Any:
        return tirx.call_pure_extern(a.dtype, name, a(*index), b(*index))

    return te.compute(a.shape, element)


def _is_infinite(call: Call) -> Any:
    """Of one sign; the importer's converter takes infinities of both."""
    x = call.inputs[0]
    negative, positive = (call.attribute(f"detect_{way}", 1) for way in ("negative", "positive"))
    if negative and positive:
        return None
    if not (negative or positive):
        return _op.zeros_like(x, "bool")
    return _op.equal(x, _like(x, np.inf if positive else -np.inf))


def _shift(call: Call) -> Any:
    """With the standard's results for more places than there are and for fewer than none.

    What a CPU does with those is its own affair.
    """
    x, places = call.inputs
    bits = 8 * np.dtype(str(x.ty.dtype)).itemsize
    right = call.attribute("direction", b"") in (b"RIGHT", "RIGHT")
    shift = _op.right_shift if right else _op.left_shift
    if is_constant(places):
        array = places.value.numpy()
        if ((array >= 0) & (array < bits)).all():
            return shift(x, places)
    negative = _op.less(places, _like(places, 0))
    far = call.emit(_op.logical_or(negative, _op.greater_equal(places, _like(places, bits))))
    zero = _like(x, 0)
    vacated = _op.where(_op.less(x, zero), _like(x, -1), zero) if right and _signed(x) else zero
    return _op.where(far, vacated, shift(x, _op.where(far, _like(places, 0), places)))


def _signed(x: Any) -> bool:
    return str(x.ty.dtype).startswith("int")


def _bit_cast(call: Call) -> Any:
    """Between types of the same width that TVM has."""
    x, to = call.inputs[0], ir.DataType(int(call.attribute("to", 1))).numpy().name
    if "bool" in (to, str(x.ty.dtype)):  # a byte in memory, a bit in a register
        return _op.astype(x, to)
    return call.builder.emit_te(topi.reinterpret, x, to)


ELEMENTWISE: dict[str, Converter] = {
    "Affine": _affine,
    "BitCast": _bit_cast,
    "BitShift": _shift,
    "Celu": _celu,
    "Clip": _clip,
    "Cosh": _cosh,
    "Div": _div,
    "Elu": _elu,
    "HardSigmoid": _hard_sigmoid,
    "IsInf": _is_infinite,
    "LeakyRelu": _leaky_relu,
    "Max": _chain(_op.maximum),
    "Min": _chain(_op.minimum),
    "Mod": _mod,
    "Pow": _power,
    "Selu": _selu,
    "Sign": _sign,
    "Sinh": _sinh,
    "Sum": _chain(_op.add),
    "Swish": _swish,
    "ThresholdedRelu": _thresholded_relu,
}
"""By operator of the standard's domain."""
