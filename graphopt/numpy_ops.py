"""The cheap operators of constant folding, in numpy: shape arithmetic, data movement, elementwise.

`evaluate` answers only where numpy and ONNX Runtime are known to agree, bit for bit or to the
rounding of a transcendental function; for anything doubtful (division of negative integers, floats
cast beyond an integer's range, half precision arithmetic, NaN in a maximum) it answers None and
`graphopt.execute` asks ONNX Runtime. Semantics follow the ONNX operator specification
(https://onnx.ai/onnx/operators), opset 7 and later.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import numpy as np

from graphopt import ir
from graphopt.ir import Array
from graphopt.numpy_moves import MOVES, Inputs, Kernel, Result, axes_of, integer, optional, required

__all__ = ["SUPPORTED", "evaluate"]

_MIN_OPSET = 7  # before it binary operators broadcast by attribute
_FLOATS = frozenset("fd")
_SIGNED = frozenset("bhilq")
_UNSIGNED = frozenset("BHILQ")
_INTS = _SIGNED | _UNSIGNED
_NUMBERS = _FLOATS | _INTS
_BOOL = frozenset("?")


def evaluate(node: ir.Node, inputs: Inputs, opset: int) -> list[Array] | None:
    """The outputs of a node on these inputs (None = omitted), or None where ORT must decide.

    Inputs and outputs have the node's ONNX dtypes: numpy's own, ml_dtypes for bf16, fp8 and int4,
    object for strings. Outputs may be views of the inputs. The size of the result is not limited
    here: ask `graphopt.execute.output_bytes` first. Malformed nodes give None, never an exception.
    """
    kernel = _KERNELS.get(node.op_type)
    if kernel is None or node.domain not in ("", "ai.onnx") or opset < _MIN_OPSET:
        return None
    if any(attr.is_ref() for attr in node.attributes.values()):
        return None
    try:
        with np.errstate(all="ignore"):
            result = kernel(node, inputs, opset)
    except (
        ValueError,
        IndexError,
        TypeError,
        AttributeError,
        OverflowError,
        np.exceptions.AxisError,
    ):
        return None
    if result is None:
        return None
    results = result if isinstance(result, list) else [result]
    return [np.asarray(r, order="C") for r in results]


def _unary(function: Callable[..., Any], chars: frozenset[str]) -> Kernel:
    def kernel(_node: ir.Node, inputs: Inputs, _opset: int) -> Result:
        x = required(inputs, 0)
        return cast(Array, function(x)) if x.dtype.char in chars else None

    return kernel


def _binary(
    function: Callable[..., Any], chars: frozenset[str], *, result: type[np.generic] | None = None
) -> Kernel:
    def kernel(_node: ir.Node, inputs: Inputs, _opset: int) -> Result:
        a, b = required(inputs, 0), required(inputs, 1)
        if a.dtype != b.dtype or a.dtype.char not in chars:
            return None
        return np.asarray(function(a, b), dtype=result or a.dtype)

    return kernel


def _variadic(function: Callable[..., Any]) -> Kernel:
    def kernel(_node: ir.Node, inputs: Inputs, _opset: int) -> Result:
        arrays = [required(inputs, i) for i in range(len(inputs))]
        first = arrays[0]
        if first.dtype.char not in _NUMBERS or any(a.dtype != first.dtype for a in arrays):
            return None
        if first.dtype.char in _FLOATS and any(np.isnan(a).any() for a in arrays):
            return None
        total = first
        for array in arrays[1:]:
            total = np.asarray(function(total, array))
        return total

    return kernel


def _div(_node: ir.Node, inputs: Inputs, _opset: int) -> Result:
    a, b = required(inputs, 0), required(inputs, 1)
    if a.dtype != b.dtype:
        return None
    if a.dtype.char in _FLOATS:
        return np.asarray(np.divide(a, b))
    # Integer division: numpy rounds down, C++ towards zero, and zero divisors crash there.
    return np.asarray(np.floor_divide(a, b)) if _positive(a, b) else None


def _positive(a: Array, b: Array) -> bool:
    """Integers of which the first are at least 0, the second greater than 0."""
    if a.dtype.char not in _INTS:
        return False
    return bool(np.all(np.greater_equal(a, 0)) and np.all(np.greater(b, 0)))


def _mod(node: ir.Node, inputs: Inputs, _opset: int) -> Result:
    a, b = required(inputs, 0), required(inputs, 1)
    if a.dtype != b.dtype or integer(node, "fmod", 0):
        return None
    return np.asarray(np.mod(a, b)) if _positive(a, b) else None


def _pow(_node: ir.Node, inputs: Inputs, _opset: int) -> Result:
    a, b = required(inputs, 0), required(inputs, 1)
    if a.dtype.char in _FLOATS and a.dtype == b.dtype:
        return np.asarray(np.power(a, b))
    return None


def _clip(node: ir.Node, inputs: Inputs, opset: int) -> Result:
    x = required(inputs, 0)
    if x.dtype.char not in _NUMBERS or not bool(np.isfinite(x).all()):
        return None  # ONNX Runtime clips infinities even without a bound
    if opset < 11:
        bounds: list[Any] = [ir.attribute(node, "min"), ir.attribute(node, "max")]
    else:
        bounds = [optional(inputs, 1), optional(inputs, 2)]
    low, high = (None if b is None else np.asarray(b, x.dtype).reshape(()) for b in bounds)
    # Not numpy's clip: the order of the two comparisons matters where low > high.
    lifted = x if low is None else np.maximum(x, low)
    return np.asarray(lifted if high is None else np.minimum(lifted, high))


def _where(_node: ir.Node, inputs: Inputs, _opset: int) -> Result:
    condition, x, y = (required(inputs, i) for i in range(3))
    if condition.dtype != np.bool_ or x.dtype != y.dtype:
        return None
    return np.where(condition, x, y)


def _cast(x: Array, target: np.dtype[Any]) -> Result:
    source = x.dtype
    if source == target:
        return x
    if source.char not in _NUMBERS | _BOOL | {"e"} or target.char not in _NUMBERS | _BOOL | {"e"}:
        return None
    if source.char in "fde" and target.char in _INTS:
        limits = np.iinfo(target)
        whole = np.trunc(x.astype(np.float64))
        # The upper bound of 64-bit integers is rounded up as a float: strictly below it.
        if not bool(
            ((whole >= limits.min) & (whole < float(limits.max) + (limits.bits < 53))).all()
        ):
            return None
    if target.char == "e" and source.char not in "f?":
        return None  # ONNX Runtime rounds twice, through float32
    return x.astype(target)


def _cast_to(node: ir.Node, inputs: Inputs, _opset: int) -> Result:
    return _cast(required(inputs, 0), ir.DataType(integer(node, "to", 0)).numpy())


def _cast_like(_node: ir.Node, inputs: Inputs, _opset: int) -> Result:
    return _cast(required(inputs, 0), required(inputs, 1).dtype)


def _reduce(function: Callable[..., Any], *, accumulates: bool, since: int = 18) -> Kernel:
    """A reduction whose axes are an input from opset `since` on, an attribute before."""

    def kernel(node: ir.Node, inputs: Inputs, opset: int) -> Result:
        x, axes = required(inputs, 0), axes_of(node, inputs, opset >= since)
        if x.dtype.char not in _NUMBERS or not x.size:
            return None
        if not accumulates and x.dtype.char in _FLOATS and bool(np.isnan(x).any()):
            return None
        if not axes and integer(node, "noop_with_empty_axes", 0):
            return None
        if accumulates and x.dtype.char in _INTS:
            # ONNX Runtime computes in double and saturates: the same where that is exact.
            size = np.maximum(np.abs(x.astype(np.float64)), 1)
            if not function(size) < min(2.0**53, float(np.iinfo(cast(Any, x.dtype)).max)):
                return None
        options: dict[str, Any] = {"dtype": x.dtype} if accumulates else {}
        keep = bool(integer(node, "keepdims", 1))
        return np.asarray(function(x, axis=tuple(axes) if axes else None, keepdims=keep, **options))

    return kernel


def _mean(node: ir.Node, inputs: Inputs, opset: int) -> Result:
    if required(inputs, 0).dtype.char not in _FLOATS:
        return None
    return _reduce(np.mean, accumulates=True)(node, inputs, opset)


_KERNELS: dict[str, Kernel] = {
    **MOVES,
    "Abs": _unary(np.abs, _NUMBERS),
    "Add": _binary(np.add, _NUMBERS),
    "And": _binary(np.logical_and, _BOOL),
    "Cast": _cast_to,
    "CastLike": _cast_like,
    "Ceil": _unary(np.ceil, _FLOATS),
    "Clip": _clip,
    "Cos": _unary(np.cos, _FLOATS),
    "Div": _div,
    "Equal": _binary(np.equal, _NUMBERS | _BOOL | {"O"}, result=np.bool_),
    "Exp": _unary(np.exp, _FLOATS),
    "Floor": _unary(np.floor, _FLOATS),
    "Greater": _binary(np.greater, _NUMBERS, result=np.bool_),
    "GreaterOrEqual": _binary(np.greater_equal, _NUMBERS, result=np.bool_),
    "Less": _binary(np.less, _NUMBERS, result=np.bool_),
    "LessOrEqual": _binary(np.less_equal, _NUMBERS, result=np.bool_),
    "Log": _unary(np.log, _FLOATS),
    "Max": _variadic(np.maximum),
    "Min": _variadic(np.minimum),
    "Mod": _mod,
    "Mul": _binary(np.multiply, _NUMBERS),
    "Neg": _unary(np.negative, _FLOATS | _SIGNED),
    "Not": _unary(np.logical_not, _BOOL),
    "Or": _binary(np.logical_or, _BOOL),
    "Pow": _pow,
    "Reciprocal": _unary(np.reciprocal, _FLOATS),
    "ReduceMax": _reduce(np.max, accumulates=False),
    "ReduceMean": _mean,
    "ReduceMin": _reduce(np.min, accumulates=False),
    "ReduceProd": _reduce(np.prod, accumulates=True),
    "ReduceSum": _reduce(np.sum, accumulates=True, since=13),
    "Round": _unary(np.rint, _FLOATS),
    "Sin": _unary(np.sin, _FLOATS),
    "Sqrt": _unary(np.sqrt, _FLOATS),
    "Sub": _binary(np.subtract, _NUMBERS),
    "Sum": _variadic(np.add),
    "Where": _where,
    "Xor": _binary(np.logical_xor, _BOOL),
}
SUPPORTED = frozenset(_KERNELS)
"""The operator types that `evaluate` knows, of the default domain."""
