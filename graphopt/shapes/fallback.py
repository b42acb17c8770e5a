"""onnx's own inference for operators without a rule here, symbols mapped in and out."""

from __future__ import annotations

import numpy as np
import onnx

from graphopt import ir
from graphopt.dims import Dim, DimLike
from graphopt.shapes.call import Call, Fact, Shape, Values


def infer_with_onnx(call: Call) -> list[Fact]:
    """The facts of a node's outputs; none where onnx does not know the operator or fails."""
    node, opset = call.node, call.opset
    domain = "" if node.domain == "ai.onnx" else node.domain
    if not opset or not onnx.defs.has(node.op_type, domain):
        return []
    if any(attr.is_ref() or attr.type in _GRAPHS for attr in node.attributes.values()):
        return []
    names: dict[str, DimLike] = {}
    proto = ir.serde.serialize_node(node)
    types: dict[str, onnx.TypeProto] = {}
    data: dict[str, onnx.TensorProto] = {}
    for index, fact in enumerate(call.inputs):
        if fact is None:
            continue
        name = proto.input[index] = f"input{index}"
        if fact.dtype is None:
            types[name] = _element_type(fact, names)
            continue
        types[name] = _type_of(fact, names)
        if fact.values is not None:
            tensor = _tensor(fact.dtype, fact.values, name)
            if tensor is not None:
                data[name] = tensor
    for index in range(len(node.outputs)):
        proto.output[index] = f"output{index}"
    imports = [onnx.helper.make_opsetid(d, v) for d, v in call.root.opset_imports.items()]
    try:
        schema = onnx.defs.get_schema(node.op_type, opset, domain)
        results = onnx.shape_inference.infer_node_outputs(
            schema, proto, types, data, opset_imports=imports, ir_version=10
        )
    except (onnx.defs.SchemaError, onnx.shape_inference.InferenceError, RuntimeError):
        return []
    found = [results.get(f"output{index}") for index in range(len(node.outputs))]
    return [_fact(call, index, kind, names) for index, kind in enumerate(found)]


_GRAPHS = (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)


def _type_of(fact: Fact, names: dict[str, DimLike]) -> onnx.TypeProto:
    sizes: list[int | str | None] | None = None
    if fact.shape is not None:
        sizes = []
        for size in fact.shape:
            if isinstance(size, Dim):
                names[str(size)] = size
                sizes.append(str(size))
            else:
                sizes.append(size)
    return onnx.helper.make_tensor_type_proto(int(fact.dtype or 0), sizes)


def _element_type(fact: Fact, names: dict[str, DimLike]) -> onnx.TypeProto:
    if fact.element is None or fact.element.dtype is None:
        return onnx.TypeProto()
    return onnx.helper.make_sequence_type_proto(_type_of(fact.element, names))


def _tensor(dtype: ir.DataType, values: Values, name: str) -> onnx.TensorProto | None:
    if any(isinstance(value, Dim) for value in values.ravel().tolist()):
        return None
    return onnx.numpy_helper.from_array(np.asarray(values, dtype.numpy()), name)


def _fact(call: Call, output: int, kind: onnx.TypeProto | None, names: dict[str, DimLike]) -> Fact:
    if kind is None:
        return Fact(None, None)
    for wrapper in ("sequence_type", "optional_type"):
        if kind.HasField(wrapper):
            inner: onnx.TypeProto = getattr(kind, wrapper).elem_type
            tensor = inner.tensor_type
            element = Fact(ir.DataType(tensor.elem_type) if tensor.elem_type else None, None)
            return Fact(None, None, element=element)
    if not kind.HasField("tensor_type"):
        return Fact(None, None)
    tensor = kind.tensor_type
    dtype = ir.DataType(tensor.elem_type) if tensor.elem_type else None
    if not tensor.HasField("shape"):
        return Fact(dtype, None)
    sizes: list[DimLike] = []
    for axis, size in enumerate(tensor.shape.dim):
        if size.HasField("dim_value"):
            sizes.append(size.dim_value)
        else:
            known = names.get(size.dim_param)
            sizes.append(call.fresh(axis, output) if known is None else known)
    shape: Shape = tuple(sizes)
    return Fact(dtype, shape)
