"""The matcher behind `@rewrite`: patterns as small graphs, found by backtracking from the root."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx

from graphopt import ir
from graphopt.dims import DimLike

COMMUTATIVE = frozenset(["Add", "Mul", "And", "Or", "Xor", "Equal", "Max", "Min", "Sum", "Mean"])
"""Operators of ai.onnx whose two operands may be exchanged."""

_RTOL = {ir.DataType.FLOAT16: 1e-3, ir.DataType.BFLOAT16: 8e-3}


def rtol(dtype: ir.DataType | None) -> float:
    """How exactly models write a number: 0.7071 for 1/sqrt(2), what a short type has room for."""
    return 2e-5 if dtype is None else _RTOL.get(dtype, 2e-5)


class _Arithmetic:
    """Lets a pattern say `x * 0.5` for `op.Mul(x, 0.5)`."""

    def __add__(self, other: Any) -> Apply:
        return Apply("Add", (self, other))

    def __radd__(self, other: Any) -> Apply:
        return Apply("Add", (other, self))

    def __sub__(self, other: Any) -> Apply:
        return Apply("Sub", (self, other))

    def __rsub__(self, other: Any) -> Apply:
        return Apply("Sub", (other, self))

    def __mul__(self, other: Any) -> Apply:
        return Apply("Mul", (self, other))

    def __rmul__(self, other: Any) -> Apply:
        return Apply("Mul", (other, self))

    def __truediv__(self, other: Any) -> Apply:
        return Apply("Div", (self, other))

    def __rtruediv__(self, other: Any) -> Apply:
        return Apply("Div", (other, self))


@dataclass(frozen=True, eq=False)
class Wild(_Arithmetic):
    """A capture: any value, a constant, or an attribute."""

    name: str
    kind: str = "value"


@dataclass(frozen=True, eq=False)
class Apply(_Arithmetic):
    """An operator of a pattern; inputs are other patterns, numbers, or None for omitted."""

    op_type: str
    inputs: tuple[Any, ...]
    attributes: dict[str, Any] = field(default_factory=dict[str, Any])
    domain: str = ""


@dataclass(frozen=True)
class Pattern:
    """A traced pattern."""

    root: Apply
    captures: tuple[Wild, ...]

    @functools.cached_property
    def nodes(self) -> int:
        """How many operators it has."""
        seen: dict[int, Apply] = {}
        stack = [self.root]
        while stack:
            apply = stack.pop()
            if id(apply) not in seen:
                seen[id(apply)] = apply
                stack += [i for i in apply.inputs if isinstance(i, Apply)]
        return len(seen)


class PatternOp:
    """Stands for `op` while a pattern is traced."""

    def __getattr__(self, op_type: str) -> Callable[..., Apply]:
        def build(*inputs: Any, _domain: str = "", **attributes: Any) -> Apply:
            return Apply(op_type, inputs, attributes, _domain)

        return build


@dataclass
class Match:
    """Bindings of a pattern's captures and the nodes it covers."""

    captures: dict[str, Any]
    nodes: list[ir.Node]


def needed_outside(nodes: Iterable[ir.Node], root: ir.Node) -> ir.Value | None:
    """A value of these nodes, other than the root's, that something else needs."""
    covered = {root: None, **dict.fromkeys(nodes)}
    for node in covered:
        if node is root:
            continue
        for value in node.outputs:
            if value.is_graph_output() or any(u not in covered for u in value.consumers()):
                return value
    return None


_Bindings = dict[int, Any]
_Goal = tuple[Any, ir.Value | None, ir.Node]
ShapeOf = Callable[[ir.Value], tuple[DimLike, ...] | None]


def match(pattern: Pattern, node: ir.Node, opset: int, shape_of: ShapeOf) -> Match | None:
    """Match a pattern whose root is `node`; the first of all assignments, in operand order."""
    bindings = _solve([(pattern.root, node.outputs[0], node)], {}, opset, shape_of)
    if bindings is None:
        return None
    captures = {wild.name: bindings.get(id(wild)) for wild in pattern.captures}
    nodes = [b for b in bindings.values() if isinstance(b, ir.Node)]
    return Match(captures, list(dict.fromkeys(nodes)))


def _solve(
    goals: list[_Goal], bindings: _Bindings, opset: int, shape_of: ShapeOf
) -> _Bindings | None:
    while goals:
        (pattern, value, consumer), goals = goals[0], goals[1:]
        if isinstance(pattern, Apply):
            matched = bindings.get(id(pattern))
            if matched is not None:
                if value is None or matched is not value.producer():
                    return None
                continue
            for more, extended in _expand(pattern, value, bindings, opset):
                solution = _solve(more + goals, extended, opset, shape_of)
                if solution is not None:
                    return solution
            return None
        bound = _bind(pattern, value, consumer, bindings, shape_of)
        if bound is None:
            return None
        bindings = bound
    return bindings


