"""Rewrite the quantization of a model so that the target's runtime has kernels for it.

Why: models quantized for one runtime run on another as floats with conversions around them,
several times slower than before they were quantized.
Numerics: lossy.
Needs: QuantizeLinear and DequantizeLinear with constant parameters.

Scales stay where they are legal. Activations in the wrong type get the same range in the right one;
one scale takes the place of several; the bounds of a Relu or Clip become those of the range, and
where a range that ended at zero was one, a Relu takes its place; weights get the target's type;
biases become int32; what a target wants in floats is put out in floats.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from graphopt import ir
from graphopt.context import Context
from graphopt.driver import remove, replace_value
from graphopt.pass_manager import Pass
from graphopt.quantizer.checking import (
    Pair,
    absorbed_range,
    pair_of,
    reads_quantized,
    scales_of,
)
from graphopt.quantizer.constants import drop_unused
from graphopt.quantizer.grids import Grid
from graphopt.quantizer.insertion import bounds, weight_axis, weight_range
from graphopt.quantizer.placement import Table, table_for

_BOUNDING = frozenset({"Relu", "Clip"})
_NOT_NEGATIVE = frozenset({"Relu", "Sigmoid", "HardSigmoid", "Softmax", "Softplus", "Exp", "Abs"})
_PASSING = frozenset(
    (
        *("QuantizeLinear", "DequantizeLinear", "MaxPool", "AveragePool", "GlobalAveragePool"),
        *("Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze", "Identity", "Slice"),
    )
)
"""Operators whose results are not negative where their operands are not."""


@dataclass(frozen=True)
class RepairQdq(Pass):
    """Repair for the target's table."""

    lossy: ClassVar[bool] = True

    placement: str = ""
    """A table by name; the target's by default."""

    def run(self, context: Context) -> None:
        """Repair weights and activations, then biases, which depend on them."""
        table = table_for(context.target, self.placement)
        for node in _quantizing(context):
            _store_weight(context, node)
        for node in _quantizing(context):
            _repair_activation(context, node, table)
        for node in _linear(context, table):
            _repair_weight(context, node, table)
            _repair_bias(context, node, table)
        if not table.outputs:
            for node in _linear(context, table):
                _free_result(context, node)


def _quantizing(context: Context) -> list[ir.Node]:
    return [n for n in context.model.graph if n.op_type == "QuantizeLinear" and not n.domain]


def _linear(context: Context, table: Table) -> list[ir.Node]:
    return [n for n in context.model.graph if n.op_type in table.linear and not n.domain]


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
    if grid.symmetric:
        _bound(context, node, reach)
    if wrong_type or bound is not None:
        _set(context, [node, *users], grid, scale, zero)
        context.changed("another range", [node], [node])
    lowest, highest = grid.limits
    new = ((lowest - float(zero)) * float(scale), (highest - float(zero)) * float(scale))
    _skip_bound(context, node, bound, new)


def _bound(context: Context, node: ir.Node, reach: tuple[float, float]) -> None:
    """A Relu before a QuantizeLinear whose range, which ends at zero, bounds what it gets."""
    source = node.inputs[0]
    if reach[0] < 0 or source is None or _not_negative(source):
        return
    relu = ir.Node("", "Relu", [source])
    relu.outputs[0].name = context.unique(f"{source.name}_bounded")
    relu.name = context.unique_node(f"{source.name}_bounded")
    relu.meta[ir.SOURCES] = ir.sources(node)
    context.model.graph.insert_before(node, relu)
    context.shapes.update(relu, context.model.graph)
    node.replace_input_with(0, relu.outputs[0])
    context.changed("bound of its own", [node], [relu, node])


def _not_negative(value: ir.Value | None) -> bool:
    """Whether a value is known to be at least zero."""
    node = None if value is None else value.producer()
    if node is None or node.domain:
        return False
    if node.op_type == "Clip":
        limits = bounds(node)
        return limits is not None and limits[0] >= 0
    return node.op_type in _NOT_NEGATIVE or (
        node.op_type in _PASSING and _not_negative(node.inputs[0])
    )


