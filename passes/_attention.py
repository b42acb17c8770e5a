"""Reading attention: what the scores under a Softmax are, masks in the operator's form, heads.

The names of dimensions are those of ONNX's Attention: batch B, heads H, queries S, keys T, size of
a head D.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from graphopt import ir
from graphopt.dims import DimLike, is_cut_of
from graphopt.passes._layout import composed, is_identity, permutation
from graphopt.passes._ranges import limits
from graphopt.passes._rotary import expanded
from graphopt.passes._slices import split
from graphopt.rewriting import Op, Refuse

_DEPTH = 8
_LOW = -1e15
"""What a float32 score is added to without changing it: masked all the same."""
_FAINT = -1e4
"""What no score makes up for, so that only a row that is masked everywhere differs."""

Dims = tuple[DimLike, ...]


@dataclass(frozen=True)
class Scores:
    """scale * query @ keys, with masks added; `nodes` compute it."""

    query: ir.Value
    keys: ir.Value
    """With the axes of positions and sizes exchanged already."""
    scale: float = 1.0
    masks: tuple[ir.Value | tuple[ir.Value, bool, float], ...] = ()
    """Addends, or (condition, whether it selects what is masked, the score of what is)."""
    nodes: tuple[ir.Node, ...] = ()


def read_scores(op: Op, value: ir.Value | None, depth: int = _DEPTH) -> Scores | None:
    """What a value is as masked, scaled products, or None."""
    node = None if value is None else value.producer()
    if value is None or node is None or node.domain or not depth:
        return None
    if node.op_type == "MatMul":
        return _product(op, node)
    if node.op_type in ("Mul", "Div"):
        return _scaled(op, node, depth)
    if node.op_type == "Reshape":
        inner, source = read_scores(op, node.inputs[0], depth - 1), node.inputs[0]
        before, after = None if source is None else op.shape(source), op.shape(value)
        if inner is None or before is None or after is None or before[-2:] != after[-2:]:
            return None
        return replace(inner, nodes=(*inner.nodes, node))
    if node.op_type == "Add":
        for operand, mask in (node.inputs, node.inputs[::-1]):
            inner = read_scores(op, operand, depth - 1) if _same(op, operand, value) else None
            if inner is not None and mask is not None:
                return replace(inner, masks=(*inner.masks, mask), nodes=(*inner.nodes, node))
    if node.op_type == "Where":
        condition, *branches = node.inputs
        for index, operand in enumerate(branches):
            low = op.scalar(branches[1 - index])
            inner = read_scores(op, operand, depth - 1) if _same(op, operand, value) else None
            if inner is None or condition is None or low is None:
                continue
            masks = (*inner.masks, (condition, index == 1, float(low)))
            return replace(inner, masks=masks, nodes=(*inner.nodes, node))
    return None


def _same(op: Op, operand: ir.Value | None, value: ir.Value) -> bool:
    """Whether an operand has the shape of a result, the axis of keys apart.

    Along that one a mask cannot widen the scores: the product with the values would fail.
    """
    before = None if operand is None else op.shape(operand)
    after = op.shape(value)
    if before is None or after is None:
        return False
    return len(before) == len(after) and before[:-1] == after[:-1]


def _product(op: Op, node: ir.Node) -> Scores | None:
    query, keys = node.inputs
    if query is None or keys is None or ir.constant(query) is not None:
        return None
    query, first = _unscaled(op, query)
    keys, second = _unscaled(op, keys)
    return Scores(query, keys, first * second, nodes=(node,))


def _scaled(op: Op, node: ir.Node, depth: int) -> Scores | None:
    for operand, other in (node.inputs, node.inputs[::-1])[: 1 if node.op_type == "Div" else 2]:
        number = op.scalar(other)
        if not number or not _same(op, operand, node.outputs[0]):
            continue
        inner = read_scores(op, operand, depth - 1)
        if inner is None or inner.masks:
            return None
        scale = inner.scale * (number if node.op_type == "Mul" else 1 / number)
        return replace(inner, scale=scale, nodes=(*inner.nodes, node))
    return None


def _unscaled(op: Op, value: ir.Value) -> tuple[ir.Value, float]:
    """A value without the numbers that it is multiplied by, and their product."""
    scale = 1.0
    while (node := value.producer()) is not None and not node.domain:
        pairs = (node.inputs, node.inputs[::-1])
        if node.op_type not in ("Mul", "Div"):
            break
        source = None
        for operand, other in pairs[: 1 if node.op_type == "Div" else 2]:
            number = op.scalar(other)
            if number and operand is not None and _same(op, operand, value):
                source, scale = operand, scale * (number if node.op_type == "Mul" else 1 / number)
                break
        if source is None:
            break
        value = source
    return value, scale


def exchanged(op: Op, keys: ir.Value) -> tuple[ir.Value, float]:
    """The keys with their last two axes exchanged, and a number that they are multiplied by."""
    rank, node = op.rank(keys) or 4, keys.producer()
    perm = [*range(rank - 2), rank - 1, rank - 2]
    if node is not None and node.op_type == "Transpose" and not node.domain:
        before, source = permutation(op, node), node.inputs[0]
        if before is not None and source is not None:
            after = composed(before, perm)
            if is_identity(after):
                return _unscaled(op, source)
            return op.Transpose(source, perm=after), 1.0
    return op.Transpose(keys, perm=perm), 1.0


def unmerged(op: Op, value: ir.Value) -> ir.Value | None:
    """[B, H, S, D] where a value is that with its first two axes merged."""
    node, shape = value.producer(), op.shape(value)
    source = None if node is None or node.op_type != "Reshape" else node.inputs[0]
    before = None if source is None else op.shape(source)
    if before is None or shape is None or len(before) != 4 or len(shape) != 3:
        return None
    return source if before[-2:] == shape[-2:] else None


def mask_of(op: Op, scores: Scores, dims: Dims, dtype: ir.DataType) -> ir.Value | None:
    """The sum of all masks, of shape [..., S, T] as ONNX Runtime wants it, or None for none.

    Raises:
        Refuse: a mask that is no sum, or whose shape is not proven to fit.
    """
    total: ir.Value | None = None
    alone = len(scores.masks) == 1
    if sum(isinstance(mask, tuple) for mask in scores.masks) > 1:
        raise Refuse("a row that is masked everywhere would differ")
    for mask in scores.masks:
        addend = (
            _raised(op, mask) if isinstance(mask, ir.Value) else _addend(op, mask, dtype, alone)
        )
        if op.dtype(addend) != dtype:
            raise Refuse("the mask is of another type")
        total = addend if total is None else op.Add(total, addend)
    return None if total is None else _spread(op, total, dims, scores)


def _bottom(dtype: ir.DataType | None) -> float:
    """What still masks: a row of nothing but the lowest number is 0 to ONNX Runtime, no mean."""
    return -6e4 if dtype == ir.DataType.FLOAT16 else -1e37


def _raised(op: Op, mask: ir.Value) -> ir.Value:
    """An added mask, kept above the lowest number."""
    bottom, known = _bottom(op.dtype(mask)), op.const(mask)
    if limits(op, mask)[0] >= bottom:
        return mask
    if known is not None:
        raised = np.maximum(known.astype(np.float64), bottom).astype(known.dtype)
        return op.initializer(raised, "mask")
    node = mask.producer()
    chosen = node is not None and node.op_type == "Where" and not node.domain
    numbers = [op.scalar(value) for value in node.inputs[1:]] if node is not None and chosen else []
    if node is not None and numbers and None not in numbers:
        like = np.dtype((op.dtype(mask) or ir.DataType.FLOAT).numpy())
        kept = [op.initializer(np.asarray(max(n, bottom), like), "mask") for n in numbers]
        return op.Where(node.inputs[0], *kept)
    return op.Max(mask, bottom)


def rows_left(op: Op, scores: Scores, mask: ir.Value | None, dtype: ir.DataType) -> ir.Value | None:
    """Whether the one mask of scores leaves rows something, [..., S, 1]; None where it always does.

    `mask` is what `mask_of` has made of it.

    Raises:
        Refuse: several masks, or one that would not make a row NaN.
    """
    if mask is None:
        return None
    first, dims = scores.masks[0], op.shape(mask)
    if len(scores.masks) > 1 or dims is None or (isinstance(first, tuple) and first[2] != -np.inf):
        raise Refuse("rows that are masked everywhere are not told from others")
    known = op.const(first) if isinstance(first, ir.Value) else None
    if known is not None:
        if bool(np.all(known.max(axis=-1) > -np.inf)):
            return None
        raise Refuse("a constant mask leaves a row nothing")
    lowest = float(np.finfo(np.float32 if dtype != ir.DataType.FLOAT16 else np.float16).min)
    made = mask.producer()
    if isinstance(first, tuple) or (made is not None and made.op_type == "Where"):
        first, lowest = mask, _bottom(dtype) / 2
    return op.GreaterOrEqual(op.ReduceMax(first, [-1], keepdims=1), lowest)


def _addend(
    op: Op, mask: tuple[ir.Value, bool, float], dtype: ir.DataType, alone: bool
) -> ir.Value:
    condition, selects, low = mask
    known = op.const(condition)
    some = known is not None and _leaves_some(known, selects)
    if low > _FAINT or not (some or low <= _LOW or (alone and dtype != ir.DataType.FLOAT16)):
        raise Refuse("a row that is masked everywhere would differ")
    zero = op.initializer(np.asarray(0, dtype.numpy()), "zero")
    number = _bottom(dtype) if alone else max(low, _bottom(dtype))
    bottom = op.initializer(np.asarray(number, dtype.numpy()), "masked")
    return op.Where(condition, *((bottom, zero) if selects else (zero, bottom)))


def _leaves_some(condition: ir.Array, selects: bool) -> bool:
    kept = ~condition.astype(bool) if selects else condition.astype(bool)
    return bool(kept.ndim and np.all(kept.any(axis=-1)))


def _spread(op: Op, mask: ir.Value, dims: Dims, scores: Scores) -> ir.Value:
    """The mask, expanded along S and T where it has size 1."""
    shape = op.shape(mask)
    if shape is None or len(shape) > len(dims):
        raise Refuse("the shape of the mask is unknown")
    leading = dims[len(dims) - len(shape) : -2]
    if any(have not in (1, want) for have, want in zip(shape[:-2], leading, strict=False)):
        raise Refuse("the mask is not proven to broadcast")
    wanted = dims[-2:]
    tail: Dims = (1,) * (2 - len(shape)) + shape[-2:]
    tail = tuple(w if is_cut_of(t, w) else t for t, w in zip(tail, wanted, strict=True))
    if tail[0] not in (1, wanted[0]):
        raise Refuse("the mask is not proven to broadcast")
    if len(shape) >= 2 and tail == wanted:
        return mask
    sizes: list[DimLike] = [
        1 if have == want else want for have, want in zip(tail, wanted, strict=True)
    ]
    sizes = [*[1] * (len(shape) - 2), *sizes]
    return expanded(op, mask, tuple(sizes), [scores.query, scores.keys])


def repeated(op: Op, value: ir.Value | None) -> tuple[ir.Value, int] | None:
    """(heads, n) where a value repeats each head n > 1 times, next to each other."""
    node = None if value is None else value.producer()
    if value is None or node is None or node.op_type != "Reshape" or node.domain:
        return None
    repeat = None if node.inputs[0] is None else node.inputs[0].producer()
    if repeat is None or repeat.domain or repeat.op_type not in ("Expand", "Tile", "Concat"):
        return None
    widened = repeat.inputs[0]
    if repeat.op_type == "Concat" and any(v is not widened for v in repeat.inputs):
        return None
    wide, after, final = (
        None if widened is None else op.shape(widened),
        op.shape(repeat.outputs[0]),
        op.shape(value),
    )
    if widened is None or wide is None or after is None or final is None:
        return None
    if len(wide) != 5 or len(after) != 5 or len(final) != 4 or wide[2] != 1:
        return None
    times, heads = after[2], wide[1]
    kept = (*wide[:2], *wide[3:]) == (*after[:2], *after[3:])
    if not kept or not isinstance(times, int) or not isinstance(heads, int) or times < 2:
        return None
    if final != (wide[0], heads * times, wide[3], wide[4]):
        return None
    view = widened.producer()
    if view is None or view.domain or view.op_type not in ("Unsqueeze", "Reshape"):
        return None
    source = view.inputs[0]
    if source is None or op.shape(source) != (wide[0], heads, wide[3], wide[4]):
        return None
    return source, times


@dataclass
class Flattener:
    """Heads [B, H, S, D] as [B, S, H * D], where that is what they were cut from."""

    op: Op
    _parts: dict[ir.Value, Sequence[ir.Value]] = field(
        default_factory=dict[ir.Value, Sequence[ir.Value]]
    )

    def flat(self, value: ir.Value | None) -> ir.Value | None:
        """The tensor, or None."""
        op = self.op
        shape = None if value is None else op.shape(value)
        node = None if value is None else value.producer()
        if value is None or shape is None or len(shape) != 4 or node is None:
            return None
        if node.domain or not isinstance(shape[1], int) or not isinstance(shape[3], int):
            return None
        if node.op_type == "Transpose":
            return self._merged(node, shape)
        if node.op_type == "Split":
            return self._part(node, value)
        if node.op_type in ("Squeeze", "Gather"):
            return self._packed(node, shape)
        if node.op_type == "RotaryEmbedding" and op.uses(value) == 1:
            source = self.flat(node.inputs[0])
            if source is None:
                return None
            attributes = {**node.attributes, "num_heads": shape[1]}
            return op.build("RotaryEmbedding", [source, *node.inputs[1:]], attributes)[0]
        return None

    def _merged(self, node: ir.Node, shape: Dims) -> ir.Value | None:
        """[B, S, H, D] with its last axes merged: what it was cut from, or a view of it."""
        op, value = self.op, node.inputs[0]
        if value is None or permutation(op, node) != [0, 2, 1, 3]:
            return None
        width = shape[1] * shape[3]
        view = value.producer()
        if view is not None and view.op_type == "Reshape" and not view.domain:
            source = view.inputs[0]
            if source is not None and op.shape(source) == (shape[0], shape[2], width):
                return source
        return op.Reshape(value, [0, 0, int(str(width))])

    def _part(self, node: ir.Node, value: ir.Value) -> ir.Value | None:
        """A part of heads that were split along their axis."""
        op, source = self.op, node.inputs[0]
        if source is None or op.attr(node, "axis", 0) not in (1, -3):
            return None
        if source not in self._parts:
            shapes = [op.shape(output) for output in node.outputs]
            whole = self.flat(source)
            widths = [s[1] * s[3] for s in shapes if s is not None]
            if whole is None or len(widths) != len(shapes):
                return None
            if not all(isinstance(width, int) for width in widths):
                return None
            self._parts[source] = split(op, whole, 2, [int(str(width)) for width in widths])
        return self._parts[source][list(node.outputs).index(value)]

    def _packed(self, node: ir.Node, shape: Dims) -> ir.Value | None:
        """One of n tensors of heads [n, B, H, S, D] that one product has made."""
        op, value = self.op, node.inputs[0]
        index = 0
        if node.op_type == "Gather":
            index = op.scalar(node.inputs[1])
            if op.attr(node, "axis", 0) != 0 or op.rank(node.inputs[1] or node.outputs[0]) != 0:
                return None
        elif value is not None and (cut := value.producer()) is not None:
            if cut.op_type != "Split" or cut.domain or op.attr(cut, "axis", 0) != 0:
                return None
            index, value = list(cut.outputs).index(value), cut.inputs[0]
        move = None if value is None else value.producer()
        if value is None or move is None or move.op_type != "Transpose" or move.domain:
            return None
        view = None if move.inputs[0] is None else move.inputs[0].producer()
        source = view.inputs[0] if view is not None and view.op_type == "Reshape" else None
        stack = op.shape(value)
        if source is None or stack is None or permutation(op, move) != [2, 0, 3, 1, 4]:
            return None
        count, width = stack[0], shape[1] * shape[3]
        if not isinstance(count, int) or not isinstance(width, int) or stack[1:] != shape:
            return None
        if op.shape(source) != (shape[0], shape[2], count * width):
            return None
        if source not in self._parts:
            self._parts[source] = split(op, source, 2, [width] * count)
        return self._parts[source][int(index)]
