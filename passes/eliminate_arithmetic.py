"""Drop arithmetic whose result is known: x - x, x * 0, x / x, exp and log, a Softmax of one.

Why: generated code and inlined functions compute them, and everything above them is kept alive.
Numerics: rounding; a NaN that a caller passes in does not show in what is a constant then.
Needs: integers, or floats that are proven finite by what computes them (a Sigmoid, a Clip, a Cast
of integers, sums and products of such), as infinity - infinity and infinity * 0 are no zeros.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from graphopt import ir
from graphopt.pass_manager import RewritePass
from graphopt.passes._noop_values import is_uniform
from graphopt.passes._ranges import finite, limits
from graphopt.rewriting import Op, Refuse, Rule, rewrite

_EXPONENT = {
    ir.DataType.FLOAT: 80.0,
    ir.DataType.BFLOAT16: 80.0,
    ir.DataType.DOUBLE: 700.0,
    ir.DataType.FLOAT16: 8.0,
}
"""Of numbers up to this, either sign, the exponential neither overflows nor loses digits."""
_WRITTEN = 4096  # elements of a result that is stored as it is


@dataclass(frozen=True)
class EliminateArithmetic(RewritePass):
    """The rules; `assume_finite` takes the word of the user that floats are proven to be.

    With it, no value is NaN or infinite, no exponential overflows, divisors are not 0, and
    logarithms are taken of positive numbers only.
    """

    assume_finite: bool = False

    def rules(self) -> Sequence[Rule]:
        trusting = self.assume_finite

        @rewrite.on("Sub")
        def same_operands(op: Op, node: ir.Node) -> ir.Value | None:
            """x - x is 0."""
            x = node.inputs[0]
            if x is None or x is not node.inputs[1] or ir.constant(x) is not None:
                return None
            _require(op, x, trusting)
            return _filled(op, node, 0)

        @rewrite.on("Mul")
        def times_zero(op: Op, node: ir.Node) -> ir.Value | None:
            """x * 0 is 0."""
            for x, zero in (node.inputs, node.inputs[::-1]):
                if x is None or not is_uniform(op, zero, 0) or ir.constant(x) is not None:
                    continue
                _require(op, x, trusting)
                return _filled(op, node, 0)
            return None

        @rewrite.on("Log", "Exp")
        def inverse_functions(op: Op, node: ir.Node) -> ir.Value | None:
            """Log of Exp and Exp of Log give back what they get."""
            value = node.inputs[0]
            inner = None if value is None else value.producer()
            other = "Exp" if node.op_type == "Log" else "Log"
            if inner is None or inner.domain or inner.op_type != other:
                return None
            source = inner.inputs[0]
            if source is None or not (trusting or _invertible(op, node.op_type, source)):
                raise Refuse("the inner function may leave the range of its type")
            return source

        @rewrite.on("Div")
        def same_quotient(op: Op, node: ir.Node) -> ir.Value | None:
            """x / x is 1 where x is proven not to be 0."""
            x = node.inputs[0]
            if x is None or x is not node.inputs[1] or ir.constant(x) is not None:
                return None
            _require(op, x, trusting)
            low, high = limits(op, x)
            if not trusting and low <= 0 <= high:
                raise Refuse("it may be 0")
            return _filled(op, node, 1)

        @rewrite.on("Pow")
        def zeroth_power(op: Op, node: ir.Node) -> ir.Value | None:
            """x to the power of 0 is 1, for every x."""
            x, exponent = node.inputs
            if x is None or ir.constant(x) is not None or op.scalar(exponent) != 0:
                return None
            return _filled(op, node, 1)

        @rewrite.on("Softmax")
        def only_share(op: Op, node: ir.Node) -> ir.Value | None:
            """Along an axis of size 1, each share is the whole."""
            x = node.inputs[0]
            shape = None if x is None else op.shape(x)
            if x is None or not shape or ir.constant(x) is not None:
                return None
            axis = int(op.attr(node, "axis", -1 if op.opset >= 13 else 1))
            shared = [shape[axis]] if op.opset >= 13 else list(shape[axis:])
            if any(size != 1 for size in shared):
                return None
            _require(op, x, trusting)
            return _filled(op, node, 1)

        basic = (same_operands, times_zero, inverse_functions, same_quotient)
        return *basic, zeroth_power, only_share


def _invertible(op: Op, outer: str, source: ir.Value) -> bool:
    low, high = limits(op, source)
    if outer == "Exp":
        return low >= 0
    most = _EXPONENT.get(op.dtype(source) or ir.DataType.UNDEFINED, 0.0)
    return -most <= low and high <= most


def _require(op: Op, value: ir.Value, trusting: bool) -> None:
    dtype = op.dtype(value)
    if dtype is None:
        raise Refuse("its type is unknown")
    if not trusting and not finite(op, value):
        raise Refuse("it may be infinite")


def _filled(op: Op, node: ir.Node, number: int) -> ir.Value:
    """A number in the shape of a node's result."""
    output = node.outputs[0]
    shape, dtype = op.shape(output), op.dtype(output)
    if shape is None or dtype is None:
        raise Refuse("its shape is unknown")
    element = ir.tensor(np.full(1, number, dtype.numpy()))
    sizes = [size for size in shape if isinstance(size, int)]
    if op.opset < 9:
        if len(sizes) < len(shape) or math.prod(sizes) > _WRITTEN:
            raise Refuse("there is no ConstantOfShape before opset 9")
        return op.initializer(np.full(sizes, number, dtype.numpy()))
    if len(sizes) == len(shape):
        return op.ConstantOfShape(
            op.initializer(np.asarray(sizes, np.int64), "shape"), value=element
        )
    for value in node.inputs:
        if value is not None and op.shape(value) == shape:
            return op.ConstantOfShape(op.Shape(value), value=element)
    raise Refuse("no operand has the shape of the result")
