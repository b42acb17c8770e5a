"""Batches changed at random, so that few samples go a long way in training.

Whatever comes of it, the unpruned model says what is right for it, so that nothing needs a label.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["blended", "mirrored", "shifted"]

Array = npt.NDArray[Any]
Feeds = Mapping[str, Array]

_COLOURS = 4
"""An image has at most so many channels; what has more is a map of features."""
_SHIFT = 8
"""Images are shifted by up to an eighth of their size."""


def plane(array: Array) -> tuple[int, int] | None:
    """The axes of height and width of a batch of images; None of anything else."""
    if array.ndim != 4 or array.dtype.kind != "f":
        return None
    first, last = array.shape[1] <= _COLOURS, array.shape[3] <= _COLOURS
    if first == last:
        return None
    return (2, 3) if first else (1, 2)


def mirrored(feeds: Feeds) -> dict[str, Array] | None:
    """All images seen from behind; None where there are none."""
    if not any(plane(array) for array in feeds.values()):
        return None
    found: dict[str, Array] = {}
    for name, array in feeds.items():
        axes = plane(array)
        found[name] = array if axes is None else np.ascontiguousarray(np.flip(array, axes[1]))
    return found


def shifted(feeds: Feeds, rng: np.random.Generator) -> dict[str, Array]:
    """Images moved a little, zeros coming in; everything else as it is."""
    found = dict(feeds)
    for name, array in feeds.items():
        axes = plane(array)
        if axes is None:
            continue
        source = [slice(0, size) for size in array.shape]
        target = list(source)
        for axis in axes:
            size = array.shape[axis]
            (step,) = rng.integers(-(size // _SHIFT), size // _SHIFT + 1, 1).tolist()
            source[axis] = slice(max(-step, 0), size - max(step, 0))
            target[axis] = slice(max(step, 0), size - max(-step, 0))
        found[name] = np.zeros_like(array)
        found[name][tuple(target)] = array[tuple(source)]
    return found


def blended(feeds: Feeds, rng: np.random.Generator) -> dict[str, Array] | None:
    """A batch whose samples are mixed with each other, or have a part of another put in.

    None where that makes no sense: inputs that are no real numbers, or a batch of one. (Zhang et
    al. 2018, mixup; Yun et al. 2019, CutMix.)
    """
    count = min((array.shape[0] if array.ndim else 0) for array in feeds.values())
    if count < 2 or any(a.dtype.kind != "f" or a.shape[0] != count for a in feeds.values()):
        return None
    others = rng.permutation(count)
    found: dict[str, Array] = {}
    cut = rng.random() < 0.5
    for name, array in feeds.items():
        axes = plane(array)
        spatial = axes or tuple(i for i in range(2, array.ndim) if array.shape[i] > _COLOURS)
        if not cut or not spatial:
            share = rng.random((count, *[1] * (array.ndim - 1)))
            found[name] = (share * array + (1 - share) * array[others]).astype(array.dtype)
            continue
        where = [slice(None)] * array.ndim
        for axis in spatial:
            start, end = sorted(rng.integers(0, array.shape[axis] + 1, 2).tolist())
            where[axis] = slice(start, end)
        found[name] = array.copy()
        found[name][tuple(where)] = array[others][tuple(where)]
    return found
