"""Attributes and constants that name sizes, rewritten for what is left of the axes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from graphopt import ir
from graphopt.pruner.atoms import Axis
from graphopt.pruner.rules_control import packed_parts
from graphopt.pruner.rules_linear import is_depthwise, optional
from graphopt.pruner.rules_move import slices
from graphopt.pruner.tracing import Axes, Trace, Unknown

__all__ = ["Kept", "adjust", "constant", "free"]

Adjustment = Callable[["Kept", ir.Node], None]


class Kept:
    """Which positions of each axis are left."""

    def __init__(self, trace: Trace, gone: npt.NDArray[np.bool_]) -> None:
        self.trace = trace
        self.gone = gone
        """Per atom whether it is pruned."""

    def axes(self, value: ir.Value | None) -> Axes:
        """The axes of a value before pruning; none of an absent one."""
        return [] if value is None else self.trace.axes[value]

    def mask(self, axis: Axis) -> npt.NDArray[np.bool_]:
        """Per position whether it stays."""
        return ~self.gone[axis]

    def positions(self, axis: Axis) -> Axis:
        """The positions that stay."""
        return np.flatnonzero(self.mask(axis))

    def count(self, axis: Axis) -> int:
        """How many positions stay."""
        return int(np.count_nonzero(self.mask(axis)))

    def changed(self, value: ir.Value | None, axis: int) -> bool:
        """Whether a value's axis loses anything."""
        return value is not None and bool(self.gone[self.trace.axes[value][axis]].any())

    def sizes(self, value: ir.Value) -> dict[int, int]:
        """The new sizes of the axes of a value that lose something."""
        axes = self.trace.axes[value]
        return {i: self.count(axis) for i, axis in enumerate(axes) if self.gone[axis].any()}

    def listed(self, node: ir.Node, index: int) -> dict[int, int]:
        """What to put into an input that lists the result's sizes.

        Where it is computed from a shape that loses something, that is every size that is known:
        the list may have been right only as long as two tensors were of one size.
        """
        changes, value = self.sizes(node.outputs[0]), optional(node, index)
        if value is None or ir.array(value) is not None or not self._shrinks(value):
            return changes
        axes = self.trace.axes[node.outputs[0]]
        return {i: self.count(axis) for i, axis in enumerate(axes) if axis.size}

    def _shrinks(self, value: ir.Value) -> bool:
        """Whether a list is computed from the shape of something that loses channels."""
        stack, seen = [value], {value}
        while stack:
            node = stack.pop().producer()
            if node is None:
                continue
            if node.op_type in ("Shape", "Size"):
                if any(self.gone[axis].any() for axis in self.axes(node.inputs[0])):
                    return True
                continue
            new = {v for v in node.inputs if v is not None} - seen
            seen |= new
            stack += new
        return False

    def integers(self, node: ir.Node, index: int, name: str, changes: Mapping[int, int]) -> None:
        """Put numbers into a list that is an attribute, a constant input or a computed one."""
        if not changes:
            return
        value = optional(node, index)
        attr = node.attributes.get(name)
        if value is None and attr is not None:
            new = list(attr.as_ints())
            for position, number in changes.items():
                new[position] = number
            node.attributes[name] = ir.Attr(name, ir.AttributeType.INTS, tuple(new))
            return
        if value is None:
            return
        array = ir.array(value)
        if array is not None:
            array = array.copy()
            for position, number in changes.items():
                array.flat[position] = number
            node.replace_input_with(index, constant(node, array, name))
            return
        self._patched(node, index, name, changes)

    def _patched(self, node: ir.Node, index: int, name: str, changes: Mapping[int, int]) -> None:
        """Replace some elements of a list that is computed at run time."""
        value = node.inputs[index]
        assert value is not None and node.graph is not None
        shape = self.trace.shapes.shape(value)
        length = shape[0] if shape else max(changes) + 1
        size = length if isinstance(length, int) else max(changes) + 1
        dtype = value.dtype or ir.DataType.INT64
        numbers = np.zeros(size, dtype.numpy())
        mask = np.zeros(size, np.bool_)
        for position, number in changes.items():
            mask[position], numbers[position] = True, number
        operands = (
            constant(node, mask, f"{name}_mask"),
            constant(node, numbers, f"{name}_new"),
            value,
        )
        patch = ir.Node("", "Where", operands)
        patch.outputs[0].name = free(node.graph, f"{node.outputs[0].name}__{name}")
        patch.outputs[0].type = ir.TensorType(dtype)
        node.graph.insert_before(node, patch)
        node.replace_input_with(index, patch.outputs[0])

    def attribute(self, node: ir.Node, name: str, number: int) -> None:
        """Set an integer attribute."""
        node.attributes[name] = ir.Attr(name, ir.AttributeType.INT, number)


