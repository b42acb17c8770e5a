"""Blocks, loops and branches of compiled parts: the host counts, decides and hands values on.

What goes from one part to the next, or from one iteration to the next, stays where its runtime has
it. Nothing is copied but what a loop stacks.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from graphopt.artifact import Axis, TensorInfo
from graphopt.backends import Array, OpTime, Part, Value, numpy_dtype, on_host
from graphopt.errors import GraphoptError, InputError

_LOOKED_AT = 4
"""Iterations that the profile of a loop is taken of."""


class Step(Protocol):
    """What a block consists of: a compiled part, a Loop, a Scan or an If."""

    @property
    def takes(self) -> tuple[str, ...]:
        """The names of what it is called with, in order."""
        ...

    @property
    def gives(self) -> tuple[str, ...]:
        """The names of its results."""
        ...

    def call(self, values: Sequence[Value]) -> Sequence[Value]:
        """Its results; nothing writes to what `values` hold.

        Raises:
            GraphoptError: the run failed; one line with the runtime's reason.
        """
        ...

    def times(self, values: Sequence[Value], runs: int) -> Iterable[OpTime]:
        """Time per node of one call, from some runs of each part."""
        ...


class Compiled:
    """A part as a step."""

    def __init__(self, part: Part) -> None:
        self.takes = tuple(info.name for info in part.inputs)
        self.gives = tuple(info.name for info in part.outputs)
        self.call = part.call
        self._part = part

    def times(self, values: Sequence[Value], runs: int) -> Iterable[OpTime]:
        """The part's profile."""
        arrays = map(on_host, values)
        return self._part.profile(dict(zip(self.takes, arrays, strict=True)), runs)


@dataclass(frozen=True)
class Block:
    """Steps that run one after the other in a scope of their own, as in `artifact.Block`."""

    inputs: tuple[str, ...]
    outputs: tuple[TensorInfo, ...]
    steps: tuple[Step, ...]
    constants: Mapping[str, Array]

    def __post_init__(self) -> None:
        """Raise InputError for what nothing gives: of a manifest that was written by hand."""
        known = {*self.constants, *self.inputs}
        for step in self.steps:
            self._require(known, step.takes)
            known.update(step.gives)
        self._require(known, (info.name for info in self.outputs))

    @staticmethod
    def _require(known: Set[str], names: Iterable[str]) -> None:
        missing = next((name for name in names if name not in known), None)
        if missing is not None:
            raise InputError(f"the manifest has no part that gives {missing!r}")

    def call(self, values: Sequence[Value]) -> list[Value]:
        """Its outputs, in order."""
        scope = self._scope(values)
        for step in self.steps:
            results = step.call([scope[name] for name in step.takes])
            scope.update(zip(step.gives, results, strict=True))
        return [scope[info.name] for info in self.outputs]

    def times(self, values: Sequence[Value], runs: int) -> Iterator[OpTime]:
        """The profiles of its steps."""
        scope = self._scope(values)
        for step in self.steps:
            taken = [scope[name] for name in step.takes]
            yield from step.times(taken, runs)
            scope.update(zip(step.gives, step.call(taken), strict=True))

    def _scope(self, values: Sequence[Value]) -> dict[str, Value]:
        return {**self.constants, **dict(zip(self.inputs, values, strict=True))}


@dataclass(frozen=True)
class If:
    """One of two blocks; see `artifact.Flow`."""

    takes: tuple[str, ...]
    gives: tuple[str, ...]
    branches: tuple[Block, ...]

    def call(self, values: Sequence[Value]) -> list[Value]:
        """The outputs of the branch that the first value chooses."""
        return self._chosen(values).call(values[1:])

    def times(self, values: Sequence[Value], runs: int) -> Iterator[OpTime]:
        """The profile of that branch."""
        return self._chosen(values).times(values[1:], runs)

    def _chosen(self, values: Sequence[Value]) -> Block:
        return self.branches[0 if _number(values[0]) else 1]


