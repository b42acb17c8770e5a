"""Where a target wants quantization: one table each, and the plan that a table makes of a model.

A plan names the operators that shall compute in integers, the tensors that are quantized, and
those that share a scale. Nothing is changed here.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import numpy as np

from graphopt import ir
from graphopt.errors import InputError
from graphopt.quantizer.grids import Grid
from graphopt.shapes import Shapes
from graphopt.target import Target

_U8 = Grid(ir.DataType.UINT8)
_S8 = Grid(ir.DataType.INT8)
_S8_SYMMETRIC = Grid(ir.DataType.INT8, symmetric=True)

_MOVING = frozenset(
    (
        *("MaxPool", "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Slice", "Split"),
        *("Gather", "DepthToSpace", "SpaceToDepth", "Identity", "Concat", "Resize", "Expand"),
        "Pad",
    )
)
"""Their results are among their operands' values: both have one scale."""
_LINEAR = frozenset({"Conv", "Gemm", "MatMul"})
_BOUNDING = frozenset({"Relu", "Clip"})


@dataclass(frozen=True)
class Table:
    """What a target computes in integers, and what it wants around it."""

    name: str
    activation: Grid
    weight: Grid
    per_channel: bool = True
    """Weights have a scale for each output channel; activations never have."""
    integer_bias: bool = True
    """Biases are int32 with the scale input times weight; else they stay floats."""
    outputs: bool = True
    """Results are quantized too, so that operators follow each other in integers."""
    linear: frozenset[str] = _LINEAR
    """Operators with constant weights that are computed in integers."""
    float_results: frozenset[str] = frozenset({"Gemm", "MatMul"})
    """Those of them that may put out floats."""
    chained: frozenset[str] = frozenset()
    """Further operators, in integers where operands come as integers and results go on as such."""
    moving: frozenset[str] = _MOVING
    residual: bool = False
    """One operand of an Add behind a Conv is quantized: the one that does not come from it."""

    def powers_of_two(self) -> Table:
        """The same with scales of 2**k."""
        activation, weight = (
            replace(grid, power_of_two=True) for grid in (self.activation, self.weight)
        )
        return replace(self, activation=activation, weight=weight)


TABLES = {
    table.name: table
    for table in (
        Table(
            "ort-x86",
            _U8,
            _S8_SYMMETRIC,
            chained=frozenset({"Add", "Mul", "AveragePool", "GlobalAveragePool", "LeakyRelu"})
            | {"Sigmoid"},
        ),
        Table(
            "ort-x86-avx2",
            _U8,
            replace(_S8_SYMMETRIC, reduced=True),
            chained=frozenset({"Add", "Mul", "AveragePool", "GlobalAveragePool", "LeakyRelu"})
            | {"Sigmoid"},
        ),
        Table(
            "ort-arm",
            _S8,
            _S8_SYMMETRIC,
            chained=frozenset({"Add", "Mul", "AveragePool", "GlobalAveragePool", "LeakyRelu"})
            | {"Sigmoid"},
        ),
        Table(
            "tensorrt",
            _S8_SYMMETRIC,
            _S8_SYMMETRIC,
            integer_bias=False,
            outputs=False,
            linear=_LINEAR | {"ConvTranspose"},
            moving=frozenset(),
            residual=True,
        ),
        Table(
            "tvm",
            _S8,
            _S8_SYMMETRIC,
            chained=frozenset({"Add", "AveragePool", "GlobalAveragePool"}),
        ),
    )
}
"""ONNX Runtime: its QDQ selectors and their kernels, read from its optimized graphs. Processors
without VNNI add two products of uint8 by int8 in 16 bits, which saturates: one bit less there.
TensorRT: its developer guide, chapter on explicit quantization."""


def table_for(target: Target, name: str = "") -> Table:
    """The table of a name, or else of a target. InputError lists the names."""
    if name:
        if name not in TABLES:
            raise InputError(f"no placement is named {name!r}: there are {', '.join(TABLES)}")
        return TABLES[name]
    if target.device == "cuda":
        return TABLES["tensorrt"]
    if target.arch == "aarch64":
        return TABLES["ort-arm"]
    vnni = {"avx512_vnni", "avx_vnni", "amx_int8"}
    slow = target.device == "cpu" and not target.isa & vnni
    return TABLES["ort-x86-avx2" if slow else "ort-x86"]


