"""What is particular to the ONNX Runtime backend: options, formats, dtypes, providers."""

from __future__ import annotations

import dataclasses
import importlib
import json
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, parser

from graphopt import artifact, backends, compilation
from graphopt.backends import Array, _cuda_driver, _onnxruntime_session
from graphopt.errors import GraphoptError, InputError, MissingError
from graphopt.target import Target

BACKEND = backends.get("onnxruntime")
HEADER = '<ir_version: 10, opset_import: ["" : 20]>'


def model(text: str) -> onnx.ModelProto:
    """A model from its text without the header."""
    return parser.parse_model(f"{HEADER} g {text}")


def run(text: str, folder: Path, feeds: dict[str, Any], **options: object) -> dict[str, Any]:
    """Compile, load and run."""
    compilation.compile(model(text), "cpu", folder, level=0, options=options)
    return dict(compilation.load(folder).run(feeds))


CONV = "(float[1,16,8,8] x) => (float[1,16,8,8] z) { y = Conv(x, w) z = Relu(y) }"


def conv() -> onnx.ModelProto:
    """A network that ONNX Runtime lays out for the CPU it is on."""
    made = model(CONV)
    weights = np.random.default_rng(0).standard_normal((16, 16, 1, 1)).astype(np.float32)
    made.graph.initializer.append(onnx.numpy_helper.from_array(weights, "w"))
    return made


@pytest.mark.parametrize("format", ["onnx", "ort"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"threads": 2, "spinning": False},
        {"inter_threads": 2},
        {"arena": False},
        *({"graph_level": level} for level in ("off", "basic", "extended", "layout", "all")),
    ],
)
def test_options_do_not_change_results(
    tmp_path: Path, format: str, options: dict[str, object]
) -> None:
    x = np.random.default_rng(1).standard_normal((1, 16, 8, 8)).astype(np.float32)
    plain = compilation.compile(
        conv(), "cpu", tmp_path / "plain", level=0, options={"graph_level": "off"}
    )
    made = compilation.compile(
        conv(), "cpu", tmp_path / "made", level=0, options={**options, "format": format}
    )
    assert list(artifact.read(made).files) == [f"model.{format}"]
    a, b = (compilation.load(folder).run({"x": x})["z"] for folder in (plain, made))
    assert isinstance(a, np.ndarray)
    assert isinstance(b, np.ndarray)
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_an_ort_file_for_elsewhere_has_no_layout_of_this_cpu(tmp_path: Path) -> None:
    if "avx512f" not in Target.parse("cpu").isa:
        pytest.skip("ONNX Runtime has blocked layouts for few CPUs")
    sizes = {
        target: compilation.compile(
            conv(), target, tmp_path / target, level=0, options={"format": "ort"}
        )
        for target in ("cpu", "portable", "arm64")
    }
    content = {name: (folder / "model.ort").read_bytes() for name, folder in sizes.items()}
    assert b"ReorderInput" in content["cpu"]
    assert b"ReorderInput" not in content["portable"]
    assert b"ReorderInput" not in content["arm64"]


@pytest.mark.parametrize(
    "wrong",
    [
        {"threads": -1},
        {"inter_threads": 0},
        {"threads": "many"},
        {"threads": True},
        {"graph_level": "99"},
        {"format": "tflite"},
        {"arena": "maybe"},
    ],
)
def test_options_that_make_no_sense(wrong: dict[str, object]) -> None:
    with pytest.raises(InputError, match=next(iter(wrong))):
        backends.make_options(BACKEND, wrong)


def test_options_of_a_manifest_are_checked(tmp_path: Path) -> None:
    folder = compilation.compile(conv(), "cpu", tmp_path / "a", level=0)
    path = folder / artifact.MANIFEST
    text = path.read_text().replace('"threads": 0', '"threads": "x"')
    path.write_text(artifact.sealed(json.loads(text)))
    with pytest.raises(InputError, match="option 'threads' is int"):
        compilation.load(folder)


