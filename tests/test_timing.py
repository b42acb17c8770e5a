"""Interleaving and its statistics, on executables whose times are made up."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import pytest

from graphopt.artifact import TensorInfo
from graphopt.backends import Array, OpTime, Output
from graphopt.errors import InputError
from graphopt.timing import Latency, Plan, Ratio, Samples, benchmark, ratio

Times = npt.NDArray[np.int64]


class Clockwork:
    """An executable whose runs take given nanoseconds, over and over; notes when it was asked."""

    inputs: tuple[TensorInfo, ...] = ()
    outputs: tuple[TensorInfo, ...] = ()

    def __init__(self, name: str, log: list[tuple[str, int]], *nanoseconds: int) -> None:
        self.name, self.log = name, log
        self.times = itertools.cycle(nanoseconds)

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Output]:
        raise AssertionError

    def benchmark(self, feeds: Mapping[str, Array], runs: int) -> Times:
        self.log.append((self.name, runs))
        return np.fromiter(itertools.islice(self.times, runs), np.int64)

    def profile(self, feeds: Mapping[str, Array], runs: int = 10) -> tuple[OpTime, ...]:
        raise AssertionError


def test_models_take_turns_in_alternating_order() -> None:
    log: list[tuple[str, int]] = []
    pair = [Clockwork(name, log, 10_000_000) for name in "ab"]
    benchmark(pair, [{}, {}], Plan(warmup_seconds=0, warmup_runs=1, seconds=1, runs=10))
    turns = "".join(name for name, _ in log[2:])
    assert turns.startswith("abbaabba")
    assert len({count for _, count in log[2:]}) == 1


def test_both_limits_are_reached_by_each_model() -> None:
    log: list[tuple[str, int]] = []
    models = [Clockwork("fast", log, 1_000), Clockwork("slow", log, 400_000_000)]
    plan = Plan(warmup_seconds=0.2, warmup_runs=10, seconds=0.5, runs=20)
    for samples in benchmark(models, [{}, {}], plan):
        assert samples.nanoseconds.size >= 20
        assert samples.nanoseconds.sum() >= 5e8
        assert samples.nanoseconds.size == samples.rounds.size
        assert (np.diff(samples.rounds) >= 0).all()
    # a slow model is not made to run longer than it has to: its turns fill the rounds exactly
    slow = [count for name, count in log if name == "slow"]
    assert sum(slow) <= 10 + 16 + 22


def test_the_warm_up_reaches_both_limits() -> None:
    log: list[tuple[str, int]] = []
    plan = Plan(warmup_seconds=0.001, warmup_runs=100, seconds=0, runs=1)
    benchmark([Clockwork("a", log, 100)], [{}], plan)
    assert sum(count for _, count in log[:-1]) >= 10_000


def test_progress_rises_to_one() -> None:
    heard: list[tuple[float, str]] = []
    benchmark(
        [Clockwork("a", [], 1_000_000)],
        [{}],
        Plan(warmup_seconds=0, warmup_runs=1, seconds=0.2, runs=1),
        lambda fraction, what: heard.append((fraction, what)),
    )
    fractions = [fraction for fraction, what in heard if what == "measuring"]
    assert fractions == sorted(fractions)
    assert fractions[-1] == 1.0
    assert heard[0] == (0.0, "warming up")


def test_latency_statistics() -> None:
    latency = Latency.of(np.array([1_000_000, 2_000_000, 3_000_000, 4_000_000], np.int64))
    assert latency.runs == 4
    assert latency.mean_ms == pytest.approx(2.5)
    assert latency.p50_ms == pytest.approx(2.5)
    assert latency.min_ms == pytest.approx(1.0)
    assert latency.p99_ms == pytest.approx(3.97)
    assert latency.throughput == pytest.approx(400)


def series(median: float, noise: float, *, rounds: int = 50, runs: int = 20, seed: int) -> Samples:
    rng = np.random.default_rng(seed)
    times = median * np.exp(noise * rng.standard_normal(rounds * runs))
    return Samples(times.astype(np.int64), np.repeat(np.arange(rounds), runs))


def test_ratio_is_that_of_the_medians() -> None:
    first, other = series(2e6, 0.05, seed=1), series(1e6, 0.05, seed=2)
    found = ratio(first, other)
    assert found.value == np.median(other.nanoseconds) / np.median(first.nanoseconds)
    assert 0.49 < found.low < found.value < found.high < 0.51
    assert found.verdict == "faster"
    assert ratio(other, first).verdict == "slower"


def test_ratio_is_the_same_for_the_same_seed() -> None:
    first, other = series(1e6, 0.1, seed=3), series(1e6, 0.1, seed=4)
    assert ratio(first, other, seed=5) == ratio(first, other, seed=5)
    assert ratio(first, other, seed=5) != ratio(first, other, seed=6)


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    """Of 200 pairs without a difference, an interval of 90 % misses about 20."""
    plan = Plan(resamples=300, confidence=0.9)
    missed = sum(
        ratio(
            series(1e6, 0.2, rounds=25, runs=4, seed=2 * i),
            series(1e6, 0.2, rounds=25, runs=4, seed=2 * i + 1),
            plan,
        ).verdict
        != "same"
        for i in range(200)
    )
    assert 8 <= missed <= 36


def test_drift_that_both_share_does_not_widen_the_interval() -> None:
    drift = np.repeat(np.linspace(1, 3, 50), 20)
    first, other = series(1e6, 0.01, seed=1), series(0.9e6, 0.01, seed=2)
    first = Samples((first.nanoseconds * drift).astype(np.int64), first.rounds)
    other = Samples((other.nanoseconds * drift).astype(np.int64), other.rounds)
    found = ratio(first, other)
    assert 0.85 < found.low < found.high < 0.95


def test_long_and_short_series() -> None:
    long = series(1e6, 0.1, rounds=50, runs=4000, seed=1)
    assert ratio(long, long) == Ratio(1.0, 1.0, 1.0)
    single = Samples(np.array([5], np.int64), np.array([0]))
    assert ratio(single, single) == Ratio(1.0, 1.0, 1.0)
    nothing = Samples(np.array([0], np.int64), np.array([0]))
    assert ratio(nothing, single).value == 5.0


@pytest.mark.parametrize(
    "wrong",
    [
        {"runs": 0},
        {"warmup_runs": 0},
        {"resamples": 0},
        {"seconds": -1.0},
        {"seconds": float("inf")},
        {"warmup_seconds": float("nan")},
        {"confidence": 1.0},
    ],
)
def test_plans_that_make_no_sense(wrong: dict[str, float]) -> None:
    with pytest.raises(InputError):
        Plan(**wrong)  # pyright: ignore[reportArgumentType]