@dataclass
class Plan:
    """What of a model is quantized, and how it hangs together."""

    table: Table
    linear: dict[ir.Node, None] = field(default_factory=dict[ir.Node, None])
    others: dict[ir.Node, None] = field(default_factory=dict[ir.Node, None])
    """Chained and moving operators."""
    groups: list[list[ir.Value]] = field(default_factory=list[list[ir.Value]])
    """Quantized tensors; those of a list share their scale."""
    bounds: dict[ir.Value, ir.Node] = field(default_factory=dict[ir.Value, ir.Node])
    """Results of a Relu or Clip that quantization may make superfluous, with that node."""
    readers: dict[ir.Value, list[ir.Node]] = field(default_factory=dict[ir.Value, list[ir.Node]])
    """Per tensor the operators that take it quantized; those of `made` are taken so by all."""
    made: set[ir.Value] = field(default_factory=set[ir.Value])
    """Tensors that a quantized operator puts out."""

    @property
    def tensors(self) -> list[ir.Value]:
        """All quantized tensors."""
        return [value for group in self.groups for value in group]


def plan(model: ir.Model, shapes: Shapes, table: Table, keep: Iterable[str] = ()) -> Plan:
    """What a table quantizes of a model's main graph; nodes labelled in `keep` stay as they are."""
    return _Planner(model, shapes, table, frozenset(keep)).plan()


class _Planner:
    def __init__(self, model: ir.Model, shapes: Shapes, table: Table, keep: frozenset[str]) -> None:
        self.graph, self.shapes, self.table, self.keep = model.graph, shapes, table, keep
        self.result = Plan(table)

    def plan(self) -> Plan:
        result = self.result
        result.linear = {node: None for node in self.graph if self._is_linear(node)}
        if self.table.outputs:
            kinds = self.table.moving | self.table.chained
            result.others = {
                node: None
                for node in self.graph
                if node.op_type in kinds and not node.domain and ir.label(node) not in self.keep
            }
            while self._reduce():
                pass
        self._collect()
        return result

    def _is_linear(self, node: ir.Node) -> bool:
        if node.op_type not in self.table.linear or node.domain or ir.label(node) in self.keep:
            return False
        x, weight = node.inputs[0], node.inputs[1]
        if x is None or weight is None or ir.constant(x) is not None or not self._is_float(x):
            return False
        tensor = ir.constant(weight)
        # Products of two activations, as in attention, stay floats: with both operands to round,
        # ONNX Runtime takes 1.07 to 2 times as long, measured from 12x128x32 to 8x1024x128.
        if tensor is None or tensor.dtype != ir.DataType.FLOAT or len(tensor.shape) < 2:
            source = x.producer()
            done = source is not None and source.op_type == "DequantizeLinear"
            return is_dequantized(weight) and not done
        if node.op_type == "MatMul" and len(tensor.shape) != 2:
            return False
        plain = all(ir.attribute(node, name, 1.0) == 1.0 for name in ("alpha", "beta"))
        if node.op_type == "Gemm" and (ir.attribute(node, "transA", 0) or not plain):
            return False
        bias = node.inputs[2] if len(node.inputs) > 2 else None
        if bias is None:
            return True
        addend, out = ir.constant(bias), tensor.shape[0 if ir.attribute(node, "transB", 0) else -1]
        return addend is not None and (node.op_type != "Gemm" or list(addend.shape) == [out])

    def _reduce(self) -> bool:
        """Drop operators that do not stand between quantized ones; whether there were any."""
        others = self.result.others
        wrong = [
            node
            for node in others
            if not (self._moves(node) if node.op_type in self.table.moving else self._chains(node))
        ]
        for node in wrong:
            del others[node]
        return bool(wrong)

    def _moves(self, node: ir.Node) -> bool:
        return (
            invents_nothing(node)
            and all(self._is_float(v) for v in moved(node))
            and any(self._feeds(v) for v in node.outputs)
        )

    def _chains(self, node: ir.Node) -> bool:
        operands = [v for v in node.inputs if v is not None]
        if node.op_type in ("AveragePool", "GlobalAveragePool", "LeakyRelu", "Sigmoid"):
            operands = operands[:1]
        return all(self._integers(v) for v in operands) and self._feeds(node.outputs[0])

    def _integers(self, value: ir.Value) -> bool:
        """Whether a value will come as integers."""
        node = value.producer()
        if node is None or not self._is_float(value):
            return False
        if node.op_type in _BOUNDING and not node.domain and node.inputs[0] is not None:
            source = node.inputs[0]
            return ir.use_count(source) == 1 and self._integers(source)
        return node in self.result.linear or (
            node in self.result.others
            and (node.op_type not in self.table.moving or self._integers(moved(node)[0]))
        )

    def _feeds(self, value: ir.Value) -> bool:
        """Whether a quantized operator takes a value, maybe behind a bound."""
        for node, index in value.uses():
            if node in self.result.linear or node in self.result.others:
                if index == 0 or node.op_type in self.table.chained or node.op_type == "Concat":
                    return True
            elif node.op_type in _BOUNDING and index == 0 and ir.use_count(value) == 1:
                return self._feeds(node.outputs[0])
        return False

    def _is_float(self, value: ir.Value) -> bool:
        return self.shapes.dtype(value) == ir.DataType.FLOAT

    def _collect(self) -> None:
        """The quantized tensors of the chosen operators, in groups."""
        sets = _Sets()
        for node in self.graph:
            if node in self.result.linear:
                assert node.inputs[0] is not None
                self._read(node.inputs[0], node, sets)
                if self.table.outputs and self._puts_out(node):
                    self._make(node.outputs[0], sets)
            elif node in self.result.others:
                self._collect_other(node, sets)
            elif self.table.residual and node.op_type == "Add" and not node.domain:
                skip = self._skip(node)
                if skip is not None:
                    self._read(skip, node, sets)
        self.result.groups = sets.groups()

    def _collect_other(self, node: ir.Node, sets: _Sets) -> None:
        moving = node.op_type in self.table.moving
        operands = moved(node) if moving else self._operands(node)
        for value in operands:
            self._read(value, node, sets)
        for value in node.outputs:
            self._make(value, sets, bounded=not moving)
            if moving:
                sets.join(operands[0], value)
        if moving:
            for value in operands[1:]:
                sets.join(operands[0], value)

    def _operands(self, node: ir.Node) -> list[ir.Value]:
        values = [v for v in node.inputs if v is not None]
        return values if node.op_type in ("Add", "Mul") else values[:1]

    def _puts_out(self, node: ir.Node) -> bool:
        return node.op_type not in self.table.float_results or self._feeds(node.outputs[0])

    def _read(self, value: ir.Value, node: ir.Node, sets: _Sets) -> None:
        sets.add(value)
        self.result.readers.setdefault(value, []).append(node)

    def _make(self, value: ir.Value, sets: _Sets, *, bounded: bool = True) -> None:
        """A result is quantized, or what a Relu or Clip makes of it where only that sees it."""
        users = list(value.uses())
        if bounded and len(users) == 1 and not value.is_graph_output():
            bound = users[0].node
            if bound.op_type in _BOUNDING and not bound.domain and users[0].idx == 0:
                value = bound.outputs[0]
                self.result.bounds[value] = bound
        sets.add(value)
        self.result.made.add(value)

    def _skip(self, node: ir.Node) -> ir.Value | None:
        """The operand of an Add that does not come from the linear operator before it."""
        operands = [v for v in node.inputs if v is not None]
        own = [v for v in operands if v.producer() in self.result.linear and ir.use_count(v) == 1]
        if len(operands) != 2 or not own or any(ir.constant(v) is not None for v in operands):
            return None
        other = operands[0] if operands[1] is own[-1] else operands[1]
        return other if self._is_float(other) else None


