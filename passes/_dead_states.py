"""Drop from If, Loop and Scan what nothing uses: outputs, branches' outputs, states, inputs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from graphopt import ir
from graphopt.context import Context
from graphopt.driver import is_dead, is_used, remove, replace_value
from graphopt.execute import captured


def simplify_control_flow(context: Context, node: ir.Node) -> bool:
    """Drop unused parts of an If, Loop or Scan; returns whether there were any."""
    if node.domain != "":
        return False
    if node.op_type == "If":
        return _simplify_if(context, node)
    iteration = _Iteration.of(context, node)
    return iteration is not None and iteration.simplify(context)


def _simplify_if(context: Context, node: ir.Node) -> bool:
    keep = [i for i, output in enumerate(node.outputs) if is_used(output)]
    branches = list(ir.subgraphs(node))
    count = len(node.outputs)
    if len(keep) in (0, count) or any(len(branch.outputs) != count for branch in branches):
        return False
    for branch in branches:
        branch.outputs[:] = [branch.outputs[i] for i in keep]
    _rebuild(context, node, node.inputs, keep)
    return True


@dataclass
class _Iteration:
    """A Loop or Scan: its states come first among inputs and outputs, behind what is fixed.

    A Loop has a trip count and a condition in front of its body's inputs, and the condition in
    front of its body's outputs; a Scan has the scanned tensors behind its states.
    """

    node: ir.Node
    body: ir.Graph
    states: int
    first_input: int
    first_output: int

    @classmethod
    def of(cls, context: Context, node: ir.Node) -> _Iteration | None:
        """Read a node; None where it is neither or its parts do not fit together."""
        body = next(ir.subgraphs(node), None)
        if body is None:
            return None
        if node.op_type == "Loop":
            found = cls(node, body, len(body.inputs) - 2, 2, 1)
        elif node.op_type == "Scan" and context.opset(node) >= 9:
            scanned = ir.attribute(node, "num_scan_inputs")
            if not isinstance(scanned, int):
                return None
            found = cls(node, body, len(node.inputs) - scanned, 0, 0)
        else:
            return None
        fits = (
            len(node.inputs) == len(body.inputs)
            and len(node.outputs) + found.first_output == len(body.outputs)
            and 0 <= found.states <= len(node.outputs)
            and len(set(body.outputs)) == len(body.outputs)
        )
        return found if fits else None

    def simplify(self, context: Context) -> bool:
        """Take invariant states out, then drop the states and outputs that nothing needs."""
        changed = self._release_invariants(context)
        if is_dead(self.node):
            return True
        node, body = self.node, self.body
        states, scanned, needed = self._live()
        outputs = states + [
            i for i in range(self.states, len(node.outputs)) if is_used(node.outputs[i])
        ]
        inputs = [
            i
            for i in range(len(node.inputs))
            if i < self.first_input or i - self.first_input in states or i in scanned
        ]
        whole = len(inputs) == len(node.inputs) and len(outputs) == len(node.outputs)
        if whole or not needed:
            return changed
        kept_outputs = [body.outputs[i] for i in range(self.first_output)]
        kept_outputs += [body.outputs[self.first_output + i] for i in outputs]
        gone = [value for i, value in enumerate(body.inputs) if i not in inputs]
        self._drop_producers(context, kept_outputs, gone)
        body.outputs[:] = kept_outputs
        kept_inputs = [node.inputs[i] for i in inputs]
        body.inputs[:] = [body.inputs[i] for i in inputs]
        for value in gone:
            context.shapes.forget(value)
            context.free(value.name or "")
        attributes = self._attributes(scanned, [i - self.states for i in outputs])
        _rebuild(context, node, kept_inputs, outputs, attributes)
        return True

    def _release_invariants(self, context: Context) -> bool:
        """A state that each iteration hands on as it is, is its first value throughout."""
        changed = False
        for i in range(self.states):
            inner, first = self.body.inputs[self.first_input + i], self._first(i)
            if self.body.outputs[self.first_output + i] is not inner or first is None:
                continue
            if is_used(self.node.outputs[i]):
                replace_value(context, self.node.outputs[i], first)
                changed = True
            for user, index in list(inner.uses()):
                user.replace_input_with(index, first)
                changed = True
        return changed

    def _first(self, state: int) -> ir.Value | None:
        return self.node.inputs[self.first_input + state]

    def _live(self) -> tuple[list[int], list[int], bool]:
        """States and scanned inputs (by input position) that something needs.

        False as the last one where nothing may be dropped: what a Scan scans decides how often
        it runs, so one such input has to stay.
        """
        used = {i for i, output in enumerate(self.node.outputs) if is_used(output)}
        wanted = [*range(self.first_output), *(self.first_output + i for i in used)]
        while True:
            reached = _reached(self.body, [self.body.outputs[i] for i in wanted])
            states = [
                i
                for i in range(self.states)
                if i in used or self.body.inputs[self.first_input + i] in reached
            ]
            grown = sorted({*wanted, *(self.first_output + i for i in states)})
            if grown == sorted(wanted):
                break
            wanted = grown
        if self.node.op_type == "Loop":
            return states, [], True
        positions = range(self.states, len(self.node.inputs))
        scanned = [i for i in positions if self.body.inputs[i] in reached]
        return states, scanned or list(positions[:1]), bool(positions)

    def _drop_producers(
        self, context: Context, outputs: Iterable[ir.Value], gone: Sequence[ir.Value]
    ) -> None:
        """Remove the body's nodes that only what is dropped needs."""
        reached = _reached(self.body, outputs)
        self.body.outputs[:] = list(outputs)
        for node in reversed(self.body):
            if node.outputs and not any(output in reached for output in node.outputs):
                remove(context, node)
        assert not any(value.uses() for value in gone)

    def _attributes(self, scanned: Sequence[int], outputs: Sequence[int]) -> list[ir.Attr]:
        """The node's attributes, a Scan's lists of axes and directions without what is dropped."""
        outputs = [i for i in outputs if i >= 0]
        attributes: list[ir.Attr] = []
        for name, attr in self.node.attributes.items():
            kept = [i - self.states for i in scanned] if "input" in name else outputs
            if name == "num_scan_inputs":
                attr = ir.Attr(name, ir.AttributeType.INT, len(scanned))
            elif name.startswith("scan_"):
                values = [attr.as_ints()[i] for i in kept]
                attr = ir.Attr(name, ir.AttributeType.INTS, values)
                if not values:
                    continue
            attributes.append(attr)
        return attributes


