"""Which rewrite breaks a model: binary search over how many of them are applied.

As LLVM's `-opt-bisect-limit`: the rewrites of a run are numbered, and the first N give a legal
model for every N.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graphopt import files, ir
from graphopt.optimization import optimize
from graphopt.report import Comparison, Report, Rewrite, finite
from graphopt.verification import compare


@dataclass(frozen=True)
class Bisection:
    """The first rewrite after which a model differs from its original."""

    rewrites: int
    """How many rewrites the whole run makes."""
    culprit: str | None
    """The pass, or None where nothing breaks."""
    number: int | None
    """Which rewrite of the run, counted from 1: `--bisect-limit` one less still works."""
    rewrite: Rewrite | None
    verdict: Comparison
    """Of the whole run, or with the culprit as the last rewrite."""

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        plain: dict[str, Any] = finite(dataclasses.asdict(self))
        return plain

    def __str__(self) -> str:
        if self.rewrite is None:
            if not self.rewrites:
                return "nothing was rewritten, so nothing can have broken"
            return f"all {self.rewrites} rewrites are fine: {self.verdict.summary()}"
        before = ", ".join(self.rewrite.before)
        return (
            f"{self.culprit} breaks it: rewrite {self.number} of {self.rewrites}, "
            f"{self.rewrite.rule} at {before}: {self.verdict.summary()}"
        )


def bisect(
    model: files.ModelLike,
    *,
    level: int = 2,
    passes: str | Path | None = None,
    target: str = "portable",
    inputs: Mapping[str, ir.Array] | None = None,
    seed: int = 0,
    tolerance: float | None = None,
    progress: Callable[[str], None] | None = None,
) -> Bisection:
    """Find the first rewrite that breaks a model.

    Raises:
        InputError: as `optimize`.
    """
    original = files.load(model)

    def attempt(limit: int | None) -> tuple[Comparison, list[tuple[str, Rewrite]]]:
        if progress is not None:
            progress("all rewrites" if limit is None else f"the first {limit} rewrites")
        report = Report()
        result = optimize(
            original,
            level=level,
            passes=passes,
            target=target,
            verify="off",
            bisect_limit=limit,
            report=report,
        )
        feeds = None if inputs is None else [inputs]
        verdict = compare(original, result, feeds=feeds, seed=seed, tolerance=tolerance)
        return verdict, [(r.name, rewrite) for r in report.passes for rewrite in r.rewrites]

    verdict, everything = attempt(None)
    if not verdict.different:
        return Bisection(len(everything), None, None, None, verdict)
    good, bad = 0, len(everything)
    while bad - good > 1:
        middle = (good + bad) // 2
        if attempt(middle)[0].different:
            bad = middle
        else:
            good = middle
    with_it, without_it = attempt(bad), attempt(bad - 1)
    remaining = list(without_it[1])
    for name, rewrite in with_it[1]:
        if (name, rewrite) in remaining:
            remaining.remove((name, rewrite))
        else:
            return Bisection(len(everything), name, bad, rewrite, with_it[0])
    raise AssertionError("one more rewrite leaves no trace")
