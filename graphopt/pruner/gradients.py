"""Reverse mode over the common operators: gradients of a model's outputs by its constants.

ONNX Runtime computes the values, numpy goes back through them. Each rule gives the gradients of a
node's inputs from those of its output (Griewank and Walther 2008, Evaluating derivatives).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

import numpy as np

from graphopt import files, ir
from graphopt.errors import InputError
from graphopt.pruner.backward import Array, integer
from graphopt.pruner.gradients_linear import LINEAR
from graphopt.pruner.gradients_move import MOVES
from graphopt.pruner.gradients_pointwise import POINTWISE
from graphopt.runner import BATCH_SECONDS, Runner

__all__ = ["Tape", "unknown", "with_inputs"]

Values = Mapping[str, Array]
_FLAT = frozenset(
    {"And", "ArgMax", "ArgMin", "Ceil", "Equal", "Floor", "Greater", "GreaterOrEqual", "IsInf"}
    | {"IsNaN", "Less", "LessOrEqual", "Not", "Or", "Round", "Shape", "Sign", "Size", "Xor"}
)
"""What these compute does not answer to small changes."""
_RULES = {**LINEAR, **MOVES, **POINTWISE}


class Tape:
    """A model whose chosen constants are inputs, with all values that going back takes.

    Raises InputError where an operator between these constants and the outputs has no rule.
    """

    def __init__(self, model: ir.Model, names: Sequence[str]) -> None:
        self._nodes = _path(model, set(names))
        strange = unknown(model, names)
        if strange is not None:
            raise InputError(f"no gradient is known of {strange.op_type} ({ir.label(strange)})")
        self.reached = {node.outputs[0].name or "" for node in self._nodes}
        """Values that answer to the chosen constants."""
        self.outputs = [value.name or "" for value in model.graph.outputs]
        self._constants = {
            name: array
            for name, value in model.graph.initializers.items()
            if (array := ir.array(value)) is not None and name not in names
        }
        copy = with_inputs(model, names)
        graph = copy.graph
        known = {v.name: v for node in graph for v in node.outputs if v.name}
        wanted = dict.fromkeys(
            value.name
            for node in self._nodes
            for value in (*node.inputs, *_results(node))
            if value is not None and value.name in known
        )
        shown = {value.name for value in graph.outputs}
        graph.outputs.extend(known[name] for name in wanted if name not in shown)
        self._runner = Runner(copy, seconds=BATCH_SECONDS)

    def forward(self, feeds: Values, parameters: Values) -> dict[str, Array]:
        """All values by name."""
        found = self._runner.run({**feeds, **parameters})
        return {**self._constants, **feeds, **parameters, **cast("dict[str, Array]", found)}

    def backward(self, values: Values, slopes: Values, names: Sequence[str]) -> dict[str, Array]:
        """Gradients by these constants, given those by the outputs."""
        known: dict[str, Array] = dict(slopes)
        for node in reversed(self._nodes):
            slope = _slope(node, known, values)
            if slope is None:
                continue
            inputs = [values[v.name or ""] for v in node.inputs if v is not None]
            found = _RULES[node.op_type](node, inputs, values[node.outputs[0].name or ""], slope)
            for value, gradient in zip(node.inputs, found, strict=False):
                if value is None or gradient is None or value.name is None:
                    continue
                earlier = known.get(value.name)
                known[value.name] = gradient if earlier is None else earlier + gradient
        return {name: known[name] for name in names if name in known}


def unknown(model: ir.Model, names: Sequence[str]) -> ir.Node | None:
    """A node between constants and the outputs whose gradient is not known, where there is one."""
    for node in _path(model, set(names)):
        if node.domain not in ("", "ai.onnx") or node.op_type not in _RULES:
            return node
    return None


def with_inputs(model: ir.Model, names: Sequence[str]) -> ir.Model:
    """A copy in which constants are inputs."""
    copy = files.copy(model)
    for name in names:
        value = copy.graph.initializers.pop(name)
        value.const_value = None
        copy.graph.inputs.append(value)
    return copy


def _path(model: ir.Model, names: set[str]) -> list[ir.Node]:
    """The nodes between the constants and the outputs, in order."""
    reached: set[ir.Value] = {
        value for name, value in model.graph.initializers.items() if name in names
    }
    forward: list[ir.Node] = []
    for node in model.graph:
        if node.op_type in _FLAT:
            continue
        if any(value in reached for value in node.inputs if value is not None):
            forward.append(node)
            reached.update(node.outputs)
    needed = set(model.graph.outputs)
    path: list[ir.Node] = []
    for node in reversed(forward):
        if any(value in needed for value in node.outputs):
            path.append(node)
            needed.update(value for value in node.inputs if value is not None)
    return path[::-1]


def _results(node: ir.Node) -> Sequence[ir.Value]:
    """The outputs that have gradients: the parts of a Split, else the first."""
    return node.outputs if node.op_type == "Split" else node.outputs[:1]


def _slope(node: ir.Node, known: dict[str, Array], values: Values) -> Array | None:
    """The gradient by a node's results, those of the parts of a Split joined; it is used up."""
    names = [value.name or "" for value in _results(node)]
    slopes = [known.pop(name, None) for name in names]
    if len(slopes) == 1 or not any(slope is not None for slope in slopes):
        return slopes[0]
    parts = [
        np.zeros_like(values[name]) if slope is None else slope
        for name, slope in zip(names, slopes, strict=True)
    ]
    return np.concatenate(parts, integer(node, "axis", 0))
