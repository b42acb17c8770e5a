"""What a model gets right on labelled samples, and how far two models' outputs lie apart."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import cast

import numpy as np

from graphopt import ir
from graphopt.backends import Array, Executable, Output
from graphopt.errors import InputError
from graphopt.pruner.batching import batched
from graphopt.runner import BATCH_SECONDS, Runner
from graphopt.samples import Samples

Metric = Callable[[Mapping[str, Output], Array], float]
"""Outputs for all samples, and the labels, to one figure."""

_PREDICT_BATCH = 64


def top1(outputs: Mapping[str, Output], labels: Array) -> float:
    """The share of samples whose label is the best-scored class, or the class that is put out.

    Looks at the first output that has scores, [samples, classes], or classes, [samples].
    """
    for value in outputs.values():
        if not isinstance(value, np.ndarray) or value.shape[:1] != (labels.size,):
            continue
        per_sample = [size for size in value.shape[1:] if size != 1]
        if len(per_sample) == 1:
            return _share(np.argmax(value.reshape(labels.size, -1), axis=1), labels)
        if not per_sample and value.dtype.kind in "iuOSU":
            return _share(value, labels)
    raise InputError(f"no output has scores or classes for the {labels.size} labels")


def _share(found: Array, labels: Array) -> float:
    return float(np.count_nonzero(found.reshape(-1) == labels.reshape(-1))) / labels.size


def sampled_top1(model: ir.Model, samples: Samples) -> float:
    """`top1` of a model on samples with labels, by ONNX Runtime on the CPU."""
    runner = Runner(model, optimize=True, seconds=BATCH_SECONDS)
    parts: dict[str, list[Array]] = {}
    for feeds in batched(model, samples, _PREDICT_BATCH):
        for name, value in runner.run(feeds).items():
            if isinstance(value, np.ndarray):
                parts.setdefault(name, []).append(cast("Array", value))
    outputs = {name: np.concatenate(values) for name, values in parts.items() if values[0].ndim}
    if samples.labels is None:
        raise InputError(f"{samples.where}: no labels")
    return top1(outputs, samples.labels)


def predict(executable: Executable, feeds: Mapping[str, Array], samples: int) -> dict[str, Output]:
    """The outputs for a set of samples, run in batches.

    Arrays whose first axis is as long as there are samples are cut along it, others go into each
    run. The batch is the model's where it is fixed (the last one is filled up), else 64.
    """
    batch = fixed_batch(executable, feeds, samples) or min(_PREDICT_BATCH, samples)
    parts: dict[str, list[Output]] = {}
    for start in range(0, samples, batch):
        for name, value in executable.run(take(feeds, samples, start, batch)).items():
            parts.setdefault(name, []).append(value)
    return {name: _join(values, samples) for name, values in parts.items()}


def fixed_batch(executable: Executable, feeds: Mapping[str, Array], samples: int) -> int | None:
    """The batch that a model's inputs fix, looking at those that are cut."""
    for info in executable.inputs:
        cut = info.name in feeds and feeds[info.name].shape[:1] == (samples,)
        if cut and info.shape and isinstance(info.shape[0], int):
            return info.shape[0]
    return None


def take(feeds: Mapping[str, Array], samples: int, start: int, batch: int) -> dict[str, Array]:
    """The feeds of one batch; where samples run out, the last one is repeated."""
    index = np.minimum(np.arange(start, start + batch), samples - 1)
    return {
        name: feed[index] if feed.shape[:1] == (samples,) else feed for name, feed in feeds.items()
    }


def _join(parts: list[Output], samples: int) -> Output:
    """The parts of an output one after the other, without what filled the last batch."""
    if all(isinstance(part, list) for part in parts):
        return [item for part in parts for item in part or []][:samples]
    arrays = [part for part in parts if isinstance(part, np.ndarray) and part.ndim]
    return np.concatenate(arrays)[:samples] if len(arrays) == len(parts) else parts[-1]


def worst_difference(first: Mapping[str, Output], other: Mapping[str, Output]) -> float | None:
    """The largest absolute difference over the numeric outputs that both have."""
    worst: float | None = None
    for name, a in first.items():
        b = other.get(name)
        if not isinstance(a, np.ndarray) or not isinstance(b, np.ndarray) or a.dtype.kind in "OSU":
            continue
        if a.shape != b.shape:
            return math.inf
        x, y = a.astype(np.float64), b.astype(np.float64)
        with np.errstate(invalid="ignore"):
            gaps = np.where((x == y) | (np.isnan(x) & np.isnan(y)), 0.0, np.abs(x - y))
        gap = float(np.nan_to_num(gaps, nan=math.inf, posinf=math.inf).max(initial=0.0))
        worst = gap if worst is None else max(worst, gap)
    return worst
