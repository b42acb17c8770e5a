"""Remove what nothing uses: nodes, outputs, states of loops, weights, functions, opset imports.

Why: other passes leave it behind, exporters and training leave much more.
Numerics: exact.
Needs: nothing. An operator without outputs is there for its effect and stays.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

import onnx

from graphopt import ir
from graphopt.context import Context
from graphopt.driver import drop_initializer, is_dead, is_used, remove
from graphopt.pass_manager import Pass
from graphopt.passes._dead_states import simplify_control_flow

_DECIDING = ("BatchNormalization",)
"""How many outputs they have tells how they compute."""


@dataclass(frozen=True)
class EliminateDead(Pass):
    """Sweeps backwards, since what only dead nodes use is dead too."""

    def run(self, context: Context) -> None:
        roots = [context.model.graph, *(f.graph for f in context.model.functions.values())]
        for root in roots:
            while _sweep(context, root):
                pass
        _drop_functions(context)
        _drop_initializers(context)
        _drop_imports(context)


def _sweep(context: Context, graph: ir.Graph) -> bool:
    """One way from the last node to the first; True where a loop lost parts, so that more may."""
    again = False
    for node in reversed(graph):
        if context.exhausted:
            return False
        if is_dead(node):
            context.changed("dead_node", [node])
            remove(context, node)
            continue
        for sub in ir.subgraphs(node):
            again |= _sweep(context, sub)
        if next(ir.subgraphs(node), None) is not None:
            if simplify_control_flow(context, node):
                context.changed("dead_output", [node])
                again = True
        elif not all(map(is_used, node.outputs)):
            _drop_outputs(context, node)
    return again


def _drop_outputs(context: Context, node: ir.Node) -> None:
    """Leave optional outputs out that nothing uses."""
    if node.domain != "" or node.op_type in _DECIDING:
        return
    optional = _optional_outputs(node.op_type, context.opset(node))
    dropped = [
        output
        for output, may_go in zip(node.outputs, optional, strict=False)
        if may_go and output.name and not is_used(output)
    ]
    for output in dropped:
        assert output.name
        context.free(output.name)
        context.shapes.forget(output)
        output.name = ""
    if dropped:
        left = [i + 1 for i, output in enumerate(node.outputs) if output.name]
        node.resize_outputs(max(left, default=1))
        context.changed("dead_output", [node], [node])


@functools.cache
def _optional_outputs(op_type: str, opset: int) -> tuple[bool, ...]:
    """Which outputs an operator may leave out."""
    try:
        schema = onnx.defs.get_schema(op_type, opset, "")
    except onnx.defs.SchemaError:
        return ()
    optional = onnx.defs.OpSchema.FormalParameterOption.Optional
    return tuple(output.option == optional for output in schema.outputs)


def _drop_functions(context: Context) -> None:
    functions = context.model.functions
    called = called_functions(context.model)
    for key in [key for key in functions if key not in called]:
        if not context.exhausted:
            del functions[key]
            context.changed("dead_function", [f"{key[0]}.{key[1]}"])


def called_functions(model: ir.Model) -> set[tuple[str, str, str]]:
    """Keys of the functions that the main graph calls, directly or not."""
    called: set[tuple[str, str, str]] = set()
    stack = [model.graph]
    while stack:
        graph = stack.pop()
        for node in graph:
            stack += ir.subgraphs(node)
            key = node.op_identifier()
            if key in model.functions and key not in called:
                called.add(key)
                stack.append(model.functions[key].graph)
    return called


def _drop_initializers(context: Context) -> None:
    named = annotated(context.model)
    for graph in ir.graphs(context.model):
        for name, value in list(graph.initializers.items()):
            if is_used(value) or value.is_graph_input() or name in named or context.exhausted:
                continue
            drop_initializer(context, value)
            context.changed("dead_initializer", [name])


def annotated(model: ir.Model) -> set[str]:
    """Names of tensors that quantization annotations refer to: these must keep them."""
    names: set[str] = set()
    for graph in ir.graphs(model):
        values = [*graph.inputs, *graph.initializers.values()]
        values += [output for node in graph for output in node.outputs]
        for value in values:
            meta = cast(Mapping[str, Mapping[str, str]], value.meta)
            names.update(meta.get("quant_parameter_tensor_names", {}).values())
    return names


def _drop_imports(context: Context) -> None:
    """Forget domains that no node is of; a function's are kept in the main graph too."""
    functions = context.model.functions.values()
    shared = {domain for f in functions for domain in (f.domain, *f.graph.opset_imports)}
    for root in (context.model.graph, *(f.graph for f in functions)):
        used = {"", "ai.onnx", *(node.domain for graph in _below(root) for node in graph)}
        if root is context.model.graph:
            used |= shared
        for domain in [domain for domain in root.opset_imports if domain not in used]:
            if not context.exhausted and len(root.opset_imports) > 1:  # a model must import one
                del root.opset_imports[domain]
                context.changed("dead_import", [domain])


def _below(root: ir.Graph) -> list[ir.Graph]:
    found, stack = [root], [root]
    while stack:
        inner = [sub for node in stack.pop() for sub in ir.subgraphs(node)]
        found += inner
        stack += inner
    return found
