"""A pruned model trained, without labels, to do what the unpruned one does.

Hinton et al. 2015, Distilling the knowledge in a neural network, with squared differences of the
outputs as in Ba and Caruana 2014, and of values on the way as in Romero et al. 2015, FitNets, which
is what makes a few hundred samples enough (Wang et al. 2022, Compressing models with few samples:
mimicking then replacing). Adam (Kingma and Ba 2015) with a rate that falls as a cosine.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from graphopt import ir
from graphopt.errors import InputError
from graphopt.gram import LINEAR
from graphopt.pruner.augmenting import blended, mirrored, shifted
from graphopt.pruner.batching import batched, free_batch, has_batch_axis
from graphopt.pruner.estimating import operations
from graphopt.pruner.gradients import Tape, unknown
from graphopt.pruner.records import Record
from graphopt.pruner.recovery import Recovery, divided
from graphopt.pruner.slopes import scores_of
from graphopt.runner import BATCH_SECONDS, Runner
from graphopt.samples import Samples
from graphopt.taps import tapped

__all__ = ["distill", "for_refitting", "train", "why_not"]

Array = npt.NDArray[Any]
Feeds = Mapping[str, Array]
Tell = Callable[[str], None]

EFFORT = 6e12
"""Operations that training takes unless told otherwise: a few minutes of one processor."""
_MOST_STEPS, _FEWEST_STEPS = 400, 100
_BATCH, _SMALLEST = 32, 8
"""Samples of a step; fewer where there would be few steps."""
_HELD, _VALUES = 1 << 28, 1 << 30
"""Bytes of samples that are held in memory while training, and of values on the way, at most."""
_JUDGED = 128
"""Samples that the error before and after is taken on."""
_BLENDED = 0.5
"""Share of the batches that are blended, so that few samples are not learnt by heart."""
_ALIKE = 0.5
"""Images are mirrored where the outputs move by less than this share of their variance."""
_WARM = 0.1
"""Share of the steps in which the rate grows, while Adam gets to know the gradients."""
_MARKS = 4
"""Values on the way that are compared where the model adds none up."""
_RATES = (1.0, 0.25, 0.0625)
"""Where training makes the error larger, it is begun anew with a part of the rate."""
_WORSE, _LOOKS = 1.25, 8
"""It ends early where a look finds the error so many times larger."""
_TRAINED = {
    "Add": (0, 1),
    "BatchNormalization": (1, 2),
    "Conv": (1, 2),
    "Gemm": (1, 2),
    "LayerNormalization": (1, 2),
    "MatMul": (1,),
    "PRelu": (1,),
}


_LARGE = "that would take more than some minutes"


def distill(
    model: ir.Model,
    record: Record,
    samples: Samples,
    *,
    epochs: int,
    rate: float,
    seed: int = 0,
    progress: Tell | None = None,
) -> tuple[float, float]:
    """Train a pruned model's weights in place; the mean error before and after.

    The error is the squared difference of each output relative to its variance over the samples,
    on some that are not trained on where there are 64 or more. The weights that were best by it on
    the way are kept, which may be those before. Memory: the samples, 256 MiB of them at most.

    Raises:
        InputError: an operator whose gradient is not known, or no output of real numbers.
    """
    batch = min(max(epochs * len(samples) // _FEWEST_STEPS, _SMALLEST), _BATCH)
    job = _Training(model, record, samples, batch, seed, progress)
    first = job.error(job.weights)
    best, least = job.weights, first
    for slower in _RATES if epochs else ():
        tried, error = job.run(epochs, rate * slower, _WORSE * first)
        if error < least:
            best, least = tried, error
            break
    for name, array in best.items():
        model.graph.initializers[name].const_value = ir.tensor(array, name=name)
    return first, least


class _Training:
    """A pruned model's weights, the data, and what it should do with them."""

    def __init__(
        self,
        model: ir.Model,
        record: Record,
        samples: Samples,
        batch: int,
        seed: int,
        progress: Tell | None,
    ) -> None:
        self._names = _parameters(model)
        self.weights = {name: _held(model, name) for name in self._names}
        student, teacher = free_batch(model), free_batch(record.teacher)
        if has_batch_axis(student) and has_batch_axis(teacher):
            model, record = student, Record(teacher, record.kept)
        self._tape = Tape(model, self._names)
        self._teacher = _Teacher(model, record, self._tape.reached)
        sample = next(iter(samples))
        first = self._tape.forward(sample, self.weights)
        self._teacher.leave_out_others(sample, first)
        size = sum(array.nbytes for array in first.values())
        rows = min(max(_VALUES // max(size, 1), 1), batch)
        self._data = _Data(model, samples, batch, rows)
        self._shares, self._mirror = _weighing(self._teacher, self._data)
        if not self._shares or not self._names:
            raise InputError("the model has no output or no weights of float32 to train")
        self._seed, self._tell = seed, progress

    def run(self, epochs: int, rate: float, limit: float) -> tuple[dict[str, Array], float]:
        """The best weights on the way and their error; it ends where that goes beyond a limit."""
        rng = np.random.default_rng(self._seed)
        weights, adam = dict(self.weights), _Adam(self.weights, rate, epochs * self._data.steps)
        best, least = weights, math.inf
        for epoch in range(epochs):
            for feeds in self._data.shuffled(rng):
                changed = _changed(feeds, rng, mirror=self._mirror)
                adam.step(weights, self._gradients(changed, weights))
            if self._tell is not None:
                self._tell(f"training, epoch {epoch + 1} of {epochs}")
            if (epoch + 1) % max(epochs // _LOOKS, 1) == 0 or epoch + 1 == epochs:
                error = self.error(weights)
                if not error < limit:
                    break
                if error < least:
                    best, least = dict(weights), error
        return best, least

    def _gradients(self, feeds: Feeds, weights: Feeds) -> dict[str, Array]:
        """Of the mean over a batch, as many of it at once as there is room for."""
        found: dict[str, Array] = {}
        for part in self._data.parts(feeds):
            wanted, values = self._teacher(part), self._tape.forward(part, weights)
            slopes = _slopes(values, wanted, self._shares, _count(part) / _count(feeds))
            for name, gradient in self._tape.backward(values, slopes, self._names).items():
                found[name] = found[name] + gradient if name in found else gradient
        return found

    def error(self, weights: Feeds) -> float:
        """The mean squared difference of the outputs, relative to their variance."""
        total = 0.0
        for feeds in self._data.judged:
            wanted, values = self._teacher(feeds), self._tape.forward(feeds, weights)
            total += sum(
                float(np.mean((values[name] - wanted[name]) ** 2)) * self._shares[name]
                for name in self._teacher.outputs
                if name in wanted
            )
        return total / len(self._data.judged)


def train(
    model: ir.Model, record: Record, samples: Samples, options: Recovery, progress: Tell | None
) -> tuple[float, float] | None:
    """`distill` as the options of recovery have it; None where they have it not.

    Unless the options name a number of epochs, there are as many as a few minutes allow, by a
    count of operations, and none where the model has an operator whose gradient is not known.
    """
    epochs = _planned(model, record, samples, options)
    if not epochs:
        return None
    data = samples.take(options.samples)
    return distill(model, record, data, epochs=epochs, rate=options.rate, progress=progress)


def _planned(model: ir.Model, record: Record, samples: Samples, options: Recovery) -> int:
    """How many epochs `train` takes."""
    if options.epochs >= 0:
        return options.epochs
    if why_not(model) != _LARGE:
        return 0
    each = 4 * _BATCH * operations(record.teacher, samples)
    steps = min(EFFORT / max(each, 1), _MOST_STEPS)
    return int(steps * _BATCH / max(min(len(samples), options.samples), 1))


def why_not(model: ir.Model) -> str:
    """Why a model is not trained unless a number of epochs is given."""
    names = _parameters(model)
    if not names or all(value.dtype != ir.DataType.FLOAT for value in model.graph.outputs):
        return "it has no weights of float32 or no output of that type"
    node = unknown(model, names)
    return _LARGE if node is None else f"no gradient is known of {node.op_type} ({ir.label(node)})"


def for_refitting(
    model: ir.Model, record: Record, samples: Samples, options: Recovery, *, spare: bool = False
) -> tuple[Samples, Samples]:
    """The samples to fit to, and those to judge by, which are others where that is needed.

    It is where training follows, or with `spare`, and where there are samples enough.
    """
    data = samples.take(options.samples)
    if not spare and not _planned(model, record, samples, options):
        return data, data
    fitted, judged = divided(data)
    return fitted, data if judged is None else judged


class _Teacher:
    """What the unpruned model puts out and has on the way, where the pruned one has it too."""

    def __init__(self, model: ir.Model, record: Record, reached: Collection[str]) -> None:
        self.outputs = [scores_of(value).name or "" for value in model.graph.outputs]
        known = {v.name for node in record.teacher.graph for v in node.outputs} & set(reached)
        if not known.issuperset(self.outputs):
            self.outputs = [value.name or "" for value in model.graph.outputs]
        marks = [name for name in _marks(model, record) if name in known.difference(self.outputs)]
        self._kept = {name: record.kept.get(name, {}) for name in marks}
        shown = tapped(record.teacher, [*self.outputs, *marks])
        self._runner = Runner(shown, optimize=True, seconds=BATCH_SECONDS)
        self._strange: set[str] = set()

    def __call__(self, feeds: Feeds) -> dict[str, Array]:
        """The values by name, of channels that are left."""
        given = {name: feeds[name] for name in self._runner.inputs}
        found = {
            name: cast("Array", value)
            for name, value in self._runner.run(given).items()
            if isinstance(value, np.ndarray)
        }
        for name in self._strange:
            del found[name]
        for name, axes in self._kept.items():
            for axis, positions in axes.items() if name in found else ():
                found[name] = np.take(found[name], positions, axis)
        return {n: array for n, array in found.items() if array.dtype == np.float32 and array.size}

    def leave_out_others(self, feeds: Feeds, values: Feeds) -> None:
        """Of values on the way those that have another shape in a model on smaller images."""
        shapes = {name: array.shape for name, array in self(feeds).items()}
        self._strange = {n for n, shape in shapes.items() if shape != values[n].shape}


def _marks(model: ir.Model, record: Record) -> list[str]:
    """Sums of two values, such as close residual blocks; else some layers' results."""
    known = {value.name for node in record.teacher.graph for value in node.outputs}
    shared = [node for node in model.graph if node.outputs and node.outputs[0].name in known]
    sums = [
        node
        for node in shared
        if node.op_type == "Add" and all(ir.constant(value) is None for value in node.inputs)
    ]
    if not sums:
        layers = [node for node in shared if node.op_type in LINEAR]
        sums = layers[:: max(1, -(-len(layers) // _MARKS))]
    return [node.outputs[0].name or "" for node in sums]


class _Data:
    """Samples in memory, joined where they can be."""

    def __init__(self, model: ir.Model, samples: Samples, batch: int, rows: int) -> None:
        self._batch, self._rows = batch, rows
        size = sum(array.nbytes for array in next(iter(samples)).values())
        given, spared = divided(samples)
        some = given.take(max(_HELD // max(size, 1), 1))
        every = sorted(some, key=lambda row: [array.shape for array in row.values()])
        self._joined = has_batch_axis(model)
        self._stacks = list(batched(model, every, len(every)))
        self.few = list(batched(model, every[:: -(-len(every) // _JUDGED)], rows))
        judged = None if spared is None else spared.take(_JUDGED)
        self.judged = self.few if judged is None else list(batched(model, judged, rows))
        self.steps = sum(len(range(0, _count(stack), batch)) for stack in self._stacks)

    def parts(self, feeds: Feeds) -> Iterator[Feeds]:
        """A batch in parts that are run at once."""
        if not self._joined:
            yield feeds
            return
        for start in range(0, _count(feeds), self._rows):
            yield {name: array[start : start + self._rows] for name, array in feeds.items()}

    def shuffled(self, rng: np.random.Generator) -> Iterator[Feeds]:
        """Batches of all samples in another order each time."""
        batches: list[Feeds] = []
        for stack in self._stacks:
            if not self._joined:
                batches.append(stack)
                continue
            order = rng.permutation(_count(stack))
            for start in range(0, len(order), self._batch):
                rows = order[start : start + self._batch]
                batches.append({name: array[rows] for name, array in stack.items()})
        places: list[int] = rng.permutation(len(batches)).tolist()
        yield from (batches[place] for place in places)


def _count(stack: Feeds) -> int:
    array = next(iter(stack.values()))
    return len(array) if array.ndim else 1


def _changed(feeds: Feeds, rng: np.random.Generator, *, mirror: bool) -> Feeds:
    """A batch made new at random."""
    if mirror and rng.random() < 0.5:
        feeds = mirrored(feeds) or feeds
    feeds = shifted(feeds, rng)
    if rng.random() < _BLENDED:
        feeds = blended(feeds, rng) or feeds
    return feeds


def _weighing(teacher: _Teacher, data: _Data) -> tuple[dict[str, float], bool]:
    """What a squared difference counts of each value, and whether mirror images are alike.

    That is one over the value's variance; all that is on the way counts as much as one output.
    """
    found: dict[str, list[Array]] = {}
    moved: list[float] = []
    for feeds in data.few:
        values = teacher(feeds)
        for name, array in values.items():
            squares = np.square(array, dtype=np.float64).sum()
            sums = np.array([array.size, array.sum(dtype=np.float64), squares])
            found.setdefault(name, []).append(sums)
        other = mirrored(feeds)
        if other is not None:
            turned = teacher(other)
            moved += [
                float(np.mean((values[name] - turned[name]) ** 2) / (values[name].var() + 1e-12))
                for name in teacher.outputs
                if name in values
            ]
    shares: dict[str, float] = {}
    marks = max(sum(name not in teacher.outputs for name in found), 1)
    for name, parts in found.items():
        count, total, squares = np.sum(parts, axis=0).tolist()
        variance = max(squares / count - (total / count) ** 2, 1e-12)
        shares[name] = (1 if name in teacher.outputs else 1 / marks) / variance
    if not any(name in teacher.outputs for name in shares):
        return {}, False
    return shares, bool(moved) and float(np.mean(moved)) < _ALIKE


def _slopes(
    values: Feeds, wanted: Feeds, shares: Mapping[str, float], part: float
) -> dict[str, Array]:
    """By how much the loss answers to each value, over a part of a batch."""
    found: dict[str, Array] = {}
    for name, target in wanted.items():
        difference = values[name] - target
        found[name] = (2 * part * shares[name] / difference.size * difference).astype(np.float32)
    return found


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


class _Adam:
    """Adam's moments, and a rate that falls to nothing, relative to each tensor's own size."""

    def __init__(self, weights: Feeds, rate: float, steps: int) -> None:
        self._first = {name: np.zeros_like(array) for name, array in weights.items()}
        self._second = {name: np.zeros_like(array) for name, array in weights.items()}
        self._rates = {
            name: rate * max(float(np.sqrt(np.mean(np.square(array)))), 1e-3)
            for name, array in weights.items()
        }
        self._steps, self._count = max(steps, 1), 0

    def step(self, weights: dict[str, Array], gradients: Feeds) -> None:
        """Move the weights, which are replaced, not written to."""
        count = self._count = self._count + 1
        warm = min(count / max(_WARM * self._steps, 1), 1)
        share = warm * 0.5 * (1 + math.cos(math.pi * (count - 1) / self._steps))
        for name, gradient in gradients.items():
            first = self._first[name] = 0.9 * self._first[name] + 0.1 * gradient
            second = self._second[name] = 0.999 * self._second[name] + 0.001 * gradient**2
            moved = (first / (1 - 0.9**count)) / (np.sqrt(second / (1 - 0.999**count)) + 1e-8)
            weights[name] = (weights[name] - share * self._rates[name] * moved).astype(np.float32)
