"""The range that a tensor is quantized in, chosen from its sketch.

Every method looks at the sketch alone, so that another one costs no pass over the data. Within a
bin values are taken to be spread evenly: their error of rounding to steps of d is then d**2 / 12
on average. All candidates are computed at once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from graphopt.errors import InputError
from graphopt.quantizer.sketch import Sketch

Floats = npt.NDArray[np.float64]
Method = Literal["minmax", "average", "percentile", "entropy", "mse", "lp"]
METHODS: tuple[str, ...] = get_args(Method)

_CANDIDATES = 128  # for each end of a range
_LOWEST = 0.05  # of the extreme: no end is moved in further
_FEWEST = 32  # bins below an entropy threshold: with very few there is nothing to compare
_THRESHOLDS = 256  # for the entropy
_SMOOTH = 1e-4  # of a sample: what the entropy takes for no sample at all


@dataclass(frozen=True)
class Ranges:
    """How ranges are chosen."""

    method: str = "mse"
    """One of METHODS."""
    percentile: float = 99.99
    """Share of the values, in percent, that `percentile` keeps within the range."""
    power: float = 2.4
    """Of the error that `lp` minimizes."""

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise InputError(f"a range is chosen by one of {', '.join(METHODS)}")
        if not 50 < self.percentile <= 100:
            raise InputError("a percentile lies above 50 and is at most 100")
        if not self.power > 0:
            raise InputError("the power of an error is positive")

    def choose(
        self, sketch: Sketch, *, levels: int = 256, symmetric: bool = False
    ) -> tuple[float, float]:
        """Lowest and highest value to represent; zero is always between them.

        `levels` are the integers that are to be had; a symmetric range is as wide to both sides.
        """
        if not sketch.total:
            return 0.0, 0.0
        methods: dict[str, Callable[[], tuple[float, float]]] = {
            "minmax": lambda: (sketch.low, sketch.high),
            "average": lambda: (sketch.lows / sketch.batches, sketch.highs / sketch.batches),
            "percentile": lambda: _percentile(sketch, self.percentile / 100),
            "entropy": lambda: _entropy(sketch, levels),
            "mse": lambda: _least_error(sketch, 2.0, levels, symmetric),
            "lp": lambda: _least_error(sketch, self.power, levels, symmetric),
        }
        low, high = methods[self.method]()
        low, high = min(max(low, sketch.low), 0.0), max(min(high, sketch.high), 0.0)
        if symmetric:
            high = max(high, -low)
            low = -high
        return low, high


def noise(sketch: Sketch, low: float, high: float, levels: int = 256) -> float:
    """The mean squared error of values quantized in a range."""
    if not sketch.total or high <= low:
        return sketch.power
    below = _tail(sketch, np.array([low]), 2.0, upper=False)[0]
    above = _tail(sketch, np.array([high]), 2.0, upper=True)[0]
    step = (high - low) / (levels - 1)
    inside = max(sketch.total - sketch.zeros, 0)
    return float((below + above + inside * step**2 / 12) / sketch.total)


def _percentile(sketch: Sketch, share: float) -> tuple[float, float]:
    """The ends beyond which the same share of values lies on either side."""
    below = np.concatenate([[0], np.cumsum(sketch.counts)]) / sketch.total
    tail = (1 - share) / 2 if sketch.low < 0 < sketch.high else 1 - share
    edges = sketch.edges()
    low = float(np.interp(tail, below, edges))
    high = float(np.interp(1 - tail, below, edges))
    return low, high


def _least_error(sketch: Sketch, power: float, levels: int, symmetric: bool) -> tuple[float, float]:
    """The ends with the least sum of |error|**power, both searched together.

    Outside, the error is the distance to the end; inside, with steps of d, on average
    (d/2)**power / (power + 1).
    """
    steps = np.linspace(_LOWEST, 1.0, _CANDIDATES)
    if symmetric:
        highs = max(sketch.high, -sketch.low) * steps
        step = 2 * highs / (levels - 1)
        cost = _tail(sketch, highs, power, upper=True) + _tail(sketch, -highs, power, upper=False)
        cost += _rounding(sketch, step, power)
        best = float(highs[np.argmin(cost)])
        return -best, best
    highs = max(sketch.high, 0.0) * steps if sketch.high > 0 else np.zeros(1)
    lows = min(sketch.low, 0.0) * steps if sketch.low < 0 else np.zeros(1)
    above = _tail(sketch, highs, power, upper=True)
    below = _tail(sketch, lows, power, upper=False)
    step = (highs[None] - lows[:, None]) / (levels - 1)
    cost = below[:, None] + above[None] + _rounding(sketch, step, power)
    row, column = np.unravel_index(np.argmin(cost), cost.shape)
    return float(lows[row]), float(highs[column])


def _rounding(sketch: Sketch, step: Floats, power: float) -> Floats:
    inside = max(sketch.total - sketch.zeros, 0)
    rounded: Floats = inside * (step / 2) ** power / (power + 1)
    return rounded


def _tail(sketch: Sketch, ends: Floats, power: float, *, upper: bool) -> Floats:
    """The sum of |value - end|**power over the values beyond each of the ends."""
    filled = np.flatnonzero(sketch.counts)
    counts = sketch.counts[filled].astype(np.float64)
    middle = (filled + sketch.start + 0.5) * sketch.width
    middle = np.clip(middle, sketch.low, sketch.high)
    sign = 1.0 if upper else -1.0
    over = np.maximum((middle[None] - ends[:, None]) * sign, 0.0)
    beyond: Floats = (over * over if power == 2 else over**power) @ counts
    return beyond


def _entropy(sketch: Sketch, levels: int) -> tuple[float, float]:
    """The threshold of magnitudes with the least divergence of what is left from what was.

    As NVIDIA's TensorRT does it (S. Migacz, 8-bit inference with TensorRT, GTC 2017): values
    beyond the threshold are counted to the last bin, those before it spread evenly over the bins
    of their level that hold any. Here every candidate is computed at once, by sums over prefixes;
    where there are fewer bins than levels each bin is its own level.
    """
    folded = _folded(sketch)
    used = int(np.flatnonzero(folded)[-1]) + 1
    level_count = levels // 2 if sketch.low < 0 else levels
    total = folded.sum()
    few = min(_FEWEST, used)
    ends = np.unique(np.linspace(few, used, min(_THRESHOLDS, used - few + 1)).astype(np.int64))
    mass = np.concatenate([[0.0], np.cumsum(folded)])
    filled = np.concatenate([[0.0], np.cumsum(folded > 0)])
    entropy = np.concatenate([[0.0], np.cumsum(_xlogx(folded))])
    last = folded[ends - 1]
    outside = total - mass[ends]
    own = entropy[ends] - _xlogx(last) + _xlogx(last + outside)
    cross = _cross(mass, filled, ends, level_count, outside)
    kept = mass[ends]
    with np.errstate(divide="ignore", invalid="ignore"):
        divergence = (own - cross) / total - np.log(total) + np.log(kept)
    divergence = np.where(kept > 0, divergence, np.inf)
    best = len(ends) - 1 - int(np.argmin(divergence[::-1]))
    threshold = float(ends[best] * sketch.width)
    return -threshold, threshold


def _cross(
    mass: Floats, filled: Floats, ends: npt.NDArray[Any], levels: int, outside: Floats
) -> Floats:
    """The sum over bins of p log q for each threshold, q being what the levels leave of p."""
    fine = np.minimum(ends, levels)[:, None]
    borders = np.minimum(
        np.arange(levels + 1) * np.maximum(ends[:, None] / levels, 1.0), ends[:, None]
    )
    below = np.minimum(borders.astype(np.int64), len(mass) - 2)
    part = borders - below
    level_mass = np.diff(mass[below] + part * np.diff(mass)[below], axis=1)
    level_bins = np.diff(filled[below] + part * np.diff(filled)[below], axis=1)
    spread = np.log(np.maximum(level_mass / np.maximum(level_bins, 1e-9), _SMOOTH))
    last = np.take_along_axis(spread, fine - 1, axis=1)[:, 0]
    result: Floats = np.sum(level_mass * spread, axis=1) + last * outside
    return result


def _folded(sketch: Sketch) -> Floats:
    """The histogram of magnitudes."""
    counts = sketch.counts.astype(np.float64)
    if not sketch.start:
        return counts
    middle = len(counts) // 2
    return counts[middle:] + counts[:middle][::-1]


def _xlogx(values: Floats) -> Floats:
    return values * np.log(np.maximum(values, 1e-300))
