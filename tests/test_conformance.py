"""A sample of the ONNX node tests; `tests/benchmarks/conformance.py` runs all of them."""

from __future__ import annotations

import pytest

from tests._conformance import VARIANTS, check, node_tests, variants

STEP = 10


@pytest.mark.parametrize("start", range(0, STEP * 10, 10), ids=str)
def test_sample(start: int) -> None:
    """Nothing fails, nothing differs."""
    problems: list[str] = []
    for case in node_tests()[start :: STEP * 10]:
        for variant, model, feeds in variants(case):
            assert variant in VARIANTS
            outcome = check(model, feeds)
            if outcome.problem:
                problems.append(f"{case.name} {variant}: {outcome.problem}")
    assert not problems
