"""Which values of two models are computed alike: value numbering by structure.

Two values get the same number exactly if they are the same graph input (by name), equal constants,
or the same output of the same operator with the same attributes on inputs of the same numbers.
Names of nodes and values play no part, except that operators that are not deterministic count as
alike only if they bear the same name. As hash consing (Ershov 1958): a table of keys made of the
numbers of the operands.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from graphopt import ir
from graphopt.execute import deterministic

Numbers = dict[ir.Value, int]
Adopt = Callable[[ir.Value, int], int]

_SAMPLE = 64  # bytes at either end of a tensor that tell most of them apart
_SMALL = 4096  # bytes up to which a tensor's content is the key itself


def _own(value: ir.Value, number: int) -> int:
    return number


class Numbering:
    """One table for any number of models."""

    def __init__(self) -> None:
        self._numbers: dict[object, int] = {}
        self._seen: dict[int, int] = {}
        self._large: dict[object, list[tuple[ir.TensorProtocol, int]]] = {}
        self._kept: list[ir.TensorProtocol] = []

    def of(self, model: ir.Model, adopt: Adopt = _own) -> Numbers:
        """Numbers of all values of the main graph.

        `adopt` may put another number in the place of the one that a value would get (for what is
        only taken to be equal); what is computed from the value follows.
        """
        return _Walk(self, model).main(adopt)

    def key(self, key: object) -> int:
        """The number of a key, new or known."""
        return self._numbers.setdefault(key, len(self._numbers))

    def tensor(self, tensor: ir.TensorProtocol) -> int:
        """The number of a constant: equal type, shape and content, equal number."""
        number = self._seen.get(id(tensor))
        if number is None:
            number = self._content(tensor)
            self._seen[id(tensor)] = number
            self._kept.append(tensor)  # an id is only good for as long as the object lives
        return number

    def _content(self, tensor: ir.TensorProtocol) -> int:
        head = (tensor.dtype, tuple(tensor.shape))
        array = tensor.numpy()
        if array.dtype.kind in "OUS":
            return self.key(("tensor", head, tuple(array.ravel().tolist())))
        data = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        if data.size <= _SMALL:
            return self.key(("tensor", head, data.tobytes()))
        sample = (head, data[:_SAMPLE].tobytes(), data[-_SAMPLE:].tobytes())
        alike = self._large.setdefault(sample, [])
        for other, number in alike:
            same = np.ascontiguousarray(other.numpy()).reshape(-1).view(np.uint8)
            if np.array_equal(data, same):
                return number
        number = self.key(("large tensor", sample, len(alike)))
        alike.append((tensor, number))
        return number


class _Walk:
    """Numbers one model."""

    def __init__(self, numbering: Numbering, model: ir.Model) -> None:
        self._table = numbering
        self._model = model
        self._functions: dict[object, int] = {}
        self._numbers: Numbers = {}

    def main(self, adopt: Adopt) -> Numbers:
        graph = self._model.graph
        for value in graph.inputs:
            self._numbers[value] = self._table.key(("input", value.name))
        for value in graph.initializers.values():
            if value not in self._numbers and value.const_value is not None:
                self._numbers[value] = adopt(value, self._table.tensor(value.const_value))
        for node in graph:
            self._node(node, graph, 0, adopt)
        return self._numbers

    def _node(self, node: ir.Node, root: ir.Graph, depth: int, adopt: Adopt = _own) -> None:
        constant = ir.constant(node.outputs[0]) if node.op_type == "Constant" else None
        if constant is not None:
            value = node.outputs[0]
            self._numbers[value] = adopt(value, self._table.tensor(constant))
            return
        number = self._table.key(
            (
                self._operator(node, root),
                tuple(self._attribute(a, root, depth) for a in _by_name(node)),
                tuple(-1 if v is None else self._number(v) for v in node.inputs),
                len(node.outputs),
            )
        )
        for index, value in enumerate(node.outputs):
            self._numbers[value] = adopt(value, self._table.key((number, index)))

    def _number(self, value: ir.Value) -> int:
        known = self._numbers.get(value)
        return self._table.key(("unknown", id(value))) if known is None else known

    def _operator(self, node: ir.Node, root: ir.Graph) -> object:
        domain = "" if node.domain == "ai.onnx" else node.domain
        if node.op_identifier() in self._model.functions:
            return self._function(node)
        version = ir.opset(root, domain)
        if deterministic(node):
            return (domain, node.op_type, node.overload, version)
        return (domain, node.op_type, node.overload, version, ir.label(node))

    def _function(self, node: ir.Node) -> int:
        name = node.op_identifier()
        if name not in self._functions:
            function = self._model.functions[name]
            body = self._graph(function.graph, function.graph, 1)
            defaults = tuple(
                self._attribute(a, function.graph, 1) for a in function.attributes.values()
            )
            self._functions[name] = self._table.key(("function", body, defaults))
        return self._functions[name]

    def _graph(self, graph: ir.Graph, root: ir.Graph, depth: int) -> int:
        """The number of a body, whose inputs are known by their place alone."""
        for index, value in enumerate(graph.inputs):
            self._numbers[value] = self._table.key(("bound", depth, index))
        for value in graph.initializers.values():
            if value not in self._numbers and value.const_value is not None:
                self._numbers[value] = self._table.tensor(value.const_value)
        for node in graph:
            self._node(node, root, depth)
        outputs = tuple(self._number(v) for v in graph.outputs)
        return self._table.key(("graph", len(graph.inputs), outputs))

    def _attribute(self, attr: ir.Attr, root: ir.Graph, depth: int) -> object:
        head = (attr.name, attr.type)
        if attr.is_ref():
            return (*head, "ref", attr.ref_attr_name)
        match attr.type:
            case ir.AttributeType.TENSOR:
                return (*head, self._table.tensor(attr.as_tensor()))
            case ir.AttributeType.TENSORS:
                return (*head, *(self._table.tensor(t) for t in attr.as_tensors()))
            case ir.AttributeType.GRAPH:
                return (*head, self._graph(attr.as_graph(), root, depth + 1))
            case ir.AttributeType.GRAPHS:
                return (*head, *(self._graph(g, root, depth + 1) for g in attr.as_graphs()))
            case _:
                return (*head, repr(attr.value))  # repr tells 0.0 from -0.0


def _by_name(node: ir.Node) -> list[ir.Attr]:
    return [node.attributes[name] for name in sorted(node.attributes)]
