"""What calibration keeps of a tensor: a few kilobytes, whatever the number of samples.

A sketch has the extremes, the moments, and a histogram of 2,048 bins whose width is a power of
two and which starts at a fixed place of that grid: at zero while no value is negative, else in
the middle. When a value lies outside, neighbouring bins are added up pair by pair until it fits.
So two sketches always have a common grid, and merging is addition: of parts of the data, of
processes, of a run that was cut off and its continuation.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from graphopt import npz
from graphopt.errors import InputError

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float64]
Counts = npt.NDArray[np.int64]

BINS = 2048
_CHUNK = 1 << 15  # elements that stay in the cache between the steps
_FINEST = -60  # exponent of the narrowest bins
_SCALARS = ("low", "high", "total", "zeros", "sum", "squares", "batches", "lows", "highs")


@dataclass
class Sketch:
    """Statistics of one tensor's values; empty to begin with."""

    low: float = math.inf
    high: float = -math.inf
    total: int = 0
    """Values seen."""
    zeros: int = 0
    """Those that are exactly zero, which every quantization keeps."""
    sum: float = 0.0
    squares: float = 0.0
    batches: int = 0
    """Arrays seen; `lows` and `highs` add up their extremes."""
    lows: float = 0.0
    highs: float = 0.0
    exponent: int = _FINEST
    """Bins are 2**exponent wide."""
    start: int = 0
    """Index, from zero's, of the first bin: 0 or -BINS/2."""
    counts: Counts = field(default_factory=lambda: np.zeros(BINS, np.int64))

    def add(self, array: Array, name: str = "a tensor") -> None:
        """Add the values of a float or integer array.

        Raises InputError, with `name`, for values that are infinite or no numbers.
        """
        if not array.size:
            return
        low, high = float(array.min()), float(array.max())
        if not (math.isfinite(low) and math.isfinite(high)):
            raise InputError(f"the values of {name!r} are not all finite")
        self._cover(low, high)
        flat = np.ascontiguousarray(array).reshape(-1)
        scale = np.float32(2.0**-self.exponent)
        for begin in range(0, flat.size, _CHUNK):
            chunk = flat[begin : begin + _CHUNK].astype(np.float32, copy=False)
            place = chunk * scale  # exact: so parts that are merged give what the whole gives
            if self.start:
                np.floor(place, out=place)
            index = place.astype(np.int64)
            index -= self.start
            np.minimum(index, BINS - 1, out=index)
            self.counts += np.bincount(index, minlength=BINS)
            self.zeros += chunk.size - int(np.count_nonzero(chunk))
            self.sum += float(chunk.sum(dtype=np.float64))
            self.squares += _squares(chunk)
        self.low, self.high = min(self.low, low), max(self.high, high)
        self.total += flat.size
        self.batches += 1
        self.lows += low
        self.highs += high

    def merge(self, other: Sketch) -> None:
        """Add what another sketch has seen."""
        if not other.total:
            return
        exponent = max(self.exponent, other.exponent)
        start = min(self.start, other.start)
        if start and not (self.start and other.start):
            unsigned = other if self.start else self
            exponent = max(exponent, unsigned.exponent + 1)
        moved = other._regridded(exponent, start)
        self.counts = self._regridded(exponent, start) + moved
        self.exponent, self.start = exponent, start
        self.low, self.high = min(self.low, other.low), max(self.high, other.high)
        for name in _SCALARS[2:]:
            setattr(self, name, getattr(self, name) + getattr(other, name))

    @property
    def width(self) -> float:
        """Of a bin."""
        return 2.0**self.exponent

    @property
    def mean(self) -> float:
        """Of all values; 0 without any."""
        return self.sum / self.total if self.total else 0.0

    @property
    def power(self) -> float:
        """Mean square."""
        return self.squares / self.total if self.total else 0.0

    def edges(self) -> Floats:
        """The BINS + 1 borders between bins."""
        return (np.arange(BINS + 1, dtype=np.float64) + self.start) * self.width

    def _cover(self, low: float, high: float) -> None:
        """Coarsen the grid until it holds values from low to high."""
        start = -BINS // 2 if low < 0 or self.start else 0
        largest = max(high, -low)
        room = BINS + start  # bins from zero upward
        exponent = max(self.exponent, _FINEST)
        if largest > 0:
            exponent = max(exponent, math.frexp(largest / room)[1])
            while largest >= room * 2.0**exponent:
                exponent += 1
        if start and not self.start and self.total:
            exponent = max(exponent, self.exponent + 1)
        if (exponent, start) != (self.exponent, self.start):
            self.counts = self._regridded(exponent, start)
            self.exponent, self.start = exponent, start

    def _regridded(self, exponent: int, start: int) -> Counts:
        if (exponent, start) == (self.exponent, self.start):
            return self.counts
        index = ((np.arange(BINS) + self.start) >> (exponent - self.exponent)) - start
        counts = np.zeros(BINS, np.int64)
        filled = self.counts > 0
        np.add.at(counts, index[filled], self.counts[filled])
        return counts


