"""Elements of small tensors followed through a graph: shapes, axes, scales, loop bounds.

Integers and booleans are followed symbolically; floats as numbers, and as a `Dim` where an integer
was cast. Two things are taken for granted of symbolic elements: they do not overflow their integer
type, and in float32 they stay below 2**24, where every integer is exact.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import cast

import numpy as np

from graphopt import ir
from graphopt.dims import (
    Dim,
    product,
)
from graphopt.shapes import scalars as scalar
from graphopt.shapes.call import (
    FLOATS,
    INTEGERS,
    Call,
    Scalar,
    Sizes,
    Unknown,
    ValueRule,
    Values,
    array_of,
    axis_of,
    number,
)

_MAX_SYMBOLIC = 64  # elements of a tensor that holds symbolic ones

Binary = Callable[[Call, Scalar, Scalar], Scalar]
Unary = Callable[[Call, Scalar], Scalar]

_RANGES = {
    kind: (-(2 ** (kind.bitwidth - 1)), 2 ** (kind.bitwidth - 1) - 1)
    if kind.name.startswith("INT")
    else (0, 2**kind.bitwidth - 1)
    for kind in INTEGERS
}


def convert(values: Values, dtype: ir.DataType | None) -> Values:
    """The elements as that type holds them; Unknown where one does not fit."""
    flat = [_held(value, dtype) for value in values.ravel().tolist()]
    if len(flat) > _MAX_SYMBOLIC and any(isinstance(value, Dim) for value in flat):
        raise Unknown
    return array_of(flat, values.shape)


def _held(value: object, dtype: ir.DataType | None) -> Scalar:
    if dtype is None:
        raise Unknown
    if isinstance(value, Dim):
        if dtype in FLOATS or dtype in (ir.DataType.INT64, ir.DataType.INT32):
            return value
        raise Unknown
    if not isinstance(value, int | float):
        raise Unknown
    if dtype in FLOATS:
        return float(np.float32(value)) if dtype == ir.DataType.FLOAT else float(value)
    if dtype == ir.DataType.BOOL:
        return bool(value)
    if not math.isfinite(value):
        raise Unknown
    low, high = _RANGES[dtype]
    if not low <= int(value) <= high:
        raise Unknown
    return int(value)


def _wrap(result: object) -> Values:
    """What numpy's object functions give, which for 0 axes is the bare element."""
    if isinstance(result, np.ndarray):
        return cast("Values", result)
    return array_of([result], ())


def _operands(c: Call) -> list[Values]:
    """All inputs' elements. One known operand makes the others worth a symbol per element."""
    facts = [c.fact(i) for i in range(len(c.inputs))]
    if all(fact.values is None for fact in facts):
        raise Unknown
    return [c.elements(i) for i in range(len(facts))]


def _elementwise(function: Binary) -> ValueRule:
    """A rule that folds a binary function over all inputs, broadcasting."""

    def rule(c: Call, sizes: Sizes) -> list[Values]:
        operands = _operands(c)
        apply = np.frompyfunc(lambda a, b: function(c, a, b), 2, 1)
        result = operands[0]
        for operand in operands[1:]:
            result = _wrap(apply(result, operand))
        return [result]

    return rule


def _unary(function: Unary) -> ValueRule:
    def rule(c: Call, sizes: Sizes) -> list[Values]:
        values = c.values(0)
        return [array_of([function(c, v) for v in values.ravel().tolist()], values.shape)]

    return rule


def _rounded(function: Callable[[float], float]) -> Unary:
    return lambda c, v: function(v) if isinstance(v, float) else v


def _float_only(function: Callable[[float], float]) -> Unary:
    def apply(c: Call, value: Scalar) -> Scalar:
        if not isinstance(value, float):
            raise Unknown
        return function(value)

    return apply


def _cast(c: Call, sizes: Sizes) -> list[Values]:
    values = c.values(0)
    to = ir.DataType(c.attr("to", int, 0)) if c.node.op_type == "Cast" else c.dtype(1)
    if to == ir.DataType.BOOL:
        return [_wrap(np.frompyfunc(lambda v: not scalar.is_equal(c, v, 0), 1, 1)(values))]
    return [convert(values, to)]


def _shape(c: Call, sizes: Sizes) -> list[Values]:
    shape = c.shape(0)
    return [array_of(shape[c.attr("start", int, 0) : c.attr("end", int, len(shape))])]


def _size(c: Call, sizes: Sizes) -> list[Values]:
    return [array_of([product(c.shape(0))], ())]


def _same(c: Call, sizes: Sizes) -> list[Values]:
    return [c.values(0)]


def _reshaped(c: Call, sizes: Sizes) -> list[Values]:
    return [c.values(0).reshape(sizes[0])]


