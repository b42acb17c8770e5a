"""A pruned model trained, without labels, to put out what the unpruned one does.

Hinton et al. 2015, Distilling the knowledge in a neural network, with squared differences of the
outputs as in Ba and Caruana 2014; Adam (Kingma and Ba 2015) with a rate that falls as a cosine.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from graphopt import ir
from graphopt.pruner.batching import batched
from graphopt.pruner.gradients import Tape
from graphopt.pruner.records import Record
from graphopt.pruner.recovery import Recovery
from graphopt.runner import Runner
from graphopt.samples import Samples

__all__ = ["distill", "train"]

Array = npt.NDArray[Any]
Tell = Callable[[str], None]

_MIXED = 0.5
"""Share of the batches that are mixed, so that few samples are not learnt by heart."""
_TRAINED = {
    "Add": (0, 1),
    "BatchNormalization": (1, 2),
    "Conv": (1, 2),
    "Gemm": (1, 2),
    "LayerNormalization": (1, 2),
    "MatMul": (1,),
    "PRelu": (1,),
}


def distill(
    model: ir.Model,
    record: Record,
    samples: Samples,
    *,
    epochs: int,
    rate: float = 5e-4,
    batch: int = 32,
    seed: int = 0,
    progress: Tell | None = None,
) -> tuple[float, float]:
    """Train a pruned model's weights in place; the mean error before and after.

    The error is the squared difference of each output relative to its variance over the samples.

    Raises:
        InputError: an operator whose gradient is not known.
    """
    names = _parameters(model)
    tape = Tape(model, names)
    weights = {name: _held(model, name) for name in names}
    feeds = list(batched(model, samples, batch))
    teacher = Runner(record.teacher, optimize=True)
    targets = [_floats(teacher.run(feed)) for feed in feeds]
    spread = {
        name: max(float(np.concatenate([t[name].ravel() for t in targets]).var()), 1e-12)
        for name in targets[0]
    }
    adam = _Adam(weights, rate, epochs * len(feeds))
    first = _error(tape, feeds, targets, spread, weights)
    best, least = dict(weights), first
    rng = np.random.default_rng(seed)
    for epoch in range(epochs):
        order: list[int] = rng.permutation(len(feeds)).tolist()
        for index in order:
            feed, wanted = feeds[index], targets[index]
            if rng.random() < _MIXED and (mixed := _mixed(feed, rng)) is not None:
                feed, wanted = mixed, _floats(teacher.run(mixed))
            values = tape.forward(feed, weights)
            slopes: dict[str, Array] = {}
            for name, target in wanted.items():
                difference = values[name] - target
                factor = 2 / (difference.size * spread[name])
                slopes[name] = (factor * difference).astype(np.float32)
            adam.step(weights, tape.backward(values, slopes, names))
        error = _error(tape, feeds, targets, spread, weights)
        if progress is not None:
            progress(f"training, epoch {epoch + 1} of {epochs}: error {error:.4g}, was {first:.4g}")
        if error < least:
            best, least = dict(weights), error
    for name, array in best.items():
        model.graph.initializers[name].const_value = ir.tensor(array, name=name)
    return first, least


def _mixed(feed: Mapping[str, Array], rng: np.random.Generator) -> dict[str, Array] | None:
    """A batch whose samples are blended with each other, or have a part of another put in.

    None where that makes no sense: inputs that are no real numbers, or a batch of one. (Zhang et
    al. 2018, mixup; Yun et al. 2019, CutMix; the unpruned model says what is right for them.)
    """
    count = min((array.shape[0] if array.ndim else 0) for array in feed.values())
    if count < 2 or any(a.dtype.kind != "f" or a.shape[0] != count for a in feed.values()):
        return None
    others = rng.permutation(count)
    found: dict[str, Array] = {}
    cut = rng.random() < 0.5
    for name, array in feed.items():
        spatial = [axis for axis in range(2, array.ndim) if array.shape[axis] > 3]
        if not cut or not spatial:
            share = rng.random((count, *[1] * (array.ndim - 1)))
            found[name] = (share * array + (1 - share) * array[others]).astype(array.dtype)
            continue
        where = [slice(None)] * array.ndim
        for axis in spatial:
            size = array.shape[axis]
            start, end = sorted(rng.integers(0, size + 1, 2).tolist())
            where[axis] = slice(start, end)
        found[name] = array.copy()
        found[name][tuple(where)] = array[others][tuple(where)]
    return found


def _error(
    tape: Tape,
    feeds: Sequence[Mapping[str, Array]],
    targets: Sequence[Mapping[str, Array]],
    spread: Mapping[str, float],
    weights: Mapping[str, Array],
) -> float:
    """The mean squared difference of the outputs, relative to their variance."""
    total = 0.0
    for feed, wanted in zip(feeds, targets, strict=True):
        values = tape.forward(feed, weights)
        parts = (np.mean((values[n] - t) ** 2) / spread[n] for n, t in wanted.items())
        total += float(sum(parts))
    return total / len(feeds)


def train(
    model: ir.Model, record: Record, samples: Samples, options: Recovery, progress: Tell | None
) -> tuple[float, float] | None:
    """`distill` as the options of recovery have it; None where they have it not."""
    if not options.epochs:
        return None
    return distill(
        model, record, samples, epochs=options.epochs, rate=options.rate, progress=progress
    )


def _parameters(model: ir.Model) -> list[str]:
    """Names of the constants that are trained: weights, biases, scales; each once, in order."""
    found: dict[str, None] = {}
    for node in model.graph:
        for index in _TRAINED.get(node.op_type, ()):
            value = node.inputs[index] if index < len(node.inputs) else None
            tensor = ir.constant(value)
            if value is None or tensor is None or tensor.dtype != ir.DataType.FLOAT:
                continue
            if value.is_initializer() and value.graph is model.graph and tensor.size > 1:
                found[value.name or ""] = None
    return list(found)


def _held(model: ir.Model, name: str) -> Array:
    array = ir.array(model.graph.initializers[name])
    assert array is not None
    return array.copy()


def _floats(outputs: Mapping[str, Any]) -> dict[str, Array]:
    arrays = {n: cast("Array", v) for n, v in outputs.items() if isinstance(v, np.ndarray)}
    return {n: array for n, array in arrays.items() if array.dtype == np.float32 and array.size}


class _Adam:
    """Adam's moments, and a rate that falls to nothing."""

    def __init__(self, weights: Mapping[str, Array], rate: float, steps: int) -> None:
        self._first = {name: np.zeros_like(array) for name, array in weights.items()}
        self._second = {name: np.zeros_like(array) for name, array in weights.items()}
        self._rate, self._steps, self._count = rate, max(steps, 1), 0

    def step(self, weights: dict[str, Array], gradients: Mapping[str, Array]) -> None:
        """Move the weights, which are replaced, not written to."""
        count = self._count = self._count + 1
        rate = self._rate * 0.5 * (1 + math.cos(math.pi * (count - 1) / self._steps))
        for name, gradient in gradients.items():
            first = self._first[name] = 0.9 * self._first[name] + 0.1 * gradient
            second = self._second[name] = 0.999 * self._second[name] + 0.001 * gradient**2
            moved = (first / (1 - 0.9**count)) / (np.sqrt(second / (1 - 0.999**count)) + 1e-8)
            # Relative to the weights' own size, as filters of all sizes stand side by side.
            weights[name] = (weights[name] - rate * moved).astype(np.float32)
