"""Reading linear functions of the steps of a sequence and of other tensors, however spelt."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from graphopt import ir
from graphopt.passes._slices import spans
from graphopt.passes.eliminate_zero_state import is_zero
from graphopt.rewriting import Op

_DEPTH = 32
_MOST_ELEMENTS = 1 << 20
"""Of a bias; anything larger is none."""


@dataclass(frozen=True)
class Step:
    """A sequence at one place of an axis: a number, or the value that says it."""

    source: ir.Value
    axis: int
    place: int | ir.Value


Leaf = ir.Value | Step


@dataclass(frozen=True)
class Linear:
    """The sum of leaves @ weights [size of the leaf, n], and a bias [n] or [1]; `nodes` make it."""

    weights: Mapping[Leaf, ir.Array]
    bias: ir.Array
    nodes: tuple[ir.Node, ...] = ()

    def part(self, start: int, end: int, *nodes: ir.Node) -> Linear:
        """Some of the columns."""
        weights = {leaf: weight[:, start:end] for leaf, weight in self.weights.items()}
        bias = self.bias[start:end] if self.bias.size > 1 else self.bias
        return Linear(weights, bias, (*self.nodes, *nodes))

    def plus(self, other: Linear, *nodes: ir.Node) -> Linear:
        """The sum of both."""
        weights = dict(self.weights)
        for leaf, weight in other.weights.items():
            weights[leaf] = np.add(weights[leaf], weight) if leaf in weights else weight
        return Linear(weights, np.add(self.bias, other.bias), (*self.nodes, *other.nodes, *nodes))

    def times(self, factor: float) -> Linear:
        """All of it multiplied by a number."""
        if factor == 1:
            return self
        weights = {
            leaf: np.multiply(weight, factor, dtype=weight.dtype)
            for leaf, weight in self.weights.items()
        }
        return Linear(weights, np.multiply(self.bias, factor, dtype=self.bias.dtype), self.nodes)

    def only(self, keep: Leaf) -> Linear:
        """Without the other leaves and the bias."""
        zero = np.zeros_like(self.bias)
        return Linear({keep: self.weights[keep]}, zero, self.nodes)


@dataclass
class LinearReader:
    """Reads linear functions; `scanned` says what the inputs of a body are slices of."""

    op: Op
    scanned: Mapping[ir.Value, Step] = field(default_factory=dict[ir.Value, Step])
    _read: dict[ir.Value, Linear | None] = field(default_factory=dict[ir.Value, Linear | None])
    _depth: int = 0

    def linear(self, value: ir.Value | None) -> Linear | None:
        """What a value is as a linear function, or None."""
        if value is None:
            return None
        if value not in self._read:
            self._read[value] = None
            if self._depth < _DEPTH:
                self._depth += 1
                self._read[value] = self._linear(value)
                self._depth -= 1
        return self._read[value]

    def _linear(self, value: ir.Value) -> Linear | None:
        op, array, node = self.op, self.op.const(value), value.producer()
        if array is not None:
            if array.size > _MOST_ELEMENTS:
                return None
            rows = array.reshape(-1, array.shape[-1]) if array.ndim else array.reshape(1, 1)
            same = array.dtype.kind == "f" and bool(rows.size) and bool(np.all(rows == rows[0]))
            return Linear({}, rows[0]) if same else None
        step = self.step(value)
        if step is not None:
            return self._at(step, value)
        if node is None or node.domain:
            return None
        if node.op_type in ("MatMul", "Gemm"):
            return self._product(node)
        if node.op_type == "Add":
            terms = [self.linear(v) for v in node.inputs]
            first, second = terms
            return None if first is None or second is None else first.plus(second, node)
        cut = columns(op, value)
        inner = None if cut is None else self.linear(cut[0])
        return None if cut is None or inner is None else inner.part(cut[1], cut[2], node)

    def _product(self, node: ir.Node) -> Linear | None:
        op = self.op
        operand, weight = node.inputs[0], op.const(node.inputs[1])
        if operand is None or weight is None or weight.ndim != 2 or weight.dtype.kind != "f":
            return None
        bias: Linear | None = Linear({}, np.zeros(1, weight.dtype))
        if node.op_type == "Gemm":
            if op.attr(node, "transA", 0):
                return None
            weight = weight.T if op.attr(node, "transB", 0) else weight
            alpha = op.attr(node, "alpha", 1.0)
            weight = weight if alpha == 1 else np.multiply(weight, alpha, dtype=weight.dtype)
            added = node.inputs[2] if len(node.inputs) > 2 else None
            if added is not None:
                bias = self.linear(added)
                bias = None if bias is None else bias.times(op.attr(node, "beta", 1.0))
        if bias is None:
            return None
        weights: dict[Leaf, ir.Array] = {}
        start = 0
        nodes = [node]
        for part, size in self._joined(operand, weight.shape[0], nodes):
            leaf, rows = self.step(part) or part, weight[start : start + size]
            start += size
            if leaf in weights:
                return None
            if not is_zero(op, part):
                weights[leaf] = rows
        return bias.plus(Linear(weights, np.zeros(1, weight.dtype), tuple(nodes)))

    def _joined(
        self, operand: ir.Value, size: int, nodes: list[ir.Node]
    ) -> list[tuple[ir.Value, int]]:
        """The parts that an operand is joined of along its last axis, with their sizes."""
        op, node = self.op, operand.producer()
        rank = op.rank(operand)
        if node is None or node.op_type != "Concat" or node.domain or rank is None:
            return [(operand, size)]
        parts = [v for v in node.inputs if v is not None]
        sizes = [(op.shape(v) or (None,))[-1] for v in parts]
        if op.attr(node, "axis", 0) % rank != rank - 1:
            return [(operand, size)]
        whole = [(v, n) for v, n in zip(parts, sizes, strict=True) if isinstance(n, int)]
        if len(whole) != len(parts):
            return [(operand, size)]
        nodes.append(node)
        return whole

    def _at(self, step: Step, value: ir.Value) -> Linear | None:
        """A step of a sequence of linear functions is that of the step."""
        op, source = self.op, self.linear(step.source)
        dims = op.shape(step.source)
        if source is None or dims is None or step.axis == len(dims) - 1:
            return None
        weights: dict[Leaf, ir.Array] = {}
        for leaf, weight in source.weights.items():
            shape = op.shape(leaf) if isinstance(leaf, ir.Value) else None
            if not isinstance(leaf, ir.Value) or shape is None or shape[:-1] != dims[:-1]:
                return None
            weights[Step(leaf, step.axis, step.place)] = weight
        nodes = tuple(p for p in _viewed(value) if p is not None)
        return Linear(weights, source.bias, (*source.nodes, *nodes))

    def step(self, value: ir.Value) -> Step | None:
        """The sequence that a value is one place of, or None."""
        if value in self.scanned:
            return self.scanned[value]
        op, node, shape = self.op, value.producer(), self.op.shape(value)
        if node is None or node.domain or shape is None:
            return None
        if node.op_type == "Gather" and node.inputs[0] is not None and node.inputs[1] is not None:
            source, index = node.inputs[0], node.inputs[1]
            axis = int(op.attr(node, "axis", 0)) % (len(shape) + 1)
            if op.rank(index) != 0 or op.rank(source) != len(shape) + 1:
                return None
            place = op.scalar(index)
            if place is None:
                return Step(source, axis, index)
            size = (op.shape(source) or (None,) * (axis + 1))[axis]
            known = place >= 0 or isinstance(size, int)
            return Step(source, axis, place % size if place < 0 else place) if known else None
        if node.op_type not in ("Squeeze", "Reshape") or node.inputs[0] is None:
            return None
        return self._cut(node.inputs[0], shape)

    def _cut(self, thick: ir.Value, shape: tuple[object, ...]) -> Step | None:
        """A value that is left of a sequence by Split or Slice, to be squeezed to a shape."""
        op, node = self.op, thick.producer()
        before = op.shape(thick)
        source = None if node is None else node.inputs[0]
        if node is None or node.domain or before is None or source is None:
            return None
        axis: int | None = None
        place = 0
        if node.op_type == "Split":
            axis = int(op.attr(node, "axis", 0)) % len(before)
            place = list(node.outputs).index(thick)
            if any((op.shape(v) or before)[axis] != 1 for v in node.outputs):
                return None
        elif node.op_type == "Slice":
            found, dims = spans(op, node), op.shape(source)
            if found is None or dims is None or len(found) != 1:
                return None
            axis = next(iter(found))
            span = found[axis].resolved(dims[axis])
            if span is None or span.end != span.start + 1:
                return None
            place = span.start
        if axis is None or (*before[:axis], *before[axis + 1 :]) != shape or before[axis] != 1:
            return None
        return Step(source, axis, place)

    def gate(self, value: ir.Value | None, *functions: str) -> Linear | None:
        """A linear function in one of these functions, some of its columns or all."""
        node = None if value is None else value.producer()
        if value is None or node is None or node.domain:
            return None
        cut = None if node.op_type in functions else columns(self.op, value)
        function = node if cut is None else cut[0].producer()
        if function is None or function.op_type not in functions or function.domain:
            return None
        inner = self.linear(function.inputs[0])
        if inner is None:
            return None
        inner = replace(inner, nodes=(*inner.nodes, function))
        return inner if cut is None else inner.part(cut[1], cut[2], node)


def columns(op: Op, value: ir.Value) -> tuple[ir.Value, int, int] | None:
    """(source, start, end) where a value is some columns of another one's last axis."""
    node = value.producer()
    source = None if node is None or node.domain else node.inputs[0] if node.inputs else None
    dims = None if source is None else op.shape(source)
    if node is None or source is None or not dims or not isinstance(dims[-1], int):
        return None
    last = len(dims) - 1
    if node.op_type == "Split" and op.attr(node, "axis", 0) % len(dims) == last:
        start = 0
        for output in node.outputs:
            size = (op.shape(output) or (None,))[-1]
            if not isinstance(size, int):
                return None
            if output is value:
                return source, start, start + size
            start += size
    found = spans(op, node) if node.op_type == "Slice" else None
    if found is None or set(found) != {last}:
        return None
    span = found[last].resolved(dims[-1])
    return None if span is None or span.step != 1 else (source, span.start, span.end)


def _viewed(value: ir.Value) -> list[ir.Node | None]:
    """The nodes that cut a step out of a sequence."""
    node = value.producer()
    inner = None if node is None or node.op_type == "Gather" else node.inputs[0]
    return [node, None if inner is None else inner.producer()]
