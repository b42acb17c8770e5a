"""Merge recurrent layers that go on from each other's state into one over all their steps.

Why: exporters unroll a loop over a cell into an LSTM, GRU or RNN for each step.
Numerics: exact.
Needs: the same weights, sequences of known length, and inner states that nothing else uses, apart
from hidden states of single steps.
"""

from __future__ import annotations

from graphopt import ir
from graphopt.passes._slices import split
from graphopt.passes._views import axes_arguments
from graphopt.rewriting import Op, Refuse, rewrite

_HIDDEN, _STATE = 5, 6
"""Inputs for the first states; what they become are outputs 1 and 2."""


@rewrite.on("LSTM", "GRU", "RNN", benefit=4)
def merge_recurrent(op: Op, node: ir.Node) -> dict[ir.Value, ir.Value] | None:
    """The last of a chain of layers."""
    if len(node.outputs) > 1 and any(_before(u) is node for u in node.outputs[1].consumers()):
        return None
    chain = [node]
    while (earlier := _before(chain[0])) is not None:
        chain.insert(0, earlier)
    if len(chain) < 2:
        return None
    shapes = [None if n.inputs[0] is None else op.shape(n.inputs[0]) for n in chain]
    lengths = [s[0] for s in shapes if s is not None and isinstance(s[0], int) and s[0] > 0]
    if len(lengths) != len(chain):
        raise Refuse("the number of steps is not known")
    for layer, length in zip(chain[:-1], lengths, strict=False):
        if len(layer.outputs) > 2 and op.uses(layer.outputs[2]) > 1:
            raise Refuse(f"{layer.outputs[2].name!r} is used elsewhere")
        if length > 1 and op.uses(layer.outputs[1]) > 1:
            raise Refuse(f"{layer.outputs[1].name!r} is used elsewhere")
    steps = op.Concat(*[n.inputs[0] for n in chain], axis=0)
    inputs = [steps, *node.inputs[1:_HIDDEN], *chain[0].inputs[_HIDDEN:]]
    made = op.build(node.op_type, inputs, node.attributes, outputs=len(node.outputs))
    mapping = {o: m for o, m in zip(node.outputs[1:], made[1:], strict=True) if op.uses(o)}
    single = [n.outputs[1] for n in chain[:-1] if op.uses(n.outputs[1]) > 1]
    if not single and not any(op.uses(n.outputs[0]) for n in chain):
        return mapping
    if set(lengths) == {1}:
        return mapping | _of_steps(op, chain, made[0])
    if single:
        raise Refuse("a hidden state is used elsewhere")
    parts = split(op, made[0], 0, lengths)
    return mapping | {n.outputs[0]: p for n, p in zip(chain, parts, strict=True)}


def _of_steps(op: Op, chain: list[ir.Node], states: ir.Value) -> dict[ir.Value, ir.Value]:
    """Outputs and hidden states of layers of one step each, which are the same but for an axis."""
    axes, attributes = axes_arguments(op, [1])
    parts = split(op, op.Squeeze(states, *axes, **attributes), 0, [1] * len(chain))
    mapping: dict[ir.Value, ir.Value] = {}
    for layer, part in zip(chain, parts, strict=True):
        within = 0 if layer is chain[-1] else 1
        if len(layer.outputs) > 1 and op.uses(layer.outputs[1]) > within:
            mapping[layer.outputs[1]] = part
        if op.uses(layer.outputs[0]):
            mapping[layer.outputs[0]] = op.Unsqueeze(part, *axes, **attributes)
    return mapping


def _before(node: ir.Node) -> ir.Node | None:
    """The layer from whose last states a layer goes on with the same weights."""
    inputs = [*node.inputs, *[None] * 8][:8]
    hidden = inputs[_HIDDEN]
    layer = None if hidden is None else hidden.producer()
    if layer is None or layer.op_type != node.op_type or layer.domain or node.domain:
        return None
    others = [*layer.inputs, *[None] * 8][:8]
    same = inputs[1:4] == others[1:4] and inputs[4] is others[4] is None
    forward = node.attributes.get("direction")
    layout = node.attributes.get("layout")
    if not same or inputs[7] is not None or others[7] is not None or layer.graph is not node.graph:
        return None
    if forward is not None and forward.as_string() != "forward":
        return None
    if (layout is not None and layout.as_int()) or layer.outputs[1] is not hidden:
        return None
    state = layer.outputs[2] if len(layer.outputs) > 2 else None
    if inputs[_STATE] is not state or (node.op_type == "LSTM" and state is None):
        return None
    keys = {**node.attributes, **layer.attributes}
    equal = all(
        ir.attribute(node, key) == ir.attribute(layer, key) for key in keys if key != "direction"
    )
    return layer if equal and len(layer.outputs) > 1 else None
