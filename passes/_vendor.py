"""What the passes that make operators of ONNX Runtime's own domain have in common."""

from __future__ import annotations

import math

from graphopt import ir
from graphopt.rewriting import Op, Refuse
from graphopt.target import Target

MICROSOFT = "com.microsoft"

_INNER, _ALL = 128, 1024
"""Elements behind an axis, and in all, from which on a Softmax takes longer than its parts."""


def has_blocked_layout(target: Target) -> bool:
    """Whether ONNX Runtime convolves in blocks of channels (NCHWc): its builds do on x86 alone."""
    return target.device == "cpu" and target.arch == "x86_64"


def permutes_around(op: Op, x: ir.Value, axis: int) -> bool:
    """Whether a Softmax over an axis of x takes ONNX Runtime longer than its parts would.

    It permutes around one that is not over the last axis. A free size behind the axis is taken for
    a large one where x has four axes: it is of images, or of their boxes.
    """
    shape = op.shape(x)
    if op.target.device != "cpu" or shape is None or op.dtype(x) != ir.DataType.FLOAT:
        return False
    inner = [size for size in shape[axis + 1 :] if isinstance(size, int)]
    if len(inner) < len(shape) - axis - 1:
        return len(shape) > 3
    return math.prod(inner) >= _INNER and math.prod(s for s in shape if isinstance(s, int)) >= _ALL


def require_cpu_kernel(
    op: Op, value: ir.Value, *dtypes: ir.DataType, domain: str = MICROSOFT
) -> None:
    """Raises Refuse where ONNX Runtime's CPU provider has no kernel for the type of a value."""
    if domain not in op.target.domains or op.target.device != "cpu":
        raise Refuse(f"the target has no operators of {domain}")
    if op.dtype(value) not in (dtypes or (ir.DataType.FLOAT,)):
        raise Refuse("there is no CPU kernel for its type")
