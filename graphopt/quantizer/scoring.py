"""How far a quantized model is from the one that it was made of: outputs, answers, layers, time."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from graphopt import ir
from graphopt.closeness import class_rows
from graphopt.errors import InputError
from graphopt.runner import Runner
from graphopt.samples import Samples
from graphopt.shapes import Shapes
from graphopt.taps import groups, tap

Array = npt.NDArray[Any]
Outputs = Mapping[str, Any]
Metric = Callable[[Sequence[Outputs], "Array | None"], float]
"""A figure, higher is better, of the outputs for each sample and the labels."""

LAYER_SAMPLES = 8
_LONG = 30.0  # seconds, to measure latency


@dataclass
class Signal:
    """Power of what should be, and of what differs."""

    power: float = 0.0
    noise: float = 0.0

    def add(self, expected: Array, got: Array) -> None:
        """Two arrays of the same shape; values that are not finite in both are left out."""
        with np.errstate(invalid="ignore", over="ignore"):
            gap = expected - got
            power, noise = float(np.vdot(expected, expected)), float(np.vdot(gap, gap))
            if not math.isfinite(power + noise):
                known = np.isfinite(expected)
                a = np.where(known, expected, 0).astype(np.float64)
                gap = np.where(known, a - got, 0.0)
                power, noise = float(np.vdot(a, a)), float(np.vdot(gap, gap))
        self.power += power
        self.noise += noise

    @property
    def db(self) -> float | None:
        """The ratio of the powers in decibels; None where nothing differs."""
        if self.noise == 0:
            return None
        if not math.isfinite(self.noise):
            return -math.inf
        return 10 * math.log10(max(self.power, 1e-300) / self.noise)


@dataclass
class Score:
    """One model's outputs beside another's."""

    samples: int = 0
    sqnr_db: float | None = None
    """Over all floating outputs, the one that is worst off; None where nothing differs."""
    agreement: float | None = None
    """Share of rows whose largest element is the same; None without rows of several."""
    before: float | None = None
    """The metric of the first model, where there is one."""
    after: float | None = None

    @property
    def noise(self) -> float:
        """Noise over signal of that output."""
        return 0.0 if self.sqnr_db is None else 10 ** (-self.sqnr_db / 10)


@dataclass
class _Compared:
    signals: dict[str, Signal] = field(default_factory=dict[str, Signal])
    same: int = 0
    rows: int = 0

    def add(self, expected: Outputs, got: Outputs) -> None:
        for index, (name, value) in enumerate(expected.items()):
            other = got.get(name)
            if not isinstance(value, np.ndarray) or not isinstance(other, np.ndarray):
                continue
            a, b = cast(Array, value), cast(Array, other)
            if a.shape != b.shape or a.dtype.kind != "f":
                continue
            self.signals.setdefault(name, Signal()).add(a, b)
            if index > 0:
                continue
            rows, others = class_rows(a), class_rows(b)
            if rows is not None and others is not None:
                self.same += int(np.sum(rows.argmax(-1) == others.argmax(-1)))
                self.rows += len(rows)


def score(
    before: ir.Model | Runner,
    after: ir.Model,
    samples: Samples,
    *,
    metric: Metric | None = None,
    threads: int = 1,
    progress: Callable[[str], None] | None = None,
) -> Score:
    """Run two models on samples, with ONNX Runtime's optimizations, and compare the outputs.

    The first one may be loaded already, as it is where many are compared with it. The metric is
    `top1` where the samples have labels and none is given. Raises GraphoptError where a model does
    not run, InputError where the metric is no finite number.
    """
    runners = [
        model if isinstance(model, Runner) else Runner(model, threads=threads, optimize=True)
        for model in (before, after)
    ]
    compared = _Compared()
    labels = samples.labels
    figure = metric or (top1 if labels is not None else None)
    kept: tuple[list[Outputs], list[Outputs]] = ([], [])
    count = 0
    for feeds in samples:
        expected, got = (r.run({n: feeds[n] for n in r.inputs if n in feeds}) for r in runners)
        compared.add(expected, got)
        if figure is not None:
            kept[0].append(expected)
            kept[1].append(got)
        count += 1
        if progress is not None:
            progress(f"comparison: {count} samples")
    noises = [s.db for s in compared.signals.values()]
    result = Score(count, min((d for d in noises if d is not None), default=None))
    if compared.rows:
        result.agreement = compared.same / compared.rows
    if figure is not None:
        result.before, result.after = (_figure(figure(outputs, labels)) for outputs in kept)
    return result


def _figure(value: Any) -> float:
    """What a metric gives, which has to be a number."""
    try:
        number = float(value)
    except (TypeError, ValueError) as error:
        raise InputError(f"the metric gives {type(value).__name__}, no number") from error
    if not math.isfinite(number):
        raise InputError(f"the metric gives {number}")
    return number


def top1(outputs: Sequence[Outputs], labels: Array | None) -> float:
    """The share of samples whose label is the largest element of the first output."""
    assert labels is not None
    found: list[Array] = [_answers(next(iter(each.values()))) for each in outputs]
    flat: Array = np.concatenate(found)[: len(labels)]
    truth: Array = labels.reshape(len(labels), -1)[: len(flat), 0]
    return float(np.count_nonzero(flat == truth)) / max(len(flat), 1)


def _answers(value: Array) -> Array:
    rows = class_rows(value)
    return value.reshape(-1) if rows is None else rows.argmax(-1)


@dataclass(frozen=True)
class Layer:
    """One intermediate tensor in both models."""

    name: str
    op: str
    """The operator that makes it."""
    sqnr_db: float | None


def layers(
    before: ir.Model,
    after: ir.Model,
    samples: Samples,
    *,
    limit: int = LAYER_SAMPLES,
    memory_limit: int = 1 << 27,
) -> list[Layer]:
    """Every float tensor that both models have by the same name, in the first one's order."""
    known = Shapes(before)
    own = {v.name: v for node in before.graph for v in node.outputs if v.name}
    other = {v.name for node in after.graph for v in node.outputs}
    types = {name: known.dtype(v) for name, v in own.items()}
    names = [n for n, kind in types.items() if n in other and kind and kind.is_floating_point()]
    part = samples.take(limit)
    found: dict[str, Signal] = {}
    for group in groups(before, names, next(iter(part)), memory_limit=memory_limit):
        pairs = zip(tap(before, group, part), tap(after, group, part), strict=True)
        for expected, got in pairs:
            for name, value in expected.items():
                if value.dtype.kind == "f" and value.shape == got[name].shape:
                    found.setdefault(name, Signal()).add(value, got[name])
    result: list[Layer] = []
    for name, signal in found.items():
        producer = own[name].producer()
        result.append(Layer(name, producer.op_type if producer else "", signal.db))
    return result


