"""Parameters and operations of a pruned model, without making it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from graphopt import ir
from graphopt.cost import model_cost, node_cost
from graphopt.errors import GraphoptError
from graphopt.feeds import random_feeds
from graphopt.pruner.adjusting import Kept
from graphopt.pruner.atoms import Axis
from graphopt.pruner.groups import Groups
from graphopt.pruner.splitting import saving
from graphopt.regions import named_sizes
from graphopt.samples import Samples, bindings
from graphopt.shapes import Shapes

__all__ = ["Estimator", "Size", "operations"]


@dataclass(frozen=True)
class Size:
    """What a model holds and does: elements and bytes of constants, operations of one run."""

    parameters: int
    bytes: int
    flops: int


def operations(model: ir.Model, samples: Samples) -> int:
    """What a run on the first sample takes."""
    return model_cost(model, Shapes(model), bindings(model, next(iter(samples)))).flops


class Estimator:
    """Costs as `graphopt.cost` counts them, as products of what is left of the axes.

    Free sizes are those of the first sample, or of random inputs; bodies of control flow count
    once.
    """

    def __init__(self, groups: Groups, samples: Samples | None = None) -> None:
        trace = groups.trace
        sizes = _sizes(groups, samples)
        self._constants: list[tuple[int, int, list[Axis]]] = []
        self._nodes: dict[ir.Node, tuple[float, list[Axis]]] = {}
        self._trace = trace
        for value, axes in trace.axes.items():
            tensor = ir.constant(value)
            if tensor is not None:
                count = math.prod(tensor.shape.numpy())
                lively = [axis for axis in axes if trace.atoms.live(axis)]
                self._constants.append((count, tensor.nbytes, lively))
        live: dict[int, bool] = {}
        for node in ir.all_nodes(groups.model):
            flops = node_cost(node, trace.shapes, sizes).flops
            if not flops or not node.outputs:
                continue
            axes = [*trace.axes.get(node.outputs[0], ()), *_summed(groups, node)]
            for axis in axes:
                if id(axis) not in live:
                    live[id(axis)] = trace.atoms.live(axis)
            self._nodes[node] = flops, [axis for axis in axes if live[id(axis)]]

    def __call__(self, kept: Kept, ranks: Mapping[ir.Node, int] | None = None) -> Size:
        """The size of what is left, where some layers become two of these ranks."""
        shares: dict[int, float] = {}

        def share(axis: Axis) -> float:
            if id(axis) not in shares:
                shares[id(axis)] = kept.count(axis) / len(axis)
            return shares[id(axis)]

        left = [math.prod(map(share, axes)) for _, _, axes in self._constants]
        pairs = list(zip(self._constants, left, strict=True))
        parameters = sum(count * part for (count, _, _), part in pairs)
        size = sum(count * part for (_, count, _), part in pairs)
        flops = sum(c * math.prod(map(share, axes)) for c, axes in self._nodes.values())
        for node, rank in (ranks or {}).items():
            weights = node.inputs[1]
            assert weights is not None and weights.const_value is not None
            shape = [kept.count(axis) for axis in self._trace.axes[weights]]
            saved = saving(node, shape, rank)
            if saved is not None:
                parameters -= saved[0] * math.prod(shape)
                size -= saved[0] * math.prod(shape) * weights.const_value.dtype.itemsize
                count, axes = self._nodes.get(node, (0.0, []))
                flops -= saved[1] * count * math.prod(map(share, axes))
        return Size(round(parameters), round(size), round(flops))


def _sizes(groups: Groups, samples: Samples | None) -> dict[str, int]:
    """Numbers for the free sizes of a model's inputs, by name."""
    model, shapes = groups.model, groups.trace.shapes
    try:
        feeds = random_feeds(model, shapes) if samples is None else next(iter(samples))
    except GraphoptError:
        return {}
    return named_sizes(model, shapes, feeds)


def _summed(groups: Groups, node: ir.Node) -> list[Axis]:
    """The axis that a product sums over."""

    def axes(index: int) -> list[Axis]:
        value = node.inputs[index]
        return [] if value is None else groups.trace.axes[value]

    op = node.op_type
    if op in ("Conv", "ConvInteger", "FusedConv"):
        return [axes(1)[1]]
    if op == "QLinearConv":
        return [axes(3)[1]]
    if op == "ConvTranspose":
        return [axes(1)[0]]
    if op in ("MatMul", "MatMulInteger", "FusedMatMul", "QLinearMatMul"):
        return axes(0)[-2 if ir.attribute(node, "transA", 0) else -1 :][:1]
    if op in ("Gemm", "FusedGemm"):
        return [axes(0)[0 if ir.attribute(node, "transA", 0) else 1]]
    if op in ("LSTM", "GRU", "RNN"):
        return [axes(1)[2]]
    return []
