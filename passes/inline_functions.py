"""Replace calls of the model's own functions by their bodies.

Why: exporters write a function for each module; passes and backends see through none of them.
Numerics: exact.
Needs: operators that mean the same in the opsets of function and caller; no recursion.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import onnx

from graphopt import ir
from graphopt.context import Context
from graphopt.driver import is_used, remove, replace_value
from graphopt.pass_manager import Pass
from graphopt.passes.eliminate_dead import called_functions

_Key = tuple[str, str, str]


@dataclass(frozen=True)
class InlineFunctions(Pass):
    """Expands calls, those in bodies included, and drops the functions that nothing calls then."""

    max_nodes: int = 200_000
    """How many nodes may come of it: functions that call each other twice grow without bound."""

    def run(self, context: Context) -> None:
        functions = context.model.functions
        if not functions:
            return
        inliner = _Inliner(context, self.max_nodes)
        inliner.expand(context.model.graph)
        inliner.drop()
        for function in list(functions.values()):
            inliner.expand(function.graph)
        inliner.drop()
        if inliner.inlined:
            context.refresh()


@dataclass
class _Inliner:
    context: Context
    left: int
    inlined: set[_Key] = field(default_factory=set[_Key])

    def __post_init__(self) -> None:
        self.sizes = _sizes(self.context.model)

    def expand(self, root: ir.Graph) -> None:
        """Inline every call below the main graph or a function's graph, where it may be."""
        functions = self.context.model.functions
        calls = [(n, False) for n in _below(root) if n.op_identifier() in functions]
        while calls:
            call, counted = calls.pop()
            function = functions[call.op_identifier()]
            if self.context.exhausted:
                return
            size = 0 if counted else self.sizes.get(function.identifier())
            reason = self._obstacle(call, function, root, size)
            if reason:
                self.context.record.refuse(call, f"{function.name}: {reason}")
                continue
            self.left -= size or 0
            made = self._inline(call, function, root)
            calls += [
                (n, True) for top in made for n in _all(top) if n.op_identifier() in functions
            ]

    def drop(self) -> None:
        """Remove the functions of which no call is left."""
        functions, called = self.context.model.functions, called_functions(self.context.model)
        for key in [key for key in functions if key in self.inlined - called]:
            del functions[key]

    def _obstacle(
        self, call: ir.Node, function: ir.Function, root: ir.Graph, size: int | None
    ) -> str:
        """Why a call has to stay, or an empty text."""
        if size is None:
            return "it calls itself, or one that does"
        if any(attr.type in _GRAPHS for attr in call.attributes.values()):
            return "it takes a graph as an attribute"
        if len(call.inputs) > len(function.inputs) or len(call.outputs) > len(function.outputs):
            return "it is called with more values than it has"
        for node in _below(function.graph):
            reason = _other_meaning(node, function, root, self.context.model)
            if reason:
                return reason
        if self._bare_result(call, function):
            return "it returns an input that the call leaves out"
        if size > self.left:
            return f"{size} nodes would come of it, {self.left} may"
        return ""

    def _bare_result(self, call: ir.Node, function: ir.Function) -> bool:
        inputs = list(call.inputs) + [None] * (len(function.inputs) - len(call.inputs))
        absent = {f for f, v in zip(function.inputs, inputs, strict=True) if v is None}
        return any(output in absent for output in function.outputs)

    def _inline(self, call: ir.Node, function: ir.Function, root: ir.Graph) -> list[ir.Node]:
        context, graph = self.context, call.graph
        assert graph is not None
        for domain, version in function.opset_imports.items():
            root.opset_imports.setdefault(domain, version)
        body = function.graph.clone()
        _resolve(body, call, function)
        formals = list(body.inputs)
        actuals = [*call.inputs, *[None] * (len(formals) - len(call.inputs))]
        bound = dict(zip(formals, actuals, strict=True))
        results = [bound.get(value, value) for value in body.outputs]
        body.outputs.clear()
        for formal, actual in bound.items():
            for user, index in list(formal.uses()):
                user.replace_input_with(index, actual)
        nodes = list(body)
        body.remove(nodes)
        prefix = call.name or call.outputs[0].name or call.op_type
        for node in nodes:
            self._name(node, prefix, ir.sources(call), root)
            node.metadata_props.update({**call.metadata_props, **node.metadata_props})
        graph.insert_before(call, nodes)
        self.inlined.add(function.identifier())
        context.changed("function_body", [call], nodes)
        ours, taken = set(nodes), set[ir.Value]()
        for old, new in zip(call.outputs, results, strict=False):
            if new is not None and is_used(old):
                fresh = new.producer() in ours and new not in taken
                taken.add(new)
                replace_value(context, old, new, fresh=fresh)
        remove(context, call)
        return nodes

    def _name(self, node: ir.Node, prefix: str, sources: tuple[str, ...], root: ir.Graph) -> None:
        """Unique names for a copied node and everything in it."""
        context = self.context
        node.meta[ir.SOURCES] = tuple(dict.fromkeys((*sources, *ir.sources(node))))
        node.name = context.unique_node(f"{prefix}/{node.name or node.op_type}")
        for value in node.outputs:
            if value.name:
                value.name = context.unique(f"{prefix}/{value.name}")
        for sub in ir.subgraphs(node):
            context.adopt(sub, root)
            for value in (*sub.inputs, *list(sub.initializers.values())):
                value.name = context.unique(f"{prefix}/{value.name}")
            for inner in sub:
                self._name(inner, prefix, sources, root)