@dataclass(frozen=True)
class LayerPair:
    """One intermediate tensor of two models."""

    name: str
    op: str
    sqnr_db: float | None
    """Of the first model beside the reference, or beside the second; None where nothing differs."""
    other_db: float | None
    """Of the second model beside the reference; None where nothing differs or there is none."""


def compare_layers(
    a: ir.Model,
    b: ir.Model,
    samples: Samples,
    reference: ir.Model | None = None,
    *,
    limit: int = LAYER_SAMPLES,
) -> list[LayerPair]:
    """Two models' float tensors of the same names: how far from a reference, or from each other.

    At most `limit` samples are run. Raises GraphoptError where a model does not run.
    """
    if reference is None:
        return [
            LayerPair(one.name, one.op, one.sqnr_db, None)
            for one in layers(b, a, samples, limit=limit)
        ]
    second = {layer.name: layer for layer in layers(reference, b, samples, limit=limit)}
    return [
        LayerPair(one.name, one.op, one.sqnr_db, second[one.name].sqnr_db)
        for one in layers(reference, a, samples, limit=limit)
        if one.name in second
    ]


def interleaved(
    models: Sequence[ir.Model | Path],
    feeds: Mapping[str, Array],
    *,
    seconds: float,
    threads: int = 1,
) -> npt.NDArray[np.float64]:
    """Milliseconds of runs of several models that take turns: [models, rounds].

    ONNX Runtime with its optimizations. A round runs each model twice, in alternating order, and
    counts the second time, when the caches are its own. There are at least 10 rounds, or 3 where
    10 would take more than half a minute.
    """
    runners = [Runner(model, threads=threads, optimize=True) for model in models]
    inputs = [{n: feeds[n] for n in r.inputs if n in feeds} for r in runners]
    for runner, feed in zip(runners, inputs, strict=True):
        for _ in range(3):
            runner.run(feed)
    rounds: list[list[float]] = []
    begin = time.monotonic()
    end, latest = begin + seconds, begin + max(seconds, _LONG)
    while (now := time.monotonic()) < end or len(rounds) < (10 if now < latest else 3):
        rounds.append(_round(runners, inputs, reverse=len(rounds) % 2 == 1))
    return np.array(rounds).T


def _round(
    runners: Sequence[Runner], inputs: Sequence[Mapping[str, Array]], *, reverse: bool
) -> list[float]:
    times = [0.0] * len(runners)
    order = range(len(runners))
    for index in reversed(order) if reverse else order:
        runners[index].run(inputs[index])
        begin = time.perf_counter()
        runners[index].run(inputs[index])
        times[index] = 1e3 * (time.perf_counter() - begin)
    return times
