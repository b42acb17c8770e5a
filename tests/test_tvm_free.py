"""Models of free sizes through TVM: how their kernels are written, and what they compute."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np

from graphopt import compilation
from graphopt.report import Report
from tests._models import parse
from tests.test_tvm import CPU, agree, expected, needs_tvm, random, with_weights
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


_MERGED = """
    g (float[batch,3,high,wide] x, float[] a, float[] p, float[4] scales, float[] none)
        => (float y) {
        one = Conv <strides = [2, 2], pads = [1, 1, 1, 1]> (x, a) r = Relu (one)
        two = Conv <strides = [2, 2], pads = [1, 1, 1, 1]> (r, p)
        up = Resize <mode = "nearest"> (two, none, scales) sum = Add (up, one)
        three = Conv <pads = [1, 1, 1, 1]> (sum, p) s = Constant <value_ints = [0, 8, -1]> ()
        y = Reshape (three, s)
    }"""


@needs_tvm
def test_sizes_that_only_the_run_makes_equal() -> None:
    """Channels stay last all the same, and a Reshape makes no copy."""
    weights = {"a": random(8, 3, 3, 3), "p": random(8, 8, 3, 3), "none": np.zeros(0, np.float32)}
    scales = np.array([1, 1, 2, 2], np.float32)
    kernels, _, log = lowered(with_weights(_MERGED, scales=scales, **weights))
    assert sum(rule == "product" for rule in log.rules.values()) == 3, log
    calls = kernels["main"].script()
    assert len(re.findall(r"cls\.\w*transpose", calls)) <= 2
    assert "R.reshape(" in calls and "cls.reshape" not in calls


@needs_tvm
def test_transposed_convolutions(tmp_path: Path) -> None:
    """What they make is interleaved, and no zeros are put between elements of free sizes."""
    text = """
        g (float[batch,3,high,wide] x, float[] w, float[] p) => (float y) {
            a = Conv <strides = [4, 4]> (x, p) b = ConvTranspose <strides = [2, 2]> (a, w)
            y = ConvTranspose <strides = [2, 2]> (b, w) }"""
    model = with_weights(text, p=random(8, 3, 4, 4), w=random(8, 8, 2, 2))
    _, _, log = lowered(model)
    assert not log.untiled and sum(rule == "product" for rule in log.rules.values()) == 3, log
    agree(model, {"x": random(2, 3, 20, 13)}, tmp_path / "a", tolerance=1e-3)


@needs_tvm
def test_products_without_tiles_are_told(tmp_path: Path) -> None:
    text = "g (float[2,1,7,5] x, float[3,5,6] w) => (float y) { y = MatMul (x, w) }"
    report = Report()
    compilation.compile(parse(text), CPU, tmp_path / "a", backend="tvm", level=0, report=report)
    (note,) = [note for note in report.notes if "plain loops" in note]
    assert note == (
        "tvm runs kernels as plain loops, which may be many times slower: "
        "matmul (it has no form that tiles are known for); see kernels.json"
    )


@needs_tvm
def test_numbers_beside_free_sizes(tmp_path: Path) -> None:
    """Tensors without axes have no indices."""
    text = "g (float[batch,6] x, int64 i) => (float y) { y = Gather <axis = 1> (x, i) }"
    feeds = {"x": random(3, 6), "i": np.array(4)}
    agree(parse(text), feeds, tmp_path / "a")


@needs_tvm
def test_regions_that_tvm_cannot_bound(tmp_path: Path) -> None:
    """A schedule that would fail with the whole model later gives way to plain loops."""
    text = """
        g (float[batch,8,high,wide] x, float[] w, float[] p) => (float y) {
            a = ConvTranspose <strides = [2, 2], pads = [1, 1, 1, 1]> (x, w) y = Conv (a, p) }"""
    model = with_weights(text, w=random(8, 8, 3, 3), p=random(8, 8, 2, 2))
    _, _, log = lowered(model)
    assert not log.unscheduled and all("bound" in why for why in log.untiled.values())
    agree(model, {"x": random(2, 8, 9, 13)}, tmp_path / "a", tolerance=1e-3)
