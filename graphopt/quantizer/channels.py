"""Which channels of a model may be scaled together without changing what it computes.

A linear operator's output channel can be divided by a positive number if whatever reads it is
multiplied by it again. Between the two stand only operators that commute with such a scale: Relu,
pools, concatenation, additions of channels that are scaled alike (Nagel et al., "Data-Free
Quantization Through Weight Equalization and Bias Correction", 2019, for pairs of layers; here any
number of producers and consumers that share a channel).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import cast

import numpy as np
import numpy.typing as npt

from graphopt import ir
from graphopt.context import Context
from graphopt.execute import captured

__all__ = ["Channels", "Ids", "Layer", "Part"]

Ids = npt.NDArray[np.intp]

_LINEAR = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_SAME = frozenset(
    (
        *("Relu", "LeakyRelu", "Identity", "Dropout", "Abs", "Neg", "MaxPool", "AveragePool"),
        *("GlobalAveragePool", "GlobalMaxPool"),
    )
)
_ALIKE = ("Add", "Sub", "Sum", "Max", "Min")
_NORMS = ("LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization")


@dataclass
class Layer:
    """A linear operator with constant weights of its own, and the channels on both its sides."""

    node: ir.Node
    inputs: Ids | None = None
    outputs: Ids | None = None


@dataclass
class Part:
    """A constant operand that goes with the channels: a shift, a bound, the scale of a norm."""

    node: ir.Node
    kind: str
    """`shift` (Add, Sub), `clip` (Clip with two bounds), `norm` (a normalization's γ and β) or
    `factor` (a constant operand of Mul that stands for a γ)."""
    ids: Ids
    behind: int
    """How many axes of the node's result stand behind the channels."""


@dataclass
class Channels:
    """The channels of a model's main graph, as classes that have to be scaled alike."""

    layers: list[Layer] = field(default_factory=list[Layer])
    parts: list[Part] = field(default_factory=list[Part])
    places: dict[ir.Value, tuple[int, Ids]] = field(default_factory=dict[ir.Value, tuple[int, Ids]])
    """Values whose channels are known: the axis, and the class of each channel."""
    frozen: npt.NDArray[np.bool_] = field(default_factory=lambda: np.zeros(0, np.bool_))
    """By class: whether something reads it that a scale would change."""
    reasons: dict[ir.Node, str] = field(default_factory=dict[ir.Node, str])
    """Why layers that looked right stay out."""

    @classmethod
    def of(cls, context: Context, *, clips: bool = False, norms: bool = False) -> Channels:
        """Look at the main graph. `clips` and `norms` let channels through such operators."""
        return _Walk(context, clips=clips, norms=norms).run()


def _int(node: ir.Node, name: str, default: int) -> int:
    return int(cast(int, ir.attribute(node, name, default)))


class _Walk:
    """One walk over the graph, with a union-find over the channels."""

    def __init__(self, context: Context, *, clips: bool, norms: bool) -> None:
        self._context = context
        self._clips = clips
        self._norms = norms
        self._parent: list[int] = []
        self._frozen: list[bool] = []
        self._found = Channels()

    def run(self) -> Channels:
        """Every node in order; then each channel's class instead of the channel."""
        for node in self._context.model.graph:
            if not self._visit(node):
                for value in (*node.inputs, *captured(node)):
                    self._freeze(value)
        for value in self._context.model.graph.outputs:
            self._freeze(value)
        found = self._found
        roots = np.array([self._root(i) for i in range(len(self._parent))], np.intp)
        frozen = np.zeros(len(roots), np.bool_)
        np.logical_or.at(frozen, roots, np.array(self._frozen, np.bool_))
        found.frozen = frozen
        for layer in found.layers:
            layer.inputs = None if layer.inputs is None else roots[layer.inputs]
            layer.outputs = None if layer.outputs is None else roots[layer.outputs]
        for part in found.parts:
            part.ids = roots[part.ids]
        found.places = {v: (axis, roots[ids]) for v, (axis, ids) in found.places.items()}
        return found

    def _root(self, i: int) -> int:
        while self._parent[i] != i:
            self._parent[i] = self._parent[self._parent[i]]
            i = self._parent[i]
        return i

    def _fresh(self, count: int) -> Ids:
        start = len(self._parent)
        self._parent += range(start, start + count)
        self._frozen += [False] * count
        return np.arange(start, start + count, dtype=np.intp)

    def _freeze(self, value: ir.Value | None) -> None:
        place = None if value is None else self._found.places.get(value)
        for i in () if place is None else place[1].tolist():
            self._frozen[i] = True

    def _unite(self, ids: Ids, others: Ids) -> None:
        for a, b in zip(ids.tolist(), others.tolist(), strict=True):
            a, b = self._root(a), self._root(b)
            self._parent[max(a, b)] = min(a, b)

    def _shape(self, value: ir.Value | None) -> Sequence[object] | None:
        return None if value is None else self._context.shapes.shape(value)

    def _place(self, node: ir.Node, index: int = 0) -> tuple[int, Ids] | None:
        value = node.inputs[index] if len(node.inputs) > index else None
        return None if value is None else self._found.places.get(value)

    def _visit(self, node: ir.Node) -> bool:
        """Follow the channels through a node; False where it reads them in another way."""
        if node.domain not in ("", "ai.onnx", "com.microsoft") or not node.outputs:
            return False
        if node.op_type in _LINEAR:
            return self._linear(node)
        if node.op_type in _NORMS:
            return self._norm(node)
        place = self._place(node)
        if node.op_type in (*_ALIKE, "Concat", "Mul", "Div"):
            return self._combined(node)
        if place is None:
            return False
        axis, ids = place
        if node.op_type in _SAME:
            return self._keep(node, axis, ids)
        if node.op_type == "PRelu":
            return self._place(node, 1) is None and self._keep(node, axis, ids)
        if node.op_type == "Clip":
            return self._clip(node, axis, ids)
        if node.op_type == "Split":
            return self._split(node, axis, ids)
        return self._moved(node, axis, ids)

    def _keep(self, node: ir.Node, axis: int, ids: Ids) -> bool:
        """The first output has the channels; further outputs must not be used."""
        if any(v.name and (ir.use_count(v) or v.is_graph_output()) for v in node.outputs[1:]):
            return False
        self._found.places[node.outputs[0]] = (axis, ids)
        return True

    def _linear(self, node: ir.Node) -> bool:
        weights = node.inputs[1]
        tensor = ir.constant(weights)
        shape, result = self._shape(node.inputs[0]), self._shape(node.outputs[0])
        if tensor is None or weights is None or not tensor.dtype.is_floating_point():
            return False
        conv = node.op_type.startswith("Conv")
        if shape is None or result is None or len(tensor.shape) < 2:
            return False
        if ir.use_count(weights) > 1 or (not conv and len(tensor.shape) != 2):
            self._found.reasons[node] = "its weights are used elsewhere, or batched"
            return False
        dims = tensor.shape.numpy()
        groups = _int(node, "group", 1)
        if node.op_type == "Conv":
            counts = dims[1] * groups, dims[0]
        elif node.op_type == "ConvTranspose":
            counts = dims[0], dims[1] * groups
        elif node.op_type == "Gemm" and ir.attribute(node, "transB", 0):
            counts = dims[1], dims[0]
        else:
            counts = dims[0], dims[1]
        layer = Layer(node)
        self._found.layers.append(layer)
        place = self._place(node)
        wanted = 1 if conv else len(shape) - 1
        if place is not None:
            plain = not (node.op_type == "Gemm" and ir.attribute(node, "transA", 0))
            if plain and place[0] == wanted and len(place[1]) == counts[0]:
                layer.inputs = place[1]
            else:
                self._freeze(node.inputs[0])
        bias = node.inputs[2] if len(node.inputs) > 2 else None
        if bias is None or ir.constant(bias) is not None:
            layer.outputs = self._fresh(counts[1])
            axis = 1 if conv else len(result) - 1
            self._found.places[node.outputs[0]] = (axis, layer.outputs)
        return True

    def _norm(self, node: ir.Node) -> bool:
        """A normalization makes channels, whose scale its own γ and β take."""
        result = self._shape(node.outputs[0])
        gamma = ir.constant(node.inputs[1])
        beta = node.inputs[2] if len(node.inputs) > 2 else None
        if not self._norms or result is None or gamma is None or len(gamma.shape) != 1:
            return False
        if beta is not None and ir.constant(beta) is None:
            return False
        ids = self._fresh(gamma.size)
        self._found.parts.append(Part(node, "norm", ids, 0))
        self._found.places[node.outputs[0]] = (len(result) - 1, ids)
        return False  # what goes in is read as it is

    def _combined(self, node: ir.Node) -> bool:
        """Additions and the like of channels that are scaled alike; concatenation; a factor."""
        result = self._shape(node.outputs[0])
        places = [self._place(node, i) for i in range(len(node.inputs))]
        known = [p for p in places if p is not None]
        if result is None or not known:
            return result is not None and self._factor(node, len(result))
        axis, ids = known[0]
        if node.op_type == "Concat":
            return self._concat(node, len(result))
        ranks = [len(self._shape(v) or ()) for v in node.inputs]
        # Broadcasting aligns axes from the right.
        rights = {r - p[0] for r, p in zip(ranks, places, strict=True) if p is not None}
        if len(rights) > 1 or any(len(p[1]) != len(ids) for p in known):
            return False
        axis = len(result) - rights.pop()
        if node.op_type in ("Mul", "Div"):
            if len(known) == 2:  # a scale goes through one of them: a gate stays as it is
                gate = next((i for i in (0, 1) if self._is_frozen(places[i])), 0)
                gate = 1 if node.op_type == "Div" else gate
                self._freeze(node.inputs[gate])
                ids = known[1 - gate][1]
            ok = node.op_type == "Mul" or places[0] is not None
            return ok and result[axis] == len(ids) and self._keep(node, axis, ids)
        if result[axis] != len(ids):
            return False
        constants = [v for v, p in zip(node.inputs, places, strict=True) if p is None]
        if constants:
            if len(node.inputs) != 2 or ir.constant(constants[0]) is None:
                return False
            self._found.parts.append(Part(node, "shift", ids, len(result) - 1 - axis))
        for _, others in known[1:]:
            self._unite(ids, others)
        return self._keep(node, axis, ids)

    def _factor(self, node: ir.Node, rank: int) -> bool:
        """A product with a constant per channel makes channels, as a normalization's γ does."""
        constants = [v for v in node.inputs if ir.constant(v) is not None]
        if not self._norms or node.op_type != "Mul" or len(constants) != 1:
            return False
        tensor = ir.constant(constants[0])
        assert tensor is not None
        dims = tensor.shape.numpy()
        axes = [axis for axis, size in enumerate(dims) if size > 1]
        if len(axes) != 1 or not tensor.dtype.is_floating_point() or len(dims) > rank:
            return False
        shape = self._shape(node.outputs[0])
        behind = len(dims) - 1 - axes[0]
        if shape is None or shape[rank - 1 - behind] != tensor.size:
            return False
        ids = self._fresh(tensor.size)
        self._found.parts.append(Part(node, "factor", ids, behind))
        self._found.places[node.outputs[0]] = (rank - 1 - behind, ids)
        return False  # what goes in is read as it is

    def _is_frozen(self, place: tuple[int, Ids] | None) -> bool:
        ids: list[int] = [] if place is None else place[1].tolist()
        return any(self._frozen[i] for i in ids)

    def _split(self, node: ir.Node, axis: int, ids: Ids) -> bool:
        """Parts of the channels, or all of them in parts along another axis."""
        along = _int(node, "axis", 0) % len(self._shape(node.inputs[0]) or (0,))
        start = 0
        for value in node.outputs:
            shape = self._shape(value)
            size = None if shape is None else shape[axis]
            if not isinstance(size, int):
                return False
            self._found.places[value] = (axis, ids[start : start + size])
            start += size if along == axis else 0
        return start in (0, len(ids))

    def _concat(self, node: ir.Node, rank: int) -> bool:
        axis = _int(node, "axis", 1) % rank
        parts: list[Ids] = []
        first = next(p for i in range(len(node.inputs)) if (p := self._place(node, i)) is not None)
        for index, value in enumerate(node.inputs):
            shape, place = self._shape(value), self._place(node, index)
            if first[0] != axis:
                if place is None or place[0] != first[0] or len(place[1]) != len(first[1]):
                    return False
                self._unite(first[1], place[1])
                continue
            size = None if shape is None else shape[axis]
            if not isinstance(size, int) or (place is not None and place[0] != axis):
                return False
            ids = self._fresh(size) if place is None else place[1]
            for i in ids.tolist() if place is None else ():
                self._frozen[i] = True
            parts.append(ids)
        return self._keep(node, first[0], np.concatenate(parts) if parts else first[1])

    def _clip(self, node: ir.Node, axis: int, ids: Ids) -> bool:
        """From 0 upward it is a Relu; with an upper bound, that bound goes with the channels."""
        bounds = [ir.array(v) if v is not None else None for v in node.inputs[1:3]]
        if any(v is not None for v in node.inputs[1:3] if ir.constant(v) is None):
            return False
        low: object = bounds[0] if bounds else ir.attribute(node, "min")
        high: object = bounds[1] if len(bounds) > 1 else ir.attribute(node, "max")
        if low is not None and float(np.asarray(low, np.float64).reshape(())) == 0 and high is None:
            return self._keep(node, axis, ids)
        if not self._clips or node.attributes:
            return False
        rank = len(self._shape(node.outputs[0]) or ())
        self._found.parts.append(Part(node, "clip", ids, rank - 1 - axis))
        return self._keep(node, axis, ids)

    def _moved(self, node: ir.Node, axis: int, ids: Ids) -> bool:
        """Operators that move data, or add it up along other axes."""
        shape, result = self._shape(node.inputs[0]), self._shape(node.outputs[0])
        if shape is None or result is None:
            return False
        if node.op_type == "Transpose":
            perm = cast("Sequence[int] | None", ir.attribute(node, "perm"))
            order = list(range(len(shape)))[::-1] if perm is None else list(perm)
            return self._keep(node, order.index(axis), ids)
        if node.op_type in ("Flatten", "Reshape", "Squeeze", "Unsqueeze"):
            return self._reshaped(node, axis, ids, shape, result)
        if node.op_type in ("ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin", "ReduceL2"):
            kept = len(result) == len(shape) and result[axis] == len(ids) > 1
            return kept and self._keep(node, axis, ids)
        if node.op_type == "Pad":
            mode = ir.attribute(node, "mode", "constant")
            value = ir.array(node.inputs[2]) if len(node.inputs) > 2 else None
            given = len(node.inputs) > 2 and node.inputs[2] is not None
            zero = not given or (
                value is not None and float(np.asarray(value, np.float64).reshape(())) == 0
            )
            zero = zero and not ir.attribute(node, "value", 0)
            return (
                result[axis] == len(ids)
                and (mode != "constant" or zero)
                and self._keep(node, axis, ids)
            )
        if node.op_type in ("Resize", "Upsample"):
            plain = ir.attribute(node, "coordinate_transformation_mode") != "tf_crop_and_resize"
            return plain and result[axis] == len(ids) and self._keep(node, axis, ids)
        return False

    def _reshaped(
        self,
        node: ir.Node,
        axis: int,
        ids: Ids,
        shape: Sequence[object],
        result: Sequence[object],
    ) -> bool:
        """The channel axis stays, or axes behind it are merged into it."""
        behind = list(shape[axis + 1 :])
        sizes = [s for s in behind if isinstance(s, int)]
        if len(sizes) < len(behind):
            return False
        inner = math.prod(sizes)
        tail = list(result)
        after = 1
        for place in range(len(tail) - 1, -1, -1):
            size = tail[place]
            if not isinstance(size, int):
                return False
            if after == inner and size == len(ids):
                return self._keep(node, place, ids)
            after *= size
            if after == inner * len(ids):
                if math.prod(s for s in tail[place + 1 :] if isinstance(s, int)) != 1:
                    return False
                return self._keep(node, place, np.repeat(ids, inner))
            if after > inner * len(ids):
                return False
        return False
