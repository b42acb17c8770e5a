"""The rewrite engine: patterns, refusals, what the driver takes care of."""

from __future__ import annotations

import numpy as np

from graphopt import ir
from graphopt.context import Context
from graphopt.driver import Driver
from graphopt.report import PassRecord
from graphopt.rewriting import Attribute, Const, Op, Refuse, Rule, rewrite
from tests._text import model


def apply(rule: Rule, text: str) -> tuple[ir.Model, PassRecord]:
    context, record = Context(model(text)), PassRecord("test")
    Driver(context, [(rule, record)]).run()
    return context.model, record


def ops(m: ir.Model) -> list[str]:
    return [node.op_type for node in ir.all_nodes(m)]


@rewrite
def swish(op: Op, x: ir.Value) -> ir.Value:
    return op.Mul(x, op.Sigmoid(x))


@swish.replace
def _(op: Op, x: ir.Value) -> ir.Value:
    return op.HardSwish(x)


def test_operands_of_commutative_operators_match_in_either_order() -> None:
    for order in ("x, s", "s, x"):
        text = f"g (float[4] x) => (float[4] y) {{ s = Sigmoid(x)  y = Mul({order}) }}"
        result, record = apply(swish, text)
        assert ops(result) == ["HardSwish"]
        assert result.graph.outputs[0].name == "y"
        assert [r.rule for r in record.rewrites] == ["swish"]


def test_a_capture_used_twice_must_be_the_same_value() -> None:
    result, record = apply(
        swish, "g (float[4] x, float[4] z) => (float[4] y) { s = Sigmoid(x) y = Mul(z, s) }"
    )
    assert ops(result) == ["Sigmoid", "Mul"]
    assert not record.rewrites and not record.refusals


def test_a_value_needed_elsewhere_is_a_refusal_with_its_name() -> None:
    for text in (
        "g (float[4] x) => (float[4] y, float[4] s) { s = Sigmoid(x) y = Mul(x, s) }",
        "g (float[4] x) => (float[4] y, float[4] z) { s = Sigmoid(x) y = Mul(x, s) z = Neg(s) }",
    ):
        result, record = apply(swish, text)
        assert "HardSwish" not in ops(result)
        assert list(record.refusals) == ["swish: 's' is used elsewhere"]


@rewrite
def half(op: Op, x: ir.Value) -> ir.Value:
    return op.Mul(x, 0.5)


@half.replace
def _(op: Op, x: ir.Value) -> ir.Value:
    return op.Div(x, 2.0)


def test_numbers_match_constants_that_do_not_broadcast() -> None:
    matching = ("float c = {0.5}", "float[1] c = {0.5}", "float[3] c = {0.5, 0.5, 0.5}")
    for constant in matching:
        result, _ = apply(
            half, f"g (float[2,3] x) => (float[2,3] y) <{constant}> {{ y = Mul(x, c) }}"
        )
        assert ops(result) == ["Div"]
    for constant in ("float c = {0.51}", "float[1,1,1] c = {0.5}", "float[3] c = {0.5, 0.5, 0.4}"):
        text = f"g (float[2,3] x) => (float[?,?,?] y) <{constant}> {{ y = Mul(x, c) }}"
        result, _ = apply(half, text)
        assert ops(result) == ["Mul"]


@rewrite
def softmax(op: Op, x: ir.Value, axis: Attribute) -> ir.Value:
    return op.Log(op.Softmax(x, axis=axis))


@softmax.replace
def _(op: Op, x: ir.Value, axis: int) -> ir.Value:
    return op.LogSoftmax(x, axis=axis)


@rewrite
def plain(op: Op, x: ir.Value) -> ir.Value:
    return op.Log(op.Softmax(x))


@plain.replace
def _(op: Op, x: ir.Value) -> ir.Value:
    return op.LogSoftmax(x)


def test_attributes_are_captured_with_defaults_and_must_be_at_them_where_not_named() -> None:
    for attribute, axis in (("", -1), ("<axis=1>", 1)):
        text = f"g (float[2,3] x) => (float[2,3] y) {{ s = Softmax{attribute}(x) y = Log(s) }}"
        result, _ = apply(softmax, text)
        node = next(ir.all_nodes(result))
        assert node.op_type == "LogSoftmax" and ir.attribute(node, "axis") == axis
    result, _ = apply(
        plain, "g (float[2,3] x) => (float[2,3] y) { s = Softmax<axis=0>(x) y = Log(s) }"
    )
    assert ops(result) == ["Softmax", "Log"]


