"""Replace a layer by two thin ones.

Why: at rank r a layer of k inputs and n outputs multiplies r * (k + n) times, not k * n times; the
kernel of a convolution may become one along its columns and one along its rows in the same way.
Numerics: lossy; the report says how far results moved.
Needs: nothing; with samples the factors fit the layer's outputs instead of its weights. Layers for
which no rank saves anything, and convolutions in groups, stay as they are.

How it is done, and by whom it was first, is told by `graphopt.lowrank`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from graphopt import gram, ir
from graphopt.context import Context
from graphopt.driver import drop_initializer, remove, replace_value
from graphopt.errors import InputError
from graphopt.gram import Gram
from graphopt.lowrank import Halves, Truncation, can_split, halves, is_plane, sides
from graphopt.pass_manager import Pass
from graphopt.passes._grams import by_parts
from graphopt.wildcards import check, fits, names

_WORTH = 0.95


@dataclass(frozen=True)
class FactorizeWeights(Pass):
    """`energy` is the share of squared singular values that stays, which decides the rank.

    With `ratio` it is instead the share of a layer's weights that stay. `keep` lists patterns of
    nodes to leave alone.
    """

    lossy: ClassVar[bool] = True
    energy: float = 0.99
    ratio: float = 0.0
    keep: tuple[str, ...] = ()

    def run(self, context: Context) -> None:
        check(context.model, self.keep)
        if not 0 < self.energy <= 1 or not 0 <= self.ratio < 1:
            raise InputError("factorize-weights: energy is above 0 to 1, ratio 0 to below 1")
        layers = [node for node in context.model.graph if self._applies(node)]
        for part, grams in by_parts(context, layers):
            for node in part:
                self._factorize(context, node, grams.get(ir.label(node)))

    def _applies(self, node: ir.Node) -> bool:
        return can_split(node) and not fits(self.keep, *names(node.inputs[1]))

    def _factorize(self, context: Context, node: ir.Node, sums: Gram | None) -> None:
        weight, array = node.inputs[1], ir.array(node.inputs[1])
        assert weight is not None and array is not None
        matrix = gram.weight_matrix(node, array)[0].astype(np.float64)
        whole = np.concatenate([matrix, np.zeros((len(matrix), 1))], axis=1)
        moment = None if sums is None else sums.moment[0]
        if moment is not None:
            moment[-1, :-1] = moment[:-1, -1] = 0  # means count as the rest does: biases stay
        found: list[tuple[float, int, bool, Truncation]] = []
        for plane in (False, True) if is_plane(node, array.shape) else (False,):
            each = sum(sides(node, array.shape, plane=plane))
            truncation = Truncation(array.shape, whole, moment, plane=plane)
            rank = self._rank(truncation, array.size, each)
            if rank * each < _WORTH * array.size:
                price = truncation.error(rank) if self.ratio else float(rank * each)
                found.append((price, rank, plane, truncation))
        if not found:
            context.record.refuse(node, "no rank that keeps enough is smaller")
            return
        _, rank, plane, truncation = min(found, key=lambda item: item[:3])
        first, second, _ = truncation.factors(rank)
        parts = halves(node, array.dtype, first, second, plane=plane)
        made = _nodes(context, node, parts)
        context.changed("factorize", [node], made)
        replace_value(context, node.outputs[0], made[-1].outputs[0], fresh=True)
        remove(context, node)
        if weight.graph is not None and not weight.uses():
            drop_initializer(context, weight)

    def _rank(self, truncation: Truncation, size: int, each: int) -> int:
        if self.ratio:
            return min(max(1, int(self.ratio * size / each)), len(truncation.values))
        squares = truncation.values**2
        shares = np.cumsum(squares) / max(float(np.sum(squares)), 1e-300)
        return int(np.searchsorted(shares, self.energy * (1 - 1e-12))) + 1


def _nodes(context: Context, node: ir.Node, parts: Halves) -> list[ir.Node]:
    """The two operators that take a node's place; the second has its bias."""
    graph = node.graph
    assert graph is not None
    source: ir.Value | None = node.inputs[0]
    hint = node.inputs[1].name if node.inputs[1] is not None else node.op_type
    made: list[ir.Node] = []
    for part, (array, attributes) in enumerate(zip(parts.weights, parts.attributes, strict=True)):
        value = context.initializer(graph, ir.tensor(array), f"{hint}_{'ab'[part]}")
        bias = node.inputs[2:] if part else ()
        name = context.unique_node(f"{ir.label(node)}_{'ab'[part]}")
        new = ir.Node("", node.op_type, [source, value, *bias], attributes, name=name)
        new.outputs[0].name = context.unique(f"{node.outputs[0].name}_{'ab'[part]}")
        new.meta[ir.SOURCES] = ir.sources(node)
        graph.insert_before(node, new)
        context.shapes.update(new, context.root(graph))
        made.append(new)
        source = new.outputs[0]
    return made