@pytest.mark.parametrize(
    "dtype", [ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2, np.float16]
)
def test_dtypes_that_numpy_lacks(tmp_path: Path, dtype: type) -> None:
    name = np.dtype(dtype).name.replace("_", "")
    x: Array = np.array([1, -2, 0.5]).astype(np.dtype(dtype))
    found = run(f"({name}[3] x) => ({name}[3] y) {{ y = Identity(x) }}", tmp_path / "a", {"x": x})
    assert found["y"].dtype == dtype
    np.testing.assert_array_equal(found["y"], x)


def test_empty_tensors_of_such_dtypes(tmp_path: Path) -> None:
    x = np.zeros((0, 2), ml_dtypes.bfloat16)
    text = "(bfloat16[n,2] x) => (bfloat16[n,2] y) { y = Identity(x) }"
    assert run(text, tmp_path / "a", {"x": x})["y"].shape == (0, 2)


def test_strings_and_scalars(tmp_path: Path) -> None:
    text = """(string[n] s, float f) => (string[n] t, float g)
    { t = Identity(s) g = Neg(f) }"""
    found = run(text, tmp_path / "a", {"s": np.array(["a", "bc"]), "f": np.array(2, np.float32)})
    assert list(found["t"]) == ["a", "bc"]
    np.testing.assert_array_equal(found["g"], np.array(-2, np.float32), strict=True)


def test_sequences_and_optionals(tmp_path: Path) -> None:
    text = """(float[2] a, seq(float[2]) s) => (seq(float[2]) t, optional(float[2]) o)
    { t = SequenceInsert(s, a) o = Optional(a) }"""
    a = np.array([1, 2], np.float32)
    found = run(text, tmp_path / "a", {"a": a, "s": [a + 1]})
    assert [list(item) for item in found["t"]] == [[2, 3], [1, 2]]
    assert list(found["o"]) == [1, 2]
    inputs = compilation.load(tmp_path / "a").inputs
    assert "sequence" in inputs[1].dtype


def test_feeds_need_not_be_contiguous(tmp_path: Path) -> None:
    x = np.arange(12, dtype=np.float32).reshape(3, 4).T[::2]
    found = run("(float[2,3] x) => (float[2,3] y) { y = Identity(x) }", tmp_path / "a", {"x": x})
    np.testing.assert_array_equal(found["y"], x)


def test_nodes_in_loops_are_profiled_per_run(tmp_path: Path) -> None:
    text = """(float[2] x) => (float[2] y)
    <int64 n = {5}, bool go = {1}>
    {
        y = Loop (n, go, x) <
            body = b (int64 i, bool c, float[2] h) => (bool d, float[2] k)
            { d = Identity(c) [step] k = Sin(h) }
        >
    }"""
    folder = compilation.compile(model(text), "cpu", tmp_path / "a", level=0)
    rows = compilation.load(folder).profile({"x": np.ones(2, np.float32)}, runs=4)
    assert {row.op: row.calls for row in rows}["Sin"] == 5


def test_the_profile_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "temporary").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    folder = compilation.compile(conv(), "cpu", tmp_path / "a", level=0)
    compilation.load(folder).profile({"x": np.zeros((1, 16, 8, 8), np.float32)}, runs=1)
    assert list((tmp_path / "temporary").iterdir()) == []
    assert [path.name for path in tmp_path.iterdir() if path.name not in ("a", "temporary")] == []


def test_a_provider_that_the_wheel_lacks(tmp_path: Path) -> None:
    onnxruntime: Any = importlib.import_module("onnxruntime")
    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime has the CUDA provider")
    reason = BACKEND.can_run(Target.parse("cuda"))
    assert reason is not None
    assert "no CUDAExecutionProvider" in reason
    assert "onnxruntime-gpu" in reason
    folder = compilation.compile(conv(), "cuda:sm_89", tmp_path / "a", level=0)
    with pytest.raises(MissingError, match="CUDAExecutionProvider"):
        compilation.load(folder)


