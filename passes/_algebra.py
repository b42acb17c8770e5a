"""Reading expressions: the polynomial in one tensor that a value is, however it is spelt."""

from __future__ import annotations

import math
from collections.abc import Mapping

from graphopt import ir
from graphopt._match import rtol
from graphopt.rewriting import Op, require_unneeded

Polynomial = dict[int, float]
"""Coefficients by power."""

_DEGREE = 4


class Reader:
    """Reads scalar arithmetic above a root, and notes the operators that it has read.

    Operators whose results are needed elsewhere stay unread unless they are read for every use:
    `require_unneeded` tells.
    """

    def __init__(self, op: Op, root: ir.Node) -> None:
        self._op = op
        self.nodes: dict[ir.Node, None] = {root: None}
        self._root = root

    def take(self, value: ir.Value | None, *op_types: str) -> ir.Node | None:
        """The producer of a value, noted as read, if it is one of these operators."""
        node = None if value is None else value.producer()
        if node is None or node.domain or node.op_type not in op_types:
            return None
        self.nodes[node] = None
        return node

    def uncast(self, value: ir.Value | None) -> ir.Value | None:
        """What a value is a cast of, or the value itself."""
        cast = self.take(value, "Cast")
        return value if cast is None else cast.inputs[0]

    def require_unneeded(self) -> None:
        """Raises Refuse where a value was read through although something else needs it."""
        require_unneeded(self.nodes, self._root)

    def number(self, value: ir.Value | None) -> float | None:
        """The number of a constant of one element that does not raise the other's rank."""
        number = self._op.scalar(value)
        return float(number) if isinstance(number, int | float) else None

    def near(self, found: float, wanted: float, dtype: ir.DataType | None) -> bool:
        """Whether a number is another one up to how exactly models write it."""
        return math.isclose(found, wanted, rel_tol=rtol(dtype))

    def factors(self, value: ir.Value | None) -> tuple[float, list[ir.Value]]:
        """A product as a number and the tensors that are multiplied."""
        if value is None:
            return 1.0, []
        scale, tensors = 1.0, list[ir.Value]()
        stack: list[ir.Value | None] = [value]
        while stack:
            part = stack.pop()
            number = self.number(part)
            if number is not None:
                scale *= number
                continue
            node = None if part is None else part.producer()
            inner = node is not None and (node is self._root or self._inside(part))
            if node is not None and inner and node.op_type == "Mul":
                self.nodes[node] = None
                stack += reversed(node.inputs)
            elif node is not None and inner and node.op_type == "Div":
                divisor = self.number(node.inputs[1])
                if divisor:
                    self.nodes[node] = None
                    scale /= divisor
                    stack.append(node.inputs[0])
                elif part is not None:
                    tensors.append(part)
            elif part is not None:
                tensors.append(part)
        return scale, tensors

    def _inside(self, value: ir.Value | None) -> bool:
        return value is not None and self._op.uses(value) == 1

    def polynomial(self, value: ir.Value | None, x: ir.Value) -> Polynomial | None:
        """The polynomial in x that a value is, or None."""
        if value is None:
            return None
        if value is x:
            return {1: 1.0}
        number = self.number(value)
        if number is not None:
            return {0: number}
        node = value.producer()
        if node is None or node.domain:
            return None
        found = self._combined(node, x)
        if found is not None:
            self.nodes[node] = None
        return found

    def _combined(self, node: ir.Node, x: ir.Value) -> Polynomial | None:
        if node.op_type not in ("Add", "Sub", "Mul", "Div", "Pow", "Neg"):
            return None
        left = self.polynomial(node.inputs[0], x)
        if left is None:
            return None
        if node.op_type == "Neg":
            return {power: -c for power, c in left.items()}
        right = self.polynomial(node.inputs[1], x)
        if right is None:
            return None
        if node.op_type == "Add":
            return _sum(left, right)
        if node.op_type == "Sub":
            return _sum(left, {power: -c for power, c in right.items()})
        if node.op_type == "Mul":
            return _product(left, right)
        if list(right) != [0]:
            return None
        if node.op_type == "Div":
            return {power: c / right[0] for power, c in left.items()} if right[0] else None
        return _power(left, right[0])

    def is_polynomial(
        self, value: ir.Value | None, x: ir.Value, wanted: Mapping[int, float]
    ) -> bool:
        """Whether a value is a polynomial in x with these coefficients."""
        found = self.polynomial(value, x)
        dtype = self._op.dtype(x)
        return (
            found is not None
            and found.keys() == wanted.keys()
            and all(self.near(found[power], wanted[power], dtype) for power in wanted)
        )


def _sum(a: Polynomial, b: Polynomial) -> Polynomial:
    total = {power: a.get(power, 0.0) + b.get(power, 0.0) for power in {**a, **b}}
    return {power: c for power, c in total.items() if c}


def _product(a: Polynomial, b: Polynomial) -> Polynomial | None:
    total: Polynomial = {}
    for i, p in a.items():
        for j, q in b.items():
            total[i + j] = total.get(i + j, 0.0) + p * q
    return total if not total or max(total) <= _DEGREE else None


def _power(a: Polynomial, exponent: float) -> Polynomial | None:
    if exponent not in (1.0, 2.0, 3.0):
        return None
    result: Polynomial | None = {0: 1.0}
    for _ in range(int(exponent)):
        result = None if result is None else _product(result, a)
    return result
