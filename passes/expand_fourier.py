"""Replace Fourier transforms by products with their matrices.

Why: TVM's importer and TensorRT's parser have neither DFT nor STFT, and audio models begin with
them. A matrix is n by n, where a fast transform takes n log n; frames of speech have 512 samples.
Numerics: rounding.
Needs: known lengths, steps and windows, and a matrix of at most 2^24 numbers.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from graphopt import ir
from graphopt.dims import as_int
from graphopt.rewriting import Op, Refuse, rewrite

_MOST = 1 << 24
"""Numbers of a matrix: 64 MB of float32."""
_NOTHING = 1e-15
"""Of a sine or cosine: it is 0 without rounding."""


@rewrite.on("DFT", "STFT")
def expand_fourier(op: Op, node: ir.Node) -> ir.Value | None:
    """DFT(x) -> x · W; STFT(x) -> Conv(x, W), whose windows are the frames."""
    x = node.inputs[0]
    shape = None if x is None else op.shape(x)
    if x is None or shape is None:
        raise Refuse("its input's rank is unknown")
    sizes = [as_int(size) for size in shape]
    if sizes[-1] not in (1, 2):
        raise Refuse("real or complex is known at run time only")
    return (_frames if node.op_type == "STFT" else _whole)(op, node, x, sizes)


def _whole(op: Op, node: ir.Node, x: ir.Value, sizes: list[int | None]) -> ir.Value:
    """Along one axis: its elements, with their parts, are the rows of the matrix."""
    rank, width = len(sizes), sizes[-1] or 1
    axis = int(op.attr(node, "axis", 1)) if op.opset < 20 else _number(op, node, 2, -2)
    axis %= rank
    size = sizes[axis]
    if size is None:
        raise Refuse("the size of its axis is known at run time only")
    inverse, onesided = (bool(op.attr(node, name, 0)) for name in ("inverse", "onesided"))
    back = inverse and onesided
    length = _number(op, node, 1, 2 * (size - 1) if back else size)
    if onesided and width != (2 if back else 1):
        raise Refuse("one-sided transforms are of real signals")
    bins = length // 2 + 1 if onesided and not back else length
    rows = min(size, length // 2 + 1 if back else length)
    _require_room(size * width * bins * 2)
    waves = _waves(rows, bins, length, 1 if inverse else -1) / (length if inverse else 1)
    made = _real_part(waves, length) if back else _parts(waves, width)
    matrix = np.zeros((size, *made.shape[1:]))
    matrix[:rows] = made
    order = [*(index for index in range(rank - 1) if index != axis), axis, rank - 1]
    kept = [0] * (rank - 2)
    flat = op.Reshape(_turned(op, x, order), [*kept, size * width])
    product = op.MatMul(flat, _constant(op, x, matrix.reshape(size * width, -1)))
    result = op.Reshape(product, [*kept, *made.shape[2:]])
    return _turned(op, result, np.argsort(order).tolist())


def _frames(op: Op, node: ir.Node, x: ir.Value, sizes: list[int | None]) -> ir.Value:
    """A filter for each part of each bin; [N, length, parts] -> [N, frames, bins, 2]."""
    width, step = sizes[-1] or 1, _number(op, node, 1, 0)
    given = node.inputs[2] if len(node.inputs) > 2 else None
    window = op.const(given)
    if given is not None and window is None:
        raise Refuse("its window is known at run time only")
    length = _number(op, node, 3, (sizes[1] or 0) if window is None else window.size)
    onesided = bool(op.attr(node, "onesided", 1))
    if length < 1 or step < 1 or (onesided and width == 2):
        raise Refuse("its frames are none")
    bins = length // 2 + 1 if onesided else length
    _require_room(length * width * bins * 2)
    waves = _waves(length, bins, length, -1)
    if window is not None:
        waves = waves * window.astype(np.float64)[:, None]
    kernel = _parts(waves, width).reshape(length, width, bins * 2).transpose(2, 1, 0)
    signal = op.Transpose(x, perm=[0, 2, 1])
    found = op.Conv(signal, _constant(op, x, kernel), strides=[step])
    return op.Reshape(op.Transpose(found, perm=[0, 2, 1]), [0, 0, bins, 2])


def _turned(op: Op, x: ir.Value, order: list[int]) -> ir.Value:
    return x if order == sorted(order) else op.Transpose(x, perm=order)


def _number(op: Op, node: ir.Node, index: int, default: int) -> int:
    """A scalar input."""
    value = node.inputs[index] if index < len(node.inputs) else None
    found = default if value is None else op.scalar(value)
    if found is None:
        raise Refuse("a length, step or axis is known at run time only")
    return int(found)


def _require_room(numbers: int) -> None:
    if numbers > _MOST:
        raise Refuse(f"its matrix would have {numbers:,} numbers")


def _waves(rows: int, bins: int, length: int, sign: int) -> Any:
    """exp(sign 2 pi i r k / length), complex [rows, bins]; quarters of a turn are exact."""
    turns: Any = np.outer(np.arange(rows), np.arange(bins)) % length / length
    found: Any = np.exp(sign * 2j * np.pi * turns)
    for part in (found.real, found.imag):
        part[abs(part) < _NOTHING] = 0
    return found


def _parts(waves: Any, width: int) -> Any:
    """What the parts of an element add to those of a bin: [rows, width, bins, 2]."""
    real = np.stack([waves.real, waves.imag], -1)
    imaginary = np.stack([-waves.imag, waves.real], -1)
    return np.stack([real, imaginary][:width], 1)


def _real_part(waves: Any, length: int) -> Any:
    """The same for a real result, where each bin but the outer ones stands for two."""
    count = np.full(len(waves), 2.0)
    count[0] = 1
    if length % 2 == 0:
        count[length // 2 :] = 1
    scaled = waves * count[:, None]
    return np.stack([scaled.real, -scaled.imag], 1)[..., None]


def _constant(op: Op, like: ir.Value, array: Any) -> ir.Value:
    dtype = op.dtype(like)
    if dtype is None:
        raise Refuse("its type is unknown")
    return op.initializer(array.astype(dtype.numpy()))
