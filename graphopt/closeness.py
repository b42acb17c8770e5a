"""How far two results lie apart, and how far they may.

Differences are measured against the *scale* of an output, so that a softmax over 50,000 words and
a heat map in the thousands are judged alike. For elements a (expected) and b (got):

    max_rel = max |a - b| / (s + |a|)

where `s` is the root mean square

* of the element's channel, without values beyond 10,000 (masks): detectors put boxes in pixels
  beside probabilities. Channels are on the shorter of a tensor's second and last axis;
* of the whole tensor where channels have fewer than 16 elements, without values of more than 1,000
  times the median magnitude: one masked score would otherwise excuse everything beside it.

It is at least `floor`, and `floor` times the whole tensor's, below which a difference is rounding
of what stands beside it (see `Tolerance.of`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import cast

import numpy as np
import numpy.typing as npt

from graphopt import ir
from graphopt.report import OutputComparison

Floats = npt.NDArray[np.float64]

_RELATIVE = {
    ir.DataType.DOUBLE: 1e-6,
    ir.DataType.COMPLEX128: 1e-6,
    ir.DataType.FLOAT: 1e-3,
    ir.DataType.COMPLEX64: 1e-3,
    ir.DataType.FLOAT16: 1e-2,
    ir.DataType.BFLOAT16: 5e-2,
}
_SMALL_FLOAT = 0.25  # 8 bits and fewer: neighbours lie 12 to 50 % apart
_EPSILON = {
    ir.DataType.DOUBLE: 2.0**-52,
    ir.DataType.COMPLEX128: 2.0**-52,
    ir.DataType.FLOAT: 2.0**-23,
    ir.DataType.COMPLEX64: 2.0**-23,
    ir.DataType.FLOAT16: 2.0**-10,
    ir.DataType.BFLOAT16: 2.0**-7,
}
_OUTLIER = 1e3  # times the median magnitude
_CONSTANT = 1e-3  # a range of values, relative to their size, that tells little
_LARGE = 1e4  # masks are at least so large
_LEAST_PER_CHANNEL = 16  # elements, from which their mean square tells a scale
_MOST_CLASSES = 1_000_000
_PICTURE = 3  # channels


@dataclass(frozen=True)
class Tolerance:
    """How far an output may lie from what is expected, in the terms of the module's heading."""

    relative: float
    """Largest `max_rel`; for integers, strings and booleans the share of elements that may
    differ (0 unless the original is itself unsteady)."""
    floor: float = 1.0
    """Smallest scale that differences are compared with."""

    @classmethod
    def of(
        cls, dtypes: Iterable[ir.DataType], relative: float | None = None, share: float = 1.0
    ) -> Tolerance:
        """The tolerance of values computed in `dtypes`; the coarsest of them decides.

        float64 1e-6, float32 1e-3, float16 1e-2, bfloat16 5e-2, fewer bits 0.25. These are
        ceilings for sums taken in another order through a whole network; a typical difference is
        a thousandth of them. Integers, booleans and strings must be equal. `relative` replaces
        the limit, `share` is how much of it applies.
        """
        limit, epsilon = 0.0, 0.0
        for dtype in dtypes:
            if dtype in _RELATIVE or dtype.is_floating_point():
                limit = max(limit, _RELATIVE.get(dtype, _SMALL_FLOAT))
                epsilon = max(epsilon, _EPSILON.get(dtype, 2.0**-3))
        if not limit:
            return cls(0.0)
        chosen = share * (limit if relative is None else relative)
        return cls(chosen, min(1.0, 8 * epsilon / chosen) if chosen > 0 else 1.0)


