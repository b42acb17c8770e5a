"""Remove operators that give back what they get.

Why: exporters leave them by the hundred: casts, reshapes and slices that change nothing, dropouts,
scalings by one, reductions over axes of size one.
Numerics: exact, up to the sign of a zero (-0.0 + 0 is 0), to what Relu makes of NaN, and to
infinity, which a Clip without bounds would make the largest finite number.
Needs: shapes, where the operator could have changed them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from graphopt.pass_manager import RewritePass
from graphopt.passes import _noop_moves, _noop_values
from graphopt.rewriting import Rule


@dataclass(frozen=True)
class EliminateIdentity(RewritePass):
    """Rules for everything that does nothing."""

    RULES: ClassVar[tuple[Rule, ...]] = (*_noop_moves.RULES, *_noop_values.RULES)
