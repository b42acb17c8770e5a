"""What TVM takes of a model: sizes that are free, set or formulas, branches; what it refuses."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from graphopt import artifact, compilation, ir
from graphopt.backends._tvm_options import Options
from graphopt.errors import GraphoptError, InputError
from graphopt.worker import Worker
from tests._models import parse
from tests.test_tvm import BACKEND, CPU, expected, needs_tvm, random, with_weights


@needs_tvm
def test_sizes_that_are_set(tmp_path: Path) -> None:
    model = with_weights("g (float[n,8] x, float[] w) => (float[n,4] y) { y = MatMul (x, w) }",
                         w=random(8, 4))  # fmt: skip
    compilation.compile(model, CPU, tmp_path / "a", backend="tvm", options={"dims": "n=3"})
    executable = compilation.load(tmp_path / "a", trust=True)
    assert executable.inputs[0].shape == (3, 8)
    with pytest.raises(InputError, match=r"takes float32 \[3, 8\]"):
        executable.run({"x": random(2, 8)})
    with pytest.raises(InputError, match="no input has a free dimension m"):
        compilation.compile(model, CPU, tmp_path / "b", backend="tvm", options={"dims": "m=3"})


@needs_tvm
def test_sizes_that_are_set_decide_what_is_taken(tmp_path: Path) -> None:
    model = with_weights(
        """
        g (float[seq,2,5] x, float[] w, float[] r) => (float y)
        { [steps] y = LSTM <hidden_size = 8> (x, w, r) }
        """,
        w=random(1, 32, 5),
        r=random(1, 32, 8),
    )
    reason = "its number of steps is known at run time only: set it with dims"
    assert BACKEND.supports(model, CPU) == {"steps": reason}
    folder = compilation.compile(
        model, CPU, tmp_path / "a", backend="tvm", options={"dims": "seq=3"}, level=0
    )
    assert not artifact.read(folder).fallback
    feeds = {"x": random(3, 2, 5)}
    found = compilation.load(folder, trust=True).run(feeds)["y"]
    assert isinstance(found, np.ndarray)
    np.testing.assert_allclose(found, expected(model, feeds)[0], rtol=1e-4, atol=1e-4)


@needs_tvm
def test_sizes_of_run_time_decide(tmp_path: Path) -> None:
    """Which branch is taken, and so what rank there is for an operator that is not TVM's then."""
    model = parse("""
        g (float[n,4,m] x) => (float y)
        <int64[1] last = {2}, int64[1] one = {1}>
        {
            r = Relu (x) t = Sigmoid (r) s = Shape (t) size = Gather (s, last)
            alone = Equal (size, one)
            b = If (alone) <
                then_branch = g1 () => (float p) { p = Squeeze (t, last) },
                else_branch = g2 () => (float q) { q = Identity (t) }
            >
            [late] y = Abs (b)
        }
    """, opset=18)  # fmt: skip
    refused = BACKEND.supports(model, CPU)
    assert refused == {"late": "the rank of its input is known at run time only"}
    folder = tmp_path / "a"
    compilation.compile(model, CPU, folder, backend="tvm", level=0, verify="off")
    for shape in ((2, 4, 1), (2, 4, 3)):
        x = random(*shape)
        found = np.asarray(compilation.load(folder, trust=True).run({"x": x})["y"])
        (wanted,) = expected(model, {"x": x})
        np.testing.assert_allclose(found, wanted, rtol=1e-6)
        assert found.shape == wanted.shape


@needs_tvm
def test_what_cannot_be_imported_is_named() -> None:
    model = parse("""
        g (float[2] x) => (float[2] y)
        { a = Relu (x) [far] b = acme.Twist (a) [late] y = Sqrt (b) }
    """)
    assert BACKEND.supports(model, CPU) == {
        "far": "TVM's importer has no acme.Twist",
        "late": "the rank of its input is known at run time only",
    }


