"""`graphopt.optimize` and the public API: pure, quiet, verified."""

from __future__ import annotations

import importlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

import graphopt
from graphopt import ir, models
from graphopt.context import Context
from graphopt.errors import GraphoptError, InputError
from graphopt.optimization import optimize
from graphopt.pass_manager import Pass, load_pass
from graphopt.report import Report
from tests.test_pass_manager import BreakIt

onnx: Any = importlib.import_module("onnx")

CNN = models.path("digits_cnn")

OVERRIDABLE = """<ir_version: 8, opset_import: ["" : 17]>
g (float[N,4] x, float[4,4] w) => (float[N,4] y)
<float[4,4] w = {1,0,0,0, 0,1,0,0, 0,0,1,0, 0,0,0,1}, float s = {2.0}>
{ m = MatMul(x, w) y = Mul(m, s) }"""

CHAIN = """<ir_version: 8, opset_import: ["" : 17]>
g (float[N,4] x) => (float[N,4] y) { a = Neg(x) b = Identity(a) y = Abs(b) }"""


def ops(model: ir.Model) -> list[str]:
    return [node.op_type for node in ir.all_nodes(model)]


def test_the_public_api_is_complete_and_nothing_else() -> None:
    assert graphopt.__all__ == [
        "GraphoptError", "Model", "PassManager", "Refuse", "Report", "Target", "compile",
        "compress", "load", "measure", "optimize", "prune", "quantize", "rewrite", "save", "verify",
    ]  # fmt: skip
    for name in graphopt.__all__:
        assert getattr(graphopt, name) is not None


