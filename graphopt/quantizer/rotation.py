"""Orthogonal matrices folded into the weights around a stream, so that no channel stands out.

Source: Ashkboos et al., "QuaRot: Outlier-Free 4-Bit Inference in Rotated LLMs", 2024. A vector
with one large channel becomes one whose channels are about alike, and eight or four bits hold all
of them. Normalizations look at lengths, which a rotation keeps; their factors per channel move
into what reads them. LayerNormalization takes the mean of the channels away too: there the matrix
keeps the vector of ones, and with it every mean, so that means need not be folded into the
writers as in Ashkboos et al., "SliceGPT", 2024.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import numpy.typing as npt

from graphopt import ir
from graphopt.context import Context
from graphopt.driver import remove, replace_value
from graphopt.quantizer.constants import replace_constant
from graphopt.quantizer.streams import Edit, Stream, streams
from graphopt.taps import groups, tap

__all__ = ["rotate", "rotation"]

Floats = npt.NDArray[np.float64]

_NARROWEST = 16  # channels: fewer have nothing to spread an outlier over
_WIDEST = 1 << 14  # channels: the matrix is their square
_EVEN = 4.0  # times the average, of what the largest channel has: nothing stands out
_LESS = 0.7  # of the largest channel, what a rotation has to leave at most
_LOOKED = 4  # rows for each channel, that say how even channels are
_SAMPLES = 4
_PART = 1 << 22  # elements that are turned at a time


def rotation(width: int, *, centred: bool, seed: int = 0) -> Floats:
    """A random orthogonal matrix [width, width] that spreads each channel over all others.

    A Hadamard matrix of order 4**k with equal sums of rows, as large as divides the width, times
    a random orthogonal one for what is left, its rows in random order. Where the mean of the
    channels has to stay (`centred`), a vector of ones is kept; else signs of rows are random too.
    """
    rng = np.random.default_rng([seed, width])
    regular: Floats = np.ones((1, 1))
    rest = width
    while rest % 4 == 0 and rest != 8:  # of two channels nothing but their mean would turn
        regular = np.kron(regular, np.full((4, 4), 0.5) - np.eye(4)).astype(np.float64)
        rest //= 4
    order = rng.permutation(width)
    matrix: Floats = np.kron(regular, _keeping_ones(rest, rng)).astype(np.float64)[order]
    if not centred:
        matrix *= rng.choice([-1.0, 1.0], (width, 1))
    return matrix


def _keeping_ones(size: int, rng: np.random.Generator) -> Floats:
    """A random orthogonal matrix that maps a vector of ones to itself."""
    columns = np.concatenate([np.ones((size, 1)), rng.standard_normal((size, size - 1))], axis=1)
    base = np.linalg.qr(columns)[0]
    turned = np.eye(size)
    turned[1:, 1:] = np.linalg.qr(rng.standard_normal((size - 1, size - 1)))[0]
    kept: Floats = base @ turned @ base.T
    return kept


def rotate(context: Context, *, seed: int = 0, always: bool = False) -> int:
    """Turn the streams of the main graph whose channels are uneven; returns how many.

    Uneven is what is written, or multiplied with it, by the weights, or what samples show where
    the context has some; `always` turns all that can turn.

    The model computes the same, up to rounding, with no more operators: multiplications by factors
    per channel that move into weights go. Streams that stay are refused with the reason.
    """
    done = 0
    for stream in streams(context):
        fits = _NARROWEST <= stream.width <= _WIDEST
        reason = stream.reason or ("" if fits else f"it has {stream.width} channels")
        if not reason:
            matrix = rotation(stream.width, centred=stream.centred, seed=seed)
            if always or _worth(context, stream, matrix):
                _turn(context, stream, matrix)
                done += 1
                continue
            reason = "no channel stands out"
        if stream.adds:
            context.record.refuse(stream.edits[0].node, reason)
    return done


def _worth(context: Context, stream: Stream, matrix: Floats) -> bool:
    """Whether the largest channel of a stream, or of what it is multiplied with, gets smaller."""
    sides = (_weights(stream, writes=writes) for writes in (True, False))
    return any(_is_less(side, matrix) for side in (*sides, _seen(context, stream)))


def _weights(stream: Stream, *, writes: bool) -> Iterator[Floats]:
    """The weights that write a stream, or that it is multiplied with."""
    return (_rows(edit, stream.width) for edit in stream.edits if edit.writes == writes)


def _is_less(parts: Iterable[Floats], matrix: Floats) -> bool:
    """Whether the largest channel of parts [n, width], that count alike, gets smaller."""
    moment = np.zeros(matrix.shape)
    for rows in parts:
        some = rows[:: max(1, len(rows) // (_LOOKED * len(matrix)))]
        if len(some) > 1:
            own = some.T @ some
            moment += own / max(float(np.trace(own)), 1e-300)
    before = np.diag(moment)
    after = np.einsum("ij,ij->j", matrix, moment @ matrix)
    return bool(before.max() > _EVEN * before.mean() and after.max() < _LESS * before.max())


def _seen(context: Context, stream: Stream) -> Iterator[Floats]:
    """What norms get of a stream, for each of a few samples and values."""
    names = list(dict.fromkeys(value.name or "" for value in stream.read))
    if context.samples is None or not names:
        return
    some = context.samples.take(_SAMPLES)
    for group in groups(context.model, names, next(iter(some))):
        for tensors in tap(context.model, group, some):
            for array in tensors.values():
                yield array.reshape(-1, stream.width).astype(np.float64)


def _turn(context: Context, stream: Stream, matrix: Floats) -> None:
    for edit in stream.edits:
        context.check_time()
        replace_constant(context, edit.node, edit.index, _turned(edit, matrix))
    for node, index in stream.scaled:
        if node.op_type not in ("Mul", "Div"):
            replace_constant(context, node, index, np.ones(stream.width))
            continue
        source = node.inputs[1 - index]
        assert source is not None
        replace_value(context, node.outputs[0], source)
        remove(context, node)
    context.changed("rotate", [edit.node for edit in stream.edits if edit.writes])


def _array(edit: Edit) -> ir.Array:
    array = ir.array(edit.node.inputs[edit.index])
    assert array is not None
    return array.reshape((1,) * max(0, -edit.axis - array.ndim) + array.shape)


def _rows(edit: Edit, width: int) -> Floats:
    """A constant as rows of channels [n, width], multiplied by its factor."""
    moved = np.moveaxis(_array(edit), edit.axis, -1)
    whole = np.broadcast_to(moved, (*moved.shape[:-1], width)).reshape(-1, width)
    rows: Floats = whole.astype(np.float64)
    return rows if edit.factor is None else rows * edit.factor


def _turned(edit: Edit, matrix: Floats) -> ir.Array:
    """A constant with its channels turned, in its own type's precision where that is less."""
    array, width = _array(edit), len(matrix)
    rows = _rows(edit, width)
    step = max(1, _PART // width)
    for start in range(0, len(rows), step):
        rows[start : start + step] = rows[start : start + step] @ matrix
    shape = np.moveaxis(array, edit.axis, -1).shape[:-1]
    return np.moveaxis(rows.reshape(*shape, width), -1, edit.axis)