def constant(node: ir.Node, array: ir.Array, name: str) -> ir.Value:
    """A new initializer beside a node."""
    assert node.graph is not None
    title = free(node.graph, f"{node.outputs[0].name}__{name}")
    value = ir.Value(
        name=title,
        shape=ir.Shape(array.shape),
        type=ir.TensorType(ir.DataType.from_numpy(array.dtype)),
        const_value=ir.tensor(array, name=title),
    )
    node.graph.register_initializer(value)
    return value


def free(graph: ir.Graph, title: str) -> str:
    """A name that no value of the graph has, of an earlier round for one."""
    made = {value.name for node in graph for value in node.outputs}
    while title in made or title in graph.initializers:
        title += "_"
    return title


def _conv(kept: Kept, node: ir.Node) -> None:
    source = kept.axes(node.inputs[0])
    weights = kept.axes(node.inputs[3 if node.op_type == "QLinearConv" else 1])
    if len(source) < 2 or len(weights) < 2:
        return  # of unknown rank, so that nothing was pruned here
    group = int(str(ir.attribute(node, "group", 1)))
    inner = weights[0 if node.op_type == "ConvTranspose" else 1]
    per_group = weights[1]
    if is_depthwise(group, len(source[1]), len(per_group)) and inner.size:
        kept.attribute(node, "group", kept.count(source[1]))


def _reshape(kept: Kept, node: ir.Node) -> None:
    target = ir.array(node.inputs[1]) if len(node.inputs) > 1 else None
    changes = kept.listed(node, 1)
    if target is not None:
        allow = bool(ir.attribute(node, "allowzero", 0))
        numbers = target.tolist()
        changes = {i: n for i, n in changes.items() if numbers[i] > 0 or (allow and not numbers[i])}
        shape = kept.axes(node.inputs[0])
        zeros = {  # a 0 copies the size of that axis, which may be another one by now
            i: kept.count(kept.axes(node.outputs[0])[i])
            for i, n in enumerate(numbers)
            if n == 0 and not allow and i < len(shape) and kept.changed(node.inputs[0], i)
        }
        changes |= zeros
    kept.integers(node, 1, "shape", changes)


def _split(kept: Kept, node: ir.Node) -> None:
    axis = int(str(ir.attribute(node, "axis", 0)))
    if not kept.changed(node.inputs[0], axis):
        return
    sizes = [kept.count(kept.axes(value)[axis]) for value in node.outputs]
    if optional(node, 1) is not None:
        kept.integers(node, 1, "split", dict(enumerate(sizes)))
    elif ir.opset(kept.trace.model.graph) < 13:
        node.attributes["split"] = ir.Attr("split", ir.AttributeType.INTS, tuple(sizes))
    else:
        node.attributes.pop("num_outputs", None)
        value = constant(node, np.asarray(sizes, np.int64), "split")
        node.resize_inputs(2)
        node.replace_input_with(1, value)


def _slice(kept: Kept, node: ir.Node) -> None:
    try:
        parts = slices(kept.trace, node)
    except Unknown:
        return  # computed bounds: such an axis stays as it is
    starts: dict[int, int] = {}
    ends: dict[int, int] = {}
    for index, (axis, start, end, _) in enumerate(parts):
        if not kept.changed(node.inputs[0], axis):
            continue
        mask = kept.mask(kept.axes(node.inputs[0])[axis])
        for bounds, bound in ((starts, start), (ends, end)):
            position = min(max(bound + len(mask) if bound < 0 else bound, 0), len(mask))
            bounds[index] = int(np.count_nonzero(mask[:position]))
    kept.integers(node, 1, "starts", starts)
    kept.integers(node, 2, "ends", ends)


