"""Whether symbolic shapes and values agree with what a run gave."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import cast

import numpy as np

from graphopt import files, ir
from graphopt.dims import Dim, DimLike, evaluate
from graphopt.execute import Runner
from graphopt.shapes import Shapes


@dataclass
class Agreement:
    """What was compared, and every difference that was found."""

    checked: int
    unbound: int
    errors: list[str]


def agreement(shapes: Shapes, results: Iterable[tuple[ir.Value, ir.Array]]) -> Agreement:
    """Compare what is inferred of values with what they were in one run."""
    pairs: list[tuple[str, DimLike | float, float]] = []
    errors: list[str] = []
    for value, array in results:
        dtype, shape, values = shapes.dtype(value), shapes.shape(value), shapes.values(value)
        name = f"{value.name} {array.dtype}{list(array.shape)}"
        if dtype is not None and array.dtype.char not in "OSUT" and dtype.numpy() != array.dtype:
            errors.append(f"{name}: type {dtype}")
        if shape is not None:
            if len(shape) != array.ndim:
                errors.append(f"{name}: rank of {shape}")
                continue
            pairs += [(name, size, number) for size, number in zip(shape, array.shape, strict=True)]
        if values is not None:
            if values.shape != array.shape:
                errors.append(f"{name}: values {values}")
                continue
            found, actual = values.ravel().tolist(), array.ravel().tolist()
            pairs += [
                (name, element, number) for element, number in zip(found, actual, strict=True)
            ]
    bindings = _bindings(pairs)
    unbound = 0
    for name, expression, number in pairs:
        try:
            got = _number(expression, bindings)
        except KeyError:
            unbound += 1
            continue
        if not math.isclose(got, number, rel_tol=1e-6):
            errors.append(f"{name}: {expression} is {got}, not {number}")
    return Agreement(len(pairs), unbound, errors)


def _bindings(pairs: list[tuple[str, DimLike | float, float]]) -> Mapping[str, int]:
    """The number of every symbol that stands alone somewhere."""
    found: dict[str, int] = {}
    for _, expression, number in pairs:
        atom = expression.atom() if isinstance(expression, Dim) else None
        if atom is not None and atom.op in ("symbol", "fresh"):
            found.setdefault(atom.name, int(number))
    return found


def _number(expression: DimLike | float, bindings: Mapping[str, int]) -> float:
    if isinstance(expression, Dim):
        return evaluate(expression, bindings)
    return expression


class Everything:
    """A session that gives every intermediate result of a model's main graph."""

    def __init__(self, model: ir.Model) -> None:
        self._values = {v.name: v for node in model.graph for v in node.outputs if v.name}
        self._inputs = {v.name: v for v in model.graph.inputs}
        exposed = files.copy(model)
        listed = {v.name for v in exposed.graph.outputs}
        for node in exposed.graph:
            exposed.graph.outputs.extend(v for v in node.outputs if v.name and v.name not in listed)
        self._runner = Runner(exposed)

    def run(self, feeds: Mapping[str, ir.Array]) -> list[tuple[ir.Value, ir.Array]]:
        """The results and the inputs; what is no tensor is left out."""
        results = self._runner.run(feeds)
        found = [
            (self._values[name], cast("ir.Array", result))
            for name, result in results.items()
            if name in self._values and isinstance(result, np.ndarray)
        ]
        return found + [(self._inputs[name], array) for name, array in feeds.items()]
