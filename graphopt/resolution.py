"""The smaller resolutions that a model for images could have, to meet a budget of operations."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from graphopt import ir
from graphopt.context import Context
from graphopt.passes.reduce_resolution import Resized, planes, reduce_resolution
from graphopt.pruner.estimating import operations
from graphopt.random_inputs import required_inputs
from graphopt.samples import Samples

__all__ = ["Resolution", "Resolutions"]

_STEPS = 8
"""In so many steps a side goes at least, powers of two, which keep the maps within even."""
_LEAST = 0.5
"""Share of a side: the two pixels that an interpolation looks at pass others over below it."""


@dataclass(frozen=True)
class Resolution:
    """A model on smaller images than it is given."""

    model: ir.Model
    share: float
    """Of each side that is left."""
    work: float
    """Of the operations that is left."""
    resized: list[Resized]


class Resolutions:
    """Those of one model, made as they are asked for."""

    def __init__(self, model: ir.Model, samples: Samples) -> None:
        self._model, self._samples = model, samples
        self._whole = operations(model, samples)
        self._known: dict[int, Resolution | None] = {}
        self.refused: dict[str, str] = {}
        """Inputs of images that stay as large as they are, and why."""
        first = next(iter(samples))
        images = [(v.name or "", found[0]) for v in required_inputs(model) if (found := planes(v))]
        self._side = min((first[name].shape[i] for name, axes in images for i in axes), default=0)
        self._unit = 1 << max(self._side // _STEPS, 1).bit_length() - 1

    def within(self, limit: float) -> Iterator[Resolution]:
        """The largest of several grids that take a share of the operations at most."""
        sizes: set[int] = set()
        for unit in (2 * self._unit, self._unit, self._unit // 2):
            if unit < 1:
                continue
            size = int(self._side * math.sqrt(limit)) // unit * unit + unit
            found = self._at(size)
            while size >= self._side or (found is not None and found.work > limit):
                size -= unit
                found = self._at(size)
            if found is not None and size not in sizes:
                sizes.add(size)
                yield found

    def between(self, limit: float) -> Resolution | None:
        """One that takes about half the way to a share of the operations."""
        half = self._side * limit**0.25
        found = self._at(round(half / self._unit) * self._unit)
        return found if found is not None and limit < found.work < 1 else None

    def descending(self) -> Iterator[Resolution]:
        """Smaller and smaller ones."""
        for size in range(self._side - self._unit, 0, -self._unit):
            found = self._at(size // self._unit * self._unit)
            if found is None:
                return
            yield found

    def apply(self, model: ir.Model, resolution: Resolution) -> ir.Model:
        """A relative of the model, made of it by pruning, at the same resolution."""
        context = Context(model, samples=self._samples)
        reduce_resolution(context, resolution.share)
        return context.model

    def _at(self, size: int) -> Resolution | None:
        """The model with so many pixels along the shorter side."""
        if not _LEAST * self._side <= size < self._side:
            return None
        if size not in self._known:
            context = Context(self._model, samples=self._samples)
            share = size / self._side
            resized = reduce_resolution(context, share)
            for reason, inputs in context.record.refusals.items() if not resized else ():
                self.refused.update(dict.fromkeys(inputs, reason))
            work = operations(context.model, self._samples) / self._whole
            self._known[size] = Resolution(context.model, share, work, resized) if resized else None
        return self._known[size]
