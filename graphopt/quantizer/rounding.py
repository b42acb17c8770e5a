"""Weights rounded to a few bits: scales by search, codes by nearest value, GPTQ or descent.

Matrices are [groups, out, k] as `gram.weight_matrix` makes them; a scale belongs to a row, or to
a block of consecutive weights of a row. Errors are measured by XᵀX of the inputs where it is
given: the squared change of the layer's output is tr(E·XᵀX·Eᵀ) for a change E of its weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from graphopt.lowrank import factor

__all__ = ["Codes", "Scheme", "descend", "gptq", "hqq", "loss", "nearest", "refit"]

Floats = npt.NDArray[np.float64]

_SHRINKS = 40
_DAMPING = 0.01
_LAZY = 64  # columns whose corrections GPTQ applies at once to those behind them


@dataclass(frozen=True)
class Scheme:
    """How weights are written down."""

    bits: int
    symmetric: bool = True
    block: int = 0
    """Consecutive weights of a row that share a scale; 0 for the whole row."""

    @property
    def highest(self) -> int:
        """The largest code; the smallest is `lowest`."""
        return (1 << (self.bits - 1)) - 1 if self.symmetric else (1 << self.bits) - 1

    @property
    def lowest(self) -> int:
        """The smallest code; symmetric 8 bits leave -128 out, as integer kernels like it."""
        if not self.symmetric:
            return 0
        return -self.highest if self.bits == 8 else -self.highest - 1

    def average(self, k: int) -> float:
        """Bits a weight takes in a row of k, scales of 32 bits and zero points included."""
        size = self.block or k
        return self.bits + (32 + (0 if self.symmetric else self.bits)) / size


@dataclass
class Codes:
    """Rounded weights: `(codes - zero) * scale`, a scale for each block of a row."""

    scheme: Scheme
    codes: npt.NDArray[np.int16]
    """[groups, out, k]"""
    scale: Floats
    """[groups, out, blocks], positive, each exactly a float32."""
    zero: npt.NDArray[np.int16]
    """[groups, out, blocks]; 0 where symmetric."""

    def spread(self, per_block: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Numbers of blocks repeated for each weight: [groups, out, k] (or a broadcast of it)."""
        k = self.codes.shape[2]
        if per_block.shape[2] == 1:
            return per_block
        return np.repeat(per_block, self.scheme.block, axis=2)[:, :, :k]

    @property
    def values(self) -> Floats:
        """The weights that these codes stand for."""
        whole = (self.codes - self.spread(self.zero)).astype(np.float64)
        values: Floats = whole * self.spread(self.scale)
        return values

    def round(self, weights: Floats) -> npt.NDArray[np.int16]:
        """The nearest codes of weights of the same shape."""
        whole = np.rint(weights / self.spread(self.scale)) + self.spread(self.zero)
        limited = np.clip(whole, self.scheme.lowest, self.scheme.highest)
        codes: npt.NDArray[np.int16] = limited.astype(np.int16)
        return codes


