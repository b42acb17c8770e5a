"""Small models for tests."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from graphopt import files, ir
from tests._text import proto

onnx: Any = importlib.import_module("onnx")
Array = npt.NDArray[Any]


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


def normal(size: int, seed: int = 0) -> Array:
    """Standard normal numbers."""
    return np.random.default_rng(seed).standard_normal(size).astype(np.float32)


def network(channels: int = 16, size: int = 16) -> ir.Model:
    """Convolutions, bounds, a residual, pools and a classifier, with random weights."""
    c = channels
    made: Any = proto(
        f"""net (float[1,3,{size},{size}] x) => (float[1,10] y)
        <float lo = {{0.0}}, float hi = {{6.0}}> {{
        a = Conv <pads = [1, 1, 1, 1]> (x, w1, b1)
        r = Relu (a)
        d = Conv <pads = [1, 1, 1, 1], group = {c}> (r, w2)
        k = Clip (d, lo, hi)
        e = Conv (k, w3)
        s = Add (e, r)
        t = Relu (s)
        m = MaxPool <kernel_shape = [2, 2], strides = [2, 2]> (t)
        n = Conv (m, w3)
        p = GlobalAveragePool (n)
        f = Flatten (p)
        y = Gemm <transB = 1> (f, w4, b4) }}"""
    )
    shapes = {"w1": (c, 3, 3, 3), "b1": (c,), "w2": (c, 1, 3, 3), "w3": (c, c, 1, 1)}
    shapes |= {"w4": (10, c), "b4": (10,)}
    for seed, (name, shape) in enumerate(shapes.items()):
        scale = np.float32((2 / max(1, int(np.prod(shape[1:])))) ** 0.5)
        array = normal(int(np.prod(shape)), seed).reshape(shape) * scale
        made.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    return files.load(made)


def images(count: int = 24, size: int = 16) -> dict[str, Array]:
    """Samples for `network`."""
    return {"x": normal(count * 3 * size * size, 9).reshape(count, 3, size, size)}
