"""Gradients of what moves, joins, cuts, repeats or gathers values."""

from __future__ import annotations

import functools
import math
from typing import cast

import numpy as np
import onnx

from graphopt import ir
from graphopt.errors import InputError
from graphopt.pruner.backward import Array, Gradients, Rule, fit, integer, numbers
from graphopt.runner import Runner

__all__ = ["MOVES"]


def _reshape(node: ir.Node, x: list[Array], y: Array, g: Array) -> Gradients:
    return [g.reshape(x[0].shape)]


def _transpose(node: ir.Node, x: list[Array], y: Array, g: Array) -> Gradients:
    order = numbers(node, "perm", range(x[0].ndim)[::-1])
    return [g.transpose(np.argsort(order))]


def _concat(node: ir.Node, x: list[Array], y: Array, g: Array) -> Gradients:
    axis = integer(node, "axis", 0)
    return np.split(g, np.cumsum([part.shape[axis] for part in x])[:-1], axis)


def _axes(node: ir.Node, x: list[Array]) -> list[int]:
    """What a reduction or a global pool runs over."""
    if node.op_type.startswith("Global"):
        return list(range(2, x[0].ndim))
    axes = numbers(node, "axes", x[1].tolist() if len(x) > 1 else range(x[0].ndim))
    return [axis % x[0].ndim for axis in axes]


def _mean(node: ir.Node, x: list[Array], y: Array, g: Array) -> Gradients:
    axes = _axes(node, x)
    kept = [1 if axis in axes else size for axis, size in enumerate(x[0].shape)]
    share = math.prod(x[0].shape[axis] for axis in axes) if node.op_type != "ReduceSum" else 1
    return [np.broadcast_to(g.reshape(kept) / share, x[0].shape).astype(g.dtype, copy=False)]


def _pad(node: ir.Node, x: list[Array], y: Array, g: Array) -> Gradients:
    pads = numbers(node, "pads", x[1].tolist() if len(x) > 1 else [])
    if len(x) > 3 or str(ir.attribute(node, "mode", "constant")) != "constant" or min(pads) < 0:
        raise InputError(f"no gradient is known of such padding ({ir.label(node)})")
    return [g[tuple(slice(a, a + n) for a, n in zip(pads, x[0].shape, strict=False))]]


def _slice(node: ir.Node, x: list[Array], y: Array, g: Array) -> Gradients:
    rank = x[0].ndim
    given = [list(value.tolist()) for value in x[1:]]
    starts = given[0] if given else numbers(node, "starts", [])
    ends = given[1] if given else numbers(node, "ends", [])
    axes = given[2] if len(given) > 2 else numbers(node, "axes", range(len(starts)))
    steps = given[3] if len(given) > 3 else [1] * len(starts)
    where = [slice(None)] * rank
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        stop = None if step < 0 and end < -x[0].shape[axis] else end
        where[axis] = slice(start, stop, step)
    back = np.zeros_like(x[0])
    back[tuple(where)] = g
    return [back]


def _split(node: ir.Node, x: list[Array], y: Array, g: Array) -> Gradients:
    """The tape joins the gradients of the parts."""
    return [g]


def _largest(node: ir.Node, x: list[Array], y: Array, g: Array) -> Gradients:
    """In equal shares to all that are as large, or as small, as the result."""
    axes = _axes(node, x)
    kept = [1 if axis in axes else size for axis, size in enumerate(x[0].shape)]
    same = (x[0] == y.reshape(kept)).astype(g.dtype)
    return [same * (g.reshape(kept) / same.sum(tuple(axes), keepdims=True))]


def _length(node: ir.Node, x: list[Array], y: Array, g: Array) -> Gradients:
    """Of norms, of sums of squares, and of the logarithm of a sum of powers."""
    axes = _axes(node, x)
    kept = [1 if axis in axes else size for axis, size in enumerate(x[0].shape)]
    size, slope = y.reshape(kept), g.reshape(kept)
    if node.op_type == "ReduceSumSquare":
        return [2 * slope * x[0]]
    if node.op_type == "ReduceL1":
        return [slope * np.sign(x[0])]
    if node.op_type == "ReduceL2":
        return [slope * np.divide(x[0], size, out=np.zeros_like(x[0]), where=size != 0)]
    return [slope * np.exp(x[0] - size)]


