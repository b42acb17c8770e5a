"""What a model costs to run: operations, memory traffic, weights, peak memory of activations.

Counts are of the graph as written: two operations per multiply-add, and each tensor that a node
reads or writes once. Symbolic sizes take their number from `bindings`, by the symbol's name, and 1
without one. What has no known rank counts nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import cast

from graphopt import ir
from graphopt.dims import DimLike, evaluate
from graphopt.shapes import Shapes

__all__ = ["Cost", "ModelCost", "model_cost", "node_cost"]

# Their output is the input's memory, or computed from its shape.
_VIEWS = frozenset({"Flatten", "Identity", "Reshape", "Squeeze", "Unsqueeze"})
_FREE = _VIEWS | {"Constant", "Dropout", "Shape", "Size"}

# Operations per element of the first input; one per output element is the rule for the rest.
_PER_INPUT = {
    "BatchNormalization": 2,
    "GlobalAveragePool": 1,
    "GlobalMaxPool": 1,
    "GroupNormalization": 8,
    "InstanceNormalization": 8,
    "LRN": 8,
    "LayerNormalization": 8,
    "LogSoftmax": 5,
    "LpNormalization": 3,
    "RMSNormalization": 5,
    "SimplifiedLayerNormalization": 5,
    "SkipLayerNormalization": 9,
    "SkipSimplifiedLayerNormalization": 6,
    "Softmax": 5,
}
_MOVES = frozenset(
    (
        *("Cast", "CastLike", "Compress", "Concat", "ConstantOfShape", "DepthToSpace", "Expand"),
        *("EyeLike", "Gather", "GatherElements", "GatherND", "NonZero", "OneHot", "Pad", "Range"),
        *("ReverseSequence", "Scatter", "ScatterElements", "ScatterND", "SequenceAt", "Slice"),
        *("SpaceToDepth", "Split", "Tile", "Transpose", "Trilu", "Where"),
    )
)
_GATES = {"RNN": 1, "GRU": 3, "LSTM": 4}


@dataclass(frozen=True)
class Cost:
    """Of one node: operations, and bytes read and written."""

    flops: int = 0
    bytes: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.flops + other.flops, self.bytes + other.bytes)

    def times(self, count: int) -> Cost:
        """The cost of that many runs."""
        return Cost(self.flops * count, self.bytes * count)


@dataclass(frozen=True)
class ModelCost:
    """Of a whole model, for one run.

    `flops` and `bytes` are sums over the nodes: of an If the dearer branch, of a Loop or Scan as
    many runs of the body as are known (else one). `parameters` and `weight_bytes` count every
    constant tensor once. `peak_bytes` is the most that inputs and intermediate results take
    together at one time, each kept until its last use.
    """

    flops: int
    bytes: int
    parameters: int
    weight_bytes: int
    peak_bytes: int


class _Sizes:
    """Numbers for the sizes of a model's values."""

    def __init__(self, shapes: Shapes, bindings: Mapping[str, int]) -> None:
        self.shapes = shapes
        self._bindings = bindings

    def number(self, size: DimLike) -> int:
        try:
            return max(evaluate(size, self._bindings, default=1), 0)
        except (ValueError, ArithmeticError):  # bindings that no run can have
            return 1

    def shape(self, value: ir.Value | None) -> list[int]:
        """The sizes; of an unknown rank or an absent value [0], so that it counts nothing."""
        known = None if value is None else self.shapes.shape(value)
        return [0] if known is None else [self.number(size) for size in known]

    def elements(self, value: ir.Value | None) -> int:
        return math.prod(self.shape(value))

    def bytes(self, value: ir.Value | None) -> int:
        dtype = None if value is None else self.shapes.dtype(value)
        if dtype is None or dtype in (ir.DataType.STRING, ir.DataType.UNDEFINED):
            return 0
        return math.ceil(self.elements(value) * dtype.bitwidth / 8)


def node_cost(node: ir.Node, shapes: Shapes, bindings: Mapping[str, int] | None = None) -> Cost:
    """The cost of one node; bodies that it holds or calls are not included (see `model_cost`)."""
    return _node_cost(node, _Sizes(shapes, bindings or {}))


def _node_cost(node: ir.Node, sizes: _Sizes) -> Cost:
    if node.op_type in _FREE or any(True for _ in ir.subgraphs(node)):
        return Cost()
    read = [value for value in dict.fromkeys(node.inputs) if value is not None]
    written = sum(sizes.bytes(value) for value in node.outputs)
    if node.op_type in ("Gather", "GatherElements", "GatherND", "Slice") and read:
        moved = written + sum(sizes.bytes(value) for value in read[1:])  # reads what it takes
    else:
        moved = sum(sizes.bytes(value) for value in read)
    return Cost(_flops(node, sizes), moved + written)


