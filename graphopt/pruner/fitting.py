"""One layer fitted by least squares: from sums over its inputs to new weights and a bias."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from graphopt import ir
from graphopt.gram import Gram, weight_matrix, weight_tensor
from graphopt.pruner.adjusting import constant

__all__ = ["Fit", "Sums", "augmented", "biased", "can_fit", "fit", "put"]

Reals = npt.NDArray[np.floating[Any]]
Floats = npt.NDArray[np.float64]

_CAUTION = 0.1
_RIDGES = (1.0, 10.0, 1e2, 1e3, 1e4, 1e5)  # that are tried, relative to the least


@dataclass
class Fit:
    """What refitting one layer did: mean square error relative to the target's variance."""

    name: str
    before: float
    after: float


@dataclass
class Sums:
    """Of columns X with a 1 appended and targets Y, per group: XᵀX, XᵀY, and YᵀY's diagonal."""

    xtx: list[Floats] = field(default_factory=list[Floats])
    xty: list[Floats] = field(default_factory=list[Floats])
    yty: list[Floats] = field(default_factory=list[Floats])
    count: int = 0

    def add(self, x: Reals, y: Reals) -> None:
        """Count rows in: x [groups, rows, k], y [groups, rows, out]."""
        x = np.concatenate([x, np.ones((*x.shape[:2], 1), x.dtype)], axis=2)
        turned = x.transpose(0, 2, 1)
        parts = (np.matmul(turned, x), np.matmul(turned, y), np.square(y).sum(1))
        for held, part in zip((self.xtx, self.xty, self.yty), parts, strict=True):
            if held:
                held[0] += part
            else:
                held.append(part.astype(np.float64))
        self.count += x.shape[1]

    def __add__(self, other: Sums) -> Sums:
        held = ((self.xtx, other.xtx), (self.xty, other.xty), (self.yty, other.yty))
        xtx, xty, yty = ([a[0] + b[0]] for a, b in held)
        return Sums(xtx, xty, yty, self.count + other.count)

    @classmethod
    def of_fewer(cls, gram: Gram, whole: Floats, left: npt.NDArray[np.intp]) -> Sums:
        """Of some columns, `left` [groups, fewer], with what `whole` makes of all as targets."""
        every = gram.moment * gram.count
        size = every.shape[-1]
        made = np.matmul(every, whole.transpose(0, 2, 1))
        places = np.concatenate([left, np.full((len(left), 1), size - 1)], axis=1)
        xtx = np.take_along_axis(every, places[:, :, None], 1)
        return cls(
            [np.take_along_axis(xtx, places[:, None], 2)],
            [np.take_along_axis(made, places[:, :, None], 1)],
            [np.einsum("goi,gio->go", whole, made)],
            gram.count,
        )


def can_fit(model: ir.Model, node: ir.Node) -> bool:
    """Whether a layer's weights are constants of its own in the main graph, with a bias or none."""
    weights = node.inputs[1]
    tensor = ir.constant(weights)
    if tensor is None or weights is None or len(weights.uses()) > 1:
        return False
    if any(ir.attribute(node, name, 1.0) != 1.0 for name in ("alpha", "beta")):
        return False  # factors that would have to be divided out again
    if not tensor.dtype.is_floating_point() or weights.graph is not model.graph:
        return False
    return _bias(node, weight_matrix(node, tensor.numpy()).astype(np.float64))[1] is not None


def fit(
    model: ir.Model, node: ir.Node, parts: Sequence[Sums], ridge: float, *, only_bias: bool = False
) -> Fit:
    """Solve a layer that `can_fit` by ridge regression, in place where it comes out better.

    With two parts, sums over different samples, the ridge is at least the one given: the one with
    which a fit to each part serves the other best (two-fold cross-validation). A layer that no fit
    serves better than its own weights is left alone.
    """
    array = ir.array(node.inputs[1])
    assert array is not None
    whole = augmented(node, array)
    sums, held = _merged(parts, whole, ridge, only_bias)
    solved = whole if held is None else _solve(sums, whole, held, only_bias)
    before, after = _error(sums, whole), _error(sums, solved)
    if held is None or not after <= before:
        return Fit(ir.label(node), before, before)
    put(model, node, solved)
    return Fit(ir.label(node), before, after)


def put(model: ir.Model, node: ir.Node, whole: Floats) -> None:
    """Give a layer that `can_fit` weights and a bias, as `augmented` has them."""
    weights, array = node.inputs[1], ir.array(node.inputs[1])
    assert weights is not None and array is not None
    place = _bias(node, whole[:, :, :-1])[1]
    assert place is not None
    tensor = weight_tensor(node, whole[:, :, :-1], array.shape).astype(array.dtype)
    weights.const_value = ir.tensor(tensor, name=weights.name)
    _set_bias(model, node, place, cast("Reals", whole[:, :, -1].ravel().astype(array.dtype)))


def augmented(node: ir.Node, weights: ir.Array) -> Floats:
    """Weights and bias of a layer [groups, out, k + 1]."""
    matrix = weight_matrix(node, weights).astype(np.float64)
    return np.concatenate([matrix, _bias(node, matrix)[0][:, :, None]], axis=2)


