"""Maximum, minimum and bounds that keep NaN, as ONNX's do: TVM's return the second operand.

So a bound that is known to be a number stands first, and there is one instruction as well.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import numpy as np

from graphopt.backends import _tvm_statements
from graphopt.backends._tvm_call import constant
from graphopt.backends._tvm_kernels import default

relax: Any = importlib.import_module("tvm.relax")
tirx: Any = importlib.import_module("tvm.tirx")
te: Any = importlib.import_module("tvm.te")
topi: Any = importlib.import_module("tvm.topi")
_s_tir: Any = importlib.import_module("tvm.s_tir")


def once(value: Any, body: Callable[[Any], Any]) -> Any:
    """An expression in a value that is computed once, however often it stands there."""
    name = tirx.Var("t", value.ty)
    return tirx.Let(name, value, body(name))


def at_most(x: Any, bound: Any) -> Any:
    """The smaller of a scalar and a number; NaN if the scalar is."""
    return tirx.Min(bound, x)


def at_least(x: Any, bound: Any) -> Any:
    """The larger of a scalar and a number; NaN if the scalar is."""
    return tirx.Max(bound, x)


def _pairs(name: str, bounded: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """The legalization of an operator of two tensors."""

    def legalize(builder: Any, call: Any) -> Any:
        left, right = call.args
        if not str(call.ty.dtype).startswith("float"):
            return default(f"relax.{name}")(builder, call)
        for x, other in ((left, right), (right, left)):
            array = constant(builder, other)
            if array is None or np.isnan(array).any():
                continue
            if array.size == 1 and array.ndim <= x.ty.ndim:
                return _scalar(builder, name, bounded, x, tirx.const(array.item(), x.ty.dtype))
            return _broadcast(builder, name, bounded, x, other)
        return _broadcast(builder, name, _either(bounded), left, right)

    return legalize


def _either(bounded: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    return lambda a, b: once(b, lambda b: tirx.Select(tirx.isnan(b), b, bounded(a, b)))


def _broadcast(
    builder: Any, name: str, function: Callable[[Any, Any], Any], left: Any, right: Any
) -> Any:
    def compute(a: Any, b: Any) -> Any:
        shape = topi.add(a, b).shape

        def element(*index: Any) -> Any:
            return function(_at(a, index), _at(b, index))

        return te.compute(shape, element, name=name, tag="broadcast")

    return builder.call_te(compute, left, right, primfunc_name_hint=name)


def _at(tensor: Any, index: tuple[Any, ...]) -> Any:
    """The element of a broadcast tensor for the index of a result."""
    own = index[len(index) - len(tensor.shape) :]
    return tensor(*(0 if _is_one(n) else i for i, n in zip(own, tensor.shape, strict=True)))


def _is_one(size: Any) -> bool:
    return isinstance(size, tirx.IntImm) and int(size) == 1


def _scalar(builder: Any, name: str, bounded: Callable[[Any, Any], Any], x: Any, bound: Any) -> Any:
    def compute(a: Any) -> Any:
        def element(*index: Any) -> Any:
            return bounded(a(*index), bound)

        return te.compute(a.shape, element, name=name)

    return builder.call_te(compute, x, primfunc_name_hint=name)


def _relu(builder: Any, call: Any) -> Any:
    (x,) = call.args
    return _scalar(builder, "relu", at_least, x, tirx.const(0, x.ty.dtype))


def infinite_starts(function: Any) -> Any:
    """A scheduled kernel whose maxima and minima start with infinities.

    TVM starts them with the largest finite number, which then comes of all infinities. Its
    schedules only know reductions that start so; hence this comes after them.
    """
    largest = {float(np.finfo(dtype).max) for dtype in (np.float16, np.float32, np.float64)}

    def change(statement: Any, _: list[Any]) -> Any:
        if not isinstance(statement, _s_tir.SBlockRealize):
            return None
        block = statement.block
        store = block.init if block.init is not None else block.body
        starts = block.init is not None or block.name_hint.endswith("_init")
        if not (starts and isinstance(store, tirx.BufferStore)):
            return None
        value = store.value
        if not isinstance(value, tirx.FloatImm) or abs(float(value.value)) not in largest:
            return None
        infinity = tirx.FloatImm(str(value.ty), float(np.copysign(np.inf, float(value.value))))
        store = tirx.BufferStore(store.buffer, infinity, store.indices)
        if block.init is None:
            return _tvm_statements.block_with(statement, store, None)
        return _tvm_statements.block_with(statement, block.body, store)

    return function.with_body(_tvm_statements.rewrite(function.body, change))


EXTREMES: dict[str, Callable[[Any, Any], Any]] = {
    "relax.maximum": _pairs("maximum", at_least),
    "relax.minimum": _pairs("minimum", at_most),
    "relax.nn.relu": _relu,
}
"""Legalizations by operator."""
