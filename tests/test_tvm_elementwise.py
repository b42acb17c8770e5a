"""Operators on elements through TVM, against numpy: edges, and numbers of 64 bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from graphopt import compilation, ir
from graphopt.backends import Array
from tests._models import parse
from tests.test_tvm import CPU, needs_tvm

EDGES = np.array([5.5, -5.5, 0.0, -0.0, np.inf, -np.inf, np.nan, 3, -3, 1e-3], np.float64)


def run(model: ir.Model, feeds: dict[str, Array], folder: Path) -> dict[str, Any]:
    """What a model computes, all of it in TVM."""
    made = compilation.compile(
        model, CPU, folder / "a", backend="tvm", level=0, fallback=False, check=False
    )
    return dict(compilation.load(made, trust=True).run(feeds))


@needs_tvm
@pytest.mark.parametrize(("name", "dtype"), [("float16", "float16"), ("double", "float64")])
def test_remainders(tmp_path: Path, name: str, dtype: str) -> None:
    model = parse(f"""
        g ({name}[10,1] a, {name}[10] b) => ({name}[10,10] c, {name}[10,10] d)
        {{ c = Mod <fmod = 1> (a, b) d = Mod (a, b) }}
    """, 28)  # fmt: skip
    a, b = EDGES.astype(dtype)[:, None], EDGES.astype(dtype)
    found = run(model, {"a": a, "b": b}, tmp_path)
    with np.errstate(all="ignore"):
        wanted = {"c": np.fmod(a, b), "d": np.mod(a, b)}
    for output, value in wanted.items():
        np.testing.assert_array_equal(found[output], value)
        known = ~np.isnan(value)
        assert (np.signbit(found[output]) == np.signbit(value))[known].all()


@needs_tvm
def test_shifts(tmp_path: Path) -> None:
    model = parse("""
        g (int32[5] x, int32[5] n) => (int32[5] l, int32[5] r)
        { l = BitShift <direction = "LEFT"> (x, n) r = BitShift <direction = "RIGHT"> (x, n) }
    """, 28)  # fmt: skip
    x, n = np.array([-8, -8, 4, 4, 1 << 30]), np.array([1, 40, 2, -1, 1])
    found = run(model, {"x": x.astype(np.int32), "n": n.astype(np.int32)}, tmp_path)
    assert found["l"].tolist() == [-16, 0, 16, 0, -(1 << 31)]
    assert found["r"].tolist() == [-4, -1, 1, 0, 1 << 29]


@needs_tvm
def test_bits(tmp_path: Path) -> None:
    text = "g (float[4] x, bool[2] b) => (int32[4] y, uint8[2] c)"
    model = parse(text + "{ y = BitCast <to = 6> (x) c = BitCast <to = 2> (b) }", 26)
    x = np.array([1.5, -0.0, np.inf, 1e-40], np.float32)
    found = run(model, {"x": x, "b": np.array([True, False])}, tmp_path)
    np.testing.assert_array_equal(found["y"], x.view(np.int32))
    assert found["c"].tolist() == [1, 0]


@needs_tvm
def test_constants_of_64_bits(tmp_path: Path) -> None:
    large = 9_000_000_000
    model = parse(f"""
        g (int64[3] x, double[3] z) => (int64[3,4] y, double[3] c, double[3] l)
        <int64 depth = {{4}}, int64[2] values = {{-5, {large}}}, double low = {{-0.1}}>
        {{ y = OneHot (x, depth, values) c = Clip (z, low) l = LeakyRelu <alpha = 0.5> (z) }}
    """)
    z = np.array([-1.0, 0.3, 1e-300])
    found = run(model, {"x": np.array([3, 0, -1]), "z": z}, tmp_path)
    assert found["y"].dtype == np.int64
    assert found["y"][:, 3].tolist() == [large, -5, large]
    np.testing.assert_array_equal(found["c"], np.maximum(z, -0.1))
    np.testing.assert_array_equal(found["l"], np.where(z < 0, z / 2, z))