def _free_result(context: Context, node: ir.Node) -> None:
    """Let a result go on in floats where nothing quantized takes it."""
    for use in tuple(node.outputs[0].uses()):
        user = use.node
        quantize = user if user.op_type != "Relu" else _only_user(user)
        if quantize is None or quantize.op_type != "QuantizeLinear":
            continue
        if reads_quantized(quantize.outputs[0]):
            continue
        source = quantize.inputs[0]
        assert source is not None
        for dequantize in [u.node for u in tuple(quantize.outputs[0].uses())]:
            if dequantize.op_type == "DequantizeLinear":
                context.changed("float result", [quantize, dequantize], [node])
                replace_value(context, dequantize.outputs[0], source)
                remove(context, dequantize)
        if not ir.use_count(quantize.outputs[0]) and not quantize.outputs[0].is_graph_output():
            remove(context, quantize)


def _only_user(node: ir.Node) -> ir.Node | None:
    users = [use.node for use in node.outputs[0].uses()]
    return users[0] if len(users) == 1 and not node.outputs[0].is_graph_output() else None


def _repair_weight(context: Context, node: ir.Node, table: Table) -> None:
    """A weight in the table's type, symmetric, with a scale for each output channel."""
    value, grid = node.inputs[1], table.weight
    pair = pair_of(value)
    if value is None or pair is None or (pair.dtype == grid.dtype and not pair.zero.any()):
        return
    array = _floats(value)
    if array is None or grid.floating:
        return
    axis = weight_axis(node) % array.ndim
    scale, zero = grid.parameters(*weight_range(array, axis if table.per_channel else None))
    shape = [-1 if a == axis and scale.ndim else 1 for a in range(array.ndim)]
    tensor = grid.quantize(array, scale.reshape(shape), zero.reshape(shape))
    attributes = {"axis": axis} if scale.ndim else {}
    made = _dequantized(context, node, value, tensor, scale, grid, attributes)
    node.replace_input_with(1, made)
    context.changed("another weight type", [node], [node])
    _drop(context, value)


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
    attributes = {"axis": 0} if wanted.ndim else {}
    narrow = wanted.astype(np.float32)
    made = _dequantized(context, node, bias, ir.tensor(whole), narrow, grid, attributes)
    node.replace_input_with(2, made)
    context.changed("int32 bias", [node], [node])
    _drop(context, bias)


def _dequantized(
    context: Context,
    node: ir.Node,
    old: ir.Value,
    tensor: ir.TensorProtocol,
    scale: ir.Array,
    grid: Grid,
    attributes: dict[str, int],
) -> ir.Value:
    """A constant as integers behind a DequantizeLinear that stands before a node."""
    graph, name = context.model.graph, old.name or "constant"
    inputs = [
        context.initializer(graph, tensor, f"{name}_quantized"),
        context.initializer(graph, ir.tensor(np.asarray(scale)), f"{name}_scale"),
        context.initializer(graph, grid.zero_point(np.zeros(scale.shape)), f"{name}_zero_point"),
    ]
    attrs = [ir.convenience.convert_attribute(k, v) for k, v in attributes.items()]
    made = ir.Node("", "DequantizeLinear", inputs, attrs)
    made.outputs[0].name = context.unique(f"{name}_dequantized")
    made.name = context.unique_node(f"{name}_dequantized")
    graph.insert_before(node, made)
    context.shapes.update(made, graph)
    return made.outputs[0]


def _floats(value: ir.Value) -> ir.Array | None:
    """A weight or bias as floats, whether it is stored so or in integers."""
    array = ir.array(value)
    if array is not None:
        return array.astype(np.float64)
    node, pair = value.producer(), pair_of(value)
    integers = None if node is None else ir.array(node.inputs[0])
    if integers is None or pair is None:
        return None
    shape = [1] * integers.ndim
    if not pair.per_tensor:
        shape[pair.axis] = -1
    whole = integers.astype(np.float64) - pair.zero.astype(np.float64).reshape(shape)
    found: ir.Array = whole * pair.scale.astype(np.float64).reshape(shape)
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
