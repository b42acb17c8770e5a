"""How strongly a model's outputs answer to each group, by finite differences."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from graphopt import ir
from graphopt.pruner.batching import batched
from graphopt.pruner.gradients import with_inputs
from graphopt.pruner.groups import Groups, Slot
from graphopt.pruner.measuring import readers
from graphopt.pruner.selection import Scores
from graphopt.runner import Runner
from graphopt.samples import Samples

__all__ = ["by_slope", "distance"]

Array = npt.NDArray[Any]
Tell = Callable[[str], None]

_STEP = 0.25
_BATCH = 32


def by_slope(groups: Groups, samples: Samples, tell: Tell) -> Scores:
    """Squared change of the outputs for a small change of each group, without gradients.

    A group's input weights are scaled by 3/4 where they are read, and the change of the outputs,
    relative to their spread, is what it scores: the diagonal of the Gauss-Newton Hessian in the
    group's gate, which Taylor criteria estimate by gradients (Molchanov et al. 2019, Importance
    estimation for neural network pruning; LeCun et al. 1990, Optimal brain damage).
    """
    nodes = set(readers(groups.families))
    slots = [[slot for slot in family.slots if slot.reader in nodes] for family in groups.families]
    weights = {
        slot.value.name or "": array
        for family in slots
        for slot in family
        if (array := ir.array(slot.value)) is not None
    }
    runner = Runner(with_inputs(groups.model, list(weights)), optimize=True)
    feeds = list(batched(groups.model, samples, _BATCH))
    before = [runner.run({**feed, **weights}) for feed in feeds]
    scores = np.zeros(len(groups.trace.atoms))
    for number, (family, places) in enumerate(zip(groups.families, slots, strict=True)):
        tell(f"slope {number + 1} of {len(groups.families)}: {family.name}")
        for root in family.roots.tolist():
            changed = {**weights, **_scaled(groups, places, root, weights)}
            scores[root] = sum(
                distance(old, runner.run({**feed, **changed}))
                for feed, old in zip(feeds, before, strict=True)
            )
    return scores


def _scaled(
    groups: Groups, places: Sequence[Slot], root: int, weights: Mapping[str, Array]
) -> dict[str, Array]:
    found: dict[str, Array] = {}
    for slot in places:
        name = slot.value.name or ""
        axis = groups.trace.axes[slot.value][slot.axis]
        factor = np.where(groups.trace.atoms.roots(axis) == root, 1 - _STEP, 1.0)
        shape = [1] * weights[name].ndim
        shape[slot.axis] = -1
        scaled = found.get(name, weights[name]) * factor.reshape(shape)
        found[name] = scaled.astype(weights[name].dtype)
    return found


def distance(before: Mapping[str, Any], after: Mapping[str, Any]) -> float:
    """Mean squared difference of the outputs, each relative to its own variance, summed."""
    total = 0.0
    for name, old in before.items():
        if not isinstance(old, np.ndarray):
            continue
        one, other = cast("Array", old), cast("Array", after[name])
        if one.dtype.kind != "f" or one.shape != other.shape:
            continue
        a, b = one.astype(np.float64), other.astype(np.float64)
        total += float(np.mean((a - b) ** 2)) / (float(a.var()) + 1e-12)
    return total
