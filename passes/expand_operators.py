"""Replace operators by what the ONNX standard says that they are made of.

Why: a backend without Attention, RMSNormalization or a loss has the parts of it.
Numerics: rounding.
Needs: a definition by a function for the model's opset, and known types where that depends on them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import onnx

from graphopt import ir
from graphopt.context import Context
from graphopt.driver import is_used
from graphopt.pass_manager import Pass
from graphopt.passes._inlining import below, inline, obstacle

_COMPOSITE = (
    *("AffineGrid", "Attention", "BlackmanWindow", "CausalConvWithState", "Celu", "CenterCropPad"),
    *("Gelu", "HammingWindow", "HannWindow", "HardSwish", "LinearAttention", "Mish"),
    *("NegativeLogLikelihoodLoss", "RMSNormalization", "RotaryEmbedding", "Shrink"),
    *("SoftmaxCrossEntropyLoss", "SwiGLU", "Swish", "ThresholdedRelu"),
)
"""Those whose definition consists of simpler operators than they are.

Without LayerNormalization and its like: the standard defines their variance by a difference of
squares, which cancels.
"""


_FUSIONS = {
    "Attention": "fuse-attention",
    "Gelu": "fuse-gelu",
    "RMSNormalization": "fuse-rmsnorm",
    "RotaryEmbedding": "fuse-rotary",
}


@dataclass(frozen=True)
class ExpandOperators(Pass):
    """Expands operators, those in bodies included, down to what has no such definition."""

    operators: tuple[str, ...] = _COMPOSITE
    max_nodes: int = 200_000
    """How many nodes may come of it."""

    @property
    def undoes(self) -> frozenset[str]:
        return frozenset(_FUSIONS[name] for name in self.operators if name in _FUSIONS)

    def run(self, context: Context) -> None:
        left = self.max_nodes
        refused: set[ir.Node] = set()
        while True:
            nodes = [
                node
                for node in below(context.model.graph)
                if node.op_type in self.operators and not node.domain and node not in refused
            ]
            expanded = False
            for node in nodes:
                if context.exhausted or left <= 0:
                    return
                made = _expand(context, node)
                if isinstance(made, str):
                    refused.add(node)
                    context.record.refuse(node, made)
                else:
                    left -= len(made)
                    expanded = True
            if not expanded:
                return
            context.refresh()


def _expand(context: Context, node: ir.Node) -> Sequence[ir.Node] | str:
    """The nodes that stand in for one, or why it stays."""
    function = _definition(context, node)
    if isinstance(function, str):
        return function
    assert node.graph is not None
    root = context.root(node.graph)
    return obstacle(context, node, function, root) or inline(
        context, node, function, root, "definition"
    )


def _definition(context: Context, node: ir.Node) -> ir.Function | str:
    opset = context.opset(node)
    try:
        schema: Any = onnx.defs.get_schema(node.op_type, opset)
    except onnx.defs.SchemaError:
        return f"opset {opset} has no {node.op_type}"
    versions = schema.function_opset_versions or schema.context_dependent_function_opset_versions
    version = max((v for v in versions if v <= opset), default=None)
    if version is None:
        return f"{node.op_type} of opset {opset} is not defined by other operators"
    try:
        if schema.has_function:
            body = schema.get_function_with_opset_version(version)
        else:
            body = schema.get_context_dependent_function_with_opset_version(
                version, ir.serde.serialize_node(node).SerializeToString(), _types(context, node)
            )
    except RuntimeError as error:  # of types or constants that the definition depends on
        return f"its definition cannot be had: {error}"
    proto = onnx.FunctionProto.FromString(body)
    made = {*proto.input, *(name for inner in proto.node for name in inner.output)}
    missing = [index for index, name in enumerate(proto.output) if name not in made]
    if any(is_used(node.outputs[index]) for index in missing if index < len(node.outputs)):
        return f"the definition of {node.op_type} leaves an output out"
    del proto.output[len(node.outputs) :]
    for index in missing:  # among outputs that the node leaves out
        if index < len(proto.output):
            proto.node.add(op_type="Identity", input=proto.input[:1], output=[proto.output[index]])
    for name in list(proto.attribute):
        default = schema.attributes[name].default_value
        if default.name:
            proto.attribute.remove(name)
            proto.attribute_proto.append(default)
    for inner in proto.node:
        for attribute in inner.attribute:
            if attribute.HasField("t"):  # as files have them: in bytes
                array = onnx.numpy_helper.to_array(attribute.t)
                attribute.t.CopyFrom(onnx.numpy_helper.from_array(array))
    return ir.serde.deserialize_function(proto)


def _types(context: Context, node: ir.Node) -> list[bytes]:
    """The inputs' types, serialized; an empty one where an input is left out or unknown."""
    types: list[bytes] = []
    for value in node.inputs:
        proto = onnx.TypeProto()
        dtype = None if value is None else context.shapes.dtype(value)
        if value is not None and dtype is not None:
            shape = context.shapes.shape(value)
            sizes = None if shape is None else [d if isinstance(d, int) else str(d) for d in shape]
            proto = onnx.helper.make_tensor_type_proto(int(dtype), sizes)
        types.append(proto.SerializeToString())
    return types
