"""Products with constant weights in integers, activations rounded at run time.

Why: bytes multiply faster than floats, and ranges that each input brings need no calibration and
fit every input: transformers, whose activations have outliers, keep their accuracy.
Numerics: lossy.
Needs: float32 MatMul and Gemm with constant weights; opset 11. For ONNX Runtime LSTM too, where it
is large enough to gain. Convolutions are left alone: their integer kernels with ranges of run time
are slower than floats. With samples, weights are rounded by GPTQ.

Written with DynamicQuantizeLinear and MatMulInteger, which ONNX Runtime makes one kernel of, and as
its DynamicQuantizeLSTM.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from graphopt import ir
from graphopt.context import Context
from graphopt.driver import remove, replace_value
from graphopt.errors import InputError
from graphopt.gram import Gram, affordable, grams
from graphopt.pass_manager import Pass
from graphopt.passes.convert_opset import ConvertOpset
from graphopt.quantizer.constants import drop_unused
from graphopt.quantizer.grids import Grid
from graphopt.quantizer.insertion import gptq_integers, weight_axis, weight_range
from graphopt.quantizer.placement import table_for
from graphopt.quantizer.recurrent import integer_lstms
from graphopt.wildcards import named

Integers = tuple[ir.TensorProtocol, ir.Array]
"""A product's weight [k, n] as integers, and its scales."""

_SAMPLES = 64
_ROWS = 64
_SMALLEST = 1 << 10  # weights: below, a product in floats costs less than rounding its operand


@dataclass(frozen=True)
class QuantizeDynamic(Pass):
    """Dynamic quantization of products, in bodies of If and Loop too."""

    lossy: ClassVar[bool] = True

    per_channel: bool = True
    rounding: str = "gptq"
    """Of weights: nearest, or gptq where there are samples."""
    keep: tuple[str, ...] = ()
    """Nodes that stay in floats, by name; `*` stands for any text."""

    def run(self, context: Context) -> None:
        """Quantize every product that qualifies."""
        chosen = dataclasses.replace(self, keep=named(context.model, self.keep))
        chosen.insert(context, chosen.sums(context))

    def sums(self, context: Context) -> dict[str, Gram]:
        """XᵀX of what the products take, by label, to round by; nothing where that is not wanted.

        They are those of the float model, whatever is kept of it. Where they would not fit into
        memory, the widest operators have none.
        """
        nodes = [n for n in self.products(context) if n.graph is context.model.graph]
        if not nodes or self.rounding == "nearest" or context.samples is None:
            return {}
        samples = context.samples.take(_SAMPLES)
        return grams(context.model, affordable(nodes), samples, rows=_ROWS)

    def insert(
        self, context: Context, sums: Mapping[str, Gram], known: dict[str, Integers] | None = None
    ) -> None:
        """Quantize, with sums that are known, and weights that were rounded before.

        Others are added to those.
        """
        known = {} if known is None else known
        maker = _Maker(context, table_for(context.target).weight, self.per_channel, known)
        nodes = self.products(context)
        for index, node in enumerate(nodes):
            context.check_time()
            context.tell(f"rounding: {index} of {len(nodes)} operators")
            maker.replace(node, sums.get(ir.label(node)))
        integer_lstms(context, self.keep)

    def products(self, context: Context) -> list[ir.Node]:
        """The nodes that qualify, in a model that is converted to opset 11 where anything does."""
        if self.rounding not in ("nearest", "gptq"):
            raise InputError(f"weights are rounded nearest or by gptq, not {self.rounding!r}")
        nodes = [n for n in ir.nested_nodes(context.model) if self._wanted(context, n)]
        if nodes and ir.opset(context.model.graph) < 11:
            ConvertOpset(11, at_least=True).run(context)
            if ir.opset(context.model.graph) < 11:
                raise InputError("quantize-dynamic needs opset 11, and the model stays below it")
            nodes = [n for n in ir.nested_nodes(context.model) if self._wanted(context, n)]
        return nodes

    def _wanted(self, context: Context, node: ir.Node) -> bool:
        if node.op_type not in ("MatMul", "Gemm") or node.domain or ir.label(node) in self.keep:
            return False
        x, tensor = node.inputs[0], ir.constant(node.inputs[1])
        if x is None or tensor is None or ir.constant(x) is not None or len(tensor.shape) != 2:
            return False
        plain = all(ir.attribute(node, name, 1.0) == 1.0 for name in ("alpha", "beta"))
        if node.op_type == "Gemm" and (ir.attribute(node, "transA", 0) or not plain):
            return False
        return (
            tensor.dtype == ir.DataType.FLOAT
            and context.shapes.dtype(x) == ir.DataType.FLOAT
            and tensor.size >= _SMALLEST
        )


