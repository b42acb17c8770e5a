"""How large a node's results will be, known before it is computed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import onnx

from graphopt import ir
from graphopt.ir import Array

__all__ = ["OutputType", "array_bytes", "output_bytes", "output_types"]

_CHEAP_BYTES = 1 << 16  # below this an upper bound will do: no one's budget is smaller
_VALUE_ELEMENTS = 1024  # inputs whose elements shape inference may need

_ONNX_ERRORS = (
    onnx.defs.SchemaError,
    onnx.shape_inference.InferenceError,
    onnx.checker.ValidationError,
)
# Outputs that together hold no more elements than the inputs do.
_BOUNDED = frozenset(
    (
        *("Abs", "Ceil", "Clip", "Concat", "Cos", "Exp", "Flatten", "Floor", "Identity", "Log"),
        *("Neg", "Not", "Reciprocal", "ReduceMax", "ReduceMean", "ReduceMin", "ReduceProd"),
        *("ReduceSum", "Reshape", "Round", "Sign", "Sin", "Slice", "Split", "Sqrt", "Squeeze"),
        *("Tanh", "Transpose", "Unsqueeze"),
    )
)
_BROADCASTING = frozenset(
    (
        *("Add", "And", "Div", "Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual"),
        *("Max", "Min", "Mod", "Mul", "Or", "Pow", "Sub", "Sum", "Where", "Xor"),
    )
)


@dataclass(frozen=True)
class OutputType:
    """The element type and the shape of an output."""

    dtype: ir.DataType
    shape: tuple[int, ...]

    @property
    def is_text(self) -> bool:
        """Strings, whose elements count as one byte each here."""
        return self.dtype == ir.DataType.STRING

    @property
    def bytes(self) -> int:
        """Bytes as a numpy array, where 4-bit numbers take one each."""
        return math.prod(self.shape) * (1 if self.is_text else max(1, self.dtype.bitwidth // 8))


def array_bytes(array: Array) -> int:
    """The bytes of a tensor; strings count with their text."""
    if array.dtype.char != "O":
        return array.nbytes
    return sum(8 + len(cast("str | bytes", text)) for text in array.ravel().tolist())


def output_bytes(
    node: ir.Node, inputs: Sequence[Array | None], opsets: Mapping[str, int]
) -> int | None:
    """The bytes of all outputs of a node on these inputs (None = omitted), or an upper bound.

    None where it is not known before the node runs: what NonZero finds, control flow, sequences,
    operators that ONNX does not define. `opsets` are the imports of the node's root.
    """
    given = [a for a in inputs if a is not None]
    width = max((_width(a) for a in given), default=1)
    total = sum(a.size for a in given) * width
    if node.op_type in _BOUNDED and total <= _CHEAP_BYTES:
        return total
    if node.op_type in _BROADCASTING:
        try:
            return math.prod(np.broadcast_shapes(*(a.shape for a in given))) * width
        except ValueError:
            return None
    if node.op_type == "NonZero":
        return sum(a.size * a.ndim * 8 for a in given)
    types = output_types(node, inputs, opsets)
    return None if types is None else sum(t.bytes * (width if t.is_text else 1) for t in types)


def _width(array: Array) -> int:
    """Bytes of an element, of the longest one for strings."""
    if array.dtype.char != "O":
        return array.itemsize
    texts = cast("list[str | bytes]", array.ravel().tolist())
    return 8 + max((len(text) for text in texts), default=0)


def output_types(
    node: ir.Node, inputs: Sequence[Array | OutputType | None], opsets: Mapping[str, int]
) -> list[OutputType] | None:
    """What ONNX's own shape inference finds, given the small inputs' elements.

    Inputs of which no more is known are types. One for each output that has a name. None where any
    is not a tensor of known shape, for control flow, and for operators that ONNX does not define.
    """
    if any(True for _ in ir.subgraphs(node)):
        return None
    proto = ir.serde.serialize_node(node)
    types: dict[str, onnx.TypeProto] = {}
    data: dict[str, onnx.TensorProto] = {}
    for index, array in enumerate(inputs):
        if array is None:
            continue
        name = proto.input[index] = f"input{index}"
        dtype = array.dtype if isinstance(array, OutputType) else _dtype(array)
        types[name] = onnx.helper.make_tensor_type_proto(int(dtype), array.shape)
        if isinstance(array, OutputType):
            continue
        if array.size <= _VALUE_ELEMENTS and array.dtype.char in "bhilqBHILQ?fd":
            data[name] = onnx.numpy_helper.from_array(cast(Any, array), name)
    for index, value in enumerate(node.outputs):
        proto.output[index] = f"output{index}" if value.name else ""
    imports = [onnx.helper.make_opsetid(domain, version) for domain, version in opsets.items()]
    domain = "" if node.domain == "ai.onnx" else node.domain
    version = opsets.get(domain, opsets.get("ai.onnx", 0))
    try:
        schema = onnx.defs.get_schema(node.op_type, version, domain)
        found = onnx.shape_inference.infer_node_outputs(
            schema, proto, types, data, opset_imports=imports, ir_version=10
        )
    except (*_ONNX_ERRORS, ValueError, RuntimeError):
        return None
    outputs = [_output_type(found.get(name)) for name in proto.output if name]
    return None if None in outputs else [t for t in outputs if t is not None]


def _dtype(array: Array) -> ir.DataType:
    return ir.DataType.STRING if array.dtype.char == "O" else ir.DataType.from_numpy(array.dtype)


def _output_type(found: onnx.TypeProto | None) -> OutputType | None:
    if found is None or not found.HasField("tensor_type"):
        return None
    tensor = found.tensor_type
    if not tensor.elem_type or not tensor.HasField("shape"):
        return None
    if not all(d.HasField("dim_value") for d in tensor.shape.dim):
        return None
    return OutputType(ir.DataType(tensor.elem_type), tuple(d.dim_value for d in tensor.shape.dim))