def _squares(values: npt.NDArray[np.float32]) -> float:
    """The sum of squares, in float32 unless that is too small for it."""
    with np.errstate(over="ignore"):
        found = float(np.dot(values, values))
    return found if math.isfinite(found) else float(np.square(values, dtype=np.float64).sum())


@dataclass
class Channels:
    """Extremes and sums per channel of one tensor."""

    axis: int
    low: Floats
    high: Floats
    sum: Floats
    count: int = 0
    """Values per channel."""

    @classmethod
    def empty(cls, axis: int, channels: int) -> Channels:
        """Nothing seen yet."""
        return cls(axis, np.full(channels, np.inf), np.full(channels, -np.inf), np.zeros(channels))

    @property
    def mean(self) -> Floats:
        """Per channel."""
        return self.sum / max(self.count, 1)

    def add(self, array: Array) -> None:
        """Add an array's values."""
        others = tuple(a for a in range(array.ndim) if a != self.axis % array.ndim)
        self.low = np.minimum(self.low, array.min(axis=others))
        self.high = np.maximum(self.high, array.max(axis=others))
        self.sum = self.sum + array.sum(axis=others, dtype=np.float64)
        self.count += array.size // self.low.size

    def merge(self, other: Channels) -> None:
        """Add what others have seen."""
        self.low = np.minimum(self.low, other.low)
        self.high = np.maximum(self.high, other.high)
        self.sum = self.sum + other.sum
        self.count += other.count


@dataclass
class Sketches:
    """The sketches of a model's tensors, by name, over a number of samples."""

    tensors: dict[str, Sketch] = field(default_factory=dict[str, Sketch])
    channels: dict[str, Channels] = field(default_factory=dict[str, Channels])
    samples: int = 0

    def merge(self, other: Sketches) -> None:
        """Add what others have seen, of the same tensors on other samples."""
        for name, sketch in other.tensors.items():
            self.tensors.setdefault(name, Sketch()).merge(sketch)
        for name, seen in other.channels.items():
            if name in self.channels:
                self.channels[name].merge(seen)
            else:
                self.channels[name] = Channels(seen.axis, seen.low, seen.high, seen.sum, seen.count)
        self.samples += other.samples

    def save(self, path: Path) -> None:
        """Write them to a .npz, whole or not at all. InputError for a place that cannot be."""
        npz.write(path, self.arrays())

    def arrays(self) -> dict[str, Array]:
        """What a file holds of them."""
        names = list(self.tensors)
        sketches = [self.tensors[name] for name in names]
        arrays: dict[str, Array] = {
            "names": np.array(names, object),
            "samples": np.array(self.samples),
            "counts": np.array([s.counts for s in sketches], np.int64).reshape(-1, BINS),
            "grid": np.array([(s.exponent, s.start) for s in sketches], np.int64).reshape(-1, 2),
            "scalars": np.array(
                [[getattr(s, name) for name in _SCALARS] for s in sketches], np.float64
            ).reshape(-1, len(_SCALARS)),
            "channels": np.array(list(self.channels), object),
        }
        for index, seen in enumerate(self.channels.values()):
            arrays[f"channel{index}"] = np.stack([seen.low, seen.high, seen.sum])
            arrays[f"axis{index}"] = np.array([seen.axis, seen.count])
        return arrays

    @classmethod
    def load(cls, path: Path) -> Sketches:
        """Read what `save` wrote. InputError for another file."""
        return cls.of(npz.read(path), path)

    @classmethod
    def of(cls, arrays: Mapping[str, Array], path: Path) -> Sketches:
        """Those that a file's arrays hold. InputError, with its path, for others."""
        try:
            made = cls(samples=int(arrays["samples"]))
            rows = zip(
                arrays["names"].tolist(),
                arrays["counts"],
                arrays["grid"].tolist(),
                arrays["scalars"].tolist(),
                strict=True,
            )
            for name, counts, (exponent, start), scalars in rows:
                sketch = Sketch(exponent=exponent, start=start, counts=counts)
                for key, value in zip(_SCALARS, scalars, strict=True):
                    whole = key in ("total", "zeros", "batches")
                    setattr(sketch, key, int(value) if whole else value)
                made.tensors[name] = sketch
            for index, name in enumerate(arrays["channels"].tolist()):
                low, high, total = arrays[f"channel{index}"]
                axis, count = arrays[f"axis{index}"].tolist()
                made.channels[name] = Channels(axis, low, high, total, count)
        except (KeyError, ValueError) as error:
            raise InputError(f"{path}: holds no sketches ({error})") from error
        return made


def merged(parts: Iterable[Sketches]) -> Sketches:
    """All of them together."""
    result = Sketches()
    for part in parts:
        result.merge(part)
    return result


def add_all(sketches: Sketches, values: Mapping[str, Array], axes: Mapping[str, int]) -> None:
    """Add a sample's values by name; those with an axis in `axes` per channel as well."""
    for name, array in values.items():
        sketches.tensors.setdefault(name, Sketch()).add(array, name)
        if name in axes and array.size:
            if name not in sketches.channels:
                channels = array.shape[axes[name]]
                sketches.channels[name] = Channels.empty(axes[name], channels)
            sketches.channels[name].add(array)
