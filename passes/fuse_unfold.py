"""Fuse unfolded windows and the 1x1 convolution over them into a convolution of the windows.

Why: exporters write torch's `unfold` as a Pad, Gathers and Reshapes, each of which copies the
tensor as often as a window has elements; a convolution looks at windows by itself.
Numerics: rounding.
Needs: static shapes, constant weights; windows that are told by following where each element goes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from graphopt import ir
from graphopt.execute import evaluate
from graphopt.passes.fuse_pad import pad_amounts
from graphopt.rewriting import Op, require_unneeded, rewrite

Places = npt.NDArray[np.int64]

_MOVES = ("Reshape", "Squeeze", "Unsqueeze", "Flatten", "Transpose", "Gather", "Slice", "Pad")
_LONGEST = 12
_MOST_ELEMENTS = 1 << 20
_SPARSEST = 2
"""A window may be so many times as large as what is taken of it."""


@rewrite.on("Conv", benefit=5)
def fuse_unfold(op: Op, node: ir.Node) -> ir.Value | None:
    """A 1x1 convolution over all elements of windows."""
    weight = op.const(node.inputs[1])
    if weight is None or weight.ndim != 4 or weight.shape[2:] != (1, 1):
        return None
    plain = op.attr(node, "group", 1) == 1 and not any(op.attr(node, "pads", [0]))
    if not plain or "auto_pad" in node.attributes or op.opset < 11:
        return None
    moves: list[ir.Node] = []
    value = node.inputs[0]
    while value is not None and len(moves) < _LONGEST:
        move = value.producer()
        if move is None or move.op_type not in _MOVES or move.domain or op.uses(value) != 1:
            return None
        moves.insert(0, move)
        value = move.inputs[0]
        kinds = {m.op_type for m in moves}
        window = _window(op, value, moves) if "Gather" in kinds and "Pad" in kinds else None
        if value is not None and window is not None:
            require_unneeded(moves, node)
            return _convolved(op, node, value, weight, window)
    return None


@dataclass(frozen=True)
class _Window:
    """Offsets of the elements of a window, and what is padded before and behind each axis."""

    offsets: tuple[tuple[int, int], ...]
    size: tuple[int, int]
    pads: tuple[int, int, int, int]


def _convolved(
    op: Op, node: ir.Node, x: ir.Value, weight: ir.Array, window: _Window
) -> ir.Value | None:
    count = len(window.offsets)
    taken = weight.reshape(len(weight), -1, count)
    made = np.zeros((len(weight), taken.shape[1], *window.size), weight.dtype)
    for index, (down, right) in enumerate(window.offsets):
        made[:, :, down + window.pads[0], right + window.pads[1]] = taken[:, :, index]
    attributes = {k: v for k, v in node.attributes.items() if k not in ("pads", "kernel_shape")}
    more = {"pads": list(window.pads), "kernel_shape": list(window.size)}
    return op.build("Conv", [x, op.initializer(made, "w"), *node.inputs[2:]], attributes | more)[0]


def _window(op: Op, x: ir.Value | None, moves: list[ir.Node]) -> _Window | None:
    """The window whose elements moves make channels of an image x; None where they do not."""
    shape = None if x is None else op.shape(x)
    if shape is None or len(shape) != 4:
        return None
    sizes = [size for size in shape if isinstance(size, int) and size > 0]
    if len(sizes) != 4 or np.prod(sizes) > _MOST_ELEMENTS:
        return None
    images = np.arange(1, np.prod(sizes) + 1, dtype=np.int64).reshape(sizes)
    places = _followed(op, images, moves)
    if places is None or places.ndim != 4 or places.shape[1] % sizes[1]:
        return None
    batch, channels, height, width = sizes
    count = places.shape[1] // channels
    if len(places) != batch or not 2 <= count <= height * width:
        return None
    apart = places.reshape(batch, channels, count, *places.shape[2:])
    offsets: list[tuple[int, int]] = []
    for index in range(count):
        found = _offset(images, apart[:, :, index])
        if found is None:
            return None
        offsets.append(found)
    if len(set(offsets)) != count:
        return None
    ends = [(min(o), max(o)) for o in zip(*offsets, strict=True)]
    size = (ends[0][1] - ends[0][0] + 1, ends[1][1] - ends[1][0] + 1)
    before = (-ends[0][0], -ends[1][0])
    behind = tuple(
        after - 1 + side - own - first
        for after, side, own, first in zip(
            places.shape[2:], size, (height, width), before, strict=True
        )
    )
    pads = (*before, behind[0], behind[1])
    fits = min(pads) >= 0 and size[0] * size[1] <= _SPARSEST * count
    return _Window(tuple(offsets), size, pads) if fits else None


def _followed(op: Op, places: Places, moves: list[ir.Node]) -> Places | None:
    """Where each element of a tensor went, 0 for padding."""
    moved: ir.Array = places
    for move in moves:
        inputs: list[ir.Array | None] = [moved, *(op.const(v) for v in move.inputs[1:])]
        if any(known is None and v for known, v in zip(inputs[1:], move.inputs[1:], strict=True)):
            return None
        if move.op_type == "Pad":
            pads = pad_amounts(op, move, moved.ndim)
            fill = move.inputs[2] if len(move.inputs) > 2 else None
            zero = fill is None or op.scalar(fill) == 0
            if pads is None or not zero or op.attr(move, "mode", "constant") != "constant":
                return None
            if min(pads) < 0 or sum(pads) * moved.size > _MOST_ELEMENTS:
                return None
            amounts = list(zip(pads[: moved.ndim], pads[moved.ndim :], strict=True))
            moved = np.pad(moved, amounts)
            continue
        result = evaluate(move, inputs, op.opset)
        if result is None or result[0].size > _MOST_ELEMENTS:
            return None
        moved = result[0]
    return moved.astype(np.int64)


def _offset(images: Places, places: Places) -> tuple[int, int] | None:
    """(down, right) where places are those of images moved so far, 0 outside; None if not."""
    height, width = places.shape[2:]
    filled = np.argwhere(places[0, 0] > 0)
    if not len(filled):
        return None
    row, column = filled[0].tolist()
    source = divmod(int(places[0, 0, row, column]) - 1, images.shape[3])
    down, right = source[0] - row, source[1] - column
    if source[0] >= images.shape[2]:
        return None
    wide = np.zeros((*images.shape[:2], height, width), np.int64)
    top, left = max(0, -down), max(0, -right)
    part = images[:, :, max(0, down) :, max(0, right) :][:, :, : height - top, : width - left]
    wide[:, :, top : top + part.shape[2], left : left + part.shape[3]] = part
    return (down, right) if np.array_equal(wide, places) else None
