"""Equalization of channels: what it finds, and that it gives lost bits back."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from graphopt import files, ir
from graphopt.context import Context
from graphopt.gram import weight_matrix
from graphopt.quantizer.equalization import equalize
from graphopt.runner import Runner
from tests._text import proto

onnx: Any = pytest.importorskip("onnx")


def chain(scales: Any) -> ir.Model:
    """Conv → Relu → Conv, whose inner channels are spread without changing the function."""
    rng = np.random.default_rng(0)
    w = rng.standard_normal((16, 8, 3, 3)) / scales.reshape(-1, 1, 1, 1)
    v = rng.standard_normal((8, 16, 3, 3)) * scales.reshape(1, -1, 1, 1)
    made: Any = proto(
        "net (float[1,8,9,9] x) => (float[1,8,5,5] y) "
        "{ c = Conv (x, w) r = Relu (c) y = Conv (r, v) }"
    )
    for name, array in (("w", w), ("v", v)):
        made.graph.initializer.append(onnx.numpy_helper.from_array(array.astype(np.float32), name))
    return files.load(made)


def rounded(model: ir.Model) -> ir.Model:
    """A copy with weights of 8 bits and one scale per tensor."""
    copy = files.copy(model)
    for node in copy.graph:
        weights = ir.array(node.inputs[1]) if node.op_type == "Conv" else None
        if weights is not None:
            matrix = weight_matrix(node, weights)
            step = float(np.abs(matrix).max()) / 127
            value = node.inputs[1]
            assert value is not None
            near = (np.rint(matrix / step) * step).astype(np.float32)
            value.const_value = ir.tensor(near.reshape(weights.shape))
    return copy


def error(model: ir.Model, other: ir.Model) -> float:
    """Noise over signal, in dB (negative is good)."""
    feeds = {"x": np.random.default_rng(5).standard_normal((1, 8, 9, 9)).astype(np.float32)}
    a, b = Runner(model).run(feeds)["y"], Runner(other).run(feeds)["y"]
    return float(10 * np.log10(((a - b) ** 2).sum() / (a**2).sum()))


def test_spread_channels_are_brought_together() -> None:
    """As many bits after it as without the spread; the function is the same."""
    plain = chain(np.ones(16))
    spread = chain(10 ** np.random.default_rng(1).uniform(-1.5, 1.5, 16))
    context = Context(files.copy(spread))
    assert equalize(context) == 16
    assert error(plain, context.model) < -110
    assert error(plain, rounded(spread)) > -25
    assert error(plain, rounded(context.model)) < -35
    assert equalize(context) == 0