def _merged(
    parts: Sequence[Sums], whole: Floats, ridge: float, only_bias: bool
) -> tuple[Sums, float | None]:
    """All the sums, and the ridge to take; None where the weights are best left alone."""
    if len(parts) < 2:
        # Few rows for as many unknowns would be fitted exactly, noise and all.
        return parts[0], ridge + _CAUTION * (parts[0].xtx[0].shape[-1] - 1) / parts[0].count
    one, other = parts
    errors = {
        ridge * factor: sum(
            _error(judge, _solve(given, whole, ridge * factor, only_bias))
            for given, judge in ((one, other), (other, one))
        )
        for factor in _RIDGES
    }
    best = min(errors, key=lambda held: errors[held])
    alone = _error(one, whole) + _error(other, whole)
    return one + other, best if errors[best] < alone else None


def _solve(sums: Sums, whole: Floats, ridge: float, only_bias: bool) -> Floats:
    """The change of weights and bias that is best by least squares, weights held by a ridge."""
    xtx, xty = sums.xtx[0] / sums.count, sums.xty[0] / sums.count
    size = xtx.shape[-1] - 1
    rest = xty - np.matmul(xtx, whole.transpose(0, 2, 1))
    if only_bias:
        change = np.zeros_like(rest)
        change[:, -1] = rest[:, -1]
        return _sum(whole, change)
    diagonal = np.einsum("gii->gi", xtx)[:, :size]
    held = ridge * diagonal.mean(1) + 1e-12
    left = xtx.copy()
    np.einsum("gii->gi", left)[:, :size] += held[:, None]
    left[:, size, size] += 1e-9
    return _sum(whole, cast("Floats", np.linalg.solve(left, rest)))


def _sum(whole: Floats, change: Floats) -> Floats:
    found: Floats = whole + change.transpose(0, 2, 1)
    return found


def _error(sums: Sums, whole: Floats) -> float:
    """The squared error, relative to the targets' variance, both as means over all channels."""
    count = sums.count
    w = whole.transpose(0, 2, 1)
    fitted = (w * np.matmul(sums.xtx[0], w)).sum(1) - 2 * (w * sums.xty[0]).sum(1)
    mean = sums.xty[0][:, -1] / count
    variance = float((sums.yty[0] / count - mean**2).sum())
    return float((fitted + sums.yty[0]).sum()) / count / max(variance, 1e-30)


def biased(node: ir.Node) -> tuple[ir.Value, ir.Value] | None:
    """The sum of a MatMul's result and a bias of its own, which nothing else reads; the bias."""
    output = node.outputs[0]
    uses = list(output.uses())
    if node.op_type != "MatMul" or len(uses) != 1 or output.is_graph_output():
        return None
    add, weights = uses[0].node, ir.constant(node.inputs[1])
    bias = add.inputs[1 - uses[0].idx] if add.op_type == "Add" else None
    tensor = ir.constant(bias)
    if bias is None or tensor is None or weights is None or len(weights.shape) < 2:
        return None
    own = bias.is_initializer() and len(bias.uses()) == 1
    fits = tensor.shape.numpy() == weights.shape.numpy()[-1:]
    return (add.outputs[0], bias) if own and fits else None


def _bias(node: ir.Node, matrix: Floats) -> tuple[Floats, str | None]:
    """The bias of a layer [groups, out], and where a new one is to be put.

    `input`: the operator's own; `add`: the constant that an Add after a MatMul has; None: nowhere.
    """
    shape = matrix.shape[:2]
    if node.op_type == "MatMul":
        if matrix.shape[0] != 1:
            return np.zeros(shape), None
        sums = biased(node)
        held = None if sums is None else ir.array(sums[1])
        return np.zeros(shape) if held is None else held.astype(np.float64)[None], "add"
    value = node.inputs[2] if len(node.inputs) > 2 else None
    if value is None:
        return np.zeros(shape), "input"
    array = ir.array(value)
    if array is None or len(value.uses()) > 1:
        return np.zeros(shape), None
    full = np.broadcast_to(array.astype(np.float64).ravel(), (shape[0] * shape[1],))
    return full.reshape(shape), "input"


def _set_bias(model: ir.Model, node: ir.Node, place: str, bias: Reals) -> None:
    if place == "input":
        value = node.inputs[2] if len(node.inputs) > 2 else None
        if value is not None:
            value.const_value = ir.tensor(bias, name=value.name)
            value.shape = ir.Shape(bias.shape)
            return
        node.resize_inputs(3)
        node.replace_input_with(2, constant(node, bias, "bias"))
        return
    sums = biased(node)
    if sums is not None:
        sums[1].const_value = ir.tensor(bias, name=sums[1].name)
        return
    output = node.outputs[0]
    add = ir.Node("", "Add", [output, constant(node, bias, "bias")])
    made = add.outputs[0]
    made.shape, made.type = output.shape, output.type
    made.name = f"{output.name}__refitted"
    if output.is_graph_output():  # whose name is the model's
        made.name, output.name = output.name, f"{output.name}__product"
    output.replace_all_uses_with(made, replace_graph_outputs=True)
    add.replace_input_with(0, output)
    model.graph.insert_after(node, add)
