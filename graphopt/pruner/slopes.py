"""How strongly a model's outputs answer to each group: by gradients, or by small changes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from graphopt import ir
from graphopt.pruner.batching import batched
from graphopt.pruner.gradients import Tape, with_inputs
from graphopt.pruner.groups import Groups, Slot
from graphopt.pruner.measuring import completed, readers
from graphopt.pruner.selection import Scores
from graphopt.runner import Runner
from graphopt.samples import Samples

__all__ = ["by_changes", "by_gradients", "distance", "scores_of"]

Array = npt.NDArray[Any]
Tell = Callable[[str], None]

_SHAPING = ("Flatten", "Identity", "Reshape", "Squeeze", "Transpose")
_STEP = 0.25
_BATCH = 32
_DRAWS, _SUMMED = 4, 8  # random sums of the outputs, over so many samples each


def by_gradients(groups: Groups, samples: Samples, tell: Tell) -> Scores:
    """Squared first-order change of the outputs without each group, by the reverse mode.

    Molchanov et al. 2019, Importance estimation for neural network pruning: the square of the sum
    of gradient times weight over a group's input weights, on average over samples. There being no
    labels and so no loss, it is the change of random sums of the outputs, each relative to its
    spread: their mean square is that of all outputs (Hutchinson 1990).

    Raises:
        InputError: an operator whose gradient is not known.
    """
    places, weights = _read(groups)
    tape = Tape(groups.model, list(weights))
    rng = np.random.default_rng(0)
    scores = np.zeros(len(groups.trace.atoms))
    for number, feeds in enumerate(batched(groups.model, samples, _SUMMED)):
        tell(f"gradients of batch {number + 1}")
        values = tape.forward(feeds, weights)
        for _ in range(_DRAWS):
            slopes = {
                name: (rng.choice((-1.0, 1.0), array.shape) * _unit(array)).astype(np.float32)
                for name in tape.outputs
                if (array := values[name]).dtype == np.float32
            }
            found = tape.backward(values, slopes, list(weights))
            change = np.zeros(len(scores))
            for slot in dict.fromkeys(slot for family in places for slot in family):
                name = slot.value.name or ""
                if name in found:
                    parts = np.moveaxis(found[name] * weights[name], slot.axis, 0)
                    roots = groups.trace.atoms.roots(groups.trace.axes[slot.value][slot.axis])
                    np.add.at(change, roots, parts.reshape(len(roots), -1).sum(1))
            scores += change**2
    return completed(groups, scores)


def _unit(array: Array) -> float:
    """By what a sum of squared changes becomes their mean relative to the variance."""
    return float(1 / np.sqrt(array.size * (array.var(dtype=np.float64) + 1e-12)))


def by_changes(groups: Groups, samples: Samples, tell: Tell) -> Scores:
    """Squared change of the outputs for a small change of each group, without gradients.

    A group's input weights are scaled by 3/4 where they are read, and the change of the outputs,
    relative to their spread, is what it scores: the diagonal of the Gauss-Newton Hessian in the
    group's gate (LeCun et al. 1990, Optimal brain damage). The model runs once for each group.
    """
    slots, weights = _read(groups)
    runner = Runner(with_inputs(groups.model, list(weights)), optimize=True)
    feeds = list(batched(groups.model, samples, _BATCH))
    before = [runner.run({**feed, **weights}) for feed in feeds]
    scores = np.zeros(len(groups.trace.atoms))
    for number, (family, places) in enumerate(zip(groups.families, slots, strict=True)):
        tell(f"changes {number + 1} of {len(groups.families)}: {family.name}")
        for root in family.roots.tolist():
            changed = {**weights, **_scaled(groups, places, root, weights)}
            scores[root] = sum(
                distance(old, runner.run({**feed, **changed}))
                for feed, old in zip(feeds, before, strict=True)
            )
    return completed(groups, scores)


def _read(groups: Groups) -> tuple[list[list[Slot]], dict[str, Array]]:
    """Where products read each family, and their weights by name."""
    nodes = set(readers(groups.families))
    slots = [[slot for slot in family.slots if slot.reader in nodes] for family in groups.families]
    weights = {
        slot.value.name or "": array
        for family in slots
        for slot in family
        if (array := ir.array(slot.value)) is not None
    }
    return slots, weights


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


def scores_of(value: ir.Value) -> ir.Value:
    """What a Softmax at the end is taken of, which tells more than it does; else the value."""
    found: ir.Value | None = value
    while found is not None:
        node = found.producer()
        if node is None or node.op_type not in (*_SHAPING, "Softmax", "LogSoftmax"):
            return value
        found = node.inputs[0]
        if found is not None and node.op_type not in _SHAPING:
            return found
    return value
