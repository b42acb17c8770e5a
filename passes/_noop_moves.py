"""Operators on shapes and places that move nothing: views, slices, pads, pools, reductions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from graphopt import ir
from graphopt.dims import DimLike
from graphopt.passes._noop_values import same_shape
from graphopt.passes._views import axes_arguments
from graphopt.rewriting import Op, Rule, rewrite

_END = 2**31 - 1  # what exporters write for "to the end"
_SHIFTED = ("tf_crop_and_resize", "tf_half_pixel_for_nn")


@rewrite.on("Identity")
def identity(op: Op, node: ir.Node) -> ir.Value | None:
    """Identity; it stays between a graph input and a graph output."""
    return node.inputs[0]


@rewrite.on("Reshape", "Flatten", "Squeeze", "Unsqueeze", "Expand", "Tile", "CenterCropPad")
def same_shape_as_before(op: Op, node: ir.Node) -> ir.Value | None:
    """A view, Expand or Tile to the shape that the input has."""
    value = node.inputs[0]
    if value is None:
        return None
    if same_shape(op, value, node.outputs[0]):
        return value
    before, after = op.shape(value), op.shape(node.outputs[0])
    if node.op_type == "Reshape" and before is not None and after is not None:
        return value if _one_left(before, after) else None
    return None


def _one_left(before: Sequence[DimLike], after: Sequence[DimLike]) -> bool:
    """Equal element counts make the last dimension equal where all others are, and not zero."""
    pairs = list(zip(before, after, strict=False))
    differing = [1 for a, b in pairs if a != b]
    positive = all(isinstance(a, int) and a > 0 for a, b in pairs if a == b)
    return len(before) == len(after) and len(differing) == 1 and positive


@rewrite.on("Transpose")
def unmoved_axes(op: Op, node: ir.Node) -> ir.Value | None:
    """Transpose that leaves every axis in its place."""
    value, perm = node.inputs[0], op.attr(node, "perm")
    if value is None or (perm is None and "perm" in node.attributes):
        return None
    if perm is None:
        rank = op.rank(value)
        return value if rank is not None and rank < 2 else None
    return value if list(perm) == list(range(len(perm))) else None


@rewrite.on("Slice")
def whole_slice(op: Op, node: ir.Node) -> ir.Value | None:
    """Slice from the first to the last element, forwards."""
    value = node.inputs[0]
    steps = [1] if op.opset < 10 else _values(op, node, 4, [1])
    if value is None or steps is None or any(step != 1 for step in steps):
        return None
    if same_shape(op, value, node.outputs[0]):
        return value
    starts = op.attr(node, "starts") if op.opset < 10 else _values(op, node, 1)
    ends = op.attr(node, "ends") if op.opset < 10 else _values(op, node, 2)
    if starts is None or ends is None or any(start != 0 for start in starts):
        return None
    return value if all(isinstance(end, int) and end >= _END for end in ends) else None


@rewrite.on("Pad")
def no_pads(op: Op, node: ir.Node) -> ir.Value | None:
    """Pad by zero everywhere."""
    if op.opset < 11:
        pads = op.attr(node, "pads", op.attr(node, "paddings"))
    else:
        pads = _values(op, node, 1)
    return None if pads is None or any(pad != 0 for pad in pads) else node.inputs[0]


@rewrite.on("Resize", "Upsample")
def same_size(op: Op, node: ir.Node) -> ir.Value | None:
    """Resize by 1, or to the size it has, where pixels are not counted from elsewhere."""
    value = node.inputs[0]
    if value is None or op.attr(node, "coordinate_transformation_mode") in _SHIFTED:
        return None
    if len(node.inputs) > 3 and node.inputs[3] is not None:
        return value if same_shape(op, value, node.outputs[0]) else None
    index = 2 if node.op_type == "Resize" and op.opset >= 11 else 1
    scales = _values(op, node, index) if len(node.inputs) > index else op.attr(node, "scales")
    return value if scales is not None and all(scale == 1 for scale in scales) else None


@rewrite.on("Concat")
def concat_of_one(op: Op, node: ir.Node) -> ir.Value | None:
    """Concat of one tensor, or of others that have no elements."""
    axis = op.attr(node, "axis", 1)
    kept = [value for value in node.inputs if value is not None and not _empty(op, value, axis)]
    if len(kept) <= 1:
        return kept[0] if kept else node.inputs[0]
    return op.Concat(*kept, axis=axis) if len(kept) < len(node.inputs) else None


def _empty(op: Op, value: ir.Value, axis: int) -> bool:
    shape = op.shape(value)
    return shape is not None and -len(shape) <= axis < len(shape) and shape[axis] == 0


@rewrite.on("Split")
def split_into_one(op: Op, node: ir.Node) -> ir.Value | None:
    """Split with one output."""
    return node.inputs[0] if len(node.outputs) == 1 else None


@rewrite.on("Gather")
def gather_all(op: Op, node: ir.Node) -> ir.Value | None:
    """Gather of every index in order."""
    value = node.inputs[0]
    indices = op.const(node.inputs[1])
    shape = None if value is None else op.shape(value)
    axis = op.attr(node, "axis", 0)
    if not shape or indices is None or indices.ndim != 1 or not -len(shape) <= axis < len(shape):
        return None
    size = len(indices)
    if shape[axis] != size:
        return None
    return value if np.array_equal(indices.astype(np.int64) % size, np.arange(size)) else None


@rewrite.on("AveragePool", "MaxPool", "GlobalAveragePool", "GlobalMaxPool")
def pool_of_one(op: Op, node: ir.Node) -> ir.Value | None:
    """Pooling whose window is one element and goes over all of them."""
    value = node.inputs[0]
    if node.op_type.startswith("Global"):
        shape = None if value is None else op.shape(value)
        return value if shape is not None and all(size == 1 for size in shape[2:]) else None
    kernel = op.attr(node, "kernel_shape")
    if kernel is None or any(size != 1 for size in kernel):
        return None
    if any(op.attr(node, "pads", ())) or any(s != 1 for s in op.attr(node, "strides", ())):
        return None
    return value


@rewrite.on("DepthToSpace", "SpaceToDepth")
def blocks_of_one(op: Op, node: ir.Node) -> ir.Value | None:
    """Blocks of one element."""
    return node.inputs[0] if op.attr(node, "blocksize") == 1 else None


_PLAIN = ("ReduceSum", "ReduceMean", "ReduceMax", "ReduceMin", "ReduceProd", "ReduceLogSumExp")


@rewrite.on(*_PLAIN, "ReduceL1", "ReduceL2")
def reduce_nothing(op: Op, node: ir.Node) -> ir.Value | None:
    """Reduction over axes of size 1, or over none; a Squeeze where the axes go."""
    value = node.inputs[0]
    axes: Any = op.attr(node, "axes", ())
    if len(node.inputs) > 1 and node.inputs[1] is not None:
        axes = _values(op, node, 1)
    shape = None if value is None else op.shape(value)
    if value is None or axes is None or any(not isinstance(axis, int) for axis in axes):
        return None
    if not len(axes) and op.attr(node, "noop_with_empty_axes", 0):
        return value if node.op_type in _PLAIN else None
    if shape is None or any(not -len(shape) <= axis < len(shape) for axis in axes):
        return None
    reduced = sorted(axis % len(shape) for axis in axes) if len(axes) else range(len(shape))
    if any(shape[axis] != 1 for axis in reduced):
        return None
    if node.op_type not in _PLAIN:
        value = op.Abs(value)
    if op.attr(node, "keepdims", 1) or not shape:
        return value
    more, attributes = axes_arguments(op, list(reduced))
    return op.Squeeze(value, *more, **attributes)


@rewrite.on("OptionalGetElement")
def optional_of_value(op: Op, node: ir.Node) -> ir.Value | None:
    """The element of an Optional that was just made of it."""
    value = node.inputs[0]
    made = None if value is None else value.producer()
    return made.inputs[0] if made is not None and made.op_type == "Optional" else None


def _values(op: Op, node: ir.Node, index: int, default: Any = None) -> Any:
    """Elements of an input, in order, where they are followed; `default` where it is absent."""
    value = node.inputs[index] if index < len(node.inputs) else None
    if value is None:
        return default
    values = op.values(value)
    if values is None:
        values = op.const(value)
    elements: Any = None if values is None else values.ravel().tolist()
    return elements


RULES: tuple[Rule, ...] = (
    identity,
    same_shape_as_before,
    unmoved_axes,
    whole_slice,
    no_pads,
    same_size,
    concat_of_one,
    split_into_one,
    gather_all,
    pool_of_one,
    blocks_of_one,
    reduce_nothing,
    optional_of_value,
)