@dataclass
class _Maker:
    """Puts integer products in the place of float ones."""

    context: Context
    grid: Grid
    per_channel: bool
    known: dict[str, Integers]
    rounded: dict[ir.Value, list[ir.Value]] = dataclasses.field(
        default_factory=dict[ir.Value, list[ir.Value]]
    )
    """Operands that were quantized already: integers, scale, zero point."""

    def replace(self, node: ir.Node, gram: Gram | None) -> None:
        """One MatMul or Gemm."""
        context, x, weight = self.context, node.inputs[0], node.inputs[1]
        array = ir.array(weight)
        assert x is not None and weight is not None and array is not None
        label = ir.label(node)
        if label not in self.known:
            self.known[label] = self._weight(node, array, gram)
        integers, scale = self.known[label]
        hint = weight.name or "weight"
        graph = context.model.graph
        w = context.initializer(graph, integers, f"{hint}_quantized")
        s = context.initializer(graph, ir.tensor(scale), f"{hint}_scale")
        quantized = self._operand(x, node)
        product = self._node("MatMulInteger", [quantized[0], w, quantized[2]], node)
        cast = self._node("Cast", [product[0]], node, to=int(ir.DataType.FLOAT))
        scales = self._node("Mul", [quantized[1], s], node)
        result = self._node("Mul", [cast[0], scales[0]], node)
        bias = node.inputs[2] if len(node.inputs) > 2 else None
        if bias is not None:
            result = self._node("Add", [result[0], bias], node)
        context.changed("dynamic", [node], [f"MatMulInteger->{result[0].name}"])
        replace_value(context, node.outputs[0], result[0], fresh=True)
        remove(context, node)
        drop_unused(context, weight)

    def _weight(self, node: ir.Node, array: ir.Array, gram: Gram | None) -> Integers:
        """The weight as integers [k, n], and its scales."""
        axis = weight_axis(node) % 2
        low, high = weight_range(array, axis if self.per_channel else None)
        scale, zero = self.grid.parameters(low, high)
        spread = scale.reshape([-1 if a == axis else 1 for a in range(2)]) if scale.ndim else scale
        if gram is not None:
            whole = gptq_integers(node, array, scale, self.grid, gram)
        else:
            whole = self.grid.quantize(array, spread, zero.reshape(np.shape(spread))).numpy()
        if axis == 0:
            whole = np.ascontiguousarray(whole.T)
        return ir.Tensor(whole, dtype=self.grid.dtype), scale

    def _operand(self, x: ir.Value, place: ir.Node) -> list[ir.Value]:
        """A quantized activation, made once for all products that take it."""
        if x not in self.rounded:
            node = ir.Node("", "DynamicQuantizeLinear", [x], num_outputs=3)
            for value, word in zip(node.outputs, ("quantized", "scale", "zero_point"), strict=True):
                value.name = self.context.unique(f"{x.name}_{word}")
            node.name = self.context.unique_node(f"{x.name}_quantized")
            producer = x.producer()
            graph = x.graph if producer is None else producer.graph
            assert graph is not None
            if producer is None:
                graph.insert_before(next(iter(graph)), node)
            else:
                graph.insert_after(producer, node)
            node.meta[ir.SOURCES] = ir.sources(place)
            self.context.shapes.update(node, self.context.model.graph)
            self.rounded[x] = list(node.outputs)
        return self.rounded[x]

    def _node(
        self, op_type: str, inputs: list[ir.Value], place: ir.Node, **attributes: int
    ) -> list[ir.Value]:
        """A node before another one."""
        attrs = [ir.convenience.convert_attribute(k, v) for k, v in attributes.items()]
        node = ir.Node("", op_type, inputs, attrs)
        hint = f"{place.outputs[0].name}_{op_type}"
        node.outputs[0].name = self.context.unique(hint)
        node.name = self.context.unique_node(hint)
        node.meta[ir.SOURCES] = ir.sources(place)
        assert place.graph is not None
        place.graph.insert_before(place, node)
        self.context.shapes.update(node, self.context.model.graph)
        return list(node.outputs)
