"""Compute the same thing once.

Why: exporters trace the same mask, position or shape arithmetic once for each layer.
Numerics: exact; the operands of Add, Mul and the like are compared in either order.
Needs: operators that give the same for the same (no random ones, no unknown domains, no control
flow). Sizes that are proven equal are one, whatever they were computed from.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Hashable
from dataclasses import dataclass, field

from graphopt import ir
from graphopt._match import COMMUTATIVE
from graphopt.context import Context
from graphopt.dims import Dim
from graphopt.driver import can_be_output, is_used, remove, replace_value
from graphopt.execute import deterministic
from graphopt.pass_manager import Pass
from graphopt.passes._contents import content

_BY_CONTENT = 1024
"""Bytes up to which operands are compared by content, not by being the same value."""

_BY_VALUE = frozenset(
    [
        *(ir.AttributeType.FLOAT, ir.AttributeType.INT, ir.AttributeType.STRING),
        *(ir.AttributeType.FLOATS, ir.AttributeType.INTS, ir.AttributeType.STRINGS),
        ir.AttributeType.TYPE_PROTO,
    ]
)


@dataclass(frozen=True)
class EliminateCommon(Pass):
    """One way through each graph; a subgraph sees what the graphs around it have computed."""

    def run(self, context: Context) -> None:
        roots = [context.model.graph, *(f.graph for f in context.model.functions.values())]
        for root in roots:
            _Sweep(context).graph(root, ChainMap())


@dataclass
class _Sweep:
    context: Context
    constants: dict[ir.Value, Hashable] = field(default_factory=dict[ir.Value, Hashable])

    def graph(self, graph: ir.Graph, seen: ChainMap[Hashable, ir.Node]) -> None:
        """Replace the nodes of a graph that repeat one in `seen`, which gets the others."""
        for node in graph:
            if self.context.exhausted:
                return
            for sub in ir.subgraphs(node):
                self.graph(sub, seen.new_child())
            keys = [key for key in (self.computation(node), self.sizes(node)) if key is not None]
            first = next((seen[key] for key in keys if key in seen), None)
            if first is None or not self.merge(node, first):
                for key in keys:
                    seen.setdefault(key, node)

    def merge(self, node: ir.Node, first: ir.Node) -> bool:
        """Let an earlier node do a node's work; False where it has to stay."""
        pairs = [
            (old, new) for old, new in zip(node.outputs, first.outputs, strict=True) if is_used(old)
        ]
        identities = sum(
            old.is_graph_output() and not can_be_output(old, new) for old, new in pairs
        )
        if identities > (node.op_type not in ("Identity", "Constant")):
            return False
        self.context.changed("same_computation", [node], [first])
        first.meta[ir.SOURCES] = tuple(dict.fromkeys((*ir.sources(first), *ir.sources(node))))
        for old, new in pairs:
            replace_value(self.context, old, new)
        remove(self.context, node)
        return True

    def computation(self, node: ir.Node) -> Hashable:
        """What a node computes: nodes of the same key give the same; None where that is not so."""
        if not deterministic(node) or next(ir.subgraphs(node), None) is not None:
            return None
        inputs = [self.operand(value) for value in node.inputs]
        while inputs and inputs[-1] is None:
            inputs.pop()
        operands: Hashable = tuple(inputs)
        if len(inputs) == 2 and node.op_type in COMMUTATIVE and not node.domain:
            operands = frozenset(inputs)
        attributes = sorted((name, _attribute(attr)) for name, attr in node.attributes.items())
        outputs = tuple(bool(output.name) for output in node.outputs)
        return node.op_identifier(), operands, tuple(attributes), outputs

    def operand(self, value: ir.Value | None) -> Hashable:
        """The value, or its content where it is a small constant."""
        if value is None or value in self.constants:
            return None if value is None else self.constants[value]
        tensor = ir.constant(value)
        key: Hashable = value
        if tensor is not None and tensor.nbytes <= _BY_CONTENT:
            key = content(tensor)
        self.constants[value] = key
        return key

    def sizes(self, node: ir.Node) -> Hashable:
        """The elements of an integer tensor that are proven to be a function of dimensions."""
        if len(node.outputs) != 1:
            return None
        values = self.context.shapes.values(node.outputs[0])
        if values is None:
            return None
        elements: list[object] = values.ravel().tolist()
        if not any(isinstance(element, Dim) for element in elements):
            return None
        return self.context.shapes.dtype(node.outputs[0]), values.shape, tuple(elements)


def _attribute(attr: ir.Attr) -> str:
    """A text that tells an attribute's values apart, bit by bit."""
    if attr.is_ref():
        return f"ref {attr.ref_attr_name}"
    if attr.type == ir.AttributeType.TENSOR:
        return repr(content(attr.as_tensor()))
    if attr.type in _BY_VALUE:
        return repr(attr.value)
    return f"object {id(attr)}"
