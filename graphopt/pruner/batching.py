"""Samples joined into batches, where a model takes any number of them at once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from graphopt import files, ir
from graphopt.errors import GraphoptError
from graphopt.random_inputs import required_inputs
from graphopt.rebatching import batch_axes, compare, rebatch

__all__ = ["batched", "free_batch", "has_batch_axis"]

Array = npt.NDArray[Any]
Feeds = Mapping[str, Array]

_BATCH_NAME = "batch"


def batched(model: ir.Model, samples: Iterable[Feeds], size: int) -> Iterator[Feeds]:
    """The samples, up to `size` of them at a time joined along the first axis.

    Only where every input and output has the same free first dimension; samples of other shapes
    than their neighbours' begin a new batch. Otherwise they come one by one, as they are.
    """
    if size < 2 or not has_batch_axis(model):
        yield from samples
        return
    waiting: list[Feeds] = []
    for feeds in samples:
        if waiting and (len(waiting) == size or _inner(feeds) != _inner(waiting[0])):
            yield _joined(waiting)
            waiting = []
        waiting.append(feeds)
    if waiting:
        yield _joined(waiting)


def has_batch_axis(model: ir.Model) -> bool:
    """Whether all inputs and outputs have the same free first dimension."""
    names: set[str | None] = set()
    for value in (*required_inputs(model), *model.graph.outputs):
        first = value.shape[0] if value.shape else None
        names.add(first.value if isinstance(first, ir.SymbolicDim) else None)
    return len(names) == 1 and None not in names


def free_batch(model: ir.Model) -> ir.Model:
    """A copy that takes any number of samples at once; the model itself where it does or cannot."""
    if has_batch_axis(model):
        return model
    copy = files.copy(model)
    try:
        axes, old = batch_axes(copy, None)
        if isinstance(old, int):
            rebatch(copy, axes, old, _BATCH_NAME)
            compare(model, copy, axes, old, _BATCH_NAME)
    except GraphoptError:
        return model
    return copy if has_batch_axis(copy) else model


def _inner(feeds: Feeds) -> dict[str, tuple[int, ...]]:
    return {name: array.shape[1:] for name, array in feeds.items()}


def _joined(rows: list[Feeds]) -> Feeds:
    return {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}
