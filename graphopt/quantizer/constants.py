"""Constants of nodes exchanged for others."""

from __future__ import annotations

import numpy as np

from graphopt import ir
from graphopt.context import Context
from graphopt.driver import drop_initializer, is_used
from graphopt.errors import InputError

__all__ = ["constant_value", "drop_unused", "replace_constant"]


def constant_value(context: Context, graph: ir.Graph, array: ir.Array, hint: str) -> ir.Value:
    """A new initializer of a graph of the main graph's; arrays of int4 … as ml_dtypes."""
    tensor = ir.tensor(np.ascontiguousarray(array) if array.ndim else array)
    return context.initializer(graph, tensor, hint)


def replace_constant(context: Context, node: ir.Node, index: int, array: ir.Array) -> None:
    """Give a node of the main graph another constant operand, of the type of its old one.

    The old one goes where nothing else uses it, and the new one takes its name.

    Raises:
        InputError: a value that the type cannot hold.
    """
    old = node.inputs[index]
    tensor = ir.constant(old)
    assert old is not None and tensor is not None and node.graph is not None
    with np.errstate(over="ignore"):
        cast = array.astype(tensor.dtype.numpy())
    if tensor.dtype.is_floating_point() and not np.isfinite(cast.astype(np.float64)).all():
        raise InputError(f"a new weight of {ir.label(node)} is beyond what {tensor.dtype} holds")
    node.replace_input_with(index, None)
    drop_unused(context, old)
    node.replace_input_with(index, constant_value(context, node.graph, cast, old.name or "weight"))


def drop_unused(context: Context, value: ir.Value) -> bool:
    """Remove an initializer that nothing takes any more; whether it is gone."""
    if not value.is_initializer() or is_used(value) or value.is_graph_input():
        return False
    drop_initializer(context, value)
    return True