@rewrite
def scaled(op: Op, x: ir.Value, w: Const, s: Const) -> ir.Value:
    return op.Mul(op.MatMul(x, w), s)


@scaled.replace
def _(op: Op, x: ir.Value, w: Const, s: Const) -> ir.Value:
    factor = op.scalar(s)
    if factor is None:
        raise Refuse("the factor is no scalar")
    weight = op.const(w)
    assert weight is not None
    return op.MatMul(x, op.initializer(np.multiply(weight, factor, dtype=weight.dtype)))


def test_constants_are_captured_and_new_ones_replace_them() -> None:
    text = """g (float[2,2] x) => (float[2,2] y)
        <float[2,2] w = {1.0, 2.0, 3.0, 4.0}, float s = {2.0}>
        { m = MatMul(x, w) y = Mul(m, s) }"""
    result, _ = apply(scaled, text)
    weight = ir.array(next(ir.all_nodes(result)).inputs[1])
    assert weight is not None and weight.tolist() == [[2.0, 4.0], [6.0, 8.0]]
    text = text.replace("float s = {2.0}", "float[2] s = {2.0, 3.0}")
    result, record = apply(scaled, text)
    assert ops(result) == ["MatMul", "Mul"]
    assert record.refusals == {"scaled: the factor is no scalar": {"Mul->y"}}
    assert len(result.graph.initializers) == 2


@rewrite.on("Identity")
def identity(op: Op, node: ir.Node) -> ir.Value | None:
    return node.inputs[0]


def test_a_graph_input_that_becomes_an_output_keeps_its_identity() -> None:
    result, _ = apply(identity, "g (float[4] x) => (float[4] y) { y = Identity(x) }")
    assert ops(result) == ["Identity"]
    result, _ = apply(identity, "g (float[4] x) => (float[4] y) { a = Neg(x) y = Identity(a) }")
    assert ops(result) == ["Neg"]
    assert [v.name for v in result.graph.outputs] == ["y"]


def test_two_outputs_of_one_value_stay_two_outputs() -> None:
    text = "g (float[4] x) => (float[4] a, float[4] y) { a = Neg(x) y = Identity(a) }"
    result, _ = apply(identity, text)
    assert [v.name for v in result.graph.outputs] == ["a", "y"]
    assert ops(result) == ["Neg", "Identity"]


def test_lineage_names_and_metadata_go_on_to_what_comes() -> None:
    source = model("g (float[4] x) => (float[4] y) { s = Sigmoid(x) y = Mul(x, s) }")
    for name, node in zip(("first", "second"), source.graph, strict=True):
        node.name, node.metadata_props["layer"] = name, name
    context, record = Context(source), PassRecord("test")
    Driver(context, [(swish, record)]).run()
    node = next(ir.all_nodes(context.model))
    assert node.name == "second"
    assert set(ir.sources(node)) == {"first", "second"}
    assert node.metadata_props["layer"] in ("first", "second")
    assert record.rewrites[0].before == ("second", "first")


def test_the_number_of_rewrites_can_be_limited() -> None:
    source = model(
        "g (float[4] x) => (float[4] y) "
        "{ a = Neg(x) b = Identity(a) c = Abs(b) d = Identity(c) y = Neg(d) }"
    )
    context = Context(source, rewrites_left=1)
    Driver(context, [(identity, PassRecord("test"))]).run()
    assert ops(context.model).count("Identity") == 1
    assert context.exhausted


@rewrite.on("Neg")
def endless(op: Op, node: ir.Node) -> ir.Value | None:
    assert node.inputs[0] is not None
    return op.Neg(node.inputs[0])


def test_rules_that_never_end_are_stopped() -> None:
    result, record = apply(endless, "g (float[4] x) => (float[4] y) { y = Neg(x) }")
    assert ops(result) == ["Neg"]
    assert len(record.rewrites) <= 1100
