"""Models of free sizes through TVM: how their kernels are written, and what they compute."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np

from graphopt import compilation
from tests.test_tvm import CPU, expected, needs_tvm, random, with_weights
from tests.test_tvm_kernels import lowered

_HALVED = """
    g (float[batch,3,high,wide] x, float[] a, float[] d, float[] p) => (float y) {
        one = Conv <strides = [2, 2], pads = [1, 1, 1, 1]> (x, a)
        two = Conv <strides = [2, 2], pads = [1, 1, 1, 1], group = 8> (one, d)
        three = Conv (two, p) four = Relu (three) five = Conv (four, p) y = Add (three, five)
    }"""
"""Sizes that are computed of others, twice."""


@needs_tvm
def test_computed_sizes(tmp_path: Path) -> None:
    """A kernel has a variable for each, and no divisions where it writes a row."""
    weights = {"a": random(8, 3, 3, 3), "d": random(8, 1, 3, 3), "p": random(8, 8, 1, 1)}
    model = with_weights(_HALVED, **weights)
    kernels, _, log = lowered(model)
    assert set(log.rules.values()) <= {"product", "stages"}, log.rules
    assert sum(rule == "product" for rule in log.rules.values()) == 4
    products = [
        function.script()
        for name, function in kernels.functions.items()
        if log.rules.get(name.name_hint) == "product"
    ]
    for text in products:
        assert not re.search(r"T\.Buffer\([^)]*//", text)
        stores = [line for line in text.splitlines() if "] = " in line]
        assert stores and not any("% size_" in line for line in stores)
    folder, options = tmp_path / "a", {"threads": 4}
    compilation.compile(model, CPU, folder, backend="tvm", options=options, level=0, verify="off")
    assert not json.loads((folder / "kernels.json").read_text())["unscheduled"]
    executable = compilation.load(folder, trust=True)
    for shape in ((1, 3, 1, 1), (2, 3, 9, 30), (1, 3, 64, 47)):
        feeds = {"x": random(*shape)}
        found = executable.run(feeds)["y"]
        assert isinstance(found, np.ndarray)
        np.testing.assert_allclose(found, expected(model, feeds)[0], rtol=1e-3, atol=1e-3)
