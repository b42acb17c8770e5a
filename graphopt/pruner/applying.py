"""Taking groups out of a model, and the masked model that must compute the same."""

from __future__ import annotations

import copy

import numpy as np

from graphopt import files, ir
from graphopt.pruner.adjusting import Kept, adjust
from graphopt.pruner.groups import Groups

__all__ = ["apply", "mask"]

_SPARED = {
    # A zero here would divide by zero; without it the pruned channels are zero all the same.
    "BatchNormalization": (3, 4),
    "DequantizeLinear": (1, 2),
    "Div": (1,),
    "Mod": (1,),
    "QLinearConv": (1, 2, 4, 5, 6, 7),
    "QLinearMatMul": (1, 2, 4, 5, 6, 7),
    "QuantizeLinear": (1, 2),
}


def apply(groups: Groups, kept: Kept) -> ir.Model:
    """A copy of the traced model without what is pruned: constants, and sizes that nodes name."""
    model, view = _twin(groups, kept)
    for value, axes in list(view.trace.axes.items()):
        if not any(view.gone[axis].any() for axis in axes):
            continue
        tensor = ir.constant(value)
        if tensor is None:
            _reshape_type(view, value)
            continue
        array = tensor.numpy()
        for index, axis in enumerate(axes):
            if view.gone[axis].any():
                array = np.take(array, view.positions(axis), index)
        _store(value, np.ascontiguousarray(array), tensor.dtype)
    for node in list(ir.all_nodes(model)):
        adjust(view, node)
    return model


def _twin(groups: Groups, kept: Kept) -> tuple[ir.Model, Kept]:
    """A copy of the model, and the same knowledge about the copy's values."""
    model = files.copy(groups.model)
    pairs: dict[ir.Value, ir.Value] = {}
    for old, new in zip(ir.graphs(groups.model), ir.graphs(model), strict=True):
        pairs.update(zip(old.inputs, new.inputs, strict=True))
        pairs.update((value, new.initializers[name]) for name, value in old.initializers.items())
        for first, second in zip(old, new, strict=True):
            pairs.update(zip(first.outputs, second.outputs, strict=True))
    trace = copy.copy(groups.trace)
    trace.model = model
    trace.axes = {pairs[value]: axes for value, axes in groups.trace.axes.items()}
    trace.shapes = copy.copy(trace.shapes)
    facts = groups.trace.shapes.facts
    trace.shapes.facts = {pairs[v]: fact for v, fact in facts.items() if v in pairs}
    return model, Kept(trace, kept.gone)


def _store(value: ir.Value, array: ir.Array, dtype: ir.DataType) -> None:
    value.const_value = ir.tensor(array, dtype=dtype, name=value.name)
    value.shape = ir.Shape(array.shape)


def _reshape_type(kept: Kept, value: ir.Value) -> None:
    if value.shape is None:
        return
    sizes = kept.sizes(value)
    value.shape = ir.Shape([sizes.get(i, size) for i, size in enumerate(value.shape)])


def mask(groups: Groups, kept: Kept) -> ir.Model:
    """A copy of the traced model, unpruned, in which what is pruned is zero."""
    trace = groups.trace
    spared = {
        node.inputs[index]
        for node in ir.all_nodes(groups.model)
        for index in _SPARED.get(node.op_type, ())
        if index < len(node.inputs)
    }
    zeros = _zero_points(groups.model)
    saved: list[tuple[ir.Value, ir.TensorProtocol]] = []
    for value, axes in trace.axes.items():
        tensor = value.const_value if value.is_initializer() else None
        if tensor is None or value in spared or tensor.dtype == ir.DataType.STRING:
            continue
        if not any(kept.gone[axis].any() for axis in axes):
            continue
        array = tensor.numpy().copy()
        zero = zeros.get(value)
        for index, axis in enumerate(axes):
            gone = np.flatnonzero(kept.gone[axis])
            where = (slice(None),) * index + (gone,)
            array[where] = 0 if zero is None else np.broadcast_to(zero, array.shape)[where]
        saved.append((value, tensor))
        value.const_value = ir.tensor(array, dtype=tensor.dtype, name=value.name)
    try:
        return files.copy(groups.model)
    finally:
        for value, tensor in saved:
            value.const_value = tensor


def _zero_points(model: ir.Model) -> dict[ir.Value, ir.Array]:
    """What stands for zero in quantized weights, shaped to broadcast over them."""
    found: dict[ir.Value, ir.Array] = {}
    places = {"DequantizeLinear": (0, 2, 1), "QLinearConv": (3, 5, 0), "QLinearMatMul": (3, 5, 1)}
    for node in ir.all_nodes(model):
        weight, zero, default = places.get(node.op_type, (0, 0, 0))
        if not zero or zero >= len(node.inputs):
            continue
        value, point = node.inputs[weight], ir.array(node.inputs[zero])
        if value is None or point is None or ir.constant(value) is None:
            continue
        rank = len(value.shape or ())
        axis = int(str(ir.attribute(node, "axis", default))) % max(rank, 1)
        shape = [-1 if index == axis else 1 for index in range(rank)]
        found[value] = point.reshape(shape) if point.size > 1 else point.reshape([1] * rank)
    return found
