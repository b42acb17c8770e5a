"""Drop arithmetic whose result is known: x - x, x * 0, the logarithm of an exponential.

Why: generated code and inlined functions compute them, and everything above them is kept alive.
Numerics: exact, up to the sign of zeros; with `assume_finite` rounding.
Needs: integers, or floats that are proven finite, as NaN - NaN and infinity * 0 are no zeros.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from graphopt import ir
from graphopt.pass_manager import RewritePass
from graphopt.passes._noop_values import is_uniform
from graphopt.rewriting import Op, Refuse, Rule, rewrite

_BOUNDED = frozenset(
    {"Sigmoid", "HardSigmoid", "Tanh", "Sin", "Cos", "Erf", "Sign", "Softmax", "Softsign", "Atan"}
)
_MOVES = frozenset(
    {"Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Slice", "Identity", "Expand"}
)
_RANGE = {ir.DataType.FLOAT: 128, ir.DataType.DOUBLE: 1024, ir.DataType.BFLOAT16: 128}
"""Whole numbers of fewer bits than this convert to finite numbers."""
_STEPS = 8


@dataclass(frozen=True)
class EliminateArithmetic(RewritePass):
    """The rules; `assume_finite` takes the word of the user that floats are proven to be.

    With it, no value is NaN or infinite, no exponential overflows, and logarithms are taken of
    positive numbers only.
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
            return _zeros(op, node)

        @rewrite.on("Mul")
        def times_zero(op: Op, node: ir.Node) -> ir.Value | None:
            """x * 0 is 0."""
            for x, zero in (node.inputs, node.inputs[::-1]):
                if x is None or not is_uniform(op, zero, 0) or ir.constant(x) is not None:
                    continue
                _require(op, x, trusting)
                return _zeros(op, node)
            return None

        @rewrite.on("Log", "Exp")
        def inverse_functions(op: Op, node: ir.Node) -> ir.Value | None:
            """Log of Exp and Exp of Log give back what they get."""
            value = node.inputs[0]
            inner = None if value is None else value.producer()
            other = "Exp" if node.op_type == "Log" else "Log"
            if inner is None or inner.domain or inner.op_type != other:
                return None
            return inner.inputs[0]

        always = (same_operands, times_zero)
        return (*always, inverse_functions) if trusting else always


def _require(op: Op, value: ir.Value, trusting: bool) -> None:
    dtype = op.dtype(value)
    if dtype is None:
        raise Refuse("its type is unknown")
    if not trusting and not _finite(op, value, _STEPS):
        raise Refuse("it may be NaN or infinite")


def _finite(op: Op, value: ir.Value | None, steps: int) -> bool:
    """Whether no element can be NaN or infinite."""
    dtype = None if value is None else op.dtype(value)
    if value is None or dtype is None:
        return False
    if dtype.is_integer():
        return True
    tensor = ir.constant(value)
    if tensor is not None:
        return bool(np.all(np.isfinite(tensor.numpy().astype(np.float64))))
    node = value.producer()
    if node is None or node.domain or not steps:
        return False
    if node.op_type == "Cast":
        source = None if node.inputs[0] is None else op.dtype(node.inputs[0])
        if source == ir.DataType.BOOL:
            return True
        return source is not None and source.is_integer() and dtype in _RANGE
    if node.op_type in _BOUNDED or node.op_type in _MOVES:
        return _finite(op, node.inputs[0], steps - 1)
    return False


def _zeros(op: Op, node: ir.Node) -> ir.Value:
    """Zeros in the shape of a node's result."""
    output = node.outputs[0]
    shape, dtype = op.shape(output), op.dtype(output)
    if shape is None or dtype is None:
        raise Refuse("its shape is unknown")
    if op.opset < 9:
        raise Refuse("there is no ConstantOfShape before opset 9")
    zero = ir.tensor(np.zeros(1, dtype.numpy()))
    sizes = [size for size in shape if isinstance(size, int)]
    if len(sizes) == len(shape):
        return op.ConstantOfShape(op.initializer(np.asarray(sizes, np.int64), "shape"), value=zero)
    for value in node.inputs:
        if value is not None and op.shape(value) == shape:
            return op.ConstantOfShape(op.Shape(value), value=zero)
    raise Refuse("no operand has the shape of the result")
