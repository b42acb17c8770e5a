"""What a group is worth, by what it does on samples."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from graphopt import ir
from graphopt.gram import LINEAR, Gram, affordable, grams, weight_matrix
from graphopt.pruner.adjusting import Kept
from graphopt.pruner.atoms import Axis
from graphopt.pruner.batching import batched
from graphopt.pruner.criteria import by_weights
from graphopt.pruner.groups import Family, Groups
from graphopt.pruner.selection import Scores
from graphopt.runner import BATCH_SECONDS
from graphopt.samples import Samples
from graphopt.taps import tap

__all__ = [
    "by_activations",
    "by_reconstruction",
    "columns_left",
    "completed",
    "family_grams",
    "layer_grams",
    "readers",
]

Reals = npt.NDArray[np.floating[Any]]
Floats = npt.NDArray[np.float64]
Tell = Callable[[str], None]

_ROWS, _BATCH = 64, 16
_STEPS = 64  # a family is taken apart in about so many steps
_DAMPING = 1e-3
_BYTES = 1 << 28
"""Of XᵀX held at once."""


def readers(families: Sequence[Family]) -> list[ir.Node]:
    """The products that sum over pruned channels with weights of their own, in no order."""
    found: dict[ir.Node, None] = {}
    for family in families:
        for slot in family.slots:
            node = slot.reader
            if node is not None and node.op_type in LINEAR and _main(slot.value, node):
                found[node] = None
    return list(found)


def _main(value: ir.Value, node: ir.Node) -> bool:
    tensor = ir.constant(value)
    return value.graph is node.graph and tensor is not None and tensor.dtype.is_floating_point()


def _channels(groups: Groups, node: ir.Node) -> tuple[int, Axis]:
    """The axis of a product's input that it sums over, and the groups that stand along it."""
    axes = groups.trace.axes[node.inputs[0]] if node.inputs[0] is not None else []
    if node.op_type in ("Conv", "ConvTranspose"):
        axis = 1
    else:
        axis = 0 if ir.attribute(node, "transA", 0) else len(axes) - 1
    return axis, groups.trace.atoms.roots(axes[axis])


def _inputs(
    groups: Groups, nodes: Sequence[ir.Node], samples: Samples
) -> Iterator[tuple[ir.Node, Reals]]:
    """The input of each node on each batch of samples."""
    names = [value.name or "" for node in nodes if (value := node.inputs[0]) is not None]
    for found in tap(
        groups.model, names, batched(groups.model, samples, _BATCH), seconds=BATCH_SECONDS
    ):
        for node, name in zip(nodes, names, strict=True):
            yield node, found[name].astype(np.float32, copy=False)


def by_activations(groups: Groups, criterion: str, samples: Samples, tell: Tell) -> Scores:
    """Scores by what the products that read a group are given.

    `activation`: norm of the input times the sum of the weights' magnitudes (Sun et al. 2024,
    A simple and effective pruning approach for large language models); `apoz`: how often it is
    greater than zero (Hu et al. 2016, Network trimming).
    """
    scores = np.zeros(len(groups.trace.atoms))
    squares: dict[ir.Node, Floats] = {}
    nodes = readers(groups.families)
    tell(f"the inputs of {len(nodes)} layers")
    for node, x in _inputs(groups, nodes, samples) if nodes else ():
        axis, _ = _channels(groups, node)
        others = tuple(i for i in range(x.ndim) if i != axis)
        total = np.square(x, dtype=np.float64) if criterion == "activation" else x > 0
        squares[node] = squares.get(node, np.zeros(1)) + total.mean(others)
    for node, total in squares.items():
        _, roots = _channels(groups, node)
        value = np.sqrt(total) if criterion == "activation" else total
        if criterion == "activation":
            matrix = np.abs(weight_matrix(node, _weights(node))).sum(1)
            columns = _column_roots(node, roots, matrix.shape)
            sums, counts = np.zeros(len(scores)), np.zeros(len(scores))
            np.add.at(sums, columns.ravel(), matrix.ravel())
            np.add.at(counts, roots, 1)
            value = value * (sums / np.maximum(counts, 1))[roots]
        np.add.at(scores, roots, value)
    return completed(groups, scores)


def _weights(node: ir.Node) -> Reals:
    array = ir.array(node.inputs[1])
    assert array is not None
    return array.astype(np.float64)


def completed(groups: Groups, scores: Scores) -> Scores:
    """Families that no product reads directly are ranked by their weights."""
    fallback: Scores | None = None
    for family in groups.families:
        if not scores[family.roots].any():
            fallback = by_weights(groups, "l2") if fallback is None else fallback
            scores[family.roots] = fallback[family.roots]
    return scores


