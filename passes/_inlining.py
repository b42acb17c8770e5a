"""A call of a function replaced by a copy of its body."""

from __future__ import annotations

from collections.abc import Iterator

import onnx

from graphopt import ir
from graphopt.context import Context
from graphopt.driver import is_used, remove, replace_value
from graphopt.passes._opset_steps import differs, superfluous

_GRAPHS = (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)


def obstacle(context: Context, call: ir.Node, function: ir.Function, root: ir.Graph) -> str:
    """Why a call has to stay, or an empty text."""
    if any(attr.type in _GRAPHS for attr in call.attributes.values()):
        return "it takes a graph as an attribute"
    if len(call.inputs) > len(function.inputs) or len(call.outputs) > len(function.outputs):
        return "it is called with more values than it has"
    for node in below(function.graph):
        reason = _other_meaning(context, node, function, root)
        if reason:
            return reason
    if _bare_result(call, function):
        return "it returns an input that the call leaves out"
    return ""


def _bare_result(call: ir.Node, function: ir.Function) -> bool:
    inputs = list(call.inputs) + [None] * (len(function.inputs) - len(call.inputs))
    absent = {f for f, v in zip(function.inputs, inputs, strict=True) if v is None}
    return any(output in absent for output in function.outputs)


def inline(
    context: Context, call: ir.Node, function: ir.Function, root: ir.Graph, rule: str
) -> list[ir.Node]:
    """Put a function's body in the place of a call, recorded under a rule; the nodes made.

    `root` is the main graph, or the function's, that the call stands in.
    """
    graph = call.graph
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
        _name(context, node, prefix, ir.sources(call), root)
        node.metadata_props.update({**call.metadata_props, **node.metadata_props})
    graph.insert_before(call, nodes)
    context.changed(rule, [call], nodes)
    ours, taken = set(nodes), set[ir.Value]()
    for old, new in zip(call.outputs, results, strict=False):
        if new is not None and is_used(old):
            fresh = new.producer() in ours and new not in taken
            taken.add(new)
            replace_value(context, old, new, fresh=fresh)
    remove(context, call)
    return nodes


def _name(
    context: Context, node: ir.Node, prefix: str, sources: tuple[str, ...], root: ir.Graph
) -> None:
    """Unique names for a copied node and everything in it."""
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
            _name(context, inner, prefix, sources, root)


def _resolve(body: ir.Graph, call: ir.Node, function: ir.Function) -> None:
    """Give a copied body the attributes of the call, or the function's defaults for them."""
    given = {
        name: attr for name, attr in function.attributes.items() if attr.value is not None
    } | dict(call.attributes)
    for node in below(body):
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


def _other_meaning(context: Context, node: ir.Node, function: ir.Function, root: ir.Graph) -> str:
    """Why an operator of a function is not the same in the caller's opsets, or an empty text."""
    own, caller = ir.opset(function.graph, node.domain), ir.opset(root, node.domain)
    if own == caller or not caller or node.op_identifier() in context.model.functions:
        return ""
    try:
        schemas = [onnx.defs.get_schema(node.op_type, v, node.domain) for v in (own, caller)]
        if schemas[0].since_version == schemas[1].since_version:
            return ""
    except onnx.defs.SchemaError:
        pass
    steps = range(own + 1, caller + 1) if not node.domain else ()
    changes = [version for version in steps if differs(node.op_type, version)]
    if changes and all(
        superfluous(node, version, up=True, shapes=context.shapes) is not None
        for version in changes
    ):
        return ""
    return f"{node.op_type} of opset {own} is another one than that of opset {caller}"


def all_of(node: ir.Node) -> Iterator[ir.Node]:
    """A node and the nodes of the subgraphs in it."""
    yield node
    for sub in ir.subgraphs(node):
        yield from below(sub)


def below(graph: ir.Graph) -> Iterator[ir.Node]:
    """The nodes of a graph and of the subgraphs in it."""
    for node in graph:
        yield from all_of(node)