def _gather(kept: Kept, node: ir.Node) -> None:
    axis = int(str(ir.attribute(node, "axis", 0)))
    indices = ir.array(node.inputs[1])
    if indices is None or indices.ndim != 1 or not kept.changed(node.inputs[0], axis):
        return
    mask = kept.mask(kept.axes(node.inputs[0])[axis])
    wanted = indices.astype(np.int64) % len(mask)
    renumbered = np.cumsum(mask) - 1
    left = renumbered[wanted[mask[wanted]]].astype(indices.dtype)
    node.replace_input_with(1, constant(node, left, "indices"))


def _pad(kept: Kept, node: ir.Node) -> None:
    x, y = kept.axes(node.inputs[0]), kept.axes(node.outputs[0])
    axes = ir.array(optional(node, 3))
    order = list(range(len(x))) if axes is None else [int(a) % len(x) for a in axes.tolist()]
    pads = ir.array(optional(node, 1))
    numbers: Sequence[int] = node.attributes["pads"].as_ints() if pads is None else pads.tolist()
    changes: dict[int, int] = {}
    for index, axis in enumerate(order):
        if not kept.gone[y[axis]].any() or len(y[axis]) == len(x[axis]):
            continue
        before = numbers[index]
        after = before + len(x[axis])
        changes[index] = kept.count(y[axis][:before])
        changes[index + len(order)] = kept.count(y[axis][after:])
    kept.integers(node, 1, "pads", changes)


def _expand(kept: Kept, node: ir.Node) -> None:
    kept.integers(node, 1, "shape", kept.listed(node, 1))


def _resize(kept: Kept, node: ir.Node) -> None:
    axes = ir.attribute(node, "axes")
    if optional(node, 3) is not None and axes is None:
        kept.integers(node, 3, "sizes", kept.listed(node, 3))


def _recurrent(kept: Kept, node: ir.Node) -> None:
    hidden = kept.axes(node.inputs[2])[2]
    if kept.gone[hidden].any():
        kept.attribute(node, "hidden_size", kept.count(hidden))


def _packed_attention(kept: Kept, node: ir.Node, heads: int) -> None:
    parts = packed_parts(node, kept.axes(node.inputs[1])[1])
    kept.attribute(node, "num_heads", kept.count(parts[0].reshape(heads, -1)[:, 0]))
    if "qkv_hidden_sizes" in node.attributes:
        sizes = tuple(kept.count(part) for part in parts)
        node.attributes["qkv_hidden_sizes"] = ir.Attr(
            "qkv_hidden_sizes", ir.AttributeType.INTS, sizes
        )


def _attention(kept: Kept, node: ir.Node) -> None:
    heads = ir.attribute(node, "num_heads")
    if node.op_type == "Attention" and node.domain == "com.microsoft" and isinstance(heads, int):
        if kept.changed(node.inputs[1], 1):
            _packed_attention(kept, node, heads)
        return
    for name, index in (("q_num_heads", 0), ("num_heads", 0), ("kv_num_heads", 1)):
        heads, value = ir.attribute(node, name), optional(node, index)
        if not isinstance(heads, int) or not heads or value is None:
            continue
        axes = kept.axes(value)
        if len(axes) == 3 and kept.gone[axes[2]].any():
            kept.attribute(node, name, kept.count(axes[2].reshape(heads, -1)[:, 0]))


_ADJUSTMENTS: dict[str, Adjustment] = {
    "Attention": _attention,
    "Conv": _conv,
    "ConvInteger": _conv,
    "ConvTranspose": _conv,
    "Expand": _expand,
    "FusedConv": _conv,
    "GRU": _recurrent,
    "Gather": _gather,
    "GroupQueryAttention": _attention,
    "LSTM": _recurrent,
    "MultiHeadAttention": _attention,
    "Pad": _pad,
    "QLinearConv": _conv,
    "RNN": _recurrent,
    "Reshape": _reshape,
    "Resize": _resize,
    "RotaryEmbedding": _attention,
    "Slice": _slice,
    "Split": _split,
}


def adjust(kept: Kept, node: ir.Node) -> None:
    """Rewrite what a node says of sizes that are other ones now."""
    change = _ADJUSTMENTS.get(node.op_type)
    if change is not None:
        change(kept, node)
