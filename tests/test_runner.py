"""Whole models in ONNX Runtime: all kinds of inputs and outputs, failures in one line."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from graphopt import ir
from graphopt.errors import GraphoptError, InputError
from graphopt.runner import Runner, memory_guard
from tests._models import parse

ml_dtypes: Any = importlib.import_module("ml_dtypes")


def test_runner_takes_all_kinds() -> None:
    odd = parse("g (bfloat16[N] x, float8e4m3fn[N] q) => (bfloat16[N] y, float[N] z)"
                " { y = Identity (x) z = Cast <to = 1> (q) }")  # fmt: skip
    x = np.asarray([1, 2, 3]).astype(ml_dtypes.bfloat16)
    found = Runner(odd).run({"x": x, "q": x.astype(ml_dtypes.float8_e4m3fn)})
    assert found["y"].dtype == ml_dtypes.bfloat16
    assert found["y"].tolist() == found["z"].tolist() == [1, 2, 3]

    text = parse("g (string[N] x) => (seq(string[N]) y) { y = SequenceConstruct (x, x) }")
    assert [a.tolist() for a in Runner(text).run({"x": np.asarray(["a", "b"])})["y"]] == [
        ["a", "b"],
        ["a", "b"],
    ]
    maybe = parse("g (optional(float[2]) x) => (bool y) { y = OptionalHasElement (x) }")
    assert not Runner(maybe).run({"x": None})["y"]
    assert Runner(maybe).run({"x": np.ones(2, np.float32)})["y"]
    mixed = parse("g (string[N] t, float[N] x) => (bfloat16[N] y, string[N] u)"
                  " { y = Cast <to = 16> (x) u = Identity (t) }")  # fmt: skip
    with pytest.raises(GraphoptError, match="cannot be fed beside"):
        Runner(mixed).run({"t": np.asarray(["a"]), "x": np.ones(1, np.float32)})


def test_runner_fails_in_one_line(tmp_path: Path) -> None:
    model = parse("g (float[N] x) => (float[M] y) <int64[2] s = {5, 7}> { y = Reshape (x, s) }")
    with pytest.raises(GraphoptError, match=r"cannot run the model: .*requested shape") as failed:
        Runner(model).run({"x": np.ones(3, np.float32)})
    assert "\n" not in str(failed.value)
    with pytest.raises(GraphoptError, match=r"cannot run the model: .*double"):
        Runner(model).run({"x": np.ones(3)})
    with pytest.raises(InputError, match="no input 'z'"):
        Runner(model).run({"z": np.ones(3, np.float32)})
    with pytest.raises(GraphoptError, match="cannot load the model"):
        Runner(parse("g (float[N] x) => (float[N] y) { y = NoSuchOp (x) }"))
    with pytest.raises(GraphoptError, match="cannot load the model"):
        Runner(tmp_path / "none.onnx")


@pytest.mark.parametrize("copied", [True, False])
def test_runner_leaves_large_weights_where_they_are(
    copied: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not copied:
        monkeypatch.setattr("graphopt.runner._COPY_BYTES", 0)
    model = parse("g (float[N,128] x) => (float[N,64] y) { y = MatMul (x, x) }")
    weight = np.ones((128, 64), np.float32)
    model.graph.register_initializer(ir.val("w", const_value=ir.tensor(weight, name="w")))
    next(iter(model.graph)).replace_input_with(1, model.graph.initializers["w"])
    x = np.ones((2, 128), np.float32)
    runner = Runner(model)
    assert runner.inputs == ["x"]
    np.testing.assert_allclose(runner.run({"x": x})["y"], x @ weight, rtol=1e-5)
    assert model.graph.initializers["w"].const_value is not None


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the system tells no sizes")
def test_memory_guard() -> None:
    """Within it neither numpy nor ONNX Runtime gets more than it allows."""
    bomb = parse("g () => (float[N] y) <int64[1] s = {400000000}> { y = ConstantOfShape (s) }")
    with memory_guard(1 << 28):
        with pytest.raises(MemoryError):
            np.ones(1 << 30, np.uint8)
        with pytest.raises(GraphoptError, match="cannot run"):
            Runner(bomb).run({})
    assert np.ones(1 << 30, np.uint8).size
