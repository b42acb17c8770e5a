"""Linear operators as matrix products: columns (im2col), weights as matrices, and XᵀX.

What a Conv, ConvTranspose, Gemm or MatMul with constant weights adds up is `columns @ weightsᵀ`,
per group. XᵀX of the columns is all that reconstruction of weights needs of the data (Nagel et al.,
"Up or Down?", 2020; Frantar et al., "GPTQ", 2022); it is a sum over samples, so it is merged by
addition and its size does not depend on their number.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from graphopt import ir
from graphopt.errors import InputError
from graphopt.ir import Array
from graphopt.taps import groups, tap

__all__ = [
    "LINEAR",
    "Gram",
    "accumulate",
    "affordable",
    "column_blocks",
    "columns",
    "geometry",
    "grams",
    "padding",
    "weight_matrix",
    "weight_tensor",
]

Floats = npt.NDArray[np.float64]
Reals = npt.NDArray[np.floating[Any]]

LINEAR = ("Conv", "ConvTranspose", "Gemm", "MatMul")
"""Operators of the standard domain whose second input is taken for the weights."""

_BLOCK_BYTES = 32 << 20
_SUMS_BYTES = 1 << 30


@dataclass
class Gram:
    """Sums over the columns of a linear operator's input.

    `xtx` [groups, k, k] and `total` [groups, k] are sums (not averages), in float64, over `count`
    rows: a row is an output position of one sample, and k the inputs that one output adds up.
    """

    xtx: Floats
    total: Floats
    count: int

    @classmethod
    def empty(cls, groups: int, k: int) -> Gram:
        """No rows yet."""
        return cls(np.zeros((groups, k, k)), np.zeros((groups, k)), 0)

    @property
    def mean(self) -> Floats:
        """The average column [groups, k]; zero without rows."""
        return self.total / max(self.count, 1)

    @property
    def moment(self) -> Floats:
        """The mean of xxᵀ over the columns x with a 1 appended [groups, k + 1, k + 1]."""
        size = self.xtx.shape[-1] + 1
        found = np.empty((len(self.xtx), size, size))
        found[:, :-1, :-1] = self.xtx
        found[:, :-1, -1] = found[:, -1, :-1] = self.total
        found[:, -1, -1] = self.count
        return found / max(self.count, 1)

    def add(self, rows: Reals) -> None:
        """Count columns [groups, rows, k] in."""
        # Products in the data's own type, which is the fast one; sums of blocks in float64.
        self.xtx += np.matmul(rows.transpose(0, 2, 1), rows)
        self.total += rows.sum(axis=1, dtype=np.float64)
        self.count += rows.shape[1]

    def __add__(self, other: Gram) -> Gram:
        return Gram(self.xtx + other.xtx, self.total + other.total, self.count + other.count)


def columns(node: ir.Node, x: Array, shape: Sequence[int] | None = None) -> Reals:
    """The input of a linear operator as [groups, rows, k], float32 or float64.

    `columns(node, x) @ weight_matrix(node, w).transpose(0, 2, 1)` is [groups, rows, out] and holds
    the operator's result without its bias: rows are (batch, positions) of it in row-major order,
    channels are (group, out). `shape` is that of the weights, where they are no constant. Padding
    is zeros; a Gemm's alpha is in the columns.

    Raises:
        InputError: another operator, weights of unknown shape, or an input that does not fit.
    """
    return np.concatenate(list(column_blocks(node, x, shape)), axis=1)


def column_blocks(
    node: ir.Node,
    x: Array,
    shape: Sequence[int] | None = None,
    *,
    limit: int = _BLOCK_BYTES,
    rows: int | None = None,
    phase: int = 0,
) -> Iterator[Reals]:
    """`columns` in pieces, along the rows, of at most about `limit` bytes each.

    With `rows`, only about so many of them: on a grid of positions that begins elsewhere for each
    `phase`, so that the phases together cover everything.
    """
    shape = _weight_shape(node, shape)
    real: Reals = x.astype(np.float64 if x.dtype == np.float64 else np.float32, copy=False)
    if node.op_type in ("Conv", "ConvTranspose"):
        windows, groups = _windows(node, real, shape)
        windows = _thinned(windows, range(2, len(shape)), rows, phase)
        yield from _unfold(windows, groups, len(shape) - 2, limit)
        return
    whole = _thinned(_matrix_columns(node, real, shape), range(1, 2), rows, phase)
    step = max(1, limit // max(1, whole.itemsize * whole.shape[0] * whole.shape[2]))
    for start in range(0, max(1, whole.shape[1]), step):
        yield whole[:, start : start + step]


def weight_matrix(node: ir.Node, weights: Array) -> Reals:
    """The weights of a linear operator as [groups, out, k], to go with `columns`."""
    w = cast(Reals, weights)
    if node.op_type == "Conv":
        groups = _groups(node)
        return w.reshape(groups, w.shape[0] // groups, -1)
    if node.op_type == "ConvTranspose":
        groups = _groups(node)
        split = w.reshape(groups, w.shape[0] // groups, w.shape[1], -1)
        return split.transpose(0, 2, 1, 3).reshape(groups, w.shape[1], -1)
    if node.op_type == "Gemm":
        return (w if ir.attribute(node, "transB", 0) else w.T)[None]
    if node.op_type == "MatMul":
        w = w[:, None] if w.ndim == 1 else w
        return w.swapaxes(-1, -2).reshape(-1, w.shape[-1], w.shape[-2])
    raise InputError(f"{ir.label(node)} is a {node.op_type}, not one of {', '.join(LINEAR)}")


def weight_tensor(node: ir.Node, matrix: Array, shape: Sequence[int]) -> Array:
    """The inverse of `weight_matrix`: weights of the operator's own shape, contiguous."""
    if node.op_type == "ConvTranspose":
        groups, inner = _groups(node), shape[0] // _groups(node)
        split = matrix.reshape(groups, shape[1], inner, -1).transpose(0, 2, 1, 3)
        return np.ascontiguousarray(split).reshape(tuple(shape))
    if node.op_type == "Gemm" and not ir.attribute(node, "transB", 0):
        return np.ascontiguousarray(matrix[0].T)
    if node.op_type == "MatMul":
        return np.ascontiguousarray(matrix.swapaxes(-1, -2)).reshape(tuple(shape))
    return np.ascontiguousarray(matrix).reshape(tuple(shape))


