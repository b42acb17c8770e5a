"""onnx-ir, imported without sympy, and the questions that every floor asks of a graph.

Everything else imports the IR from here (``from graphopt import ir``): the names below are
onnx-ir's own objects, not wrappers.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import logging
import operator
import sys
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import cast

import numpy as np
import numpy.typing as npt

from graphopt.collector import paused_gc


class _LazySympy(importlib.abc.MetaPathFinder):
    """Loads sympy on first use: onnx-ir needs it for dimension arithmetic that we do ourselves."""

    _LAZY = ("sympy", "onnx_ir._symbolic_shapes")

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name not in self._LAZY:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = importlib.util.LazyLoader(spec.loader)
        return spec


_finder = _LazySympy()
sys.meta_path.insert(0, _finder)
try:
    import onnx_ir
finally:
    sys.meta_path.remove(_finder)
# Without a handler of its own its warnings would go to the standard error output.
logging.getLogger("onnx_ir").addHandler(logging.NullHandler())

from onnx_ir import (  # noqa: E402
    Attr,
    AttributeType,
    DataType,
    Function,
    Graph,
    Model,
    Node,
    OptionalType,
    RefAttr,
    SequenceType,
    Shape,
    SymbolicDim,
    Tensor,
    TensorProtocol,
    TensorType,
    TypeProtocol,
    Value,
    convenience,
    from_proto,
    serde,
    tensor,
    to_proto,
    val,
)

__all__ = [
    "SOURCES",
    "STORED",
    "Array",
    "Attr",
    "AttributeType",
    "DataType",
    "Function",
    "Graph",
    "Model",
    "Node",
    "OptionalType",
    "RefAttr",
    "SequenceType",
    "Shape",
    "SymbolicDim",
    "Tensor",
    "TensorProtocol",
    "TensorType",
    "TypeProtocol",
    "Value",
    "all_nodes",
    "array",
    "attribute",
    "behind_identities",
    "constant",
    "constants",
    "convenience",
    "from_proto",
    "graphs",
    "label",
    "onnx_ir",
    "opset",
    "paused_gc",
    "scopes",
    "serde",
    "sources",
    "subgraphs",
    "tensor",
    "to_proto",
    "use_count",
    "val",
]

Array = npt.NDArray[np.generic]

SOURCES = "graphopt.sources"  # key of a node's `meta`: see `sources`
STORED = "graphopt.stored"  # key of `metadata_props` of nodes that unpack a weight: never folded

_CONSTANT_ATTRIBUTES = {
    "value_float": np.float32,
    "value_floats": np.float32,
    "value_int": np.int64,
    "value_ints": np.int64,
}


def subgraphs(node: Node) -> Iterator[Graph]:
    """The graphs that a node's attributes hold (bodies of If, Loop, Scan), in attribute order."""
    for attr in node.attributes.data.values():  # a plain dict: this runs for every node
        if attr.is_ref():
            continue
        if attr.type == AttributeType.GRAPH:
            yield attr.as_graph()
        elif attr.type == AttributeType.GRAPHS:
            yield from attr.as_graphs()


def scopes(model: Model) -> Iterator[tuple[Graph, Graph]]:
    """Every graph with its root: main graph, functions' graphs, and their subgraphs, outer first.

    The root is the main graph or a function's graph: it imports the opsets that the subgraph
    follows. A root other than `model.graph` cannot hold initializers.
    """
    roots = [model.graph, *(function.graph for function in model.functions.values())]
    stack = [(root, root) for root in reversed(roots)]
    while stack:
        graph, root = stack.pop()
        yield graph, root
        inner = [(sub, root) for node in graph for sub in subgraphs(node)]
        stack += reversed(inner)


def graphs(model: Model) -> Iterator[Graph]:
    """The main graph, every function's graph, and every subgraph of them, outer first."""
    return (graph for graph, _ in scopes(model))


def nested_nodes(model: Model) -> Iterator[Node]:
    """Every node of the main graph and of bodies in it, outer graphs first; none of functions."""
    for graph, root in scopes(model):
        if root is model.graph:
            yield from graph


def all_nodes(model: Model) -> Iterator[Node]:
    """Every node of `graphs(model)`, in graph order."""
    for graph in graphs(model):
        yield from graph


_uses_of = operator.attrgetter("_uses")


def use_count(value: Value) -> int:
    """How many node inputs take a value, in constant time.

    `Value.uses()` copies them all, which a constant that thousands of nodes share cannot afford.
    """
    return len(_uses_of(value))


def constant(value: Value | None) -> TensorProtocol | None:
    """The tensor a value always has, or None: an initializer or a Constant node's output.

    An initializer that is also a graph input is a default that the caller may override, so it is
    no constant (files of IR 3, where it must be listed, are normalized when they are loaded).
    """
    if value is None:
        return None
    if value.is_initializer():
        return None if value.is_graph_input() else value.const_value
    node = value.producer()
    if node is None or node.op_type != "Constant" or node.domain not in ("", "ai.onnx"):
        return None
    for name, attr in node.attributes.items():
        if attr.is_ref():
            return None
        if name == "value" and attr.type == AttributeType.TENSOR:
            return cast("TensorProtocol", attr.value)  # as_tensor() checks a protocol: 50 µs
        if name in _CONSTANT_ATTRIBUTES:
            return tensor(np.asarray(attr.value, _CONSTANT_ATTRIBUTES[name]))
        if name == "value_string":
            return onnx_ir.StringTensor(np.asarray(attr.as_string().encode(), object))
        if name == "value_strings":
            return onnx_ir.StringTensor([s.encode() for s in attr.as_strings()])
    return None


def behind_identities(value: Value) -> Value:
    """What a value is a copy of, through any number of Identities; itself where it is none."""
    while (node := value.producer()) is not None and node.op_type == "Identity":
        if node.domain or node.inputs[0] is None:
            break
        value = node.inputs[0]
    return value


def constants(model: Model) -> list[TensorProtocol]:
    """Every constant tensor of a model once, however many values share it."""
    found: dict[int, TensorProtocol] = {}
    for graph in graphs(model):
        made = (value for node in graph for value in node.outputs if node.op_type == "Constant")
        for value in (*graph.initializers.values(), *made):
            tensor = value.const_value if value.is_initializer() else constant(value)
            if tensor is not None:
                found[id(tensor)] = tensor
    return list(found.values())


def array(value: Value | None) -> Array | None:
    """`constant(value)` as a numpy array (ml_dtypes for bf16, fp8, int4 …), or None."""
    const = constant(value)
    return None if const is None else const.numpy()


def attribute(node: Node, name: str, default: object = None) -> object:
    """An attribute's plain Python value (bytes never: onnx-ir decodes strings), or `default`."""
    attr = node.attributes.get(name)
    return default if attr is None or attr.is_ref() else attr.value


def opset(root: Graph, domain: str = "") -> int:
    """The version of `domain` that the nodes below a root follow; 0 where it is not imported.

    A root is the main graph or a function: subgraphs import nothing of their own (see `scopes`).
    """
    imports = root.opset_imports
    return imports.get(domain, imports.get("ai.onnx", 0) if domain == "" else 0)


def label(node: Node) -> str:
    """How messages name a node: its name, or its first output's where it has none."""
    output = next((v.name for v in node.outputs if v.name), "")
    return node.name or f"{node.op_type}->{output}"


def sources(node: Node) -> tuple[str, ...]:
    """Labels of the nodes of the loaded file that this node was made from (lineage)."""
    meta = cast("dict[str, tuple[str, ...]]", node.meta)
    return meta.get(SOURCES) or (label(node),)
