"""Put copies of its body in the place of a Loop that runs a small, known number of times.

Why: no other pass sees through a Loop, and each iteration is a call of its own at run time.
Numerics: exact.
Needs: a constant trip count of at most 16, a condition that no data decides, a body without
control flow or random operators, and no more than 256 nodes in all.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from graphopt import ir
from graphopt.context import Context
from graphopt.driver import is_used, remove, replace_value
from graphopt.execute import deterministic
from graphopt.pass_manager import Pass
from graphopt.passes.inline_if import take_initializers

_MOST_TRIPS = 16

_MOST_NODES = 256


@dataclass(frozen=True)
class UnrollLoop(Pass):
    """Inner loops first, so that an outer one may be free of control flow when its turn comes."""

    def run(self, context: Context) -> None:
        for graph in reversed(list(ir.graphs(context.model))):
            for node in list(graph):
                if node.op_type != "Loop" or node.domain or context.exhausted:
                    continue
                context.check_time()
                body = node.attributes.get("body")
                if body is None or not context.holds_initializers(graph):
                    continue
                trips = _trips(context, node, body.as_graph())
                reason = trips if isinstance(trips, str) else _obstacle(body.as_graph(), trips)
                if reason or isinstance(trips, str):
                    context.record.refuse(node, f"unroll_loop: {reason}")
                else:
                    _Unrolling(context, node, body.as_graph()).run(trips)


def _trips(context: Context, node: ir.Node, body: ir.Graph) -> int | str:
    """How often the body runs, or why that is not known."""
    first = True if node.inputs[1] is None else known_number(context, node.inputs[1])
    if first is None:
        return "its condition is not known"
    going_on: ir.Value | None = body.outputs[0]
    while going_on is not None and (producer := going_on.producer()) is not None:
        if producer.op_type != "Identity" or producer.domain or producer.graph is not body:
            break
        going_on = producer.inputs[0]
    further = True if going_on is body.inputs[1] else known_number(context, going_on)
    if further is None:
        return "its condition depends on data"
    count = None if node.inputs[0] is None else known_number(context, node.inputs[0])
    if count is None:
        return "its trip count is not known"
    return max(0, min(count, count if further else 1)) if first else 0


def known_number(context: Context, value: ir.Value | None) -> int | None:
    """The only element of a value, where it is known; a bool as 0 or 1."""
    if value is None:
        return None
    tensor = ir.constant(value)
    if tensor is not None:
        return int(tensor.numpy().item()) if tensor.size == 1 else None
    values = context.shapes.values(value)
    element: object = None if values is None or values.size != 1 else values.item()
    return int(element) if isinstance(element, int) else None


def _obstacle(body: ir.Graph, trips: int) -> str:
    """Why the body may not be copied that often, or nothing."""
    if trips > _MOST_TRIPS:
        return f"it runs more than {_MOST_TRIPS} times"
    if trips * len(body) > _MOST_NODES:
        return f"it would become more than {_MOST_NODES} nodes"
    if any(True for inner in body for _ in ir.subgraphs(inner)):
        return "its body holds control flow"
    if not all(deterministic(inner) for inner in body):
        return "its body may compute another result each time"
    return ""


class _Unrolling:
    """One Loop on its way to copies of its body."""

    def __init__(self, context: Context, node: ir.Node, body: ir.Graph) -> None:
        assert node.graph is not None
        self._context, self._node, self._body, self._graph = context, node, body, node.graph
        self._root = context.root(node.graph)
        self._prefix = node.name or node.outputs[0].name or node.op_type
        self._bound: dict[ir.Value, ir.Value] = {}
        self._made: list[ir.Node] = []

    def run(self, trips: int) -> None:
        """Copy the body `trips` times and let the last values take over."""
        context, node, body = self._context, self._node, self._body
        carried = [value for value in node.inputs[2:] if value is not None]
        results = list(body.outputs)[1:]
        scans: list[list[ir.Value]] = [[] for _ in results[len(carried) :]]
        if len(carried) != len(body.inputs) - 2 or (scans and not trips):
            context.record.refuse(node, "unroll_loop: a result would be empty")
            return
        body.outputs.clear()
        take_initializers(context, body, self._graph)
        inner = list(body)
        self._number(body.inputs[1], np.bool_(True), results)
        for number in range(trips):
            self._bound.update(zip(body.inputs[2:], carried, strict=True))
            self._number(body.inputs[0], np.int64(number), results)
            for original in inner:
                if original.op_type != "Constant" or not number:
                    self._copy(original)
            values = [self._bound.get(value, value) for value in results]
            carried = values[: len(carried)]
            for scan, value in zip(scans, values[len(carried) :], strict=True):
                scan.append(value)
        self._take_over([*carried, *map(self._stacked, scans)])

    def _number(self, formal: ir.Value, number: np.generic, results: list[ir.Value]) -> None:
        """Bind the iteration number or the condition, where the body asks for it."""
        if ir.use_count(formal) or formal in results:
            shape = () if formal.shape is None else (1,) * len(formal.shape)
            tensor = ir.tensor(np.full(shape, number))
            hint = f"{self._prefix}/{formal.name}"
            self._bound[formal] = self._context.initializer(self._graph, tensor, hint)

    def _copy(self, original: ir.Node) -> None:
        """One node of the body with the operands of this iteration."""
        copy = ir.Node(
            original.domain,
            original.op_type,
            [None if v is None else self._bound.get(v, v) for v in original.inputs],
            list(original.attributes.values()),
            overload=original.overload,
            num_outputs=len(original.outputs),
            doc_string=original.doc_string,
            metadata_props=dict(original.metadata_props),
        )
        for old, new in zip(original.outputs, copy.outputs, strict=True):
            new.type = old.type  # its shape may be another one in each iteration
            self._bound[old] = new
            new.name = self._context.unique(f"{self._prefix}/{old.name}") if old.name else ""
        self._add(copy, original.name or original.op_type, ir.sources(original))

    def _stacked(self, values: list[ir.Value]) -> ir.Value:
        """A scan output: the values of all iterations along a new first axis."""
        axes, attributes = list[ir.Value](), list[ir.Attr]()
        if self._context.opset(self._node) >= 13:
            first = ir.tensor(np.zeros(1, np.int64))
            axes.append(self._context.initializer(self._graph, first, f"{self._prefix}/axes"))
        else:
            attributes.append(ir.convenience.convert_attribute("axes", [0]))
        parts = [self._named(ir.Node("", "Unsqueeze", [v, *axes], attributes)) for v in values]
        if len(parts) == 1:
            return parts[0]
        axis = ir.convenience.convert_attribute("axis", 0)
        return self._named(ir.Node("", "Concat", parts, [axis]))

    def _named(self, node: ir.Node) -> ir.Value:
        node.outputs[0].name = self._context.unique(f"{self._prefix}/{node.op_type}")
        self._add(node, node.op_type, ())
        return node.outputs[0]

    def _add(self, node: ir.Node, hint: str, sources: tuple[str, ...]) -> None:
        node.name = self._context.unique_node(f"{self._prefix}/{hint}")
        node.meta[ir.SOURCES] = tuple(dict.fromkeys((*ir.sources(self._node), *sources)))
        self._graph.insert_before(self._node, [node])
        self._context.shapes.update(node, self._root)
        self._made.append(node)

    def _take_over(self, results: list[ir.Value]) -> None:
        context, ours, taken = self._context, set(self._made), set[ir.Value]()
        context.changed("constant_trip_count", [self._node], self._made)
        for old, new in zip(self._node.outputs, results, strict=False):
            if is_used(old):
                fresh = new.producer() in ours and new not in taken
                taken.add(new)
                replace_value(context, old, new, fresh=fresh)
        remove(context, self._node)
