"""Weights that are stored smaller: nodes at the top of the graph give back what they were."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from graphopt import ir
from graphopt.context import Context
from graphopt.driver import drop_initializer, replace_value
from graphopt.errors import InputError
from graphopt.quantizer import palettes
from graphopt.wildcards import check, fits, names

_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE)
_INT32 = ir.DataType.INT32.value
_OLDEST = 11
"""The opset that has BitShift."""


def require_packing(context: Context, name: str) -> None:
    """Raise InputError where a pass of this name cannot unpack what it would store."""
    if ir.opset(context.model.graph) < _OLDEST:
        raise InputError(f"{name} needs opset {_OLDEST}: add convert-opset before it")


def candidates(context: Context, least: int, keep: Sequence[str]) -> Iterator[ir.Value]:
    """The weights of the main graph: floats of two axes and more with `least` elements and more.

    Those that callers may override are no constants and are said to be left alone; `keep` are
    patterns of others. The time limit is looked at before each.

    Raises:
        InputError: a pattern that fits nothing.
    """
    check(context.model, keep)
    for value in _weights(context, least):
        context.check_time()
        if not fits(keep, *names(value)):
            yield value


def _weights(context: Context, least: int) -> list[ir.Value]:
    """All at once, since passes change the graph as they go."""
    found: list[ir.Value] = []
    for value in context.model.graph.initializers.values():
        tensor = value.const_value
        if tensor is None or tensor.dtype not in _FLOATS or len(tensor.shape) < 2:
            continue
        if tensor.size < least or value.is_graph_output():
            continue
        if value.is_graph_input():
            context.record.refusals.setdefault("callers may override it", set()).add(
                str(value.name)
            )
        else:
            found.append(value)
    return found


class Unpacking:
    """The nodes that compute one weight; they stand first in the graph, and folding spares them."""

    def __init__(self, context: Context, weight: ir.Value) -> None:
        self._context = context
        self._weight = weight
        self._nodes: list[ir.Node] = []
        self.opset = ir.opset(context.model.graph)

    def refuse(self, reason: str) -> None:
        """Note why the weight stays as it is."""
        self._context.record.refusals.setdefault(reason, set()).add(str(self._weight.name))

    def constant(self, array: Any, dtype: ir.DataType | None = None) -> ir.Value:
        """A new initializer; `dtype` where numpy has no such type, as for 4 bits."""
        tensor = ir.Tensor(array, dtype=dtype) if dtype is not None else ir.tensor(array)
        graph = self._context.model.graph
        return self._context.initializer(graph, tensor, f"{self._weight.name}_stored")

    def op(self, kind: str, *inputs: ir.Value, **attributes: Any) -> ir.Value:
        """The output of a new node."""
        made = ir.convenience.convert_attributes(attributes)
        name = self._context.unique_node(f"{self._weight.name}_{kind}")
        node = ir.Node("", kind, inputs, made, name=name)
        node.outputs[0].name = self._context.unique(f"{self._weight.name}_{kind}")
        node.metadata_props[ir.STORED] = str(self._weight.name)
        self._nodes.append(node)
        return node.outputs[0]

    def indices(self, index: palettes.Bytes, bits: int) -> ir.Value:
        """Numbers below 2**bits, uint8, as a flat int32 value made of no more bits than they have.

        A number of 5 bits is one of 4 and one of 1; each of these planes fills its bytes, and is
        unpacked by two shifts.
        """
        flat: Any = index.ravel()
        shift = bits
        total: ir.Value | None = None
        for width in palettes.planes(bits):
            shift -= width
            part = self._plane((flat >> shift) & (2**width - 1), width)
            part = self.op("Cast", part, to=_INT32)
            if shift:
                part = self.op("Mul", part, self.constant(np.array(1 << shift, np.int32)))
            total = part if total is None else self.op("Add", total, part)
        assert total is not None
        return total

    def _plane(self, numbers: Any, width: int) -> ir.Value:
        if width == 8:
            return self.constant(numbers)
        packed = palettes.pack(numbers, width)
        per_byte = 8 // width
        left = (8 - width * np.arange(1, per_byte + 1)).astype(np.uint8)[:, None]
        rows = self.constant(packed[None])
        rows = self.op("BitShift", rows, self.constant(left), direction="LEFT")
        right = self.constant(np.array(8 - width, np.uint8))
        rows = self.op("BitShift", rows, right, direction="RIGHT")
        flat = self.op("Reshape", rows, self.constant(np.array([-1], np.int64)))
        if packed.size * per_byte == numbers.size:
            return flat
        ends = [self.constant(np.array([n], np.int64)) for n in (0, numbers.size)]
        return self.op("Slice", flat, *ends)

    def finish(self, result: ir.Value, rule: str) -> None:
        """Put the nodes into the graph and `result` in the weight's place."""
        context, weight, graph = self._context, self._weight, self._context.model.graph
        first = next(iter(graph), None)
        assert first is not None  # a weight that nothing uses is no candidate's business
        graph.insert_before(first, self._nodes)
        context.changed(rule, [str(weight.name)], self._nodes)
        replace_value(context, weight, result, fresh=True)
        drop_initializer(context, weight)
        for node in self._nodes:
            context.shapes.update(node, graph)