def test_an_artifact_of_another_cpu(tmp_path: Path) -> None:
    folder = compilation.compile(conv(), "arm64:cortex-a76", tmp_path / "a", level=0)
    if Target.parse("cpu").arch == "aarch64":
        pytest.skip("this is an ARM machine")
    with pytest.raises(MissingError, match="it is for aarch64 and this machine is"):
        compilation.load(folder)


@pytest.mark.parametrize("name", ["int4", "uint4", "int2", "uint2"])
@pytest.mark.parametrize("size", [0, 1, 7])
def test_elements_of_less_than_a_byte(tmp_path: Path, name: str, size: int) -> None:
    low, high = (0, 2 ** int(name[-1])) if name[0] == "u" else (-2, 2)
    kind = np.dtype(getattr(ml_dtypes, name))
    numbers = np.arange(size) % (high - low) + low
    x: Array = numbers.astype(np.int8).astype(kind)
    number = getattr(TensorProto, name.upper())
    model = helper.make_model(
        helper.make_graph(
            [
                helper.make_node("Cast", ["x"], ["a"], to=TensorProto.FLOAT),
                helper.make_node("Cast", ["a"], ["y"], to=number),
            ],
            "g",
            [helper.make_tensor_value_info("x", number, [size])],
            [helper.make_tensor_value_info("y", number, [size])],
        ),
        opset_imports=[helper.make_opsetid("", 25)],
        ir_version=13,
    )
    folder = compilation.compile(model, "cpu", tmp_path / "a", backend="ort", level=0)
    found = np.asarray(compilation.load(folder).run({"x": x})["y"])
    assert found.dtype == kind
    assert found.astype(np.int8).tolist() == numbers.tolist()


