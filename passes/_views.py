"""Operators that only rename the axes of a tensor: what they do, and one that does the same."""

from __future__ import annotations

from collections.abc import Sequence

from graphopt import ir
from graphopt.dims import DimLike, bounds
from graphopt.rewriting import Op

VIEWS = ("Reshape", "Flatten", "Squeeze", "Unsqueeze")
"""They keep every element at its place in row-major order."""

Dims = tuple[DimLike, ...]


def is_view(node: ir.Node | None) -> bool:
    """Whether a node is one of VIEWS."""
    return node is not None and node.op_type in VIEWS and node.domain == ""


def axes_arguments(op: Op, axes: Sequence[int]) -> tuple[list[Sequence[int]], dict[str, object]]:
    """Further inputs and attributes that tell Squeeze, Unsqueeze or ReduceSum its axes."""
    return ([list(axes)], {}) if op.opset >= 13 else ([], {"axes": list(axes)})


def inserted_axes(before: Dims, after: Dims) -> list[int] | None:
    """Where 1s go into `before` to give `after`, or None where that is not how they differ."""
    axes: list[int] = []
    position = 0
    for axis, dim in enumerate(after):
        left = len(before) - position
        if left and before[position] == dim and (dim != 1 or left == len(after) - axis):
            position += 1
        elif dim == 1:
            axes.append(axis)
        elif left and before[position] == dim:
            position += 1
        else:
            return None
    return axes if position == len(before) else None


def reshape_target(before: Dims, after: Dims) -> list[int] | None:
    """The shape operand that turns a tensor of shape `before` into one of shape `after`.

    Symbolic dimensions become 0 (the same axis) or -1 (what is left); None where that leaves two.
    """
    target: list[int] = []
    for axis, dim in enumerate(after):
        if isinstance(dim, int):
            if dim == 0:
                return None
            target.append(dim)
        else:
            target.append(0 if axis < len(before) and before[axis] == dim else -1)
    return target if target.count(-1) <= 1 else None


def reshaped(op: Op, value: ir.Value, after: Dims) -> ir.Value | None:
    """The value in another shape, by one node; None where no constant shape says it."""
    before = op.shape(value)
    if before is None:
        return None
    target = reshape_target(before, after)
    if target is not None and op.opset >= 5:  # before, the shape was an attribute
        return op.Reshape(value, target)
    return resqueezed(op, value, after)


def resqueezed(op: Op, value: ir.Value, after: Dims) -> ir.Value | None:
    """The value in another shape, by an Unsqueeze or a Squeeze; None where neither does it."""
    before = op.shape(value)
    if before is None:
        return None
    axes = inserted_axes(before, after)
    if axes:
        more, attributes = axes_arguments(op, axes)
        return op.Unsqueeze(value, *more, **attributes)
    axes = inserted_axes(after, before)
    if axes:
        more, attributes = axes_arguments(op, axes)
        return op.Squeeze(value, *more, **attributes)
    return None


def free_of_zeros(op: Op, node: ir.Node) -> bool:
    """Whether no element of a Reshape's shape operand means "copy from the input"."""
    if op.attr(node, "allowzero", 0):
        return True
    shape = node.inputs[1] if len(node.inputs) > 1 else None
    values = None if shape is None else op.values(shape)
    return values is not None and all(
        (v == -1 or v > 0) if isinstance(v, int) else bounds(v)[0] >= 0 for v in values.flat
    )
