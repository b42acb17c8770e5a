"""What a model does with an input's numbers: the tables they index, the constants they meet.

Random token ids must stay inside the embedding table, whichever casts, reshapes and additions lie
between; a sampling rate must be one of those that the model knows.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

from graphopt import ir
from graphopt.dims import DimLike, atoms, evaluate

__all__ = ["Known", "Tracer", "Uses"]


class Known(Protocol):
    """What is asked of `graphopt.shapes.Shapes` here."""

    def shape(self, value: ir.Value) -> tuple[DimLike, ...] | None:
        """Dimensions of a value, None where its rank is unknown."""
        ...


@dataclass
class Uses:
    """What is known of the numbers or the text that a value may hold."""

    limit: int | None = None
    """All must be smaller: the least size of an indexed axis."""
    candidates: list[Any] = field(default_factory=list[Any])
    """Constants that it is compared with, or keys of a dictionary that it is looked up in."""
    counts: bool = False
    """It is a trip count, a repetition, a number of results: small and positive."""

    def below(self, limit: int | None, offset: int) -> None:
        """Note an axis that the value plus `offset` indexes; None where its size is unknown."""
        if limit is not None:
            limit = max(1, limit - offset)
            self.limit = limit if self.limit is None else min(self.limit, limit)


# Operators that hand the numbers of their first input on, and those that hand on several inputs'.
_PASSING = frozenset(
    (
        *("Cast", "CastLike", "Compress", "Expand", "Flatten", "GatherElements", "GatherND"),
        *("Identity", "Pad", "Reshape", "Slice", "Split", "Squeeze", "Tile", "Transpose"),
        *("Unsqueeze", "Gather", "Dropout", "Trilu", "Abs", "Floor", "Ceil", "Round", "Relu"),
    )
)
_JOINING = frozenset(("Concat", "Max", "Where", "SequenceConstruct", "SequenceInsert"))
_COMPARING = frozenset(("Equal", "Less", "LessOrEqual", "Greater", "GreaterOrEqual"))
# Operator and input whose elements count something.
_COUNTING = frozenset(
    (
        *(("Loop", 0), ("TopK", 1), ("Range", 0), ("Range", 1), ("Range", 2), ("Tile", 1)),
        *(("ConstantOfShape", 0), ("Expand", 1), ("Reshape", 1), ("Resize", 3), ("OneHot", 1)),
        *(("Split", 1), ("SplitToSequence", 1), ("CumSum", 1), ("SequenceAt", 1)),
    )
)
_KEYS = ("keys_strings", "keys_int64s", "cats_strings", "cats_int64s", "string_vocabulary")
_MOST_STEPS = 2000
_MOST_RANK = 64


class Tracer:
    """Follows the inputs of one model, whose free sizes are `sizes` by name."""

    def __init__(self, model: ir.Model, known: Known, sizes: Mapping[str, int]) -> None:
        self._model = model
        self._known = known
        self._sizes = sizes
        self._arguments: dict[ir.Value, ir.Value | None] = {}
        self._owners = {g: node for node in ir.all_nodes(model) for g in ir.subgraphs(node)}

    def trace(self, value: ir.Value) -> Uses:
        """Follow a value, into bodies and functions, to what uses its numbers."""
        found = Uses()
        seen: set[ir.Value] = set()
        stack = [(value, 0)]
        while stack and len(seen) < _MOST_STEPS:
            current, offset = stack.pop()
            if current in seen:
                continue
            seen.add(current)
            for node, index in current.uses():
                self._note(node, index, offset, found)
                stack += [(v, o) for v, o in self._next(node, index, offset) if v is not None]
            stack += [(v, offset) for v in self._outside(current)]
        return found

    def _axis_size(self, value: ir.Value | None, axis: int) -> int | None:
        """The size of an axis; for an input of a function that of the last call's argument."""
        for _ in range(_MOST_RANK):  # functions that call themselves would never end
            if value not in self._arguments:
                break
            value = self._arguments[value]
        tensor = None if value is None else value.const_value
        shape = tuple(tensor.shape.numpy()) if tensor is not None else None
        if shape is None and value is not None:
            dims = self._known.shape(value)
            shape = None if dims is None else tuple(map(self._number, dims))
        if shape is None or not -len(shape) <= axis < len(shape):
            return None
        return shape[axis] if shape[axis] >= 0 else None

    def _number(self, dim: DimLike) -> int:
        """A dimension at the sizes chosen; -1 where they say nothing of it."""
        known = all(atom.name in self._sizes for atom in atoms(dim))
        return evaluate(dim, self._sizes, 1) if known else -1

    def _note(self, node: ir.Node, index: int, offset: int, found: Uses) -> None:
        """What one use says."""
        op, inputs = node.op_type, node.inputs
        axis = cast(int, ir.attribute(node, "axis", 0))
        if (op, index) in _COUNTING:
            found.counts = True
        if op in ("Gather", "GatherElements", "ScatterElements", "Scatter") and index == 1:
            found.below(self._axis_size(inputs[0], axis), offset)
        elif op in ("GatherND", "ScatterND") and index == 1:
            first = cast(int, ir.attribute(node, "batch_dims", 0))
            depth = min(self._axis_size(inputs[1], -1) or 0, _MOST_RANK)
            for each in range(first, first + depth):
                found.below(self._axis_size(inputs[0], each), offset)
        elif op == "ArrayFeatureExtractor" and index == 1:
            found.below(self._axis_size(inputs[0], -1), offset)
        elif op == "OneHot" and index == 0:
            depth_array = ir.array(inputs[1])
            found.below(None if depth_array is None else _number(depth_array), offset)
        elif op == "TopK" and index == 1:
            size = self._axis_size(inputs[0], cast(int, ir.attribute(node, "axis", -1)))
            found.below(None if size is None else size + 1, offset)
        elif op == "EmbedLayerNormalization" and index < 2:
            found.below(self._axis_size(inputs[2 if index == 0 else 4], 0), offset)
        elif op in ("LSTM", "GRU", "RNN") and index == 4:
            size = self._axis_size(inputs[0], 0)
            found.below(None if size is None else size + 1, offset)
        elif op in _COMPARING:
            other = ir.array(inputs[1 - index])
            if other is not None and other.size == 1:
                found.candidates.append(other.reshape(-1)[0])
        for key in _KEYS:
            found.candidates += cast("Iterable[Any]", ir.attribute(node, key, ()))

    def _next(
        self, node: ir.Node, index: int, offset: int
    ) -> Iterable[tuple[ir.Value | None, int]]:
        """Values that hold the same numbers after a node, shifted by what the node adds."""
        op, outputs = node.op_type, node.outputs
        function = self._model.functions.get(node.op_identifier())
        if function is not None:
            self._arguments.update(zip(function.inputs, node.inputs, strict=False))
            return [(v, offset) for v in function.inputs[index : index + 1]]
        if op in ("Loop", "Scan"):
            return _into(node, index, offset)
        if (op in _PASSING and index == 0) or (op in _JOINING and (op != "Where" or index > 0)):
            return [(v, offset) for v in outputs]
        if op in ("Add", "Sub") and len(node.inputs) == 2:
            constant = ir.array(node.inputs[1 - index])
            if constant is None or constant.size == 0 or constant.dtype.char not in "bhilqBHILQefd":
                return []
            numbers: Any = constant
            if op == "Add":
                return [(outputs[0], offset + int(numbers.max()))]
            return [(outputs[0], offset - int(numbers.min()))] if index == 0 else []
        return []

    def _outside(self, value: ir.Value) -> list[ir.Value]:
        """The outputs of the node around a body that a body's output becomes."""
        graph = value.graph
        node = self._owners.get(graph) if isinstance(graph, ir.Graph) else None
        if graph is None or node is None or not value.is_graph_output():
            return []
        shift = 1 if node.op_type == "Loop" else 0
        positions = [i - shift for i, v in enumerate(graph.outputs) if v is value]
        return [node.outputs[i] for i in positions if 0 <= i < len(node.outputs)]


def _number(array: ir.Array) -> int | None:
    return int(array.reshape(-1)[0]) if array.size == 1 else None


def _into(node: ir.Node, index: int, offset: int) -> Iterable[tuple[ir.Value | None, int]]:
    """The inputs of a loop's body that an input of the node arrives at."""
    body = next(iter(ir.subgraphs(node)), None)
    if body is None or (node.op_type == "Loop" and index < 2):
        return []
    return [(v, offset) for v in body.inputs[index : index + 1]]
