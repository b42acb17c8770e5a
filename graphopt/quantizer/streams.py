"""Values that a model writes by products and reads by products, and what may turn between the two.

A transformer's residual stream is a sum of what embeddings and products write. Where only products
read it, through normalizations that look at nothing but the length of its vectors, its channels
can be turned by any orthogonal matrix that goes into the weights on both sides (Ashkboos et al.,
"QuaRot: Outlier-Free 4-Bit Inference in Rotated LLMs", 2024).
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
from graphopt.numpy_moves import axes_of

__all__ = ["Edit", "Place", "Stream", "streams"]

Floats = npt.NDArray[np.float64]

_NORMS = ("LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization")
_SAME = ("Identity", "Neg")
_MEANS = ("ReduceMean", "ReduceSum")
_LENGTHS = ("ReduceL2", "ReduceSumSquare")
_SMALLEST = 1e-4  # of the largest factor: below, its inverse would drown what is beside it
_ASKS_SHAPE = ("Shape", "Size")


@dataclass(frozen=True)
class Edit:
    """A constant operand of a node that turns along an axis, after it was multiplied."""

    node: ir.Node
    index: int
    axis: int
    """Of the constant, counted from its end."""
    factor: Floats | None = None
    """Per channel."""
    writes: bool = True
    """Whether it makes a stream's values, or is multiplied with them."""


@dataclass(eq=False)
class Stream:
    """Values whose channels turn together, or not at all."""

    width: int
    edits: list[Edit] = field(default_factory=list[Edit])
    scaled: list[tuple[ir.Node, int]] = field(default_factory=list[tuple[ir.Node, int]])
    """Nodes whose constant operand is a factor per channel that moves into what reads them."""
    read: list[ir.Value] = field(default_factory=list[ir.Value])
    """Those of its values, with the channels last, whose length a norm takes."""
    adds: bool = False
    """Whether two of its values are added up, or a norm reads one."""
    centred: bool = False
    """Whether means over its channels are taken, which have to stay."""
    reason: str = ""
    """Why it may not turn."""
    joined: Stream | None = None

    @property
    def root(self) -> Stream:
        """The stream that it is part of."""
        return self if self.joined is None else self.joined.root

    def freeze(self, reason: str) -> None:
        """Something reads or makes a value in another way."""
        root = self.root
        root.reason = root.reason or reason

    def join(self, other: Stream) -> None:
        """Both turn alike from now on."""
        one, two = self.root, other.root
        if one is two:
            return
        if one.width != two.width:
            one.freeze("widths differ")
        one.edits += two.edits
        one.scaled += two.scaled
        one.read += two.read
        one.adds, one.centred = one.adds or two.adds, one.centred or two.centred
        one.reason = one.reason or two.reason
        two.joined = one


@dataclass(frozen=True)
class Place:
    """Where a value's channels are."""

    stream: Stream
    behind: int
    """How many axes stand behind the channels'."""
    factor: Floats | None = None
    """What a channel is multiplied by, beyond what turns."""


def streams(context: Context) -> list[Stream]:
    """Streams of the main graph that products or additions read, also those that may not turn."""
    return _Walk(context).run()


