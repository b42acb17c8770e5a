"""`graphopt explain`: lineage and rewrites, from both ends."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from graphopt import files, ir
from graphopt.cli import main
from graphopt.errors import InputError
from graphopt.explanation import explain
from graphopt.optimization import optimize
from graphopt.report import Report
from tests._text import model

NET = """net (float[2,4] x) => (float[2,4] y) <float one = {1.0}, float three = {3.0}> {
  [drop] i = Identity (x)
  [root] e = Exp (i)
  [shift] p = Add (e, one)
  [log] l = Log (p)
  [scale] m = Mul (l, three)
  [tile] y = Sin (m)
}"""


def optimized() -> tuple[ir.Model, Report]:
    """A model with lineage, and the report of the run."""
    report = Report()
    return optimize(model(NET), lineage=True, report=report), report


def test_where_a_node_came_from() -> None:
    result, report = optimized()
    fused = next(node for node in result.graph if node.op_type == "Softplus")
    found = explain(result, ir.label(fused), report)
    assert found.found and found.op == "Softplus"
    assert set(found.sources) >= {"root", "shift", "log"}
    step = next(step for step in found.steps if step.pass_name == "fuse-activation")
    assert set(step.before) == {"root", "shift", "log"} and step.why and step.numerics
    assert explain(result, fused.outputs[0].name or "", report).node == found.node
    assert explain(result, "tile", report).sources == ("tile",)


def test_what_became_of_a_node() -> None:
    result, report = optimized()
    fused = next(node for node in result.graph if node.op_type == "Softplus")
    for known in (report, None):
        found = explain(result, "root", known)
        assert not found.found or found.op == "Softplus"
    gone = explain(result, "shift", report)
    assert not gone.found and gone.became == (ir.label(fused),)
    assert "went into" in next(gone.lines())
    assert "superfluous" in next(explain(result, "drop", report).lines())
    assert any("optimize with --report" in note for note in explain(result, "shift").notes)
    with pytest.raises(InputError, match="neither the model nor the report"):
        explain(result, "nothing", report)


def test_without_lineage_the_report_tells() -> None:
    report = Report()
    result = optimize(model(NET), report=report)
    fused = next(node for node in result.graph if node.op_type == "Softplus")
    assert set(explain(result, ir.label(fused), report).sources) >= {"shift", "log"}
    assert explain(result, "shift", report).became == (ir.label(fused),)


def test_reports_come_back_and_count_refusals() -> None:
    _, report = optimized()
    report.record("fuse-gelu").refusals = {"a": {"x", "y"}, "b": {"z"}}
    back = Report.from_json(report.to_json())
    assert back.passes == report.passes
    assert back.refusals == {"a": 2, "b": 1} or set(back.refusals) > {"a", "b"}
    for text in ("{}", "[]", '{"passes": [1]}', "no"):
        with pytest.raises(ValueError, match=r"no report|Expecting"):
            Report.from_json(text)


def test_the_command(tmp_path: Path) -> None:
    source, small, run = (tmp_path / name for name in ("a.onnx", "b.onnx", "run.json"))
    files.save(model(NET), source)

    def call(*arguments: object) -> tuple[int, str]:
        result = CliRunner().invoke(main, [str(a) for a in arguments])
        return result.exit_code, result.output

    code, output = call("optimize", source, "-o", small, "--lineage", "--report", run)
    assert code == 0, output
    code, output = call("explain", small, "shift", "--report", run)
    assert code == 0 and "fuse-activation" in output and "why:" in output
    code, output = call("explain", small, "shift", "--report", run, "--json", "-")
    assert json.loads(output)["became"]
    code, output = call("explain", small, "none", "--report", run)
    assert code == 2 and output.count("\n") == 1
    code, output = call("explain", small, "tile", "--report", source)
    assert code == 2 and "not what `optimize --report` writes" in output


def test_a_dry_run_shows_rewrites_and_writes_nothing(tmp_path: Path) -> None:
    source = tmp_path / "a.onnx"
    files.save(model(NET), source)
    result = CliRunner().invoke(main, ["optimize", str(source), "--dry-run", "-v"])
    assert result.exit_code == 0
    assert any(
        "root" in line and "log" in line and "->" in line for line in result.output.splitlines()
    )
    assert "why: " in result.output
    assert list(tmp_path.iterdir()) == [source]
