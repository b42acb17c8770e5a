"""Which groups go: by ratio, by rank over the whole model, or to fit a budget."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from graphopt.errors import InputError
from graphopt.pruner.atoms import Axis
from graphopt.pruner.groups import Family, Groups
from graphopt.wildcards import fits

__all__ = ["Scores", "Selection", "Unreachable", "check_ratio", "lamp", "meet", "select"]

Scores = npt.NDArray[np.float64]
"""Importance by atom, given for the representative of each group; the least goes first."""

Chosen = TypeVar("Chosen")

_SEARCH_STEPS = 24


class Unreachable(InputError):
    """A budget below what is left when all has gone that can go."""


@dataclass(frozen=True)
class Selection:
    """What pruning by a ratio means for each family."""

    scope: str = "uniform"
    """`uniform`, each family loses its share, or `global`, the least important of all go."""
    round_to: int = 0
    """What is kept of a family is a multiple of this many channels, or all of it; 0 takes the
    largest of 2, 4 and 8 that is at most an eighth of the family."""
    least: float = 0.1
    """No family keeps less than this share."""


def check_ratio(ratio: float, name: str = "ratio") -> float:
    """The ratio. Raises InputError outside 0 to 1."""
    if not 0 <= ratio < 1:
        raise InputError(f"{name} is at least 0 and less than 1, not {ratio:g}")
    return ratio


def lamp(scores: Scores) -> Scores:
    """Scores of one family relative to those that would be left with each (Lee et al. 2021)."""
    order = np.argsort(scores, kind="stable")
    left = np.cumsum(scores[order][::-1])[::-1]
    found = np.empty_like(scores)
    found[order] = scores[order] / np.maximum(left, np.finfo(np.float64).tiny)
    return found


def select(
    groups: Groups, scores: Scores, ratios: Mapping[str, float] | float, how: Selection
) -> Axis:
    """The representatives of the groups that go.

    `ratios` is one for all, or by family name, others losing nothing.
    """
    gone: list[Axis] = [np.zeros(0, np.int64)]
    if how.scope == "global":
        ratio = ratios if not isinstance(ratios, Mapping) else max(ratios.values(), default=0.0)
        shares = _global(groups, scores, ratio)
    else:
        shares = [
            ratios if not isinstance(ratios, Mapping) else ratios.get(family.name, 0.0)
            for family in groups.families
        ]
    for family, share in zip(groups.families, shares, strict=True):
        gone.append(least(family, scores, share, how))
    return np.concatenate(gone)


def least(family: Family, scores: Scores, share: float, how: Selection) -> Axis:
    """The representatives of the groups of a family that go: the least important ones."""
    order = np.argsort(scores[family.roots], kind="stable")
    return family.roots[order[: len(family.roots) - _kept_count(family, share, how)]]


def _global(groups: Groups, scores: Scores, ratio: float) -> list[float]:
    """The share that each family loses if the least important groups of the model go."""
    if not groups.families:
        return []
    normal: list[Scores] = [lamp(scores[family.roots]) for family in groups.families]
    ranked: Scores = np.sort(np.concatenate(normal))
    limit = ranked[min(int(len(ranked) * ratio), len(ranked) - 1)]
    return [float(np.count_nonzero(item < limit)) / len(item) for item in normal]


def _kept_count(family: Family, share: float, how: Selection) -> int:
    """How many groups of a family are left."""
    count = len(family.roots)
    keep = max(count - int(count * share + 1e-9), math.ceil(count * how.least), 1)
    multiple = how.round_to or max(n for n in (1, 2, 4, 8) if n == 1 or n <= count // 8)
    unit = multiple // math.gcd(multiple, family.width)
    if unit > 1:
        keep = min(-(-keep // unit) * unit, count)
    return keep


def by_pattern(groups: Groups, patterns: Mapping[str, float], rest: float) -> dict[str, float]:
    """A ratio for each family: of the first pattern that matches a weight that makes it.

    Raises:
        InputError: a pattern that matches nothing, or a ratio outside 0 to 1.
    """
    unused = set(patterns)
    found: dict[str, float] = {}
    for family in groups.families:
        names = [slot.value.name or "" for slot in family.slots if slot.reader is None]
        found[family.name] = rest
        for pattern, ratio in patterns.items():
            check_ratio(ratio, f"the ratio of {pattern!r}")
            if fits([pattern], *names):
                unused.discard(pattern)
                found[family.name] = ratio
                break
    if unused:
        raise InputError(f"no weight that can be pruned is named {sorted(unused)[0]!r}")
    return found


def meet(choose: Callable[[float], Chosen], size: Callable[[Chosen], float], limit: float) -> float:
    """The least ratio that brings the size of what it leaves down to a limit.

    Raises:
        Unreachable: not even pruning all that can go is enough.
    """
    low, high = 0.0, 1.0
    least = size(choose(high))
    if least > limit:
        raise Unreachable(f"at most {1 - least:.0%} can be pruned away; {limit:.0%} cannot be met")
    for _ in range(_SEARCH_STEPS):
        middle = (low + high) / 2
        if size(choose(middle)) <= limit:
            high = middle
        else:
            low = middle
    return high
