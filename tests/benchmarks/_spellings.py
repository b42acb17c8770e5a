"""Further snippets: the same algebra in the many ways in which exporters spell it.

As in `_idioms`, a snippet takes a `Sketch` and a value and returns a value of the same kind, and
what it asks of the sketch is now and then not what it asked for.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from tests.benchmarks._idioms import CHANNELS, SIDE, WIDTH, Sketch, Snippet, Value


def _number(s: Sketch, value: float) -> Value:
    """A number as a scalar, with axes of size 1, or along the last axis."""
    shape = s.rng.choice([(), (1,), (1, 1, 1), (WIDTH,)])
    return s.const(np.full(shape, value, s.dtype))


def _affine(s: Sketch, x: Value) -> Value:
    for _ in range(s.rng.randrange(2, 5)):
        kind = s.rng.choice(["Add", "Sub", "Mul", "Div"])
        number = _number(s, s.rng.choice([0.5, 1.5, 2.0, -1.0]))
        swapped = kind == "Sub" and s.rng.random() < 0.3
        x = s.op(kind, *((number, x) if swapped else (x, number)))
    return x


def _signs(s: Sketch, x: Value) -> Value:
    y = s.op("Neg", s.op("Sub", s.op("Neg", x), _number(s, 1.0)))
    z = s.op(s.rng.choice(["Abs", "Cos"]), s.op("Neg", y))
    return s.op("Mul", s.op("Mul", z, z), s.op("Neg", x))


def _bounds(s: Sketch, x: Value) -> Value:
    for _ in range(s.rng.randrange(2, 4)):
        kind = s.rng.choice(["Min", "Max", "Relu", "Abs"])
        x = s.op(kind, x) if kind in ("Relu", "Abs") else s.op(kind, x, _number(s, 0.5))
    return s.op("Abs", s.op("Sigmoid", x))


def _finite(s: Sketch, x: Value) -> Value:
    y = s.op(s.rng.choice(["Tanh", "Sigmoid"]), x)
    for _ in range(s.rng.randrange(2)):
        y = s.op("MatMul", y, s.weight(WIDTH, WIDTH))
    return s.op("Add", x, s.op("Sub", y, y))


def _gathered(s: Sketch, x: Value) -> Value:
    order = s.numbers.permutation(WIDTH)
    y = s.op("Gather", x, s.ints(*order), axis=2)
    back = np.argsort(order) if not s.missing else s.numbers.integers(0, WIDTH, WIDTH)
    return s.op("Gather", y, s.ints(*back), axis=2 if s.rng.random() < 0.7 else -1)


def _padded(s: Sketch, x: Value) -> Value:
    low, high = s.rng.randrange(3), s.rng.randrange(1, 3)
    y = s.op("Pad", x, s.ints(0, 0, low, 0, 0, high), s.const(0, s.dtype))
    start = low if not s.missing else 0
    return s.op("Slice", y, s.ints(start), s.ints(start + WIDTH), s.ints(2))


def _split(s: Sketch, x: Value, *sizes: int, axis: int = 2) -> list[Value]:
    if s.opset >= 13:
        return s.op("Split", x, s.ints(*sizes), n=len(sizes), axis=axis)
    return s.op("Split", x, n=len(sizes), axis=axis, split=list(sizes))


def _splits(s: Sketch, x: Value) -> Value:
    first, rest = _split(s, x, 2, WIDTH - 2)
    second, third = _split(s, rest, 2, WIDTH - 4)
    parts = [first, second, third] if not s.missing else [second, first, third]
    if s.rng.random() < 0.5:
        parts[0] = s.op("Relu", parts[0])
    return s.op("Concat", *parts, axis=2)


def _products(s: Sketch, x: Value) -> Value:
    y = s.op("MatMul", x, s.weight(WIDTH, WIDTH))
    kind = s.rng.randrange(4)
    if kind == 0:
        return s.op("Add", y, s.op("MatMul", x, s.weight(WIDTH, WIDTH)))
    if kind == 1:
        return s.op("Add", y, x)
    if kind == 2:
        wide = s.op("Add", s.op("MatMul", y, s.weight(WIDTH, 24)), s.weight(24))
        return s.op("Add", s.op("MatMul", wide, s.weight(24, WIDTH)), s.weight(WIDTH))
    return s.op("Mul", s.op("Add", y, s.weight(WIDTH)), s.weight(WIDTH))


def _turned(s: Sketch, x: Value) -> Value:
    y = s.op("Transpose", x, perm=[0, 2, 1])
    kind = s.rng.randrange(3)
    if kind == 0:
        parts = _split(s, y, 3, WIDTH - 3, axis=1)
        turned = [s.op("Transpose", s.op("Relu", part), perm=[0, 2, 1]) for part in parts]
        return s.op("Concat", *turned, axis=2)
    if kind == 1:
        top = s.axes("ReduceMax", y, [1], keepdims=1)
        return s.op("Add", x, s.op("Transpose", top, perm=[0, 2, 1]))
    square = s.op("MatMul", y, s.op("Transpose", y, perm=[0, 2, 1]))
    return s.op("MatMul", x, s.op("Transpose", square, perm=[0, 2, 1]))


SPELT_ROWS: tuple[Snippet, ...] = (
    *(_affine, _signs, _bounds, _finite, _gathered, _padded, _splits, _products, _turned),
)


def _pointwise(s: Sketch, x: Value) -> Value:
    middle = s.rng.choice([CHANNELS, 16])
    sizes = [(1, 3), (3, 1), (1, 1)][s.rng.randrange(3)]
    for (cout, cin), size in zip(((middle, CHANNELS), (CHANNELS, middle)), sizes, strict=True):
        weight = s.weight(cout, cin, size, size)
        bias = [s.weight(cout)] if s.rng.random() < 0.5 else []
        x = s.op("Conv", x, weight, *bias, pads=[size // 2] * 4)
    return x


def _shuffled(s: Sketch, x: Value) -> Value:
    before: Any = s.rng.random() < 0.7
    if before:
        x = s.op("Relu", s.op("Conv", x, s.weight(CHANNELS, CHANNELS, 1, 1)))
    y = s.op("Reshape", x, s.ints(0, 2, CHANNELS // 2, SIDE, SIDE))
    y = s.op("Transpose", y, perm=[0, 2, 1, 3, 4] if not s.missing else [0, 1, 2, 4, 3])
    y = s.op("Reshape", y, s.ints(0, CHANNELS, SIDE, SIDE))
    group = 1 if not s.missing else CHANNELS
    return s.op("Conv", y, s.weight(CHANNELS, CHANNELS // group, 1, 1), group=group)


def _negated(s: Sketch, x: Value) -> Value:
    y = s.op("Conv", x, s.weight(CHANNELS, CHANNELS, 3, 3), s.weight(CHANNELS), pads=[1] * 4)
    whole = s.const(
        np.broadcast_to(s.numbers.random((CHANNELS, 1, 1)), (CHANNELS, SIDE, SIDE)), s.dtype
    )
    return s.op("Add", s.op("Neg", y), whole)


SPELT_IMAGES: tuple[Snippet, ...] = (_pointwise, _shuffled, _negated)
