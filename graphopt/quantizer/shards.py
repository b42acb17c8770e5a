"""Sketches of a part of the samples in a file: parts of processes and machines become one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from graphopt import npz
from graphopt.errors import InputError
from graphopt.quantizer.sketch import Sketches, merged

__all__ = ["Shard", "combine"]

_FIELDS = ("shard_model", "shard_place")
_MOST = 1 << 16


@dataclass(frozen=True)
class Shard:
    """What was seen of one of several parts of the samples."""

    model: str
    """The fingerprint of the model whose tensors these are."""
    index: int
    """From 0."""
    count: int
    """How many parts there are."""
    sketches: Sketches

    def save(self, path: Path) -> None:
        """Write it to a .npz, whole or not at all. InputError for a place that cannot be."""
        place = np.array([self.index, self.count], np.int64)
        own = {"shard_model": np.array([self.model], object), "shard_place": place}
        npz.write(path, {**self.sketches.arrays(), **own})

    @classmethod
    def load(cls, path: Path) -> Shard:
        """Read what `save` wrote. InputError for another file, or one that is cut off."""
        arrays = npz.read(path)
        if any(name not in arrays for name in _FIELDS):
            raise InputError(
                f"{path}: is no part of a calibration; `graphopt calibrate` writes them"
            )
        place, model = (arrays[name] for name in _FIELDS[::-1])
        if place.shape != (2,) or model.shape != (1,) or not 0 <= place[0] < place[1] <= _MOST:
            raise InputError(f"{path}: does not say which part of a calibration it is")
        return cls(str(model[0]), int(place[0]), int(place[1]), Sketches.of(arrays, path))


def combine(paths: Sequence[Path], model: str) -> Sketches:
    """The sketches of all parts together, whatever their order.

    Raises:
        InputError: a file that holds no part, is of another model or of other tensors; a part
            that is there twice or not at all.
    """
    found: dict[int, tuple[Path, Shard]] = {}
    for path in paths:
        shard = Shard.load(path)
        first = next(iter(found.values()), (path, shard))
        if shard.model != model:
            raise InputError(f"{path}: calibrated another model, or by another graphopt")
        if shard.count != first[1].count:
            counts = f"{first[1].count} parts and {path} of {shard.count}"
            raise InputError(f"{first[0]} is one of {counts}: they do not go together")
        if set(shard.sketches.tensors) != set(first[1].sketches.tensors):
            raise InputError(f"{first[0]} and {path}: calibrated with different options")
        if shard.index in found:
            place = f"part {shard.index + 1} of {shard.count}"
            raise InputError(f"{found[shard.index][0]} and {path} are both {place}")
        found[shard.index] = path, shard
    if not found:
        raise InputError("no parts of a calibration were given")
    count = next(iter(found.values()))[1].count
    missing = ", ".join(str(i + 1) for i in range(count) if i not in found)
    if missing:
        raise InputError(f"of {count} parts of the calibration, {missing} is missing")
    return merged(found[index][1].sketches for index in range(count))