def moved(node: ir.Node) -> list[ir.Value]:
    """The operands whose values an operator moves: not its shapes, indices and sizes."""
    inputs = [v for v in node.inputs if v is not None]
    return inputs if node.op_type == "Concat" else inputs[:1]


def invents_nothing(node: ir.Node) -> bool:
    """Whether an operator that moves values puts none beside them that are beyond their range."""
    if node.op_type == "Resize":
        return ir.attribute(node, "mode", "nearest") != "cubic"
    if node.op_type != "Pad" or ir.attribute(node, "mode", "constant") != "constant":
        return True
    given = node.inputs[2] if len(node.inputs) > 2 else None
    value = ir.array(given) if given is not None else np.asarray(ir.attribute(node, "value", 0.0))
    return value is not None and not value.any()


def is_dequantized(value: ir.Value | None) -> bool:
    """Whether a value is a constant of integers behind a DequantizeLinear."""
    node = None if value is None else value.producer()
    if node is None or node.op_type != "DequantizeLinear" or node.domain:
        return False
    return ir.constant(node.inputs[0]) is not None


class _Sets:
    """Disjoint sets of values, in the order in which they came."""

    def __init__(self) -> None:
        self._parent: dict[ir.Value, ir.Value] = {}

    def add(self, value: ir.Value) -> None:
        self._parent.setdefault(value, value)

    def join(self, one: ir.Value, other: ir.Value) -> None:
        self.add(one)
        self.add(other)
        self._parent[self._find(other)] = self._find(one)

    def groups(self) -> list[list[ir.Value]]:
        found: dict[ir.Value, list[ir.Value]] = {}
        for value in self._parent:
            found.setdefault(self._find(value), []).append(value)
        return list(found.values())

    def _find(self, value: ir.Value) -> ir.Value:
        while self._parent[value] is not value:
            value = self._parent[value]
        return value
