"""What in a quantized model a target's runtime cannot use, or uses slowly: anybody's QDQ model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from graphopt import ir
from graphopt.quantizer.grids import Grid
from graphopt.quantizer.insertion import bounds
from graphopt.quantizer.placement import Table, invents_nothing, is_dequantized

__all__ = [
    "Pair",
    "Violation",
    "check_quantized",
    "pair_of",
    "reads_quantized",
    "scales_of",
]

Array = npt.NDArray[Any]

_WEIGHTED = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})
_BOUNDING = frozenset({"Relu", "Clip"})


@dataclass(frozen=True)
class Violation:
    """One thing that the target does not want."""

    rule: str
    node: str
    reason: str


@dataclass(frozen=True)
class Pair:
    """How the tensor behind a QuantizeLinear or DequantizeLinear is quantized."""

    dtype: ir.DataType
    scale: Array
    zero: Array
    axis: int

    @property
    def per_tensor(self) -> bool:
        """One scale for all of it."""
        return self.scale.size == 1

    @property
    def powers_of_two(self) -> bool:
        """Whether all scales are."""
        return bool(np.all(np.frexp(self.scale)[0] == 0.5))

    @property
    def limits(self) -> tuple[int, int]:
        """The lowest and highest integer."""
        return Grid(self.dtype).limits

    def reach(self) -> tuple[float, float]:
        """The lowest and highest value; of a tensor with one scale."""
        lowest, highest = self.limits
        scale, zero = float(self.scale.reshape(-1)[0]), float(self.zero.reshape(-1)[0])
        return (lowest - zero) * scale, (highest - zero) * scale

    def same(self, other: Pair) -> bool:
        """Whether the same integers stand for the same values."""
        return (
            self.dtype == other.dtype
            and np.array_equal(self.scale, other.scale)
            and np.array_equal(self.zero, other.zero)
        )


def scales_of(node: ir.Node) -> Pair | None:
    """The constant parameters of a QuantizeLinear or DequantizeLinear; None for others."""
    if node.op_type not in ("QuantizeLinear", "DequantizeLinear") or node.domain:
        return None
    scale = ir.array(node.inputs[1])
    zero = node.inputs[2] if len(node.inputs) > 2 else None
    tensor = ir.constant(zero)
    if scale is None or (zero is not None and tensor is None):
        return None
    if tensor is not None:
        dtype, zeros = tensor.dtype, tensor.numpy().astype(np.int64)
    else:
        value = node.inputs[0] if node.op_type == "DequantizeLinear" else node.outputs[0]
        default = ir.DataType.UINT8
        given = ir.attribute(node, "output_dtype", 0)
        if isinstance(given, int) and given:
            default = ir.DataType(given)
        known = None if value is None else value.dtype
        dtype, zeros = known or default, np.zeros(scale.shape, np.int64)
    axis = ir.attribute(node, "axis", 1)
    return Pair(dtype, scale, zeros, axis if isinstance(axis, int) else 1)


def pair_of(value: ir.Value | None) -> Pair | None:
    """How a value that comes from a DequantizeLinear is quantized."""
    node = None if value is None else value.producer()
    if node is None or node.op_type != "DequantizeLinear":
        return None
    return scales_of(node)


def check_quantized(model: ir.Model, table: Table) -> list[Violation]:
    """Everything in a model's main graph that breaks the rules of a table, in graph order."""
    return [found for node in model.graph for found in _of_node(node, table)]


def _of_node(node: ir.Node, table: Table) -> Iterator[Violation]:
    if node.domain:
        return
    if node.op_type == "QuantizeLinear":
        yield from _activation(node, table)
    elif node.op_type in _WEIGHTED:
        yield from _weighted(node, table)
    elif node.op_type in table.moving and table.outputs and invents_nothing(node):
        yield from _moving(node)
    if node.op_type == "Concat" and not table.outputs:
        yield from _moving(node)


def _activation(node: ir.Node, table: Table) -> Iterator[Violation]:
    label, pair = ir.label(node), scales_of(node)
    if pair is None:
        yield Violation("dynamic-scale", label, "scale or zero point is not constant")
        return
    if ir.constant(node.inputs[0]) is not None:
        yield Violation("float-weight", label, "a weight is stored in floats and rounded each time")
        return
    grid = table.activation
    if not pair.per_tensor:
        yield Violation("per-channel-activation", label, "activations have one scale")
    elif pair.dtype != grid.dtype:
        wanted, given = grid.dtype.name.lower(), pair.dtype.name.lower()
        yield Violation("activation-type", label, f"activations are {wanted}, not {given}")
    elif grid.symmetric and pair.zero.any():
        yield Violation("zero-point", label, "activations are symmetric, with the zero point 0")
    yield from _binary(label, pair, grid)
    bound = None if node.inputs[0] is None else node.inputs[0].producer()
    if bound is None or bound.op_type not in _BOUNDING or not table.outputs:
        return
    source = None if bound.inputs[0] is None else bound.inputs[0].producer()
    if source is not None and source.op_type in _WEIGHTED:
        reason = f"{bound.op_type} stands between {ir.label(source)} and its quantization"
        yield Violation("bound-not-absorbed", label, reason)


