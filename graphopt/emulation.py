"""float16 and bfloat16 without kernels for them: float32 arithmetic, rounded after each operator.

That is what hardware does too: products and sums are accumulated in float32, and each result is
rounded to nearest, ties to even. ONNX Runtime's CPU lacks most kernels of both; it refuses
bfloat16, and computes float16 in float32 without rounding in between, which hides what it costs.
"""

from __future__ import annotations

import numpy as np

from graphopt import files, ir
from graphopt.shapes import Shapes

HALVES = frozenset({ir.DataType.FLOAT16, ir.DataType.BFLOAT16})
_LONG = ir.DataType.FLOAT
_TYPED = ("to", "dtype", "output_datatype")
_UNROUNDED = ("Constant", "Identity", "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Concat")


def emulated(model: ir.Model) -> ir.Model:
    """A model that computes in float32 what `model` computes in 16 bits, rounding each result.

    Inputs, outputs and constants keep their names and values, inputs and outputs their types.
    Functions are left as they are. The model itself where it has nothing of 16 bits.
    """
    copy = files.copy(model)
    shapes = Shapes(copy)
    graphs = [graph for graph, root in ir.scopes(copy) if root is copy.graph]
    short = {
        value: kind
        for graph in graphs
        for value in (*graph.inputs, *graph.initializers.values(), *_made(graph))
        if (kind := shapes.dtype(value)) in HALVES and kind is not None
    }
    if not short:
        return model
    for graph in graphs:
        for value in graph.initializers.values():
            if value in short and value.const_value is not None and not value.is_graph_input():
                array = value.const_value.numpy().astype(np.float32)
                value.const_value = ir.tensor(array, name=value.name)
                value.type = ir.TensorType(_LONG)
        for value in graph.inputs:
            if value in short:
                _widen_input(value, graph, copy.graph)
        for node in list(graph):
            _widen_node(node, short)
    for value in list(copy.graph.outputs):
        if value in short and value.producer() is not None:
            narrow = _cast(value, short[value], f"{value.name}.narrow")
            copy.graph.append(narrow)
            _take_place(copy.graph, value, narrow.outputs[0])
    return copy


_FLOATS = HALVES | {_LONG, ir.DataType.DOUBLE}


def with_types_of(model: ir.Model, like: ir.Model) -> ir.Model:
    """The model with casts at inputs and outputs whose floating point type is another in `like`.

    The model itself where there is none: so that both take the same feeds and can be compared.
    """
    pairs = [
        (kind, one.name)
        for kind in ("inputs", "outputs")
        for one, other in zip(getattr(model.graph, kind), getattr(like.graph, kind), strict=False)
        if one.name == other.name and one.dtype != other.dtype
        if one.dtype in _FLOATS and other.dtype in _FLOATS
    ]
    if not pairs:
        return model
    copy = files.copy(model)
    graph = copy.graph
    for value, other in zip(list(graph.inputs), like.graph.inputs, strict=False):
        if ("inputs", value.name) in pairs and value.dtype is not None:
            uses = list(value.uses())
            cast = _cast(value, value.dtype, f"{value.name}.fed")
            graph.insert_before(graph[0], cast)
            for use in uses:
                use.node.replace_input_with(use.idx, cast.outputs[0])
            value.type = other.type
    for value, other in zip(list(graph.outputs), like.graph.outputs, strict=False):
        if ("outputs", value.name) in pairs and other.dtype is not None:
            cast = _cast(value, other.dtype, f"{value.name}.given")
            graph.append(cast)
            _take_place(graph, value, cast.outputs[0])
    return copy


def _made(graph: ir.Graph) -> list[ir.Value]:
    return [value for node in graph for value in node.outputs if value.name]


def _widen_input(value: ir.Value, graph: ir.Graph, root: ir.Graph) -> None:
    if graph is not root:
        value.type = ir.TensorType(_LONG)
        return
    uses = list(value.uses())
    wide = _cast(value, _LONG, f"{value.name}.wide")
    if len(graph):
        graph.insert_before(graph[0], wide)
    else:
        graph.append(wide)
    for use in uses:
        use.node.replace_input_with(use.idx, wide.outputs[0])


def _widen_node(node: ir.Node, short: dict[ir.Value, ir.DataType]) -> None:
    """Let a node make float32, and round that."""
    made = [value for value in node.outputs if value in short]
    for name in _TYPED:
        kind = ir.attribute(node, name)
        if isinstance(kind, int) and kind in HALVES:
            node.attributes[name] = ir.Attr(name, ir.AttributeType.INT, int(_LONG))
    attr = node.attributes.get("value")
    if made and attr is not None and attr.type == ir.AttributeType.TENSOR:
        array = attr.as_tensor().numpy().astype(np.float32)
        node.attributes["value"] = ir.Attr("value", attr.type, ir.tensor(array))
    graph = node.graph
    assert graph is not None
    for value in made:
        value.type = ir.TensorType(_LONG)
        if any(True for _ in ir.subgraphs(node)) or node.op_type in _UNROUNDED:
            continue
        uses = list(value.uses())
        narrow = _cast(value, short[value], f"{value.name}.rounded")
        wide = _cast(narrow.outputs[0], _LONG, f"{value.name}.wide")
        graph.insert_after(node, [narrow, wide])
        for use in uses:
            use.node.replace_input_with(use.idx, wide.outputs[0])
        if value.is_graph_output():
            _take_place(graph, value, wide.outputs[0])
            short[wide.outputs[0]] = short[value]


def _take_place(graph: ir.Graph, old: ir.Value, new: ir.Value) -> None:
    """Let a graph put out another value under the same name."""
    for index, output in enumerate(graph.outputs):
        if output is old:
            graph.outputs[index] = new
    old.name, new.name = new.name, old.name


def _cast(value: ir.Value, kind: ir.DataType, name: str) -> ir.Node:
    node = ir.Node("", "Cast", [value], [ir.Attr("to", ir.AttributeType.INT, int(kind))], name=name)
    node.outputs[0].name, node.outputs[0].type = name, ir.TensorType(kind)
    node.outputs[0].shape = value.shape
    return node
