"""Constants computed in batches, within limits, and only where that is sound."""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from graphopt import ir
from graphopt.execute import deterministic, evaluate_many, output_bytes
from tests._models import node_model, parse

ml_dtypes: Any = importlib.import_module("ml_dtypes")

OPSETS = {"": 20}


def ones(*shape: int) -> Any:
    """An array of float32."""
    return np.ones(shape, np.float32)


def i64(*numbers: int) -> Any:
    """A list of int64."""
    return np.asarray(numbers, np.int64)


def results(model: ir.Model, limit: int = 1 << 20) -> Mapping[str, ir.Array]:
    """What `evaluate_many` makes of a model without inputs."""
    found = evaluate_many(list(model.graph), model.graph.opset_imports, limit)
    return {value.name or "": array for value, array in found.items()}


def test_batch_runs_what_it_can() -> None:
    found = results(
        parse("""g () => (float[N] y) <float[3] x = {1, 2, 3}, int64[2] s = {5, 7}> {
        a = Softplus (x)  b = Celu (a)  c = Reshape (b, s)  d = Relu (c)  e = NoSuchOp (x)
        f = Relu (e)  g = RandomNormalLike (x)  h = Relu (g)  y = Relu (b)  k = Selu (unknown) }""")
    )
    assert set(found) == {"a", "b", "y"}
    np.testing.assert_allclose(cast(Any, found["a"]), np.log1p(np.exp([1, 2, 3])), rtol=1e-6)


def test_many_failures() -> None:
    bad = "\n".join(f"b{i} = Reshape (x, s)  c{i} = Softplus (b{i})" for i in range(12))
    found = results(
        parse(f"""g () => (float[N] y) <float[3] x = {{1, 2, 3}}, int64[2] s = {{5, 7}}> {{
        {bad}
        y = Softplus (x)  z = Celu (y) }}""")
    )
    assert set(found) == {"y", "z"}


def test_captured_names_of_two_scopes() -> None:
    body = """<then_branch = t () => (float[1] o) { o = Neg (w) },
        else_branch = e () => (float[1] p) { p = Neg (w) }>"""
    one = parse(
        f"g () => (float[1] y) <float[1] w = {{1}}, bool c = {{1}}> {{ y = If (c) {body} }}"
    )
    two = parse(
        f"g () => (float[1] y) <float[1] w = {{2}}, bool c = {{1}}> {{ y = If (c) {body} }}"
    )
    nodes = [next(iter(model.graph)) for model in (one, two)]
    found = evaluate_many(nodes, OPSETS, 1 << 20)
    assert found[nodes[0].outputs[0]].tolist() == [-1]
    assert nodes[1].outputs[0] not in found or found[nodes[1].outputs[0]].tolist() == [-2]


def test_text_and_odd_dtypes_come_back() -> None:
    found = results(
        parse("""g () => (float[N] y) <float[2] x = {1, -2}, string[2] t = {"a", "b"}> {
        a = Cast <to = 16> (x)  b = Cast <to = 17> (x)  c = StringConcat (t, t)
        y = Cast <to = 1> (b) }""")
    )
    assert found["a"].dtype == ml_dtypes.bfloat16
    assert found["b"].astype(np.float32).tolist() == found["y"].tolist() == [1, -2]
    assert found["c"].tolist() == [b"aa", b"bb"]


def test_reference_computes_what_has_no_kernel() -> None:
    text = "g () => (int16[N] y) <int16[2] x = {6, 5}, int16[2] z = {3, 6}> { y = Mul (x, z) }"
    assert results(parse(text))["y"].tolist() == [18, 30]