def accumulate(
    nodes: Iterable[ir.Node],
    feeds: Iterable[Mapping[str, Array]],
    shapes: Mapping[str, Sequence[int]] | None = None,
    *,
    rows: int | None = None,
) -> dict[str, Gram]:
    """XᵀX of the inputs of linear operators, by node name, over the samples of `feeds`.

    `feeds` yields, per sample, the operators' first inputs by value name (`taps.tap`). `shapes`
    are the shapes of weights that are no constants, by node name. Operators that read the same
    columns share one Gram. `rows` bounds the output positions of a sample that are counted, evenly
    spaced. Memory: the sums, and one block of columns.

    Raises:
        InputError: an input that holds values which are not finite, or that does not fit.
    """
    named: dict[str, tuple[object, ...]] = {}
    readers: dict[tuple[object, ...], tuple[ir.Node, Sequence[int]]] = {}
    for node in nodes:
        shape = _weight_shape(node, (shapes or {}).get(node.name or ""))
        key = geometry(node, shape)
        named[ir.label(node)] = key
        readers.setdefault(key, (node, shape))
    sums: dict[tuple[object, ...], _Sum] = {}
    for phase, sample in enumerate(feeds):
        for key, (node, shape) in readers.items():
            value = node.inputs[0]
            assert value is not None
            x = sample[value.name or ""]
            for block in column_blocks(node, x, shape, rows=rows, phase=phase):
                if not np.isfinite(block.sum(dtype=np.float64)):
                    raise InputError(f"{value.name!r} holds values that are not finite")
                if key not in sums:
                    sums[key] = _Sum(Gram.empty(block.shape[0], block.shape[2]))
                sums[key].add(block)
    whole = {key: found.close() for key, found in sums.items()}
    return {name: whole[key] for name, key in named.items() if key in whole}