def test_without_onnxruntime(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = compilation.compile(conv(), "cpu", tmp_path / "a", level=0)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert "pip install onnxruntime" in (BACKEND.is_available() or "")
    with pytest.raises(MissingError, match="pip install onnxruntime"):
        compilation.load(folder)
    with pytest.raises(MissingError, match="pip install onnxruntime"):
        compilation.compile(conv(), "cpu", tmp_path / "b", backend="ort", level=0)


def test_an_onnxruntime_that_is_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onnxruntime.__version__", "1.9.0")
    assert BACKEND.is_available() == "onnxruntime 1.9.0 is too old: pip install 'onnxruntime>=1.20'"


@pytest.mark.parametrize(
    "content", [b"", b"not a model", bytes(100)], ids=["empty", "text", "zeros"]
)
def test_files_that_onnxruntime_refuses(tmp_path: Path, content: bytes) -> None:
    """A folder whose hashes are right but whose model is none."""
    folder = compilation.compile(conv(), "cpu", tmp_path / "a", level=0)
    manifest = artifact.read(folder)
    (folder / artifact.MANIFEST).unlink()
    (folder / "model.onnx").write_bytes(content)
    artifact.write(folder, manifest)
    with pytest.raises(GraphoptError) as caught:
        compilation.load(folder).run({"x": np.zeros((1, 16, 8, 8), np.float32)})
    assert "\n" not in str(caught.value)


def test_a_manifest_of_another_model(tmp_path: Path) -> None:
    folder = compilation.compile(conv(), "cpu", tmp_path / "a", level=0)
    manifest = artifact.read(folder)
    (folder / artifact.MANIFEST).unlink()
    outputs = (*manifest.outputs, *manifest.outputs)
    artifact.write(folder, dataclasses.replace(manifest, outputs=outputs))
    with pytest.raises(InputError, match=r"model\.onnx: its inputs or outputs are not those"):
        compilation.load(folder)


def test_a_weight_outside_the_folder_is_not_read(tmp_path: Path) -> None:
    """The manifest is in order, but the model points at a file that is not the folder's."""
    (tmp_path / "secret").write_bytes(bytes(1024))
    folder = compilation.compile(conv(), "cpu", tmp_path / "a", level=0)
    manifest = artifact.read(folder)
    (folder / artifact.MANIFEST).unlink()
    made = conv()
    made.graph.initializer[0].ClearField("raw_data")
    made.graph.initializer[0].data_location = onnx.TensorProto.EXTERNAL
    made.graph.initializer[0].external_data.add(key="location", value="../secret")
    (folder / "model.onnx").write_bytes(made.SerializeToString())
    artifact.write(folder, manifest)
    with pytest.raises(GraphoptError, match="escapes"):
        compilation.load(folder)


@pytest.mark.parametrize(
    ("provider", "wheel"), [("cuda", "'onnxruntime-gpu"), ("openvino", "onnxruntime-openvino")]
)
def test_providers_of_other_wheels(tmp_path: Path, provider: str, wheel: str) -> None:
    onnxruntime: Any = importlib.import_module("onnxruntime")
    if any(provider in name.lower() for name in onnxruntime.get_available_providers()):
        pytest.skip(f"this onnxruntime has {provider}")
    folder = compilation.compile(
        conv(), "cpu", tmp_path / "a", level=0, options={"provider": provider}
    )
    with pytest.raises(MissingError, match=f"pip install {wheel}"):
        compilation.load(folder)


def test_a_provider_that_does_not_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As CUDA's does not without a driver: ONNX Runtime then goes on without it, and says so only
    in its log."""
    onnxruntime: Any = importlib.import_module("onnxruntime")
    folder = compilation.compile(
        conv(), "cpu", tmp_path / "a", level=0, options={"provider": "cuda"}
    )
    session = onnxruntime.InferenceSession

    asked: list[Any] = []

    def without(*arguments: Any, providers: list[Any], **_: Any) -> Any:
        asked.extend(providers)
        return session(*arguments, providers=["CPUExecutionProvider"])

    def refuses(*_: Any, **__: Any) -> Any:
        raise RuntimeError("Please install TensorRT libraries")

    names = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: names)
    with pytest.raises(MissingError, match="cannot run here: there is no NVIDIA"):
        compilation.load(folder)
    monkeypatch.setattr(_cuda_driver, "missing", lambda: None)
    monkeypatch.setattr(_onnxruntime_session, "_load_libraries", lambda: None)
    for broken in (without, refuses):
        monkeypatch.setattr(onnxruntime, "InferenceSession", broken)
        with pytest.raises(MissingError, match="CUDAExecutionProvider does not start here"):
            compilation.load(folder)
    assert asked == [("CUDAExecutionProvider", {"use_tf32": "0"}), "CPUExecutionProvider"]


def test_bound_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is done on a GPU, with the CPU's memory in place of it."""
    folder = compilation.compile(conv(), "cpu", tmp_path / "a", level=0)
    module = importlib.import_module("graphopt.backends.onnxruntime")
    monkeypatch.setattr(module, "MEMORY", {"CPUExecutionProvider": "cpu"})
    executable = compilation.load(folder)
    times = executable.benchmark({"x": np.ones((1, 16, 8, 8), np.float32)}, 5)
    assert times.shape == (5,)
    with pytest.raises(InputError, match="input 'x' is missing"):
        executable.benchmark({}, 5)


def test_openvino_errors_without_the_names_of_functions() -> None:
    text = (
        "[ONNXRuntimeError] : 1 : FAIL : Exception during initialization: /onnxruntime/a/b.cc:136 "
        "ov::Backend::Backend(Args&&) [with Args = {}] [OpenVINO-EP] Exception while Reading\nit"
    )
    assert str(_onnxruntime_session.failure(RuntimeError(text))) == "Exception while Reading it"