@pytest.mark.parametrize("dims", ["n", "n=0", "n=-1", "=3", "n=1,,m=2", "n = 1"])
def test_dims_that_are_none(dims: str) -> None:
    with pytest.raises(InputError, match="dims is like"):
        Options(dims=dims)
    assert Options(dims="n=1,x.y=20").sizes() == {"n": 1, "x.y": 20}


@needs_tvm
@pytest.mark.parametrize(
    ("first", "second"),
    [("(w + 7)//8", "n-1"), ("a + 2*b", "b"), ("past", "past + 1"), ("input-length", "n")],
)
def test_sizes_named_as_formulas(tmp_path: Path, first: str, second: str) -> None:
    """They are names, save those that TVM computes from another size."""
    model = parse("g (float[2,a] x, float[2,b] z) => (float y) { y = Concat <axis = 1> (x, z) }")
    for value, name in zip(model.graph.inputs, (first, second), strict=True):
        value.shape = ir.Shape([2, name])
    folder = tmp_path / "a"
    compilation.compile(model, CPU, folder, backend="tvm", level=0, verify="off")
    assert not artifact.read(folder).fallback
    feeds = {"x": random(2, 3), "z": random(2, 4)}
    found = compilation.load(folder, trust=True).run(feeds)["y"]
    np.testing.assert_array_equal(np.asarray(found), np.concatenate([*feeds.values()], axis=1))


@needs_tvm
@pytest.mark.parametrize("join", ["y = Add (r, u)", "y = Concat <axis = 1> (u, r)"])
def test_sizes_that_are_equal_when_it_runs(tmp_path: Path, join: str) -> None:
    """As where a detector doubles a size that it halved before, which an even one survives."""
    text = f"""
        g (float[n,4,h,w] x, float[] k) => (float y) <float[4] s = {{1, 1, 2, 2}}>
        {{
            r = Relu (x) d = MaxPool <kernel_shape = [2, 2], strides = [2, 2], ceil_mode = 1> (r)
            c = Conv (d, k) u = Resize <mode = "nearest"> (c, , s) {join}
        }}
    """
    model = with_weights(text, k=random(4, 4, 1, 1))
    folder = tmp_path / "a"
    compilation.compile(model, CPU, folder, backend="tvm", level=0, verify="off")
    assert not artifact.read(folder).fallback
    executable = compilation.load(folder, trust=True)
    for shape in ((1, 4, 6, 8), (2, 4, 2, 10)):
        feeds = {"x": random(*shape)}
        found = np.asarray(executable.run(feeds)["y"])
        np.testing.assert_allclose(found, expected(model, feeds)[0], rtol=1e-4, atol=1e-5)
    with pytest.raises(GraphoptError, match="tvm:"):
        executable.run({"x": random(1, 4, 5, 8)})


@needs_tvm
def test_memory_of_branches_is_their_own(tmp_path: Path) -> None:
    """What is computed after a branch must not be put where only the other one made room."""
    model = parse("""
        g (float[8] x, bool go) => (float[8] y, float[8] z, float[8] w)
        <float[8] k = {1, 2, 3, 4, 5, 6, 7, 8}>
        {
            b = If (go) <
                then_branch = g1 () => (float[8] p) { p = Identity (x) },
                else_branch = g2 () => (float[8] q) { s = Sub (x, k) t = Exp (s) q = Div (k, t) }
            >
            y = Tanh (b) e = Sin (x) z = Cos (e) w = Exp (z)
        }
    """)
    folder = tmp_path / "a"
    compilation.compile(model, CPU, folder, backend="tvm", level=0, verify="off")
    assert not artifact.read(folder).fallback
    with Worker(folder, trust=True) as worker:
        for go in (True, False, True):
            feeds = {"x": random(8), "go": np.array(go)}
            wanted = expected(model, feeds)
            for found, value in zip(worker.run(feeds).values(), wanted, strict=True):
                np.testing.assert_allclose(np.asarray(found), value, rtol=1e-5)
