"""Small models for tests."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

from graphopt import ir

onnx: Any = importlib.import_module("onnx")


def parse(text: str, opset: int = 20) -> ir.Model:
    """A model from its text without the header, sound or not."""
    head = f'<ir_version: 9, opset_import: ["" : {opset}]>\n'
    return ir.serde.deserialize_model(onnx.parser.parse_model(head + text))


def node_model(
    op: str, inputs: Sequence[ir.Array | None], opset: int, outputs: int, **attributes: Any
) -> Any:
    """A ModelProto of one node whose inputs are initializers."""
    names = [f"i{k}" if a is not None else "" for k, a in enumerate(inputs)]
    results = [f"o{k}" for k in range(outputs)]
    node = onnx.helper.make_node(op, names, results, **attributes)
    graph = onnx.helper.make_graph(
        [node],
        "g",
        [],
        [onnx.ValueInfoProto(name=name) for name in results],
        [onnx.numpy_helper.from_array(a, n) for a, n in zip(inputs, names, strict=True) if n],
    )
    imports = [onnx.helper.make_opsetid("", opset)]
    return onnx.helper.make_model(graph, opset_imports=imports, ir_version=9)
