"""Fold a Pad into the padding of the Conv or pooling after it.

Why: the padded copy of the tensor is never made.
Numerics: exact.
Needs: constant pads of the spatial axes that are not negative, with the value that the operator
pads with itself: 0 for Conv and AveragePool, minus infinity for MaxPool (or 0 where the input is
never negative).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from graphopt import ir
from graphopt.passes._ranges import never_negative
from graphopt.rewriting import Op, Refuse, rewrite


@rewrite.on("Conv", "AveragePool", "MaxPool")
def fuse_pad(op: Op, node: ir.Node) -> Any:
    """Take up the Pad that makes the first operand."""
    value = node.inputs[0]
    pad = None if value is None else value.producer()
    if value is None or pad is None or pad.op_type != "Pad" or pad.domain or op.uses(value) != 1:
        return None
    rank = op.rank(value)
    pads = None if rank is None else pad_amounts(op, pad, rank)
    if pads is None or rank is None or op.attr(pad, "mode", "constant") != "constant":
        raise Refuse("what it pads is not constant")
    if any(pads[:2]) or any(pads[rank : rank + 2]) or min(pads) < 0:
        raise Refuse("it pads other axes than the spatial ones, or crops")
    spatial = pads[2:rank] + pads[rank + 2 :]
    own = _own_pads(op, node, len(spatial))
    attributes: dict[str, Any] = {k: v for k, v in node.attributes.items() if k != "auto_pad"}
    attributes["pads"] = [a + b for a, b in zip(own, spatial, strict=True)]
    _check(op, node, pad, own, attributes)
    inputs = [pad.inputs[0], *node.inputs[1:]]
    if len(node.outputs) > 1 and op.uses(node.outputs[1]):
        raise Refuse("its indices count the padding")
    return op.build(node.op_type, inputs, attributes)[0]


def pad_amounts(op: Op, node: ir.Node, rank: int) -> list[int] | None:
    """Begins, then ends, of every axis; None where they are not constant."""
    pads: list[int] | None = op.attr(node, "pads")
    if len(node.inputs) > 1:
        known = op.const(node.inputs[1])
        pads = None if known is None else known.tolist()
    if pads is None or len(node.inputs) < 4 or node.inputs[3] is None:
        return pads if pads is not None and len(pads) == 2 * rank else None
    axes = op.const(node.inputs[3])
    if axes is None:
        return None
    full = [0] * (2 * rank)
    for index, axis in enumerate(axes.reshape(-1).tolist()):
        full[axis % rank] = pads[index]
        full[rank + axis % rank] = pads[index + axes.size]
    return full


def _own_pads(op: Op, node: ir.Node, count: int) -> list[int]:
    mode = op.attr(node, "auto_pad", "NOTSET")
    if mode not in ("NOTSET", "VALID"):
        raise Refuse("the operator after it pads automatically")
    own = None if mode == "VALID" else op.attr(node, "pads")
    return list(own) if own else [0] * count


def _check(op: Op, node: ir.Node, pad: ir.Node, own: list[int], attributes: dict[str, Any]) -> None:
    """Refuse a pad value that the operator does not pad with; set what an AveragePool needs."""
    value = _pad_value(op, pad)
    source = pad.inputs[0]
    if node.op_type == "MaxPool":
        zero = value == 0 and source is not None and never_negative(op, source)
        dtype = None if source is None else op.dtype(source)
        lowest = value == -np.inf and dtype is not None and dtype.is_floating_point()
        if any(d > 1 for d in op.attr(node, "dilations") or ()):
            raise Refuse("a dilated window may hold nothing but padding")
        if not (zero or lowest):
            raise Refuse("it pads with another value than MaxPool")
    elif value != 0:
        raise Refuse("it pads with another value than 0")
    if node.op_type == "Conv":
        return
    if op.attr(node, "ceil_mode", 0):
        raise Refuse("the pooling rounds its size up")
    kernel = op.attr(node, "kernel_shape")
    if any(a >= k for a, k in zip(attributes["pads"], [*kernel, *kernel], strict=True)):
        raise Refuse("a window would hold nothing but padding")
    if node.op_type == "AveragePool":
        if any(own) and not op.attr(node, "count_include_pad", 0):
            raise Refuse("the pooling does not count its own padding")
        if op.opset < 7:
            raise Refuse("needs opset 7")
        attributes["count_include_pad"] = 1


def _pad_value(op: Op, pad: ir.Node) -> float | None:
    if op.opset < 11:
        return float(op.attr(pad, "value", 0.0))
    value = pad.inputs[2] if len(pad.inputs) > 2 else None
    if value is None:
        return 0.0
    number = op.scalar(value)
    return None if number is None else float(number)
