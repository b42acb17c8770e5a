"""What a device's backend adds to the passes of a level."""

from __future__ import annotations

from pathlib import Path

import pytest

from graphopt import Report, files, ir, optimize
from graphopt.compilation import compile as compile_model
from graphopt.target import Target
from tests._text import proto

FOLDED = """<ir_version: 8, opset_import: ["" : 17]>
net (float[N,8] x, float[8,8] w) => (float[N,8] y) <float[8,8] w = {WEIGHTS}> {
  a = MatMul (x, w)
  b = Sigmoid (a)
  y = Mul (a, b)
}
""".replace("WEIGHTS", ", ".join(["0.5"] * 64))


def kinds(model: ir.Model) -> list[str]:
    """Operators with their domains, in order."""
    return [f"{node.domain}::{node.op_type}".removeprefix("::") for node in model.graph]


def test_a_device_adds_the_passes_of_its_backend() -> None:
    report = Report()
    result = optimize(proto(FOLDED), target="cpu", report=report)
    assert kinds(result) == ["MatMul", "com.microsoft::QuickGelu"]
    assert ir.opset(result.graph) == min(23, Target.parse("cpu").opset[1])
    assert ir.opset(result.graph, "com.microsoft") == 1
    assert report.pipeline.startswith("convert-opset")
    again = optimize(result, target="cpu")
    assert files.to_proto(again) == files.to_proto(result)


def test_initializers_that_are_inputs_are_constants_on_a_device() -> None:
    report = Report()
    result = optimize(proto(FOLDED), target="cpu", report=report)
    assert [value.name for value in result.graph.inputs] == ["x"]
    assert any("1 initializers were also inputs" in note for note in report.notes)
    kept = optimize(proto(FOLDED), target="cpu", keep_signature=True)
    assert [value.name for value in kept.graph.inputs] == ["x", "w"]


@pytest.mark.parametrize(
    ("target", "level", "passes", "disable"),
    [
        ("portable", 2, None, []),
        ("cpu", 0, None, []),
        ("cpu", 2, "eliminate-dead", []),
        ("cpu", 2, None, ["fuse-quick-gelu", "convert-opset"]),
        ("cuda", 2, None, []),
    ],
)
def test_no_operators_of_a_vendor_otherwise(
    target: str, level: int, passes: str | None, disable: list[str]
) -> None:
    result = optimize(proto(FOLDED), target=target, level=level, passes=passes, disable=disable)
    assert kinds(result) == ["MatMul", "Sigmoid", "Mul"]
    assert ir.opset(result.graph) == 17


def test_an_opset_that_is_asked_for_stays() -> None:
    result = optimize(proto(FOLDED), target="cpu", opset=18)
    assert ir.opset(result.graph) == 18


def test_a_compiled_model_has_them_too(tmp_path: Path) -> None:
    folder = compile_model(proto(FOLDED), "cpu", tmp_path / "a", backend="onnxruntime")
    assert kinds(files.load(folder / "model.onnx")) == ["MatMul", "com.microsoft::QuickGelu"]
    plain = compile_model(proto(FOLDED), "cpu", tmp_path / "b", backend="onnxruntime", level=0)
    assert kinds(files.load(plain / "model.onnx")) == ["MatMul", "Sigmoid", "Mul"]


def test_half_precision_is_for_processors_that_have_it() -> None:
    text = """<ir_version: 10, opset_import: ["" : 23]>
net (float16[N,8] x) => (float16[N,8] y) {
  a = Exp (x)
  y = Tanh (a)
}
"""
    assert kinds(optimize(proto(text), target="arm64:apple-m1")) == ["Exp", "Tanh"]
    assert kinds(optimize(proto(text), target="arm64:cortex-a72")) == [
        *("Cast", "Exp", "Tanh", "Cast"),
    ]


def test_only_what_was_measured_to_pay_is_made() -> None:
    from graphopt.backends._onnxruntime_legalize import MEASURED, passes

    assert all(0 < row.least <= row.most for row in MEASURED)
    names = [single.name for single in passes(Target.parse("cpu"))]
    assert "fuse-multi-head-attention" not in names
    assert "fuse-quick-gelu" in names and len(set(names)) == len(names)
    assert passes(Target.parse("cuda")) == ()
