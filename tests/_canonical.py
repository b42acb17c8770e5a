"""A model as text that does not depend on names, node order or how constants are held."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from graphopt import ir


@dataclass(frozen=True)
class Canonical:
    """The text of a model, with its constants apart so that they are compared by value."""

    text: str
    constants: list[tuple[str, ir.Array]]
    """Every constant, in the order in which the text numbers them: its name, its value."""

    @classmethod
    def of(cls, model: ir.Model) -> Canonical:
        """Nodes in depth-first order from the outputs; values numbered as they are met.

        Constant nodes and initializers are written alike; two constants of equal value stay two.
        """
        writer = _Writer()
        writer.root(model.graph, "")
        for (domain, name, _), function in sorted(model.functions.items()):
            writer.root(function.graph, f"function {domain}.{name}")
        return cls("\n".join([*writer.lines, *writer.types]) + "\n", writer.constants)

    def difference(self, expected: Canonical, free: frozenset[str]) -> str:
        """Where constants differ from the expected ones (of the same text), "" if nowhere.

        The values of those expected under a name in `free` do not matter.
        """
        for (_, found), (name, wanted) in zip(self.constants, expected.constants, strict=True):
            if name not in free and not _same(found, wanted):
                return f"constant {name!r} is {found.tolist()}, not {wanted.tolist()}"
        return ""


def _same(a: ir.Array, b: ir.Array) -> bool:
    if a.dtype.kind not in "fcV":  # V: ml_dtypes' narrow floats (and narrow integers, exact below)
        return np.array_equal(a, b)
    return np.allclose(a.astype(complex), b.astype(complex), rtol=1e-5, atol=1e-7, equal_nan=True)


class _Writer:
    """Writes graphs; keeps the numbers that values were given."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.types: list[str] = []
        self.constants: list[tuple[str, ir.Array]] = []
        self._names: dict[ir.Value, str] = {}
        self._numbers: dict[ir.Value, str] = {}
        self._done: set[ir.Node] = set()
        self._sheets: dict[ir.Graph, tuple[list[str], str]] = {}

    def root(self, graph: ir.Graph, title: str) -> None:
        """Write the main graph (which has no title and whose names stay) or a function's graph."""
        imports = [f"{domain or 'onnx'} {v}" for domain, v in sorted(graph.opset_imports.items())]
        self.lines.append(f"{title} opset {', '.join(imports)}".strip())
        if not title:
            self._names.update((v, v.name or "") for v in (*graph.inputs, *graph.outputs))
        self._graph(graph, self.lines, "")

    def _graph(self, graph: ir.Graph, lines: list[str], indent: str) -> None:
        self._sheets[graph] = lines, indent
        lines.append(f"{indent}in {self._signature(graph.inputs)}")
        for value in graph.outputs:
            self._produce(value)
        for node in graph:
            if ir.constant(node.outputs[0]) is None:
                self._node(node)
        for value in (*graph.initializers.values(), *(n.outputs[0] for n in graph)):
            if ir.constant(value) is not None and not value.uses() and value not in graph.outputs:
                lines.append(f"{indent}unused {self._constant(value)}")
        lines.append(f"{indent}out {self._signature(graph.outputs)}")

    def _signature(self, values: Iterable[ir.Value]) -> str:
        return ", ".join(f"{_type(value)} {self._name(value)}" for value in values)

    def _produce(self, value: ir.Value | None) -> None:
        """Write the node that makes a value, unless that was done."""
        node = None if value is None else value.producer()
        if node is not None and ir.constant(value) is None:
            self._node(node)

    def _node(self, node: ir.Node) -> None:
        if node in self._done or node.graph is None:
            return
        self._done.add(node)
        for value in node.inputs:
            self._produce(value)
        lines, indent = self._sheets[node.graph]
        block: list[str] = []
        attributes: list[str] = []
        for name, attr in sorted(node.attributes.items()):
            if not attr.is_ref() and attr.type == ir.AttributeType.GRAPH:
                block.append(f"{indent}  {name}:")
                self._graph(attr.as_graph(), block, indent + "    ")
            else:
                attributes.append(f"{name}={self._attribute(attr)}")
        outputs = _trim(self._name(value) if value.name else "" for value in node.outputs)
        inputs = _trim(self._name(value) for value in node.inputs)
        op = f"{node.domain}.{node.op_type}" if node.domain else node.op_type
        shown = f" <{', '.join(attributes)}>" if attributes else ""
        lines.append(f"{indent}{outputs} = {op}{shown} ({inputs})")
        lines += block

    def _name(self, value: ir.Value | None) -> str:
        if value is None:
            return ""
        if ir.constant(value) is not None:
            number = self._constant(value)
            return f"{self._names[value]} = {number}" if value in self._names else number
        return self._names.setdefault(value, f"%{len(self._names)}")

    def _constant(self, value: ir.Value) -> str:
        if value not in self._numbers:
            tensor = ir.constant(value)
            assert tensor is not None
            self._numbers[value] = self._tensor(value.name or "", tensor)
        return self._numbers[value]

    def _tensor(self, name: str, tensor: ir.TensorProtocol) -> str:
        number = f"c{len(self.constants)}"
        self.constants.append((name, tensor.numpy()))
        dims = ",".join(str(dim) for dim in tensor.shape)
        self.types.append(f"{number}: {tensor.dtype.name.lower()}[{dims}]")
        return number

    def _attribute(self, attr: ir.Attr) -> str:
        if attr.is_ref():
            return f"@{attr.ref_attr_name}"
        if attr.type == ir.AttributeType.TENSOR:
            return self._tensor(attr.name, attr.as_tensor())
        if attr.type == ir.AttributeType.FLOAT:
            return f"{attr.as_float():.6g}"
        if attr.type == ir.AttributeType.FLOATS:
            return str([f"{number:.6g}" for number in attr.as_floats()])
        return str(attr.value)


def _trim(names: Iterable[str]) -> str:
    """Names as a list; omitted ones at the end are as good as absent."""
    listed = list(names)
    while listed and not listed[-1]:
        listed.pop()
    return ", ".join(listed)


def _type(value: ir.Value) -> str:
    shape = "" if value.shape is None else f"[{','.join(_dim(dim) for dim in value.shape)}]"
    tensor = value.type if isinstance(value.type, ir.TensorType) else None
    kind = str(value.type) if tensor is None else tensor.dtype.name.lower()
    return kind + shape


def _dim(dim: int | ir.SymbolicDim) -> str:
    return str(dim) if isinstance(dim, int) else str(dim.value)
