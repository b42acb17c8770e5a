"""Fuse the addition of a bias and Gelu into BiasGelu or, where Gelu is by tanh, FastGelu.

Why: one pass over the tensor instead of two.
Numerics: rounding.
Needs: ONNX Runtime's CPU (com.microsoft), float, a bias along the last axis.
"""

from __future__ import annotations

from graphopt import ir
from graphopt.passes._vendor import MICROSOFT, require_cpu_kernel
from graphopt.rewriting import Op, Refuse, rewrite


@rewrite.on("Gelu", benefit=2)
def fuse_bias_gelu(op: Op, node: ir.Node) -> ir.Value | None:
    """Gelu(x + b) -> BiasGelu(x, b), or FastGelu(x, b)."""
    total = node.inputs[0]
    add = None if total is None else total.producer()
    if total is None or add is None or add.op_type != "Add" or add.domain:
        return None
    for x, bias in (add.inputs, reversed(add.inputs)):
        shape = None if x is None else op.shape(x)
        if x is None or bias is None or not shape or op.rank(bias) != 1:
            continue
        if op.shape(bias) != shape[-1:] or len(shape) < 2:
            continue
        if op.uses(total) != 1:
            raise Refuse(f"{total.name!r} is used elsewhere")
        require_cpu_kernel(op, x)
        by_tanh = op.attr(node, "approximate", "none") == "tanh"
        kind = "FastGelu" if by_tanh else "BiasGelu"
        return op.build(kind, [x, bias], {}, domain=MICROSOFT)[0]
    return None