@dataclass
class _Sum:
    """A Gram, and columns that are yet to be counted: a few rows cost as much as many."""

    gram: Gram
    waiting: list[Reals] = field(default_factory=list[Reals])
    count: int = 0

    def add(self, rows: Reals) -> None:
        """Count columns in, now or later."""
        most = rows.shape[2] // 8  # a sixteenth of the memory of XᵀX
        if self.count + rows.shape[1] > most:
            self.close()
        if rows.shape[1] > most:
            self.gram.add(rows)
        else:
            self.waiting.append(rows.copy())
            self.count += rows.shape[1]

    def close(self) -> Gram:
        """The sums of all of them."""
        if self.waiting:
            self.gram.add(np.concatenate(self.waiting, axis=1))
            self.waiting, self.count = [], 0
        return self.gram


def grams(
    model: ir.Model,
    nodes: Sequence[ir.Node],
    samples: Iterable[Mapping[str, Array]],
    *,
    rows: int | None = None,
    progress: Callable[[str], None] | None = None,
) -> dict[str, Gram]:
    """`accumulate` over samples of a model, which is run once for each part that fits into memory.

    `samples` are gone through as often. Raises InputError as `accumulate` does, GraphoptError where
    the model does not run.
    """
    found: dict[str, Gram] = {}
    tensors = dict.fromkeys(v.name or "" for n in nodes if (v := n.inputs[0]) is not None)
    for group in groups(model, list(tensors), next(iter(samples))) if tensors else ():
        if progress is not None:
            progress("sums of inputs")
        part = [n for n in nodes if n.inputs[0] is not None and n.inputs[0].name in group]
        found |= accumulate(part, tap(model, group, samples), rows=rows)
    return found


def affordable(nodes: Sequence[ir.Node], limit: int = _SUMS_BYTES) -> list[ir.Node]:
    """Those of linear operators whose XᵀX fit into memory together, small ones first."""
    sizes: dict[ir.Node, int] = {}
    for node in nodes:
        array = ir.array(node.inputs[1])
        assert array is not None
        count, _, k = weight_matrix(node, array).shape  # a view
        sizes[node] = count * k * k * np.dtype(np.float64).itemsize
    kept: set[ir.Node] = set()
    for node in sorted(nodes, key=lambda node: sizes[node]):
        limit -= sizes[node]
        if limit < 0:
            break
        kept.add(node)
    return [node for node in nodes if node in kept]


def _thinned(array: Reals, axes: range, rows: int | None, phase: int) -> Reals:
    """A grid along some axes that has about `rows` points."""
    count = math.prod(array.shape[axis] for axis in axes)
    if rows is None or count <= rows:
        return array
    stride = max(1, round((count / rows) ** (1 / len(axes))))
    index: list[Any] = [slice(None)] * array.ndim
    for axis in axes:
        index[axis] = slice(phase % min(stride, array.shape[axis]), None, stride)
        phase //= stride
    picked: Reals = array[tuple(index)]
    return picked


def geometry(node: ir.Node, shape: Sequence[int] | None = None) -> tuple[object, ...]:
    """What the columns of an operator depend on; `shape` is as for `columns`."""
    shape = _weight_shape(node, shape)
    attributes = {
        name: ir.attribute(node, name)
        for name in node.attributes
        if name not in ("beta", "transB", "kernel_shape")
    }
    kernel = tuple(shape[2:]) if node.op_type.startswith("Conv") else tuple(shape[:-2])
    return (node.inputs[0], node.op_type, kernel, repr(sorted(attributes.items())))


