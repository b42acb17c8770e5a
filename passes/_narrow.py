"""What the conversions to float16 and bfloat16 share."""

from __future__ import annotations

from collections.abc import Sequence

from graphopt import ir
from graphopt.context import Context
from graphopt.passes._float_ranges import keep_nodes
from graphopt.passes._precision import Precision


def narrow(
    context: Context, to: ir.DataType, keep: Sequence[str], keep_io: bool, *, data: bool
) -> None:
    """Convert float32 to a narrower type; what stays is told with its reason."""
    if context.exhausted:
        return
    precision = Precision(context, frozenset({ir.DataType.FLOAT}), to, keep_io)
    name = to.name.lower()
    if not precision.needed:
        kinds = {context.shapes.dtype(v) for node in precision.nodes for v in node.outputs}
        why = f"it computes in {name} already" if to in kinds else "it computes nothing in float32"
        context.record.refusals[why] = {context.model.graph.name or "the model"}
        return
    reasons = keep_nodes(precision, keep, data=data)
    precision.kept |= reasons.keys()
    for node, reason in reasons.items():
        context.record.refuse(node, reason)
    for node in precision.nodes:
        if node.op_identifier() in context.model.functions:
            context.record.refuse(node, "stays as it is: it calls a function (inline-functions)")
    if keep_io:
        listed = {v.name or "" for v in context.model.graph.inputs if v.is_initializer()}
        if listed:
            why = "inputs with a default stay float32 (--freeze-initializers makes them constants)"
            context.record.refusals[why] = listed
    precision.settle()
    note_converted(precision)


def note_converted(precision: Precision) -> None:
    """Apply the conversion and record every node, input and output that it changed."""
    context, name = precision.context, precision.to.name.lower()
    graph = context.model.graph
    kinds = {v.name: v.dtype for v in (*graph.inputs, *graph.outputs)}
    casts = {ir.label(node) for node in precision.nodes if node.op_type == "Cast"}
    moved = precision.apply()
    for node in moved:
        context.changed(f"converted_to_{name}", [node], [node])
    for value in (*graph.inputs, *graph.outputs):
        if value.dtype != kinds.get(value.name):
            context.changed(f"converted_to_{name}", [value.name or ""], [value.name or ""])
    for label in sorted(casts - {ir.label(node) for node in ir.all_nodes(context.model)}):
        context.changed("superfluous_cast", [label])
    for constant in precision.clamped:
        context.changed("clamped_constant", [constant], [constant])
