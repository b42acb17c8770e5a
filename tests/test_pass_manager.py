"""Pipeline text, options, rounds, verification and rollback."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest

from graphopt import ir
from graphopt.context import Context
from graphopt.errors import InputError
from graphopt.pass_manager import Pass, PassManager, load_pass, parse_pipeline, pass_names
from graphopt.report import Comparison, Report
from graphopt.rewriting import Op
from graphopt.verification import compare

TEXT = """<ir_version: 10, opset_import: ["" : 20]>
g (float[4] x) => (float[4] y) <float z = {0.0}> { a = Add(x, z) b = Neg(a) y = Neg(b) }"""


def model() -> ir.Model:
    return ir.onnx_ir.from_onnx_text(TEXT)


@dataclass(frozen=True)
class BreakIt(Pass):
    """Turns every Neg into Abs."""

    def run(self, context: Context) -> None:
        for node in list(ir.all_nodes(context.model)):
            if node.op_type == "Neg":
                op = Op(context, node)
                assert node.inputs[0] is not None and node.graph is not None
                new = op.Abs(node.inputs[0])
                node.graph.insert_before(node, op.created)
                name, node.outputs[0].name = node.outputs[0].name, None
                node.outputs[0].replace_all_uses_with(new, replace_graph_outputs=True)
                new.name, new.type, new.shape = name, node.outputs[0].type, node.outputs[0].shape
                context.changed("break", [node], op.created)
                node.graph.remove(node, safe=True)


def test_pipeline_text_makes_passes_with_options_and_back() -> None:
    passes = parse_pipeline(" fold-constants{max_bytes=0}, eliminate_identity ")
    assert [p.name for p in passes] == ["fold-constants", "eliminate-identity"]
    assert str(passes[0]) == "fold-constants{max_bytes=0}"
    assert parse_pipeline(str(passes[0])) == passes[:1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("fold-constant", "no pass is named 'fold-constant'"),
        ("fold-constants{size=1}", "has no option 'size'"),
        ("fold-constants{max_bytes=big}", "'max_bytes' of 'fold-constants' is int"),
        ("fold-constants{max_bytes}", "name=value"),
        ("fold-constants,,", "cannot read"),
        ("fold-constants{", "cannot read"),
    ],
)
def test_a_pipeline_that_cannot_be_read_is_one_line(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        parse_pipeline(text)
    assert "\n" not in str(caught.value)


def test_every_module_of_passes_is_a_pass() -> None:
    for name in pass_names():
        assert load_pass(name).name == name


def test_a_pass_that_breaks_the_model_is_rolled_back_and_named() -> None:
    def check(before: ir.Model, after: ir.Model) -> Comparison:
        return compare(before, after, feeds={"x": np.array([1, -2, 3, -4], np.float32)})

    report = Report()
    manager = PassManager([BreakIt(), load_pass("eliminate-identity")], check)
    result = manager.run(Context(model()), report)
    assert report.rolled_back == ["break-it"]
    assert "'y'" in report.passes[0].rolled_back
    assert not report.passes[0].rewrites
    assert report.passes[1].rewrites
    assert "Abs" not in [n.op_type for n in ir.all_nodes(result)]


def test_rounds_go_on_until_nothing_changes() -> None:
    report = Report()
    manager = PassManager(parse_pipeline("eliminate-identity,eliminate-dead"))
    result = manager.run(Context(model()), report)
    again = Report()
    manager.run(Context(result), again)
    assert not any(record.rewrites for record in again.passes)
    assert not report.notes
