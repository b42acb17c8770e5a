"""QuantizeLinear and DequantizeLinear put into a model where a plan wants them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from graphopt import ir
from graphopt.context import Context
from graphopt.driver import remove
from graphopt.gram import Gram, weight_matrix, weight_tensor
from graphopt.quantizer.constants import drop_unused
from graphopt.quantizer.grids import Grid
from graphopt.quantizer.placement import Plan, Table, is_dequantized
from graphopt.quantizer.rounding import Codes, Scheme, gptq

Array = npt.NDArray[Any]
Rounded = tuple[str, bytes]
"""A linear operator's label, and the scales of its weights."""

_INT32 = 2.0**31 - 1
_RULE = "quantized"


@dataclass
class Step:
    """Scale and zero point of a tensor, as initializers."""

    grid: Grid
    scale: Array
    zero: Array
    inputs: list[ir.Value]


def weight_axis(node: ir.Node) -> int:
    """The axis of a linear operator's weight along which its output channels lie."""
    if node.op_type == "Gemm":
        return 0 if ir.attribute(node, "transB", 0) else 1
    if node.op_type == "ConvTranspose":
        return 1
    return -1 if node.op_type == "MatMul" else 0


def weight_range(weight: Array, axis: int | None) -> tuple[Array, Array]:
    """Lowest and highest weight, per channel of an axis or of all."""
    if axis is None:
        return weight.min(initial=0.0), weight.max(initial=0.0)
    others = tuple(a for a in range(weight.ndim) if a != axis % weight.ndim)
    return weight.min(axis=others, initial=0.0), weight.max(axis=others, initial=0.0)


