"""Latency of several executables at once, fairly: interleaved, warm, and with its uncertainty.

Machines drift (frequency, temperature, neighbours), so models are never timed one after the
other: they take turns in rounds whose order alternates. What a ratio is worth is told by a paired
block bootstrap over the rounds (Künsch 1989, The jackknife and the bootstrap for general
stationary observations; blocks here are rounds, the same ones for both models), which keeps the
drift that both share and the correlation of neighbouring runs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from graphopt.backends import Array, Executable
from graphopt.errors import InputError

Progress = Callable[[float, str], None]
"""Called with the fraction done, 0 to 1, and what is being done."""


def silent(fraction: float, what: str) -> None:
    """The progress of who does not want to know."""


_ROUNDS = 50
_SETTLE_SECONDS = 0.05  # runs shorter than this feel the caches that the other model left
_BOOTSTRAP_SAMPLES = 10_000
_CHUNK_ELEMENTS = 1 << 22


@dataclass(frozen=True)
class Plan:
    """How long to measure. Both of each pair are lower limits, per model."""

    warmup_seconds: float = 0.2
    warmup_runs: int = 10
    seconds: float = 3.0
    runs: int = 50
    resamples: int = 1000
    """Bootstrap resamples."""
    confidence: float = 0.95

    def __post_init__(self) -> None:
        if self.runs < 1 or self.warmup_runs < 1 or self.resamples < 1:
            raise InputError("a benchmark has at least one warm-up run, run and resample")
        if not (0 <= self.warmup_seconds < math.inf and 0 <= self.seconds < math.inf):
            raise InputError("seconds of a benchmark are finite and not negative")
        if not 0 < self.confidence < 1:
            raise InputError("a confidence lies between 0 and 1")


@dataclass(frozen=True)
class Samples:
    """Times of one executable's runs and the round that each belongs to."""

    nanoseconds: npt.NDArray[np.int64]
    rounds: npt.NDArray[np.int64]


@dataclass(frozen=True)
class Latency:
    """Statistics of runs."""

    runs: int
    mean_ms: float
    std_ms: float
    min_ms: float
    p50_ms: float
    p90_ms: float
    p99_ms: float
    throughput: float
    """Runs per second, one after the other: the inverse of the mean."""

    @classmethod
    def of(cls, nanoseconds: npt.NDArray[np.int64]) -> Latency:
        """Statistics of at least one run."""
        times = nanoseconds / 1e6
        mean = float(times.mean())
        p50, p90, p99 = map(float, np.percentile(times, [50, 90, 99]))
        return cls(
            runs=int(times.size),
            mean_ms=mean,
            std_ms=float(times.std()),
            min_ms=float(times.min()),
            p50_ms=p50,
            p90_ms=p90,
            p99_ms=p99,
            throughput=1e3 / mean if mean else math.inf,
        )


@dataclass(frozen=True)
class Ratio:
    """Median of a model over the median of the first, with a confidence interval."""

    value: float
    low: float
    high: float

    @property
    def verdict(self) -> str:
        """`faster`, `slower`, or `same` where the interval holds 1."""
        if self.high < 1:
            return "faster"
        return "slower" if self.low > 1 else "same"


def benchmark(
    executables: Sequence[Executable],
    feeds: Sequence[Mapping[str, Array]],
    plan: Plan | None = None,
    progress: Progress | None = None,
) -> list[Samples]:
    """Time executables in turns, each on its own feeds.

    Raises:
        InputError: feeds that do not fit.
        GraphoptError: a run failed.
    """
    plan = plan or Plan()
    tell = progress or silent
    tell(0.0, "warming up")
    estimates = [_warm_up(e, f, plan) for e, f in zip(executables, feeds, strict=True)]
    wanted = [max(plan.runs, math.ceil(plan.seconds / each)) for each in estimates]
    rounds = max(1, min(_ROUNDS, min(wanted, default=1) // 2))
    turns = [math.ceil(count / rounds) for count in wanted]
    settling = [int(each < _SETTLE_SECONDS) for each in estimates]
    times: list[list[npt.NDArray[np.int64]]] = [[] for _ in executables]
    done, order = 0.0, list(range(len(executables)))
    while done < 1.0:
        for index in order:
            runs = executables[index].benchmark(feeds[index], turns[index] + settling[index])
            times[index].append(runs[settling[index] :])
        order.reverse()
        done = min((_done(each, plan) for each in times), default=1.0)
        tell(min(done, 1.0), "measuring")
    return [_samples(each) for each in times]


def ratio(first: Samples, other: Samples, plan: Plan | None = None, *, seed: int = 0) -> Ratio:
    """The other's median over the first's; the two were timed in the same rounds."""
    plan = plan or Plan()
    count = int(first.rounds.max()) + 1
    draws = np.random.default_rng(seed).multinomial(
        count, np.full(count, 1 / count), size=plan.resamples
    )
    ratios = _medians(other, draws) / np.maximum(_medians(first, draws), 1)
    tail = 50 * (1 - plan.confidence)
    low, high = map(float, np.percentile(ratios, [tail, 100 - tail]))
    value = float(np.median(other.nanoseconds) / max(float(np.median(first.nanoseconds)), 1.0))
    return Ratio(value, low, high)


def _warm_up(executable: Executable, feeds: Mapping[str, Array], plan: Plan) -> float:
    """Run until both limits are reached; seconds that a run takes by then."""
    runs, total, batch = 0, 0.0, 1
    while True:
        times = executable.benchmark(feeds, batch)
        runs, total = runs + batch, total + float(times.sum()) / 1e9
        if runs >= plan.warmup_runs and total >= plan.warmup_seconds:
            return max(float(np.median(times)) / 1e9, 1e-7)
        batch = min(batch * 2, 10_000)


def _done(times: Sequence[npt.NDArray[np.int64]], plan: Plan) -> float:
    """Fraction of the plan that one model has been through; 1 or more when it is enough."""
    runs = sum(turn.size for turn in times)
    seconds = sum(int(turn.sum()) for turn in times) / 1e9
    return min(runs / plan.runs, seconds / plan.seconds if plan.seconds else 1.0)


def _samples(times: Sequence[npt.NDArray[np.int64]]) -> Samples:
    rounds = np.repeat(np.arange(len(times)), [turn.size for turn in times])
    return Samples(np.concatenate(times), rounds)


def _medians(samples: Samples, draws: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """The median per resample, where `draws[i, r]` says how often resample i holds round r.

    A weighted median of the sorted times; long series are thinned evenly, which can only widen
    the interval.
    """
    stride = max(1, samples.nanoseconds.size // _BOOTSTRAP_SAMPLES)
    times, rounds = samples.nanoseconds[::stride], samples.rounds[::stride]
    order = np.argsort(times, kind="stable")
    times, rounds = times[order], rounds[order]
    step = max(1, _CHUNK_ELEMENTS // times.size)
    medians: list[npt.NDArray[np.float64]] = []
    for start in range(0, len(draws), step):
        below = np.cumsum(draws[start : start + step][:, rounds], axis=1)
        twice, total = 2 * below, below[:, -1:]
        lower = times[np.argmax(twice >= total, axis=1)]
        upper = times[np.argmax(twice > total, axis=1)]
        medians.append((lower + upper) / 2)
    return np.concatenate(medians)
