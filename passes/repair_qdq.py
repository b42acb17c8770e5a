"""Rewrite the quantization of a model so that the target's runtime has kernels for it.

Why: models quantized for one runtime run on another as floats with conversions around them,
several times slower than before they were quantized.
Numerics: lossy.
Needs: QuantizeLinear and DequantizeLinear with constant parameters.

Scales stay where they are legal. Activations in the wrong type get the same range in the right one;
one scale takes the place of several; the bounds of a Relu or Clip become those of the range;
biases become int32; results that are left in floats get the range that the next quantization has.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from graphopt import ir
from graphopt.context import Context
from graphopt.driver import remove
from graphopt.pass_manager import Pass
from graphopt.quantizer.checking import Pair, absorbed_range, pair_of, scales_of
from graphopt.quantizer.constants import drop_unused
from graphopt.quantizer.grids import Grid
from graphopt.quantizer.placement import Table, table_for

_BOUNDING = frozenset({"Relu", "Clip"})


@dataclass(frozen=True)
class RepairQdq(Pass):
    """Repair for the target's table."""

    lossy: ClassVar[bool] = True

    placement: str = ""
    """A table by name; the target's by default."""

    def run(self, context: Context) -> None:
        """Repair activations, then biases, which depend on them."""
        table = table_for(context.target, self.placement)
        for node in list(context.model.graph):
            if node.op_type == "QuantizeLinear" and not node.domain and node.graph is not None:
                _store_weight(context, node)
        for node in list(context.model.graph):
            if node.op_type == "QuantizeLinear" and not node.domain and node.graph is not None:
                _repair_activation(context, node, table)
        for node in list(context.model.graph):
            if node.op_type in table.linear and not node.domain:
                _repair_bias(context, node, table)


def _store_weight(context: Context, node: ir.Node) -> None:
    """Round a constant once and for all."""
    array, pair = ir.array(node.inputs[0]), scales_of(node)
    if array is None or pair is None:
        return
    shape = [1] * array.ndim
    if not pair.per_tensor:
        shape[pair.axis] = -1
    tensor = Grid(pair.dtype).quantize(array, pair.scale.reshape(shape), pair.zero.reshape(shape))
    name = f"{node.inputs[0].name}_quantized" if node.inputs[0] is not None else "weight"
    value = context.initializer(context.model.graph, tensor, name)
    context.changed("stored weight", [node], [name])
    for use in tuple(node.outputs[0].uses()):
        use.node.replace_input_with(use.idx, value)
    remove(context, node)


def _repair_activation(context: Context, node: ir.Node, table: Table) -> None:
    """Type, symmetry and number of scales of a pair; a bound before it."""
    pair, grid = scales_of(node), table.activation
    users = [use.node for use in node.outputs[0].uses()]
    if pair is None or pair.dtype.name.startswith("FLOAT"):
        return
    if not all(user.op_type == "DequantizeLinear" for user in users):
        return
    reach = _widest_reach(pair)
    source = node.inputs[0]
    bound = None if source is None else source.producer()
    if bound is None or bound.op_type not in _BOUNDING or bound.domain or not table.outputs:
        bound = None
    inside = reach if bound is None else absorbed_range(bound, reach) or reach
    wrong_type = pair.dtype != grid.dtype or not pair.per_tensor
    wrong_type |= grid.symmetric and bool(pair.zero.any())
    if not wrong_type and inside == reach:
        _skip_bound(context, node, bound, reach)
        return
    scale, zero = grid.parameters(*inside)
    if wrong_type or bound is not None:
        _set(context, [node, *users], grid, scale, zero)
        context.changed("another range", [node], [node])
    lowest, highest = grid.limits
    new = ((lowest - float(zero)) * float(scale), (highest - float(zero)) * float(scale))
    _skip_bound(context, node, bound, new)


def _skip_bound(
    context: Context, node: ir.Node, bound: ir.Node | None, reach: tuple[float, float]
) -> None:
    """Take out a Relu or Clip that saturation repeats and nothing else uses."""
    if bound is None or ir.use_count(bound.outputs[0]) != 1 or bound.outputs[0].is_graph_output():
        return
    left = absorbed_range(bound, reach)
    slack = 1e-5 * max(abs(reach[0]), abs(reach[1]))
    if left is None or abs(left[0] - reach[0]) > slack or abs(left[1] - reach[1]) > slack:
        return
    context.changed("absorbed bound", [bound, node], [node])
    node.replace_input_with(0, bound.inputs[0])
    remove(context, bound)


