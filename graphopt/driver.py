"""The greedy worklist that applies rewrite rules to a model until none applies.

As MLIR's greedy pattern driver: rules indexed by the operator of their root and ordered by
benefit; after a change only the nodes around it are looked at again; nodes that become dead are
removed on the way. Node order makes it deterministic, a budget makes it terminate.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence

from graphopt import ir
from graphopt.context import Context
from graphopt.report import PassRecord
from graphopt.rewriting import Op, Refuse, Result, Rule

_REWRITES_PER_NODE = 20


class Driver:
    """One run of a set of rules over a context; each rule's changes go to its own record."""

    def __init__(self, context: Context, rules: Iterable[tuple[Rule, PassRecord]]) -> None:
        self._context = context
        self._rules: dict[tuple[str, str], list[tuple[Rule, PassRecord]]] = {}
        for rule, record in rules:
            for root in rule.roots:
                self._rules.setdefault(root, []).append((rule, record))
        for candidates in self._rules.values():
            candidates.sort(key=lambda candidate: -candidate[0].benefit)
        self._queue: deque[ir.Node] = deque()
        self._queued: set[ir.Node] = set()
        self._order: dict[ir.Node, float] = {}

    def run(self) -> None:
        """Apply rules until none applies, or the budget or allowed number of rewrites is spent."""
        model = self._context.model
        # What an attribute of such a function's node is, each call decides.
        parametric = {f.graph for f in model.functions.values() if f.attributes}
        nodes = [
            node for graph, root in ir.scopes(model) if root not in parametric for node in graph
        ]
        self._push(node for node in nodes if (node.domain, node.op_type) in self._rules)
        budget = _REWRITES_PER_NODE * len(nodes) + 1000
        visited = 0
        while self._queue and budget and not self._context.exhausted:
            node = self._queue.popleft()
            self._queued.discard(node)
            visited += 1
            if visited % 1024 == 0:
                self._context.check_time()
            if node.graph is not None and self._visit(node):
                budget -= 1

    def _push(self, nodes: Iterable[ir.Node]) -> None:
        for node in nodes:
            if node not in self._queued and (node.domain, node.op_type) in self._rules:
                self._queued.add(node)
                self._queue.append(node)

    def _visit(self, node: ir.Node) -> bool:
        if is_dead(node):
            self._remove_dead(node)
            return False
        op: Op | None = None
        for rule, record in self._rules.get((node.domain, node.op_type), ()):
            self._context.record = record
            if op is None or op.created or op.constants:
                op = Op(self._context, node)
            try:
                mapping = _as_mapping(node, rule.apply(op, node))
                done = bool(mapping) and self._commit(rule, op, mapping)
            except Refuse as refusal:
                record.refuse(node, f"{rule.name}: {refusal}")
                done = False
            if done:
                return True
            self._discard(op)
        return False

    def _discard(self, op: Op) -> None:
        """Undo what a rule that did not apply has built."""
        for node in reversed(op.created):
            _detach(self._context, node)
        self._drop_constants(op)

    def _drop_constants(self, op: Op) -> None:
        for value in op.constants:
            if not ir.use_count(value) and not value.is_graph_output():
                drop_initializer(self._context, value)

    def _commit(self, rule: Rule, op: Op, mapping: dict[ir.Value, ir.Value]) -> bool:
        """Put the new values in the place of the old ones."""
        context, root = self._context, op.node
        for old, new in mapping.items():
            self._check_types(old, new)
        outer = self._outer_scope_outputs(op, mapping)
        if outer is None:
            return False
        mapping.update(outer)
        used = _reachable(op.created, mapping.values())
        olds = list(dict.fromkeys(p for v in mapping if (p := v.producer()) is not None))
        place = olds[0] if len(olds) == 1 else self._place(used, olds, mapping)
        for node in op.created:
            if node not in used:
                _detach(context, node)
        new_nodes = [node for node in op.created if node in used]
        created = set(new_nodes)
        for node in new_nodes:
            node.name = context.unique_node(f"{root.name or root.op_type}_{node.op_type}")
            if node.domain:
                assert root.graph is not None
                context.root(root.graph).opset_imports.setdefault(node.domain, 1)
        assert place.graph is not None
        graph = place.graph
        graph.insert_before(place, new_nodes)
        if place in self._order:
            self._order.update(dict.fromkeys(new_nodes, self._order[place]))
        around = list(dict.fromkeys(u for v in mapping for u in v.consumers()))
        for old, new in mapping.items():
            replace_value(context, old, new, fresh=new.producer() in created)
        gone: list[ir.Node] = []
        for replaced in olds:
            if is_dead(replaced):
                self._remove_dead(replaced, gone)
        self._drop_constants(op)
        _merge_origin(context, gone or olds, new_nodes)
        context.changed(rule.name, gone or olds, new_nodes)
        self._push(new_nodes)
        self._push(around)
        producers = [i.producer() for n in new_nodes for i in n.inputs if i is not None]
        producers += [new.producer() for new in mapping.values()]
        self._push(p for p in producers if p is not None)
        return True

    def _check_types(self, old: ir.Value, new: ir.Value) -> None:
        shapes = self._context.shapes
        kinds = shapes.dtype(old), shapes.dtype(new)
        if None not in kinds and kinds[0] != kinds[1]:
            raise Refuse(f"the result would be {kinds[1]}, not {kinds[0]}")
        before, after = shapes.shape(old), shapes.shape(new)
        if before is None or after is None:
            return
        if len(before) != len(after) or any(
            isinstance(a, int) and isinstance(b, int) and a != b
            for a, b in zip(before, after, strict=True)
        ):
            raise Refuse(f"the result would have shape {after}, not {before}")

    def _outer_scope_outputs(
        self, op: Op, mapping: Mapping[ir.Value, ir.Value]
    ) -> dict[ir.Value, ir.Value] | None:
        """Identities for graph outputs whose new value cannot bear the output's name.

        That is a graph input, a value of an outer scope, or one that is an output already. None
        where the root is an Identity itself: it has to stay.
        """
        wrapped: dict[ir.Value, ir.Value] = {}
        taken: set[ir.Value] = set()
        for old, new in mapping.items():
            if not old.is_graph_output():
                continue
            producer = new.producer()
            fresh = producer is not None and producer in op.created
            bearable = (fresh or can_be_output(old, new)) and new not in taken
            taken.add(new)
            if not bearable:
                if op.node.op_type == "Identity":
                    return None
                wrapped[old] = op.Identity(new)
        return wrapped

    def _position(self, node: ir.Node) -> float:
        """Where a node stands in its graph; new nodes stand where what they replaced stood."""
        if node not in self._order:
            assert node.graph is not None
            self._order.update((n, float(i)) for i, n in enumerate(node.graph))
        return self._order[node]

    def _place(
        self, used: set[ir.Node], olds: list[ir.Node], mapping: Mapping[ir.Value, ir.Value]
    ) -> ir.Node:
        """The first of the old nodes that new ones can stand before: operands above, users below.

        Raises:
            Refuse: there is none.
        """
        olds = sorted(olds, key=self._position)
        for place in olds:
            if self._defined_before(used, place) and (
                place is olds[0] or self._needed_after(mapping, olds, place)
            ):
                return place
        raise Refuse("its operands are defined too late")

    def _needed_after(
        self, mapping: Mapping[ir.Value, ir.Value], olds: Sequence[ir.Node], place: ir.Node
    ) -> bool:
        """Whether what uses the old values, and stays, stands behind a node of the same graph."""
        gone, stack = set[ir.Node](), list(olds)
        while stack:
            node = stack.pop()
            outputs = [v for v in node.outputs if v not in mapping]
            kept = any(v.is_graph_output() or set(v.consumers()) - gone for v in outputs)
            if node not in gone and not kept:
                gone.add(node)
                stack += [p for v in node.inputs if v is not None and (p := v.producer())]
        limit = self._position(place)
        users = {u for v in mapping for u in v.consumers()} - gone
        return all(u.graph is place.graph and self._position(u) >= limit for u in users)

    def _defined_before(self, nodes: set[ir.Node], place: ir.Node) -> bool:
        limit = self._position(place)
        for node in nodes:
            for value in node.inputs:
                producer = None if value is None else value.producer()
                if producer is None or producer in nodes or producer.graph is not place.graph:
                    continue
                if self._position(producer) >= limit:
                    return False
        return True

    def _remove_dead(self, node: ir.Node, gone: list[ir.Node] | None = None) -> None:
        """Remove a dead node and the producers that it kept alive."""
        stack = [node]
        while stack:
            dead = stack.pop()
            if dead.graph is None or not is_dead(dead):
                continue
            producers = [v.producer() for v in dead.inputs if v is not None]
            inputs = [v for v in dead.inputs if v is not None]
            remove(self._context, dead)
            if gone is not None:
                gone.append(dead)
            for producer in dict.fromkeys(p for p in producers if p is not None):
                stack.append(producer)
            self._push(p for p in producers if p is not None and p.graph is not None)
            for value in inputs:
                if not value.is_initializer():  # a constant may have any number of users
                    self._push(value.consumers())


