"""Which parts of a model compute in another floating point type, and the casts between the parts.

Every node is given one of two sides: it computes in the new type, or it keeps the old one. From
that follow the types of all values, and where a value goes from one side to the other it is cast
once. What an operator may compute in is asked of its ONNX schema, port by port: the scales of a
Resize are float32 whatever its image is. Constants, and what is a cast from the new type already,
are on both sides. A node that moves data, or that stands alone among nodes of the other side,
joins the side where it needs fewer casts.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain

import numpy as np
import onnx

from graphopt import ir
from graphopt.context import Context
from graphopt.driver import drop_initializer, is_dead, is_used, remove, replace_value

MOVING = frozenset(
    {
        *("Reshape", "Transpose", "Identity", "Squeeze", "Unsqueeze", "Flatten", "Slice", "Gather"),
        *("Concat", "Split", "Expand", "Tile", "Pad", "DepthToSpace", "SpaceToDepth", "Dropout"),
        *("GatherElements", "GatherND", "ScatterND", "ScatterElements", "ConstantOfShape", "Cast"),
        *("If", "Loop", "Scan", "MaxPool", "GlobalMaxPool", "ReduceMax", "ReduceMin"),
    }
)
"""Operators whose results hold nothing but elements of their operands."""
_HEAVY = frozenset(
    {
        *("Conv", "ConvTranspose", "MatMul", "Gemm", "Attention", "LSTM", "GRU", "RNN", "Einsum"),
        "DeformConv",
    }
)
_CONTROL = ("If", "Loop", "Scan")
_TYPED = ("dtype", "output_datatype")
_SWEEPS = 8
_DOMAINS = ("", "ai.onnx")

LIMITS = {
    ir.DataType.FLOAT16: (65504.0, 2.0**-14),
    ir.DataType.BFLOAT16: (float.fromhex("0x1.fep127"), 2.0**-126),
    ir.DataType.FLOAT: (float.fromhex("0x1.fffffep127"), 2.0**-126),
}
"""The largest number of a type, and the smallest one that has all its digits."""

Ports = tuple[tuple[bool, ...], tuple[bool, ...]]
"""For each input and output of a node whether it is of the new type when the node is."""


@dataclass
class Precision:
    """The sides of a model's nodes; `kept` is filled by the caller, `apply` changes the model."""

    context: Context
    sources: frozenset[ir.DataType]
    """Types to leave."""
    to: ir.DataType
    keep_io: bool
    """Inputs and outputs of the main graph stay of the types they have."""
    kept: set[ir.Node] = field(default_factory=set[ir.Node])
    """Nodes that keep the old type."""
    clamped: list[str] = field(default_factory=list[str])
    """Constants whose elements were beyond the new type and became its largest number."""

    def __post_init__(self) -> None:
        self._owners: dict[ir.Graph, ir.Node] = {}
        self._ports: dict[ir.Node, Ports] = {}
        main = self.context.model.graph
        self.graphs = [g for g, root in ir.scopes(self.context.model) if root is main]
        self.nodes = [node for graph in self.graphs for node in graph]
        for node in self.nodes:
            self._owners.update((graph, node) for graph in ir.subgraphs(node))

    # What is asked of values and nodes.

    def is_source(self, value: ir.Value | None) -> bool:
        """Whether a value is a tensor of a type to leave."""
        if value is None or isinstance(value.type, ir.SequenceType | ir.OptionalType):
            return False
        return self.context.shapes.dtype(value) in self.sources

    def is_upcast(self, node: ir.Node) -> bool:
        """A Cast from the new type to one to leave: both sides have its value already."""
        return self._casts(node) and self.context.shapes.dtype(_first(node)) == self.to

    def is_downcast(self, node: ir.Node) -> bool:
        """A Cast to the new type from one to leave."""
        return _is(node, "Cast") and self._target(node) == self.to and self.is_source(_first(node))

    def _casts(self, node: ir.Node) -> bool:
        return _is(node, "Cast") and self.is_source(node.outputs[0])

    @staticmethod
    def _target(node: ir.Node) -> ir.DataType:
        to = ir.attribute(node, "to", 0)
        return ir.DataType(to if isinstance(to, int) else 0)

    def floats(self, node: ir.Node) -> Iterator[ir.Value]:
        """What a node takes and makes of the types to leave."""
        return (v for v in chain(node.inputs, node.outputs) if v is not None and self.is_source(v))

    def ports(self, node: ir.Node) -> Ports:
        """Which inputs and outputs change their type with the node."""
        if node not in self._ports:
            inputs, outputs = self._allowed(node)
            self._ports[node] = (
                tuple(ok and self.is_source(v) for ok, v in zip(inputs, node.inputs, strict=True)),
                tuple(
                    ok and self.is_source(v) for ok, v in zip(outputs, node.outputs, strict=True)
                ),
            )
        return self._ports[node]

    def movable(self, node: ir.Node) -> bool:
        """Whether a node can compute in the new type at all."""
        return any(chain(*self.ports(node)))

    @property
    def needed(self) -> bool:
        """Whether there is anything to convert: a node, or the model's inputs and outputs."""
        graph = self.context.model.graph
        ends = () if self.keep_io else (*graph.inputs, *graph.outputs)
        return any(map(self.movable, self.nodes)) or any(map(self.is_source, ends))

    def _allowed(self, node: ir.Node) -> tuple[Sequence[bool], Sequence[bool]]:
        nothing = [False] * len(node.inputs), [False] * len(node.outputs)
        if _wraps(node):
            return nothing
        if node.domain in _DOMAINS and node.op_type in _CONTROL:
            return [True] * len(node.inputs), [True] * len(node.outputs)
        if (
            self.is_upcast(node)
            or self.is_downcast(node)
            or node.op_type in ("Constant", "EyeLike")
        ):
            return nothing
        if node.domain not in _DOMAINS or any(name in node.attributes for name in _TYPED):
            return nothing
        if _is(node, "Cast") and not self.is_source(node.outputs[0]):
            return [True], [False]
        version = self.context.opset(node, node.domain)
        found = _schema_ports(
            node.op_type, version, node.domain, len(node.inputs), len(node.outputs), self.to.name
        )
        return nothing if found is None else found

    # Sides.

    def moved(self, node: ir.Node) -> bool:
        """Whether a node computes in the new type."""
        return node not in self.kept and self.movable(node)

    def made(self, value: ir.Value) -> bool | None:
        """Whether a value is made in the new type; None where both are at hand."""
        node = value.producer()
        if ir.constant(value) is not None or (node is not None and self.is_upcast(node)):
            return None
        if node is not None:
            return self.moved(node) and self.ports(node)[1][value.index() or 0]
        owner = None if value.graph is None else self._owners.get(value.graph)
        return not self.keep_io if owner is None else self.moved(owner)

    def wanted(self, use: ir.Node, index: int) -> bool | None:
        """Whether a node takes an operand in the new type; None where it takes either."""
        if self.is_downcast(use):
            return None
        return self.moved(use) and self.ports(use)[0][index]

    def wanted_output(self, graph: ir.Graph) -> bool:
        """Whether a graph's outputs are of the new type."""
        owner = self._owners.get(graph)
        return not self.keep_io if owner is None else self.moved(owner)

    def settle(self) -> None:
        """Let nodes join the other side where that needs fewer casts; before `apply`."""
        fixed = {node for node in self.nodes if not self.movable(node)} | self.kept
        for _ in range(_SWEEPS):
            changed = False
            for node in self.nodes:
                if node in fixed or node.domain or node.op_type in _HEAVY:
                    continue
                old, new = self._neighbours(node)
                alone = old > 0 and not new
                joins = old > new if node.op_type in MOVING else alone
                if joins != (node in self.kept):
                    (self.kept.add if joins else self.kept.discard)(node)
                    changed = True
            if not changed:
                return

    def _neighbours(self, node: ir.Node) -> tuple[int, int]:
        """How many values around a node are of the old type, and of the new."""
        bodies = list(ir.subgraphs(node))
        sides: list[bool | None] = []
        incoming = [v for v, ok in zip(node.inputs, self.ports(node)[0], strict=True) if ok]
        incoming += [v for body in bodies for v in body.outputs if self.is_source(v)]
        sides += [self.made(v) for v in dict.fromkeys(incoming) if v is not None]
        outgoing = [v for v, ok in zip(node.outputs, self.ports(node)[1], strict=True) if ok]
        outgoing += [v for body in bodies for v in body.inputs if self.is_source(v)]
        for value in outgoing:
            uses = {self.wanted(*use) for use in value.uses()}
            if value.is_graph_output() and value.graph is not None:
                uses.add(self.wanted_output(value.graph))
            downcast = any(self.is_downcast(use.node) for use in value.uses())
            sides += [*(uses - {None}), *([True] if downcast else [])]
        return sides.count(False), sides.count(True)

    # The change.

    def apply(self) -> list[ir.Node]:
        """Give every value its type and cast between the sides; returns the nodes that moved."""
        made = {v: self.made(v) for v in self._values()}
        wanted = {v: [(use, self.wanted(*use)) for use in v.uses()] for v in made}
        outputs = {graph: self.wanted_output(graph) for graph in self.graphs}
        kinds = {v: self.context.shapes.dtype(v) for v in made}
        moved = [node for node in self.nodes if self.moved(node)]
        downcasts = [node for node in self.nodes if self.is_downcast(node)]
        for node in moved:
            self._retype(node)
        for value, side in made.items():
            kind = kinds[value]
            assert kind is not None
            if side is None and all(want for _, want in wanted[value]) and self._in_place(value):
                continue
            other: dict[bool, ir.Value] = {bool(side): value}
            for use, want in wanted[value]:
                if want is not None and (want != side or side is None):
                    if want not in other:
                        other[want] = self._other(value, want, kind)
                    use.node.replace_input_with(use.idx, other[want])
            self._outputs(value, side, kind, outputs, other)
            if side:
                value.type = ir.TensorType(self.to)
        self._tidy(made, downcasts)
        self.context.refresh()
        return moved

    def _values(self) -> list[ir.Value]:
        """All values of the types to leave, in order."""
        found: dict[ir.Value, None] = {}
        for graph in self.graphs:
            inside = (v for node in graph for v in node.outputs)
            for value in chain(graph.inputs, graph.initializers.values(), inside):
                if self.is_source(value):
                    found[value] = None
        return list(found)

    def _retype(self, node: ir.Node) -> None:
        """Let a node's attributes say the new type."""
        if node.op_type == "Cast" and self.is_source(node.outputs[0]):
            node.attributes["to"] = ir.Attr("to", ir.AttributeType.INT, int(self.to))
        elif node.op_type == "ConstantOfShape":
            attr = node.attributes.get("value")
            array = np.zeros(1, np.float32) if attr is None else attr.as_tensor().numpy()
            tensor = ir.tensor(self._converted(array, ir.label(node)))
            node.attributes["value"] = ir.Attr("value", ir.AttributeType.TENSOR, tensor)

    def _other(self, value: ir.Value, new: bool, kind: ir.DataType) -> ir.Value:
        """A value on the side on which it is not made."""
        node = value.producer()
        if new and node is not None and self.is_upcast(node):
            return _first(node)
        tensor = ir.constant(value)
        if new and tensor is not None:
            return self._constant(value, tensor)
        return self._cast(value, self.to if new else kind)

    def _in_place(self, value: ir.Value) -> bool:
        """Convert a constant that nothing takes in the old type; False where it is none."""
        tensor, node = ir.constant(value), value.producer()
        if tensor is None or value.is_graph_output() or not ir.use_count(value):
            return False
        array = ir.tensor(self._converted(tensor.numpy(), value.name or ""), name=tensor.name)
        array.doc_string = tensor.doc_string
        if node is None:
            value.const_value = array
        else:
            node.attributes.clear()
            node.attributes["value"] = ir.Attr("value", ir.AttributeType.TENSOR, array)
        value.type = ir.TensorType(self.to)
        return True

    def _constant(self, value: ir.Value, tensor: ir.TensorProtocol) -> ir.Value:
        context, graph = self.context, value.graph
        assert graph is not None
        array = ir.tensor(self._converted(tensor.numpy(), value.name or ""))
        array.doc_string = tensor.doc_string
        hint = f"{value.name}_{self.to.name.lower()}"
        if context.holds_initializers(graph) and value.is_initializer():
            return context.initializer(graph, array, hint)
        made = ir.Node("", "Constant", [], [ir.Attr("value", ir.AttributeType.TENSOR, array)])
        self._place(made, value, hint)
        return made.outputs[0]

    def _converted(self, array: ir.Array, name: str) -> ir.Array:
        """Numbers in the new type; what is beyond it becomes its largest number."""
        numbers = np.asarray(array, np.float32)
        limit = LIMITS[self.to][0]
        beyond = np.isfinite(numbers) & (np.abs(numbers) > limit)
        if np.any(beyond):
            self.clamped.append(name)
            numbers = np.where(beyond, np.copysign(limit, numbers), numbers)
        with np.errstate(over="ignore", under="ignore"):
            return np.asarray(numbers.astype(self.to.numpy()))

    def _cast(self, value: ir.Value, kind: ir.DataType) -> ir.Value:
        attr = ir.Attr("to", ir.AttributeType.INT, int(kind))
        node = ir.Node("", "Cast", [value], [attr])
        self._place(node, value, f"{value.name}_{kind.name.lower()}")
        node.outputs[0].shape, node.outputs[0].type = value.shape, ir.TensorType(kind)
        return node.outputs[0]

    def _place(self, node: ir.Node, value: ir.Value, hint: str) -> None:
        """Put a node right behind what makes a value."""
        producer, graph = value.producer(), value.graph
        assert graph is not None
        node.name = self.context.unique_node(hint)
        node.outputs[0].name = self.context.unique(hint)
        if producer is not None:
            node.meta[ir.SOURCES] = ir.sources(producer)
            graph.insert_after(producer, node)
        elif len(graph):
            graph.insert_before(graph[0], node)
        else:
            graph.append(node)

    def _outputs(
        self,
        value: ir.Value,
        side: bool | None,
        kind: ir.DataType,
        outputs: dict[ir.Graph, bool],
        other: dict[bool, ir.Value],
    ) -> None:
        """Let graphs put out a value in the type that they promise, under its name."""
        for graph, want in outputs.items():
            places = [i for i, output in enumerate(graph.outputs) if output is value]
            if not places or (side is not None and want == side) or (side is None and not want):
                continue
            new = other.get(want) or self._other(value, want, kind)
            if new.producer() is None or new.graph is not graph or new.is_graph_output():
                new = self._identity(new, graph)
            for index in places:
                graph.outputs[index] = new
            name = value.name
            if name is not None and graph is self.context.model.graph:
                if value.const_value is not None:
                    value.const_value = copy.copy(value.const_value)  # it is given another name
                value.name = self.context.unique(f"{name}_{self.to.name.lower()}")
                if new.name is not None:
                    self.context.free(new.name)
                new.name = name
                new.doc_string = value.doc_string
                new.metadata_props.update(value.metadata_props)

    def _identity(self, value: ir.Value, graph: ir.Graph) -> ir.Value:
        node = ir.Node("", "Identity", [value], name=self.context.unique_node("Identity"))
        node.outputs[0].name = self.context.unique(f"{value.name}_Identity")
        node.outputs[0].type, node.outputs[0].shape = ir.TensorType(self.to), value.shape
        graph.append(node)
        return node.outputs[0]

    def _tidy(self, made: dict[ir.Value, bool | None], downcasts: Sequence[ir.Node]) -> None:
        """Drop casts that do nothing now, and constants that nothing takes any more."""
        context = self.context
        for node in downcasts:
            source = _first(node)
            producer = source.producer()
            if made.get(source):
                replace_value(context, node.outputs[0], source)
            elif producer is not None and made.get(source, False) is None and _is(producer, "Cast"):
                replace_value(context, node.outputs[0], _first(producer))
            if is_dead(node):
                remove(context, node)
        for value, side in made.items():
            maker = value.producer()
            if side is not None or is_used(value):
                continue
            if maker is None:
                if value.is_initializer() and not value.is_graph_input():
                    drop_initializer(context, value)
            elif maker.graph is not None:
                remove(context, maker)


