"""Fuse strided slices that are put side by side into SpaceToDepth, and pixel shuffles by hand.

Why: the first layer of some detectors picks every second pixel four times and concatenates; one
operator does it, and the order of its channels goes into the weights of the Conv after it. Two
Reshapes with a Transpose between that deal channels out to blocks are one copy, not three.
Numerics: rounding, as the Conv sums in another order; exact for pixel shuffles.
Needs: a Conv with constant weights after the Concat, and nothing else there; known channels.
"""

from __future__ import annotations

import numpy as np

from graphopt import ir
from graphopt.passes._layout import permutation
from graphopt.passes._linear import floats
from graphopt.passes._slices import Span, spans
from graphopt.rewriting import Op, rewrite

_DEALT = {"CRD": ([0, 1, 4, 2, 5, 3], 2), "DCR": ([0, 3, 4, 1, 5, 2], 1)}
"""How axes are permuted, and which of them is a block's, by DepthToSpace's mode."""


@rewrite.on("Conv", benefit=5)
def fuse_space_to_depth(op: Op, node: ir.Node) -> ir.Value | None:
    """Slices with step b at all b x b offsets, concatenated along the channels, before a Conv."""
    value = node.inputs[0]
    concat = None if value is None else value.producer()
    if value is None or concat is None or concat.op_type != "Concat" or concat.domain:
        return None
    weights = ir.array(node.inputs[1])
    if op.uses(value) != 1 or op.attr(concat, "axis") != 1 or op.attr(node, "group", 1) != 1:
        return None
    found = _offsets(op, concat)
    if found is None or weights is None or floats(op, node.inputs[1]) is None:
        return None
    source, block, offsets = found
    order = _order(op, source, block, offsets)
    if order is None:
        return None
    moved = op.initializer(np.ascontiguousarray(weights[:, order]), "weight")
    packed = op.SpaceToDepth(source, blocksize=block)
    return op.build("Conv", [packed, moved, *node.inputs[2:]], node.attributes)[0]


@rewrite.on("Concat", benefit=-1)
def pack_slices(op: Op, node: ir.Node) -> ir.Value | None:
    """The same where no Conv takes up the order of the channels: a Gather does."""
    users = node.outputs[0].consumers()
    found = _offsets(op, node) if op.attr(node, "axis") == 1 else None
    if found is None or (len(users) == 1 and users[0].op_type == "Conv"):
        return None
    source, block, offsets = found
    order = _order(op, source, block, offsets)
    if order is None:
        return None
    packed = op.SpaceToDepth(source, blocksize=block)
    if order == sorted(order):
        return packed
    back = np.argsort(np.asarray(order, np.int64)).astype(np.int64)
    return op.Gather(packed, op.initializer(back), axis=1)


def _order(
    op: Op, source: ir.Value, block: int, offsets: list[tuple[int, int]]
) -> list[int] | None:
    """Where in the Concat each channel of SpaceToDepth is; None where sizes do not fit.

    SpaceToDepth's channel (i * block + j) * channels + c is what the Concat has at offset (i, j).
    """
    shape = op.shape(source)
    if shape is None or not isinstance(shape[1], int) or not _divisible(shape[2:], block):
        return None
    channels = shape[1]
    return [
        offsets.index((i, j)) * channels + c
        for i in range(block)
        for j in range(block)
        for c in range(channels)
    ]


@rewrite.on("Reshape", benefit=3)
def fuse_depth_to_space(op: Op, node: ir.Node) -> ir.Value | None:
    """Channels dealt out to blocks, in either order, or blocks gathered into channels."""
    move = None if node.inputs[0] is None else node.inputs[0].producer()
    view = None if move is None or move.inputs[0] is None else move.inputs[0].producer()
    if move is None or view is None or (move.op_type, view.op_type) != ("Transpose", "Reshape"):
        return None
    x, perm = view.inputs[0], permutation(op, move)
    shapes = [None if v is None else op.shape(v) for v in (x, view.outputs[0], node.outputs[0])]
    before, parts, after = shapes
    if x is None or before is None or parts is None or after is None or move.domain:
        return None
    if len(before) != 4 or len(parts) != 6 or len(after) != 4 or parts[0] != before[0]:
        return None
    for mode, (dealt, place) in _DEALT.items():
        block = parts[place]
        if perm != dealt or not isinstance(block, int) or not isinstance(before[1], int):
            continue
        depth = before[1] // (block * block)
        inner = (depth, block, block) if mode == "CRD" else (block, block, depth)
        wanted = (before[0], depth, before[2] * block, before[3] * block)
        if parts[1:] == (*inner, *before[2:]) and after == wanted:
            if op.opset >= 11:
                return op.DepthToSpace(x, blocksize=block, mode=mode)
            return op.DepthToSpace(x, blocksize=block) if mode == "DCR" else None
    if perm == [0, 3, 5, 1, 2, 4] and isinstance(parts[3], int):
        block = parts[3]
        gathered = (before[0], before[1] * block * block, parts[2], parts[4])
        whole = (before[0], before[1], parts[2] * block, parts[4] * block)
        if parts == (*before[:2], parts[2], block, parts[4], block) and whole == before:
            return op.SpaceToDepth(x, blocksize=block) if after == gathered else None
    return None


def _divisible(sizes: tuple[object, ...], block: int) -> bool:
    return len(sizes) == 2 and all(isinstance(s, int) and s % block == 0 for s in sizes)


def _start(span: Span, block: int) -> int | None:
    """Where a span that takes every block-th element to the end starts, or None."""
    whole = span.end >= 2**31 - 1 and span.step == block and 0 <= span.start < block
    return span.start if whole else None


def _offsets(op: Op, concat: ir.Node) -> tuple[ir.Value, int, list[tuple[int, int]]] | None:
    """(x, block, (row, column) of each operand) where all are strided slices of x."""
    block = {4: 2, 9: 3, 16: 4}.get(len(concat.inputs))
    offsets: list[tuple[int, int]] = []
    source: ir.Value | None = None
    for value in concat.inputs:
        part = None if value is None else value.producer()
        taken = None if part is None else spans(op, part)
        if block is None or part is None or taken is None or set(taken) != {2, 3}:
            return None
        if source is not None and part.inputs[0] is not source:
            return None
        source = part.inputs[0]
        starts = [_start(taken[axis], block) for axis in (2, 3)]
        if None in starts:
            return None
        offsets.append((starts[0] or 0, starts[1] or 0))
    if block is None or source is None or len(set(offsets)) != block * block:
        return None
    return source, block, offsets
