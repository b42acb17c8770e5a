"""Channels of a model spread apart without a change of what it computes."""

from __future__ import annotations

from typing import Any

import numpy as np

from graphopt import files, ir


def spread(model: ir.Model, seed: int = 0, decades: float = 1.5) -> tuple[ir.Model, int]:
    """A copy, and how many pairs Conv -> Relu -> Conv in it were changed.

    A channel between the two is multiplied by 10**u, with u uniform within `decades` on both sides
    of 0, and the weights that read it are divided by that.
    """
    copy = files.copy(model)
    rng = np.random.default_rng(seed)
    count = 0
    for node in copy.graph:
        readers = _readers(node)
        weights: Any = ir.array(node.inputs[1]) if readers else None
        if weights is None:
            continue
        factors = (10 ** rng.uniform(-decades, decades, len(weights))).astype(np.float32)
        _put(node, 1, weights * factors.reshape(-1, *[1] * (weights.ndim - 1)))
        bias: Any = ir.array(node.inputs[2]) if len(node.inputs) > 2 else None
        if bias is not None:
            _put(node, 2, bias * factors)
        for reader in readers:
            inner: Any = ir.array(reader.inputs[1])
            assert inner is not None
            _put(reader, 1, inner / factors.reshape(1, -1, *[1] * (inner.ndim - 2)))
        count += 1
    return copy, count


def _readers(node: ir.Node) -> list[ir.Node]:
    """The Convs without groups that alone read a Conv's result, through a Relu."""
    if node.op_type != "Conv" or [n.op_type for n, _ in node.outputs[0].uses()] != ["Relu"]:
        return []
    result = next(iter(node.outputs[0].uses())).node.outputs[0]
    readers = [n for n, _ in result.uses()]
    plain = all(n.op_type == "Conv" and ir.attribute(n, "group", 1) == 1 for n in readers)
    return [] if result.is_graph_output() or not plain else readers


def _put(node: ir.Node, index: int, array: Any) -> None:
    value = node.inputs[index]
    assert value is not None
    value.const_value = ir.tensor(np.ascontiguousarray(array, np.float32), name=value.name)
