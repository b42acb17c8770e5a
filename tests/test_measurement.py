"""`measure`: its figures, apart from how long anything takes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import parser

from graphopt import compilation, machine, measurement
from graphopt.accuracy import predict, top1
from graphopt.backends import Array, Output
from graphopt.errors import GraphoptError, InputError, MissingError
from graphopt.measurement import measure
from graphopt.timing import Plan

BRIEF = Plan(warmup_seconds=0, warmup_runs=1, seconds=0, runs=4, resamples=10)
X = np.array([[1, 0], [0, 1], [2, 1], [0, 3], [5, 1]], np.float32)
LABELS = np.array([0, 1, 0, 0, 0])


def linear(scale: float = 1, batch: str = "n", extra: str = "") -> onnx.ModelProto:
    """Scores that are the input times a scale."""
    return parser.parse_model(f"""
    <ir_version: 10, opset_import: ["" : 18]>
    g (float[{batch},2] x) => (float[{batch},2] y)
    <float s = {{{scale}}}>
    {{ {extra} y = Mul(x, s) }}
    """)


def test_one_model_by_path(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(linear().SerializeToString())
    found = measure(path, {"x": X}, plan=BRIEF, process=False)
    row = found.models[0]
    assert row.name == "m.onnx"
    assert row.nodes == 1
    assert row.bytes == path.stat().st_size
    assert row.latency is not None
    assert row.latency.runs >= 4
    assert (row.ratio, row.accuracy, row.process, row.ops) == (None, None, None, ())
    assert found.feeds == ("x float32 [5, 2]",)
    assert found.data == "given"
    assert found.backend == "onnxruntime"
    assert found.versions["onnxruntime"]


def test_a_pair_is_compared_with_the_first() -> None:
    models = {"before": linear(extra="h = Identity(x)"), "after": linear(1.5)}
    found = measure(models, {"x": X}, LABELS, plan=BRIEF, process=False, per_op=True)
    before, after = found.models
    assert (before.name, after.name) == ("before", "after")
    assert (before.nodes, after.nodes) == (2, 1)
    assert before.accuracy == after.accuracy == pytest.approx(0.8)
    assert before.worst_difference is None
    assert after.worst_difference == pytest.approx(2.5)
    assert before.ratio is None
    assert after.ratio is not None
    assert after.ratio.low <= after.ratio.high
    assert [op.op for op in after.ops] == ["Mul"]
    assert [(op.op, op.nodes, op.share) for op in after.op_types] in (
        [("Mul", 1, 1.0)],
        [("Mul", 1, 0.0)],  # a clock of whole microseconds may see nothing
    )
    assert found.feeds == ("x float32 [1, 2]",)


def test_a_process_of_its_own_tells_load_time_and_memory() -> None:
    cost = measure(linear(), {"x": X}, plan=BRIEF, latency=False).models[0].process
    assert cost is not None
    assert cost.load_ms > 0
    assert cost.first_run_ms > 0
    assert 10e6 < cost.base_bytes <= cost.peak_bytes < 1e9


def test_a_process_that_crashes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_CHILD", "import os; os.kill(os.getpid(), 11)")
    with pytest.raises(GraphoptError, match="crashed with signal 11"):
        measure(linear(), {"x": X}, plan=BRIEF)


def test_a_process_that_fails_says_why(tmp_path: Path) -> None:
    with pytest.raises(GraphoptError, match="no such artifact folder") as caught:
        machine.process_cost(tmp_path / "absent", {})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("batch", ["n", "1", "2", "5", "7"])
def test_samples_are_run_in_the_models_batches(batch: str, tmp_path: Path) -> None:
    compilation.compile(linear(batch=batch), "cpu", tmp_path / "a", level=0)
    outputs = predict(compilation.load(tmp_path / "a"), {"x": X}, len(X))
    np.testing.assert_array_equal(outputs["y"], X)
    found = measure(linear(batch=batch), {"x": X}, LABELS, plan=BRIEF, process=False)
    assert found.models[0].accuracy == pytest.approx(0.8)
    first = "1" if batch == "n" else batch
    assert found.feeds == (f"x float32 [{first}, 2]",)


def test_many_samples_and_inputs_that_are_not_cut(tmp_path: Path) -> None:
    model = parser.parse_model("""
    <ir_version: 10, opset_import: ["" : 18]>
    g (float[n,2] x, float[3] w) => (float[n,2] y, float total)
    { t = ReduceSum<keepdims = 0>(w) y = Mul(x, t) total = Identity(t) }
    """)
    compilation.compile(model, "cpu", tmp_path / "a", level=0)
    x = np.arange(300, dtype=np.float32).reshape(150, 2)
    feeds: dict[str, Array] = {"x": x, "w": np.ones(3, np.float32)}
    outputs = predict(compilation.load(tmp_path / "a"), feeds, 150)
    np.testing.assert_array_equal(outputs["y"], 3 * x)
    assert outputs["total"] == 3


def test_top1_on_scores_classes_and_names() -> None:
    scores: dict[str, Output] = {"count": np.array(1, np.float32), "y": X}
    assert top1(scores, LABELS) == pytest.approx(0.8)
    assert top1({"y": X[:, :, None, None]}, LABELS) == pytest.approx(0.8)
    assert top1({"label": np.array([0, 1, 1, 1, 1]), "z": [{}]}, LABELS) == pytest.approx(0.4)
    names = np.array(["a", "b"], object)
    assert top1({"label": names}, np.array(["a", "c"])) == 0.5
    assert top1({"y": X}, LABELS[:, None]) == pytest.approx(0.8)
    with pytest.raises(InputError, match="no output has scores"):
        top1({"map": np.zeros((5, 2, 7, 7))}, LABELS)
    with pytest.raises(InputError, match="no labels"):
        measure(linear(), {"x": X[:0]}, LABELS[:0])
    with pytest.raises(InputError, match="no output has scores or classes for the 5 labels"):
        top1({"y": X[:3], "z": None}, LABELS)


def test_a_metric_of_the_users_own() -> None:
    def spread(outputs: Mapping[str, Output], labels: Array) -> float:
        y = outputs["y"]
        assert isinstance(y, np.ndarray)
        return float(y.max() - y.min()) + len(labels)

    found = measure(linear(), {"x": X}, LABELS, metric=spread, latency=False, process=False)
    assert found.models[0].accuracy == 10


def test_differences_that_are_no_number() -> None:
    text = """<ir_version: 10, opset_import: ["" : 18]>
    g (float[n,2] x) => (float[n,2] y, {kind}[n,2] k)
    {{ y = Log(x) c = Cast<to = 6>(x) k = Cast<to = {to}>(c) }}"""
    ints, bools = (
        parser.parse_model(text.format(kind=kind, to=to))
        for kind, to in (("int32", 6), ("bool", 9))
    )
    same = measure({"a": ints, "b": ints}, {"x": -X}, latency=False, process=False)
    assert same.models[1].worst_difference == 0
    other = measure({"a": ints, "b": bools}, {"x": X}, latency=False, process=False)
    assert other.models[1].worst_difference == 4


def test_feeds_are_random_where_none_are_given() -> None:
    found = measure(linear(), plan=BRIEF, process=False, bindings={"n": 3}, seed=7)
    assert found.data == "random, seed 7"
    assert found.feeds == ("x float32 [3, 2]",)


def test_random_feeds_are_of_batch_one_where_the_model_runs_so() -> None:
    found = measure(linear(), latency=False, process=False)
    assert found.feeds == ("x float32 [1, 2]",)
    pairs = parser.parse_model("""
    <ir_version: 10, opset_import: ["" : 18]>
    g (float[n,2] x) => (float[m,2,2] y)
    <int64[3] pairs = {-1, 2, 2}>
    { y = Reshape(x, pairs) }
    """)
    assert measure(pairs, latency=False, process=False).feeds == ("x float32 [2, 2]",)


def test_artifacts_are_measured_as_they_are(tmp_path: Path) -> None:
    folder = compilation.compile(linear(), "cpu", tmp_path / "a", level=0)
    found = measure({"compiled": folder, "model": linear()}, plan=BRIEF, bindings={"n": 2})
    compiled, model = found.models
    assert compiled.nodes is None
    assert compiled.bytes == (folder / "model.onnx").stat().st_size
    assert model.worst_difference == 0
    assert found.feeds == ("x float32 [2, 2]",)


def test_an_artifact_alone_gets_plain_feeds(tmp_path: Path) -> None:
    model = parser.parse_model("""
    <ir_version: 10, opset_import: ["" : 18]>
    g (float16[n] a, int64[2] i, bool[n] m, string[1] s) => (float16[n] y, int64[2] j, bool[n] k,
      string[1] t)
    { y = Neg(a) j = Neg(i) k = Not(m) t = Identity(s) }
    """)
    folder = compilation.compile(model, "cpu", tmp_path / "a", level=0)
    assert measure(folder, plan=BRIEF, process=False).models[0].name == "a"
    sequence = parser.parse_model("""
    <ir_version: 10, opset_import: ["" : 18]>
    g (seq(float[2]) s) => (int64 n) { n = SequenceLength(s) }
    """)
    folder = compilation.compile(sequence, "cpu", tmp_path / "b", level=0)
    with pytest.raises(InputError, match="no random data for input s"):
        measure(folder, plan=BRIEF, process=False)


def test_models_that_take_other_inputs() -> None:
    other = parser.parse_model("""
    <ir_version: 10, opset_import: ["" : 18]>
    g (float[n,3] x) => (float[n,3] y) { y = Neg(x) }
    """)
    with pytest.raises(InputError, match="other: input 'x' takes float32"):
        measure({"one": linear(), "other": other}, {"x": X}, plan=BRIEF, process=False)


def test_targets_that_do_not_run_here() -> None:
    with pytest.raises(MissingError, match="cannot run"):
        measure(linear(), {"x": X}, target="arm64:apple-m2", plan=BRIEF)
    with pytest.raises(InputError, match="no model to measure"):
        measure({}, plan=BRIEF)


def test_json_is_standard() -> None:
    found = measure({"a": linear(), "b": linear(3e38)}, {"x": X}, plan=BRIEF, process=False)
    assert found.models[1].worst_difference == np.inf

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    data: dict[str, Any] = json.loads(found.to_json(), parse_constant=refuse)
    assert data == found.to_dict()
    assert data["models"][1]["worst_difference"] is None
    assert data["machine"]["cores"] >= 1
    assert data["plan"]["runs"] == 4


def test_a_busy_machine_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.getloadavg", lambda: (64.0, 1.0, 1.0))
    found = measure(linear(), {"x": X}, plan=BRIEF, process=False, latency=False)
    assert found.notes == ("the machine was busy (load 64.0): times are uncertain",)


def test_progress_is_told() -> None:
    heard: list[str] = []
    measure(linear(), {"x": X}, plan=BRIEF, progress=lambda fraction, what: heard.append(what))
    assert heard[0] == "loading model"
    assert {"load time and memory", "warming up", "measuring", "outputs"} <= set(heard)


def test_the_machine_without_proc(monkeypatch: pytest.MonkeyPatch) -> None:
    peak = machine.peak_memory()
    assert peak > 1e6

    def absent(self: Path) -> str:
        raise FileNotFoundError(self)

    monkeypatch.setattr(machine.Path, "read_text", absent)
    assert machine.peak_memory() > 1e6 / 1024
    assert machine.Machine.here().governor == ""
    assert measurement.Machine.here().cores >= 1


def test_several_backends_in_processes_of_their_own() -> None:
    """Twice the same one: the only one that is everywhere."""
    found = measure(linear(), {"x": X}, backend=["ort", "ort"], plan=BRIEF, process=False)
    assert [each.backend for each in found.models] == ["onnxruntime", "onnxruntime"]
    assert found.models[1].ratio is not None
    assert found.models[1].worst_difference == 0
    with pytest.raises(InputError, match="no backend has an option 'beads'"):
        measure(linear(), backend=["ort", "ort"], options={"beads": 1})


def test_a_backend_that_cannot_take_a_model_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    once = compilation.compile
    calls: list[str] = []

    def second_fails(*arguments: Any, **options: Any) -> Path:
        calls.append(options["backend"])
        if len(calls) == 2:
            raise GraphoptError("node 7: unheard of")
        return once(*arguments, **options)

    monkeypatch.setattr(compilation, "compile", second_fails)
    found = measure(linear(), {"x": X}, backend=["ort", "ort"], plan=BRIEF, process=False)
    assert len(found.models) == 1
    assert any("with onnxruntime: node 7: unheard of" in note for note in found.notes)
