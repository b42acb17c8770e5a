"""Kernels whose sizes are free: computed sizes get names, and rows are counted by one number.

A size such as `(height - 1) // 8 + 1` would stand in each index of a kernel. TVM does not know that
it is positive, keeps sums in memory for that, and LLVM takes minutes over what is computed again
and again. A kernel finds the size in the shapes of its arguments, so a variable can stand for it.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

from graphopt.backends._tvm_indices import number, product, ravel, same, simple, unravel

tirx: Any = importlib.import_module("tvm.tirx")
_ir: Any = importlib.import_module("tvm.ir")
_ffi: Any = importlib.import_module("tvm_ffi")

_COMPUTED = (
    *(tirx.Add, tirx.Sub, tirx.Mul, tirx.FloorDiv, tirx.FloorMod),
    *(tirx.Min, tirx.Max, tirx.Select),
)


def name_sizes(function: Any) -> Any:
    """A kernel with a variable for each size of its arguments that is computed of others."""
    named: dict[Any, Any] = {}
    for size in _sizes(function):
        if number(size) is None and not isinstance(size, tirx.Var):
            plain = _ffi.StructuralKey(simple(size))
            if plain not in named:
                named[plain] = tirx.Var(f"size_{len(named)}", size.ty)
            named[_ffi.StructuralKey(size)] = named[plain]
    if not named:
        return function
    for key in list(named):
        if isinstance(key.key, tirx.Add) and isinstance(key.key.b, tirx.IntImm):
            named.setdefault(_ffi.StructuralKey(key.key.a), named[key] - key.key.b)

    def name(part: Any) -> Any:
        found = named.get(_ffi.StructuralKey(part))
        if found is None and isinstance(part, tirx.Mul) and isinstance(part.a, tirx.Mul):
            # an index times a size, whose own factor TVM has moved to the end
            found = named.get(_ffi.StructuralKey(part.a.b * part.b))
            return part if found is None else part.a.a * found
        return part if found is None else found

    return _ffi.structural_map(function, (_COMPUTED, name), order="pre")


def join_rows(function: Any, shape: Sequence[Any]) -> Any:
    """A kernel in which a number that is taken apart into indices and put together is itself."""

    def joined(total: Any) -> Any:
        last = total.b
        if not isinstance(last, tirx.FloorMod):
            return total
        again = ravel(unravel(last.a, shape), shape)
        return last.a if _ffi.structural_equal(total, again) else total

    return _ffi.structural_map(function, (tirx.Add, joined))


def straighten(function: Any) -> Any:
    """A scheduled kernel that reads and writes rows of free sizes by their number.

    An element's address is a sum of products with its indices, so the number of a row may stand in
    the last of the indices that it would be taken apart into, with zeros before it.
    """
    if all(number(size) is not None for size in _sizes(function)):
        return function

    def load(part: Any) -> Any:
        indices = _straight(part.source, part.indices)
        return part if indices is None else part.source[tuple(indices)]

    def store(part: Any) -> Any:
        indices = _straight(part.buffer, part.indices)
        return part if indices is None else tirx.BufferStore(part.buffer, part.value, indices)

    return _ffi.structural_map(function, [(_ir.TensorLoad, load), (tirx.BufferStore, store)])


def _straight(buffer: Any, indices: Sequence[Any]) -> list[Any] | None:
    """Indices of the same element without divisions; None where these are no row taken apart."""
    outer = list(indices[:-1])
    if not outer or not isinstance(outer[-1], tirx.FloorMod):
        return None
    shape, row = [simple(size) for size in buffer.ty.shape[:-1]], outer[-1].a
    for taken_apart in (unravel(row, shape), _nested(row, shape)):
        if all(map(_ffi.structural_equal, outer, taken_apart)):
            return [*[tirx.const(0, "int64")] * (len(outer) - 1), row, indices[-1]]
    return None


def _nested(index: Any, shape: Sequence[Any]) -> list[Any]:
    """As `unravel`, the remainders taken first, as TVM's schedules write it."""
    indices: list[Any] = []
    for position in range(len(shape)):
        below = product(shape[position + 1 :])
        part = index if position == 0 else index % product(shape[position:])
        indices.append(part if same(below, 1) else part // below)
    return indices


def _sizes(function: Any) -> list[Any]:
    """The sizes of a kernel's arguments."""
    return [
        size for parameter in function.params for size in getattr(parameter.ty, "shape", None) or ()
    ]