class _Walk:
    """One walk over the graph, in its order."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._places: dict[ir.Value, Place] = {}
        self._squares: dict[ir.Value, Place] = {}
        self._found: list[Stream] = []

    def run(self) -> list[Stream]:
        graph = self._context.model.graph
        for node in graph:
            if node.op_type not in _ASKS_SHAPE and not self._visit(node):
                for value in (*node.inputs, *captured(node)):
                    self._freeze(value, f"{ir.label(node)} reads it in another way")
        for value in graph.outputs:
            self._freeze(value, "it is an output of the model")
        roots = dict.fromkeys(stream.root for stream in self._found)
        return [s for s in roots if s.adds or any(not edit.writes for edit in s.edits)]

    def _freeze(self, value: ir.Value | None, reason: str) -> None:
        place = None if value is None else self._places.get(value, self._squares.get(value))
        if place is not None:
            place.stream.freeze(reason)

    def _visit(self, node: ir.Node) -> bool:
        """Follow streams through a node; False where it reads them in another way."""
        if node.domain not in ("", "ai.onnx") or not node.outputs or not node.inputs:
            return False
        kind = node.op_type
        if kind in ("MatMul", "Gemm", "Conv"):
            return self._linear(node)
        if kind in ("Gather", "Expand") and ir.constant(node.inputs[0]) is not None:
            return self._table(node)
        if kind in ("Add", "Sub", "Sum"):
            return self._sum(node)
        if kind in ("Mul", "Div", "Pow"):
            return self._product(node)
        if kind == "Concat":
            return self._concat(node)
        if any(v in self._places or v in self._squares for v in node.inputs[1:] if v is not None):
            return False
        first = node.inputs[0]
        place = None if first is None else self._places.get(first)
        if place is None:
            square = None if first is None else self._squares.get(first)
            return square is not None and kind in _MEANS and self._axes(node) == [square.behind]
        if kind in _NORMS:
            return self._norm(node, place)
        if kind in _SAME:
            return self._keep(node, place)
        if kind in (*_MEANS, *_LENGTHS):
            return self._reduced(node, place)
        return self._moved(node, place)

    def _keep(self, node: ir.Node, place: Place) -> bool:
        self._places[node.outputs[0]] = place
        return True

    def _shape(self, value: ir.Value | None) -> Sequence[object] | None:
        return None if value is None else self._context.shapes.shape(value)

    def _start(self, node: ir.Node, edits: Sequence[Edit], width: int, behind: int) -> Stream:
        """A stream that a node begins to write."""
        stream = Stream(width, list(edits))
        self._found.append(stream)
        for edit in edits:
            self._own(stream, edit)
        self._places[node.outputs[0]] = Place(stream, behind)
        return stream

    def _own(self, stream: Stream, edit: Edit) -> None:
        """A large constant has to be the node's own: a second one would take room."""
        value = edit.node.inputs[edit.index]
        tensor = ir.constant(value)
        if value is None or tensor is None or not tensor.dtype.is_floating_point():
            stream.freeze(f"{ir.label(edit.node)} has no constant weights of floats")
        elif len(tensor.shape) > 1 and ir.use_count(value) > 1:
            stream.freeze(f"the weights of {ir.label(edit.node)} are used elsewhere too")

    def _linear(self, node: ir.Node) -> bool:
        tensor = ir.constant(node.inputs[1])
        result = self._shape(node.outputs[0])
        conv, gemm = node.op_type == "Conv", node.op_type == "Gemm"
        rank = 0 if tensor is None else len(tensor.shape)
        if tensor is None or result is None or (rank < 3 if conv else rank != 2):
            return False
        if conv and ir.attribute(node, "group", 1) != 1:
            return False
        turned = conv or bool(gemm and ir.attribute(node, "transB", 0))
        inner, outer = (1 - rank, -rank) if turned else (-2, -1)
        place = self._places.get(node.inputs[0]) if node.inputs[0] is not None else None
        if place is not None:
            if place.behind != rank - 2 or (gemm and ir.attribute(node, "transA", 0)):
                place.stream.freeze(f"{ir.label(node)} reads it along another axis")
            edit = Edit(node, 1, inner, place.factor, writes=False)
            place.stream.root.edits.append(edit)
            self._own(place.stream, edit)
        edits = [Edit(node, 1, outer)]
        bias = node.inputs[2] if len(node.inputs) > 2 else None
        if bias is not None:
            edits.append(Edit(node, 2, -1))
        stream = self._start(node, edits, tensor.shape.numpy()[outer], rank - 2)
        if bias is not None and ir.constant(bias) is None:
            self._freeze(bias, f"{ir.label(node)} adds it")
            stream.freeze("its bias is no constant")
        return True

    def _table(self, node: ir.Node) -> bool:
        """Rows of a constant, or copies of it."""
        tensor, result = ir.constant(node.inputs[0]), self._shape(node.outputs[0])
        assert tensor is not None
        dims = tensor.shape.numpy()
        if result is None or not dims or dims[-1] < 2 or result[-1] != dims[-1]:
            return False
        if node.op_type == "Gather":
            axis = cast(int, ir.attribute(node, "axis", 0)) % len(dims)
            if axis == len(dims) - 1:
                return False
        if tensor.dtype.is_floating_point():
            self._start(node, [Edit(node, 0, -1)], dims[-1], 0)
        return True

    def _sum(self, node: ir.Node) -> bool:
        """Streams, constants, and numbers that all channels of a vector get alike."""
        result = self._shape(node.outputs[0])
        places = [self._places.get(v) if v is not None else None for v in node.inputs]
        known = [place for place in places if place is not None]
        if result is None or not known:
            return False
        first = known[0]
        if any(
            p.behind != first.behind or (len(known) > 1 and p.factor is not None) for p in known
        ):
            return False
        if result[len(result) - 1 - first.behind] != first.stream.root.width:
            return False
        for index, (value, place) in enumerate(zip(node.inputs, places, strict=True)):
            if place is None and not self._added(node, index, value, first):
                return False
        for place in known[1:]:
            first.stream.join(place.stream)
        first.stream.root.adds |= len(known) > 1
        return self._keep(node, first)

    def _added(self, node: ir.Node, index: int, value: ir.Value | None, place: Place) -> bool:
        array, stream = ir.array(value), place.stream.root
        if array is None:
            stream.centred = True
            return self._is_flat(value, place) and place.factor is None
        inverse = _inverse(place.factor, array, place.behind)
        if place.factor is not None and inverse is None:
            return False
        stream.edits.append(Edit(node, index, -1 - place.behind, inverse))
        self._own(stream, stream.edits[-1])
        return True

    def _is_flat(self, value: ir.Value | None, place: Place) -> bool:
        """Whether all channels get the same of a value that is broadcast to them."""
        shape = self._shape(value)
        return shape is not None and (len(shape) <= place.behind or shape[-1 - place.behind] == 1)

    def _product(self, node: ir.Node) -> bool:
        """A square, a factor per channel, or one that all channels of a vector have."""
        a, b = node.inputs[0], node.inputs[1]
        assert a is not None and b is not None
        places, array = (self._places.get(a), self._places.get(b)), ir.array(b)
        if node.op_type == "Pow" or a is b:
            place = places[0]
            two = a is b or (array is not None and array.size == 1 and float(array.item()) == 2)
            if place is None or place.factor is not None or not two or node.op_type == "Div":
                return False
            self._squares[node.outputs[0]] = place
            if not place.behind:
                place.stream.root.read.append(a)
            return True
        index = 0 if places[0] is None else 1
        place, other = places[1 - index], node.inputs[index]
        if places[index] is not None or place is None or (node.op_type == "Div" and index == 0):
            return False
        shapes = self._shape(node.outputs[0]), self._shape(node.inputs[1 - index])
        if shapes[0] is None or shapes[1] is None or len(shapes[0]) != len(shapes[1]):
            return False
        if self._is_flat(other, place):
            return self._keep(node, place)
        array = ir.array(other)
        if array is None or array.size != array.shape[-1 - place.behind]:
            return False
        factor = array.astype(np.float64).reshape(-1)
        if node.op_type == "Div":
            if not factor.all():
                return False
            factor = 1 / factor
        place.stream.root.scaled.append((node, index))
        factor = factor if place.factor is None else factor * place.factor
        return self._keep(node, Place(place.stream, place.behind, factor))

    def _norm(self, node: ir.Node, place: Place) -> bool:
        rank = len(self._shape(node.inputs[0]) or ())
        axis = cast(int, ir.attribute(node, "axis", -1))
        scale = ir.array(node.inputs[1])
        bias = node.inputs[2] if len(node.inputs) > 2 else None
        if place.behind or place.factor is not None or axis not in (-1, rank - 1):
            return False
        if scale is None or scale.shape != (place.stream.root.width,):
            return False
        factor, stream = scale.astype(np.float64), place.stream.root
        if bias is not None:
            array = ir.array(bias)
            inverse = None if array is None else _inverse(factor, array, 0)
            if inverse is None:
                return False
            stream.edits.append(Edit(node, 2, -1, inverse))
        assert node.inputs[0] is not None
        stream.read.append(node.inputs[0])
        stream.adds = True
        stream.centred |= node.op_type == "LayerNormalization"
        stream.scaled.append((node, 1))
        return self._keep(node, Place(stream, 0, factor))

    def _axes(self, node: ir.Node) -> list[int] | None:
        """Axes that a reduction goes along, as numbers of axes behind them."""
        rank = len(self._shape(node.inputs[0]) or ())
        inputs = [ir.array(value) for value in node.inputs]
        if any(
            v is not None and a is None for v, a in zip(node.inputs[1:], inputs[1:], strict=True)
        ):
            return None
        since = 13 if node.op_type == "ReduceSum" else 18
        axes = axes_of(node, inputs, self._context.opset(node) >= since)
        return None if axes is None else sorted(rank - 1 - axis % rank for axis in axes)

    def _reduced(self, node: ir.Node, place: Place) -> bool:
        axes = self._axes(node)
        if axes is None or not axes:
            return False
        if place.behind not in axes:
            gone = 0 if ir.attribute(node, "keepdims", 1) else sum(a < place.behind for a in axes)
            moved = Place(place.stream, place.behind - gone, place.factor)
            return node.op_type in _MEANS and self._keep(node, moved)
        if len(axes) > 1 or place.factor is not None:
            return False
        place.stream.root.centred |= node.op_type in _MEANS
        return True

    def _concat(self, node: ir.Node) -> bool:
        rank = len(self._shape(node.outputs[0]) or ())
        behind = rank - 1 - cast(int, ir.attribute(node, "axis", 1)) % max(rank, 1)
        places = [self._places.get(v) if v is not None else None for v in node.inputs]
        known = [place for place in places if place is not None]
        if not known or any(p.factor is not None or p.behind != known[0].behind for p in known):
            return False
        first = known[0]
        if behind == first.behind:
            return False
        for index, place in enumerate(places):
            if place is not None:
                first.stream.join(place.stream)
            elif ir.constant(node.inputs[index]) is None:
                return False
            else:
                stream = first.stream.root
                stream.edits.append(Edit(node, index, -1 - first.behind))
                self._own(stream, stream.edits[-1])
        return self._keep(node, first)

    def _moved(self, node: ir.Node, place: Place) -> bool:
        """Operators that move vectors whole, or leave some out."""
        shape, result = self._shape(node.inputs[0]), self._shape(node.outputs[0])
        if shape is None or result is None:
            return False
        axis = len(shape) - 1 - place.behind
        if node.op_type == "Transpose":
            perm = cast("Sequence[int] | None", ir.attribute(node, "perm"))
            order = list(range(len(shape)))[::-1] if perm is None else list(perm)
            behind = len(shape) - 1 - order.index(axis)
        elif node.op_type in ("Reshape", "Flatten", "Squeeze", "Unsqueeze"):
            found = _reshaped(shape, result, axis)
            if found is None:
                return False
            behind = found
        elif node.op_type in ("Split", "Gather"):
            along = cast(int, ir.attribute(node, "axis", 0)) % len(shape)
            if along == axis or (node.op_type == "Gather" and along > axis):
                return False
            behind = place.behind
        elif node.op_type == "Slice":
            axes = ir.array(node.inputs[3]) if len(node.inputs) > 3 else None
            if axes is None or axis in [int(a) % len(shape) for a in axes.reshape(-1)]:
                return False
            behind = place.behind
        else:
            return False
        for value in node.outputs:
            self._places[value] = Place(place.stream, behind, place.factor)
        return True


def _reshaped(shape: Sequence[object], result: Sequence[object], axis: int) -> int | None:
    """How many axes stand behind the channels after a reshape that leaves their axis whole."""
    behind = [size for size in shape[axis + 1 :] if isinstance(size, int)]
    if len(behind) < len(shape) - axis - 1:
        return None
    after, inner = 1, math.prod(behind)
    for place in range(len(result) - 1, -1, -1):
        size = result[place]
        if not isinstance(size, int) or after > inner:
            return None
        if after == inner and size == shape[axis]:
            return len(result) - 1 - place
        after *= size
    return None


def _inverse(factor: Floats | None, array: ir.Array, behind: int) -> Floats | None:
    """What a constant is multiplied by that is added behind a factor per channel.

    None without a factor, and where the constant reaches a channel whose factor is next to zero.
    """
    if factor is None:
        return None
    whole = array.reshape((1,) * max(0, behind + 1 - array.ndim) + array.shape)
    channels = np.moveaxis(whole, whole.ndim - 1 - behind, -1) != 0
    large = np.abs(factor) > _SMALLEST * np.abs(factor).max()
    if np.any(channels & ~large):
        return None
    return np.divide(1.0, factor, out=np.zeros_like(factor), where=large)