def _column_roots(node: ir.Node, roots: Axis, shape: tuple[int, ...]) -> Axis:
    """The group of each column [groups, k] of a product, given that of each input channel."""
    parts, width = shape[0], shape[-1]
    if node.op_type in ("Conv", "ConvTranspose"):
        return np.repeat(roots, parts * width // len(roots)).reshape(parts, width)
    return np.broadcast_to(roots, (parts, width))


def columns_left(groups: Groups, kept: Kept, node: ir.Node) -> Axis | None:
    """Which columns [groups, k] of a product are left, [groups, fewer]; None of uneven groups."""
    _, roots = _channels(groups, node)
    columns = _column_roots(node, roots, weight_matrix(node, _weights(node)).shape)
    left = [np.flatnonzero(row) for row in ~kept.gone[columns]]
    return np.stack(left) if len({len(row) for row in left}) == 1 else None


@dataclass
class _Part:
    """One product of the readers of a family: weights and inverse Gram matrix, per group."""

    inverse: Floats
    weights: Floats
    columns: Axis
    scale: float
    places: dict[int, Axis] = field(default_factory=dict[int, Axis])

    def loss(self, root: int) -> float:
        """The error of taking a group out, all other columns refitted at their best."""
        where = self.places.get(root)
        if where is None:
            return 0.0
        w = self.weights[:, where]
        block = self.inverse[np.ix_(where, where)]
        return float((w * np.linalg.solve(block, w.T).T).sum()) * self.scale

    def remove(self, root: int) -> None:
        """Take a group out and refit the others: elimination, as in optimal brain surgery."""
        where = self.places.pop(root, None)
        if where is None:
            return
        factor = np.linalg.solve(self.inverse[np.ix_(where, where)], self.inverse[where])
        self.weights -= self.weights[:, where] @ factor
        self.inverse -= self.inverse[:, where] @ factor


def by_reconstruction(groups: Groups, samples: Samples, tell: Tell) -> Scores:
    """Groups in the order in which they can be done without best, refitting what reads them.

    Each step takes out what adds the least squared error to the products that read the family,
    all weights left being refitted (Kurtic et al. 2023, ZipLM; Hassibi and Stork 1993, Optimal
    brain surgeon). The score is the error so far, relative to the products' own size.
    """
    scores = np.zeros(len(groups.trace.atoms))
    for number, (family, sums) in enumerate(family_grams(groups, samples, tell)):
        tell(f"reconstruction {number + 1} of {len(groups.families)}: {family.name}")
        parts = list(_parts(groups, sums))
        for part in parts:
            for root in family.roots.tolist():
                where = np.flatnonzero(part.columns == root)
                if where.size:
                    part.places[root] = where
        if parts:
            _eliminate(family, parts, scores)
    return completed(groups, scores)


def _parts(groups: Groups, sums: Mapping[ir.Node, Gram]) -> Iterator[_Part]:
    for node, total in sums.items():
        weights = weight_matrix(node, _weights(node))
        _, roots = _channels(groups, node)
        columns = _column_roots(node, roots, weights.shape)
        gram = total.xtx / total.count
        size = float((np.matmul(weights, gram) * weights).sum())
        for index in range(len(gram)):
            damping = _DAMPING * float(np.trace(gram[index])) / len(gram[index]) + 1e-12
            held = gram[index] + damping * np.eye(len(gram[index]))
            inverse = cast("Floats", np.linalg.inv(held))
            yield _Part(inverse, weights[index].copy(), columns[index], 1 / max(size, 1e-30))


def family_grams(
    groups: Groups, samples: Samples, tell: Tell
) -> Iterator[tuple[Family, dict[ir.Node, Gram]]]:
    """The families, each with XᵀX of the inputs of the products that read it.

    The model runs on the samples once for each 256 MiB of sums.
    """
    waiting = list(groups.families)
    while waiting:
        part: dict[ir.Node, None] = {}
        count, held = 0, 0
        for family in waiting:
            own = [node for node in readers([family]) if node not in part]
            shapes = [weight_matrix(node, _weights(node)).shape for node in own]
            held += sum(8 * size * k * k for size, _, k in shapes)
            if count and held > _BYTES:
                break
            count += 1
            part.update(dict.fromkeys(own))
        found = grams(groups.model, list(part), samples, rows=_ROWS, progress=tell)
        for family in waiting[:count]:
            yield family, {node: found[ir.label(node)] for node in readers([family])}
        waiting = waiting[count:]


def layer_grams(
    model: ir.Model, nodes: Sequence[ir.Node], samples: Samples, tell: Tell
) -> Iterator[tuple[ir.Node, Gram]]:
    """Products with constant weights, each with XᵀX of its inputs; see `family_grams`."""
    waiting = list(nodes)
    while waiting:
        part = affordable(waiting, _BYTES) or waiting[:1]
        found = grams(model, part, samples, rows=_ROWS, progress=tell)
        yield from ((node, found[ir.label(node)]) for node in part)
        waiting = [node for node in waiting if node not in part]


def _eliminate(family: Family, parts: Sequence[_Part], scores: Scores) -> None:
    left: list[int] = family.roots.tolist()
    step = max(1, len(left) // _STEPS)
    total = 0.0
    while left:
        losses = sorted((sum(part.loss(root) for part in parts), root) for root in left)
        for loss, root in losses[:step]:
            total += max(loss, 0.0)
            scores[root] = total
            for part in parts:
                part.remove(root)
        gone = {root for _, root in losses[:step]}
        left = [root for root in left if root not in gone]