@dataclass
class Gauge:
    """Collects the comparison of one output over any number of feeds."""

    name: str
    computed: frozenset[ir.DataType] = frozenset()
    """Floating types that the model computes in; they widen the tolerance of the output's own."""
    relative: float | None = None
    """Replaces the limit that follows from the types."""
    share: float = 1.0
    """How much of that limit applies: less for a few operators than for a whole network."""
    result: OutputComparison = field(init=False)
    _dot: float = 0.0
    _aa: float = 0.0
    _bb: float = 0.0
    _error: float = 0.0
    _rows: int = 0
    _hits: int = 0
    _finite: int = 0
    _odd: int = 0
    _low: float = math.inf
    _high: float = -math.inf

    def __post_init__(self) -> None:
        self.result = OutputComparison(self.name)

    def add(self, expected: object, got: object) -> None:
        """Compare one pair of results: arrays, sequences, maps, or None for an absent optional."""
        self._compare(expected, got, "")

    def finish(self) -> OutputComparison:
        """The figures over everything that was added."""
        result = self.result
        if self._finite and math.isfinite(self._aa + self._bb + self._error):
            length = math.sqrt(self._aa) * math.sqrt(self._bb)
            both_zero = self._aa == self._bb == 0
            result.cosine = 1.0 if both_zero else self._dot / length if length else 0.0
            if self._error:
                result.sqnr_db = 10 * math.log10(self._aa / self._error) if self._aa else -math.inf
        if self._rows:
            result.top1 = self._hits / self._rows
        if not result.elements and not result.reason:
            result.note = "empty: nothing was compared"
        elif self._odd:
            result.note = (
                f"{self._odd} elements are not finite"
                if self._finite
                else "no finite element: only the pattern was compared"
            )
        size = max(abs(self._low), abs(self._high), 1.0)
        result.telling = self._high - self._low > _CONSTANT * size or result.dtype == "STRING"
        result.ok = not result.reason and result.max_rel <= result.tolerance
        return result

    def _fail(self, where: str, problem: str) -> None:
        if not self.result.reason:
            self.result.reason = f"{where}: {problem}" if where else problem

    def _compare(self, expected: object, got: object, where: str) -> None:
        kind = _kind(expected)
        if kind != _kind(got):
            self._fail(where, f"{kind} became {_kind(got)}")
        elif kind == "a sequence":
            one, other = cast(Sequence[object], expected), cast(Sequence[object], got)
            self._sequences(one, other, where)
        elif kind == "a map":
            self._tables(_table([cast(_Map, expected)]), _table([cast(_Map, got)]), where)
        elif kind == "an absent optional":
            self.result.note = "an absent optional in both"
        else:
            self._arrays(cast(ir.Array, np.asarray(expected)), np.asarray(got), where)

    def _sequences(self, expected: Sequence[object], got: Sequence[object], where: str) -> None:
        if len(expected) != len(got):
            self._fail(where, f"{len(expected)} elements became {len(got)}")
        elif expected and {_kind(x) for x in (*expected, *got)} == {"a map"}:
            one, other = cast(Sequence[_Map], expected), cast(Sequence[_Map], got)
            self._tables(_table(one), _table(other), where)
        else:
            for index, (a, b) in enumerate(zip(expected, got, strict=True)):
                self._compare(a, b, f"{where}[{index}]")

    def _tables(self, one: _Table | None, other: _Table | None, where: str) -> None:
        if one is None or other is None or one[0] != other[0]:
            self._fail(where, "the keys of a map differ")
        else:
            self._arrays(one[1], other[1], where)

    def _arrays(self, a: ir.Array, b: ir.Array, where: str) -> None:
        result = self.result
        dtype = _dtype(a)
        if dtype != _dtype(b):
            self._fail(where, f"{dtype.name} became {_dtype(b).name}")
            return
        if a.shape != b.shape:
            self._fail(where, f"shape {list(a.shape)} became {list(b.shape)}")
            return
        result.dtype, result.shape = dtype.name, a.shape
        result.elements += a.size
        if dtype.is_floating_point() or a.dtype.kind == "c":
            tolerance = Tolerance.of({dtype, *self.computed}, self.relative, self.share)
            result.tolerance = max(result.tolerance, tolerance.relative)
            if a.size:
                self._floats(_reals(a), _reals(b), _scales(a, tolerance.floor), where)
                self._top1(a, b)
        elif a.size:
            self._exact(a, b)

    def _exact(self, a: ir.Array, b: ir.Array) -> None:
        differ = np.asarray(a != b)
        if a.dtype.kind in "iub":
            self._range(a.astype(np.float64))
        self.result.max_rel = max(self.result.max_rel, float(differ.mean()))
        if differ.any() and a.dtype.kind in "iu":
            gap = np.abs(a.astype(np.float64) - b.astype(np.float64))
            self.result.max_abs = max(self.result.max_abs, float(gap.max()))

    def _floats(self, a: Floats, b: Floats, scale: Floats, where: str) -> None:
        finite = np.isfinite(a)
        if not finite.all() or not np.isfinite(b).all():
            odd = ~finite | ~np.isfinite(b)
            same = (a == b) | (np.isnan(a) & np.isnan(b))
            wrong = int(np.count_nonzero(odd & ~same))
            if wrong:
                self._fail(where, f"{wrong} of {a.size} elements differ in being NaN or infinite")
            finite &= ~odd
            a, b, scale = a[finite], b[finite], scale[finite]
            self._odd += int(odd.sum())
        if not a.size:
            return
        self._range(a)
        magnitude, gap = np.abs(a), np.abs(a - b)
        self.result.max_abs = max(self.result.max_abs, float(gap.max()))
        self.result.max_rel = max(self.result.max_rel, float((gap / (scale + magnitude)).max()))
        with np.errstate(over="ignore", invalid="ignore"):  # float64 beyond 1e154
            self._dot += float(a @ b)
            self._aa += float(a @ a)
            self._bb += float(b @ b)
            self._error += float(gap @ gap)
        self._finite += a.size

    def _range(self, a: Floats) -> None:
        self._low, self._high = min(self._low, float(a.min())), max(self._high, float(a.max()))

    def _top1(self, a: ir.Array, b: ir.Array) -> None:
        if a.dtype.kind == "c":
            return
        x, y = (class_rows(v if v.dtype.kind == "f" else v.astype(np.float32)) for v in (a, b))
        if x is None or y is None or np.isnan(x).any() or np.isnan(y).any():
            return
        hits = np.argmax(x, axis=-1) == np.argmax(y, axis=-1)
        self._rows += hits.size
        self._hits += int(np.count_nonzero(hits))


