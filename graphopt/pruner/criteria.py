"""What a group is worth, by its weights."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from graphopt import ir
from graphopt.errors import InputError
from graphopt.pruner.groups import Groups, Slot
from graphopt.pruner.selection import Scores

__all__ = ["DATA_CRITERIA", "WEIGHT_CRITERIA", "by_weights", "dequantized", "gather_scores"]

Reals = npt.NDArray[np.float64]

DATA_CRITERIA = ("activation", "apoz", "hessian", "reconstruction", "taylor")
"""Criteria that look at samples: see `graphopt.pruner.measuring` and `slopes`."""


def by_weights(groups: Groups, criterion: str, seed: int = 0) -> Scores:
    """Scores of all groups by a criterion that needs no data.

    `l1`, `l2`, `lp:P`: sums of |w|^p of all that a group holds of matrices and filters (Li et al.
    2017, Pruning filters for efficient ConvNets). `median`: distance to the other filters of the
    family (He et al. 2019, Filter pruning via geometric median). `bn-scale`: |scale| of
    BatchNormalization (Liu et al. 2017, Network slimming); `random`.

    Raises:
        InputError: no such criterion, or no BatchNormalization in the model.
    """
    if criterion == "random":
        return np.random.default_rng(seed).random(len(groups.trace.atoms))
    if criterion == "median":
        return gather_scores(groups, _distances)
    if criterion == "bn-scale":
        return _scales(groups)
    power = _power(criterion)
    return gather_scores(groups, lambda matrix: (np.abs(matrix) ** power).sum(1))


WEIGHT_CRITERIA = ("bn-scale", "l1", "l2", "lp:P", "median", "random")


def _power(criterion: str) -> float:
    text = {"l1": "1", "l2": "2"}.get(criterion, criterion.removeprefix("lp:"))
    try:
        power = float(text)
    except ValueError:
        power = 0.0
    if not 0 < power < 100:
        known = ", ".join((*WEIGHT_CRITERIA, *DATA_CRITERIA))
        raise InputError(f"no criterion is named {criterion!r}: there are {known}")
    return power


def gather_scores(groups: Groups, measure: Callable[[Reals], Reals]) -> Scores:
    """Sums over the slots of each group of a measure of rows [indices, all the rest]."""
    trace = groups.trace
    scores = np.zeros(len(trace.atoms))
    for slot in sorted(_slots(groups), key=lambda s: (s.value.name or "", s.axis)):
        array = dequantized(slot.value)
        if array.ndim < 2:
            continue
        rows = np.moveaxis(array, slot.axis, 0).reshape(array.shape[slot.axis], -1)
        roots = trace.atoms.roots(trace.axes[slot.value][slot.axis])
        np.add.at(scores, roots, measure(rows))
    return scores


def _slots(groups: Groups) -> set[Slot]:
    return {slot for family in groups.families for slot in family.slots}


def dequantized(value: ir.Value) -> Reals:
    """A constant as real numbers: of quantized weights what they stand for, without the zero."""
    tensor = ir.constant(value)
    assert tensor is not None
    array = tensor.numpy().astype(np.float64)
    for use in value.uses():
        if use.node.op_type != "DequantizeLinear" or use.idx != 0:
            continue
        scale, zero = ir.array(use.node.inputs[1]), None
        if len(use.node.inputs) > 2:
            zero = ir.array(use.node.inputs[2])
        if scale is None:
            continue
        axis = int(str(ir.attribute(use.node, "axis", 1)))
        shape = [1] * array.ndim
        if scale.size > 1 and scale.ndim == 1:
            shape[axis] = -1
        elif scale.size > 1:
            continue  # blocks: the integers rank well enough
        if zero is not None:
            array = array - zero.astype(np.float64).reshape(shape)
        return array * scale.astype(np.float64).reshape(shape)
    return array


def _distances(rows: Reals) -> Reals:
    """The sum of distances of each row to all others."""
    squares = (rows**2).sum(1)
    gram = squares[:, None] + squares[None] - 2 * rows @ rows.T
    found: Reals = np.sqrt(np.maximum(gram, 0)).sum(1)
    return found


def _scales(groups: Groups) -> Scores:
    """|scale| where a BatchNormalization follows; other families are ranked by their weights."""
    trace = groups.trace
    scores = np.zeros(len(trace.atoms))
    seen = np.zeros(len(trace.atoms), np.bool_)
    for node in ir.all_nodes(groups.model):
        scale = node.inputs[1] if node.op_type == "BatchNormalization" else None
        if scale is None or ir.constant(scale) is None:
            continue
        roots = trace.atoms.roots(trace.axes[scale][0])
        np.add.at(scores, roots, np.abs(dequantized(scale)))
        seen[roots] = True
    if not seen.any():
        raise InputError(
            "criterion bn-scale: the model has no BatchNormalization (folded already?)"
        )
    return np.where(seen, scores, by_weights(groups, "l2"))
