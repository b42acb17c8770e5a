"""A linear layer as two thinner ones, by what its inputs are like.

Either a matrix of low rank becomes the product of two (Eckart and Young 1936; with data it is the
layer's results that are kept, as in Zhang et al. 2015, Accelerating very deep convolutional
networks), or the kernel of a convolution over a plane becomes one along its columns and one along
its rows (Jaderberg et al. 2014, Speeding up convolutional neural networks with low rank
expansions), the second of which is then fitted to the layer's results.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from graphopt import ir
from graphopt.errors import GraphoptError
from graphopt.gram import weight_tensor

__all__ = ["Halves", "Truncation", "can_split", "factor", "halves", "is_plane", "sides"]

Floats = npt.NDArray[np.float64]

_DAMPING = 1e-4
_LEAST = 1024
"""Weights below which a second kernel costs more than is saved."""


@dataclass(frozen=True)
class Halves:
    """Two layers in place of one, of the same kind of operator, the bias at the second."""

    weights: tuple[ir.Array, ir.Array]
    attributes: tuple[list[ir.Attr], list[ir.Attr]]


def can_split(node: ir.Node) -> bool:
    """Whether a node is a MatMul, a Gemm or a Conv in one group with enough weights of its own."""
    weight = node.inputs[1] if node.op_type in ("MatMul", "Gemm", "Conv") else None
    tensor = ir.constant(weight)
    if weight is None or tensor is None or node.domain or weight.is_graph_input():
        return False
    rank = len(tensor.shape)
    return (
        tensor.dtype.is_floating_point()
        and tensor.size >= _LEAST
        and (rank > 2 if node.op_type == "Conv" else rank == 2)
        and ir.attribute(node, "group", 1) == 1
        and ir.use_count(weight) == 1
    )


def is_plane(node: ir.Node, shape: Sequence[int]) -> bool:
    """Whether weights of a shape are a kernel of two axes, which can be taken apart."""
    return node.op_type == "Conv" and len(shape) == 4 and min(shape[2:]) > 1


def sides(node: ir.Node, shape: Sequence[int], *, plane: bool) -> tuple[int, int]:
    """Weights that each rank has in the first and in the second of two layers."""
    if node.op_type != "Conv":
        return shape[0], shape[1]
    if plane:
        return shape[1] * shape[2], shape[0] * shape[3]
    return math.prod(shape[1:]), shape[0]


def factor(moment: Floats) -> Floats:
    """The lower Cholesky factor of sums of xxᵀ, [..., k, k].

    Where channels depend on each other, rounding leaves such a sum with eigenvalues below zero:
    then its diagonal grows by the least power of ten of its mean that suffices.

    Raises:
        GraphoptError: elements that are not finite.
    """
    if not np.all(np.isfinite(moment)):
        raise GraphoptError("sums of products of activations are not finite")
    share, unit = 0.0, np.eye(moment.shape[-1])
    size: Any = np.maximum(np.trace(moment, axis1=-2, axis2=-1) / len(unit), 1e-30)
    while True:
        raised: Floats = moment + share * size[..., None, None] * unit
        try:
            return cast("Floats", np.linalg.cholesky(raised))
        except np.linalg.LinAlgError:
            share = max(10 * share, _DAMPING)


class Truncation:
    """A layer's best approximations of all ranks, from one decomposition.

    `whole` are its weights and bias [out, k + 1], columns as `graphopt.gram` has them; `moment` is
    the mean of xxᵀ over its columns x with a 1 appended [k + 1, k + 1], None where there are no
    data; `shape` is that of the weights; with `plane` the kernel is taken apart.
    """

    def __init__(
        self, shape: Sequence[int], whole: Floats, moment: Floats | None, *, plane: bool
    ) -> None:
        self._shape, self._whole, self._plane = tuple(shape), whole, plane
        self._moment: Floats = np.eye(whole.shape[1]) if moment is None else moment
        weights, k = whole[:, :-1], whole.shape[1] - 1
        if plane:
            out, inner, high, wide = self._shape
            starts = np.arange(0, k, wide, dtype=np.intp)
            middle = starts + wide // 2
            column = self._moment[np.ix_(middle, middle)]
            kernel = weights.reshape(out, inner * high, wide)
            matrix = kernel.transpose(1, 2, 0).reshape(inner * high, wide * out)
        else:
            mean = self._moment[:-1, -1] if moment is not None else np.zeros(k)
            column = self._moment[:-1, :-1] - np.outer(mean, mean)
            matrix = weights.T
        damped = column.copy()
        damped[np.diag_indices(len(damped))] += _DAMPING * float(np.mean(np.diag(column))) + 1e-12
        root = factor(damped).T
        left, values, right = np.linalg.svd(root @ matrix, full_matrices=False)
        self.values: Floats = cast("Floats", values)
        """Singular values, the largest first: what each rank adds to the results, squared."""
        self._left: Floats = cast("Floats", np.linalg.solve(root, left))
        self._right: Floats = cast("Floats", right)

    def factors(self, rank: int) -> tuple[Floats, Floats, Floats]:
        """Of a rank: the first layer [rank, ...], the second [out, ...] and its bias [out].

        The first has a kernel's columns [rank, channels, high], the second its rows
        [out, rank, wide], where the kernel is taken apart.
        """
        root = np.sqrt(self.values[:rank])
        first: Floats = (self._left[:, :rank] * root).T
        second: Floats = (root[:, None] * self._right[:rank]).T
        if not self._plane:
            kept = self._whole[:, :-1] - second @ first
            return first, second, self._whole[:, -1] + kept @ self._moment[:-1, -1]
        out, inner, high, wide = self._shape
        second = second.reshape(wide, out, rank).transpose(1, 2, 0).reshape(out, rank * wide)
        spread = self._spread(first, rank)
        # The second layer is fitted: to the whole one's results, by what it now reads.
        read, wanted = spread @ self._moment @ spread.T, spread @ self._moment @ self._whole.T
        start = np.concatenate([second, self._whole[:, -1:]], axis=1).T
        damped = read.copy()
        damped[np.diag_indices(rank * wide)] += _DAMPING * float(np.mean(np.diag(read))) + 1e-12
        fitted: Floats = (start + np.linalg.solve(damped, wanted - read @ start)).T
        rows = fitted[:, :-1].reshape(out, rank, wide)
        return first.reshape(rank, inner, high), rows, fitted[:, -1]

    def product(self, rank: int) -> Floats:
        """Weights and bias [out, k + 1] of a single layer that does what the two do."""
        first, second, bias = self.factors(rank)
        if not self._plane:
            return np.concatenate([second @ first, bias[:, None]], axis=1)
        flat = np.concatenate([second.reshape(len(second), -1), bias[:, None]], axis=1)
        whole: Floats = flat @ self._spread(first.reshape(rank, -1), rank)
        return whole

    def error(self, rank: int) -> float:
        """Mean square error of the results, relative to their variance."""
        rest, mean = self.product(rank) - self._whole, self._whole @ self._moment[:, -1]
        power = float(((self._whole @ self._moment) * self._whole).sum() - (mean**2).sum())
        return float(((rest @ self._moment) * rest).sum()) / max(power, 1e-30)

    def _spread(self, first: Floats, rank: int) -> Floats:
        """What the second of two convolutions reads, as a matrix on the columns of the whole."""
        _, inner, high, wide = self._shape
        found = np.zeros((rank * wide + 1, inner * high * wide + 1))
        body = found[:-1, :-1].reshape(rank, wide, inner * high, wide)
        for place in range(wide):
            body[:, place, :, place] = first
        found[-1, -1] = 1
        return found


def halves(
    node: ir.Node, dtype: npt.DTypeLike, first: Floats, second: Floats, *, plane: bool
) -> Halves:
    """Weights and attributes of the two operators that `Truncation.factors` stand for."""
    attributes = dict(node.attributes)
    if node.op_type != "Conv":
        rank = len(first)
        shapes = (first.shape[1], rank), (rank, len(second))
        if ir.attribute(node, "transB", 0):
            shapes = shapes[0][::-1], shapes[1][::-1]
        made = [
            weight_tensor(node, matrix[None], shape)
            for matrix, shape in zip((first, second), shapes, strict=True)
        ]
        kept = {"transA", "transB", "alpha"} if node.op_type == "Gemm" else set[str]()
        given = [a for n, a in attributes.items() if n in kept]
        then = [a for n, a in attributes.items() if n in ("transB", "beta")]
    elif plane:
        made = [first[:, :, :, None], second[:, :, None, :]]
        given, then = _along(attributes, 0), _along(attributes, 1)
    else:
        array = ir.array(node.inputs[1])
        assert array is not None
        made = [
            first.reshape(-1, *array.shape[1:]),
            second.reshape(*second.shape, *[1] * (array.ndim - 2)),
        ]
        given, then = list(attributes.values()), []
    one, other = (np.ascontiguousarray(cast(Any, half).astype(dtype)) for half in made)
    return Halves((one, other), (given, then))


def _along(attributes: dict[str, ir.Attr], axis: int) -> list[ir.Attr]:
    """The attributes of a convolution over a plane for a part of it along one axis."""
    other = 1 - axis
    rest = {"pads": 0, "strides": 1, "dilations": 1, "kernel_shape": 1}
    found: list[ir.Attr] = []
    for name, attr in attributes.items():
        if name not in rest:
            found.append(attr)
            continue
        numbers = list(attr.as_ints())
        numbers[other::2] = [rest[name]] * len(numbers[other::2])
        found.append(ir.Attr(name, ir.AttributeType.INTS, tuple(numbers)))
    return found
