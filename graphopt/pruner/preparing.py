"""What has to hold of a model before its axes are traced: constants of their own for each use."""

from __future__ import annotations

import copy
from collections import Counter

from graphopt import ir
from graphopt.dims import Dim
from graphopt.shapes import Shapes

__all__ = ["prepare"]

_TIED_BYTES = 1 << 20
"""Larger matrices that several nodes use are taken to be tied on purpose, and stay one."""


def prepare(model: ir.Model) -> list[str]:
    """Get a model of the caller's own ready; the notes are for whoever reads the report.

    Constant nodes and small tensors whose elements are known become initializers. Initializers
    that are inputs too are no inputs any more: what a caller could override, nobody can prune.
    A constant that several nodes use becomes one each, without a copy of its data.
    """
    notes: list[str] = []
    listed = [value for value in model.graph.inputs if value.is_initializer()]
    for value in listed:
        model.graph.inputs.remove(value)
    if listed:
        notes.append(f"{len(listed)} initializers that were listed as inputs are constants now")
    names = Counter(value for graph in ir.graphs(model) for value in _names(graph))
    shapes = Shapes(model)
    for graph, root in ir.scopes(model):
        if root is model.graph:
            _lift(graph, shapes, names)
    for graph, root in ir.scopes(model):
        if root is model.graph:
            for value in list(graph.initializers.values()):
                _separate(graph, value, names)
    return notes


def _names(graph: ir.Graph) -> list[str]:
    outputs = [value.name for node in graph for value in node.outputs if value.name]
    return [*outputs, *graph.initializers, *(v.name for v in graph.inputs if v.name)]


def _free(names: Counter[str], hint: str) -> str:
    number = 0
    name = hint
    while names[name]:
        number += 1
        name = f"{hint}_{number}"
    names[name] += 1
    return name


def _lift(graph: ir.Graph, shapes: Shapes, names: Counter[str]) -> None:
    """Initializers in place of Constant nodes and of arithmetic whose result is known."""
    for node in list(graph):
        if len(node.outputs) != 1 or any(True for _ in ir.subgraphs(node)):
            continue
        output = node.outputs[0]
        if output.is_graph_output():
            continue
        tensor = ir.constant(output)
        if tensor is None:
            elements, dtype = shapes.values(output), shapes.dtype(output)
            if elements is None or dtype is None or not dtype.is_integer():
                continue
            if any(isinstance(element, Dim) for element in elements.ravel().tolist()):
                continue
            tensor = ir.tensor(elements.astype(dtype.numpy()))
        if tensor.dtype == ir.DataType.STRING:
            continue
        _place(graph, output, tensor, _free(names, f"{output.name}_value"))
        graph.remove(node, safe=True)


def _place(graph: ir.Graph, old: ir.Value, tensor: ir.TensorProtocol, name: str) -> ir.Value:
    made = _twin(_renamed(tensor, name), name)
    graph.register_initializer(made)
    old.replace_all_uses_with(made)
    return made


def _twin(tensor: ir.TensorProtocol, name: str) -> ir.Value:
    return ir.Value(
        name=name,
        shape=ir.Shape(tensor.shape.numpy()),
        type=ir.TensorType(tensor.dtype),
        const_value=tensor,
    )


def _separate(graph: ir.Graph, value: ir.Value, names: Counter[str]) -> None:
    tensor = value.const_value
    if tensor is None or value.is_graph_output():
        return
    uses = list(value.uses())
    if len(uses) < 2 or (len(tensor.shape) > 1 and tensor.nbytes > _TIED_BYTES):
        return
    for use in uses[1:]:
        name = _free(names, value.name or "constant")
        made = _twin(_renamed(tensor, name), name)
        graph.register_initializer(made)
        use.node.replace_input_with(use.idx, made)


def _renamed(tensor: ir.TensorProtocol, name: str) -> ir.TensorProtocol:
    twin = copy.copy(tensor)
    twin.name = name
    return twin
