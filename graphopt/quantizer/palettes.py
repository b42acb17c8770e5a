"""Palettes: weights as indices into a few shared values, and indices as packed bytes.

Scalar palettes come from Lloyd's algorithm (Lloyd 1982, "Least squares quantization in PCM") on
sorted values, where a cluster is a range and prefix sums give its mean, so that an iteration costs
a search per palette entry and not a pass over the weights. Vector palettes are plain k-means with
the seeding of k-means++ (Arthur and Vassilvitskii 2007).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]

_ROUNDS = 60
_SETTLED = 1e-5  # relative gain of a round below which no more follow
_TRAINED = 1 << 16  # vectors from which a palette of vectors is learnt, at most
_BLOCK = 1 << 22  # distances held at once
_PLANES = (4, 2, 1)


def cluster(values: npt.NDArray[Any], count: int) -> tuple[Floats, Bytes]:
    """The palette of `count` (at most 256) values with the least squared error.

    Args:
        values: any shape, finite.

    Returns:
        The palette, ascending, float32 [count], and the index of each value, uint8, same shape.
    """
    flat = values.astype(np.float32).ravel()
    ordered = np.sort(flat)
    sums = np.concatenate(([0.0], np.cumsum(ordered, dtype=np.float64)))
    palette = _start(ordered, count)
    last = np.inf
    for _ in range(_ROUNDS):
        cuts = np.searchsorted(ordered, (palette[1:] + palette[:-1]) / 2)
        edges = np.concatenate(([0], cuts, [flat.size]))
        sizes, totals = np.diff(edges), np.diff(sums[edges])
        palette = np.sort(np.divide(totals, sizes, out=palette.copy(), where=sizes > 0))
        gain = -float(np.sum(np.divide(totals**2, sizes, out=np.zeros(count), where=sizes > 0)))
        if last - gain <= _SETTLED * abs(gain):
            break
        last = gain
    single = palette.astype(np.float32)
    index = np.searchsorted((single[1:] + single[:-1]) / 2, flat)
    return single, index.astype(np.uint8).reshape(values.shape)


def _start(ordered: Floats, count: int) -> npt.NDArray[np.float64]:
    """Where Lloyd's algorithm begins: entries as dense as the cube root of the values' density.

    That is their density in the best palette of many entries (Panter and Dite 1951).
    """
    low, high = float(ordered[0]), float(ordered[-1])
    if high <= low:
        return low + np.arange(count, dtype=np.float64) * (max(abs(low), 1.0) * 1e-6)
    density, edges = np.histogram(ordered, bins=1024, range=(low, high))
    share = np.concatenate(([0.0], np.cumsum(np.cbrt(density.astype(np.float64)))))
    places = (np.arange(count) + 0.5) / count * share[-1]
    interpolate: Any = np.interp
    start: npt.NDArray[np.float64] = interpolate(places, share, edges)
    return start


def cluster_vectors(vectors: npt.NDArray[Any], count: int) -> tuple[Floats, Bytes]:
    """A palette of vectors.

    Args:
        vectors: [n, width], finite; at most 65,536 of them, evenly spread, are learnt from.

    Returns:
        The palette, float32 [count, width], and the index of each vector, uint8 [n].
    """
    every = vectors.astype(np.float32)
    trained = every[np.linspace(0, len(every) - 1, min(len(every), _TRAINED)).astype(np.int64)]
    palette = _seeds(trained, count)
    last = np.inf
    for _ in range(_ROUNDS // 3):
        index, error = _nearest(trained, palette)
        sizes = np.bincount(index, minlength=count)
        for axis in range(trained.shape[1]):
            sums = np.bincount(index, trained[:, axis], minlength=count)
            np.divide(sums, sizes, out=palette[:, axis], where=sizes > 0)
        if last - error <= 1e-4 * abs(last):
            break
        last = error
    return palette, _nearest(every, palette)[0].astype(np.uint8)


def _seeds(vectors: Floats, count: int) -> Floats:
    rng = np.random.default_rng(0)
    chosen = np.empty((count, vectors.shape[1]), np.float32)
    chosen[0] = vectors[len(vectors) // 2]
    distance = np.full(len(vectors), np.inf)
    for entry in range(1, count):
        distance = np.minimum(distance, np.sum((vectors - chosen[entry - 1]) ** 2, axis=1))
        total = float(distance.sum())
        if total <= 0:
            chosen[entry:] = chosen[0]
            break
        place = np.searchsorted(np.cumsum(distance), rng.random() * total)
        chosen[entry] = vectors[min(int(place), len(vectors) - 1)]
    return chosen


def _nearest(vectors: Floats, palette: Floats) -> tuple[npt.NDArray[np.int64], float]:
    """For each vector the nearest entry, and the summed squared distance."""
    norms = np.sum(palette**2, axis=1)
    index = np.empty(len(vectors), np.int64)
    error = 0.0
    step = max(1, _BLOCK // len(palette))
    for start in range(0, len(vectors), step):
        part = vectors[start : start + step]
        distances = norms - 2 * (part @ palette.T)
        nearest = distances.argmin(axis=1)
        index[start : start + step] = nearest
        least = np.take_along_axis(distances, nearest[:, None], axis=1)
        error += float(np.sum(least, dtype=np.float64) + np.sum(part**2, dtype=np.float64))
    return index, error


def planes(bits: int) -> list[int]:
    """Widths in bits that add up to `bits` and each fill bytes evenly: 6 is 4 and 2."""
    if bits == 8:
        return [8]
    widths: list[int] = []
    for width in _PLANES:
        if bits >= width:
            widths.append(width)
            bits -= width
    return widths


def pack(index: Bytes, width: int) -> Bytes:
    """Numbers below 2**width as bytes, [n] to [ceil(n * width / 8)].

    Number i of a byte is number `i * len(result) + j` of the input: to unpack, shift all bytes
    and put the results one after the other.
    """
    per_byte = 8 // width
    size = -(-index.size // per_byte)
    parts = np.zeros((per_byte, size), np.uint8)
    parts.ravel()[: index.size] = index.ravel()
    shifts = (np.arange(per_byte, dtype=np.uint8) * width)[:, None]
    packed: Bytes = np.bitwise_or.reduce(parts << shifts, axis=0)
    return packed
