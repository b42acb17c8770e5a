"""LSTMs that multiply in integers: ONNX Runtime's DynamicQuantizeLSTM (ContribOperators.md).

Each row of the weights, so each gate of each unit, has its own scale; ranges of activations are
those of run time. GRU and RNN have no such kernel: their weights alone can have few bits, which
saves room and costs time (`quantize-weights`).
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np

from graphopt import ir
from graphopt.context import Context
from graphopt.driver import remove, replace_value
from graphopt.quantizer.constants import constant_value, drop_unused

__all__ = ["integer_lstms", "lstms"]

_SMALLEST = 1 << 16  # weights: below, integers take as long as floats
_MATRICES = (1, 2)
"""The inputs that are weights: of what comes in, and of the state."""


def lstms(context: Context, keep: Collection[str] = ()) -> list[ir.Node]:
    """Those of the main graph that integers make faster on the context's target."""
    if "com.microsoft" not in context.target.domains:
        return []
    return [
        node
        for node in context.model.graph
        if node.op_type == "LSTM" and not node.domain and ir.label(node) not in keep
        if not ir.attribute(node, "layout", 0)
        if sum(_size(node.inputs[index]) for index in _MATRICES) >= _SMALLEST
        if all(_size(node.inputs[index]) for index in _MATRICES)
    ]


def _size(value: ir.Value | None) -> int:
    """How many weights there are, in a float32 constant."""
    tensor = ir.constant(value)
    return tensor.size if tensor is not None and tensor.dtype == ir.DataType.FLOAT else 0


def integer_lstms(context: Context, keep: Collection[str] = ()) -> bool:
    """Put integer LSTMs in the place of float ones; whether there were any."""
    found = lstms(context, keep)
    for node in found:
        label = ir.label(node)
        context.changed("8 bits", [label], [_replaced(context, node)])
    return bool(found)


def _replaced(context: Context, node: ir.Node) -> ir.Node:
    """A DynamicQuantizeLSTM in the place of an LSTM."""
    graph = node.graph
    assert graph is not None
    inputs: list[ir.Value | None] = [*node.inputs, *[None] * (8 - len(node.inputs))]
    old = [inputs[index] for index in _MATRICES]
    for index in _MATRICES:
        array, value = ir.array(inputs[index]), inputs[index]
        assert array is not None and value is not None
        weights = array.astype(np.float32)
        reach = np.abs(weights).max(axis=2)
        scale = np.where(reach > 0, reach / 127, 1.0).astype(np.float32)
        whole = np.rint(weights / scale[:, :, None]).astype(np.int8)
        turned = np.ascontiguousarray(whole.transpose(0, 2, 1))
        hint = value.name or "weight"
        inputs[index] = constant_value(context, graph, turned, f"{hint}_quantized")
        inputs.append(constant_value(context, graph, scale, f"{hint}_scale"))
        zero = np.zeros(scale.shape, np.int8)
        inputs.append(constant_value(context, graph, zero, f"{hint}_zero_point"))
    attributes = [attr for name, attr in node.attributes.items() if name != "layout"]
    made = ir.Node(
        "com.microsoft",
        "DynamicQuantizeLSTM",
        inputs,
        attributes,
        num_outputs=len(node.outputs),
        name=context.unique_node(f"{ir.label(node)}_integers"),
    )
    made.meta[ir.SOURCES] = ir.sources(node)
    for new, was in zip(made.outputs, node.outputs, strict=True):
        new.name = context.unique(f"{was.name}_integers") if was.name else ""
        new.type, new.shape = was.type, was.shape
    context.root(graph).opset_imports.setdefault("com.microsoft", 1)
    graph.insert_before(node, made)
    context.shapes.update(made, context.root(graph))
    for was, new in zip(list(node.outputs), made.outputs, strict=True):
        if was.uses() or was.is_graph_output():
            replace_value(context, was, new, fresh=True)
    remove(context, node)
    for value in old:
        assert value is not None
        drop_unused(context, value)
    return made
