"""What becomes of each Relax operator: our kernels, polynomials, and constants where they can be.

Rearranged constants are computed by numpy here: TVM's own folding compiles a kernel for each.
"""

from __future__ import annotations

import importlib
import operator
from collections.abc import Callable
from typing import Any

import numpy as np

from graphopt.backends._tvm_call import constant, tensor
from graphopt.backends._tvm_extremes import EXTREMES
from graphopt.backends._tvm_fastmath import FAST
from graphopt.backends._tvm_indices import number
from graphopt.backends._tvm_integers import KEPT, keep
from graphopt.backends._tvm_kernels import Kernels, default
from graphopt.backends._tvm_resize import RESIZE

relax: Any = importlib.import_module("tvm.relax")
te: Any = importlib.import_module("tvm.te")
tirx: Any = importlib.import_module("tvm.tirx")
topi: Any = importlib.import_module("tvm.topi")

Legalization = Callable[[Any, Any], Any]
"""Of a block builder and a call to what stands in for it."""


def table(kernels: Kernels) -> dict[str, Legalization]:
    """The legalizations that differ from TVM's, by operator."""
    numbers = {name: _with_number(name, combine) for name, combine in _COMBINE.items()}
    return _with_sums({**_folds(), **numbers, **FAST, **EXTREMES, **RESIZE, **kernels.table()})


def gpu_table() -> dict[str, Legalization]:
    """As `table` for GPUs: TVM's products, which its schedules know, and functions of CUDA's."""
    return _with_sums({**_folds(), **EXTREMES})


def _folds() -> dict[str, Legalization]:
    return {name: _folding(name, fold) for name, fold in _FOLDS.items()}


def _with_sums(ours: dict[str, Legalization]) -> dict[str, Legalization]:
    wide = {name: _widened(name, ours.get(name) or default(name)) for name in _SUMS}
    return {**ours, **wide}


def _widened(name: str, legalize: Legalization) -> Legalization:
    """What adds up numbers of 16 bits does so in float32: each sum would be rounded to few bits."""

    def widen(builder: Any, value: Any) -> Any:
        if not isinstance(value.ty, relax.TensorType) or str(value.ty.dtype) not in _HALVES:
            return value
        array = constant(builder, value)
        if array is not None:
            return relax.const(array.astype("float32"))
        return builder.emit(builder.call_te(topi.cast, value, "float32"))

    def apply(builder: Any, call: Any) -> Any:
        dtype = str(getattr(call.ty, "dtype", ""))
        if dtype not in _HALVES:
            return legalize(builder, call)
        # TVM's own: it gets the bits of a power wrong in a kernel that has bfloat16
        function = default(name) if dtype == "bfloat16" and name in FAST else legalize
        arguments = [widen(builder, argument) for argument in call.args]
        wide = builder.normalize(relax.Call(call.op, arguments, call.attrs, call.ty_args))
        result = builder.emit(builder.normalize(function(builder, wide)))
        return builder.call_te(topi.cast, result, dtype)

    return apply


def first_table(kernels: Kernels) -> dict[str, Legalization]:
    """As `table`, with 16-bit integers left to the second time: products look through them."""
    found = table(kernels)
    for name in KEPT:
        found[name] = keep(found.get(name) or default(name))
    return found


def _folding(name: str, fold: Callable[[Any, Any], Any]) -> Legalization:
    def legalize(builder: Any, call: Any) -> Any:
        array = constant(builder, call.args[0])
        folded = None if array is None else fold(array, call)
        if folded is None and name == "relax.reshape" and None in map(number, call.ty.shape.values):
            return call  # a view: a kernel with free sizes would divide for each element
        if folded is None:
            return default(name)(builder, call)
        return tensor(np.ascontiguousarray(folded) if folded.ndim else folded)

    return legalize


def _with_number(name: str, combine: Callable[[Any, Any], Any]) -> Legalization:
    """Whole numbers stand in the code: every argument costs some 100 lines of checks."""

    def legalize(builder: Any, call: Any) -> Any:
        x, array = call.args[0], constant(builder, call.args[1])
        if array is None or array.size != 1 or array.ndim > x.ty.ndim:
            return default(name)(builder, call)
        value, dtype = float(array.ravel()[0]), str(x.ty.dtype)
        if dtype != "float32" or not value.is_integer() or abs(value) > _MOST:
            return default(name)(builder, call)

        def compute(x: Any) -> Any:
            def element(*index: Any) -> Any:
                return combine(x(*index), tirx.const(value, dtype))

            return te.compute(x.shape, element, name=short)

        short = name.rpartition(".")[2]
        return builder.call_te(compute, x, primfunc_name_hint=short)

    return legalize


def _permute(array: Any, call: Any) -> Any:
    axes = call.attrs.axes
    return np.transpose(array, None if axes is None else [int(axis) for axis in axes])


def _reshape(array: Any, call: Any) -> Any:
    shape = [number(size) for size in call.ty.shape.values]
    return None if None in shape else array.reshape([size or 0 for size in shape])


def _cast(array: Any, call: Any) -> Any:
    return array.astype(str(call.ty.dtype))


_HALVES = ("float16", "bfloat16")
_SUMS = tuple(
    f"relax.{name}"
    for name in (
        *("matmul", "nn.conv1d", "nn.conv2d", "nn.conv3d", "nn.conv2d_transpose"),
        *("sum", "mean", "variance", "std", "prod", "einsum"),
        *("nn.layer_norm", "nn.group_norm", "nn.instance_norm", "nn.rms_norm"),
        *("nn.avg_pool1d", "nn.avg_pool2d", "nn.avg_pool3d", "nn.adaptive_avg_pool1d"),
        *("nn.adaptive_avg_pool2d", "nn.adaptive_avg_pool3d", "nn.log_softmax", "nn.softmax"),
        *("exp", "erf", "sigmoid", "tanh"),
    )
)
"""Operators that add up, and those that have polynomials, which are for float32."""

_MOST = 1 << 24
_COMBINE: dict[str, Callable[[Any, Any], Any]] = {
    "relax.add": operator.add,
    "relax.subtract": operator.sub,
}
_FOLDS: dict[str, Callable[[Any, Any], Any]] = {
    "relax.permute_dims": _permute,
    "relax.reshape": _reshape,
    "relax.expand_dims": _reshape,
    "relax.squeeze": _reshape,
    "relax.astype": _cast,
}
