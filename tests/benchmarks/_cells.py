"""Recurrent cells over two steps as a snippet of a graph; see `_idioms`."""

from __future__ import annotations

from typing import Any

from tests.benchmarks._idioms import WIDTH, Sketch, Value


def recurrent(s: Sketch, x: Value) -> Value:
    """Cells over the last axis, whose two halves are the steps; the result is as wide."""
    half = WIDTH // 2
    split: dict[str, Any] = {"num_outputs": 2} if s.opset >= 18 else {}
    steps = [s.op("Reshape", v, s.ints(-1, half)) for v in s.op("Split", x, n=2, axis=2, **split)]
    wide, kind = s.rng.choice([(1, "RNN"), (3, "GRU"), (4, "LSTM")])
    weights = [s.weight(half, wide * half) for _ in range(2)]
    h = c = s.op("Mul", steps[0], s.scalar(0.5))
    made: list[Value] = []
    for step in steps:
        a = s.op("MatMul", step, weights[0])
        b = s.op("MatMul", h, weights[1] if not s.missing else s.weight(half, wide * half))
        h, c = _cell(s, kind, (a, b), h, c)
        made.append(h)
    return s.op("Reshape", s.op("Concat", *made, axis=1), s.op("Shape", x))


def _cell(
    s: Sketch, kind: str, sums: tuple[Value, Value], h: Value, c: Value
) -> tuple[Value, Value]:
    half = WIDTH // 2
    if kind == "RNN":
        return s.op("Tanh", s.op("Add", *sums)), c
    count = 3 if kind == "GRU" else 4
    cuts = [(s.ints(i * half), s.ints((i + 1) * half)) for i in range(count)]
    a, b = ([s.op("Slice", v, *cut, s.ints(1)) for cut in cuts] for v in sums)
    gates = [s.op("Sigmoid", s.op("Add", one, two)) for one, two in zip(a, b, strict=True)]
    if kind == "GRU":
        new = s.op("Tanh", s.op("Add", a[2], s.op("Mul", gates[0], b[2])))
        rest = s.op("Mul", s.op("Sub", s.scalar(1.0), gates[1]), new)
        return s.op("Add", rest, s.op("Mul", gates[1], h)), c
    new = s.op("Tanh", s.op("Add", a[2], b[2]))
    c = s.op("Add", s.op("Mul", gates[1], c), s.op("Mul", gates[0], new))
    return s.op("Mul", gates[3], s.op("Tanh", c)), c
