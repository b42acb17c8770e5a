"""LSTM, GRU and RNN of a known length, as copies of their cell; ONNX operators of those names.

The products of all inputs with the input weights are one matrix product before the copies.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from graphopt.backends._tvm_call import Call, is_constant, tensor
from graphopt.backends._tvm_indices import number

relax: Any = importlib.import_module("tvm.relax")
_op: Any = relax.op

_MOST_STEPS = 64
_ACTIVATIONS = {
    "LSTM": ("Sigmoid", "Tanh", "Tanh"),
    "GRU": ("Sigmoid", "Tanh"),
    "RNN": ("Tanh",),
}
_GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}
_FUNCTIONS: dict[str, Callable[[Any], Any]] = {
    "Sigmoid": _op.sigmoid,
    "Tanh": _op.tanh,
    "Relu": _op.nn.relu,
}


def convert(call: Call) -> Any:
    """Y, Y_h and, for an LSTM, Y_c.

    Raises:
        NotImplementedError: a length known at run time only or above 64 steps, sequence lengths
            per sample, peepholes, clipping, coupled gates, other activations, batch first.
    """
    kind = call.node.op_type
    steps = _steps(call)
    direction = str(call.attribute("direction", "forward"))
    ways = 2 if direction == "bidirectional" else 1
    hidden = int(call.inputs[2].ty.shape[2])
    outputs: list[Any] = []
    lasts: list[Any] = []
    cells: list[Any] = []
    for way in range(ways):
        backwards = direction == "reverse" or way == 1
        ys, last, cell = _one_way(call, way, ways, hidden, steps, backwards)
        outputs.append(_op.stack(ys, axis=0))
        lasts.append(last)
        cells.append(cell)
    results = [_op.stack(outputs, axis=1), _op.stack(lasts, axis=0)]
    if kind == "LSTM":
        results.append(_op.stack(cells, axis=0))
    return relax.Tuple([call.emit(result) for result in results])


def _steps(call: Call) -> int:
    steps = number(call.inputs[0].ty.shape[0])
    if steps is None:
        raise NotImplementedError("its number of steps is known at run time only: set it with dims")
    if steps > _MOST_STEPS:
        raise NotImplementedError(f"{steps} steps, of which at most {_MOST_STEPS} are unrolled")
    if call.get(4) is not None or call.get(7) is not None:
        raise NotImplementedError("sequence lengths and peepholes")
    if any(call.attribute(name, 0) for name in ("clip", "input_forget", "layout")):
        raise NotImplementedError("one of clip, input_forget and layout")
    return steps


def _one_way(
    call: Call, way: int, ways: int, hidden: int, steps: int, backwards: bool
) -> tuple[Sequence[Any], Any, Any]:
    """The outputs in order of time, and the last states, of one direction."""
    kind, x = call.node.op_type, call.inputs[0]
    batch = x.ty.shape[1]
    w, r = (_slice(call, value, way) for value in call.inputs[1:3])
    wide = _GATES[kind] * hidden
    b = None if call.get(3) is None else _slice(call, call.inputs[3], way)
    states = [
        _slice(call, state, way)
        if state is not None
        else _op.full((batch, hidden), relax.const(0.0, x.ty.dtype))
        for state in (call.get(5), call.get(6))
    ]
    projected = _op.matmul(x, _transposed(call, w))
    if b is not None:
        projected = _op.add(projected, _cut(call, b, 0, 0, wide))
    projected = call.emit(projected)
    recurrent = _transposed(call, r)
    extra = None if b is None else _cut(call, b, 0, wide, 2 * wide)
    cell = _Cell(call, hidden, recurrent, extra, way, ways)
    h, c = states
    outputs: list[Any] = [None] * steps
    for step in reversed(range(steps)) if backwards else range(steps):
        given = _op.squeeze(_op.strided_slice(projected, [0], [step], [step + 1]), [0])
        h, c = cell(call.emit(given), h, c)
        outputs[step] = h
    return outputs, h, c


class _Cell:
    """One step of a recurrent layer."""

    def __init__(
        self, call: Call, hidden: int, recurrent: Any, bias: Any, way: int, ways: int
    ) -> None:
        kind = call.node.op_type
        self._call, self._hidden = call, hidden
        self._recurrent, self._bias = recurrent, bias
        self._before = not call.attribute("linear_before_reset", 0)
        names = call.attribute("activations", None) or _ACTIVATIONS[kind] * ways
        count = len(_ACTIVATIONS[kind])
        names = list(names)[way * count : (way + 1) * count]
        unknown = [name for name in names if name not in _FUNCTIONS]
        if unknown:
            raise NotImplementedError(f"the activation {unknown[0]}")
        self._functions = [_FUNCTIONS[name] for name in names]
        self._step = {"LSTM": self._lstm, "GRU": self._gru, "RNN": self._rnn}[kind]

    def __call__(self, given: Any, h: Any, c: Any) -> tuple[Any, Any]:
        h, c = self._step(given, h, c)
        return self._call.emit(h), self._call.emit(c)

    def _part(self, value: Any, first: int, last: int) -> Any:
        axis = 1 if value.ty.ndim == 2 else 0
        return _cut(self._call, value, axis, first * self._hidden, last * self._hidden)

    def _product(self, h: Any, first: int, last: int) -> Any:
        product = _op.matmul(h, self._part(self._recurrent, first, last))
        if self._bias is not None:
            product = _op.add(product, self._part(self._bias, first, last))
        return self._call.emit(product)

    def _rnn(self, given: Any, h: Any, c: Any) -> tuple[Any, Any]:
        return self._functions[0](_op.add(given, self._product(h, 0, 1))), c

    def _lstm(self, given: Any, h: Any, c: Any) -> tuple[Any, Any]:
        gate, inner, outer = self._functions
        total = self._call.emit(_op.add(given, self._product(h, 0, 4)))
        i, o, f, g = (self._part(total, n, n + 1) for n in range(4))
        c = self._call.emit(_op.add(_op.multiply(gate(f), c), _op.multiply(gate(i), inner(g))))
        return _op.multiply(gate(o), outer(c)), c

    def _gru(self, given: Any, h: Any, c: Any) -> tuple[Any, Any]:
        gate, inner = self._functions
        two = self._call.emit(_op.add(self._part(given, 0, 2), self._product(h, 0, 2)))
        z, r = (self._call.emit(gate(self._part(two, n, n + 1))) for n in range(2))
        if self._before:
            hidden = self._product(self._call.emit(_op.multiply(r, h)), 2, 3)
        else:
            hidden = _op.multiply(r, self._product(h, 2, 3))
        new = inner(_op.add(self._part(given, 2, 3), hidden))
        one = relax.const(1.0, h.ty.dtype)
        kept = _op.multiply(z, h)
        return _op.add(_op.multiply(_op.subtract(one, z), new), kept), c


def _slice(call: Call, value: Any, way: int) -> Any:
    """The part of a weight, bias or state that belongs to one direction."""
    if is_constant(value):
        return tensor(np.ascontiguousarray(value.value.numpy()[way]))
    return call.emit(_op.squeeze(_op.strided_slice(value, [0], [way], [way + 1]), [0]))


def _cut(call: Call, value: Any, axis: int, start: int, end: int) -> Any:
    """The part of a matrix or vector from one index of an axis to another."""
    if is_constant(value):
        array = value.value.numpy()
        return tensor(np.ascontiguousarray(array[(slice(None),) * axis + (slice(start, end),)]))
    return call.emit(_op.strided_slice(value, [axis], [start], [end]))


def _transposed(call: Call, value: Any) -> Any:
    if is_constant(value):
        return tensor(np.ascontiguousarray(value.value.numpy().T))
    return call.emit(_op.permute_dims(value))
