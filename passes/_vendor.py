"""What the passes that make operators of ONNX Runtime's own domain have in common."""

from __future__ import annotations

from graphopt import ir
from graphopt.rewriting import Op, Refuse
from graphopt.target import Target

MICROSOFT = "com.microsoft"


def has_blocked_layout(target: Target) -> bool:
    """Whether ONNX Runtime convolves in blocks of channels (NCHWc): its builds do on x86 alone."""
    return target.device == "cpu" and target.arch == "x86_64"


def require_cpu_kernel(
    op: Op, value: ir.Value, *dtypes: ir.DataType, domain: str = MICROSOFT
) -> None:
    """Raises Refuse where ONNX Runtime's CPU provider has no kernel for the type of a value."""
    if domain not in op.target.domains or op.target.device != "cpu":
        raise Refuse(f"the target has no operators of {domain}")
    if op.dtype(value) not in (dtypes or (ir.DataType.FLOAT,)):
        raise Refuse("there is no CPU kernel for its type")
