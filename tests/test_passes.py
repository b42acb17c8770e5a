"""Every pass on the cases of its fixture; `tests/_fixtures.py` describes their format.

A case holds when the result reads as written, the checker accepts it, ONNX Runtime computes the
same with it, the refusals that it names are reported, and a second run leaves every byte alone
(which is not asked of lossy passes).
"""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
import pytest

from graphopt import files, ir
from graphopt.context import Context
from graphopt.errors import GraphoptError
from graphopt.feeds import random_feeds
from graphopt.pass_manager import MAX_ROUNDS, PassManager, parse_pipeline
from graphopt.report import PassRecord, Report
from graphopt.runner import Runner
from graphopt.shapes import Shapes
from graphopt.target import Target
from tests._canonical import Canonical
from tests._fixtures import FOLDER, Case, cases

onnx: Any = importlib.import_module("onnx")
importlib.import_module("onnx.reference")

CASES = [case for file in sorted(FOLDER.glob("*.onnxtxt")) for case in cases(file)]
ROUNDING = {"float16": 5e-3, "bfloat16": 4e-2, "float64": 1e-9}


def optimized(case: Case, source: Any) -> tuple[ir.Model, PassRecord]:
    """A ModelProto after the case's pass, and what the pass recorded."""
    name = case.headers.get("target")
    loaded = files.load(source)
    context = Context(
        loaded,
        target=Target.parse(name) if name else None,
        samples=samples(case, loaded),
    )
    report = Report()
    passes = parse_pipeline(case.pipeline)
    rounds = 1 if passes[0].lossy else MAX_ROUNDS
    model = PassManager(passes, rounds=rounds).run(context, report)
    return model, report.record(case.pass_name)


def samples(case: Case, model: ir.Model) -> Any:
    """What a pass calibrates with: random inputs, apart from those that the case fixes."""
    from graphopt.samples import open_samples

    shapes = Shapes(model)
    seeds = range(1, 9)
    feeds = [{**random_feeds(model, shapes, seed=seed), **case.feeds()} for seed in seeds]
    return open_samples(feeds, model)


def numerics(case: Case) -> str:
    """`exact`, `rounding` or `lossy`: the case's header, else the pass's docstring."""
    if "numerics" in case.headers:
        return case.headers["numerics"]
    module = importlib.import_module(f"graphopt.passes.{case.pass_name.replace('-', '_')}")
    _, _, said = (module.__doc__ or "").partition("Numerics:")
    return said.split()[0].strip(".,;")


def outputs(model: Any, feeds: dict[str, Any], *, reference: bool) -> dict[str, Any]:
    """What a ModelProto computes, run as it stands."""
    if not reference:
        return Runner(files.load(model)).run(feeds)
    names = [output.name for output in model.graph.output]
    return dict(zip(names, onnx.reference.ReferenceEvaluator(model).run(None, feeds), strict=True))


def assert_same_outputs(case: Case, before: Any, after: Any) -> None:
    """Both models give the same outputs on random inputs and those of the case.

    ONNX Runtime runs them; where it cannot even load the model before, onnx's reference does.
    """
    source = files.load(before)
    feeds = {**random_feeds(source, Shapes(source), seed=0), **case.feeds()}
    try:
        Runner(source)
    except GraphoptError:
        reference = True
    else:
        reference = False
    wanted = outputs(before, feeds, reference=reference)
    found = outputs(after, feeds, reference=reference)
    assert list(found) == list(wanted)
    within = float(case.headers["within"]) if "within" in case.headers else None
    for name, value in wanted.items():
        assert_same(name, found[name], value, exact=numerics(case) == "exact", within=within)


def assert_same(
    name: str, found: Any, wanted: Any, *, exact: bool, within: float | None = None
) -> None:
    """One output: equal, or floats within rounding (or `within`) relative to the largest."""
    dtype = getattr(wanted, "dtype", None)
    if dtype is None or exact or dtype.kind not in "fcV":
        np.testing.assert_equal(found, wanted, err_msg=name)
        return
    assert found.dtype == dtype, name
    tolerance = ROUNDING.get(dtype.name, 1e-5) if within is None else within
    a, b = (np.asarray(value).astype(np.float64) for value in (found, wanted))
    scale = float(np.max(np.abs(b), initial=0.0, where=np.isfinite(b)))
    np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * scale, err_msg=name)


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

    for wanted in case.refusals:
        assert any(wanted in reason for reason in record.refusals), dict(record.refusals)

    if numerics(case) == "lossy":
        return  # pruned twice is pruned more
    again, _ = optimized(case, after)
    second = files.to_proto(again).SerializeToString(deterministic=True)
    assert second == after.SerializeToString(deterministic=True), "a second run changes the model"