def _weight_shape(node: ir.Node, shape: Sequence[int] | None) -> Sequence[int]:
    if node.op_type not in LINEAR or node.domain not in ("", "ai.onnx"):
        raise InputError(f"{ir.label(node)} is a {node.op_type}, not one of {', '.join(LINEAR)}")
    if shape is not None:
        return shape
    tensor = ir.constant(node.inputs[1])
    if tensor is None:
        raise InputError(f"the weights of {ir.label(node)} are no constant")
    return tensor.shape.numpy()


def _groups(node: ir.Node) -> int:
    return int(cast(int, ir.attribute(node, "group", 1)))


def _ints(node: ir.Node, name: str, default: Sequence[int]) -> list[int]:
    value = cast("Sequence[int] | None", ir.attribute(node, name))
    return [int(v) for v in (default if value is None else value)]


def _matrix_columns(node: ir.Node, x: Reals, shape: Sequence[int]) -> Reals:
    """The columns of a Gemm or MatMul, without a copy where there is one group."""
    if node.op_type == "Gemm":
        rows = x.T if ir.attribute(node, "transA", 0) else x
        alpha = float(cast(float, ir.attribute(node, "alpha", 1.0)))
        rows = rows if alpha == 1 else rows * rows.dtype.type(alpha)
        return rows[None]
    x = x[None] if x.ndim == 1 else x
    batch = tuple(shape[:-2])
    if not batch or math.prod(batch) == 1:
        return x.reshape(1, -1, x.shape[-1])
    lead = np.broadcast_shapes(x.shape[:-2], batch)
    spread = np.broadcast_to(x, (*lead, *x.shape[-2:]))
    spread = spread.reshape(-1, math.prod(batch), *x.shape[-2:])
    return spread.transpose(1, 0, 2, 3).reshape(math.prod(batch), -1, x.shape[-1])


def _windows(node: ir.Node, x: Reals, shape: Sequence[int]) -> tuple[Reals, int]:
    """What each output position of a convolution reads: [batch, channels, *out, *kernel], a view.

    A transposed convolution is one over the input with zeros put between its elements.
    """
    kernel = list(shape[2:])
    rank = len(kernel)
    groups = _groups(node)
    channels = shape[1] * groups if node.op_type == "Conv" else shape[0]
    if x.ndim != rank + 2 or x.shape[1] != channels:
        raise InputError(
            f"{ir.label(node)} takes [batch, {channels}] and {rank} axes more, got {x.shape}"
        )
    strides = _ints(node, "strides", [1] * rank)
    dilations = _ints(node, "dilations", [1] * rank)
    spans = [d * (k - 1) + 1 for k, d in zip(kernel, dilations, strict=True)]
    if node.op_type == "Conv":
        begins, ends = padding(node, x.shape[2:], spans, strides)
        steps = strides
    else:
        begins, ends = _transposed_pads(node, x.shape[2:], spans, strides)
        x, steps = _spread(x, strides), [1] * rank
    x = _padded(x, begins, ends)
    axes = tuple(range(2, rank + 2))
    windows = np.lib.stride_tricks.sliding_window_view(x, spans, axis=axes)
    index: Any = (..., *(slice(None, None, s) for s in [*steps, *dilations]))
    windows = windows[index]
    if node.op_type == "ConvTranspose":  # its kernel meets the input in reverse
        windows = np.flip(windows, tuple(range(rank + 2, 2 * rank + 2)))
    return windows, groups


