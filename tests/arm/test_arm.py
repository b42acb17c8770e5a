"""Artifacts for ARM compute there what the model computes here; by emulation, where it is set up.

Skipped with the command that sets it up elsewhere; see `sysroot.py`.
"""

from __future__ import annotations

import json
import pickle
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from graphopt import backends, compilation, files, ir, models, npz, rpc
from graphopt.feeds import workable_feeds
from graphopt.files import ModelLike
from graphopt.quantization import Quantization, quantize
from graphopt.quantizer.checking import check_quantized
from graphopt.quantizer.placement import TABLES
from graphopt.runner import Runner
from graphopt.shapes import Shapes
from graphopt.target import Target
from tests.arm import sysroot

EMULATED = Path(sysroot.__file__).with_name("emulated.py")


@pytest.fixture
def python() -> list[str]:
    """Python for ARM."""
    try:
        return sysroot.python()
    except FileNotFoundError as error:
        pytest.skip(str(error))


def compare(
    model: ModelLike, python: list[str], folder: Path, *, backend: str, within: float, **how: Any
) -> None:
    """Compile for ARM, run there, compare with this machine."""
    loaded = files.load(model)
    feeds = workable_feeds(loaded, Shapes(loaded))
    npz.write(folder / "in.npz", feeds)
    made = compilation.compile(
        loaded, "arm64:cortex-a76", folder / "a", backend=backend, options={"threads": 1}, **how
    )
    subprocess.run(
        [*python, str(EMULATED), str(made), str(folder / "in.npz"), str(folder / "out")],
        check=True,
        timeout=300,
        capture_output=True,
    )
    found = pickle.loads((folder / "out").read_bytes())
    for name, expected in Runner(loaded).run(feeds).items():
        scale = np.abs(expected).max()
        np.testing.assert_allclose(found[name] / scale, expected / scale, rtol=0, atol=within)


def test_floats_in_onnxruntime(python: list[str], tmp_path: Path) -> None:
    compare(models.path("digits_cnn"), python, tmp_path, backend="ort", within=1e-5)


def test_signed_integers_in_onnxruntime(python: list[str], tmp_path: Path) -> None:
    compare(s8s8(), python, tmp_path, backend="ort", within=5e-2)


@pytest.mark.parametrize("method", ["static", "dynamic"])
def test_what_is_quantized_for_arm(method: Any, tmp_path: Path) -> None:
    """All kernels there give what they give here.

    On the processor that is compiled for: with SME, which `-cpu max` has, ONNX Runtime 1.32 takes
    another kernel for products with ranges of run time, whose results are not these.
    """
    try:
        python = sysroot.python(cpu="cortex-a76")
    except FileNotFoundError as error:
        pytest.skip(str(error))
    report = Quantization()
    made = digits(method, report)
    if method == "static":
        assert report.placement == "ort-arm"
    assert not check_quantized(made, TABLES["ort-arm"])
    compare(made, python, tmp_path, backend="ort", within=5e-2)


def test_ort_files(python: list[str], tmp_path: Path) -> None:
    loaded = files.load(models.path("digits_cnn"))
    feeds = workable_feeds(loaded, Shapes(loaded))
    npz.write(tmp_path / "in.npz", feeds)
    made = compilation.compile(loaded, "arm64", tmp_path / "a", options={"format": "ort"})
    command = [*python, str(EMULATED), str(made), str(tmp_path / "in.npz"), str(tmp_path / "out")]
    done = subprocess.run(command, check=True, timeout=300, capture_output=True, text=True)
    assert "ran in" in done.stdout


def test_a_server_there(python: list[str], tmp_path: Path) -> None:
    loaded = files.load(models.path("digits_cnn"))
    feeds = workable_feeds(loaded, Shapes(loaded))
    made = compilation.compile(loaded, "arm64:cortex-a76", tmp_path / "a", options={"threads": 1})
    serve = (
        "from graphopt import rpc; server = rpc.server('127.0.0.1', 0, 'token'); "
        "print(server.server_port, flush=True); server.serve_forever()"
    )
    with subprocess.Popen([*python, "-c", serve], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            remote = rpc.Remote(made, f"127.0.0.1:{int(process.stdout.readline())}", "token")
            found = remote.run(feeds)
            assert len(remote.benchmark(feeds, 3)) == 3
        finally:
            process.kill()
    for name, expected in Runner(loaded).run(feeds).items():
        np.testing.assert_allclose(np.asarray(found[name]), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("make", ["digits_cnn", "s8s8", "quantized"])
def test_tvm(make: str, python: list[str], tmp_path: Path) -> None:
    reason = backends.get("tvm").can_compile(Target.parse("arm64:cortex-a76"))
    if reason is not None:
        pytest.skip(reason)
    if not sysroot.has_tvm():
        pytest.skip("no TVM for ARM: python tests/arm/sysroot.py --tvm")
    if make == "digits_cnn":
        compare(models.path(make), python, tmp_path, backend="tvm", within=1e-4)
        return
    made = s8s8() if make == "s8s8" else digits("static")
    compare(made, python, tmp_path, backend="tvm", within=5e-2)
    kernels = json.loads((tmp_path / "a" / "kernels.json").read_text())["kernels"]
    assert any("int8" in name for name in kernels.values())


def digits(method: Any, report: Quantization | None = None) -> ir.Model:
    """A model of digits quantized for ARM."""
    loaded = files.load(models.path("digits_cnn" if method == "static" else "digits_transformer"))
    data = npz.read(models.path("digits_cnn").with_name("digits_test.npz"))
    inputs = {v.name or "": data[v.name or ""][:32] for v in loaded.graph.inputs}
    target = "arm64:cortex-a76"
    return quantize(loaded, inputs, target=target, method=method, force=True, report=report)


def s8s8() -> onnx.ModelProto:
    """A product of signed bytes by signed bytes, as ARM multiplies them."""
    node = helper.make_node
    rng = np.random.default_rng(0)
    weights = rng.integers(-127, 128, (32, 16)).astype(np.int8)
    constants = {
        "s": np.array(0.02, np.float32),
        "z": np.array(0, np.int8),
        "w": weights,
        "t": np.full(16, 0.01, np.float32),
        "b": rng.standard_normal(16).astype(np.float32),
    }
    graph = helper.make_graph(
        [
            node("QuantizeLinear", ["x", "s", "z"], ["q"]),
            node("DequantizeLinear", ["q", "s", "z"], ["d"]),
            node("DequantizeLinear", ["w", "t"], ["v"], axis=1),
            node("MatMul", ["d", "v"], ["h"]),
            node("Add", ["h", "b"], ["y"]),
        ],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [4, 32])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [4, 16])],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    imports = [helper.make_opsetid("", 18)]
    return helper.make_model(graph, opset_imports=imports, ir_version=9)
