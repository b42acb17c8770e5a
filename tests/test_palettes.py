"""Palettes and packed indices: as good as they can be, and what comes out is what went in."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
import pytest

from graphopt import files, ir
from graphopt.errors import InputError
from graphopt.optimization import optimize
from graphopt.quantizer import palettes, piecewise
from graphopt.quantizer.rounding import Scheme, nearest
from graphopt.report import Report
from graphopt.runner import Runner
from tests._text import model, proto

onnx: Any = importlib.import_module("onnx")


def snr(values: palettes.Floats, found: palettes.Floats) -> float:
    return float(10 * np.log10(np.sum(values**2) / np.sum((values - found) ** 2)))


def test_sixteen_values_of_a_normal_distribution() -> None:
    """Max (1960) gives 20.22 dB for the best 16 levels."""
    values = np.random.default_rng(0).standard_normal(200_000).astype(np.float32)
    palette, index = palettes.cluster(values, 16)
    assert snr(values, palette[index]) == pytest.approx(20.22, abs=0.05)


def test_few_values_are_kept_as_they_are() -> None:
    values = np.array([[3, -1, 3], [0.5, -1, 3]], np.float32)
    palette, index = palettes.cluster(values, 4)
    np.testing.assert_allclose(palette[index], values, atol=1e-5)
    palette, index = palettes.cluster(np.full((2, 3), 7.0), 16)
    np.testing.assert_allclose(palette[index], 7, rtol=1e-5)


def test_vectors_use_what_goes_together() -> None:
    first = np.random.default_rng(0).standard_normal((4000, 1)).astype(np.float32)
    palette, index = palettes.cluster_vectors(np.hstack([first, -first]), 64)
    assert snr(first, palette[index][:, :1]) > 28


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("opset", [11, 21])
def test_a_model_computes_with_what_was_packed(bits: int, opset: int) -> None:
    rng = np.random.default_rng(bits)
    text = f'<ir_version: 10, opset_import: ["" : {opset}]> '
    source = proto(text + "g (float[2,67] x) => (float[2,33] y) { y = MatMul(x, w) }")
    levels = rng.integers(0, 2**bits, (67, 33)).astype(np.float32)
    values = np.tanh(levels / 2**bits) - np.float32(0.4)
    source.graph.initializer.append(onnx.numpy_helper.from_array(values, "w"))
    report = Report()
    packed = optimize(
        source, passes=f"palettize-weights{{bits={bits}}}", report=report, verify="off"
    )
    assert report.record("palettize-weights").rewrites
    feeds = {"x": rng.standard_normal((2, 67)).astype(np.float32)}
    wanted = Runner(files.load(source)).run(feeds)["y"]
    again = optimize(packed, level=2)  # what unpacks is not folded back
    for result in (packed, again):
        np.testing.assert_allclose(Runner(result).run(feeds)["y"], wanted, rtol=0.02, atol=0.05)
        stored = sum(t.nbytes for t in ir.constants(result))
        assert stored < 67 * 33 * bits / 8 + 4 * 2**bits + 200


def test_two_grids_of_a_normal_distribution_and_of_nothing() -> None:
    """Between the best uniform grid (19.3 dB) and the best 16 levels (20.2)."""
    rows = np.random.default_rng(0).standard_normal((8, 5000))
    codes, fine, coarse = piecewise.codes(rows, 4)
    assert codes.min() == -8 and codes.max() == 7
    found = piecewise.values(codes, fine, coarse, 4)
    assert 19.7 < snr(rows.astype(np.float32), found.astype(np.float32)) < 20.2
    codes, fine, coarse = piecewise.codes(np.zeros((2, 5)), 4)
    assert not codes.any() and (fine > 0).all() and (coarse > 0).all()


@pytest.mark.parametrize("options", ["bits=0", "bits=9", "vector=0", "group=2,vector=2"])
def test_bad_options(options: str) -> None:
    source = model("g (float[2,3] x) => (float[2,3] y) { y = Neg(x) }")
    with pytest.raises(InputError, match="palettize-weights"):
        optimize(source, passes=f"palettize-weights{{{options}}}")
    with pytest.raises(InputError, match="bits is 3 to 8"):
        optimize(source, passes="quantize-piecewise{bits=2}")


@pytest.mark.parametrize("bits", range(3, 9))
@pytest.mark.parametrize("opset", [11, 21])
def test_a_model_computes_with_two_grids_a_channel(bits: int, opset: int) -> None:
    """Heavy tails, and channels of different size; beside one grid a channel, as large."""
    rng = np.random.default_rng(bits)
    text = f'<ir_version: 10, opset_import: ["" : {opset}]> '
    source = proto(text + "g (float[2,200] x) => (float[2,33] y) { y = MatMul(x, w) }")
    weights = (rng.laplace(size=(200, 33)) * rng.uniform(0.1, 2, 33)).astype(np.float32)
    source.graph.initializer.append(onnx.numpy_helper.from_array(weights, "w"))
    packed = optimize(source, passes=f"quantize-piecewise{{bits={bits}}}", verify="off")
    again = optimize(packed, level=2)  # what unpacks is not folded back
    single = nearest(weights.T[None], Scheme(bits)).values[0].T
    for result in (packed, again):
        unpacked: Any = Runner(result).run({"x": np.eye(200, dtype=np.float32)[:2]})["y"]
        assert snr(weights[:2], unpacked) > snr(weights[:2], single[:2].astype(np.float32)) - 3
        stored = sum(t.nbytes for t in ir.constants(result))
        assert stored < 200 * 33 * bits / 8 + 8 * 33 + 200
    codes, fine, coarse = piecewise.codes(weights.T, bits)
    values = piecewise.values(codes, fine, coarse, bits).T.astype(np.float32)
    assert snr(weights, values) > snr(weights, single.astype(np.float32)) + 0.5
