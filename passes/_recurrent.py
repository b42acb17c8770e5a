"""Building recurrent layers from cells that were read: their weights, and the operator."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from graphopt import ir
from graphopt.dims import DimLike
from graphopt.passes._cells import Cell
from graphopt.passes._steps import Leaf, Linear
from graphopt.passes._views import axes_arguments
from graphopt.rewriting import Op, Refuse


@dataclass(frozen=True)
class Weights:
    """Of all gates: of the step [in, n] and the state [hidden, n] each, and the biases [n]."""

    step: tuple[ir.Array, ...]
    state: tuple[ir.Array, ...]
    bias: tuple[ir.Array, ...]

    @classmethod
    def of(cls, cell: Cell, x: Leaf, h: Leaf | None) -> Weights | None:
        """The weights of a cell whose step and state these are; None where there are others.

        Without a state, it is zero, and what is not known of the weights is empty.
        """
        step, state, bias = list[ir.Array](), list[ir.Array](), list[ir.Array]()
        leaves = {leaf for leaf in (x, h) if leaf is not None}
        for index, gate in enumerate(cell.gates):
            if gate is None:
                gate = Linear({}, np.zeros(0, np.float32))
            elif not gate.weights.keys() <= leaves:
                return None
            last_of_gru = cell.kind == "GRU" and index == 3
            wanted = h if last_of_gru else x
            if wanted is not None and gate.bias.size and wanted not in gate.weights:
                return None
            if last_of_gru and x in gate.weights:
                return None
            empty = np.zeros((0, 0), np.float32)
            step.append(gate.weights.get(x, empty))
            state.append(empty if h is None else gate.weights.get(h, empty))
            bias.append(gate.bias)
        return cls(tuple(step), tuple(state), tuple(bias))

    def equal(self, other: Weights, *, first: bool = False) -> bool:
        """Whether two cells compute the same; of a first one a zero state hides something."""
        pairs = [
            *zip(self.step, other.step, strict=True),
            *zip(self.state, other.state, strict=True),
            *zip(self.bias, other.bias, strict=True),
        ]
        return all(
            (first and not (a.size and b.size))
            or a is b
            or (a.size == b.size == 0)
            or (a.ndim == b.ndim == 1 and np.allclose(a, b, rtol=1e-5, atol=1e-6))
            or (a.shape == b.shape and bool(np.array_equal(a, b)))
            for a, b in pairs
        )


@dataclass(frozen=True)
class Layer:
    """What an operator is made of: the sequence [T, B, in], weights, and first states."""

    cell: Cell
    weights: Weights
    sequence: ir.Value
    hidden: ir.Value | None
    state: ir.Value | None
    reverse: bool = False

    def build(self, op: Op) -> list[ir.Value]:
        """The operator; its outputs, as the states [T, B, H] of all steps and [B, H] at last.

        Raises:
            Refuse: another type, or shapes that are not proven to fit.
        """
        cell, weights = self.cell, self.weights
        size, batch = self._sizes(op)
        parts = list(weights.state)
        more: list[ir.Array] = [np.zeros(1, np.float32)] * len(cell.gates)
        count = len(cell.gates)
        if cell.kind == "GRU":
            parts[2], more[2], count = weights.state[3], weights.bias[3], 3
        step = np.concatenate(weights.step[:count], axis=1).T
        state = np.concatenate(parts[:count], axis=1).T
        biases = [*weights.bias[:count], *more[:count]]
        bias = np.concatenate([np.broadcast_to(b, (size,)) for b in biases])
        inputs: list[Any] = [self.sequence]
        inputs += [
            op.initializer(a[None], name) for a, name in ((step, "w"), (state, "r"), (bias, "b"))
        ]
        front, inside = axes_arguments(op, [0])
        for value in [None, self.hidden, *([self.state] if cell.kind == "LSTM" else [])]:
            if value is not None and op.shape(value) != (batch, size):
                raise Refuse("a first state is not proven to be of the size of the others")
            inputs.append(None if value is None else op.Unsqueeze(value, *front, **inside))
        while inputs[-1] is None:
            inputs.pop()
        attributes: dict[str, Any] = {"hidden_size": size}
        if self.reverse:
            attributes["direction"] = "reverse"
        if cell.linear_before_reset:
            attributes["linear_before_reset"] = 1
        if cell.activation != "Tanh":
            attributes["activations"] = [cell.activation]
        outputs = 3 if cell.kind == "LSTM" else 2
        made = op.build(cell.kind, inputs, attributes, outputs=outputs)
        ends = [op.Squeeze(value, *front, **inside) for value in made[1:]]
        second, inside = axes_arguments(op, [1])
        return [op.Squeeze(made[0], *second, **inside), *ends]

    def _sizes(self, op: Op) -> tuple[int, DimLike]:
        shape, steps = op.shape(self.cell.hidden), op.shape(self.sequence)
        if shape is None or steps is None or len(shape) != 2 or len(steps) != 3:
            raise Refuse("steps or states are no matrices")
        if op.dtype(self.cell.hidden) != ir.DataType.FLOAT:
            raise Refuse("needs float32")
        if steps[1] != shape[0] or not isinstance(shape[1], int):
            raise Refuse("batches are not proven to be those of the sequence")
        known = [w for w in (*self.weights.step, *self.weights.state) if w.size]
        count = 4 if self.cell.kind == "GRU" else len(self.cell.gates)
        wanted = 2 * count - (2 if self.cell.kind == "GRU" else 0)
        if len(known) != wanted or any(w.shape[1] != shape[1] for w in known):
            raise Refuse("its gates are not of one size")
        return shape[1], shape[0]
