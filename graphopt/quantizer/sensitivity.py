"""What each operator costs when it alone is quantized, run from where it changes anything.

A model in which one operator is quantized computes what the float model computes up to there. So
only what follows is run, from values of the float model that are kept for several operators at a
time, as many as fit into memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy.typing as npt

from graphopt import ir
from graphopt.cutting import Part, extract, operands
from graphopt.quantizer.scoring import Signal
from graphopt.runner import Runner
from graphopt.samples import Samples
from graphopt.taps import MEMORY_LIMIT, sizes, tap

__all__ = ["sensitivity"]

Array = npt.NDArray[Any]
_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.DOUBLE)
Values = dict[str, list[Array]]
"""A value's arrays, one a sample, by name."""


@dataclass
class _Tail:
    """What follows the quantization of one operator."""

    name: str
    model: ir.Model
    part: Part = field(default_factory=Part)

    @property
    def inputs(self) -> list[str]:
        """The float model's values that it starts from."""
        return [v.name or "" for v in self.part.inputs if v.const_value is None]

    @property
    def defaults(self) -> dict[str, Array]:
        """Inputs of the model that are constants unless somebody feeds them."""
        given = {v.name or "": v.const_value for v in self.part.inputs}
        return {name: tensor.numpy() for name, tensor in given.items() if tensor is not None}


def sensitivity(
    floats: ir.Model,
    names: Sequence[str],
    alone: Callable[[str], ir.Model],
    samples: Samples,
    *,
    memory_limit: int = MEMORY_LIMIT,
) -> Iterator[tuple[str, float]]:
    """For each operator the noise over signal at the output that is worst off, in their order.

    Args:
        floats: the model as it is; values keep their names where an operator is quantized.
        names: of operators, in the order of the graph.
        alone: the model with that operator alone quantized.
        samples: all of them are used.
        memory_limit: bytes of values that are held at a time.

    Raises:
        GraphoptError: a model does not run.
    """
    known = {ir.label(node) for node in floats.graph}
    outputs = [v.name or "" for v in floats.graph.outputs if v.dtype in _FLOATS]
    feeds = list(samples)
    expected = _tapped(floats, outputs, samples)
    size = _Sizes(floats, feeds[0], len(feeds))
    window: list[_Tail] = []
    for name in names:
        tail = _tail(name, alone(name), known)
        if window and size.of([*window, tail]) > memory_limit:
            yield from _run(floats, window, samples, expected)
            window = []
        window.append(tail)
    if window:
        yield from _run(floats, window, samples, expected)


class _Sizes:
    """Bytes of the values that several tails start from."""

    def __init__(self, model: ir.Model, feeds: Mapping[str, Array], count: int) -> None:
        self._model, self._feeds, self._count = model, feeds, count
        self._known: dict[str, int] = {}

    def of(self, tails: Sequence[_Tail]) -> int:
        names = {name for tail in tails for name in tail.inputs}
        unknown = sorted(names - set(self._known))
        if unknown:
            self._known.update(sizes(self._model, unknown, self._feeds))
        return self._count * sum(self._known[name] for name in names)


def _tail(name: str, model: ir.Model, known: set[str]) -> _Tail:
    """All nodes that are new in a model, and those behind them."""
    found = _Tail(name, model)
    changed: set[ir.Value] = set()
    for node in model.graph:
        if ir.label(node) not in known or not changed.isdisjoint(operands(node)):
            changed.update(node.outputs)
            stack = found.part.add(node, lambda value: _starts(value, changed))
            while stack:  # constants that nodes make
                maker = stack.pop().producer()
                if maker is not None and maker not in found.part.nodes:
                    stack += found.part.add(maker, lambda value: _starts(value, changed))
    return found


def _starts(value: ir.Value, changed: set[ir.Value]) -> bool:
    """Whether a value is fed: it is computed, and not by what is run."""
    return ir.constant(value) is None and value not in changed and value.producer() is not None


def _run(
    floats: ir.Model, tails: Sequence[_Tail], samples: Samples, expected: Values
) -> Iterator[tuple[str, float]]:
    names = list(dict.fromkeys(name for tail in tails for name in tail.inputs))
    values = _tapped(floats, names, samples)
    for tail in tails:
        yield tail.name, _noise(tail, values, expected)


def _tapped(model: ir.Model, names: Sequence[str], samples: Samples) -> Values:
    found: Values = {name: [] for name in names}
    for row in tap(model, names, samples) if names else ():
        for name, array in row.items():
            found[name].append(array)
    return found


def _noise(tail: _Tail, values: Values, expected: Values) -> float:
    part = tail.part
    outputs = tail.model.graph.outputs
    results = [v for v in outputs if part.computes(v) and v.name in expected]
    if not results:
        return 0.0
    defaults = tail.defaults
    first = {**defaults, **{name: values[name][0] for name in tail.inputs}}
    types = {
        value: ir.TensorType(ir.DataType.from_numpy(first[value.name or ""].dtype))
        for value in part.inputs
    }
    runner = Runner(extract(tail.model, part, results, types), optimize=True)
    signals = {value.name or "": Signal() for value in results}
    for index in range(len(next(iter(expected.values())))):
        feeds = {**defaults, **{name: values[name][index] for name in tail.inputs}}
        for name, got in runner.run(feeds).items():
            signals[name].add(expected[name][index], got)
    return max((s.noise / max(s.power, 1e-300) for s in signals.values()), default=0.0)
