"""Put the branch of an If whose condition is known in its place.

Why: exporters guard code with checks that the model's own shapes decide; no other pass sees
through an If.
Numerics: exact.
Needs: a condition that is constant, or that shapes prove.
"""

from __future__ import annotations

from dataclasses import dataclass

from graphopt import ir
from graphopt.context import Context
from graphopt.driver import is_used, remove, replace_value
from graphopt.pass_manager import Pass


@dataclass(frozen=True)
class InlineIf(Pass):
    """Outer ones first, so that what stands in a branch not taken is never looked at."""

    def run(self, context: Context) -> None:
        gone: set[ir.Graph] = set()
        for graph in list(ir.graphs(context.model)):
            for node in list(graph):
                if node.op_type != "If" or node.domain or node.graph is None:
                    continue
                if node.graph in gone or context.exhausted:
                    continue
                taken = _condition(context, node)
                if taken is not None:
                    _inline(context, node, taken, gone)


def _condition(context: Context, node: ir.Node) -> bool | None:
    condition = node.inputs[0]
    if condition is None:
        return None
    tensor = ir.constant(condition)
    if tensor is not None:
        return bool(tensor.numpy().reshape(-1)[0]) if tensor.size == 1 else None
    values = context.shapes.values(condition)
    if values is None or values.size != 1:
        return None
    element: object = values.item()
    return element if isinstance(element, bool) else None


def _inline(context: Context, node: ir.Node, taken: bool, gone: set[ir.Graph]) -> None:
    """Move a branch's nodes before the If and let its outputs take over."""
    branches = {name: node.attributes.get(name) for name in ("then_branch", "else_branch")}
    chosen, other = branches["then_branch"], branches["else_branch"]
    if not taken:
        chosen, other = other, chosen
    if chosen is None or other is None:
        return
    branch, graph = chosen.as_graph(), node.graph
    assert graph is not None
    _forget_below(other.as_graph(), gone)
    results = list(branch.outputs)
    branch.outputs.clear()
    weights = take_initializers(context, branch, graph)
    moved = list(branch)
    branch.remove(moved)
    for inner in moved:
        for value in inner.outputs:
            if value.name:
                context.rename(value)
        if inner.name:
            context.free_node(inner.name)
            inner.name = context.unique_node(inner.name)
    moved = [*weights, *moved]
    graph.insert_before(node, moved)
    context.changed("known_condition", [node], moved)
    ours, taken_over = set(moved), set[ir.Value]()
    for old, new in zip(node.outputs, results, strict=False):
        if is_used(old):
            fresh = new.producer() in ours and new not in taken_over
            taken_over.add(new)
            replace_value(context, old, new, fresh=fresh)
    remove(context, node)


def take_initializers(context: Context, branch: ir.Graph, graph: ir.Graph) -> list[ir.Node]:
    """Move a branch's initializers to the graph around it; returns Constants where it has none."""
    constants: list[ir.Node] = []
    for name, value in list(branch.initializers.items()):
        del branch.initializers[name]
        tensor = value.const_value
        assert tensor is not None
        if context.holds_initializers(graph):
            context.rename(value)
            graph.register_initializer(value)
            continue
        if tensor.dtype != ir.DataType.STRING:
            tensor = ir.Tensor(tensor.numpy(), dtype=tensor.dtype)  # it has another name
        node = ir.Node("", "Constant", [], [ir.Attr("value", ir.AttributeType.TENSOR, tensor)])
        node.outputs[0].type, node.outputs[0].shape = value.type, value.shape
        context.rename(value)
        node.outputs[0].name = value.name
        value.replace_all_uses_with(node.outputs[0])
        context.shapes.update(node, context.root(graph))
        constants.append(node)
    return constants


def _forget_below(graph: ir.Graph, gone: set[ir.Graph]) -> None:
    gone.add(graph)
    for node in graph:
        for sub in ir.subgraphs(node):
            _forget_below(sub, gone)