BOMBS = {
    "expand": "<float[1] x = {1}, int64[1] s = {4000000000}> { a = Expand (x, s) y = Relu (a) }",
    "constant of shape": "<int64[3] s = {9999, 9999, 9999}> { y = ConstantOfShape (s) }",
    "tile": "<float[1] x = {1}, int64[1] s = {9000000000}> { y = Tile (x, s) }",
    "range": "<float a = {0}, float b = {1e10}, float d = {1}> { y = Range (a, b, d) }",
    "outer": """<int64[2] s = {4096, 1}, int64[2] t = {1, 4096}> { a = ConstantOfShape (s)
        b = ConstantOfShape (t) c = Mul (a, b) d = MatMul (c, c) e = Erf (d) y = Selu (e) }""",
    "chain": """<int64[1] s = {30000}, float[1] x = {1}> { a = Expand (x, s) b = NonZero (a)
        c = Transpose (b) d = Cast <to = 1> (c) e = Transpose (d) f = MatMul (d, e)
        y = Erf (f) }""",
    "doubling": """<int64 n = {60}, bool c = {1}, float[1] x = {1}> { y = Loop (n, c, x) <
        body = b (int64 i, bool k, float[N] v) => (bool l, float[M] w)
        { l = Identity (k) w = Concat <axis = 0> (v, v) }> }""",
    "endless": """<int64 n = {9000000000}, bool c = {1}, float[1] x = {1}> { y = Loop (n, c, x) <
        body = b (int64 i, bool k, float[N] v) => (bool l, float[M] w)
        { l = Identity (k) w = Neg (v) }> }""",
    "while": """<bool c = {1}, float[1] x = {1}> { y = Loop (, c, x) <
        body = b (int64 i, bool k, float[N] v) => (bool l, float[M] w)
        { l = Identity (k) w = Neg (v) }> }""",
}
PEAK = """
import resource, sys
sys.path.insert(0, {root!r})
from tests.test_execute import BOMBS, parse, results
results(parse("g () => (float[N] y) <float[2] x = {{1, 2}}> {{ y = Softplus (x) }}"))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
assert "y" not in results(parse("g () => (float[N] y) " + BOMBS[{name!r}]))
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


@pytest.mark.parametrize("name", BOMBS)
def test_bombs(name: str) -> None:
    """A model of a few hundred bytes gets neither memory nor time."""
    root = str(Path(__file__).resolve().parents[1])
    ran = subprocess.run(
        [sys.executable, "-c", PEAK.format(root=root, name=name)],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert int(ran.stdout) < 300


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("y = Relu (x)", True),
        ("y = RandomNormalLike (x)", False),
        ("y = Bernoulli (x)", False),
        ("y = Dropout (x)", True),
        ("y = Dropout (x, r, t)", False),
        ("y = Dropout (x, r, f)", True),
        ("y = Dropout (x, r, u)", False),
        ("y = com.acme.Thing (x)", False),
        ("y = If (f) <then_branch = a () => (float[N] p) { p = Relu (x) },"
         " else_branch = b () => (float[N] q) { q = RandomUniformLike (x) }>", False),
    ],
)  # fmt: skip
def test_deterministic(text: str, wanted: bool) -> None:
    model = parse(
        "g (float[2] x, bool u) => (float[N] y)"
        f" <float r = {{0.5}}, bool t = {{1}}, bool f = {{0}}> {{ {text} }}"
    )
    assert deterministic(next(iter(model.graph))) == wanted


def test_output_bytes() -> None:
    def size(op: str, *inputs: ir.Array | None, **attributes: Any) -> int | None:
        proto = node_model(op, list(inputs), 20, 1, **attributes)
        return output_bytes(
            next(iter(ir.serde.deserialize_model(proto).graph)), list(inputs), OPSETS
        )

    assert size("Expand", ones(3, 4), i64(10**6, 3, 4)) == 48 * 10**6
    assert size("Add", ones(1000, 1), ones(1, 1000)) == 4 * 10**6
    assert size("ConstantOfShape", i64(10**6, 10**6)) == 4 * 10**12
    assert size("Cast", ones(8), to=16) == 16
    assert size("Gather", ones(4, 100), i64(1, 2, 3)) == 1200
    assert size("Slice", ones(4, 10**5), i64(0), i64(2)) == 8 * 10**5
    assert size("Identity", np.asarray([b"abc", b"d"], object)) == 2 * 11
    assert size("Compress", ones(3, 4), ones(3) > 0) is None
    assert size("Reshape", ones(3, 4), i64(5, 5)) == 48 + 64  # a bound


def test_nothing_is_loaded_at_import() -> None:
    code = (
        "import sys, graphopt.execute, graphopt.feeds; "
        "print([m for m in ('onnxruntime', 'sympy', 'onnx.reference') if m in sys.modules])"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = [m for m in ("onnxruntime", "onnx.reference") if m in ran.stdout]
    assert not loaded