def _indices(values: Values, size: int) -> list[int]:
    return [axis_of(number(i), size) for i in values.ravel().tolist()]


def _gather(c: Call, sizes: Sizes) -> list[Values]:
    data, where = c.values(0), c.values(1)
    axis = axis_of(c.attr("axis", int, 0), data.ndim)
    taken = _indices(where, data.shape[axis])
    shape = data.shape[:axis] + where.shape + data.shape[axis + 1 :]
    return [np.take(data, taken, axis).reshape(shape)]


def _gather_elements(c: Call, sizes: Sizes) -> list[Values]:
    data, where = c.values(0), c.values(1)
    axis = axis_of(c.attr("axis", int, 0), data.ndim)
    taken = np.array(_indices(where, data.shape[axis]), np.int64).reshape(where.shape)
    return [np.take_along_axis(data, taken, axis)]


def _scatter_nd(c: Call, sizes: Sizes) -> list[Values]:
    data, where, updates = c.values(0).copy(), c.values(1), c.values(2)
    if c.attr("reduction", str, "none") != "none":
        raise Unknown
    rows = where.reshape(-1, where.shape[-1]).tolist()
    parts = updates.reshape(len(rows), *data.shape[where.shape[-1] :])
    for row, part in zip(rows, parts, strict=True):
        data[tuple(axis_of(number(i), n) for i, n in zip(row, data.shape, strict=False))] = part
    return [data]


def _slice(c: Call, sizes: Sizes) -> list[Values]:
    data = c.values(0)
    if "starts" in c.node.attributes:
        starts, ends = c.attr_ints("starts") or [], c.attr_ints("ends") or []
        axes, steps = c.attr_ints("axes"), [1] * len(starts)
    else:
        starts, ends = c.ints(1), c.ints(2)
        axes = c.ints(3) if c.has(3) else None
        steps = c.ints(4) if c.has(4) else [1] * len(starts)
    cuts = [slice(None)] * data.ndim
    for i, axis in enumerate(range(len(starts)) if axes is None else axes):
        axis = axis_of(axis, data.ndim)
        before_first = steps[i] < 0 and ends[i] < -data.shape[axis]
        cuts[axis] = slice(starts[i], None if before_first else ends[i], steps[i])
    return [data[tuple(cuts)]]


def _concat(c: Call, sizes: Sizes) -> list[Values]:
    return [np.concatenate(_operands(c), c.attr("axis", int, 0))]


def _split(c: Call, sizes: Sizes) -> list[Values]:
    data = c.values(0)
    axis = axis_of(c.attr("axis", int, 0), data.ndim)
    ends = np.cumsum([shape[axis] for shape in sizes])[:-1]
    return list(np.split(data, ends.tolist(), axis))


def _range(c: Call, sizes: Sizes) -> list[Values]:
    start, _, delta = (c.values(i).item() for i in range(3))
    return [array_of([start + delta * i for i in range(sizes[0][0])])]


def _transpose(c: Call, sizes: Sizes) -> list[Values]:
    return [np.transpose(c.values(0), c.attr_ints("perm"))]


def _tile(c: Call, sizes: Sizes) -> list[Values]:
    return [np.tile(c.values(0), c.ints(1))]


def _where(c: Call, sizes: Sizes) -> list[Values]:
    arrays = np.broadcast_arrays(c.values(0), c.elements(1), c.elements(2))
    flags, first, second = (array.ravel().tolist() for array in arrays)
    chosen = [a if scalar.truth(p) else b for p, a, b in zip(flags, first, second, strict=True)]
    return [array_of(chosen, sizes[0])]


def _reduce(function: Binary) -> ValueRule:
    def rule(c: Call, sizes: Sizes) -> list[Values]:
        data = c.values(0)
        axes = c.attr_ints("axes")
        if axes is None and c.has(1):
            axes = c.ints(1)
        if not axes and c.attr("noop_with_empty_axes", int, 0):
            return [data]
        keep = bool(c.attr("keepdims", int, 1))
        if data.size == 0:
            raise Unknown
        fold = np.frompyfunc(lambda a, b: function(c, a, b), 2, 1)
        for axis in sorted({axis_of(a, data.ndim) for a in axes or range(data.ndim)}, reverse=True):
            data = _wrap(fold.reduce(data, axis=axis, keepdims=keep))
        return [data]

    return rule


def _cumsum(c: Call, sizes: Sizes) -> list[Values]:
    if c.attr("exclusive", int, 0) or c.attr("reverse", int, 0):
        raise Unknown
    total = np.frompyfunc(lambda a, b: scalar.add(c, a, b), 2, 1)
    return [_wrap(total.accumulate(c.values(0), axis=c.ints(1)[0]))]


