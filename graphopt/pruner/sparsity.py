"""Zeros in weights, unstructured or N of M, chosen and made up for by XᵀX of the layer's input.

`magnitude` keeps the largest weights. `wanda` keeps the largest products of a weight and the norm
of what it multiplies (Sun et al., "A Simple and Effective Pruning Approach for LLMs", 2023).
`sparsegpt` takes weights out column by column, each time where the layer's squared output error
grows least, and lets the columns to the right make up for it (Frantar and Alistarh, "SparseGPT",
2023, after the Optimal Brain Surgeon of Hassibi and Stork, 1993).

Matrices are [groups, out, k] as `gram.weight_matrix` makes them, XᵀX [groups, k, k].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, cast

import numpy as np
import numpy.typing as npt

from graphopt.errors import InputError
from graphopt.lowrank import factor

Floats = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]
Method = Literal["magnitude", "wanda", "sparsegpt"]

_DAMPING = 0.1  # of the mean square of inputs: other data than the samples may be unlike them
_TURNS, _EFFORT = 8, 1e11  # of refitting what is left, at most; and its operations for a matrix
_BLOCK = 128  # columns for which a mask is chosen at once; corrections go through in such blocks


@dataclass(frozen=True)
class Pattern:
    """Which weights may go: a share of each row (`keep` of 1), or all but N of each M in a row."""

    share: float
    """Of the weights, 0 to 1."""
    n: int = 0
    m: int = 0

    @classmethod
    def parse(cls, text: str) -> Pattern:
        """`0.5`, or `2:4` for two left of each four.

        Raises:
            InputError: neither, or a share outside 0 to 1.
        """
        left, colon, right = text.strip().partition(":")
        try:
            if not colon:
                share = float(left)
                if 0 < share < 1:
                    return cls(share)
            else:
                n, m = int(left), int(right)
                if 0 < n < m <= _BLOCK and _BLOCK % m == 0:
                    return cls(1 - n / m, n, m)
        except ValueError:
            pass
        raise InputError(f"a sparsity is a share like 0.5 or a pattern like 2:4, not {text!r}")

    def fits(self, k: int) -> bool:
        """Whether rows of k weights can have the pattern."""
        return not self.m or k % self.m == 0

    def dropped(self, scores: Floats) -> Mask:
        """True for the weights with the lowest scores, by row or by M of a row; [.., k]."""
        if self.m:
            parts = scores.reshape(*scores.shape[:-1], -1, self.m)
            ranks = parts.argsort(axis=-1, kind="stable").argsort(axis=-1, kind="stable")
            return (ranks < self.m - self.n).reshape(scores.shape)
        count = round(self.share * scores.shape[-1])
        ranks = scores.argsort(axis=-1, kind="stable").argsort(axis=-1, kind="stable")
        dropped: Mask = ranks < count
        return dropped


def sparsify(
    weights: npt.NDArray[Any], pattern: Pattern, method: Method, xtx: Floats | None = None
) -> Floats:
    """Weights [groups, out, k] with zeros, the others corrected where the method does so.

    Raises:
        InputError: a method that needs XᵀX without it.
    """
    exact = weights.astype(np.float64)
    if method == "magnitude":
        return np.where(pattern.dropped(np.abs(exact)), 0.0, exact)
    if xtx is None:
        raise InputError(f"the method {method!r} needs data")
    if method == "wanda":
        norms = np.sqrt(np.einsum("gkk->gk", xtx))[:, None, :]
        return np.where(pattern.dropped(np.abs(exact) * norms), 0.0, exact)
    return np.stack([_surgeon(w, h, pattern) for w, h in zip(exact, xtx, strict=True)])


def caught_up(weights: npt.NDArray[Any], xtx: Floats, cross: Floats) -> Floats:
    """Weights [groups, out, k] that make of inputs X what these made of the earlier X₀.

    By ridge regression, from XᵀX and X₀ᵀX [groups, k, k]: errors of earlier layers are made up for
    (He et al., "Channel Pruning for Accelerating Very Deep Neural Networks", 2017).
    """
    k = xtx.shape[-1]
    damping = _DAMPING * np.einsum("gkk->g", xtx) / k
    held = np.maximum(damping, 1e-12)[:, None, None] * np.eye(k)
    aim = np.matmul(weights.astype(np.float64), cross + held)
    found = cast("Floats", np.linalg.solve(xtx + held, aim.transpose(0, 2, 1)))
    return found.transpose(0, 2, 1)


def _surgeon(weights: Floats, xtx: Floats, pattern: Pattern) -> Floats:
    """SparseGPT for one matrix [out, k]; columns with an input that is always zero go first."""
    w, h = weights.copy(), xtx.copy()
    k = len(h)
    dead = np.diag(h) == 0
    h[dead, dead] = 1.0
    w[:, dead] = 0.0
    whole = w.copy()
    h[np.diag_indices(k)] += _DAMPING * float(np.mean(np.diag(h)))
    # The upper factor of the inverse holds, row by row, what remains after each column is settled.
    inverse = factor(np.linalg.inv(h).astype(np.float64)).T
    costs = np.diag(inverse)
    dropped = np.zeros(w.shape, np.bool_)
    for start in range(0, k, _BLOCK):
        stop = min(start + _BLOCK, k)
        if not pattern.m:  # a share of the block, however it is spread over its rows
            scores = (w[:, start:stop] / costs[start:stop]) ** 2
            dropped[:, start:stop] = pattern.dropped(scores.reshape(1, -1)).reshape(scores.shape)
        errors = np.empty((len(w), stop - start))
        for column in range(start, stop):
            if pattern.m and column % pattern.m == 0:
                part = slice(column, column + pattern.m)
                dropped[:, part] = pattern.dropped((w[:, part] / costs[part]) ** 2)
            gone = np.where(dropped[:, column], w[:, column], 0.0)
            w[:, column] -= gone
            error = gone / inverse[column, column]
            w[:, column + 1 : stop] -= np.outer(error, inverse[column, column + 1 : stop])
            errors[:, column - start] = error
        w[:, stop:] -= errors @ inverse[start:stop, stop:]
    w[dropped] = 0.0
    turns = min(_TURNS, int(_EFFORT / (2 * len(w) * k * k)))
    return _settled(w, ~dropped, h, whole @ h, turns)


def _settled(w: Floats, kept: Mask, h: Floats, aim: Floats, turns: int) -> Floats:
    """What is left of each row [out, k] brought nearer to w @ h = aim, its least squares.

    Corrections only went to the right until here. By conjugate gradients, all rows at once, after
    division by the diagonal (Saad, "Iterative methods for sparse linear systems", 2003).
    """
    scale = 1 / np.diag(h)
    rest = np.where(kept, aim - w @ h, 0.0)
    step = ahead = rest * scale
    size = np.sum(rest * ahead, axis=1, keepdims=True)
    for _ in range(turns):
        turned = np.where(kept, step @ h, 0.0)
        length = size / np.maximum(np.sum(step * turned, axis=1, keepdims=True), 1e-300)
        w, rest = w + length * step, rest - length * turned
        ahead = rest * scale
        before, size = size, np.sum(rest * ahead, axis=1, keepdims=True)
        step = ahead + size / np.maximum(before, 1e-300) * step
    return w
