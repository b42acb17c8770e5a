"""Reading recurrent cells: gates as linear functions of a step of a sequence and of a state.

The equations are those of ONNX's LSTM, GRU and RNN; gates are told by what they do, so that it
does not matter in which order a weight holds them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from graphopt import ir
from graphopt.passes._steps import Leaf, Linear, LinearReader
from graphopt.passes.eliminate_zero_state import is_zero


@dataclass(frozen=True)
class Cell:
    """One iteration: its gates are those of the operator, in its order.

    The last of a GRU is what the reset gate is multiplied by: a linear function of the state, or,
    where the gate is applied before that, of the state times the gate.
    """

    kind: str
    hidden: ir.Value
    gates: tuple[Linear | None, ...]
    """None for the gate of a state that is zero."""
    before: ir.Value | None
    """The state of an LSTM or GRU before it; None for an RNN, and for zeros."""
    state: ir.Value | None = None
    """Of an LSTM."""
    activation: str = "Tanh"
    linear_before_reset: bool = False
    nodes: tuple[ir.Node, ...] = ()


class _Mix(NamedTuple):
    """A sum of what is new and what is old, in parts that a gate says."""

    gate: ir.Value
    keeps: bool
    """Whether the gate's part is that of the old."""
    new: ir.Value
    old: ir.Value | None
    nodes: tuple[ir.Node | None, ...]


class _Candidate(NamedTuple):
    """The new state of a GRU, from the step and from the state that it resets in part."""

    reset: Linear | None
    of_step: Linear
    of_state: Linear
    late: bool
    """Whether the reset gate is applied to a linear function of the state."""
    nodes: tuple[ir.Node | None, ...]