def _nonzero(c: Call, sizes: Sizes) -> list[Values]:
    return [nonzero_indices(c)]


def nonzero_indices(c: Call) -> Values:
    """What NonZero finds in known elements, [rank, count]; Unknown where one is undecided."""
    flags = np.frompyfunc(lambda v: not scalar.is_equal(c, v, 0), 1, 1)(c.values(0))
    found = np.array(np.nonzero(np.asarray(flags, bool)), np.int64)
    return array_of(found.ravel().tolist(), found.shape)


def _clip(c: Call, sizes: Sizes) -> list[Values]:
    values = c.values(0)
    for index, limit in ((1, scalar.higher), (2, scalar.lower)):
        if c.has(index):
            clip = np.frompyfunc(partial(limit, c), 2, 1)
            values = _wrap(clip(values, c.values(index).item()))
    return [values]


def _pad(c: Call, sizes: Sizes) -> list[Values]:
    data, amounts = c.values(0), c.ints(1)
    if c.attr("mode", str, "constant") != "constant" or c.has(3) or min(amounts) < 0:
        raise Unknown
    result = array_of([c.values(2).item() if c.has(2) else 0] * math.prod(sizes[0]), sizes[0])
    inner = [slice(amounts[i], amounts[i] + n) for i, n in enumerate(data.shape)]
    result[tuple(inner)] = data
    return [result]


def _constant_of_shape(c: Call, sizes: Sizes) -> list[Values]:
    fill: object = 0.0
    attr = c.node.attributes.get("value")
    if attr is not None:
        if attr.is_ref():
            raise Unknown
        fill = attr.as_tensor().numpy().ravel()[0].item()
    return [array_of([fill] * math.prod(sizes[0]), sizes[0])]


def _expand(c: Call, sizes: Sizes) -> list[Values]:
    return [np.broadcast_to(c.values(0), sizes[0]).copy()]


RULES: dict[str, ValueRule] = {
    "Abs": _unary(scalar.absolute),
    "Add": _elementwise(scalar.add),
    "And": _elementwise(lambda c, a, b: scalar.truth(a) and scalar.truth(b)),
    "Cast": _cast,
    "CastLike": _cast,
    "Ceil": _unary(_rounded(lambda v: float(math.ceil(v)))),
    "Clip": _clip,
    "Concat": _concat,
    "ConstantOfShape": _constant_of_shape,
    "CumSum": _cumsum,
    "Div": _elementwise(scalar.div),
    "Equal": _elementwise(scalar.is_equal),
    "Expand": _expand,
    "Flatten": _reshaped,
    "Floor": _unary(_rounded(lambda v: float(math.floor(v)))),
    "Gather": _gather,
    "GatherElements": _gather_elements,
    "Greater": _elementwise(lambda c, a, b: scalar.is_less(c, b, a)),
    "GreaterOrEqual": _elementwise(lambda c, a, b: not scalar.is_less(c, a, b)),
    "Identity": _same,
    "Less": _elementwise(scalar.is_less),
    "LessOrEqual": _elementwise(lambda c, a, b: not scalar.is_less(c, b, a)),
    "Max": _elementwise(scalar.higher),
    "Min": _elementwise(scalar.lower),
    "Mod": _elementwise(scalar.mod),
    "Mul": _elementwise(scalar.mul),
    "Neg": _unary(lambda c, v: -v),
    "NonZero": _nonzero,
    "Not": _unary(lambda c, v: scalar.negated(v)),
    "Or": _elementwise(lambda c, a, b: scalar.truth(a) or scalar.truth(b)),
    "Pad": _pad,
    "Pow": _elementwise(scalar.power),
    "Range": _range,
    "Reciprocal": _unary(_float_only(lambda v: 1 / v)),
    "ReduceMax": _reduce(scalar.higher),
    "ReduceMin": _reduce(scalar.lower),
    "ReduceProd": _reduce(scalar.mul),
    "ReduceSum": _reduce(scalar.add),
    "Reshape": _reshaped,
    "Round": _unary(_rounded(lambda v: float(round(v)))),
    "ScatterND": _scatter_nd,
    "Shape": _shape,
    "Size": _size,
    "Slice": _slice,
    "Split": _split,
    "Sqrt": _unary(_float_only(math.sqrt)),
    "Squeeze": _reshaped,
    "Sub": _elementwise(scalar.sub),
    "Sum": _elementwise(scalar.add),
    "Tile": _tile,
    "Transpose": _transpose,
    "Unsqueeze": _reshaped,
    "Where": _where,
    "Xor": _elementwise(lambda c, a, b: scalar.truth(a) != scalar.truth(b)),
}