def test_a_path_a_proto_and_an_ir_model_give_the_same_and_are_left_alone(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    proto, model = onnx.load(CNN), graphopt.load(CNN)
    before = proto.SerializeToString(), onnx.printer.to_text(ir.to_proto(model))
    results = [graphopt.optimize(source) for source in (CNN, str(CNN), proto, model)]
    assert (proto.SerializeToString(), onnx.printer.to_text(ir.to_proto(model))) == before
    files: list[bytes] = []
    for number, result in enumerate(results):
        graphopt.save(result, tmp_path / f"{number}.onnx")
        files.append((tmp_path / f"{number}.onnx").read_bytes())
    assert len(set(files)) == 1
    assert capfd.readouterr() == ("", "")
    assert graphopt.verify(CNN, results[0]).ok


def test_levels_are_ordered_and_others_are_refused() -> None:
    counts = [len(ops(optimize(CNN, level=level))) for level in range(4)]
    assert counts[0] >= counts[1] > counts[2] >= counts[3]
    with pytest.raises(InputError, match="no level 4"):
        optimize(CNN, level=4)


def test_a_pass_that_breaks_the_model_is_undone_and_the_rest_stays() -> None:
    for verify in ("end", "each"):
        report = Report()
        model = ir.onnx_ir.from_onnx_text(CHAIN.replace("Abs(b)", "Exp(b)"))
        passes = [load_pass("eliminate-identity"), BreakIt()]
        result = optimize(model, passes=passes, verify=verify, report=report)  # pyright: ignore[reportArgumentType]
        assert report.rolled_back == ["break-it"]
        assert ops(result) == ["Neg", "Exp"]
        assert report.verification is not None and report.verification.ok


def factor(model: ir.Model) -> float:
    tensor = ir.constant(model.graph.initializers["c"])
    assert tensor is not None
    return float(tensor.numpy())


@dataclass(frozen=True)
class Nudge(Pass):
    """Changes a factor so little that what it makes agrees; a difference behind it does not."""

    def run(self, context: Context) -> None:
        if factor(context.model) == 1.5:
            nudged = ir.tensor(np.float32(1.5001), name="c")
            context.model.graph.initializers["c"].const_value = nudged
            context.refresh()
            context.changed("nudge", ["Mul"], ["Mul"])


def test_a_pass_whose_effect_shows_only_in_the_outputs_is_undone() -> None:
    report = Report()
    model = ir.onnx_ir.from_onnx_text("""<ir_version: 10, opset_import: ["" : 20]>
        net (float[8] x) => (float[8] y) <float c = {1.5}, float d = {1.499}> {
          a = Mul(x, c)
          b = Mul(x, d)
          y = Sub(a, b)
        }""")
    result = optimize(model, passes=[Nudge()], report=report)
    assert report.rolled_back == ["nudge"]
    assert factor(result) == 1.5


@dataclass(frozen=True)
class Crash(Pass):
    """Has changed something when it fails."""

    def run(self, context: Context) -> None:
        BreakIt().run(context)
        raise ZeroDivisionError("by a bug")


def test_a_pass_that_crashes_is_undone_and_named() -> None:
    for verify in ("end", "each"):
        report = Report()
        model = ir.onnx_ir.from_onnx_text(CHAIN)
        passes = [Crash(), load_pass("eliminate-identity")]
        result = optimize(model, passes=passes, verify=verify, report=report)  # pyright: ignore[reportArgumentType]
        assert report.rolled_back == ["crash"]
        assert report.passes[0].rolled_back == "ZeroDivisionError: by a bug"
        assert ops(result) == ["Neg", "Abs"]
    with pytest.raises(GraphoptError, match="a pass crashed"):
        optimize(ir.onnx_ir.from_onnx_text(CHAIN), passes=[Crash()], verify="off")


def test_initializers_that_callers_may_override_stay_inputs_unless_frozen() -> None:
    model = ir.onnx_ir.from_onnx_text(OVERRIDABLE)
    report = Report()
    kept = optimize(model, report=report)
    assert [v.name for v in kept.graph.inputs] == ["x", "w"]
    assert any("--freeze-initializers" in note for note in report.notes)
    frozen = optimize(model, freeze_initializers=True)
    assert [v.name for v in frozen.graph.inputs] == ["x"]
    assert ops(frozen) == ["MatMul"]


def test_shapes_of_inputs_can_be_set() -> None:
    result = optimize(CNN, shapes={"image": [3, 1, 8, 8]})
    shape = result.graph.inputs[0].shape
    assert shape is not None and list(shape) == [3, 1, 8, 8]
    for wrong, message in (
        ({"image": [1, 8, 8]}, "4 dimensions"),
        ({"image": [1, 2, 8, 8]}, "fixed dimension 1"),
        ({"picture": [1]}, "no input is named 'picture'"),
    ):
        with pytest.raises(InputError, match=message):
            optimize(CNN, shapes=wrong)  # pyright: ignore[reportArgumentType]


def test_lineage_is_written_on_request() -> None:
    text = CHAIN.replace("b = Identity(a) y = Abs(b)", "s = Softmax(a) y = Log(s)")
    model = ir.onnx_ir.from_onnx_text(text)
    for number, node in enumerate(model.graph):
        node.name = f"n{number}"
    plain, traced = optimize(model), optimize(model, lineage=True)
    assert not any(node.metadata_props for node in ir.all_nodes(plain))
    sources = {n.op_type: json.loads(n.metadata_props[ir.SOURCES]) for n in ir.all_nodes(traced)}
    assert sources == {"Neg": ["n0"], "LogSoftmax": ["n2", "n1"]}


def test_the_opset_is_kept_unless_another_is_asked_for() -> None:
    assert ir.opset(optimize(CNN).graph) == ir.opset(graphopt.load(CNN).graph)
    assert ir.opset(optimize(CNN, opset=20).graph) == 20


def test_random_and_given_inputs_verify() -> None:
    report = Report()
    image = models.samples()["image"][:8]
    optimize(CNN, inputs={"image": image}, report=report)
    assert report.verification is not None and report.verification.ok
    with pytest.raises(InputError):
        optimize(CNN, inputs={"picture": np.zeros(1)})


def test_a_context_knows_its_opsets_and_names() -> None:
    context = Context(ir.onnx_ir.from_onnx_text(CHAIN))
    assert context.opset(next(ir.all_nodes(context.model))) == 17
    assert context.unique("a") == "a_1"


def test_passes_may_be_a_list_of_names_and_passes() -> None:
    result = optimize(
        onnx.parser.parse_model(CHAIN), passes=["eliminate-identity", load_pass("eliminate-dead")]
    )
    assert ops(result) == ["Neg", "Abs"]


def test_an_unknown_way_to_verify_is_refused() -> None:
    with pytest.raises(InputError, match="off, end, each"):
        optimize(CNN, verify=cast(Any, "never"))


@dataclass(frozen=True)
class Blur(Pass):
    """Multiplies an initializer by a number: a pass that moves results."""

    lossy = True
    by: float = 1.01

    def run(self, context: Context) -> None:
        for value in context.model.graph.initializers.values():
            assert value.const_value is not None
            value.const_value = ir.tensor(value.const_value.numpy() * np.float32(self.by))
            context.changed("blur", [value.name or ""])


LINEAR = """<ir_version: 8, opset_import: ["" : 17]>
g (float[N,4] x) => (float[N,4] y) <float s = {2.0}>
{ a = Neg(x) b = Identity(a) c = Mul(b, s) y = Abs(c) }"""


def test_a_lossy_pass_runs_once_and_its_cost_is_told() -> None:
    report = Report()
    result = optimize(
        onnx.parser.parse_model(LINEAR),
        passes=["eliminate-identity", Blur(), "eliminate-dead"],
        report=report,
    )
    assert "Identity" not in ops(result)
    assert report.verification is not None and report.verification.ok
    assert [loss.name for loss in report.losses] == ["blur", "all"]
    assert report.losses[0].sqnr_db == pytest.approx(40, abs=0.1)
    assert report.record("blur").rewrites == [report.record("blur").rewrites[0]]


def test_a_lossy_pass_that_breaks_the_model_is_undone() -> None:
    report = Report()

    class Drop(Blur):
        def run(self, context: Context) -> None:
            context.model.graph.outputs[0].name = "z"
            context.changed("drop", ["y"])

    result = optimize(onnx.parser.parse_model(LINEAR), passes=[Drop()], report=report)
    assert result.graph.outputs[0].name == "y"
    assert report.rolled_back == ["drop"]
