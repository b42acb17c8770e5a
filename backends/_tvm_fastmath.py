"""Exponential functions as polynomials, so that they run in vectors: libm's take one at a time.

Coefficients: exp after Cephes (Moshier) `expf`, erf the rational approximation of Eigen's `erf`;
both within 2 units in the last place of float32 over the whole range, beyond which they saturate.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any

from graphopt.backends._tvm_extremes import at_least, at_most, once
from graphopt.backends._tvm_kernels import default

relax: Any = importlib.import_module("tvm.relax")
te: Any = importlib.import_module("tvm.te")
tirx: Any = importlib.import_module("tvm.tirx")
topi: Any = importlib.import_module("tvm.topi")

_EXP = (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2)
_EXP_LOW = (1.6666665459e-1, 5.0000001201e-1)
_TWICE_EXP = tuple(2 * coefficient for coefficient in (*_EXP, *_EXP_LOW))
_LOG2_E, _LN2_HIGH, _LN2_LOW = 1.44269504, 0.693359375, -2.12194440e-4
_WHOLE = 1.5 * 2**23
"""Floats of this size have no digits behind the point, so that adding it rounds."""
_EXP_RANGE = (-86.6, 89.0)
"""Below it is zero, at its end infinity."""
_ERF_P = (-2.72614225801306e-10, 2.77068142495902e-08, -2.10102402082508e-06)
_ERF_P_LOW = (-5.69250639462346e-05, -7.34990630326855e-04, -2.95459980854025e-03)
_ERF_Q = (-1.45660718464996e-05, -2.13374055278905e-04, -1.68282697438203e-03)
_ERF_Q_LOW = (-7.37332916720468e-03, -1.42647390514189e-02)
_ERF_P_LAST = (-1.60960333262415e-02,)


_FLOATS = ("float32", "float16")


def exp(x: Any) -> Any:
    """e to the x: 2 to a whole number, by the exponent's bits, times a polynomial."""
    low, high = _EXP_RANGE

    def or_zero(x: Any) -> Any:
        # not the smallest number: a masked row of a softmax would be computed with denormal ones
        value = once(at_least(at_most(x, _f(high)), _f(low)), _power)
        return tirx.Select(x < _f(low), _f(0.0), value)

    return once(x, or_zero)


def _power(x: Any) -> Any:
    """exp within its range, beyond the end of which it gives infinity."""

    def scaled(rest: Any, moved: Any) -> Any:
        # twice the series times half the power: the highest power of two is no float
        series = _polynomial(rest, _TWICE_EXP) * rest * rest + (rest * _f(2.0) + _f(2.0))
        whole = tirx.reinterpret("int32", moved)  # in its last bits
        bits = (whole + tirx.const(126, "int32")) << tirx.const(23, "int32")
        return series * tirx.reinterpret("float32", bits)

    def reduced(moved: Any, whole: Any) -> Any:
        rest = x - whole * _f(_LN2_HIGH) - whole * _f(_LN2_LOW)
        return once(rest, lambda rest: scaled(rest, moved))

    def rounded(moved: Any) -> Any:
        return once(moved - _f(_WHOLE), lambda whole: reduced(moved, whole))

    return once(x * _f(_LOG2_E) + _f(_WHOLE), rounded)


def erf(x: Any) -> Any:
    """The error function."""

    def ratio(x: Any, square: Any) -> Any:
        above = _polynomial(square, (*_ERF_P, *_ERF_P_LOW, *_ERF_P_LAST))
        return x * above / _polynomial(square, (*_ERF_Q, *_ERF_Q_LOW))

    def squared(x: Any) -> Any:
        return once(x * x, lambda square: ratio(x, square))

    return once(at_least(at_most(x, _f(4.0)), _f(-4.0)), squared)


def sigmoid(x: Any) -> Any:
    """1 / (1 + exp(-x))."""
    return _f(1.0) / (_f(1.0) + exp(_f(0.0) - x))


def tanh(x: Any) -> Any:
    """By exp, apart from small numbers, where the difference would lose digits."""

    def either(x: Any, power: Any) -> Any:
        large = (_f(1.0) - power) / (_f(1.0) + power)
        return once(x * x, lambda square: tirx.Select(square < _f(0.04), small(x, square), large))

    def small(x: Any, square: Any) -> Any:
        return x * _polynomial(square, _TANH)

    def bounded(x: Any) -> Any:
        return once(x * _f(-2.0), lambda y: once(_power(y), lambda power: either(x, power)))

    return once(at_least(at_most(x, _f(_TANH_ONE)), _f(-_TANH_ONE)), bounded)


_TANH_ONE = 10.0
"""From here on it is 1."""
_TANH = (0.0218694885, -0.0539682540, 0.1333333333, -0.3333333333, 1.0)
"""Taylor's series of tanh(x) / x in x squared, the highest power first."""


def softmax(builder: Any, call: Any) -> Any:
    """Along the last axis, each row by itself; in float32."""
    (x,) = call.args
    rank = int(x.ty.ndim)
    if int(call.attrs.axis) not in (-1, rank - 1) or str(x.ty.dtype) not in _FLOATS or rank < 1:
        return default("relax.nn.softmax")(builder, call)
    return builder.call_te(_softmax, x, primfunc_name_hint="softmax")


def _softmax(x: Any) -> Any:
    *outer, size = x.shape
    a, b = te.reduce_axis((0, size), "a"), te.reduce_axis((0, size), "b")

    def at(*index: Any) -> Any:
        return x(*index).astype("float32")

    def highest(*index: Any) -> Any:
        return te.max(at(*index, a), axis=a)

    def power(*index: Any) -> Any:
        return exp(at(*index) - top(*index[:-1]))

    def sum_up(*index: Any) -> Any:
        return te.sum(powers(*index, b), axis=b)

    def share(*index: Any) -> Any:
        inverse = _f(1.0) / total(*index[:-1])  # one division for a row
        return (powers(*index) * inverse).astype(x.dtype)

    top = te.compute(outer, highest, name="top")
    powers = te.compute(x.shape, power, name="powers")
    total = te.compute(outer, sum_up, name="total")
    return te.compute(x.shape, share, name="shares")


def _each(name: str, function: Callable[[Any], Any]) -> Callable[[Any, Any], Any]:
    """A legalization that applies a function to every element, computing in float32."""

    def legalize(builder: Any, call: Any) -> Any:
        if str(call.ty.dtype) not in _FLOATS:
            return default(f"relax.{name}")(builder, call)

        def compute(x: Any) -> Any:
            def element(*index: Any) -> Any:
                return function(x(*index).astype("float32")).astype(x.dtype)

            return te.compute(x.shape, element, name=name)

        return builder.call_te(compute, call.args[0], primfunc_name_hint=name)

    return legalize


def _polynomial(x: Any, coefficients: Sequence[float]) -> Any:
    """By Horner's rule, the highest power first."""
    total = _f(coefficients[0])
    for coefficient in coefficients[1:]:
        total = total * x + _f(coefficient)
    return total


def _f(value: float) -> Any:
    return tirx.const(value, "float32")


FAST: dict[str, Callable[[Any, Any], Any]] = {
    **{f"relax.{f.__name__}": _each(f.__name__, f) for f in (exp, erf, sigmoid, tanh)},
    "relax.nn.softmax": softmax,
}
"""Legalizations by operator."""
