"""Models as other tools quantize them: what is wrong for a target is listed, and repaired."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from graphopt import files, ir, optimize
from graphopt.quantizer.checking import check_quantized
from graphopt.quantizer.kernels import count_kernels
from graphopt.quantizer.placement import TABLES
from graphopt.quantizer.scoring import score
from graphopt.samples import open_samples
from tests._models import images, network
from tests._text import proto

ROWS = [
    ("default", "ort-x86", {"activation-type"}),
    ("default", "ort-arm", set[str]()),
    ("default", "tensorrt", {"zero-point", "integer-bias", "quantized-result"}),
    ("u8s8", "ort-x86", set[str]()),
    ("u8s8", "tensorrt", {"activation-type", "integer-bias", "quantized-result"}),
    ("u8u8", "ort-x86", {"weight-type"}),
    ("u8u8", "tvm", {"activation-type", "weight-type"}),
    ("a16", "ort-x86", {"activation-type"}),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`network` as ONNX Runtime's quantizer places it, in four ways."""
    made = tmp_path_factory.mktemp("foreign")
    tool: Any = importlib.import_module("onnxruntime.quantization")
    files.save(network(), made / "float.onnx")
    kinds = tool.QuantType
    ways: dict[str, dict[str, Any]] = {
        "default": {},
        "u8s8": {"activation_type": kinds.QUInt8, "per_channel": True},
        "u8u8": {"activation_type": kinds.QUInt8, "weight_type": kinds.QUInt8},
        "a16": {"activation_type": kinds.QUInt16},
    }
    form = tool.QuantFormat.QDQ
    for name, how in ways.items():
        reader, out = Reader(), made / f"{name}.onnx"
        tool.quantize_static(made / "float.onnx", out, reader, quant_format=form, **how)
    return made


class Reader:
    """Samples as ONNX Runtime's quantizer reads them."""

    def __init__(self) -> None:
        self._rows: Iterator[Any] = iter(images()["x"])

    def get_next(self) -> dict[str, Any] | None:
        """The next feeds."""
        row = next(self._rows, None)
        return None if row is None else {"x": row[None]}


@pytest.mark.parametrize(("name", "placement", "rules"), ROWS)
def test_what_onnxruntime_makes(name: str, placement: str, rules: set[str], folder: Path) -> None:
    table = TABLES[placement]
    source = files.load(folder / f"{name}.onnx")
    assert {violation.rule for violation in check_quantized(source, table)} == rules
    text = f"repair-qdq{{placement={placement}}}"
    repaired = optimize(source, passes=text, verify="off")
    assert not check_quantized(repaired, table)
    samples = open_samples(images(), network())
    before, after = (score(network(), m, samples).sqnr_db or 0 for m in (source, repaired))
    assert after > before - 3 and after > 30
    if placement == "ort-x86":
        assert count_kernels(repaired).integer == 5


INPUTS_ONLY = """net (float[1,4,8,8] x) => (float[1,4,8,8] y)
    <float s = {0.03}, uint8 z = {128}, float u = {0.02}, uint8 o = {0}, int8 k = {0},
    float[4] t = {0.01, 0.01, 0.02, 0.01}, int8[4] n = {0, 0, 0, 0}> {
  q = QuantizeLinear (x, s, z)
  d = DequantizeLinear (q, s, z)
  v = QuantizeLinear <axis = 0> (w, t, n)
  e = DequantizeLinear <axis = 0> (v, t, n)
  c = Conv (d, e, b)
  r = Relu (c)
  p = QuantizeLinear (r, u, o)
  f = DequantizeLinear (p, u, o)
  a = QuantizeLinear <axis = 0> (h, t, n)
  g = DequantizeLinear <axis = 0> (a, t, n)
  y = Conv (f, g)
}"""
"""Placed as NNCF does: activations unsigned before operators, weights rounded at run time."""


def test_inputs_only() -> None:
    made: Any = proto(INPUTS_ONLY)
    rng = np.random.default_rng(0)
    for name, shape in (("w", (4, 4, 1, 1)), ("b", (4,)), ("h", (4, 4, 1, 1))):
        weights = rng.uniform(-1, 1, shape).astype(np.float32)
        made.graph.initializer.append(ir.to_proto(ir.tensor(weights, name=name)))
    source = files.load(made)
    found = {violation.rule for violation in check_quantized(source, TABLES["ort-x86"])}
    assert found == {"float-weight", "bound-not-absorbed", "float-bias", "float-result"}
    repaired = optimize(source, passes="repair-qdq{placement=ort-x86}", verify="off")
    left = {violation.rule for violation in check_quantized(repaired, TABLES["ort-x86"])}
    assert left <= {"float-result"}
    assert "Relu" not in {node.op_type for node in repaired.graph}
