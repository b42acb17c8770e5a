"""Sizes and indices of tensor expressions that may be symbolic."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

tirx: Any = importlib.import_module("tvm.tirx")
_arith: Any = importlib.import_module("tvm.sym")


def sizes(value: Any) -> list[Any] | None:
    """The sizes of a Relax tensor, ints where they are known; None where the rank is not."""
    shape = getattr(value.ty, "shape", None)
    if shape is None or not hasattr(shape, "values"):
        return None
    return [simple(size) for size in shape.values]


def extents(tensor: Any) -> list[Any]:
    """The sizes of a tensor that a kernel computes with, in the kernel's own variables."""
    return [simple(size) for size in tensor.shape]


def number(size: Any) -> int | None:
    """A size as an int, None for a symbolic one."""
    if isinstance(size, int):
        return size
    return int(size) if isinstance(size, tirx.IntImm) else None


def simple(size: Any) -> Any:
    """A size as an int where it is one, else simplified."""
    if isinstance(size, int):
        return size
    size = _arith.Analyzer().simplify(size)
    known = number(size)
    return size if known is None else known


def same(a: Any, b: Any) -> bool:
    """Whether two sizes are provably equal."""
    return simple(a - b) == 0 if number(a) is None or number(b) is None else number(a) == number(b)


def product(parts: Sequence[Any]) -> Any:
    """The number of elements of a shape."""
    total: Any = 1
    for part in parts:
        total = total * part
    return simple(total)


def unit(shape: Sequence[Any]) -> int | None:
    """The number of elements of a shape, without its first size if only that is symbolic."""
    whole = number(product(shape))
    return number(product(shape[1:])) if whole is None and len(shape) > 1 else whole


def ceil(size: Any, step: int) -> Any:
    """A size rounded up to a multiple of step."""
    return simple((size + step - 1) // step * step)


def unravel(index: Any, shape: Sequence[Any]) -> list[Any]:
    """The indices into a shape of the element with a number, the last axis fastest."""
    indices: list[Any] = []
    for position in range(len(shape)):
        below = product(shape[position + 1 :])
        part = index if same(below, 1) else index // below
        indices.append(part if position == 0 else part % shape[position])
    return indices


def ravel(indices: Sequence[Any], shape: Sequence[Any]) -> Any:
    """The number of the element at indices."""
    total: Any = 0
    for index, size in zip(indices, shape, strict=True):
        total = total * size + index
    return total


def divides(step: int, size: Any) -> bool:
    """Whether a size is known to be a multiple of step."""
    return number(simple(size % step)) == 0


def is_plain(rows: Sequence[Any]) -> bool:
    """Whether TVM proves that rows are covered: all sizes are known, or none is."""
    return number(product(rows)) is not None or all(number(size) is None for size in rows)


def fits(need: Any, have: Any) -> bool:
    """Whether one size is known to be at most another."""
    low, high = number(need), number(have)
    return low is not None and high is not None and low <= high