def _unfold(windows: Reals, groups: int, rank: int, limit: int) -> Iterator[Reals]:
    """Windows [batch, channels, *out, *kernel] as blocks [groups, rows, channels/g * kernel]."""
    batch, channels = windows.shape[:2]
    inner = windows.shape[3:]
    size = channels * math.prod(inner) * windows.itemsize  # of one step along the first out axis
    step = max(1, limit // max(1, size))
    order = (1, 0, *range(3, rank + 3), 2, *range(rank + 3, 2 * rank + 3))
    for sample, start in itertools.product(range(batch), range(0, windows.shape[2], step)):
        part = windows[sample : sample + 1, :, start : start + step]
        split = part.reshape(1, groups, channels // groups, *part.shape[2:])
        rows = split.transpose(order)
        yield rows.reshape(groups, math.prod(rows.shape[1 : rank + 2]), -1)


def _spread(x: Reals, strides: Sequence[int]) -> Reals:
    """Zeros between the elements of the spatial axes."""
    if all(s == 1 for s in strides):
        return x
    sizes = [(n - 1) * s + 1 for n, s in zip(x.shape[2:], strides, strict=True)]
    wide = np.zeros((*x.shape[:2], *sizes), x.dtype)
    places: Any = (..., *(slice(None, None, s) for s in strides))
    wide[places] = x
    return wide


def _padded(x: Reals, begins: Sequence[int], ends: Sequence[int]) -> Reals:
    """Zeros around the spatial axes; negative amounts cut off."""
    cut = [
        slice(max(0, -b), n - max(0, -e)) for b, e, n in zip(begins, ends, x.shape[2:], strict=True)
    ]
    inside: Any = (..., *cut)
    x = x[inside]
    widths = [(max(0, b), max(0, e)) for b, e in zip(begins, ends, strict=True)]
    return np.pad(x, [(0, 0), (0, 0), *widths]) if any(b or e for b, e in widths) else x


def padding(
    node: ir.Node, sizes: Sequence[int], spans: Sequence[int], strides: Sequence[int]
) -> tuple[list[int], list[int]]:
    """The padding of a Conv or a pooling before and behind each spatial axis."""
    rank = len(spans)
    mode = ir.attribute(node, "auto_pad", "NOTSET")
    if mode == "VALID":
        return [0] * rank, [0] * rank
    if mode in ("SAME_UPPER", "SAME_LOWER"):
        totals = [
            max(0, (-(-n // s) - 1) * s + k - n)
            for n, k, s in zip(sizes, spans, strides, strict=True)
        ]
        small, large = [t // 2 for t in totals], [t - t // 2 for t in totals]
        return (small, large) if mode == "SAME_UPPER" else (large, small)
    pads = _ints(node, "pads", [0] * (2 * rank))
    return pads[:rank], pads[rank:]


def _transposed_pads(
    node: ir.Node, sizes: Sequence[int], spans: Sequence[int], strides: Sequence[int]
) -> tuple[list[int], list[int]]:
    """The padding around the spread input of a ConvTranspose; negative where it is cut."""
    rank = len(spans)
    mode = ir.attribute(node, "auto_pad", "NOTSET")
    extra = _ints(node, "output_padding", [0] * rank)
    full = [s * (n - 1) + e + k for n, s, e, k in zip(sizes, strides, extra, spans, strict=True)]
    wanted = _ints(node, "output_shape", [])[-rank:]
    if not wanted and mode in ("SAME_UPPER", "SAME_LOWER"):
        wanted = [n * s for n, s in zip(sizes, strides, strict=True)]
    if wanted:
        totals = [max(0, f - w) for f, w in zip(full, wanted, strict=True)]
        # An odd one goes before, with SAME_UPPER behind.
        heads = [t // 2 if mode == "SAME_UPPER" else t - t // 2 for t in totals]
    else:
        pads = [0] * (2 * rank) if mode == "VALID" else _ints(node, "pads", [0] * (2 * rank))
        heads = pads[:rank]
        wanted = [f - b - e for f, b, e in zip(full, heads, pads[rank:], strict=True)]
    begins = [k - 1 - h for k, h in zip(spans, heads, strict=True)]
    ends = [
        w + k - 1 - b - ((n - 1) * s + 1)
        for w, k, b, n, s in zip(wanted, spans, begins, sizes, strides, strict=True)
    ]
    return begins, ends