@dataclass
class Insertion:
    """Puts a plan into the model of a context; `ranges` are those of the plan's groups."""

    context: Context
    plan: Plan
    ranges: Mapping[ir.Value, tuple[float, float]]
    """By the first tensor of each group."""
    grams: Mapping[str, Gram] = field(default_factory=dict[str, Gram])
    """Sums of XᵀX of linear operators, by label: their weights are rounded with GPTQ."""
    rounded: dict[Rounded, ir.TensorProtocol] = field(
        default_factory=dict[Rounded, ir.TensorProtocol]
    )
    """Weights that were rounded so before; more are added."""
    progress: Callable[[str], None] | None = None
    _steps: dict[ir.Value, Step] = field(default_factory=dict[ir.Value, Step])
    _weights: dict[tuple[ir.Value, int], ir.Value] = field(
        default_factory=dict[tuple[ir.Value, int], ir.Value]
    )

    @property
    def table(self) -> Table:
        """The plan's."""
        return self.plan.table

    def run(self) -> None:
        """Change the model, and record what became of each operator."""
        for group in self.plan.groups:
            step = self._activation_step(group)
            self._steps.update((value, step) for value in group)
        for index, node in enumerate(self.plan.linear):
            self.context.check_time()
            if self.progress is not None:
                self.progress(f"rounding: {index} of {len(self.plan.linear)} operators")
            self._quantize_weight(node)
        for group in self.plan.groups:
            for value in group:
                self._quantize_tensor(value)
        for node in (*self.plan.linear, *self.plan.others):
            self.context.changed(_RULE, [node], [node])

    def _activation_step(self, group: list[ir.Value]) -> Step:
        low, high = self.ranges[group[0]]
        grid = self.table.activation
        scale, zero = grid.parameters(low, high)
        return Step(grid, scale, zero, self._constants(group[0].name or "x", grid, scale, zero))

    def _constants(self, hint: str, grid: Grid, scale: Array, zero: Array) -> list[ir.Value]:
        graph = self.context.model.graph
        values = [
            self.context.initializer(graph, ir.tensor(np.asarray(scale)), f"{hint}_scale"),
            self.context.initializer(graph, grid.zero_point(zero), f"{hint}_zero_point"),
        ]
        for value in values:
            self.context.shapes.fact(value)
        return values

    def _quantize_tensor(self, value: ir.Value) -> None:
        """Put a pair behind a tensor: for all that takes it, or for its quantized readers."""
        step = self._steps[value]
        made = value in self.plan.made
        source = self._unbounded(value, step) if made else value
        if step.grid.floating:
            self._keep_bound(source)
        quantize = self._node("QuantizeLinear", [source, *step.inputs], f"{value.name}_quantized")
        dequantize = self._node(
            "DequantizeLinear", [quantize.outputs[0], *step.inputs], f"{value.name}_dequantized"
        )
        self._insert(source, [quantize, dequantize])
        result = dequantize.outputs[0]
        result.type, result.shape = value.type, value.shape
        if made:
            self._take_over(value, source, result, quantize)
        else:
            for node in self.plan.readers.get(value, ()):
                _replace_input(node, value, result)
        for node in (quantize, dequantize):
            self.context.shapes.update(node, self.context.model.graph)

    def _keep_bound(self, value: ir.Value) -> None:
        """Write a Relu or Clip before 8-bit floats as a Max and a Min.

        ONNX Runtime 1.32 takes a zero point that is no int8 for the lowest integer of uint8 and
        drops the Relu; with a Clip it refuses the model.
        """
        node = value.producer()
        if node is None or node.op_type not in ("Relu", "Clip") or node.domain:
            return
        limits = bounds(node) or (-np.inf, np.inf)
        wanted = [(o, b) for o, b in zip(("Max", "Min"), limits, strict=True) if np.isfinite(b)]
        for index, (op_type, bound) in enumerate(wanted):
            tensor = ir.tensor(np.float32(bound))
            limit = self.context.initializer(
                self.context.model.graph, tensor, f"{value.name}_{op_type}"
            )
            self.context.shapes.fact(limit)
            x = node.inputs[0]
            assert x is not None
            if index + 1 < len(wanted):
                inner = self._node(op_type, [x, limit], f"{value.name}_low")
                self.context.model.graph.insert_before(node, inner)
                inner.meta[ir.SOURCES] = ir.sources(node)
                self.context.shapes.update(inner, self.context.model.graph)
                node.replace_input_with(0, inner.outputs[0])
            else:
                node.op_type = op_type
                node.attributes.clear()
                node.resize_inputs(2)
                node.replace_input_with(1, limit)

    def _unbounded(self, value: ir.Value, step: Step) -> ir.Value:
        """What a Relu or Clip gets, where saturation bounds it just as well."""
        bound = self.plan.bounds.get(value)
        if bound is None:
            return value
        limits = bounds(bound)
        source = bound.inputs[0]
        if limits is None or source is None:
            return value
        lowest, highest = step.grid.limits
        scale, zero = float(step.scale), float(step.zero)
        low, high = (lowest - zero) * scale, (highest - zero) * scale
        slack = 1e-5 * max(abs(low), abs(high))
        return source if low >= limits[0] - slack and high <= limits[1] + slack else value

    def _take_over(
        self, value: ir.Value, source: ir.Value, result: ir.Value, quantize: ir.Node
    ) -> None:
        """Let everything that takes a tensor take the dequantized one, under its name."""
        for node, index in tuple(value.uses()):
            if node is not quantize:
                node.replace_input_with(index, result)
        graph = self.context.model.graph
        for index, output in enumerate(graph.outputs):
            if output is value:
                graph.outputs[index] = result
        name = value.name
        assert name is not None and result.name is not None
        value.name = self.context.unique(f"{name}_float")
        self.context.free(result.name)
        result.name = name
        result.metadata_props.update(value.metadata_props)
        if source is not value:
            bound = value.producer()
            assert bound is not None
            remove(self.context, bound)

    def _quantize_weight(self, node: ir.Node) -> None:
        """Give a linear operator an integer weight, and an integer bias where it is to have one."""
        weight, x = node.inputs[1], node.inputs[0]
        assert weight is not None and x is not None
        step = self._steps[x]
        if is_dequantized(weight):
            producer = weight.producer()
            assert producer is not None
            scale: Array | None = ir.array(producer.inputs[1])
        else:
            bias = ir.array(node.inputs[2]) if len(node.inputs) > 2 else None
            scale = self._place_weight(node, weight, bias, float(step.scale))
        bias_value = node.inputs[2] if len(node.inputs) > 2 else None
        wanted = self.table.integer_bias and bias_value is not None
        if wanted and bias_value is not None and scale is not None and scale.ndim <= 1:
            self._place_bias(node, bias_value, float(step.scale) * scale.astype(np.float64))

    def _place_weight(
        self, node: ir.Node, weight: ir.Value, bias: Array | None, input_scale: float
    ) -> Array:
        array = ir.array(weight)
        assert array is not None
        axis = weight_axis(node) % array.ndim
        grid = self.table.weight
        low, high = weight_range(array, axis if self.table.per_channel else None)
        scale, zero = grid.parameters(low, high)
        if bias is not None and (self.table.integer_bias or grid.floating):
            # A bias far larger than what its channel's weights make would overflow its integer,
            # which ONNX Runtime makes of it where nobody else does.
            least = np.abs(bias.astype(np.float64)).reshape(-1) / (input_scale * _INT32 / 2)
            least = least if scale.ndim else least.max(initial=0.0)
            scale = grid.least_scale(np.maximum(scale, least))
        key = (weight, axis)
        if key not in self._weights or bias is not None:
            shape = [1] * array.ndim
            if scale.ndim:
                shape[axis] = -1
            tensor = self._rounded(node, array, scale.reshape(shape), zero.reshape(shape))
            self._weights[key] = self._dequantized(weight, tensor, grid, scale, zero, axis, node)
        node.replace_input_with(1, self._weights[key])
        drop_unused(self.context, weight)
        return scale

    def _rounded(self, node: ir.Node, array: Array, scale: Array, zero: Array) -> ir.TensorProtocol:
        """The weight in integers: by GPTQ where there is a XᵀX and the grid is symmetric."""
        seen, grid = self.grams.get(ir.label(node)), self.table.weight
        key = (ir.label(node), scale.tobytes())
        if key not in self.rounded and seen is not None and grid.symmetric and not grid.floating:
            integers = gptq_integers(node, array, scale, grid, seen)
            self.rounded[key] = ir.Tensor(integers, dtype=grid.dtype)
        elif key not in self.rounded:
            self.rounded[key] = grid.quantize(array, scale, zero)
        return self.rounded[key]

    def _place_bias(self, node: ir.Node, value: ir.Value, scale: npt.NDArray[np.float64]) -> None:
        array = ir.array(value)
        assert array is not None
        scale = np.broadcast_to(scale, array.shape) if scale.ndim else scale
        whole = np.clip(np.rint(array.astype(np.float64) / scale), -_INT32, _INT32)
        tensor = ir.tensor(whole.astype(np.int32))
        grid = Grid(ir.DataType.INT32, symmetric=True)
        narrow = scale.astype(np.float32)
        zero = np.zeros(narrow.shape, np.int64)
        node.replace_input_with(2, self._dequantized(value, tensor, grid, narrow, zero, 0, node))
        drop_unused(self.context, value)

    def _dequantized(
        self,
        old: ir.Value,
        tensor: ir.TensorProtocol,
        grid: Grid,
        scale: Array,
        zero: Array,
        axis: int,
        place: ir.Node,
    ) -> ir.Value:
        """A constant as integers behind a DequantizeLinear that stands before `place`."""
        graph = self.context.model.graph
        hint = old.name or "constant"
        integers = self.context.initializer(graph, tensor, f"{hint}_quantized")
        inputs = [integers, *self._constants(hint, grid, scale, zero)]
        attributes = {"axis": axis} if np.ndim(scale) else {}
        node = self._node("DequantizeLinear", inputs, f"{hint}_dequantized", attributes)
        graph.insert_before(place, node)
        result = node.outputs[0]
        result.type, result.shape = ir.TensorType(ir.DataType.FLOAT), integers.shape
        self.context.shapes.update(node, graph)
        return result

    def _node(
        self,
        op_type: str,
        inputs: list[ir.Value],
        output: str,
        attributes: Mapping[str, Any] | None = None,
    ) -> ir.Node:
        attrs = [ir.convenience.convert_attribute(k, v) for k, v in (attributes or {}).items()]
        node = ir.Node("", op_type, inputs, attrs)
        node.outputs[0].name = self.context.unique(output)
        node.name = self.context.unique_node(output)
        return node

    def _insert(self, source: ir.Value, nodes: list[ir.Node]) -> None:
        """Put nodes behind what makes a value, or first of all."""
        graph = self.context.model.graph
        producer = source.producer()
        if producer is not None:
            graph.insert_after(producer, nodes)
            for node in nodes:
                node.meta[ir.SOURCES] = ir.sources(producer)
            return
        first = next(iter(graph), None)
        assert first is not None
        graph.insert_before(first, nodes)


