"""Let equal weights be one.

Why: exporters write shared weights, masks and small constants once for each use; the file shrinks,
and what was computed from copies becomes a common subexpression.
Numerics: exact.
Needs: nothing. A weight is read only where another one of its type, shape and sample is there.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass

from graphopt import ir
from graphopt.context import Context
from graphopt.driver import drop_initializer, replace_value
from graphopt.pass_manager import Pass
from graphopt.passes._contents import content, sample
from graphopt.passes.eliminate_dead import annotated


@dataclass(frozen=True)
class DedupeInitializers(Pass):
    """Compares what has the same type and shape, first by a few bytes, then by all."""

    def run(self, context: Context) -> None:
        named = annotated(context.model)
        outer = _enclosing(context.model)
        for equal in _classes(context.model):
            # What must stay comes first, that the others may be replaced by it.
            equal.sort(key=lambda v: not (v.is_graph_output() or v.name in named))
            for position, value in enumerate(equal):
                if value.is_graph_output() or value.name in named or context.exhausted:
                    continue
                visible = outer.get(value.graph, ())
                kept = next((v for v in equal[:position] if v.graph in visible), None)
                if kept is not None:
                    context.changed("equal_initializers", [value.name or ""], [kept.name or ""])
                    replace_value(context, value, kept)
                    drop_initializer(context, value)


def _enclosing(model: ir.Model) -> dict[ir.Graph | None, frozenset[ir.Graph]]:
    """For each graph the graphs whose values it can use: itself and those around it."""
    found: dict[ir.Graph | None, frozenset[ir.Graph]] = {}
    stack = [(graph, frozenset[ir.Graph]()) for graph in _roots(model)]
    while stack:
        graph, around = stack.pop()
        found[graph] = around | {graph}
        stack += [(sub, found[graph]) for node in graph for sub in ir.subgraphs(node)]
    return found


def _roots(model: ir.Model) -> list[ir.Graph]:
    return [model.graph, *(function.graph for function in model.functions.values())]


def _classes(model: ir.Model) -> Iterator[list[ir.Value]]:
    """Groups of at least two initializers with the same content, outer graphs' first."""
    values = [
        value
        for graph in ir.graphs(model)
        for value in graph.initializers.values()
        if ir.constant(value) is not None
    ]
    for group in _split(values, _kind):
        for alike in _split(group, lambda value: sample(_tensor(value))):
            yield from _split(alike, lambda value: content(_tensor(value)))


def _split(
    values: Iterable[ir.Value], key: Callable[[ir.Value], Hashable]
) -> Iterator[list[ir.Value]]:
    groups: dict[Hashable, list[ir.Value]] = {}
    for value in values:
        groups.setdefault(key(value), []).append(value)
    return (group for group in groups.values() if len(group) > 1)


def _kind(value: ir.Value) -> Hashable:
    tensor = _tensor(value)
    return tensor.dtype, tuple(tensor.shape.numpy())


def _tensor(value: ir.Value) -> ir.TensorProtocol:
    tensor = ir.constant(value)
    assert tensor is not None
    return tensor