def _flops(node: ir.Node, sizes: _Sizes) -> int:
    op = node.op_type
    count = _COUNTS.get(op)
    if count is not None:
        try:
            return count(node, sizes)
        except (IndexError, ValueError, ZeroDivisionError):  # malformed: counts nothing
            return 0
    if op in _MOVES:
        return 0
    if op in _PER_INPUT or op.startswith(("Reduce", "Arg")):
        return _PER_INPUT.get(op, 1) * sizes.elements(node.inputs[0] if node.inputs else None)
    return sizes.elements(node.outputs[0]) if node.outputs else 0


def _conv(node: ir.Node, sizes: _Sizes, weight: int = 1) -> int:
    """W [M, C/group, ...]: a product per output element and element of one filter."""
    filters = sizes.shape(node.inputs[weight])
    return 2 * sizes.elements(node.outputs[0]) * math.prod(filters[1:])


def _qlinear_conv(node: ir.Node, sizes: _Sizes) -> int:
    return _conv(node, sizes, 3)


def _conv_transpose(node: ir.Node, sizes: _Sizes) -> int:
    """W [C, M/group, ...]: a product per input element and element of one filter."""
    return 2 * sizes.elements(node.inputs[0]) * math.prod(sizes.shape(node.inputs[1])[1:])


def _matmul(node: ir.Node, sizes: _Sizes) -> int:
    inner = sizes.shape(node.inputs[0])
    depth = inner[-2] if ir.attribute(node, "transA", 0) and len(inner) > 1 else inner[-1]
    return 2 * sizes.elements(node.outputs[0]) * depth


def _gemm(node: ir.Node, sizes: _Sizes) -> int:
    bias = len(node.inputs) > 2 and node.inputs[2] is not None
    return _matmul(node, sizes) + bias * sizes.elements(node.outputs[0])


def _einsum(node: ir.Node, sizes: _Sizes) -> int:
    """All letters' sizes multiplied, for each operand beyond the first."""
    equation = str(ir.attribute(node, "equation", "")).replace(" ", "")
    letters: dict[str, int] = {}
    for term, value in zip(equation.split("->")[0].split(","), node.inputs, strict=True):
        shape = sizes.shape(value)
        if "..." in term:
            return sizes.elements(node.outputs[0])
        letters |= dict(zip(term, shape, strict=True))
    return 2 * math.prod(letters.values()) * max(len(node.inputs) - 1, 1)


def _recurrent(node: ir.Node, sizes: _Sizes) -> int:
    """Per step and gate the products with W [D, G*H, I] and R [D, G*H, H]."""
    steps, batch = sizes.shape(node.inputs[0])[:2]
    weights = sizes.elements(node.inputs[1]) + sizes.elements(node.inputs[2])
    return 2 * steps * batch * weights


def _attention(node: ir.Node, sizes: _Sizes) -> int:
    """Scores and their product with the values; com.microsoft's packed form projects before."""
    if node.domain == "com.microsoft" and node.op_type == "Attention":
        batch, steps, _ = sizes.shape(node.inputs[0])
        width = sizes.shape(node.inputs[1])[-1]
        return 2 * sizes.elements(node.inputs[0]) * width + 4 * batch * steps**2 * width // 3
    query, key, values = (sizes.shape(node.inputs[i]) for i in range(3))
    past = sizes.shape(node.inputs[4])[2] if _has(node, 4) and not node.domain else 0
    if len(query) == 4:
        batch, heads, steps, width = query
        return 2 * batch * heads * steps * (key[2] + past) * (width + values[3])
    batch, steps, width = query
    read = values[2]
    shared, heads_out = ir.attribute(node, "kv_num_heads"), ir.attribute(node, "q_num_heads")
    if isinstance(shared, int) and isinstance(heads_out, int):
        read = read // shared * heads_out
    return 2 * batch * steps * (key[1] + past) * (width + read)


def _integers(node: ir.Node, name: str) -> list[int]:
    """A list attribute, empty where absent."""
    values = ir.attribute(node, name, ())
    items = cast("tuple[object, ...]", values) if isinstance(values, tuple) else ()
    return [item for item in items if isinstance(item, int)]


def _has(node: ir.Node, index: int) -> bool:
    return index < len(node.inputs) and node.inputs[index] is not None


def _pool(node: ir.Node, sizes: _Sizes) -> int:
    return sizes.elements(node.outputs[0]) * math.prod(_integers(node, "kernel_shape"))


def _trees(node: ir.Node, sizes: _Sizes) -> int:
    """A comparison per level of every tree, taken as balanced."""
    ids = _integers(node, "nodes_treeids")
    if not ids:
        return 0
    trees = len(set(ids))
    depth = max(math.log2(len(ids) / trees), 1)
    return math.ceil(sizes.shape(node.inputs[0])[0] * trees * depth)


def _linear(node: ir.Node, sizes: _Sizes) -> int:
    weights = node.attributes.get("coefficients")
    count = 0 if weights is None or weights.is_ref() else len(weights.as_floats())
    return 2 * sizes.shape(node.inputs[0])[0] * count