def is_dead(node: ir.Node) -> bool:
    """Whether nothing uses any output of a node; one that has none is there for its effect."""
    return len(node.outputs) > 0 and not any(map(is_used, node.outputs))


def is_used(value: ir.Value) -> bool:
    """Whether a node or graph output takes the value."""
    return ir.use_count(value) > 0 or value.is_graph_output()


def can_be_output(old: ir.Value, new: ir.Value) -> bool:
    """Whether a value that exists may be the graph output in another one's place.

    A graph input, a value of an outer scope or one that is an output already may not.
    """
    return new.graph is old.graph and not new.is_graph_input() and not new.is_graph_output()


def replace_value(context: Context, old: ir.Value, new: ir.Value, *, fresh: bool = False) -> None:
    """Let all that takes one value take another, which stands before it.

    A graph output keeps its name; where the new value cannot bear it, an Identity of it does. A
    `fresh` value, made for the purpose, takes over name and metadata.
    """
    if old.is_graph_output() and not fresh and not can_be_output(old, new):
        producer = old.producer()
        assert producer is not None and producer.graph is not None
        identity = ir.Node("", "Identity", [new], name=context.unique_node(f"{old.name}_Identity"))
        identity.meta[ir.SOURCES] = ir.sources(producer)
        identity.outputs[0].name = context.unique(f"{old.name}_Identity")
        producer.graph.insert_before(producer, identity)
        context.shapes.update(identity, context.root(producer.graph))
        new, fresh = identity.outputs[0], True
    name = old.name
    if old.is_graph_output() or (fresh and not new.is_graph_output()):
        assert name is not None
        old.name = context.unique(f"{name}_replaced")
        if new.name is not None:
            context.free(new.name)
        new.name = name
        if old.is_graph_output():
            if not new.is_initializer():  # which is declared as what it is
                new.shape, new.type = old.shape, old.type
        elif new.shape is None or new.type is None:
            new.shape, new.type = old.shape, old.type or new.type
        new.doc_string = new.doc_string or old.doc_string
        new.metadata_props.update(old.metadata_props)
    old.replace_all_uses_with(new, replace_graph_outputs=True)


