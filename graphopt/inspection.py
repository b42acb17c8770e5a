"""What is in a model: signature, operators, weights, and what a run of it costs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field

import onnx

from graphopt import ir
from graphopt.cost import model_cost, node_cost
from graphopt.dims import atoms
from graphopt.errors import GraphoptError
from graphopt.feeds import random_feeds
from graphopt.files import ModelLike, load
from graphopt.files.external import FileTensor
from graphopt.files.writing import TYPES, remembered
from graphopt.regions import named_sizes
from graphopt.shapes import Shapes


@dataclass(frozen=True)
class Port:
    """An input or output: its type and shape as text, symbolic sizes by name."""

    name: str
    type: str
    shape: str
    optional: bool = False
    """An input with a default."""


@dataclass(frozen=True)
class NodeRow:
    """One node: what it is, makes and costs."""

    label: str
    op: str
    scope: str
    """`main`, or the name of the subgraph or function that it stands in."""
    outputs: str
    """Types and shapes, such as `FLOAT [n, 64]`; `?` for a type or rank that is not known."""
    known: bool
    """Whether all their ranks are known; otherwise they count nothing."""
    flops: int | None
    """None for a call or control flow: what runs inside is listed by itself."""
    bytes: int | None
    """Read and written in one run."""
    parameters: int
    """Elements of the constants that it takes."""


@dataclass
class Inspection:
    """What `inspect` tells; FLOPs, bytes and peak are those of one run at `sizes`."""

    name: str
    producer: str
    ir_version: int
    opsets: dict[str, int]
    inputs: list[Port]
    outputs: list[Port]
    nodes: int
    """Constants apart, subgraphs and functions included."""
    ops: dict[str, int]
    custom_ops: list[str]
    """Operators that ONNX does not define and the model does not either."""
    functions: list[str]
    control_flow_depth: int
    parameters: int
    weight_bytes: int
    weights_by_type: dict[str, int]
    """Parameters by element type."""
    external_files: dict[str, int]
    """Bytes of weights by the data file that they are in."""
    flops: int
    moved_bytes: int
    peak_bytes: int
    """The most that inputs and intermediate results take together."""
    sizes: dict[str, int]
    """The numbers taken for symbolic sizes of the inputs."""
    unknown_shapes: int
    """Nodes with an output of unknown rank, which count as costing nothing."""
    rows: list[NodeRow] = field(default_factory=list[NodeRow])

    def to_dict(self) -> dict[str, object]:
        """Plain data."""
        return asdict(self)

    def lines(self, *, nodes: bool = False) -> Iterator[str]:
        """The same as text; a line for each node where asked for."""
        yield f"model      {self.name or '(no name)'}, {self.producer or 'unknown producer'}"
        versions = ", ".join(f"{domain} {version}" for domain, version in self.opsets.items())
        yield f"format     IR {self.ir_version}, {versions}"
        for kind, ports in (("input", self.inputs), ("output", self.outputs)):
            for port in ports:
                default = ", has a default" if port.optional else ""
                yield f"{kind:10} {port.name}: {port.type} {port.shape}{default}"
        yield f"nodes      {self.nodes:,}" + (
            f", control flow {self.control_flow_depth} deep" if self.control_flow_depth else ""
        )
        yield "operators  " + ", ".join(f"{op} {count}" for op, count in self.ops.items())
        if self.custom_ops:
            yield f"custom     {', '.join(self.custom_ops)}"
        if self.functions:
            yield f"functions  {', '.join(self.functions)}"
        types = ", ".join(f"{dtype} {count:,}" for dtype, count in self.weights_by_type.items())
        yield f"weights    {self.parameters:,} in {self.weight_bytes:,} bytes ({types or 'none'})"
        for file, size in self.external_files.items():
            yield f"external   {file}: {size:,} bytes"
        at = ", ".join(f"{name} = {size}" for name, size in self.sizes.items())
        yield f"one run    {self.flops:,} FLOPs, {self.moved_bytes:,} bytes read and written" + (
            f", at {at}" if at else ""
        )
        yield f"peak       {self.peak_bytes:,} bytes of activations"
        if self.unknown_shapes:
            yield f"not known  shapes of nodes: {self.unknown_shapes}, counted as free"
        if nodes:
            yield from _table(self.rows)


def inspect(
    model: ModelLike,
    *,
    shapes: Mapping[str, Sequence[int | str]] | None = None,
    sizes: Mapping[str, int] | None = None,
) -> Inspection:
    """Look into a model.

    Args:
        shapes: other shapes for graph inputs, by name: ints, or names of symbolic sizes.
        sizes: numbers for symbolic sizes, by name, at which costs are counted; without one, a
            leading axis is 1 and others are usual sizes of what their name says.

    Raises:
        InputError: a file that is no model, or shapes of inputs that it does not have.
    """
    model = model if isinstance(model, ir.Model) else load(model)
    known = Shapes(model, overrides=shapes)
    bindings = _sizes(model, known, sizes or {})
    cost = model_cost(model, known, bindings)
    rows = list(_rows(model, known, bindings))
    ops = Counter(row.op for row in rows)
    graph = model.graph
    return Inspection(
        name=graph.name or "",
        producer=" ".join(filter(None, (model.producer_name, model.producer_version))),
        ir_version=model.ir_version,
        opsets={domain or "ai.onnx": version for domain, version in graph.opset_imports.items()},
        inputs=[_port(value, model, known) for value in graph.inputs],
        outputs=[_port(value, model, known) for value in graph.outputs],
        nodes=len(rows),
        ops=dict(ops.most_common()),
        custom_ops=sorted(_custom(model)),
        functions=[f"{f.domain}:{f.name}" for f in model.functions.values()],
        control_flow_depth=max((_depth(root) for root in _roots(model)), default=0),
        parameters=cost.parameters,
        weight_bytes=cost.weight_bytes,
        weights_by_type=_by_type(model),
        external_files=_external(model),
        flops=cost.flops,
        moved_bytes=cost.bytes,
        peak_bytes=cost.peak_bytes,
        sizes=bindings,
        unknown_shapes=sum(not row.known for row in rows),
        rows=rows,
    )


def _roots(model: ir.Model) -> list[ir.Graph]:
    return [model.graph, *(function.graph for function in model.functions.values())]


def _sizes(model: ir.Model, shapes: Shapes, given: Mapping[str, int]) -> dict[str, int]:
    """Numbers for the symbolic sizes of the inputs."""
    sizes = dict(given)
    known = [shapes.shape(value) for value in model.graph.inputs]
    for shape in known:
        if shape:
            sizes.update((atom.name, 1) for atom in atoms(shape[0]) if atom.name not in sizes)
    try:
        feeds = random_feeds(model, shapes, bindings=sizes)
    except GraphoptError:
        return sizes
    return {**named_sizes(model, shapes, feeds), **sizes}


def _port(value: ir.Value, model: ir.Model, shapes: Shapes) -> Port:
    name = value.name or ""
    dtype, shape = shapes.dtype(value), shapes.shape(value)
    kept: Mapping[str, bytes] = remembered(model.graph, TYPES) or {}
    if name in kept:
        kind = _type(onnx.TypeProto.FromString(kept[name]))
    else:
        kind = str(value.type or "?") if dtype is None else dtype.name
    text = "?" if shape is None else f"[{', '.join(map(str, shape))}]"
    return Port(name, kind, text, value.is_initializer())


def _type(proto: onnx.TypeProto) -> str:
    """A type that the IR does not know, as text: `sequence of map of INT64 to FLOAT`."""
    match proto.WhichOneof("value"):
        case "tensor_type":
            return ir.DataType(proto.tensor_type.elem_type).name
        case "sequence_type":
            return f"sequence of {_type(proto.sequence_type.elem_type)}"
        case "optional_type":
            return f"optional {_type(proto.optional_type.elem_type)}"
        case "map_type":
            key = ir.DataType(proto.map_type.key_type).name
            return f"map of {key} to {_type(proto.map_type.value_type)}"
        case other:
            return str(other or "?")


def _rows(model: ir.Model, shapes: Shapes, sizes: Mapping[str, int]) -> Iterator[NodeRow]:
    for graph in ir.graphs(model):
        scope = "main" if graph is model.graph else graph.name or "subgraph"
        for node in graph:
            if node.op_type == "Constant" and not node.domain:
                continue
            holds = node.op_identifier() in model.functions or any(True for _ in ir.subgraphs(node))
            cost = None if holds else node_cost(node, shapes, sizes)
            constants = {id(t): int(t.size) for v in node.inputs if (t := ir.constant(v))}
            yield NodeRow(
                label=ir.label(node),
                op=_name(node),
                scope=scope,
                outputs=", ".join(_made(value, shapes) for value in node.outputs),
                known=all(shapes.shape(value) is not None for value in node.outputs),
                flops=None if cost is None else cost.flops,
                bytes=None if cost is None else cost.bytes,
                parameters=sum(constants.values()),
            )


def _made(value: ir.Value, shapes: Shapes) -> str:
    dtype, shape = shapes.dtype(value), shapes.shape(value)
    kind = "?" if dtype is None else dtype.name
    return f"{kind} ?" if shape is None else f"{kind} [{', '.join(map(str, shape))}]"


def _name(node: ir.Node) -> str:
    return f"{node.domain}.{node.op_type}" if node.domain else node.op_type


def _custom(model: ir.Model) -> set[str]:
    found: set[str] = set()
    for graph, root in ir.scopes(model):
        for node in graph:
            version = ir.opset(root, node.domain)
            known = onnx.defs.has(node.op_type, max(version, 1), node.domain)
            if not known and node.op_identifier() not in model.functions:
                found.add(_name(node))
    return found


def _depth(graph: ir.Graph) -> int:
    """How deep bodies of control flow are nested below a graph."""
    return max((1 + _depth(body) for node in graph for body in ir.subgraphs(node)), default=0)


def _by_type(model: ir.Model) -> dict[str, int]:
    counts: Counter[str] = Counter()
    for tensor in ir.constants(model):
        counts[tensor.dtype.name] += int(tensor.size)
    return dict(counts.most_common())


def _external(model: ir.Model) -> dict[str, int]:
    sizes: Counter[str] = Counter()
    for tensor in ir.constants(model):
        if isinstance(tensor, FileTensor):
            sizes[tensor.place[0].path.name] += tensor.nbytes
    return dict(sizes)


def _table(rows: Sequence[NodeRow]) -> Iterator[str]:
    """Rows as aligned text."""
    yield f"{'FLOPs':>14} {'bytes':>14} {'weights':>12}  node"
    for row in rows:
        flops, moved = ("" if n is None else f"{n:,}" for n in (row.flops, row.bytes))
        scope = "" if row.scope == "main" else f" in {row.scope}"
        yield (
            f"{flops:>14} {moved:>14} {row.parameters:>12,}"
            f"  {row.op} {row.label}{scope} -> {row.outputs}"
        )
