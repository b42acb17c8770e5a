"""Move what does not change out of the bodies of Loop and Scan.

Why: what depends on nothing that an iteration makes is computed once, and not each time; and the
other passes see it together with what is around it.
Numerics: exact.
Needs: a body that is known to run, or operators that cannot fail: a Loop may run no iteration.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from graphopt import ir
from graphopt.context import Context
from graphopt.dims import DimLike
from graphopt.execute import captured, deterministic
from graphopt.pass_manager import Pass
from graphopt.passes._layout import BROADCASTING, UNARY
from graphopt.passes.unroll_loop import known_number

_ALWAYS = UNARY | {"Constant", "Shape", "Size", "Transpose"}
_BY_ZERO = ("Div", "Mod")
"""They fail, or worse, where an integer is divided by zero."""


@dataclass(frozen=True)
class HoistInvariants(Pass):
    """Inner bodies first, so that what leaves one may leave the one around it."""

    def run(self, context: Context) -> None:
        for graph in reversed(list(ir.graphs(context.model))):
            if not context.holds_initializers(graph):
                continue
            for node in list(graph):
                body = next(ir.subgraphs(node), None)
                iterates = node.op_type in ("Loop", "Scan") and not node.domain
                if iterates and body is not None and not context.exhausted:
                    context.check_time()
                    _hoist(context, node, body)


def _hoist(context: Context, node: ir.Node, body: ir.Graph) -> None:
    runs = _runs(context, node)
    free, risky = _invariants(context, body, runs)
    for inner in risky:
        context.record.refuse(inner, "hoist_invariants: it may fail, and the body may never run")
    moved = [inner for inner in free if inner.op_type != "Constant"]
    if not moved:
        return
    taken = {v: None for inner in moved for v in _operands(inner) if v.graph is body}
    used = {p for v in taken if (p := v.producer()) is not None and p.op_type == "Constant"}
    moved = [inner for inner in free if inner.op_type != "Constant" or inner in used]
    graph = node.graph
    assert graph is not None
    for value in taken:
        if value.is_initializer() and value.name is not None:
            del body.initializers[value.name]
            context.rename(value)
            graph.register_initializer(value)
    body.remove(moved)
    for inner in moved:
        for value in inner.outputs:
            if value.name:
                context.rename(value)
    graph.insert_before(node, moved)
    context.changed("invariant", moved, moved)


def _operands(node: ir.Node) -> Iterable[ir.Value]:
    yield from (value for value in node.inputs if value is not None)
    yield from captured(node)


def _invariants(
    context: Context, body: ir.Graph, runs: bool
) -> tuple[list[ir.Node], list[ir.Node]]:
    """The nodes of a body that may leave it, in order, and those that stay since they may fail."""
    inside = set(body.inputs)
    free, risky = list[ir.Node](), list[ir.Node]()
    for inner in body:
        fixed = not any(value in inside for value in _operands(inner))
        fixed = fixed and deterministic(inner) and not any(v in inside for v in inner.outputs)
        fixed = fixed and not any(value.is_graph_output() for value in inner.outputs)
        if fixed and (runs or _cannot_fail(context, inner)):
            free.append(inner)
            continue
        if fixed:
            risky.append(inner)
        inside.update(inner.outputs)
    return free, risky


def _runs(context: Context, node: ir.Node) -> bool:
    """Whether there is a first iteration, as far as is known."""
    if node.op_type == "Loop":
        limits = [1 if value is None else known_number(context, value) for value in node.inputs[:2]]
        return all(limit is not None and limit > 0 for limit in limits)
    scanned = ir.attribute(node, "num_scan_inputs")
    if context.opset(node) < 9 or not isinstance(scanned, int):
        return False
    axes = node.attributes.get("scan_input_axes")
    first = node.inputs[len(node.inputs) - scanned]
    shape = None if first is None else context.shapes.shape(first)
    axis = 0 if axes is None else axes.as_ints()[0]
    size = shape[axis] if shape else 0
    return isinstance(size, int) and size > 0


def _cannot_fail(context: Context, node: ir.Node) -> bool:
    """Whether a node computes something whatever its operands hold."""
    if node.op_type in _ALWAYS:
        return not _of_strings(context, node)
    if node.op_type not in (*BROADCASTING, "MatMul") or _of_strings(context, node):
        return False
    dtype = None if node.inputs[0] is None else context.shapes.dtype(node.inputs[0])
    if node.op_type in _BY_ZERO and (dtype is None or not dtype.is_floating_point()):
        return False
    shapes = [context.shapes.shape(value) for value in node.inputs if value is not None]
    known = [shape for shape in shapes if shape is not None]
    if len(known) != len(shapes):
        return False
    if node.op_type != "MatMul":
        return _broadcast(known)
    if len(known[0]) < 2 or len(known[1]) < 2:
        return False
    return known[0][-1] == known[1][-2] and _broadcast([shape[:-2] for shape in known])


def _of_strings(context: Context, node: ir.Node) -> bool:
    values = [value for value in (*node.inputs, *node.outputs) if value is not None]
    return any(context.shapes.dtype(value) in (None, ir.DataType.STRING) for value in values)


def _broadcast(shapes: list[tuple[DimLike, ...]]) -> bool:
    """Whether shapes are proven to broadcast together."""
    for place in range(1, max(map(len, shapes)) + 1):
        sizes = {shape[-place] for shape in shapes if len(shape) >= place} - {1}
        if len(sizes) > 1:
            return False
    return True