def _bind(
    pattern: Any,
    value: ir.Value | None,
    consumer: ir.Node,
    bindings: _Bindings,
    shape_of: ShapeOf,
) -> _Bindings | None:
    """Bind a leaf: a capture, a number, or an omitted input."""
    if isinstance(pattern, Wild):
        if id(pattern) in bindings:
            return bindings if bindings[id(pattern)] is value else None
        if value is None or (pattern.kind == "const" and ir.constant(value) is None):
            return None
        return {**bindings, id(pattern): value}
    if pattern is None:
        return bindings if value is None else None
    return bindings if _equals(value, pattern, consumer, shape_of) else None


def _expand(
    pattern: Apply, value: ir.Value | None, bindings: _Bindings, opset: int
) -> Iterator[tuple[list[_Goal], _Bindings]]:
    """The ways an operator of the pattern can be the producer of a value."""
    node = None if value is None else value.producer()
    if (
        node is None
        or node.op_type != pattern.op_type
        or (node.domain or "") != pattern.domain
        or node.outputs[0] is not value
        or node in bindings.values()
    ):
        return
    inputs = list(node.inputs)
    while len(inputs) > len(pattern.inputs) and inputs[-1] is None:
        inputs.pop()
    wanted = list(pattern.inputs) + [None] * (len(inputs) - len(pattern.inputs))
    inputs += [None] * (len(wanted) - len(inputs))
    extended = _match_attributes(pattern, node, bindings, opset)
    if extended is None:
        return
    extended = {**extended, id(pattern): node}
    orders = [wanted]
    if len(wanted) == 2 and pattern.op_type in COMMUTATIVE and not pattern.domain:
        orders.append(wanted[::-1])
    for order in orders:
        yield list(zip(order, inputs, itertools.repeat(node))), extended


def _match_attributes(
    pattern: Apply, node: ir.Node, bindings: _Bindings, opset: int
) -> _Bindings | None:
    defaults = _defaults(node.op_type, node.domain, opset) if node.domain == "" else {}
    for name, attr in node.attributes.items():
        if attr.is_ref():
            return None
        if name not in pattern.attributes and not _same(attr.value, defaults.get(name)):
            return None
    for name, wanted in pattern.attributes.items():
        actual = ir.attribute(node, name, defaults.get(name))
        if isinstance(wanted, Wild):
            if id(wanted) in bindings and not _same(bindings[id(wanted)], actual):
                return None
            bindings = {**bindings, id(wanted): actual}
        elif not _same(wanted, actual):
            return None
    return bindings


def _same(a: Any, b: Any) -> bool:
    if a is None or b is None:
        return a is b
    if isinstance(a, str | bytes) or isinstance(b, str | bytes):
        return bool(a == b)
    if isinstance(a, int | float | list | tuple) and isinstance(b, int | float | list | tuple):
        x, y = np.asarray(a, np.float64), np.asarray(b, np.float64)
        return x.shape == y.shape and bool(np.allclose(x, y, rtol=1e-4, atol=1e-12))
    return False


@functools.lru_cache(maxsize=4096)
def _defaults(op_type: str, domain: str, opset: int) -> dict[str, Any]:
    """Default values of an operator's attributes; empty where it is unknown."""
    try:
        schema = onnx.defs.get_schema(op_type, opset, domain)
    except onnx.defs.SchemaError:
        return {}
    defaults: dict[str, Any] = {}
    for name, attribute in schema.attributes.items():
        proto = attribute.default_value
        if proto.type:
            value: Any = onnx.helper.get_attribute_value(proto)
            defaults[name] = value.decode() if isinstance(value, bytes) else value
    return defaults


def _equals(value: ir.Value | None, number: float, consumer: ir.Node, shape_of: ShapeOf) -> bool:
    """Whether a constant's elements all equal a number and it broadcasts into the other operand.

    A constant that would broadcast the other operand to a larger shape does more than scale it.
    """
    tensor = ir.constant(value)
    if tensor is None or tensor.size == 0 or tensor.size > 65536:
        return False
    if tensor.dtype in (ir.DataType.STRING, ir.DataType.BOOL):
        return False
    array = tensor.numpy().astype(np.float64)
    if array.ndim and not _fits(array.shape, value, consumer, shape_of):
        return False
    return bool(np.all(np.abs(array - number) <= rtol(tensor.dtype) * abs(number)))


def _fits(
    shape: tuple[int, ...], value: ir.Value | None, consumer: ir.Node, shape_of: ShapeOf
) -> bool:
    for other in consumer.inputs:
        if other is None or other is value:
            continue
        dims = shape_of(other)
        if dims is not None and len(dims) >= len(shape):
            tail = dims[len(dims) - len(shape) :]
            return all(want in (1, have) for want, have in zip(shape, tail, strict=True))
    return False