def gptq_integers(node: ir.Node, weight: Array, scale: Array, grid: Grid, seen: Gram) -> Array:
    """A linear operator's weight in the integers of a symmetric grid, rounded by GPTQ.

    `scale` is one number or one per output channel; of a ConvTranspose, one per channel of a group.
    """
    matrix = weight_matrix(node, weight)
    shape = (*matrix.shape[:2], 1)
    own = scale.astype(np.float64).reshape(-1)
    scales = np.broadcast_to(own, shape[:2] if own.size == shape[1] else shape[0] * shape[1])
    scheme = Scheme(grid.limits[1].bit_length() + 1)
    nothing = np.zeros(matrix.shape, np.int16)
    start = Codes(scheme, nothing, scales.reshape(shape), np.zeros(shape, np.int16))
    codes = gptq(matrix, seen.xtx, scheme, start).codes
    integers: Array = weight_tensor(node, codes, weight.shape).astype(grid.dtype.numpy())
    return integers


def bounds(node: ir.Node) -> tuple[float, float] | None:
    """The lowest and highest result of a Relu or Clip, where they are constant."""
    if node.op_type == "Relu":
        return 0.0, np.inf
    limits = [-np.inf, np.inf]
    for index, name in enumerate(("min", "max")):
        given = ir.attribute(node, name)
        if isinstance(given, int | float):
            limits[index] = float(given)
    for index, value in enumerate(itertools.islice(node.inputs, 1, 3)):
        if value is not None:
            array = ir.array(value)
            if array is None or array.size != 1:
                return None
            limits[index] = float(array.reshape(-1)[0])
    return limits[0], limits[1]


def _replace_input(node: ir.Node, old: ir.Value, new: ir.Value) -> None:
    for index, value in enumerate(node.inputs):
        if value is old:
            node.replace_input_with(index, new)
