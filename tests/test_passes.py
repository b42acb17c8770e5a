"""Every pass on the cases of its fixture; `tests/_fixtures.py` describes their format.

A case holds when the result reads as written, the checker accepts it, ONNX Runtime computes the
same with it, a second run leaves every byte alone, and the refusals that it names are reported.
"""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
import pytest

from graphopt import files, ir
from graphopt.context import Context
from graphopt.feeds import random_feeds
from graphopt.pass_manager import PassManager, parse_pipeline
from graphopt.report import PassRecord, Report
from graphopt.runner import Runner
from graphopt.shapes import Shapes
from graphopt.target import Target
from tests._canonical import Canonical
from tests._fixtures import FOLDER, Case, cases

onnx: Any = importlib.import_module("onnx")

CASES = [case for file in sorted(FOLDER.glob("*.onnxtxt")) for case in cases(file)]
ROUNDING = {"float16": 5e-3, "bfloat16": 4e-2, "float64": 1e-9}


def optimized(case: Case, source: Any) -> tuple[ir.Model, PassRecord]:
    """A ModelProto after the case's pass, and what the pass recorded."""
    name = case.headers.get("target")
    context = Context(files.load(source), target=Target.parse(name) if name else None)
    report = Report()
    model = PassManager(parse_pipeline(case.pipeline)).run(context, report)
    return model, report.record(case.pass_name)


def numerics(case: Case) -> str:
    """`exact` or `rounding`: the case's header, else the pass's docstring."""
    if "numerics" in case.headers:
        return case.headers["numerics"]
    module = importlib.import_module(f"graphopt.passes.{case.pass_name.replace('-', '_')}")
    _, _, said = (module.__doc__ or "").partition("Numerics:")
    return said.split()[0].strip(".,;")


def assert_same_outputs(case: Case, before: Any, after: Any) -> None:
    """Both models give the same outputs on random inputs, run by ONNX Runtime as they stand."""
    source = files.load(before)
    feeds = random_feeds(source, Shapes(source), seed=0)
    wanted, found = Runner(source).run(feeds), Runner(files.load(after)).run(feeds)
    assert list(found) == list(wanted)
    exact = numerics(case) == "exact"
    for name, value in wanted.items():
        if not isinstance(value, np.ndarray) or exact or value.dtype.kind not in "fcV":
            np.testing.assert_equal(found[name], value, err_msg=name)
        else:
            tolerance = ROUNDING.get(value.dtype.name, 1e-5)
            scale = float(np.max(np.abs(value), initial=0.0, where=np.isfinite(value)))
            np.testing.assert_allclose(
                found[name], value, rtol=tolerance, atol=tolerance * scale, err_msg=name
            )


def valid(model: Any) -> bool:
    """True where the checker accepts a ModelProto."""
    try:
        onnx.checker.check_model(model, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError):
        return False
    return True


@pytest.mark.parametrize("case", CASES, ids=[case.id for case in CASES])
def test_case(case: Case) -> None:
    """The five checks on one case."""
    before = case.model(case.before)
    pristine = before.SerializeToString(deterministic=True)
    model, record = optimized(case, before)
    after = files.to_proto(model)
    assert before.SerializeToString(deterministic=True) == pristine, "the argument was changed"

    found, expected = Canonical.of(model), Canonical.of(files.load(case.expected()))
    assert found.text == expected.text, onnx.printer.to_text(after)
    assert found.difference(expected, case.free) == ""
    if case.after is None:
        assert not record.rewrites

    if valid(before):
        onnx.checker.check_model(after, full_check=True)

    assert_same_outputs(case, before, after)

    again, _ = optimized(case, after)
    second = files.to_proto(again).SerializeToString(deterministic=True)
    assert second == after.SerializeToString(deterministic=True), "a second run changes the model"

    for wanted in case.refusals:
        assert any(wanted in reason for reason in record.refusals), dict(record.refusals)