@dataclass
class Reader(LinearReader):
    """Reads cells."""

    _cells: dict[ir.Value, Cell | None] = field(default_factory=dict[ir.Value, Cell | None])

    def cell(self, value: ir.Value | None) -> Cell | None:
        """The cell whose hidden state a value is, or None."""
        if value is None:
            return None
        if value not in self._cells:
            found = self._lstm(value) or self._gru(value) or self._rnn(value)
            self._cells[value] = found
        return self._cells[value]

    def _lstm(self, value: ir.Value) -> Cell | None:
        """o tanh(c'), c' being f c + i g."""
        node = _made_by(value, "Mul")
        for first, second in _orders(node):
            tanh = _made_by(second, "Tanh")
            out = None if tanh is None else self.gate(first, "Sigmoid")
            state = None if tanh is None else tanh.inputs[0]
            if node is None or out is None or tanh is None or state is None:
                continue
            total = _made_by(state, "Add")
            for new, old in [(state, None)] if total is None else _orders(total):
                written, kept = self._written(new), self._kept(old)
                if written is None or kept is None:
                    continue
                gates = (written[0], out, kept[0], written[1])
                nodes = [node, tanh, total, _made_by(new, "Mul"), _made_by(old, "Mul")]
                nodes += [n for gate in gates if gate is not None for n in gate.nodes]
                covered = tuple(n for n in nodes if n is not None)
                return Cell("LSTM", value, gates, kept[1], state, nodes=covered)
        return None

    def _written(self, value: ir.Value | None) -> tuple[Linear, Linear] | None:
        """(i, g) where a value is sigmoid(i) tanh(g)."""
        for first, second in _orders(_made_by(value, "Mul")):
            gate, new = self.gate(first, "Sigmoid"), self.gate(second, "Tanh")
            if gate is not None and new is not None:
                return gate, new
        return None

    def _kept(self, value: ir.Value | None) -> tuple[Linear | None, ir.Value | None] | None:
        """(f, c) where a value is sigmoid(f) c; (None, None) for no value."""
        if value is None:
            return None, None
        for first, second in _orders(_made_by(value, "Mul")):
            gate = self.gate(first, "Sigmoid")
            if gate is not None and second is not None:
                return gate, None if is_zero(self.op, second) else second
        return None

    def _gru(self, value: ir.Value) -> Cell | None:
        """(1 - z) n + z h, in one of its forms."""
        for mix in self._mixes(value):
            gate, new = self.gate(mix.gate, "Sigmoid"), self._candidate(mix.new)
            old = None if mix.old is None or is_zero(self.op, mix.old) else mix.old
            if gate is None or new is None or (new.reset is None and old is not None):
                continue
            z = gate if mix.keeps else gate.times(-1.0)
            gates = (z, new.reset, new.of_step, new.of_state)
            nodes = [value.producer(), *mix.nodes, *new.nodes]
            nodes += [n for g in gates if g is not None for n in g.nodes]
            covered = tuple(n for n in nodes if n is not None)
            return Cell("GRU", value, gates, old, linear_before_reset=new.late, nodes=covered)
        return None

    def _mixes(self, value: ir.Value) -> Iterator[_Mix]:
        """The ways to see a value as a mix."""
        for factor, new in _orders(_made_by(value, "Mul")):  # of a state that is zero
            apart = _made_by(factor, "Sub")
            rest = None if apart is None else apart.inputs[1]
            if new is not None and rest is not None and self._is_one(apart):
                yield _Mix(rest, True, new, None, (apart,))
            elif new is not None and factor is not None:
                yield _Mix(factor, False, new, None, ())
        for first, second in _orders(_made_by(value, "Add")):
            product, other = _made_by(first, "Mul"), _made_by(second, "Mul")
            for factor, gate in _orders(product):
                apart = _made_by(factor, "Sub") or _made_by(factor, "Neg")
                if gate is None or second is None or apart is None:
                    continue
                nodes = (product, other, apart)
                one, two = [None, *apart.inputs][-2:]
                if two is second:  # (h - n) z + n
                    yield _Mix(gate, True, second, one, (product, apart))
                if two is second and one is not None:  # (n - h) z + h
                    yield _Mix(gate, False, one, second, (product, apart))
                if not self._is_one(apart):
                    continue
                for same, old in _orders(other):  # (1 - z) n + z h, or (1 - z) h + z n
                    if same is two and same is not None and old is not None:
                        yield _Mix(same, True, gate, old, nodes)
                        yield _Mix(same, False, old, gate, nodes)

    def _is_one(self, apart: ir.Node | None) -> bool:
        """Whether a difference is 1 - x."""
        return apart is not None and len(apart.inputs) == 2 and self.op.scalar(apart.inputs[0]) == 1

    def _candidate(self, value: ir.Value) -> _Candidate | None:
        tanh = _made_by(value, "Tanh")
        total = None if tanh is None else _made_by(tanh.inputs[0], "Add")
        for first, second in _orders(total):
            product = _made_by(second, "Mul")
            for gate, state in _orders(product):
                reset, of_state = self.gate(gate, "Sigmoid"), self.linear(state)
                of_step = None if reset is None else self.linear(first)
                if reset is not None and of_state is not None and of_step is not None:
                    return _Candidate(reset, of_step, of_state, True, (tanh, total, product))
        whole = None if tanh is None else self.linear(tanh.inputs[0])
        if whole is None:
            return None
        for leaf in whole.weights:
            product = _made_by(leaf, "Mul") if isinstance(leaf, ir.Value) else None
            for gate, state in _orders(product):
                reset = self.gate(gate, "Sigmoid")
                if reset is None or state is None:
                    continue
                rest = {k: v for k, v in whole.weights.items() if k is not leaf}
                inner: dict[Leaf, ir.Array] = {}
                if not is_zero(self.op, state):
                    inner[state] = whole.weights[leaf]
                of_step = Linear(rest, whole.bias, whole.nodes)
                of_state = Linear(inner, np.zeros(1, np.float32))
                return _Candidate(reset, of_step, of_state, False, (tanh, product))
        return _Candidate(None, whole, Linear({}, np.zeros(1, np.float32)), False, (tanh,))

    def _rnn(self, value: ir.Value) -> Cell | None:
        node = _made_by(value, "Tanh") or _made_by(value, "Relu")
        inner = None if node is None else self.linear(node.inputs[0])
        if node is None or inner is None or not 1 <= len(inner.weights) <= 2:
            return None
        nodes = (*inner.nodes, node)
        return Cell("RNN", value, (inner,), None, activation=node.op_type, nodes=nodes)


def _made_by(value: ir.Value | None, op_type: str) -> ir.Node | None:
    node = None if value is None else value.producer()
    return node if node is not None and node.op_type == op_type and not node.domain else None


def _orders(node: ir.Node | None) -> list[tuple[ir.Value | None, ir.Value | None]]:
    """The operands of a node of two, in both orders."""
    if node is None or len(node.inputs) != 2:
        return []
    first, second = node.inputs
    return [(first, second), (second, first)]
