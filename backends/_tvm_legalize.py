"""What becomes of each Relax operator: our kernels, polynomials, and constants where they can be.

Rearranged constants are computed by numpy here: TVM's own folding compiles a kernel for each.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import numpy as np

from graphopt.backends._tvm_call import constant
from graphopt.backends._tvm_fastmath import FAST
from graphopt.backends._tvm_indices import number
from graphopt.backends._tvm_integers import KEPT, keep
from graphopt.backends._tvm_kernels import Kernels, default

relax: Any = importlib.import_module("tvm.relax")

Legalization = Callable[[Any, Any], Any]
"""Of a block builder and a call to what stands in for it."""


def table(kernels: Kernels) -> dict[str, Legalization]:
    """The legalizations that differ from TVM's, by operator."""
    folds = {name: _folding(name, fold) for name, fold in _FOLDS.items()}
    return {**folds, **FAST, **kernels.table()}


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
        if folded is None:
            return default(name)(builder, call)
        return relax.const(np.ascontiguousarray(folded) if folded.ndim else folded)

    return legalize


def _permute(array: Any, call: Any) -> Any:
    axes = call.attrs.axes
    return np.transpose(array, None if axes is None else [int(axis) for axis in axes])


def _reshape(array: Any, call: Any) -> Any:
    shape = [number(size) for size in call.ty.shape.values]
    return None if None in shape else array.reshape([size or 0 for size in shape])


def _cast(array: Any, call: Any) -> Any:
    return array.astype(str(call.ty.dtype))


_FOLDS: dict[str, Callable[[Any, Any], Any]] = {
    "relax.permute_dims": _permute,
    "relax.reshape": _reshape,
    "relax.expand_dims": _reshape,
    "relax.squeeze": _reshape,
    "relax.astype": _cast,
}