class _Iterated(ABC):
    """A block again and again."""

    body: Block

    @abstractmethod
    def _run(
        self, values: Sequence[Value], look: Callable[[int, Sequence[Value]], None]
    ) -> list[Value]:
        """Run it; `look` is told the number of each iteration and what the body is given."""

    def call(self, values: Sequence[Value]) -> list[Value]:
        """What is carried in the end, and the stacks."""
        return self._run(values, lambda trip, inputs: None)

    def times(self, values: Sequence[Value], runs: int) -> Iterator[OpTime]:
        """From a few iterations, evenly spread, which stand for all."""
        trips: list[int] = []
        self._run(values, lambda trip, inputs: trips.append(trip))
        wanted = set(np.linspace(0, len(trips) - 1, min(len(trips), _LOOKED_AT), dtype=int))
        rows: dict[tuple[str, str, int], OpTime] = {}

        def look(trip: int, inputs: Sequence[Value]) -> None:
            seen = Counter[tuple[str, str]]()
            for row in self.body.times(inputs, runs) if trip in wanted else ():
                key = (row.node, row.device, seen[row.node, row.device])
                seen[row.node, row.device] += 1
                scale = len(trips) / len(wanted)
                calls, spent = scale * row.calls, scale * row.microseconds
                if key in rows:
                    calls, spent = calls + rows[key].calls, spent + rows[key].microseconds
                rows[key] = dataclasses.replace(row, calls=calls, microseconds=spent)

        self._run(values, look)
        yield from rows.values()


@dataclass(frozen=True)
class Loop(_Iterated):
    """By the rules of ONNX's Loop; see `artifact.Flow`.

    The body's outputs are the condition, what is carried on, and what is stacked.
    """

    takes: tuple[str, ...]
    gives: tuple[str, ...]
    body: Block
    carried: int

    def _run(
        self, values: Sequence[Value], look: Callable[[int, Sequence[Value]], None]
    ) -> list[Value]:
        trips, going_on = _number(values[0]), bool(_number(values[1]))
        first = 1 + self.carried
        stacks: list[list[Value]] = [[] for _ in self.body.outputs[first:]]
        inputs: list[Value] = [None, *values[2:]]
        trip = 0
        while going_on and trip < trips:
            inputs[0] = np.array(trip, np.int64)
            look(trip, inputs)
            results = self.body.call(inputs)
            inputs[1:first] = results[1:first]
            for stack, value in zip(stacks, results[first:], strict=True):
                stack.append(value)
            going_on = bool(_number(results[0]))
            trip += 1
        return [*inputs[1:first], *map(_stacked, stacks, self.body.outputs[first:])]


@dataclass(frozen=True)
class Scan(_Iterated):
    """By the rules of ONNX's Scan; see `artifact.Flow`."""

    takes: tuple[str, ...]
    gives: tuple[str, ...]
    body: Block
    carried: int
    scanned: tuple[Axis, ...]
    stacked: tuple[Axis, ...]

    def _run(
        self, values: Sequence[Value], look: Callable[[int, Sequence[Value]], None]
    ) -> list[Value]:
        first, last = self.carried, self.carried + len(self.scanned)
        wholes = [
            np.moveaxis(on_host(value), axis.number, 0)[:: -1 if axis.backwards else 1]
            for value, axis in zip(values[first:last], self.scanned, strict=True)
        ]
        stacks: list[list[Value]] = [[] for _ in self.stacked]
        inputs = list(values)
        for trip, slices in enumerate(zip(*wholes, strict=True)):
            inputs[first:last] = [np.asarray(each) for each in slices]
            look(trip, inputs)
            results = self.body.call(inputs)
            inputs[:first] = results[:first]
            for stack, value in zip(stacks, results[first:], strict=True):
                stack.append(value)
        arrays = map(_stacked, stacks, self.body.outputs[first:])
        return [
            *inputs[:first],
            *(
                np.moveaxis(array[:: -1 if axis.backwards else 1], 0, axis.number)
                for array, axis in zip(arrays, self.stacked, strict=True)
            ),
        ]


def _stacked(values: Sequence[Value], info: TensorInfo) -> Array:
    """Values along a new first axis; without any, what else is not known is 0."""
    if values:
        return np.stack([on_host(value) for value in values])
    sizes = (size if isinstance(size, int) else 0 for size in info.shape or ())
    return np.empty((0, *sizes), numpy_dtype(info))


def _number(value: Value) -> int:
    """The only element of a tensor."""
    array = on_host(value)
    if getattr(array, "size", 0) != 1:
        raise GraphoptError("a condition or number of trips is not one number")
    return int(array.item())