def drop_initializer(context: Context, value: ir.Value) -> None:
    """Remove an initializer that nothing uses."""
    if value.graph is not None and value.name is not None:
        del value.graph.initializers[value.name]
        context.free(value.name)
        context.shapes.forget(value)


def remove(context: Context, node: ir.Node) -> None:
    """Remove a node whose outputs nothing uses, and initializers that only it used."""
    assert node.graph is not None
    graph = node.graph
    inputs = dict.fromkeys(v for v in node.inputs if v is not None and v.is_initializer())
    _release(node)
    graph.remove(node)
    _forget(context, node)
    for value in inputs:
        if not is_used(value) and not value.is_graph_input():
            drop_initializer(context, value)


def _release(node: ir.Node) -> None:
    """Make a node no longer a user of its inputs, nor its subgraphs of what they capture."""
    for sub in ir.subgraphs(node):
        for inner in list(sub):
            _release(inner)
    for index in range(len(node.inputs)):
        node.replace_input_with(index, None)


def _detach(context: Context, node: ir.Node) -> None:
    """Drop a node that never got into a graph."""
    _release(node)
    _forget(context, node)


def _forget(context: Context, node: ir.Node) -> None:
    if node.name is not None:
        context.free_node(node.name)
    for value in node.outputs:
        context.shapes.forget(value)
        if value.name is not None:
            context.free(value.name)


def _as_mapping(node: ir.Node, result: Result) -> dict[ir.Value, ir.Value]:
    if result is None:
        return {}
    if isinstance(result, ir.Value):
        result = (result,)
    if not isinstance(result, Mapping):
        pairs = zip(node.outputs, result, strict=False)
        result = {old: new for old, new in pairs if new is not None}
    return {old: new for old, new in result.items() if old is not new and is_used(old)}


def _reachable(created: Sequence[ir.Node], results: Iterable[ir.Value]) -> set[ir.Node]:
    """The created nodes that the results need."""
    ours, found = set(created), set[ir.Node]()
    stack = [v.producer() for v in results]
    while stack:
        node = stack.pop()
        if node is None or node not in ours or node in found:
            continue
        found.add(node)
        stack += [v.producer() for v in node.inputs if v is not None]
    return found


def _merge_origin(context: Context, gone: Sequence[ir.Node], new: Sequence[ir.Node]) -> None:
    """Hand names, docs, metadata and lineage of the nodes that went on to those that came."""
    if not new:
        return
    origin = tuple(dict.fromkeys(label for node in gone for label in ir.sources(node)))
    for node in new:
        node.meta[ir.SOURCES] = origin
    last = new[-1]
    for node in gone:
        last.metadata_props.update(node.metadata_props)
        last.doc_string = last.doc_string or node.doc_string
    if gone[0].name and gone[0].graph is None:
        if last.name is not None:
            context.free_node(last.name)
        last.name = context.unique_node(gone[0].name)
