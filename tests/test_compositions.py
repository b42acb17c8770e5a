"""A sample of `benchmarks/compositions.py`: random compositions through levels and exact passes."""

from __future__ import annotations

import pytest

from graphopt import files
from tests.benchmarks.compositions import Pipeline, check, compose, pipelines

LEVELS = [single for name in ("O2", "O3", "cpu") for single in pipelines(name)]


@pytest.mark.parametrize("seed", range(1000, 1014))
def test_levels(seed: int) -> None:
    subject = compose(seed)
    assert subject is not None
    if not subject.prepare():
        pytest.skip("ONNX Runtime does not run the composition itself")
    for pipeline in LEVELS:
        assert check(subject, pipeline) == "", pipeline.name


def test_each_pass() -> None:
    subject = compose(1003)
    assert subject is not None and subject.prepare()
    wrong = {pipeline.name: check(subject, pipeline) for pipeline in pipelines()}
    assert {name: problem for name, problem in wrong.items() if problem} == {}


def test_the_generator_is_steady_and_the_judge_sees() -> None:
    """The same seed gives the same bytes; another constant is noticed."""
    one, two = compose(1001), compose(1001)
    assert one is not None and two is not None and one.prepare()
    first, second = (
        files.to_proto(s.model).SerializeToString(deterministic=True) for s in (one, two)
    )
    assert first == second

    class Wrong(Pipeline):
        def run(self, model: files.ir.Model) -> tuple[files.ir.Model, bool]:
            other = files.copy(model)
            for node in other.graph:
                if node.op_type == "Sigmoid":
                    node.op_type = "Tanh"
            return other, True

    seen = [
        check(subject, Wrong("wrong", []))
        for seed in range(1000, 1020)
        if (subject := compose(seed)) is not None
        and any(node.op_type == "Sigmoid" for node in subject.model.graph)
        and subject.prepare()
    ]
    assert seen and sum(problem.startswith("wrong") for problem in seen) > 0.7 * len(seen)
