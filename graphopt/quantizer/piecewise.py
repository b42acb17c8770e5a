"""Weights in two uniform grids: a fine one around zero, a coarse one for the tails.

Source: Fang et al., "Post-Training Piecewise Linear Quantization for Deep Neural Networks", 2020,
with as many levels for the tails as for the centre. A code q of b bits stands for
`fine * c + coarse * (q - c)`, where c is q cut off at a quarter of the codes' number, so that two
scales a channel say it all.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["codes", "limit", "values"]

Floats = npt.NDArray[np.float64]
Codes = npt.NDArray[np.int8]

_CENTRES = (0.1, 0.18, 0.25, 0.32, 0.4, 0.48, 0.56, 0.65, 0.8)
"""Where the break point is tried, as a share of the largest weight."""
_REACHES = (0.5, 0.65, 0.8, 1.0)
"""The largest value that has a code, likewise."""
_FITS = 12  # rounds in which the best scales and the codes are fitted to each other
_PART = 1 << 16  # weights that are looked at together
_TRIED = 256  # weights of a channel that trials look at


def limit(bits: int) -> int:
    """The largest code of the centre; the smallest is its negative."""
    return 1 << (bits - 2)


def codes(rows: npt.NDArray[Any], bits: int) -> tuple[Codes, Floats, Floats]:
    """The codes of least squared error, and the scales of the centre and of the tails.

    Args:
        rows: [channels, n], finite.
        bits: 3 to 8.

    Returns:
        Codes [channels, n] from -2**(bits - 1) to 2**(bits - 1) - 1; scales [channels, 1], each
        exactly a float32.
    """
    step = max(1, _PART // max(1, rows.shape[1]))
    parts = [_part(rows[i : i + step], bits) for i in range(0, max(1, len(rows)), step)]
    whole, fine, coarse = (np.concatenate(found) for found in zip(*parts, strict=True))
    return whole, fine, coarse


def _part(rows: npt.NDArray[Any], bits: int) -> tuple[Codes, Floats, Floats]:
    """Those of so many channels as stay in the cache."""
    exact = rows.astype(np.float64)
    some = exact[:, :: max(1, exact.shape[1] // _TRIED)]
    largest = np.abs(exact).max(axis=1, keepdims=True, initial=0.0)
    largest[largest < 2.0**-100] = 1.0
    best = np.full(largest.shape, np.inf)
    fine = coarse = largest
    for centre in _CENTRES:
        for reach in (r for r in _REACHES if r > centre):
            starts = largest * centre / limit(bits), largest * (reach - centre) / limit(bits)
            scales = _fit(some, *starts, bits, rounds=2)
            change = values(_nearest(some, *scales, bits), *scales, bits) - some
            error = np.sum(change**2, axis=1, keepdims=True)
            fine, coarse = (
                np.where(error < best, new, old)
                for new, old in zip(scales, (fine, coarse), strict=True)
            )
            best = np.minimum(best, error)
    scales = _fit(exact, fine, coarse, bits, rounds=_FITS)
    fine, coarse = (scale.astype(np.float32).astype(np.float64) for scale in scales)
    return _nearest(exact, fine, coarse, bits), fine, coarse


def values(rounded: Codes, fine: Floats, coarse: Floats, bits: int) -> Floats:
    """What codes stand for."""
    centre = np.clip(rounded, -limit(bits), limit(bits)).astype(np.float64)
    found: Floats = centre * fine + (rounded - centre) * coarse
    return found


def _fit(
    exact: Floats, fine: Floats, coarse: Floats, bits: int, *, rounds: int
) -> tuple[Floats, Floats]:
    """Scales, and the codes that are nearest with them, fitted to each other in turn."""
    for _ in range(rounds):
        fine, coarse = _fitted(exact, _nearest(exact, fine, coarse, bits), fine, coarse, bits)
    return fine, coarse


def _nearest(exact: Floats, fine: Floats, coarse: Floats, bits: int) -> Codes:
    steps, half = limit(bits), 1 << (bits - 1)
    size = np.abs(exact)
    centre = np.minimum(np.rint(size / fine), steps)
    outer = np.maximum(np.rint((size - steps * fine) / coarse), 0)
    whole = np.sign(exact) * np.where(size <= steps * fine, centre, steps + outer)
    result: Codes = np.clip(whole, -half, half - 1).astype(np.int8)
    return result


def _fitted(
    exact: Floats, rounded: Codes, fine: Floats, coarse: Floats, bits: int
) -> tuple[Floats, Floats]:
    """The scales of least squares for codes: two equations a channel."""
    centre = np.clip(rounded, -limit(bits), limit(bits)).astype(np.float64)
    tail = rounded - centre
    cc, ct, tt, cw, tw = (
        np.einsum("ij,ij->i", a, b)[:, None]
        for a, b in ((centre, centre), (centre, tail), (tail, tail), (centre, exact), (tail, exact))
    )
    whole = cc * tt - ct * ct
    solved = whole > 1e-9 * np.maximum(cc * tt, 1e-300)
    safe = np.where(solved, whole, 1.0)
    new = np.where(solved, (cw * tt - tw * ct) / safe, fine)
    other = np.where(solved, (tw * cc - cw * ct) / safe, coarse)
    good = (new > 0) & (other > 0)
    return np.where(good, new, fine), np.where(good, other, coarse)
