"""TensorRT: engines are built without a GPU; running them takes one.

All of it is skipped where no TensorRT is installed (extra `tensorrt`), which is most places.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from graphopt import artifact, backends, compilation, files
from graphopt.backends import Array, _cuda_driver, _tensorrt_build
from graphopt.errors import GraphoptError, InputError, MissingError
from graphopt.quantization import Quantization, quantize
from graphopt.quantizer.checking import check_quantized
from graphopt.quantizer.placement import TABLES
from graphopt.target import Target
from tests._models import images, network

BACKEND = backends.get("tensorrt")
ARCHITECTURES = ("sm_75", "sm_80", "sm_86", "sm_89", "sm_120")


@pytest.fixture
def installed() -> None:
    """The library."""
    reason = BACKEND.is_available()
    if reason is not None:
        pytest.skip(reason)


def test_without_the_library_it_says_how_to_get_it() -> None:
    reason = BACKEND.is_available()
    if reason is not None:
        assert "pip install 'graphopt[tensorrt]'" in reason
        assert BACKEND.can_compile(Target.parse("cuda:sm_89")) == reason
        with pytest.raises(MissingError, match=r"graphopt\[tensorrt\]"):
            BACKEND.versions()
    assert "not for cpu" in (BACKEND.can_compile(Target.parse("cpu")) or "")


@pytest.mark.parametrize(
    "wrong", [{"optimization": 9}, {"workspace_mb": -1}, {"shapes": "x"}, {"compatibility": "all"}]
)
def test_options_that_make_no_sense(wrong: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        backends.make_options(BACKEND, wrong)


def build(model: Any, folder: Path, target: str = "cuda:sm_89", **options: Any) -> Path:
    """Compile as it is, without fallback."""
    return compilation.compile(
        model, target, folder, backend="tensorrt", level=0, options=options, fallback=False
    )


def weight(shape: tuple[int, ...]) -> Array:
    """Normal values."""
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def mlp(*nodes: onnx.NodeProto, batch: int | str = 4, **constants: Array) -> onnx.ModelProto:
    """Nodes between x [batch, 64] and y."""
    return helper.make_model(
        helper.make_graph(
            list(nodes),
            "g",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch, 64])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
            [numpy_helper.from_array(array, name) for name, array in constants.items()],
        ),
        opset_imports=[helper.make_opsetid("", 21)],
        ir_version=10,
    )


def plain(batch: int | str = 4) -> onnx.ModelProto:
    """A product and a Relu."""
    node = helper.make_node
    return mlp(
        node("MatMul", ["x", "w"], ["h"], name="product"),
        node("Relu", ["h"], ["y"], name="relu"),
        batch=batch,
        w=weight((64, 32)),
    )


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_it_builds_for(architecture: str, tmp_path: Path) -> None:
    folder = build(half(), tmp_path / "a", f"cuda:{architecture}")
    manifest = artifact.read(folder)
    assert list(manifest.files) == ["model.engine"]
    assert manifest.target.arch == architecture
    assert (folder / "model.engine").stat().st_size > 1000


def half() -> onnx.ModelProto:
    """Computed in float16."""
    node = helper.make_node
    return mlp(
        node("Cast", ["x"], ["a"], to=TensorProto.FLOAT16),
        node("MatMul", ["a", "w"], ["h"]),
        node("Cast", ["h"], ["y"], to=TensorProto.FLOAT),
        w=weight((64, 32)).astype(np.float16),
    )


def quantized(zero: int = 0, kind: type[np.int8 | np.uint8] = np.int8) -> onnx.ModelProto:
    """QDQ on both operands, with an int32 bias as quantizers write it."""
    node = helper.make_node
    return mlp(
        node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        node("DequantizeLinear", ["q", "s", "z"], ["a"]),
        node("DequantizeLinear", ["w", "t"], ["b"], axis=1),
        node("MatMul", ["a", "b"], ["h"]),
        node("DequantizeLinear", ["bias", "s"], ["c"]),
        node("Add", ["h", "c"], ["y"]),
        s=np.array(0.05, np.float32),
        z=np.array(zero, kind),
        w=np.clip(weight((64, 32)) * 40, -127, 127).astype(np.int8),
        t=np.full(32, 0.02, np.float32),
        bias=np.arange(32, dtype=np.int32),
    )


def eight_bit_floats() -> onnx.ModelProto:
    """QDQ in float8."""
    node = helper.make_node
    model = mlp(
        node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        node("DequantizeLinear", ["q", "s", "z"], ["a"]),
        node("MatMul", ["a", "w"], ["y"]),
        s=np.array(0.05, np.float32),
        w=weight((64, 32)),
    )
    model.graph.initializer.append(helper.make_tensor("z", TensorProto.FLOAT8E4M3FN, [], [0.0]))
    return model


def four_bit_blocks() -> onnx.ModelProto:
    """Weights in int4 with a scale per 32 rows."""
    node = helper.make_node
    model = mlp(
        node("DequantizeLinear", ["w", "s"], ["b"], axis=0, block_size=32),
        node("MatMul", ["x", "b"], ["y"]),
        s=np.full((2, 32), 0.1, np.float32),
    )
    values = np.random.default_rng(0).integers(-8, 8, 64 * 32)
    model.graph.initializer.append(helper.make_tensor("w", TensorProto.INT4, [64, 32], values))
    return model


def recurrent() -> onnx.ModelProto:
    """An LSTM over 4 steps."""
    node = helper.make_node
    return mlp(
        node("Unsqueeze", ["x", "axis"], ["a"]),
        node("LSTM", ["a", "w", "r"], ["h"], hidden_size=8),
        node("Squeeze", ["h", "axis"], ["y"]),
        axis=np.array([1], np.int64),
        w=weight((1, 32, 64)),
        r=weight((1, 32, 8)),
    )


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(
    "make",
    [half, quantized, eight_bit_floats, four_bit_blocks, recurrent],
    ids=lambda f: f.__name__,
)
def test_it_builds(make: Callable[[], onnx.ModelProto], tmp_path: Path) -> None:
    build(make(), tmp_path / "a")


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(("zero", "kind"), [(3, np.int8), (0, np.uint8), (128, np.uint8)])
def test_quantization_that_it_does_not_know_becomes_arithmetic(
    zero: int, kind: type[np.int8 | np.uint8], tmp_path: Path
) -> None:
    build(quantized(zero, kind), tmp_path / "a")


@pytest.mark.usefixtures("installed")
def test_ranges_of_sizes(tmp_path: Path) -> None:
    text = "x=1x64/4x64/16x64"
    assert artifact.read(build(plain("n"), tmp_path / "a", shapes=text)).options["shapes"] == text
    with pytest.raises(
        InputError, match=r"needs the sizes of input x \[\?, 64\]: --shapes x=1x64/"
    ):
        build(plain("n"), tmp_path / "b")
    with pytest.raises(InputError, match=r"x=1x32 does not fit its shape \[\?, 64\]"):
        build(plain("n"), tmp_path / "b", shapes="x=1x32")
    with pytest.raises(InputError, match="no input is named 'u'; there are x"):
        build(plain("n"), tmp_path / "b", shapes="u=1x32")


@pytest.mark.usefixtures("installed")
def test_an_architecture_that_it_does_not_build_for(tmp_path: Path) -> None:
    with pytest.raises(MissingError, match="does not build for sm_90, only for sm_75"):
        build(plain(), tmp_path / "a", "cuda:sm_90")
    with pytest.raises(MissingError, match="for NVIDIA GPUs, not for cpu"):
        build(plain(), tmp_path / "a", "cpu")


def test_full_tensorrt_builds_for_its_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """It has no list of architectures; whether the GPU is the target was asked before."""
    monkeypatch.setattr(_tensorrt_build, "architectures", dict[str, Any])
    config = SimpleNamespace()
    _tensorrt_build.aim(config, Target.parse("cuda:sm_89"))
    assert not vars(config)


@pytest.mark.usefixtures("installed")
def test_eight_bit_floats_on_hardware_without_them(tmp_path: Path) -> None:
    with pytest.raises(GraphoptError) as caught:
        build(eight_bit_floats(), tmp_path / "a", "cuda:sm_80")
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("installed")
def test_an_operator_that_it_lacks_is_named(tmp_path: Path) -> None:
    made = plain()
    made.graph.node.append(helper.make_node("Det", ["v"], ["u"], name="odd"))
    made.graph.input.append(helper.make_tensor_value_info("v", TensorProto.FLOAT, [2, 2]))
    made.graph.output.append(helper.make_tensor_value_info("u", TensorProto.FLOAT, []))
    with pytest.raises(GraphoptError, match="node odd: Det: TensorRT has no such operator"):
        build(made, tmp_path / "a")


@pytest.mark.usefixtures("installed")
def test_operators_that_the_standard_defines_by_others(tmp_path: Path) -> None:
    loss = helper.make_node("SoftmaxCrossEntropyLoss", ["x", "labels"], ["y"])
    crop = helper.make_node("CenterCropPad", ["x", "size"], ["y"], axes=[1])
    made = {"a": mlp(loss, labels=np.arange(4)), "b": mlp(crop, size=np.array([48]))}
    for name, model in made.items():
        model.opset_import[0].version = 22
        assert artifact.read(build(model, tmp_path / name)).parts == ()


@pytest.mark.usefixtures("installed")
def test_attention_without_a_kernel_of_its_own(tmp_path: Path) -> None:
    """In float32 there is none."""
    text = """
    <ir_version: 10, opset_import: ["" : 23]>
    g (float[2,3,4,8] q, float[2,3,6,8] k, float[2,3,6,8] v) => (float[2,3,4,8] y)
    { y = Attention(q, k, v) }
    """
    assert artifact.read(build(onnx.parser.parse_model(text), tmp_path / "a")).parts == ()


@pytest.mark.usefixtures("installed")
def test_a_type_that_it_lacks_is_named() -> None:
    text = """
    <ir_version: 10, opset_import: ["" : 18]>
    g (uint16[4] x) => (uint16[4] y) { y = Max(x, x) }
    """
    found = BACKEND.supports(files.load(onnx.parser.parse_model(text)), Target.parse("cuda"))
    assert list(found.values()) == ["Max: x is uint16, which TensorRT lacks"]


@pytest.mark.usefixtures("installed")
def test_the_rest_falls_back(tmp_path: Path) -> None:
    node = helper.make_node
    made = mlp(
        node("MatMul", ["x", "w"], ["a"], name="before"),
        node("Det", ["a"], ["d"], name="odd"),
        node("Add", ["a", "d"], ["e"]),
        node("MatMul", ["e", "w"], ["y"], name="after"),
        w=weight((64, 64)),
        batch=64,
    )
    folder = compilation.compile(made, "cuda:sm_89", tmp_path / "a", backend="tensorrt", level=0)
    found = artifact.read(folder)
    assert [part.backend for part in artifact.compiled(found.parts)] == [
        "tensorrt",
        "onnxruntime",
        "tensorrt",
    ]
    assert set(found.fallback) == {"odd"}


@pytest.mark.usefixtures("installed")
def test_an_engine_without_its_gpu(tmp_path: Path) -> None:
    if BACKEND.can_run(Target.parse("cuda:sm_75")) is None:
        pytest.skip("here is such a GPU")
    folder = build(half(), tmp_path / "a", "cuda:sm_75")
    with pytest.raises(MissingError, match=r"cannot run here: .*(NVIDIA|the GPU here is)"):
        compilation.load(folder)


@pytest.mark.usefixtures("installed")
def test_a_gpu_that_the_library_does_not_know(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_cuda_driver, "missing", lambda: None)
    monkeypatch.setattr(_cuda_driver, "architecture", lambda: "sm_90")
    assert "does not run on the sm_90 here" in str(BACKEND.can_run(Target.parse("cuda")))
    monkeypatch.setattr(_cuda_driver, "architecture", lambda: "sm_89")
    assert BACKEND.can_run(Target.parse("cuda")) is None
    reason = BACKEND.can_run(Target.parse("cuda:sm_86"))
    assert reason == "it is for sm_86 and the GPU here is sm_89"


@pytest.mark.usefixtures("installed")
def test_what_is_quantized_for_a_gpu_builds_whole(tmp_path: Path) -> None:
    report = Quantization()
    model = network()
    made = quantize(model, images(4), target="cuda:sm_89", force=True, report=report)
    assert report.placement == "tensorrt" and not check_quantized(made, TABLES["tensorrt"])
    assert "QuantizeLinear" in {node.op_type for node in made.graph}
    found = artifact.read(build(made, tmp_path / "a"))
    assert [part.backend for part in artifact.compiled(found.parts)] in ([], ["tensorrt"])
    assert not found.fallback
