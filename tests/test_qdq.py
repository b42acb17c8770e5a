"""Quantized models stay quantized: whatever a level does, weights are not folded back to floats."""

from __future__ import annotations

import numpy as np
import pytest

from graphopt import files, ir
from graphopt.optimization import optimize
from graphopt.report import Stats
from tests._shared import shared
from tests._text import model

BLOCK = """net (float[1,4] x) => (float[2,2] y) <float s = {0.1}, int8 z = {0},
    float[4] t = {1, 2, 3, 4},
    int8[4,4] w = {1, 2, 3, 4, 5, 6, 7, 8, 9, 1, 2, 3, 4, 5, 6, 7}, int64[2] u = {2, 2}> {
  q = QuantizeLinear (x, s, z)
  a = DequantizeLinear (q, s, z)
  d = DequantizeLinear <axis = 0> (w, t, o)
  e = Transpose (d)
  m = MatMul (a, e)
  p = QuantizeLinear (m, s, z)
  b = DequantizeLinear (p, s, z)
  r = Reshape (b, u)
  k = QuantizeLinear (r, s, z)
  y = DequantizeLinear (k, s, z)
}"""


def bytes_of(source: ir.Model) -> dict[ir.DataType, int]:
    """Bytes of the constants by type."""
    found: dict[ir.DataType, int] = {}
    for tensor in ir.constants(source):
        found[tensor.dtype] = found.get(tensor.dtype, 0) + tensor.nbytes
    return found


@pytest.mark.parametrize("level", [1, 2, 3])
def test_a_block(level: int) -> None:
    """The weight is transposed as it is stored; the pair around the view is gone."""
    source = model(BLOCK.replace("u = {2, 2}>", "u = {2, 2}, int8[4] o = {0, 0, 0, 0}>"))
    result = optimize(source, level=level)
    assert any(
        tensor.dtype == ir.DataType.INT8 and tensor.size == 16 for tensor in ir.constants(result)
    )
    assert not any(
        tensor.dtype == ir.DataType.FLOAT and tensor.size == 16 for tensor in ir.constants(result)
    )
    if level > 1:
        ops = Stats.of(result).ops
        assert "Transpose" not in ops
        assert (ops["QuantizeLinear"], ops["DequantizeLinear"]) == (2, 3)
        (weight,) = (t for t in ir.constants(result) if t.size == 16)
        assert np.array_equal(weight.numpy()[0], [1, 5, 9, 4])


@pytest.mark.parametrize("name", ["mobilenet_v2_10_224_qdq", "mlperf_streaming_ww_qdq"])
def test_models(name: str) -> None:
    source = files.load(shared("corpus") / "models" / name / "model.onnx")
    before, after = bytes_of(source), bytes_of(optimize(source, level=3))
    short = (ir.DataType.INT8, ir.DataType.UINT8)
    small = [sum(found.get(kind, 0) for kind in short) for found in (before, after)]
    assert small[1] >= 0.99 * small[0] > 1000
    assert after.get(ir.DataType.FLOAT, 0) <= 1.01 * before[ir.DataType.FLOAT]
