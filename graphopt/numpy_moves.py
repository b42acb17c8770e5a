"""Constant folding in numpy: the operators that move data or look at its shape, for all dtypes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import numpy as np

from graphopt import ir
from graphopt.ir import Array

__all__ = [
    "INTEGERS",
    "MOVES",
    "Inputs",
    "Kernel",
    "Result",
    "axes_of",
    "integer",
    "integers",
    "listed",
    "optional",
    "required",
]

Inputs = Sequence[Array | None]
Result = Array | list[Array] | None
Kernel = Callable[[ir.Node, Inputs, int], Result]

INTEGERS = frozenset("bhilqBHILQ")
"""numpy's type characters of the integers."""


def integer(node: ir.Node, name: str, default: int) -> int:
    """An integer attribute, or its default."""
    return cast(int, ir.attribute(node, name, default))


def integers(node: ir.Node, name: str) -> list[int] | None:
    """An attribute that lists integers, None where it is absent."""
    value = ir.attribute(node, name)
    return None if value is None else [int(v) for v in cast(Sequence[int], value)]


def optional(inputs: Inputs, index: int) -> Array | None:
    """An input that may be omitted."""
    return inputs[index] if index < len(inputs) else None


def required(inputs: Inputs, index: int) -> Array:
    """An input that must be there; ValueError (caught by `evaluate`) where it is omitted."""
    array = optional(inputs, index)
    if array is None:
        raise ValueError(f"input {index} is missing")
    return array


def listed(array: Array) -> list[int]:
    """The elements of an integer tensor."""
    return [int(v) for v in array.ravel().tolist()]


def axes_of(node: ir.Node, inputs: Inputs, from_input: bool) -> list[int] | None:
    """The `axes` of an operator, which later opsets take as second input; None where omitted."""
    if not from_input:
        return integers(node, "axes")
    array = optional(inputs, 1)
    return None if array is None else listed(array)


def _identity(_node: ir.Node, inputs: Inputs, _opset: int) -> Result:
    return required(inputs, 0)


def _shape(node: ir.Node, inputs: Inputs, _opset: int) -> Result:
    shape = required(inputs, 0).shape
    end = ir.attribute(node, "end")
    part = shape[integer(node, "start", 0) : None if end is None else cast(int, end)]
    return np.asarray(part, np.int64)


def _size(_node: ir.Node, inputs: Inputs, _opset: int) -> Result:
    return np.asarray(required(inputs, 0).size, np.int64)


def _reshape(node: ir.Node, inputs: Inputs, _opset: int) -> Result:
    x, target = required(inputs, 0), listed(required(inputs, 1))
    if not integer(node, "allowzero", 0):
        target = [x.shape[i] if d == 0 else d for i, d in enumerate(target)]
    if -1 in target and (0 in target or min(target) < -1):
        return None
    return x.reshape(target)


def _flatten(node: ir.Node, inputs: Inputs, _opset: int) -> Result:
    x, axis = required(inputs, 0), integer(node, "axis", 1)
    axis += x.ndim if axis < 0 else 0
    if not 0 <= axis <= x.ndim:
        return None
    return x.reshape(int(np.prod(x.shape[:axis])), int(np.prod(x.shape[axis:])))


def _transpose(node: ir.Node, inputs: Inputs, _opset: int) -> Result:
    return required(inputs, 0).transpose(integers(node, "perm"))


def _squeeze(node: ir.Node, inputs: Inputs, opset: int) -> Result:
    x, axes = required(inputs, 0), axes_of(node, inputs, opset >= 13)
    if axes is not None and not axes:
        return None  # all of them to ONNX Runtime, none to the specification
    return np.squeeze(x, None if axes is None else tuple(axes))


def _unsqueeze(node: ir.Node, inputs: Inputs, opset: int) -> Result:
    axes = axes_of(node, inputs, opset >= 13)
    return None if axes is None else np.expand_dims(required(inputs, 0), tuple(axes))


def _concat(node: ir.Node, inputs: Inputs, _opset: int) -> Result:
    arrays = [required(inputs, i) for i in range(len(inputs))]
    if any(a.dtype != arrays[0].dtype for a in arrays):
        return None
    return np.concatenate(arrays, axis=cast(int, ir.attribute(node, "axis")))