def _blocks(node: ir.Node, x: list[Array], y: Array, g: Array) -> Gradients:
    """DepthToSpace and SpaceToDepth, by undoing them."""
    size = integer(node, "blocksize", 1)
    count, channels, height, width = x[0].shape
    if node.op_type == "SpaceToDepth":
        parts = g.reshape(count, size, size, channels, height // size, width // size)
        return [parts.transpose(0, 3, 4, 1, 5, 2).reshape(x[0].shape)]
    columns_first = str(ir.attribute(node, "mode", "DCR")) == "CRD"
    parts = g.reshape(count, channels // size**2, height, size, width, size)
    order = (0, 1, 3, 5, 2, 4) if columns_first else (0, 3, 5, 1, 2, 4)
    return [parts.transpose(order).reshape(x[0].shape)]


def _running_sum(node: ir.Node, x: list[Array], y: Array, g: Array) -> Gradients:
    """A running sum from the other end."""
    axis = int(x[1].item())
    forward = bool(integer(node, "reverse", 0))
    turned = g if forward else np.flip(g, axis)
    sums = np.cumsum(turned, axis)
    if integer(node, "exclusive", 0):
        sums -= turned
    return [sums if forward else np.flip(sums, axis)]


def _expand(node: ir.Node, x: list[Array], y: Array, g: Array) -> Gradients:
    return [fit(g, x[0].shape)]


def _tile(node: ir.Node, x: list[Array], y: Array, g: Array) -> Gradients:
    parts = [n for pair in zip(x[1].tolist(), x[0].shape, strict=True) for n in pair]
    return [g.reshape(parts).sum(tuple(range(0, len(parts), 2)))]


def _gather(node: ir.Node, x: list[Array], y: Array, g: Array) -> Gradients:
    axis, count = integer(node, "axis", 0) % x[0].ndim, x[1].ndim
    back = np.zeros_like(x[0])
    rows = np.moveaxis(g, range(axis, axis + count), range(count))
    np.add.at(np.moveaxis(back, axis, 0), x[1], rows)
    return [back]


def _resize(node: ir.Node, x: list[Array], y: Array, g: Array) -> Gradients:
    """Along each axis a product with a matrix, which resizing the unit matrix gives."""
    if y.ndim < 3 or y.shape[:2] != x[0].shape[:2] or len(x) < 2:
        raise InputError(f"no gradient is known of such a Resize ({ir.label(node)})")
    scales = x[-1] if x[-1].dtype.kind == "f" else np.zeros(0)
    for axis in range(2, y.ndim):
        if y.shape[axis] != x[0].shape[axis]:
            scale = float(scales[axis]) if scales.size else None
            matrix = _resizing(node, y.ndim, axis, x[0].shape[axis], y.shape[axis], scale)
            g = np.moveaxis(np.moveaxis(g, axis, -1) @ matrix.T, -1, axis)
    return [g]


def _resizing(
    node: ir.Node, rank: int, axis: int, size: int, result: int, scale: float | None
) -> Array:
    """What a Resize along one axis multiplies with [size, result]."""
    shape = [size, *[1] * (rank - 1)]
    shape[axis] = size
    sizes, scales = [*shape], [1.0] * rank
    sizes[axis], scales[axis] = result, scale or 1.0
    given: Array = np.array(sizes, np.int64) if scale is None else np.array(scales, np.float32)
    source = ir.Value(name="x", shape=ir.Shape(shape), type=ir.TensorType(ir.DataType.FLOAT))
    by = ir.Value(name="by", const_value=ir.tensor(given, name="by"))
    # Opset 11 asks for a region even where nothing reads it.
    empty = ir.Value(name="empty", const_value=ir.tensor(np.zeros(0, np.float32), name="empty"))
    operands = [source, *[empty] * (len(node.inputs) - 2), by]
    copy = ir.Node("", "Resize", operands, attributes=list(node.attributes.values()))
    made = copy.outputs[0]
    made.name, made.type = "y", source.type
    assert node.graph is not None
    opsets = {"": ir.opset(node.graph)}
    graph = ir.Graph([source], [made], nodes=[copy], initializers=[empty, by], opset_imports=opsets)
    model = ir.to_proto(ir.Model(graph, ir_version=8)).SerializeToString(deterministic=True)
    return _result(model, tuple(shape)).reshape(size, result)


@functools.lru_cache(maxsize=64)
def _result(model: bytes, shape: tuple[int, ...]) -> Array:
    """What a model of one input, in its file format, makes of the unit matrix in a shape."""
    unit = np.eye(max(shape), dtype=np.float32).reshape(shape)
    proto = onnx.ModelProto.FromString(model)
    return cast("Array", Runner(ir.from_proto(proto)).run({"x": unit})["y"])


MOVES: dict[str, Rule] = {
    "Concat": _concat,
    "CumSum": _running_sum,
    "DepthToSpace": _blocks,
    "Expand": _expand,
    "Flatten": _reshape,
    "Gather": _gather,
    "GlobalAveragePool": _mean,
    "GlobalMaxPool": _largest,
    "Pad": _pad,
    "ReduceL1": _length,
    "ReduceL2": _length,
    "ReduceLogSumExp": _length,
    "ReduceMax": _largest,
    "ReduceMean": _mean,
    "ReduceMin": _largest,
    "ReduceSum": _mean,
    "ReduceSumSquare": _length,
    "Reshape": _reshape,
    "Resize": _resize,
    "Slice": _slice,
    "SpaceToDepth": _blocks,
    "Split": _split,
    "Squeeze": _reshape,
    "Tile": _tile,
    "Transpose": _transpose,
    "Unsqueeze": _reshape,
}
"""Rules by operator."""
