"""A model that was cut, as one executable."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from graphopt.artifact import TensorInfo
from graphopt.backends import Array, OpTime, Output, Value, check_feeds, on_host, timed
from graphopt.flow import Block


class Chain:
    """A block of parts that takes and gives arrays by name; see `Executable`."""

    def __init__(self, inputs: tuple[TensorInfo, ...], block: Block) -> None:
        self.inputs = inputs
        self.outputs = block.outputs
        self._block = block

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Output]:
        """All outputs by name, as arrays of their own."""
        results = self._block.call(self._values(feeds))
        return {info.name: _own(r) for info, r in zip(self.outputs, results, strict=True)}

    def call(self, values: list[Value]) -> list[Value]:
        """All outputs in order, see `Part`."""
        return self._block.call(values)

    def benchmark(self, feeds: Mapping[str, Array], runs: int) -> npt.NDArray[np.int64]:
        """Nanoseconds per run; what passes between the parts is part of what a run costs."""
        values = self._values(feeds)
        return timed(lambda: self._block.call(values), runs)

    def profile(self, feeds: Mapping[str, Array], runs: int = 10) -> tuple[OpTime, ...]:
        """The profiles of the parts, one after the other."""
        return tuple(self._block.times(self._values(feeds), runs))

    def _values(self, feeds: Mapping[str, Array]) -> list[Value]:
        check_feeds(self.inputs, feeds)
        return [feeds[info.name] for info in self.inputs]


def _own(value: Value) -> Output:
    """What is no part's memory, nor the caller's."""
    found: Output = on_host(value)
    return found.copy() if isinstance(found, np.ndarray) else found
