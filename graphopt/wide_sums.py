"""A model with its longest sums taken in float64, which tells how far rounding carries them.

ONNX Runtime's InstanceNormalization adds up a channel's floats one after another: over 640,000 of
them its result lies 4e-3 of its scale from the exact one, and neither its optimizations nor other
inputs change that. Sums over whole axes have kernels for float64 there, sums of products have not.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from graphopt import files, ir
from graphopt.shapes import Shapes

_SUMS = ("ReduceMean", "ReduceSum", "ReduceSumSquare", "ReduceL2", "ReduceLogSumExp")
_AXES_ARE_INPUTS = 18
"""Opset from which on they are, for ReduceMean."""


def wide_sums(model: ir.Model) -> ir.Model | None:
    """A copy in which sums of float32 over axes are float64; None where there are none."""
    copy = files.copy(model)
    shapes = Shapes(copy)
    changed = False
    for node in list(ir.all_nodes(copy)):
        if node.domain or not node.inputs or node.inputs[0] is None:
            continue
        if shapes.dtype(node.inputs[0]) != ir.DataType.FLOAT:
            continue
        shape = shapes.shape(node.inputs[0])
        if node.op_type in _SUMS:
            made = _widened(node)
        elif node.op_type == "InstanceNormalization" and shape is not None:
            made = _normalized(node, len(shape), ir.opset(copy.graph))
        else:
            continue
        graph = node.graph
        assert graph is not None
        graph.insert_before(node, made)
        old, new = node.outputs[0], made[-1].outputs[0]
        old.replace_all_uses_with(new, replace_graph_outputs=True)
        old.name, new.name = f"{old.name}.narrow", old.name
        new.type, new.shape = old.type, old.shape
        graph.remove(node, safe=True)
        changed = True
    return copy if changed else None


def _widened(node: ir.Node) -> list[ir.Node]:
    """The same sum of a float64 operand."""
    wide = _node("Cast", node.inputs[0], to=ir.DataType.DOUBLE)
    total = ir.Node("", node.op_type, [wide.outputs[0], *node.inputs[1:]], node.attributes.values())
    return [wide, total, _node("Cast", total.outputs[0], to=ir.DataType.FLOAT)]


def _normalized(node: ir.Node, rank: int, opset: int) -> list[ir.Node]:
    """Instance normalization: scale * (x - mean) / sqrt(variance + epsilon) + bias."""
    x, scale, bias = node.inputs
    axes = np.arange(2, rank, dtype=np.int64)
    epsilon = float(str(ir.attribute(node, "epsilon", 1e-5)))
    nodes: list[ir.Node] = []

    def add(op: str, *inputs: ir.Value | None, **attributes: Any) -> ir.Value:
        nodes.append(_node(op, *inputs, **attributes))
        return nodes[-1].outputs[0]

    def constant(array: ir.Array) -> ir.Value:
        return add("Constant", value=ir.tensor(array))

    def mean(value: ir.Value) -> ir.Value:
        if opset < _AXES_ARE_INPUTS:
            return add("ReduceMean", value, axes=axes.tolist())
        return add("ReduceMean", value, constant(axes))

    def per_channel(value: ir.Value | None) -> ir.Value:
        shape = np.array([-1] + [1] * (rank - 2), np.int64)
        return add("Reshape", add("Cast", value, to=ir.DataType.DOUBLE), constant(shape))

    wide = add("Cast", x, to=ir.DataType.DOUBLE)
    centred = add("Sub", wide, mean(wide))
    variance = mean(add("Mul", centred, centred))
    deviation = add("Sqrt", add("Add", variance, constant(np.array(epsilon, np.float64))))
    scaled = add("Mul", add("Div", centred, deviation), per_channel(scale))
    add("Cast", add("Add", scaled, per_channel(bias)), to=ir.DataType.FLOAT)
    return nodes


def _node(op: str, *inputs: ir.Value | None, **attributes: Any) -> ir.Node:
    return ir.Node("", op, inputs, ir.convenience.convert_attributes(attributes))
