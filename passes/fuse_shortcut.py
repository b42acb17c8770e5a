"""Fuse a strided Slice and the padding of channels, a ResNet's parameter-free shortcut, into Conv.

Why: ONNX Runtime keeps convolutions and their sums in a blocked layout, which the two leave and
re-enter; with a 1x1 convolution by ones and zeros the whole stage stays in it.
Numerics: rounding; where a value is not finite, its neighbours' channels become NaN.
Needs: ONNX Runtime's CPU on x86, float, at most 256 channels.
"""

from __future__ import annotations

import numpy as np

from graphopt import ir
from graphopt.passes._vendor import has_blocked_layout
from graphopt.rewriting import Op, Refuse, rewrite

_CHANNELS = 256
"""The convolution costs their square; 64 of them cost 2 % of a ResNet-20's block."""


@rewrite.on("Pad", benefit=2)
def fuse_shortcut(op: Op, node: ir.Node) -> ir.Value | None:
    """Pad(Slice(x)) along axis 1, of every s-th row and column -> Conv(x) with strides s."""
    value = node.inputs[0]
    cut = None if value is None else value.producer()
    if cut is None or cut.op_type != "Slice" or cut.domain or value is None:
        return None
    pads = _channel_pads(op, node)
    strides = _strides(op, cut)
    x = cut.inputs[0]
    if pads is None or strides is None or x is None:
        return None
    if op.uses(value) != 1:
        raise Refuse(f"{value.name!r} is used elsewhere")
    shape = op.shape(x)
    if shape is None or len(shape) != 4 or not isinstance(shape[1], int):
        return None
    total = shape[1] + sum(pads)
    if not has_blocked_layout(op.target):
        raise Refuse("it pays in ONNX Runtime's blocked layout, on x86")
    if op.dtype(x) != ir.DataType.FLOAT or total > _CHANNELS:
        raise Refuse("only for floats and few channels")
    weight = np.zeros((total, shape[1], 1, 1), np.float32)
    weight[pads[0] : pads[0] + shape[1], :, 0, 0] = np.eye(shape[1])
    return op.Conv(x, op.initializer(weight, "weight"), kernel_shape=[1, 1], strides=strides)


def _channel_pads(op: Op, node: ir.Node) -> tuple[int, int] | None:
    """Zeros before and after axis 1, where a Pad of four axes does nothing else."""
    if op.attr(node, "mode", "constant") != "constant":
        return None
    pads = op.attr(node, "pads")
    fill = op.attr(node, "value", 0.0)
    if len(node.inputs) > 1:
        known = op.const(node.inputs[1])
        pads = None if known is None else known.tolist()
        given = node.inputs[2] if len(node.inputs) > 2 else None
        fill = 0.0 if given is None else op.scalar(given)
    if len(node.inputs) > 3 and node.inputs[3] is not None:
        return None
    if pads is None or len(pads) != 8 or fill != 0:
        return None
    others = [pads[axis] for axis in (0, 2, 3, 4, 6, 7)]
    return (pads[1], pads[5]) if not any(others) and min(pads) >= 0 else None


def _strides(op: Op, node: ir.Node) -> list[int] | None:
    """Steps along axes 2 and 3, where a Slice takes every s-th element, from the first on."""
    if len(node.inputs) < 5:
        return None
    starts, ends, axes, steps = (op.const(value) for value in node.inputs[1:5])
    if starts is None or ends is None or axes is None or steps is None:
        return None
    found = {2: 1, 3: 1}
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        if start != 0 or axis % 4 not in found or step < 1 or end < _FAR:
            return None
        found[axis % 4] = int(step)
    return list(found.values())


_FAR = 2**31 - 1
