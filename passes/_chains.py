"""Chains of element-wise operators on one tensor, which commute with moving its elements."""

from __future__ import annotations

from typing import Any

from graphopt import ir
from graphopt.passes._layout import BROADCASTING, UNARY
from graphopt.rewriting import Op

_LENGTH = 8


def chain_above(op: Op, value: ir.Value | None) -> tuple[list[ir.Node], ir.Value] | None:
    """(operators from the last to the first, what the first is applied to) above a value.

    Each operator has one operand that is no number, and nothing else uses its result. The chain
    may be empty; None for a missing value.
    """
    nodes: list[ir.Node] = []
    while value is not None:
        node = value.producer()
        operand = None if node is None or op.uses(value) != 1 else _operand(op, node)
        if node is None or operand is None or len(nodes) == _LENGTH:
            return nodes, value
        nodes.append(node)
        value = node.inputs[operand]
    return None


def _operand(op: Op, node: ir.Node) -> int | None:
    """The index of the only operand that is no number; None where there is no such one."""
    if node.domain or len(node.outputs) != 1:
        return None
    if node.op_type in UNARY:
        return 0
    if node.op_type not in BROADCASTING:
        return None
    others = [i for i, v in enumerate(node.inputs) if v is not None and not _is_number(v)]
    if len(others) != 1:
        return None
    value = node.inputs[others[0]]
    rank = None if value is None else op.rank(value)
    return others[0] if rank is not None and rank == op.rank(node.outputs[0]) else None


def _is_number(value: ir.Value) -> bool:
    tensor = ir.constant(value)
    return tensor is not None and tensor.size == 1


def replayed(op: Op, nodes: list[ir.Node], source: ir.Value) -> ir.Value:
    """A chain applied to another tensor; numbers lose the axes that they may have."""
    value = source
    for node in reversed(nodes):
        index = 0 if node.op_type in UNARY else _operand(op, node)
        inputs: list[Any] = list(node.inputs)
        for place, constant in enumerate(inputs):
            array = op.const(constant) if place != index else None
            if array is not None and array.ndim:
                inputs[place] = op.initializer(array.reshape(()))
        inputs[index or 0] = value
        value = op.build(node.op_type, inputs, node.attributes)[0]
    return value
