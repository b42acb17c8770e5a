"""Models from ONNX's text form, for tests."""

from __future__ import annotations

import onnx

from graphopt import files, ir

HEADER = '<ir_version: 10, opset_import: ["" : 20]>\n'


def proto(text: str) -> onnx.ModelProto:
    """A model of the text of a graph, with a header in front unless the text has one."""
    text = text.strip()
    return onnx.parser.parse_model(text if text.startswith("<") else HEADER + text)


def model(text: str) -> ir.Model:
    """`proto`, loaded."""
    return files.load(proto(text))
