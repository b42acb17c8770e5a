"""Pieces of a model that run one after the other, as one executable."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

import numpy as np
import numpy.typing as npt

from graphopt.artifact import TensorInfo
from graphopt.backends import Array, Executable, OpTime, Output, check_feeds, timed


class Chain:
    """Executables in order, each fed by name with what came before it; see `Executable`."""

    def __init__(
        self,
        parts: Sequence[Executable],
        inputs: tuple[TensorInfo, ...],
        outputs: tuple[TensorInfo, ...],
    ) -> None:
        self.inputs = inputs
        self.outputs = outputs
        self._parts = tuple(parts)

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Output]:
        """All outputs by name."""
        check_feeds(self.inputs, feeds)
        values = self._values(feeds)
        return {info.name: values[info.name] for info in self.outputs}

    def benchmark(self, feeds: Mapping[str, Array], runs: int) -> npt.NDArray[np.int64]:
        """Nanoseconds per run; checks between the pieces are part of what a run costs."""
        check_feeds(self.inputs, feeds)
        return timed(lambda: self._values(feeds), runs)

    def profile(self, feeds: Mapping[str, Array], runs: int = 10) -> tuple[OpTime, ...]:
        """The profiles of the pieces, one after the other."""
        check_feeds(self.inputs, feeds)
        values: dict[str, Output] = dict(feeds)
        rows: list[OpTime] = []
        for part in self._parts:
            taken = _taken(part, values)
            rows += part.profile(taken, runs)
            values |= part.run(taken)
        return tuple(rows)

    def _values(self, feeds: Mapping[str, Array]) -> dict[str, Output]:
        """What all the pieces put out, by name."""
        values: dict[str, Output] = dict(feeds)
        for part in self._parts:
            values |= part.run(_taken(part, values))
        return values


def _taken(part: Executable, values: Mapping[str, Output]) -> dict[str, Array]:
    """The inputs of a piece; what is no array among them is checked by its runtime."""
    return {info.name: cast(Array, values[info.name]) for info in part.inputs}