def _weighted(node: ir.Node, table: Table) -> Iterator[Violation]:
    label = ir.label(node)
    weight = pair_of(node.inputs[1])
    x = node.inputs[0]
    quantized = pair_of(x)
    if weight is None and (quantized is None or node.op_type not in table.linear):
        return
    if weight is None or quantized is None:
        if ir.constant(node.inputs[1]) is not None or weight is not None:
            which = "weight" if weight is None else "input"
            yield Violation("half-quantized", label, f"its {which} is not quantized")
        return
    if node.op_type not in table.linear:
        yield Violation("no-kernel", label, f"{node.op_type} has no integer kernel there")
        return
    grid = table.weight
    if weight.dtype != grid.dtype:
        wanted, given = grid.dtype.name.lower(), weight.dtype.name.lower()
        yield Violation("weight-type", label, f"weights are {wanted}, not {given}")
    elif weight.zero.any():
        yield Violation("weight-zero-point", label, "weights are symmetric")
    elif grid.reduced and _widest(node.inputs[1]) > grid.limits[1] + 1:
        yield Violation("saturation", label, "weights of 8 bits saturate: 7 are to be used")
    yield from _binary(label, weight, grid)
    yield from _bias(node, weight, quantized, table)
    if table.outputs and node.op_type not in table.float_results and not _put_out(node):
        yield Violation("float-result", label, "its result is not quantized")
    if not table.outputs and _put_out(node) and not reads_quantized(node.outputs[0]):
        reason = "its result is quantized, and no quantized operator takes it"
        yield Violation("quantized-result", label, reason)


def _binary(label: str, pair: Pair, grid: Grid) -> Iterator[Violation]:
    if grid.power_of_two and not pair.powers_of_two:
        yield Violation("power-of-two", label, "its scale is no power of two")


def _bias(node: ir.Node, weight: Pair, x: Pair, table: Table) -> Iterator[Violation]:
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    if bias is None:
        return
    label, pair = ir.label(node), pair_of(bias)
    if not table.integer_bias:
        if pair is not None:
            yield Violation("integer-bias", label, "biases are floats")
        return
    if pair is None or pair.dtype != ir.DataType.INT32:
        yield Violation("float-bias", label, "its bias is no int32")
        return
    wanted = x.scale.astype(np.float64).reshape(-1)[:1] * weight.scale.astype(np.float64)
    if not np.allclose(pair.scale, wanted, rtol=1e-3):
        yield Violation("bias-scale", label, "the bias's scale is not input's times weight's")


def _put_out(node: ir.Node) -> bool:
    """Whether all that takes a result, maybe behind a bound, is a QuantizeLinear."""
    uses = list(node.outputs[0].uses())
    if node.outputs[0].is_graph_output():
        return False
    if len(uses) == 1 and uses[0].node.op_type in _BOUNDING:
        return _put_out(uses[0].node)
    return bool(uses) and all(use.node.op_type == "QuantizeLinear" for use in uses)


def reads_quantized(value: ir.Value) -> bool:
    """Whether an operator that computes in integers takes a value behind its conversions."""
    conversions = _BOUNDING | {"QuantizeLinear", "DequantizeLinear"}
    for use in value.uses():
        if use.node.op_type in _WEIGHTED or use.node.op_type == "Add":
            return True
        passes_on = use.node.op_type in conversions
        if passes_on and any(map(reads_quantized, use.node.outputs)):
            return True
    return False


def _moving(node: ir.Node) -> Iterator[Violation]:
    operands = [v for v in node.inputs if v is not None]
    operands = operands if node.op_type == "Concat" else operands[:1]
    pairs = [pair_of(v) for v in operands if not is_dequantized(v)]
    found = [p for p in pairs if p is not None]
    uses = [use.node for v in node.outputs for use in v.uses()]
    found += [p for user in uses if (p := scales_of(user)) and user.op_type == "QuantizeLinear"]
    if found and not all(found[0].same(pair) for pair in found):
        reason = f"{node.op_type} only moves values, but its scales differ"
        yield Violation("unequal-scales", ir.label(node), reason)


def _widest(value: ir.Value | None) -> int:
    node = None if value is None else value.producer()
    array = None if node is None else ir.array(node.inputs[0])
    return 0 if array is None else int(np.abs(array.astype(np.int64)).max(initial=0))


def absorbed_range(node: ir.Node, reach: tuple[float, float]) -> tuple[float, float] | None:
    """What is left of a range behind a Relu or Clip; None where the bounds are not constant."""
    limits = bounds(node)
    if limits is None:
        return None
    return max(reach[0], limits[0], -np.inf), min(reach[1], limits[1])
