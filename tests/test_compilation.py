"""`compile` and `load`: what goes into an artifact, and what it takes to get it out again."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import parser

import graphopt
from graphopt import artifact, backends, compilation, files, ir
from graphopt.building import verify_artifact
from graphopt.errors import (
    GraphoptError,
    InputError,
    MissingError,
    TimeLimitError,
    VerificationError,
)
from graphopt.files import ModelLike
from graphopt.report import Report
from graphopt.target import Target
from tests._models import parse

TEXT = """
<ir_version: 10, opset_import: ["" : 18]>
g (float[n,2] x) => (float[n,2] y)
<float[2] one = {1, 1}>
{ h = Identity(x) y = Add(h, one) }
"""


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A model file."""
    path = tmp_path / "source.onnx"
    path.write_bytes(parser.parse_model(TEXT).SerializeToString())
    return path


def test_the_manifest_tells_where_it_came_from(source: Path, tmp_path: Path) -> None:
    report = Report()
    folder = compilation.compile(
        source, "cpu", tmp_path / "a", options={"threads": 1}, report=report
    )
    manifest = artifact.read(folder)
    assert manifest.backend in backends.names()
    assert manifest.target == Target.parse("cpu")
    assert manifest.source == "source.onnx"
    assert manifest.source_sha256 == hashlib.sha256(source.read_bytes()).hexdigest()
    assert manifest.options["threads"] == 1
    assert manifest.versions["graphopt"] == graphopt.__version__
    assert manifest.pipeline == report.pipeline
    assert "eliminate-identity" in manifest.pipeline
    assert [info.name for info in manifest.inputs] == ["x"]


def test_level_zero_leaves_the_model_as_it_is(source: Path, tmp_path: Path) -> None:
    folder = compilation.compile(source, "cpu", tmp_path / "a", level=0)
    assert artifact.read(folder).pipeline == ""
    assert operators(folder) == ["Identity", "Add"]


def test_passes_in_place_of_a_level(source: Path, tmp_path: Path) -> None:
    folder = compilation.compile(source, "cpu", tmp_path / "a", passes="eliminate-identity")
    assert artifact.read(folder).pipeline == "eliminate-identity"
    assert operators(folder) == ["Add"]


def operators(folder: Path) -> list[str]:
    """What the model in an artifact consists of."""
    return [node.op_type for node in proto(folder / "model.onnx").graph.node]


def proto(path: Path) -> onnx.ModelProto:
    """The model of a file."""
    return onnx.ModelProto.FromString(path.read_bytes())


def same(path: Path) -> Path:
    """The path itself."""
    return path


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(same, id="path"),
        pytest.param(str, id="text"),
        pytest.param(Path.read_bytes, id="bytes"),
        pytest.param(proto, id="proto"),
        pytest.param(files.load, id="ir"),
    ],
)
def test_every_kind_of_model(
    source: Path, tmp_path: Path, make: Callable[[Path], ModelLike]
) -> None:
    compilation.compile(make(source), "cpu", tmp_path / "a", level=0)
    found = compilation.load(tmp_path / "a").run({"x": np.ones((3, 2), np.float32)})
    np.testing.assert_array_equal(found["y"], np.full((3, 2), 2, np.float32))