def class_rows(array: ir.Array) -> ir.Array | None:
    """An output as rows of scores, [rows, classes]; None where it has no classes.

    They are the last axis, trailing ones of one element apart; of maps, such as [batch, channels,
    height, width], the channels, unless there are three, which are a picture's.
    """
    shape = list(array.shape)
    while len(shape) > 2 and shape[-1] == 1:
        shape.pop()
    array = array.reshape(shape)
    maps = len(shape) >= 4
    if maps and shape[1] < shape[-1]:
        array = np.moveaxis(array, 1, -1)
    classes = array.shape[-1] if shape else 0
    if not 2 <= classes <= _MOST_CLASSES or (maps and classes == _PICTURE):
        return None
    return array.reshape(-1, classes)


_Map = Mapping[object, object]
_Table = tuple[tuple[object, ...], ir.Array]


def _table(rows: Sequence[_Map]) -> _Table | None:
    """Maps with the same keys as (keys, matrix of their values); None where the keys differ."""
    keys = tuple(rows[0])
    if any(tuple(row) != keys for row in rows):
        return None
    return keys, np.asarray([[row[key] for key in keys] for row in rows])


def _scales(a: ir.Array, floor: float) -> Floats:
    """For each real number of a tensor the scale that its difference is compared with."""
    reals = np.abs(_reals(a))
    whole = _scale(reals)
    axis = -1 if a.ndim < 3 or a.shape[-1] <= a.shape[1] else 1
    if a.dtype.kind == "c" or a.ndim < 2 or a.size < _LEAST_PER_CHANNEL * a.shape[axis]:
        return np.full(reals.shape, max(floor, whole))
    values = np.moveaxis(reals.reshape(a.shape), axis, 0).reshape(a.shape[axis], -1)
    squares = np.where(values < _LARGE, values, 0) ** 2  # a NaN is not below either
    channels = np.maximum(np.sqrt(squares.mean(axis=1)), floor * max(1.0, whole))
    shape = [1] * a.ndim
    shape[axis] = -1
    scales: Floats = np.broadcast_to(channels.reshape(shape), a.shape)
    return scales.ravel()


def _scale(magnitude: Floats) -> float:
    """Root mean square without the elements beyond 1,000 times the median of those not zero."""
    some = magnitude[(magnitude > 0) & np.isfinite(magnitude)]
    if not some.size:
        return 0.0
    usual = magnitude[magnitude <= _OUTLIER * float(np.median(some))]
    top = float(usual.max())
    return top * math.sqrt(float(np.mean((usual / top) ** 2))) if top else 0.0


def _reals(a: ir.Array) -> Floats:
    """All elements in one row as float64; a complex number is two."""
    if a.dtype.kind == "c":
        return a.astype(np.complex128).ravel().view(np.float64)
    return a.astype(np.float64).ravel()


def _dtype(a: ir.Array) -> ir.DataType:
    return ir.DataType.STRING if a.dtype.kind in "OUS" else ir.DataType.from_numpy(a.dtype)


def _kind(value: object) -> str:
    if value is None:
        return "an absent optional"
    if isinstance(value, (list, tuple)):
        return "a sequence"
    return "a map" if isinstance(value, Mapping) else "a tensor"
