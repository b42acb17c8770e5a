"""Merge constants of neighbouring additions and multiplications, and other small algebra.

Why: each is a kernel over the whole tensor; x + 1 + 2 is x + 3.
Numerics: rounding.
Needs: a merged constant that is no larger than the two it is made of.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from graphopt import ir
from graphopt.passes._layout import reduced_axes
from graphopt.passes._linear import Floats, narrowed
from graphopt.rewriting import Op, Refuse, rewrite

_CANCELLED = 2.0**-12
"""x + 2^23 - 2^23 rounds x to a whole number: constants that all but cancel are left alone."""

_SWALLOWING = 2.0**12
"""(1 - x) * 1e9 is a mask, and exact near 1, where 1e9 - x * 1e9 is wrong by up to 64."""

_LONGEST = 16
_SUMS, _PRODUCTS = ("Add", "Sub"), ("Mul", "Div")


@rewrite.on(*_SUMS, *_PRODUCTS, benefit=2)
def merge_constants(op: Op, node: ir.Node) -> ir.Value | None:
    """(x + a) + b is x + (a + b), and the like with - * /."""
    outer = _operand(op, node)
    if outer is None:
        return None
    value, second, _ = outer
    inner = value.producer()
    kinds = _SUMS if node.op_type in _SUMS else _PRODUCTS
    if inner is None or inner.domain or inner.op_type not in kinds or op.uses(value) != 1:
        return None
    found = _operand(op, inner)
    if found is None:
        return None
    source, first, negated = found
    dtype = op.dtype(value)
    if dtype is None or op.dtype(source) != dtype:
        return None
    if not dtype.is_floating_point() and "Div" in (node.op_type, inner.op_type):
        return None
    merged = _merged(first, inner.op_type, second, node.op_type, outer[2], negated, dtype)
    if merged is None or merged[1].size > max(first.size, second.size):
        raise Refuse("the merged constant would be larger")
    op_type, constant, swapped = merged
    operands: list[Any] = [source, op.initializer(constant)]
    return op.build(op_type, operands[::-1] if swapped else operands)[0]


def _operand(op: Op, node: ir.Node) -> tuple[ir.Value, ir.Array, bool] | None:
    """(x, constant, whether the constant stands first in a Sub or Div) of an operation."""
    for index in (0, 1):
        value, constant = node.inputs[index], op.const(node.inputs[1 - index])
        if value is None or constant is None or ir.constant(value) is not None:
            continue
        if constant.size > 1 << 20 or constant.dtype.kind in "OSUb":
            return None
        return value, constant, index == 1 and node.op_type in ("Sub", "Div")
    return None


def _merged(
    first: ir.Array,
    inner: str,
    second: ir.Array,
    outer: str,
    outer_swapped: bool,
    inner_swapped: bool,
    dtype: ir.DataType,
) -> tuple[str, ir.Array, bool] | None:
    """(operator, constant, whether the constant stands first) of both operations as one."""
    wide: Any = np.float64 if dtype.is_floating_point() else first.dtype
    a, b = first.astype(wide), second.astype(wide)
    additive = outer in _SUMS
    plain, inverse = ("Add", "Sub") if additive else ("Mul", "Div")
    # As x^(±1) * c, written additively: inner is s*x + p, outer t*(...) + q, signs being ±1.
    sign_in, sign_out = (-1 if inner_swapped else 1), (-1 if outer_swapped else 1)
    p = a if inner == plain or inner_swapped else _inverse(a, additive)
    q = b if outer == plain or outer_swapped else _inverse(b, additive)
    if p is None or q is None:
        return None
    if sign_out < 0:
        p = _inverse(p, additive)
    if p is None:
        return None
    with np.errstate(all="ignore"):
        total = p + q if additive else p * q
        if additive and np.any(np.abs(total) < _CANCELLED * np.maximum(np.abs(p), np.abs(q))):
            raise Refuse("the constants cancel, which may be meant to round")
    constant: ir.Array = narrowed(total, dtype) if dtype.is_floating_point() else total
    flipped = sign_in * sign_out < 0
    return (inverse, constant, True) if flipped else (plain, constant, False)


def _inverse(values: Any, additive: bool) -> Any:
    """-c for sums, 1 / c for products; None where it has none."""
    if additive:
        return -values
    return None if np.any(values == 0) else 1 / values


@rewrite.on(*_SUMS, *_PRODUCTS)
def merge_affine(op: Op, node: ir.Node) -> ir.Value | None:
    """((x - a) / b) * c + d is x * s + t."""
    chain: list[tuple[str, ir.Array, bool]] = []
    value: ir.Value = node.outputs[0]
    maker: ir.Node | None = node
    while maker is not None and not maker.domain and maker.op_type in (*_SUMS, *_PRODUCTS):
        found = _operand(op, maker)
        if found is None or len(chain) == _LONGEST or (chain and op.uses(value) != 1):
            break
        if maker.op_type == "Div" and found[2]:
            break
        chain.append((maker.op_type, *found[1:]))
        value = found[0]
        maker = value.producer()
    dtype = op.dtype(value)
    if len(chain) < 3 or dtype is None or not dtype.is_floating_point():
        return None
    if op.rank(value) is None or op.rank(value) != op.rank(node.outputs[0]):
        return None
    scale, shift = _affine(chain)
    largest = max(constant.size for _, constant, _ in chain)
    if max(scale.size, shift.size) > largest:
        raise Refuse("the merged constant would be larger")
    factor, addend = (op.initializer(narrowed(c, dtype)) for c in (scale, shift))
    return op.Add(op.Mul(value, factor), addend)


def _affine(chain: list[tuple[str, ir.Array, bool]]) -> tuple[Floats, Floats]:
    """(scale, shift) of operations, the last one first, as one.

    Raises:
        Refuse: a division by zero, shifts that all but cancel, or that grow so large that a
            result near 0 loses its digits to them.
    """
    scale, shift, reach = np.ones(()), np.zeros(()), np.zeros(())
    for op_type, constant, swapped in reversed(chain):
        number = constant.astype(np.float64)
        if op_type in _SUMS:
            sign = -1.0 if op_type == "Sub" and swapped else 1.0
            added = -number if op_type == "Sub" and not swapped else number
            scale, shift, reach = scale * sign, shift * sign + added, reach + np.abs(number)
            continue
        if op_type == "Div" and np.any(number == 0):
            raise Refuse("it divides by zero")
        factor = number if op_type == "Mul" else 1 / number
        scale, shift, reach = scale * factor, shift * factor, reach * np.abs(factor)
        if np.any(np.abs(shift) > _SWALLOWING):
            raise Refuse("a constant this large would swallow digits of what it is added to")
    if np.any((np.abs(shift) < _CANCELLED * reach) & (reach > 0)):
        raise Refuse("the constants cancel, which may be meant to round")
    return scale, shift


@rewrite.on("Add", "Mul")
def gather_constants(op: Op, node: ir.Node) -> ir.Value | None:
    """(x + a) + (y + b) is (x + y) + (a + b), and products alike."""
    sides: list[tuple[ir.Value, ir.Value]] = []
    for value in node.inputs:
        inner = None if value is None else value.producer()
        if value is None or inner is None or inner.domain or inner.op_type != node.op_type:
            return None
        constants = [v for v in inner.inputs if v is not None and op.scalar(v) is not None]
        others = [v for v in inner.inputs if v is not None and op.scalar(v) is None]
        if op.uses(value) != 1 or len(constants) != 1 or len(others) != 1:
            return None
        if op.rank(others[0]) is None or op.rank(others[0]) != op.rank(value):
            return None
        sides.append((others[0], constants[0]))
    dtype = op.dtype(node.outputs[0])
    if len(sides) != 2 or dtype is None or not dtype.is_floating_point():
        return None
    a, b = (np.asarray(op.scalar(constant), np.float64) for _, constant in sides)
    total = a + b if node.op_type == "Add" else a * b
    if node.op_type == "Add" and abs(total) < _CANCELLED * max(abs(a), abs(b)):
        raise Refuse("the constants cancel, which may be meant to round")
    both = op.build(node.op_type, [side[0] for side in sides])[0]
    return op.build(node.op_type, [both, op.initializer(narrowed(total, dtype))])[0]


@rewrite.on("Mul", benefit=2)
def divide_once(op: Op, node: ir.Node) -> ir.Value | None:
    """x * (1 / y) is x / y."""
    for index in (0, 1):
        value, quotient = node.inputs[index], node.inputs[1 - index]
        inverse = None if quotient is None else quotient.producer()
        if value is None or quotient is None or inverse is None or inverse.domain:
            continue
        if inverse.op_type == "Reciprocal":
            divisor = inverse.inputs[0]
        elif inverse.op_type == "Div" and op.scalar(inverse.inputs[0]) == 1:
            divisor = inverse.inputs[1]
        else:
            continue
        dtype = op.dtype(value)
        if divisor is None or op.uses(quotient) != 1:
            continue
        if op.rank(divisor) is None or op.rank(divisor) != op.rank(quotient):
            continue
        if dtype is not None and dtype.is_floating_point() and ir.constant(value) is None:
            return op.Div(value, divisor)
    return None


@rewrite.on("Div", benefit=2)
def multiply_once(op: Op, node: ir.Node) -> ir.Value | None:
    """x / (1 / y) is x y."""
    value, quotient = node.inputs
    inverse = None if quotient is None else quotient.producer()
    if value is None or quotient is None or inverse is None or op.uses(quotient) != 1:
        return None
    dtype = op.dtype(value)
    if inverse.op_type != "Reciprocal" or inverse.domain or dtype is None:
        return None
    return op.Mul(value, inverse.inputs[0]) if dtype.is_floating_point() else None


@rewrite.on("Mul", "Div")
def sum_to_mean(op: Op, node: ir.Node) -> ir.Value | None:
    """A sum over axes of known size, divided by that size, is a mean."""
    for index in (0, 1)[: 2 if node.op_type == "Mul" else 1]:
        value, number = node.inputs[index], op.scalar(node.inputs[1 - index])
        total = None if value is None else value.producer()
        if value is None or total is None or total.op_type != "ReduceSum" or total.domain:
            continue
        x = total.inputs[0]
        shape = None if x is None else op.shape(x)
        if x is None or shape is None or op.uses(value) != 1 or not isinstance(number, float):
            continue
        axes = reduced_axes(op, total, len(shape))
        sizes = [shape[axis] for axis in axes or []]
        count = int(np.prod([s for s in sizes if isinstance(s, int)]))
        if not axes or not all(isinstance(size, int) for size in sizes) or not count:
            continue
        wanted = 1 / count if node.op_type == "Mul" else float(count)
        if abs(number - wanted) <= 1e-6 * wanted:
            return _mean(op, total, x, axes)
    return None


def _mean(op: Op, total: ir.Node, x: ir.Value, axes: list[int]) -> ir.Value:
    keep = op.attr(total, "keepdims")
    if op.opset < 18:
        return op.ReduceMean(x, axes=axes, keepdims=keep)
    return op.ReduceMean(x, axes, keepdims=keep)
