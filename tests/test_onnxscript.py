"""Rewrite rules of onnxscript run as a pass."""

from __future__ import annotations

import sys
from typing import Any

import onnx
import pytest

from graphopt import files
from graphopt.context import Context
from graphopt.errors import GraphoptError, MissingError
from graphopt.onnxscript import onnxscript_pass

MODEL = """<ir_version: 10, opset_import: ["" : 21]>
    g (float[2] x) => (float[2] y) { [a] t = Neg (x) \n [b] u = Neg (t) \n [c] y = Abs (u) }"""


def double_negation(**options: Any) -> Any:
    """The rule that -(-x) is x; skips where onnxscript is not installed."""
    rewriter = pytest.importorskip("onnxscript.rewriter")

    def before(op: Any, x: Any) -> Any:
        return op.Neg(op.Neg(x))

    def after(op: Any, x: Any) -> Any:
        return op.Identity(x)

    return rewriter.RewriteRule(before, after, **options)


@pytest.mark.parametrize("several", [False, True])
def test_rules_as_a_pass(several: bool) -> None:
    rule = double_negation()
    context = Context(files.load(onnx.parser.parse_model(MODEL)))
    source, before = context.model, files.to_proto(context.model)
    one = onnxscript_pass([rule] if several else rule, "undo-neg")
    assert one.name == str(one) == "undo-neg"
    one.run(context)
    assert [node.op_type for node in context.model.graph] == ["Identity", "Abs"]
    assert files.to_proto(source) == before
    (change,) = context.record.rewrites
    assert set(change.before) == {"a", "b"} and len(change.after) == 1
    one.run(context)
    assert len(context.record.rewrites) == 1


def test_rule_that_fails() -> None:
    def check(*_: Any, **__: Any) -> bool:
        raise ZeroDivisionError("in the rule")

    rule = double_negation(condition_function=check)
    context = Context(files.load(onnx.parser.parse_model(MODEL)))
    with pytest.raises(GraphoptError, match="'onnxscript-rules' failed: ") as caught:
        onnxscript_pass(rule).run(context)
    assert "\n" not in str(caught.value)


def test_without_onnxscript(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript.rewriter", None)
    with pytest.raises(MissingError, match=r"pip install 'graphopt\[onnxscript\]'"):
        onnxscript_pass([])
