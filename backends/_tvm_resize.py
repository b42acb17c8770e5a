"""Linear interpolation of images, from tables of positions and weights.

TVM's own kernel finds each element's place by itself, one element at a time; where sizes are known,
so is every place, and what is left are vectors along the channels, or along the rows.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import numpy as np

from graphopt.backends._tvm_indices import number
from graphopt.backends._tvm_kernels import default
from graphopt.backends._tvm_stages import FUSABLE

relax: Any = importlib.import_module("tvm.relax")
te: Any = importlib.import_module("tvm.te")

_NAME = "relax.image.resize2d"
_PLACES: dict[str, Callable[[Any, int, int], Any]] = {
    "half_pixel": lambda at, size, wanted: (at + 0.5) * (size / wanted) - 0.5,
    "pytorch_half_pixel": lambda at, size, wanted: (
        (at + 0.5) * (size / wanted) - 0.5 if wanted > 1 else at * 0.0
    ),
    "align_corners": lambda at, size, wanted: at * ((size - 1) / max(wanted - 1, 1)),
    "asymmetric": lambda at, size, wanted: at * (size / wanted),
}
"""Of elements of the output in the input, by ONNX's names of ways to find them."""


def _resize(builder: Any, call: Any) -> Any:
    """NCHW or NHWC, float32, sizes that are known; anything else is left to TVM."""
    x, attrs = call.args[0], call.attrs
    layout, way = str(attrs.layout), str(attrs.coordinate_transformation_mode)
    usual = layout in ("NCHW", "NHWC") and str(x.ty.dtype) == str(call.ty.dtype) == "float32"
    if not usual or str(attrs.method) != "linear" or way not in _PLACES:
        return default(_NAME)(builder, call)
    high, wide = layout.index("H"), layout.index("W")
    sizes, wanted = (
        [number(value.ty.shape.values[axis]) for axis in (high, wide)] for value in (x, call)
    )
    if None in sizes or None in wanted:
        return default(_NAME)(builder, call)
    tables: list[Any] = []
    for size, count in zip(sizes, wanted, strict=True):
        tables += map(relax.const, _table(_PLACES[way], size or 0, count or 0))

    rows, down, columns, across = tables

    def widen(x: Any, columns: Any, across: Any) -> Any:
        return _along(x, wide, columns, across, "across")

    def heighten(x: Any, rows: Any, down: Any) -> Any:
        return _along(x, high, rows, down, "down")

    def both(x: Any, columns: Any, across: Any, rows: Any, down: Any) -> Any:
        return heighten(widen(x, columns, across), rows, down)

    how = {"primfunc_name_hint": "resize2d", "primfunc_attrs": FUSABLE}
    if layout == "NHWC":  # vectors along the channels
        return builder.call_te(both, x, columns, across, rows, down, **how)
    x = builder.emit(builder.call_te(widen, x, columns, across, **how))
    return builder.call_te(heighten, x, rows, down, **how)


def _table(place: Callable[[Any, int, int], Any], size: int, wanted: int) -> tuple[Any, Any]:
    """Each element's two neighbours [2, wanted], and the weight of the second."""
    at = np.asarray(place(np.arange(wanted, dtype=np.float64), size, wanted))
    first = np.floor(at)
    both = np.clip(np.stack([first, first + 1]), 0, size - 1).astype(np.int32)
    return both, (at - first).astype(np.float32)


def _along(x: Any, axis: int, places: Any, weights: Any, name: str) -> Any:
    shape = [*x.shape]
    shape[axis] = weights.shape[0]

    def element(*index: Any) -> Any:
        at = index[axis]
        one, other = (x(*index[:axis], places(n, at), *index[axis + 1 :]) for n in (0, 1))
        return one + (other - one) * weights(at)

    return te.compute(shape, element, name=name)


RESIZE: dict[str, Callable[[Any, Any], Any]] = {_NAME: _resize}
"""Legalizations by operator."""
