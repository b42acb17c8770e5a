"""Compute what is constant now rather than at every run.

Why: exporters write whole computations of shapes, masks and transposed weights into the graph.
Numerics: rounding, as ONNX Runtime's own kernels round.
Needs: nothing. What is random, what has a DequantizeLinear before it, what unpacks a stored weight,
and what would make the model larger than `max_bytes` allows stays as it is.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from graphopt import execute, ir
from graphopt.context import FOLD_BYTES, Context
from graphopt.driver import is_dead, is_used, remove, replace_value
from graphopt.ir import Array
from graphopt.numpy_ops import SUPPORTED
from graphopt.pass_manager import Pass
from graphopt.sizes import array_bytes, output_bytes

_STAYING = frozenset(("Constant", "DequantizeLinear"))
_ALWAYS = 1 << 12
"""Bytes up to which a result is computed before it is known whether it is too large."""
_TOTAL = 64
"""All folded constants together may grow the model by this many times the limit for one."""


@dataclass(frozen=True)
class FoldConstants(Pass):
    """A sweep from the first node to the last, and again over what newly became constant.

    `max_bytes` is how much larger than the constants that it frees a result may be; the limit of
    the run (`fold_bytes`) where it is left at its default.
    """

    max_bytes: int = FOLD_BYTES

    def run(self, context: Context) -> None:
        limit = context.fold_bytes if self.max_bytes == FOLD_BYTES else self.max_bytes
        below: dict[ir.Graph, list[ir.Graph]] = {}
        for graph, root in ir.scopes(context.model):
            below.setdefault(root, []).append(graph)
        for root, graphs in below.items():
            _Folder(context, root, limit).run(graphs)


class _Folder:
    """Folds below one root: the main graph or a function."""

    def __init__(self, context: Context, root: ir.Graph, limit: int) -> None:
        self._context = context
        self._root = root
        self._limit = limit
        self._left = _TOTAL * limit
        self._tried: set[ir.Node] = set()

    def run(self, graphs: Sequence[ir.Graph]) -> None:
        """Fold in the root and its subgraphs, outer ones first, until nothing new is constant."""
        for graph in graphs:
            self._context.check_time()
            for node in graph:
                self._visit(node)
        hard = self._hard(node for graph in graphs for node in graph)
        while hard and not self._context.exhausted:
            self._context.check_time()
            queue = deque(self._compute(hard))
            reached: dict[ir.Node, None] = {}
            while queue:
                for node in queue.popleft().consumers():
                    if node.graph is not None:
                        reached[node] = None
                        queue += self._visit(node)
            hard = self._hard(reached)

    def _visit(self, node: ir.Node) -> list[ir.Value]:
        """Fold a node that numpy can compute; returns the values that are constant now."""
        if self._context.exhausted:
            return []
        if node.op_type == "Constant":
            return self._lift(node)
        if node.op_type not in SUPPORTED or not self._ready(node):
            return []
        if node.op_type == "Identity":
            return self._pass_on(node)
        inputs = [ir.array(v) for v in node.inputs]
        size = output_bytes(node, inputs, self._root.opset_imports)
        if size is None:
            return []
        if size > _ALWAYS and not self._affordable(node, self._growth(node, size)):
            return []
        outputs = execute.evaluate(node, inputs, self._context.opset(node))
        return [] if outputs is None else self._replace(node, outputs)

    def _lift(self, node: ir.Node) -> list[ir.Value]:
        """Make a Constant an initializer, where the graph can hold one."""
        old = node.outputs[0]
        tensor = ir.constant(old)
        if tensor is None or is_dead(node) or not self._context.holds_initializers(self._root):
            return []
        return self._put(node, [(old, tensor)])

    def _pass_on(self, node: ir.Node) -> list[ir.Value]:
        """Fold an Identity without a look at the weights, which may be far away in a file."""
        tensor = ir.constant(node.inputs[0])
        if tensor is None or not self._affordable(node, self._growth(node, tensor.nbytes)):
            return []
        self._left -= self._growth(node, tensor.nbytes)
        return self._put(node, [(node.outputs[0], tensor)])

    def _hard(self, nodes: Iterable[ir.Node]) -> list[ir.Node]:
        """What only ONNX Runtime can compute, and nodes that wait for nothing but its results."""
        found: list[ir.Node] = []
        produced: set[ir.Value] = set()
        for node in nodes:
            if node in self._tried or node.op_type in _STAYING or node.graph is None:
                continue
            if self._ready(node, produced) and execute.deterministic(node):
                found.append(node)
                produced.update(node.outputs)
        return found

    def _ready(self, node: ir.Node, produced: Container[ir.Value] = ()) -> bool:
        """Whether a node has inputs, all constant or among those given, and somebody uses it."""
        if ir.STORED in node.metadata_props:
            return False
        if is_dead(node) or any(attr.is_ref() for attr in node.attributes.values()):
            return False
        inputs = [v for v in node.inputs if v is not None]
        return bool(inputs) and all(v in produced or ir.constant(v) is not None for v in inputs)

    def _compute(self, nodes: Sequence[ir.Node]) -> list[ir.Value]:
        """Run nodes in ONNX Runtime and fold them; returns the values that are constant now."""
        opsets = self._root.opset_imports
        batch: list[ir.Node] = []
        results: dict[ir.Value, Array] = {}
        for node in nodes:
            if self._ready(node):
                self._tried.add(node)
                size = output_bytes(node, [ir.array(v) for v in node.inputs], opsets)
                if size is not None and size > self._limit:
                    if self._affordable(node, self._growth(node, size)):
                        results |= execute.evaluate_many([node], opsets, size)
                    continue
            batch.append(node)
        results |= execute.evaluate_many(batch, opsets, self._limit)
        fresh: list[ir.Value] = []
        for node in nodes:
            outputs = [results.get(v) for v in node.outputs]
            if not self._context.exhausted:
                fresh += self._replace(node, outputs)
        return fresh

    def _growth(self, node: ir.Node, size: int) -> int:
        """By how many bytes a result of `size` exceeds the constants that only its node uses."""
        return size - sum(
            tensor.nbytes
            for value in dict.fromkeys(node.inputs)
            if value is not None
            and ir.use_count(value) == node.inputs.count(value)
            and not value.is_graph_output()
            and (tensor := ir.constant(value)) is not None
        )

    def _affordable(self, node: ir.Node, growth: int) -> bool:
        """Whether the model may grow that much; if not, that is said."""
        if growth <= min(self._limit, self._left):
            return True
        self._context.record.refuse(node, "the result would be too large, see max_bytes")
        return False

    def _replace(self, node: ir.Node, outputs: Sequence[Array | None]) -> list[ir.Value]:
        """Put initializers in the place of a node whose used outputs are known, all of them."""
        used = [(v, a) for v, a in zip(node.outputs, outputs, strict=False) if is_used(v)]
        known = [(v, a) for v, a in used if a is not None]
        if len(known) < sum(map(is_used, node.outputs)):
            return []
        growth = self._growth(node, sum(array_bytes(a) for _, a in known))
        if not self._affordable(node, growth):
            return []
        self._left -= growth
        return self._put(node, [(v, _tensor(a)) for v, a in known])

    def _put(
        self, node: ir.Node, known: Sequence[tuple[ir.Value, ir.TensorProtocol]]
    ) -> list[ir.Value]:
        """Replace a node's outputs by tensors and remove it, with those that served it alone."""
        context = self._context
        context.changed("constant" if node.op_type == "Constant" else "fold", [node])
        fresh: list[ir.Value] = []
        for old, tensor in known:
            new = self._constant(node, tensor, old.name or node.op_type)
            replace_value(context, old, new, fresh=True)
            fresh.append(new)
        stack = [node]
        while stack:
            dead = stack.pop()
            if dead.graph is not None and is_dead(dead):
                stack += [p for v in dead.inputs if v is not None and (p := v.producer())]
                remove(context, dead)
        return fresh

    def _constant(self, node: ir.Node, tensor: ir.TensorProtocol, hint: str) -> ir.Value:
        """An initializer of the node's graph; in a function a Constant node before the node."""
        graph = node.graph
        assert graph is not None
        if self._context.holds_initializers(graph):
            return self._context.initializer(graph, tensor, hint)
        attr = ir.Attr("value", ir.AttributeType.TENSOR, tensor)
        made = ir.Node("", "Constant", [], [attr], name=self._context.unique_node(hint))
        made.outputs[0].name = self._context.unique(hint)
        graph.insert_before(node, made)
        self._context.shapes.update(made, self._root)
        return made.outputs[0]


def _tensor(array: Array) -> ir.TensorProtocol:
    data: Any = array
    if array.dtype.char == "O":
        return ir.onnx_ir.StringTensor(data)
    return ir.Tensor(data, dtype=ir.DataType.from_numpy(array.dtype))