def _split(node: ir.Node, inputs: Inputs, opset: int) -> Result:
    x, axis, count = required(inputs, 0), integer(node, "axis", 0), len(node.outputs)
    size = x.shape[axis]
    given = optional(inputs, 1) if opset >= 13 else None
    sizes = integers(node, "split") if opset < 13 else None if given is None else listed(given)
    if sizes is None:
        if integer(node, "num_outputs", count) != count:
            return None
        step = -(-size // count)
        sizes = [step] * (count - 1) + [size - step * (count - 1)]
        if sizes[-1] < 0 or (opset < 18 and size % count):
            return None
    if len(sizes) != count or sum(sizes) != size or min(sizes) < 0:
        return None
    return np.split(x, np.cumsum(sizes)[:-1].tolist(), axis)


def _slice(node: ir.Node, inputs: Inputs, opset: int) -> Result:
    x = required(inputs, 0)
    if opset < 10:
        starts, ends = integers(node, "starts"), integers(node, "ends")
        axes, steps = integers(node, "axes"), None
    else:
        starts, ends = listed(required(inputs, 1)), listed(required(inputs, 2))
        given, stride = optional(inputs, 3), optional(inputs, 4)
        axes = None if given is None else listed(given)
        steps = None if stride is None else listed(stride)
    if starts is None or ends is None or len(starts) != len(ends):
        return None
    axes = list(range(len(starts))) if axes is None else axes
    steps = [1] * len(starts) if steps is None else steps
    index = [slice(None)] * x.ndim
    for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
        if step == 0 or not -x.ndim <= axis < x.ndim:
            return None
        if step < 0:
            size = x.shape[axis]
            if not size or end > size:
                return None
            # Where Python finds nothing before the first element, ONNX starts at it.
            start = min(max(start + size * (start < 0), 0), size - 1)
        index[axis] = slice(start, end, step)
    return x[tuple(index)]


def _gather(node: ir.Node, inputs: Inputs, _opset: int) -> Result:
    x, indices = required(inputs, 0), required(inputs, 1)
    return np.asarray(np.take(x, cast(Any, indices), axis=integer(node, "axis", 0)))


def _expand(_node: ir.Node, inputs: Inputs, _opset: int) -> Result:
    x = required(inputs, 0)
    shape = np.broadcast_shapes(x.shape, tuple(listed(required(inputs, 1))))
    return np.broadcast_to(x, shape).copy()


def _tile(_node: ir.Node, inputs: Inputs, _opset: int) -> Result:
    x, repeats = required(inputs, 0), listed(required(inputs, 1))
    return np.tile(x, repeats) if len(repeats) == x.ndim else None


def _constant_of_shape(node: ir.Node, inputs: Inputs, _opset: int) -> Result:
    value = node.attributes.get("value")
    fill = np.zeros(1, np.float32) if value is None else value.as_tensor().numpy()
    return np.full(tuple(listed(required(inputs, 0))), fill.reshape(-1)[0], fill.dtype)


def _range(_node: ir.Node, inputs: Inputs, _opset: int) -> Result:
    bounds = [required(inputs, i) for i in range(3)]
    if any(
        b.dtype.char not in INTEGERS or b.size != 1 or b.dtype != bounds[0].dtype for b in bounds
    ):
        return None
    start, limit, delta = (int(b.reshape(-1)[0]) for b in bounds)
    return np.arange(start, limit, delta, dtype=bounds[0].dtype) if delta else None


def _pad(node: ir.Node, inputs: Inputs, opset: int) -> Result:
    x = required(inputs, 0)
    if str(ir.attribute(node, "mode", "constant")) != "constant" or x.dtype.char == "O":
        return None
    if not x.ndim:
        return None
    given = optional(inputs, 3) if opset >= 18 else None
    axes = list(range(x.ndim)) if given is None else listed(given)
    if opset < 11:
        pads, fill = integers(node, "pads"), np.asarray(ir.attribute(node, "value", 0.0), x.dtype)
    else:
        value = optional(inputs, 2)
        pads, fill = listed(required(inputs, 1)), np.zeros((), x.dtype) if value is None else value
    if pads is None or len(pads) != 2 * len(axes) or min(pads, default=0) < 0:
        return None
    width = [(0, 0)] * x.ndim
    for i, axis in enumerate(axes):
        width[axis] = (pads[i], pads[i + len(axes)])
    shape = tuple(d + low + high for d, (low, high) in zip(x.shape, width, strict=True))
    result = np.full(shape, fill.reshape(-1)[0], x.dtype)
    result[tuple(slice(low, low + d) for d, (low, _) in zip(x.shape, width, strict=True))] = x
    return result


def _non_zero(_node: ir.Node, inputs: Inputs, _opset: int) -> Result:
    x = required(inputs, 0)
    if x.dtype.char not in INTEGERS | {"?", "f", "d"} or x.ndim == 0:
        return None
    return np.stack(np.nonzero(x)).astype(np.int64)


MOVES: dict[str, Kernel] = {
    "NonZero": _non_zero,
    "Concat": _concat,
    "ConstantOfShape": _constant_of_shape,
    "Expand": _expand,
    "Flatten": _flatten,
    "Gather": _gather,
    "Identity": _identity,
    "Pad": _pad,
    "Range": _range,
    "Reshape": _reshape,
    "Shape": _shape,
    "Size": _size,
    "Slice": _slice,
    "Split": _split,
    "Squeeze": _squeeze,
    "Tile": _tile,
    "Transpose": _transpose,
    "Unsqueeze": _unsqueeze,
}
