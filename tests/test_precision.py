"""Conversions between floating point types: what a fixture cannot say."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from graphopt import files, ir, models
from graphopt.errors import InputError
from graphopt.optimization import optimize
from graphopt.report import Report
from graphopt.runner import Runner
from tests._models import parse
from tests._shared import shared

NET = """net (float[N,4] x) => (float[N,4] y) <float[4] b = {1, 2, 3, 4}> {
  a = Mul (x, b) c = Relu (a) y = Add (c, x) }"""


def kinds(model: ir.Model) -> set[ir.DataType]:
    """The types of a model's constants."""
    return {tensor.dtype for tensor in ir.constants(model)}


def same_bytes(a: ir.Model, b: ir.Model) -> bool:
    """Whether two models are the same file."""
    first, second = (files.to_proto(m).SerializeToString(deterministic=True) for m in (a, b))
    return first == second


@pytest.mark.parametrize(
    ("name", "to"),
    [("digits_cnn", "float16"), ("digits_cnn", "bfloat16"), ("digits_transformer", "float16")],
)
def test_halves_weights_and_says_what_it_cost(name: str, to: str) -> None:
    report = Report()
    source = files.load(models.path(name))
    pipeline = f"convert-opset{{version=22,at_least=true}},convert-{to}"
    result = optimize(source, passes=pipeline, report=report)
    assert report.before is not None and report.after is not None
    assert report.after.bytes < 0.6 * report.before.bytes
    assert report.losses[0].sqnr_db is not None and report.losses[0].sqnr_db > 30
    assert same_bytes(optimize(result, passes=f"convert-{to}", verify="off"), result)


def test_there_and_back_is_float32_again() -> None:
    half = optimize(models.path("digits_cnn"), passes="convert-float16", verify="off")
    back = optimize(half, passes="convert-float32")
    assert kinds(half) >= {ir.DataType.FLOAT16}
    assert ir.DataType.FLOAT16 not in kinds(back)
    source = files.load(models.path("digits_cnn"))
    assert [node.op_type for node in back.graph] == [node.op_type for node in source.graph]
    assert [v.name for v in back.graph.initializers.values()] == list(source.graph.initializers)


def test_inputs_and_outputs_too() -> None:
    report = Report()
    inside = optimize(parse(NET), passes="convert-float16")
    model = optimize(inside, passes="convert-float16{keep_io=false}", report=report)
    rewrites = report.passes[0].rewrites
    assert {rewrite.before[0] for rewrite in rewrites} >= {"x", "y"}
    report = Report()
    model = optimize(parse(NET), passes="convert-float16{keep_io=false}", report=report)
    assert report.losses[0].sqnr_db is not None and report.losses[0].sqnr_db > 50
    assert [v.dtype for v in (*model.graph.inputs, *model.graph.outputs)] == [
        ir.DataType.FLOAT16,
        ir.DataType.FLOAT16,
    ]
    assert [node.op_type for node in model.graph] == ["Mul", "Relu", "Add"]
    got = Runner(model).run({"x": np.ones((2, 4), np.float16)})["y"]
    assert np.array_equal(got, np.array([[2, 3, 4, 5]] * 2, np.float16))


def test_keep_takes_operators_and_name_patterns() -> None:
    report = Report()
    optimize(parse(NET), passes="convert-float16{keep=[Relu,Mul*]}", report=report, verify="off")
    kept = dict(report.passes[0].refusals)
    assert kept == {"stays as it is: asked for": {"Relu->c", "Mul->a"}}
    with pytest.raises(InputError, match="fits no operator type"):
        optimize(parse(NET), passes="convert-float16{keep=Conv}")


def test_ranges_come_from_the_data() -> None:
    """What overflows on the samples stays float32; on random inputs it would not."""
    large: Any = [{"x": np.full((1, 4), 6e4, np.float32)}]
    report = Report()
    optimize(parse(NET), passes="convert-float16", data=large, report=report)
    reasons = list(report.passes[0].refusals)
    assert any("leave the range" in r and "on 1 samples" in r for r in reasons)
    assert not report.record("convert-float16").rolled_back
    assert report.losses[0].sqnr_db is None  # nothing is lost


def test_defaults_of_inputs_stay_and_that_is_said() -> None:
    model = parse(NET)
    model.graph.inputs.append(model.graph.initializers["b"])
    report = Report()
    result = optimize(model, passes="convert-float16", report=report)
    assert any("--freeze-initializers" in reason for reason in report.passes[0].refusals)
    assert result.graph.initializers["b"].dtype == ir.DataType.FLOAT


def test_bodies_and_captured_weights() -> None:
    """A whole greedy decoder in a Loop: its weights are converted, it gives the same tokens."""
    path = shared("corpus") / "models/charllama_greedy_loop/model.onnx"
    report = Report()
    result = optimize(path, passes="convert-float16", report=report)
    assert report.after is not None and report.before is not None
    assert report.after.bytes < 0.51 * report.before.bytes
    assert all(output.max_rel == 0 for output in report.losses[0].outputs)
    assert result.graph.outputs[0].dtype == ir.DataType.INT64


def test_elements_of_sequences_stay() -> None:
    text = """net (float[2] x) => (float y) <int64 i = {1}> {
      a = Exp (x) s = SequenceConstruct (x, a) b = SequenceAt (s, i) y = MatMul (b, b) }"""
    result = optimize(parse(text), passes="convert-float16")
    assert [node.op_type for node in result.graph].count("Cast") == 2
    got = Runner(result).run({"x": np.ones(2, np.float32)})["y"]
    assert np.allclose(got, 2 * np.e**2, rtol=2e-3)