def _reached(graph: ir.Graph, outputs: Iterable[ir.Value]) -> set[ir.Value]:
    """The values that outputs of a graph are computed from, those of outer scopes included."""
    reached: set[ir.Value] = set()
    stack = list(outputs)
    while stack:
        value = stack.pop()
        if value in reached:
            continue
        reached.add(value)
        node = value.producer()
        if node is not None and node.graph is graph:
            stack += [v for v in node.inputs if v is not None]
            stack += captured(node)
    return reached


def _rebuild(
    context: Context,
    node: ir.Node,
    inputs: Sequence[ir.Value | None],
    keep: Sequence[int],
    attributes: Iterable[ir.Attr] | None = None,
) -> None:
    """Put a node with fewer outputs in the place of another one; it takes over its bodies."""
    assert node.graph is not None
    graph = node.graph
    name = node.name
    fresh = ir.Node(
        node.domain,
        node.op_type,
        list(inputs),
        list(node.attributes.values() if attributes is None else attributes),
        num_outputs=len(keep),
        name=name,
        doc_string=node.doc_string,
        metadata_props=dict(node.metadata_props),
    )
    fresh.meta[ir.SOURCES] = ir.sources(node)
    graph.insert_before(node, [fresh])
    for output, index in zip(fresh.outputs, keep, strict=True):
        old = node.outputs[index]
        output.type, output.shape = old.type, old.shape
        replace_value(context, old, output, fresh=True)
    node.attributes.clear()  # the bodies live on in the new node
    remove(context, node)
    if name is not None:
        fresh.name = context.unique_node(name)
    context.shapes.update(fresh, context.root(graph))