def test_an_artifact_needs_neither_the_source_nor_onnx(source: Path, tmp_path: Path) -> None:
    """On the device there may be onnxruntime and numpy only."""
    for name in ("onnx", "ort"):
        compilation.compile(source, "cpu", tmp_path / name, level=0, options={"format": name})
    source.unlink()
    script = """
import sys
sys.path[:] = %r
import numpy as np
from graphopt import compilation
for folder in sys.argv[1:]:
    model = compilation.load(folder)
    result = model.run({"x": np.ones((3, 2), np.float32)})["y"]
    assert result.tolist() == [[2, 2]] * 3, result
    model.benchmark({"x": np.ones((3, 2), np.float32)}, 2)
heavy = {"onnx", "onnx_ir", "sympy", "ml_dtypes", "click", "rich"} & set(sys.modules)
assert not heavy, heavy
"""
    done = subprocess.run(
        [sys.executable, "-c", script % sys.path, tmp_path / "onnx", tmp_path / "ort"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_external_data_goes_into_the_folder(tmp_path: Path) -> None:
    weights = np.arange(2000, dtype=np.float32)
    model = parser.parse_model("""
    <ir_version: 10, opset_import: ["" : 18]>
    g (float[n,2000] x) => (float[n,2000] y) { y = Add(x, w) }
    """)
    model.graph.initializer.append(onnx.numpy_helper.from_array(weights, "w"))
    (tmp_path / "outside").mkdir()
    path = tmp_path / "outside" / "model.onnx"
    files.save(files.load(model), path, external=True)
    assert len(list(path.parent.iterdir())) == 2
    folder = compilation.compile(path, "cpu", tmp_path / "a", level=0)
    shutil.rmtree(path.parent)
    assert len(artifact.read(folder).files) == 2
    found = compilation.load(folder).run({"x": np.zeros((1, 2000), np.float32)})
    np.testing.assert_array_equal(found["y"], weights[None])


def test_a_tampered_model_is_one_line(source: Path, tmp_path: Path) -> None:
    folder = compilation.compile(source, "cpu", tmp_path / "a", level=0)
    path = folder / "model.onnx"
    path.write_bytes(path.read_bytes().replace(b"Add", b"Sub"))
    with pytest.raises(
        InputError, match=r"model\.onnx was changed after it was compiled"
    ) as caught:
        compilation.load(folder)
    assert "\n" not in str(caught.value)


def test_nothing_is_left_where_compiling_fails(tmp_path: Path) -> None:
    (tmp_path / "broken.onnx").write_bytes(b"broken")
    with pytest.raises(InputError):
        compilation.compile(tmp_path / "broken.onnx", "cpu", tmp_path / "a")
    with pytest.raises(GraphoptError):
        compilation.compile(tmp_path / "absent.onnx", "cpu", tmp_path / "a")
    assert [path.name for path in tmp_path.iterdir()] == ["broken.onnx"]


def test_wrong_arguments_come_before_the_work(source: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="unknown target"):
        compilation.compile(source, "abacus", tmp_path / "a")
    with pytest.raises(InputError, match="unknown backend"):
        compilation.compile(source, "cpu", tmp_path / "a", backend="abacus")
    with pytest.raises(InputError, match="no option 'beads'"):
        compilation.compile(source, "cpu", tmp_path / "a", options={"beads": 10})
    with pytest.raises(InputError, match="exists and is not a compiled model"):
        compilation.compile(source, "cpu", tmp_path)
    assert source.exists()


def test_an_artifact_is_replaced_only_on_request(source: Path, tmp_path: Path) -> None:
    folder = compilation.compile(source, "cpu", tmp_path / "a", level=0)
    with pytest.raises(InputError, match="exists"):
        compilation.compile(source, "cpu", folder, level=0)
    compilation.compile(source, "cpu", folder, level=0, options={"format": "ort"}, overwrite=True)
    assert sorted(path.name for path in folder.iterdir()) == ["manifest.json", "model.ort"]


def test_no_backend_for_a_target(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def off(self: object, target: Target) -> str:
        return "it is off"

    monkeypatch.setattr(type(backends.get("ort")), "can_compile", off)
    with pytest.raises(MissingError, match=r"nothing here compiles for cpu: .*it is off"):
        compilation.compile(source, "cpu", tmp_path / "a", backend="ort")


def test_machine_code_is_loaded_only_with_trust(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = compilation.compile(source, "cpu", tmp_path / "a", backend="ort", level=0)
    monkeypatch.setattr(type(backends.get("ort")), "native_code", True)
    with pytest.raises(InputError, match="machine code"):
        compilation.load(folder)
    compilation.load(folder, trust=True)


def test_a_manifest_of_an_unknown_backend(source: Path, tmp_path: Path) -> None:
    folder = compilation.compile(source, "cpu", tmp_path / "a", level=0)
    path = folder / artifact.MANIFEST
    data = json.loads(path.read_text())
    for name in ("abacus", "_onnxruntime_support", 7, None):
        path.write_text(artifact.sealed({**data, "backend": name}))
        with pytest.raises(InputError, match="unknown backend"):
            compilation.load(folder)


def test_signature_without_initializers_and_with_odd_types(tmp_path: Path) -> None:
    text = """
    <ir_version: 3, opset_import: ["" : 8, "ai.onnx.ml" : 1]>
    g (float[1,2] x, float[2] w) => (seq(map(int64, float)) z)
    <float[2] w = {1, 2}>
    { y = Mul(x, w) z = ai.onnx.ml.ZipMap <classlabels_int64s = [5, 7]> (y) }
    """
    folder = compilation.compile(parser.parse_model(text), "cpu", tmp_path / "a", level=0)
    executable = compilation.load(folder)
    assert [info.name for info in executable.inputs] == ["x"]
    found = executable.run({"x": np.ones((1, 2), np.float32)})
    assert found["z"] == [{5: 1.0, 7: 2.0}]


def test_an_artifact_that_computes_something_else(source: Path, tmp_path: Path) -> None:
    """It is compared with what it was made from; random inputs are made up for that."""
    folder = compilation.compile(source, "cpu", tmp_path / "a", backend="ort", level=0)
    model = files.load(source)
    assert verify_artifact(folder, model) is None
    changed = next(v for v in model.graph.initializers.values() if v.dtype == ir.DataType.FLOAT)
    array = ir.array(changed)
    assert array is not None
    changed.const_value = ir.tensor(np.asarray(1.1 * array.astype(np.float64) + 0.1, np.float32))
    with pytest.raises(VerificationError, match="differs"):
        verify_artifact(folder, model)


@pytest.mark.parametrize(("factor", "ok"), [(1.01, True), (1.2, False)])
def test_an_artifact_of_a_quantized_model(tmp_path: Path, factor: float, ok: bool) -> None:
    """Its results may move by a step where a sum lies between two."""
    text = """
        g (float[n,8] x) => (float y) <float w = {1}> {
            q, s, z = DynamicQuantizeLinear (x) d = DequantizeLinear (q, s, z) y = Mul (d, w)
        }"""
    model = parse(text)
    folder = compilation.compile(model, "cpu", tmp_path / "a", backend="ort", level=0)
    weight = model.graph.initializers["w"]
    weight.const_value = ir.tensor(np.array(factor, np.float32), name="w")
    with contextlib.nullcontext() if ok else pytest.raises(VerificationError):
        assert verify_artifact(folder, model) is None


@pytest.mark.parametrize(("backend", "name"), [("tvm", "cpu"), ("tensorrt", "cuda:sm_89")])
def test_machine_code_is_compared_where_it_runs(
    source: Path, tmp_path: Path, backend: str, name: str
) -> None:
    """Where it does not, that is said."""
    chosen, target, report = backends.get(backend), Target.parse(name), Report()
    missing = chosen.can_compile(target)
    if missing is not None:
        pytest.skip(missing)
    options = {"shapes": "x=1x2/2x2/4x2"} if backend == "tensorrt" else {}
    compilation.compile(
        source, target, tmp_path / "a", backend=backend, options=options, report=report
    )
    elsewhere = chosen.can_run(target) is not None
    assert any("was not compared" in note for note in report.notes) == elsewhere


def test_a_comparison_that_takes_too_long_is_none(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slow(*_: object, **__: object) -> None:
        raise TimeLimitError("a run takes more than 10 s")

    monkeypatch.setattr("graphopt.building.verify_artifact", slow)
    missing, report = backends.get("tvm").can_compile(Target.parse("cpu")), Report()
    if missing is not None:
        pytest.skip(missing)
    compilation.compile(
        source, "cpu", tmp_path / "a", backend="tvm", cache=False, level=0, report=report
    )
    said = "what was made was not compared with the model: a run takes more than 10 s"
    assert said in report.notes