def _wraps(node: ir.Node) -> bool:
    """Whether sequences or optionals go in or out: the type of their elements is fixed."""
    inside = (inner for body in ir.subgraphs(node) for inner in body)
    return "Sequence" in node.op_type or "Optional" in node.op_type or any(map(_wraps, inside))


def _is(node: ir.Node, op_type: str) -> bool:
    return node.op_type == op_type and node.domain in ("", "ai.onnx")


def _first(node: ir.Node) -> ir.Value:
    value = node.inputs[0]
    assert value is not None
    return value


@functools.cache
def _schema_ports(
    op_type: str, version: int, domain: str, inputs: int, outputs: int, to: str
) -> tuple[tuple[bool, ...], tuple[bool, ...]] | None:
    """Which ports of an operator may be of a type; None where ONNX does not define it."""
    try:
        schema = onnx.defs.get_schema(op_type, version, "" if domain == "ai.onnx" else domain)
    except onnx.defs.SchemaError:
        return None
    text = f"tensor({to.lower()})"
    allowed = {c.type_param_str: text in c.allowed_type_strs for c in schema.type_constraints}

    def ports(formal: Sequence[onnx.defs.OpSchema.FormalParameter], count: int) -> list[bool]:
        kinds = [p.type_str for p in formal]
        return [allowed.get(kinds[min(i, len(kinds) - 1)], False) for i in range(count)]

    found = ports(schema.inputs, inputs), ports(schema.outputs, outputs)
    if op_type == "LayerNormalization":  # its statistics are of the type that `stash_type` says
        found[1][1:] = [False] * (outputs - 1)
    return tuple(found[0]), tuple(found[1])
