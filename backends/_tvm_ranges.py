"""Inputs that are indices: what they may be, as compiled code looks things up without asking."""

from __future__ import annotations

from graphopt import ir
from graphopt.dims import as_int
from graphopt.shapes import Shapes

_MOVES = {"Cast", "Identity", "Reshape", "Unsqueeze", "Squeeze", "Flatten", "Transpose", "Expand"}


def index_ranges(model: ir.Model) -> dict[str, int]:
    """By the name of an integer input, the size of the smallest axis that it picks elements of.

    Such an input's elements are from minus that size to one below it. Indices that are computed
    are not in it: the compiled code takes the nearest element for those that are out of range.
    """
    shapes = Shapes(model)
    ranges: dict[str, int] = {}
    for value in model.graph.inputs:
        dtype = shapes.dtype(value)
        if dtype in (ir.DataType.INT32, ir.DataType.INT64):
            sizes = _sizes(value, shapes)
            if sizes:
                ranges[value.name or ""] = min(sizes)
    return ranges


def _sizes(value: ir.Value, shapes: Shapes) -> list[int]:
    sizes: list[int] = []
    for node, index in value.uses():
        if node.domain:
            continue
        if node.op_type in _MOVES and index == 0:
            sizes += _sizes(node.outputs[0], shapes)
        data = node.inputs[0]
        if node.op_type == "Gather" and index == 1 and data is not None:
            shape = shapes.shape(data)
            axis = node.attributes.get_int("axis", 0)
            size = None if not shape else as_int(shape[axis])
            if size is not None:
                sizes.append(size)
    return sizes
