"""Weights of a few bits found layer by layer, each from what the layers before it have become.

The layers of a model are gone through in order. Each takes the weights that come nearest to what
it computed before anything was rounded, on the inputs that it gets now: a regression that needs
only sums over the samples, X'ᵀX' of the new inputs and X'ᵀX with the old ones (as in Li et al.,
"GPTAQ: Efficient Finetuning-Free Quantization for Asymmetric Calibration", 2025). Where a layer
has a bias, it takes over the difference of the means (Nagel et al., "Data-Free Quantization
Through Weight Equalization and Bias Correction", 2019, empirical bias correction).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from graphopt import files, ir
from graphopt.context import Context
from graphopt.errors import InputError
from graphopt.gram import column_blocks, weight_matrix, weight_tensor
from graphopt.quantizer.constants import constant_value, replace_constant
from graphopt.quantizer.rounding import Codes, Scheme, descend, gptq, hqq, nearest, refit
from graphopt.taps import tap

__all__ = ["METHODS", "Pair", "pairs", "reconstruct", "rounded"]

Floats = npt.NDArray[np.float64]
Feeds = Mapping[str, npt.NDArray[Any]]

METHODS = ("rtn", "mse", "hqq", "gptq", "adaround")
"""How codes are found, from the quickest to the most careful; the last two need samples."""

_ROWS = 256  # output positions of a sample that are counted
_RIDGE = 1.0
_ROUNDS = 3


@dataclass
class Pair:
    """Sums over the columns that a layer reads now (X') and read before (X)."""

    new: Floats
    """X'ᵀX' [groups, k, k]."""
    cross: Floats
    """X'ᵀX [groups, k, k]; the same array as `new` where nothing before the layer changed."""
    new_mean: Floats
    """[groups, k]"""
    old_mean: Floats
    count: int

    def centred(self) -> Pair:
        """The sums of the columns without their means."""
        new = self.new - self.count * self.new_mean[:, :, None] * self.new_mean[:, None, :]
        if self.cross is self.new:
            return Pair(new, new, self.new_mean, self.old_mean, self.count)
        cross = self.cross - self.count * self.new_mean[:, :, None] * self.old_mean[:, None, :]
        return Pair(new, cross, self.new_mean, self.old_mean, self.count)


def pairs(
    node: ir.Node,
    new: Iterable[npt.NDArray[Any]],
    old: Iterable[npt.NDArray[Any]] | None,
    *,
    rows: int = _ROWS,
) -> Pair:
    """Sums for a layer over its inputs, sample by sample; without `old`, those are the new ones."""
    sums: Pair | None = None
    second = iter(old) if old is not None else None
    for phase, x in enumerate(new):
        now = column_blocks(node, x, rows=rows, phase=phase)
        before = (
            None if second is None else column_blocks(node, next(second), rows=rows, phase=phase)
        )
        for block in now:
            other = block if before is None else next(before)
            if sums is None:
                shape = (block.shape[0], block.shape[2])
                square = np.zeros((*shape, shape[1]))
                cross = square if before is None else np.zeros_like(square)
                sums = Pair(square, cross, np.zeros(shape), np.zeros(shape), 0)
            turned = block.transpose(0, 2, 1)
            sums.new += turned @ block
            if before is not None:
                sums.cross += turned @ other
            sums.new_mean += block.sum(axis=1, dtype=np.float64)
            sums.old_mean += other.sum(axis=1, dtype=np.float64)
            sums.count += block.shape[1]
    if sums is None or not sums.count:
        raise InputError(f"there are no samples for {ir.label(node)}")
    if not (np.isfinite(sums.new_mean).all() and np.isfinite(sums.old_mean).all()):
        raise InputError(f"the input of {ir.label(node)} holds values that are not finite")
    sums.new_mean /= sums.count
    sums.old_mean /= sums.count
    return sums


def rounded(
    weights: npt.NDArray[Any], scheme: Scheme, method: str, sums: Pair | None = None
) -> Codes:
    """Codes for a weight matrix [groups, out, k]; `sums` are needed by gptq and adaround."""
    if method == "rtn":
        return nearest(weights, scheme, search=False)
    if method == "hqq":
        return hqq(weights, scheme)
    if sums is None or method == "mse":
        diagonal = None if sums is None else np.einsum("gii->gi", sums.new)
        return nearest(weights, scheme, importance=diagonal)
    wanted = _wanted(weights.astype(np.float64), sums)
    codes = gptq(wanted, sums.new, scheme)
    for _ in range(_ROUNDS if method == "adaround" else 0):
        codes = descend(wanted, sums.new, refit(wanted, sums.new, codes))
    return codes


def _wanted(weights: Floats, sums: Pair) -> Floats:
    """The exact weights that come nearest, on the new inputs, to the old outputs."""
    if sums.new is sums.cross:
        return weights
    ridge = _RIDGE * np.einsum("gii->gi", sums.new).mean(axis=1)
    ridge = np.maximum(ridge, 1e-12)[:, None, None] * np.eye(sums.new.shape[1])
    # weights · XᵀX' · (X'ᵀX')⁻¹, drawn towards the weights where the data say nothing
    right = weights @ (sums.cross.transpose(0, 2, 1) + ridge)
    solve: Any = np.linalg.solve
    return np.ascontiguousarray(
        solve(sums.new + ridge, right.transpose(0, 2, 1)).transpose(0, 2, 1)
    )


def reconstruct(
    context: Context,
    layers: Sequence[tuple[ir.Node, Scheme]],
    method: str,
    samples: Iterable[Feeds] | None,
    *,
    sequential: bool = True,
    progress: Callable[[str], None] | None = None,
) -> dict[ir.Node, Codes]:
    """Round the weights of layers, in graph order; the model takes the rounded values as floats.

    Where `samples` are given, biases take over differences of the means. Not `sequential`, all
    layers are rounded for the inputs that they had before.
    """
    found: dict[ir.Node, Codes] = {}
    before = None
    if samples is not None and method not in ("rtn", "hqq"):
        before = files.copy(context.model)
    for node, scheme in layers:
        context.check_time()
        if progress is not None:
            progress(f"rounding: {ir.label(node)}")
        weights = ir.array(node.inputs[1])
        assert weights is not None
        matrix = weight_matrix(node, weights)
        sums = None
        if before is not None and samples is not None:
            sums = _sums(context, before, node, samples, sequential and bool(found))
        shifted = sums is not None and _takes_bias(node)
        centred = sums.centred() if sums is not None and shifted else sums
        codes = rounded(matrix, scheme, method, centred)
        found[node] = codes
        values = codes.values
        replace_constant(context, node, 1, weight_tensor(node, values, weights.shape))
        if shifted and sums is not None:
            moved = np.einsum("goi,gi->go", matrix.astype(np.float64), sums.old_mean)
            moved -= np.einsum("goi,gi->go", values, sums.new_mean)
            add_to_bias(context, node, moved.reshape(-1))
    return found


def _sums(
    context: Context, before: ir.Model, node: ir.Node, samples: Iterable[Feeds], both: bool
) -> Pair:
    value = node.inputs[0]
    assert value is not None and value.name is not None
    name = value.name
    new = (feeds[name] for feeds in tap(context.model, [name], samples))
    if not both:
        return pairs(node, new, None)
    old = (feeds[name] for feeds in tap(before, [name], samples))
    return pairs(node, new, old)


def _takes_bias(node: ir.Node) -> bool:
    """Whether a layer has a bias that is a constant per channel, or can be given one."""
    if node.op_type == "MatMul":
        return False
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    if bias is None:
        return True
    array = ir.array(bias)
    return array is not None and array.ndim == 1 and not ir.attribute(node, "beta")


def add_to_bias(context: Context, node: ir.Node, shift: Floats) -> None:
    """Add numbers per output channel to the bias of a Conv, ConvTranspose or Gemm."""
    bias = ir.array(node.inputs[2]) if len(node.inputs) > 2 else None
    if bias is not None:
        exact = np.broadcast_to(bias.astype(np.float64), shift.shape)
        replace_constant(context, node, 2, exact + shift)
        return
    tensor = ir.constant(node.inputs[1])
    assert tensor is not None and node.graph is not None
    array = shift.astype(tensor.dtype.numpy())
    value = constant_value(context, node.graph, array, f"{ir.label(node)}_bias")
    node.resize_inputs(3)
    node.replace_input_with(2, value)