def _sizes(model: ir.Model) -> dict[_Key, int]:
    """Nodes that a call of each function expands to, without those that never end."""
    functions = model.functions
    bodies = {
        key: [n.op_identifier() for n in _below(function.graph)]
        for key, function in functions.items()
    }
    sizes: dict[_Key, int] = {}
    while True:
        ready = [
            key
            for key, body in bodies.items()
            if key not in sizes and all(k in sizes for k in body if k in functions)
        ]
        if not ready:
            return sizes
        sizes.update({key: sum(sizes.get(k, 1) for k in bodies[key]) for key in ready})


_GRAPHS = (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)


def _resolve(body: ir.Graph, call: ir.Node, function: ir.Function) -> None:
    """Give a copied body the attributes of the call, or the function's defaults for them."""
    given = {
        name: attr for name, attr in function.attributes.items() if attr.value is not None
    } | dict(call.attributes)
    for node in _below(body):
        for name, attr in list(node.attributes.items()):
            if not attr.is_ref():
                continue
            actual = given.get(attr.ref_attr_name or "")
            if actual is None:
                del node.attributes[name]
            elif actual.is_ref():
                assert actual.ref_attr_name is not None
                node.attributes[name] = ir.RefAttr(name, actual.ref_attr_name, actual.type)
            else:
                node.attributes[name] = ir.Attr(name, actual.type, actual.value)


def _other_meaning(node: ir.Node, function: ir.Function, root: ir.Graph, model: ir.Model) -> str:
    """Why an operator of a function is not the same in the caller's opsets, or an empty text."""
    own, caller = ir.opset(function.graph, node.domain), ir.opset(root, node.domain)
    if own == caller or not caller or node.op_identifier() in model.functions:
        return ""
    try:
        schemas = [onnx.defs.get_schema(node.op_type, v, node.domain) for v in (own, caller)]
        if schemas[0].since_version == schemas[1].since_version:
            return ""
    except onnx.defs.SchemaError:
        pass
    return f"{node.op_type} of opset {own} is another one than that of opset {caller}"


def _all(node: ir.Node) -> Iterator[ir.Node]:
    yield node
    for sub in ir.subgraphs(node):
        yield from _below(sub)


def _below(graph: ir.Graph) -> Iterator[ir.Node]:
    """The nodes of a graph and of the subgraphs in it."""
    for node in graph:
        yield from _all(node)
