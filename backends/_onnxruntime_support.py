"""Which nodes ONNX Runtime refuses, found by asking it: of the whole model, then of each node."""

from __future__ import annotations

from collections.abc import Callable

from graphopt import files, ir
from graphopt.shapes import Shapes

_SMALL_BYTES = 1 << 16
"""Weights above become inputs: no kernel looks at their values when a session is made."""
_GUESSES = (ir.DataType.FLOAT, ir.DataType.INT64, ir.DataType.BOOL)
"""What comes out of an unknown operator may be any of these: refused means refused with each."""
_IR_VERSION = 10


def unsupported(model: ir.Model, refusal: Callable[[bytes], str | None]) -> dict[str, str]:
    """Reasons by node label; empty where `refusal` (of a serialized model) has none.

    A refusal that no single node explains is given under the model's own name.
    """
    whole = refusal(files.to_proto(_without_weights(model)).SerializeToString())
    if whole is None:
        return {}
    shapes = Shapes(model)
    reasons: dict[str, str] = {}
    for graph, root in ir.scopes(model):
        for node in graph:
            is_call = node.op_identifier() in model.functions
            if is_call or any(True for _ in ir.subgraphs(node)):
                continue  # what is inside is looked at by itself
            known = all(shapes.dtype(v) is not None for v in node.inputs if v is not None)
            refusals = [
                refusal(files.to_proto(_alone(node, root, shapes, guess)).SerializeToString())
                for guess in (_GUESSES[:1] if known else _GUESSES)
            ]
            if refusals[0] is not None and all(refusals):
                reasons[ir.label(node)] = refusals[0]
    return reasons or {model.graph.name or "the model": whole}


def _without_weights(model: ir.Model) -> ir.Model:
    """The model with its large initializers as inputs, so that asking costs no memory."""
    light = files.copy(model)
    for name, value in list(light.graph.initializers.items()):
        tensor = value.const_value
        if tensor is not None and tensor.nbytes > _SMALL_BYTES and not value.is_graph_input():
            value.type = ir.TensorType(tensor.dtype)
            value.shape = ir.Shape(tensor.shape.numpy())
            value.const_value = None
            del light.graph.initializers[name]
            light.graph.inputs.append(value)
    return light


def _alone(node: ir.Node, root: ir.Graph, shapes: Shapes, guess: ir.DataType) -> ir.Model:
    """A model of this node only, with what is known of its inputs, and a guess at other dtypes."""
    fed: dict[str, ir.Value] = {}
    initializers: list[ir.Value] = []
    inputs: list[ir.Value | None] = []
    for index, old in enumerate(node.inputs):
        if old is None:
            inputs.append(None)
            continue
        name = old.name or f"input_{index}"
        if name not in fed:
            shape, dtype, tensor = shapes.shape(old), shapes.dtype(old), ir.constant(old)
            small = tensor is not None and tensor.nbytes <= _SMALL_BYTES
            fed[name] = ir.Value(
                name=name,
                shape=None
                if shape is None
                else ir.Shape([d if isinstance(d, int) else str(d) for d in shape]),
                type=(old.type or ir.TensorType(guess)) if dtype is None else ir.TensorType(dtype),
                const_value=tensor if small else None,
            )
            if small:
                initializers.append(fed[name])
        inputs.append(fed[name])
    outputs = [ir.Value(name=old.name, type=old.type) for old in node.outputs]
    alone = ir.Node(
        node.domain,
        node.op_type,
        inputs,
        node.attributes.values(),
        overload=node.overload,
        outputs=outputs,
        name=node.name,
    )
    graph = ir.Graph(
        [value for value in fed.values() if value not in initializers],
        [value for value in outputs if value.name],
        nodes=[alone],
        initializers=initializers,
        opset_imports=dict(root.opset_imports),
        name="alone",
    )
    return ir.Model(graph, ir_version=_IR_VERSION)