def _blocks(weights: Floats, block: int) -> Floats:
    """[groups, out, blocks, size]; a last block that is short is filled with zeros."""
    groups, out, k = weights.shape
    size = block or k
    count = -(-k // size)
    if count * size != k:
        weights = np.pad(weights, [(0, 0), (0, 0), (0, count * size - k)])
    return weights.reshape(groups, out, count, size)


def _parameters(low: Floats, high: Floats, scheme: Scheme) -> tuple[Floats, Floats]:
    """Scale and zero point of ranges that contain 0."""
    if scheme.symmetric:
        scale = np.maximum(high / scheme.highest, -low / -scheme.lowest)
    else:
        scale = (high - low) / scheme.highest
    scale = scale.astype(np.float32).astype(np.float64)
    scale[scale < 2.0**-100] = 1.0
    zero = np.zeros_like(scale)
    if not scheme.symmetric:
        zero = np.clip(np.rint(-low / scale), 0, scheme.highest)
    return scale, zero


def nearest(
    weights: npt.NDArray[Any],
    scheme: Scheme,
    *,
    importance: Floats | None = None,
    search: bool = True,
) -> Codes:
    """Weights rounded to the nearest codes.

    With `search`, each block takes the scale, out of a grid of ranges that cut its largest weights
    off, of the least squared error; `importance` [groups, k] weighs it (the diagonal of XᵀX).
    """
    exact = weights.astype(np.float64)
    parts = _blocks(exact, scheme.block)
    low = np.minimum(parts.min(axis=3), 0)
    high = np.maximum(parts.max(axis=3), 0)
    if scheme.symmetric:
        reach = np.maximum(high, -low)
        low, high = -reach * (scheme.highest / -scheme.lowest), reach
    weight = None if importance is None else _blocks(importance[:, None, :], scheme.block)
    scale, zero = _parameters(low, high, scheme)
    if search and scheme.bits < 16:
        scale, zero = _searched(parts, low, high, scheme, weight)
    codes = Codes(scheme, np.zeros(exact.shape, np.int16), scale, zero.astype(np.int16))
    codes.codes = codes.round(exact)
    return codes


def _searched(
    parts: Floats, low: Floats, high: Floats, scheme: Scheme, weight: Floats | None
) -> tuple[Floats, Floats]:
    best_error = np.full(low.shape, np.inf)
    best_scale, best_zero = _parameters(low, high, scheme)
    exact = parts.astype(np.float32)
    change = np.empty_like(exact)
    importance = None if weight is None else weight[:, 0].astype(np.float32)
    narrowest = 0.35 if scheme.bits <= 4 else 0.8
    for share in np.linspace(1.0, narrowest, _SHRINKS if scheme.bits <= 4 else 11):
        scale, zero = _parameters(low * share, high * share, scheme)
        narrow = scale[..., None].astype(np.float32)
        bounds = ((limit - zero)[..., None] for limit in (scheme.lowest, scheme.highest))
        lowest, highest = (bound.astype(np.float32) for bound in bounds)
        np.multiply(exact, 1 / narrow, out=change)
        np.rint(change, out=change)
        np.maximum(change, lowest, out=change)
        np.minimum(change, highest, out=change)
        change *= narrow
        change -= exact
        if importance is None:
            error = np.einsum("gobi,gobi->gob", change, change)
        else:
            change *= change
            error = np.einsum("gobi,gbi->gob", change, importance)
        better = error < best_error
        best_error[better] = error[better]
        best_scale[better], best_zero[better] = scale[better], zero[better]
    return best_scale, best_zero


def hqq(weights: npt.NDArray[Any], scheme: Scheme, *, rounds: int = 20) -> Codes:
    """Half-quadratic quantization: the zero point is fitted under a norm that forgives outliers.

    Source: Badri and Shaji, "Half-Quadratic Quantization of Large Machine Learning Models", 2023:
    shrink the errors with an l_0.7 prox, then move the zero point to the mean of what is left.
    Zero points are rounded to integers here, since the formats that are written have no others.
    """
    codes = nearest(weights, scheme, search=True)
    if scheme.symmetric:
        return codes
    exact = weights.astype(np.float64)
    parts = _blocks(exact, scheme.block)
    scale, zero = codes.scale[..., None], codes.zero.astype(np.float64)[..., None]
    start, beta, best, kept = zero, 10.0, np.inf, zero
    for _ in range(rounds):
        whole = np.clip(np.rint(parts / scale + zero), 0, scheme.highest)
        change = parts - (whole - zero) * scale
        error = float(np.abs(change).mean())
        if error >= best:
            break
        best, kept = error, zero
        size = np.abs(change)
        with np.errstate(divide="ignore"):
            shrunk = np.sign(change) * np.maximum(size - size ** (0.7 - 1) / beta, 0)
        zero = (whole - (parts - shrunk) / scale).mean(axis=3, keepdims=True)
        beta *= 1.01
    moved = np.clip(np.rint(kept if best < np.inf else start), 0, scheme.highest)
    codes.zero = moved[..., 0].astype(np.int16)
    codes.codes = codes.round(exact)
    return codes


def damped(xtx: Floats, amount: float = _DAMPING) -> Floats:
    """XᵀX [groups, k, k] with a share of its mean diagonal added to the diagonal."""
    diagonal = np.einsum("gii->gi", xtx)
    extra = amount * diagonal.mean(axis=1, keepdims=True)
    extra[extra <= 0] = 1.0
    result = xtx.copy()
    np.einsum("gii->gi", result)[...] += extra
    return result


def loss(weights: npt.NDArray[Any], values: Floats, xtx: Floats) -> Floats:
    """The squared change of the outputs [groups, out] when `values` stand for weights."""
    change = values - weights
    errors: Floats = np.einsum("goi,goi->go", change @ xtx, change)
    return errors


def gptq(
    weights: npt.NDArray[Any], xtx: Floats, scheme: Scheme, start: Codes | None = None
) -> Codes:
    """Column by column, each rounding error made up for by the columns that are still exact.

    Source: Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
    Transformers", 2022, with columns in the order of falling diagonals (act-order), the Hessian
    damped by 1 % of its mean diagonal, and scales fixed beforehand: those of `start`, else searched
    for with the diagonal as weight. Computed as LDLQ, which gives the same codes without an inverse
    (Chee et al., "QuIP", 2023, theorem 6): with XᵀX = (U + 1) D (U + 1)ᵀ and U above the diagonal,
    a column is rounded after the errors of those before it are added to it, times its column of U.
    """
    hessian = damped(xtx)
    diagonal = np.einsum("gii->gi", hessian)
    codes = start or nearest(weights, scheme, importance=diagonal)
    order = np.argsort(-diagonal, axis=1, kind="stable")
    upper = _upper(hessian, order)
    del hessian
    groups, out, k = weights.shape
    exact = np.take_along_axis(weights.transpose(0, 2, 1), order[:, :, None], axis=1)
    errors = np.zeros((groups, k, out), np.float32)
    done = np.zeros((groups, k, out), np.int16)
    rows = np.arange(int(groups))
    scales, zeros = (part.transpose(0, 2, 1) for part in (codes.scale, codes.zero))
    for begin in range(0, k, _LAZY):
        end = min(begin + _LAZY, k)
        left = upper[:, :begin, begin:end].transpose(0, 2, 1) @ errors[:, :begin]
        for i in range(begin, end):
            near = upper[:, begin:i, None, i].transpose(0, 2, 1) @ errors[:, begin:i]
            column = exact[:, i].astype(np.float64)
            block = order[:, i] // (scheme.block or k)
            scale, zero = scales[rows, block], zeros[rows, block]
            wanted = (column + left[:, i - begin] + near[:, 0]) / scale
            whole = np.clip(np.rint(wanted) + zero, scheme.lowest, scheme.highest)
            done[:, i] = whole
            errors[:, i] = column - (whole - zero) * scale
    result = np.empty_like(done)
    np.put_along_axis(result, order[:, :, None], done, axis=1)
    result = np.ascontiguousarray(result.transpose(0, 2, 1))
    return Codes(scheme, result, codes.scale, codes.zero)


def _upper(hessian: Floats, order: npt.NDArray[np.intp]) -> npt.NDArray[np.float32]:
    """The factor U + 1 of (U + 1) D (U + 1)ᵀ, of a matrix whose rows and columns are reordered."""
    reverse = order[:, ::-1]
    turned = np.take_along_axis(hessian, reverse[:, :, None], axis=1)
    turned = np.take_along_axis(turned, reverse[:, None, :], axis=2)
    lower = factor(turned)
    lower /= np.einsum("gii->gi", lower)[:, None, :]
    return lower[:, ::-1, ::-1].astype(np.float32)


def descend(weights: npt.NDArray[Any], xtx: Floats, codes: Codes, *, sweeps: int = 10) -> Codes:
    """Codes changed one column at a time, as long as that lowers the error of the outputs.

    AdaRound's objective (Nagel et al., "Up or Down? Adaptive Rounding for Post-Training
    Quantization", 2020), the layer's squared output error, minimized by cyclic coordinate descent
    instead of a relaxation (Behdin et al., "QuantEase", 2023): with all other columns fixed, the
    best code of a weight is known in closed form. The error never rises.
    """
    hessian = damped(xtx)
    diagonal = np.einsum("gii->gi", hessian)
    scheme = codes.scheme
    scale = np.broadcast_to(codes.spread(codes.scale), codes.codes.shape)
    zero = np.broadcast_to(codes.spread(codes.zero), codes.codes.shape)
    current = codes.codes.astype(np.float64)
    change = (current - zero) * scale - weights
    gradient = change @ hessian
    k = current.shape[2]
    for _ in range(sweeps):
        moved = False
        for begin in range(0, k, _LAZY):
            end = min(begin + _LAZY, k)
            steps = np.zeros((*current.shape[:2], end - begin))
            for i in range(begin, end):
                pull = gradient[:, :, i] / (diagonal[:, i][:, None] * scale[:, :, i])
                wanted = np.clip(np.rint(current[:, :, i] - pull), scheme.lowest, scheme.highest)
                step = (wanted - current[:, :, i]) * scale[:, :, i]
                if not step.any():
                    continue
                current[:, :, i] = wanted
                steps[:, :, i - begin] = step
                gradient[:, :, i:end] += step[:, :, None] * hessian[:, i, None, i:end]
                moved = True
            # The columns of this block that stand before a change, and all others.
            if steps.any():
                inner = np.tril(np.ones((end - begin, end - begin)), -1)
                gradient[:, :, begin:end] += steps @ (hessian[:, begin:end, begin:end] * inner)
                gradient[:, :, :begin] += steps @ hessian[:, begin:end, :begin]
                gradient[:, :, end:] += steps @ hessian[:, begin:end, end:]
        if not moved:
            break
    return Codes(scheme, current.astype(np.int16), codes.scale, codes.zero)


def refit(weights: npt.NDArray[Any], xtx: Floats, codes: Codes) -> Codes:
    """The scale of each row that fits its codes best, in closed form; rows of one block only."""
    if codes.scale.shape[2] != 1:
        return codes
    hessian = damped(xtx)
    shape = (codes.codes - codes.zero).astype(np.float64)
    towards = shape @ hessian
    own = np.einsum("goi,goi->go", towards, shape)
    with_weights = np.einsum("goi,goi->go", towards, weights.astype(np.float64))
    scale = np.where(own > 0, with_weights / np.where(own > 0, own, 1), 0)
    near = np.abs(scale / codes.scale[:, :, 0] - 1) < 0.5
    scale = np.where(near, scale, codes.scale[:, :, 0]).astype(np.float32).astype(np.float64)
    return Codes(codes.scheme, codes.codes, scale[:, :, None], codes.zero)
