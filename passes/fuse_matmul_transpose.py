"""Fuse a Transpose of the last two axes into the product that takes it, as FusedMatMul.

Why: matrix products read a transposed operand as fast as a plain one.
Numerics: exact.
Needs: ONNX Runtime's CPU (com.microsoft), float or double.
"""

from __future__ import annotations

from typing import Any

from graphopt import ir
from graphopt.passes._layout import permutation
from graphopt.passes._vendor import MICROSOFT, require_cpu_kernel
from graphopt.rewriting import Op, Refuse, rewrite


@rewrite.on("MatMul", benefit=2)
def fuse_matmul_transpose(op: Op, node: ir.Node) -> ir.Value | None:
    """MatMul(a, Transpose(b)) -> FusedMatMul(a, b, transB=1), the same for a."""
    operands: list[ir.Value | None] = list(node.inputs)
    attributes: dict[str, Any] = {}
    for index, name in enumerate(("transA", "transB")):
        value = operands[index]
        turn = None if value is None else value.producer()
        if value is None or turn is None or turn.op_type != "Transpose" or turn.domain:
            continue
        perm = permutation(op, turn)
        if perm is None or len(perm) < 2:
            continue
        last = len(perm) - 1
        if perm != [*range(last - 1), last, last - 1]:
            continue
        if op.uses(value) != 1:
            raise Refuse(f"{value.name!r} is used elsewhere")
        operands[index] = turn.inputs[0]
        attributes[name] = 1
    if not attributes:
        return None
    if any(value is None or (op.rank(value) or 0) < 2 for value in operands):
        return None
    require_cpu_kernel(op, node.outputs[0], ir.DataType.FLOAT, ir.DataType.DOUBLE)
    return op.build("FusedMatMul", operands, attributes, domain=MICROSOFT)[0]