def _set(
    context: Context, nodes: list[ir.Node], grid: Grid, scale: ir.Array, zero: ir.Array
) -> None:
    """Give nodes new parameters."""
    graph = context.model.graph
    hint = nodes[0].outputs[0].name or "x"
    new = [
        context.initializer(graph, ir.tensor(np.asarray(scale)), f"{hint}_scale"),
        context.initializer(graph, grid.zero_point(zero), f"{hint}_zero_point"),
    ]
    for node in nodes:
        old = [v for v in node.inputs[1:3] if v is not None]
        if len(node.inputs) < 3:
            node.resize_inputs(3)
        for index, value in enumerate(new, 1):
            node.replace_input_with(index, value)
        for name in ("axis", "output_dtype"):
            node.attributes.pop(name, None)
        for value in old:
            drop_unused(context, value)
    for node in nodes:
        if node.op_type == "QuantizeLinear":
            node.outputs[0].dtype = grid.dtype
            context.shapes.update(node, graph)


def _repair_bias(context: Context, node: ir.Node, table: Table) -> None:
    """An int32 bias with the scale of the products, or a float one."""
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    x, weight = pair_of(node.inputs[0]), pair_of(node.inputs[1])
    if bias is None or x is None or weight is None or not x.per_tensor:
        return
    values = _floats(bias)
    if values is None:
        return
    graph = context.model.graph
    if not table.integer_bias:
        if pair_of(bias) is not None:
            new = context.initializer(graph, ir.tensor(values.astype(np.float32)), f"{bias.name}")
            node.replace_input_with(2, new)
            context.changed("float bias", [node], [node])
        return
    wanted = x.scale.astype(np.float64).reshape(-1)[0] * weight.scale.astype(np.float64)
    old = pair_of(bias)
    if old is not None and old.dtype == ir.DataType.INT32 and np.allclose(old.scale, wanted, 1e-3):
        return
    wanted = np.broadcast_to(wanted, values.shape) if wanted.ndim else wanted
    whole = np.clip(np.rint(values / wanted), -(2**31) + 1, 2**31 - 1).astype(np.int32)
    grid = Grid(ir.DataType.INT32, symmetric=True)
    name = bias.name or "bias"
    inputs = [
        context.initializer(graph, ir.tensor(whole), f"{name}_quantized"),
        context.initializer(graph, ir.tensor(wanted.astype(np.float32)), f"{name}_scale"),
        context.initializer(graph, grid.zero_point(np.zeros(wanted.shape)), f"{name}_zero_point"),
    ]
    attributes = {"axis": 0} if wanted.ndim else {}
    attrs = [ir.convenience.convert_attribute(k, v) for k, v in attributes.items()]
    made = ir.Node("", "DequantizeLinear", inputs, attrs)
    made.outputs[0].name = context.unique(f"{name}_dequantized")
    made.name = context.unique_node(f"{name}_dequantized")
    graph.insert_before(node, made)
    context.shapes.update(made, graph)
    node.replace_input_with(2, made.outputs[0])
    context.changed("int32 bias", [node], [node])
    _drop(context, bias)


def _floats(value: ir.Value) -> ir.Array | None:
    """A bias as floats, whether it is stored so or in integers."""
    array = ir.array(value)
    if array is not None:
        return array.astype(np.float64)
    node, pair = value.producer(), pair_of(value)
    integers = None if node is None else ir.array(node.inputs[0])
    if integers is None or pair is None:
        return None
    whole = integers.astype(np.float64) - pair.zero.astype(np.float64)
    found: ir.Array = whole * pair.scale.astype(np.float64)
    return found


def _drop(context: Context, value: ir.Value) -> None:
    """Remove a constant, and its DequantizeLinear, that nothing uses any more."""
    node = value.producer()
    if value.uses() or value.is_graph_output():
        return
    if node is not None:
        inputs = [v for v in node.inputs if v is not None]
        remove(context, node)
        for operand in inputs:
            _drop(context, operand)
    else:
        drop_unused(context, value)


def _widest_reach(pair: Pair) -> tuple[float, float]:
    """The range that holds those of all channels."""
    lowest, highest = Grid(pair.dtype).limits
    scale, zero = pair.scale.astype(np.float64), pair.zero.astype(np.float64)
    if pair.dtype in (ir.DataType.INT8, ir.DataType.INT16) and not pair.zero.any():
        lowest += 1  # symmetric: as wide below as above
    low, high = ((lowest - zero) * scale).min(), ((highest - zero) * scale).max()
    return float(low), float(high)
