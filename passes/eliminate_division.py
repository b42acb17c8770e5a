"""Multiply by the reciprocal instead of dividing by a constant.

Why: a division takes several times as long as a multiplication.
Numerics: rounding; exact for powers of two.
Needs: a constant whose reciprocal is a normal number. Divisions that runtimes know as part of an
attention or a GELU stay, and so do those whose quotients are rounded or compared, where the last
bit decides.
"""

from __future__ import annotations

import numpy as np

from graphopt import ir
from graphopt.rewriting import Op, Refuse, rewrite

_SMALLEST_NORMAL = {
    ir.DataType.FLOAT16: 2.0**-14,
    ir.DataType.BFLOAT16: 2.0**-126,
    ir.DataType.FLOAT: 2.0**-126,
    ir.DataType.DOUBLE: 2.0**-1022,
}
_STEP_FUNCTIONS = frozenset(
    {
        *("Floor", "Ceil", "Round", "Sign", "Mod", "Equal", "Less", "LessOrEqual", "Greater"),
        *("GreaterOrEqual", "ArgMax", "ArgMin", "TopK", "NonZero", "Unique"),
    }
)
_STEPS = 4


@rewrite.on("Div")
def eliminate_division(op: Op, node: ir.Node) -> ir.Value | None:
    """x / c is x * (1 / c)."""
    x, divisor = node.inputs
    constant, dtype = op.const(divisor), op.dtype(node.outputs[0])
    if x is None or constant is None or ir.constant(x) is not None or op.opset < 7:
        return None
    smallest = None if dtype is None else _SMALLEST_NORMAL.get(dtype)
    if smallest is None:
        return None
    maker = x.producer()
    if maker is not None and maker.op_type in ("MatMul", "FusedMatMul", "Gemm"):
        raise Refuse("runtimes fuse the scale of a matrix product")
    if any(user.op_type == "Erf" for user in node.outputs[0].consumers()):
        raise Refuse("runtimes fuse it as a part of GELU")
    divisors = constant.astype(np.float64)
    if not np.all(np.isfinite(divisors)) or np.any(divisors == 0):
        raise Refuse("the divisor has no finite reciprocal")
    with np.errstate(all="ignore"):
        inverse = (1 / divisors).astype(constant.dtype)
    numbers = inverse.astype(np.float64)
    if not np.all(np.isfinite(numbers)) or np.any(np.abs(numbers) < smallest):
        raise Refuse("the reciprocal is out of range")
    exact = bool(np.all(np.frexp(divisors)[0] ** 2 == 0.25))
    if not exact and dtype in (ir.DataType.FLOAT16, ir.DataType.BFLOAT16):
        raise Refuse("in half precision the reciprocal rounds more than the quotient")
    if not exact and _decides(op, node.outputs[0], _STEPS):
        raise Refuse("the quotient is rounded or compared")
    return op.Mul(x, op.initializer(inverse, "reciprocal"))


def _decides(op: Op, value: ir.Value, steps: int) -> bool:
    """Whether a step function is among the nearest operators below a value."""
    for user in value.consumers():
        if user.op_type in _STEP_FUNCTIONS:
            return True
        if user.op_type == "Cast":
            target = op.dtype(user.outputs[0])
            if target is None or not target.is_floating_point():
                return True
        if steps and any(_decides(op, output, steps - 1) for output in user.outputs):
            return True
    return False