_COUNTS: dict[str, Callable[[ir.Node, _Sizes], int]] = {
    "Attention": _attention,
    "AveragePool": _pool,
    "Conv": _conv,
    "ConvInteger": _conv,
    "ConvTranspose": _conv_transpose,
    "DynamicQuantizeMatMul": _matmul,
    "Einsum": _einsum,
    "FusedConv": _conv,
    "FusedGemm": _gemm,
    "FusedMatMul": _matmul,
    "GRU": _recurrent,
    "Gemm": _gemm,
    "LSTM": _recurrent,
    "LinearClassifier": _linear,
    "LinearRegressor": _linear,
    "LpPool": _pool,
    "MatMul": _matmul,
    "MatMulInteger": _matmul,
    "MatMulIntegerToFloat": _matmul,
    "MatMulNBits": _matmul,
    "MaxPool": _pool,
    "MultiHeadAttention": _attention,
    "QLinearConv": _qlinear_conv,
    "QLinearMatMul": _matmul,
    "RNN": _recurrent,
    "TreeEnsembleClassifier": _trees,
    "TreeEnsembleRegressor": _trees,
}


def model_cost(
    model: ir.Model, shapes: Shapes, bindings: Mapping[str, int] | None = None
) -> ModelCost:
    """The cost of a model; see `ModelCost` for what is counted."""
    sizes = _Sizes(shapes, bindings or {})
    total, peak = _graph_cost(model.graph, model, sizes)
    weights = ir.constants(model)
    return ModelCost(
        flops=total.flops,
        bytes=total.bytes,
        parameters=sum(math.prod(t.shape.numpy()) for t in weights),
        weight_bytes=sum(t.nbytes for t in weights if t.dtype != ir.DataType.STRING),
        peak_bytes=peak,
    )


def _graph_cost(graph: ir.Graph, model: ir.Model, sizes: _Sizes) -> tuple[Cost, int]:
    """The cost of a graph's nodes with what they hold, and the peak of its activations."""
    nodes = list(graph)
    inner = [_node_total(node, model, sizes) for node in nodes]
    peak = _peak(graph, nodes, [extra for _, extra in inner], sizes)
    return sum((cost for cost, _ in inner), Cost()), peak


def _node_total(node: ir.Node, model: ir.Model, sizes: _Sizes) -> tuple[Cost, int]:
    """A node with its bodies or its function: cost, and the peak within."""
    if node.op_identifier() in model.functions:
        with sizes.shapes.calling(node) as function:
            return _graph_cost(function.graph, model, sizes)
    bodies = [_graph_cost(body, model, sizes) for body in ir.subgraphs(node)]
    if not bodies:
        return _node_cost(node, sizes), 0
    cost = max((cost for cost, _ in bodies), key=lambda c: (c.flops, c.bytes))
    peak = max(extra for _, extra in bodies)
    return cost.times(_runs(node, sizes)), peak


def _runs(node: ir.Node, sizes: _Sizes) -> int:
    """How often a body runs, where its trip count or its scanned length is known."""
    if node.op_type == "Loop" and node.inputs and node.inputs[0] is not None:
        trips = sizes.shapes.values(node.inputs[0])
        count = trips.ravel().tolist()[0] if trips is not None and trips.size else 1
        known = isinstance(count, int) and count < 1 << 31  # beyond, something else ends it
        return max(count, 0) if known else 1
    if node.op_type == "Scan" and node.inputs:
        shape = sizes.shape(node.inputs[-1])
        axes = _integers(node, "scan_input_axes") or [0]
        return shape[axes[-1]] if -len(shape) <= axes[-1] < len(shape) else 1
    return 1


def _peak(graph: ir.Graph, nodes: list[ir.Node], inner: list[int], sizes: _Sizes) -> int:
    """The most bytes alive at once, with what runs inside a node on top."""
    buffer: dict[ir.Value, ir.Value] = {v: v for v in graph.inputs}
    last: dict[ir.Value, int] = {}
    for index, node in enumerate(nodes):
        for value in _reads(node):
            if value in buffer:
                last[buffer[value]] = index
        source = node.inputs[0] if node.inputs else None
        view = buffer.get(source) if source is not None and node.op_type in _VIEWS else None
        for value in node.outputs:
            buffer[value] = view or value
            last.setdefault(buffer[value], index)
    for value in graph.outputs:
        if value in buffer:
            last[buffer[value]] = len(nodes)
    ends: dict[int, list[ir.Value]] = {}
    for value, index in last.items():
        ends.setdefault(index, []).append(value)
    alive = peak = sum(sizes.bytes(value) for value in graph.inputs)
    for index, node in enumerate(nodes):
        if node.op_type != "Constant":
            alive += sum(sizes.bytes(v) for v in node.outputs if buffer[v] is v)
        peak = max(peak, alive + inner[index])
        alive -= sum(sizes.bytes(v) for v in ends.get(index, ()) if not _is_constant(v))
    return peak


def _is_constant(value: ir.Value) -> bool:
    node = value.producer()
    return node is not None and node.op_type == "Constant"


def _reads(node: ir.Node) -> Iterable[ir.Value]:
    """The values that a node or a body below it reads."""
    for value in node.inputs:
        if value is not None:
            yield value
    for body in ir.subgraphs(node):
        for inner in body:
            yield from _reads(inner)
        yield from body.outputs
