"""TensorProtos read with every size checked before any memory is taken for them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from onnx import AttributeProto, SparseTensorProto, TensorProto

from graphopt import ir
from graphopt.errors import Flaw
from graphopt.files.checks import MAX_RANK
from graphopt.files.external import FileTensor, Folder, nbytes, tensor_from_bytes

MAX_DENSE = 1 << 26
"""Bytes that a sparse tensor may have when it is written out densely."""
MAX_NESTED = 1 << 28
"""Bytes of external data that attributes and subgraphs may have together: these are read."""

DATA_FIELDS = (
    "float_data",
    "int32_data",
    "int64_data",
    "double_data",
    "uint64_data",
    "string_data",
)
_OWN_FIELD: dict[int, str] = {
    TensorProto.FLOAT: "float_data",
    TensorProto.COMPLEX64: "float_data",
    TensorProto.INT64: "int64_data",
    TensorProto.DOUBLE: "double_data",
    TensorProto.COMPLEX128: "double_data",
    TensorProto.UINT32: "uint64_data",
    TensorProto.UINT64: "uint64_data",
    TensorProto.STRING: "string_data",
}
_PAIRED = (TensorProto.COMPLEX64, TensorProto.COMPLEX128)
_KNOWN = {member.value for member in ir.DataType} - {TensorProto.UNDEFINED}
_BYTES_LIMIT = 2**63


@dataclass
class TensorReader:
    """Makes tensors of TensorProtos; errors say what is wrong, callers say with which tensor."""

    folder: Folder | None
    """Where external data may lie; None refuses them, as for a model that is not in a file."""
    nested: int = 0

    def read(self, proto: TensorProto, payload: ir.Array | None) -> ir.TensorProtocol:
        """The tensor of an initializer, whose raw data may have been split off as `payload`.

        Raises:
            Flaw: data that do not fit dtype and shape, or unsafe external data.
        """
        dtype, shape = self.check(proto, payload)
        if proto.data_location == TensorProto.EXTERNAL:
            tensor: ir.TensorProtocol = self._external(proto, dtype, shape)
        elif dtype == ir.DataType.STRING:
            array = np.array(list(proto.string_data), object).reshape(shape)
            tensor = ir.onnx_ir.StringTensor(array)
        elif payload is not None:
            tensor = tensor_from_bytes(payload, dtype, shape)
        elif proto.HasField("raw_data"):
            data = np.frombuffer(proto.raw_data, np.uint8)
            tensor = tensor_from_bytes(data, dtype, shape)
        else:
            tensor = ir.Tensor(ir.serde.TensorProtoTensor(proto).numpy(), dtype=dtype)
        tensor.name = proto.name
        tensor.doc_string = proto.doc_string or None
        tensor.metadata_props.update({e.key: e.value for e in proto.metadata_props})
        return tensor

    def embed(self, proto: TensorProto) -> None:
        """Check a tensor of an attribute or a subgraph; external data are read into it."""
        dtype, shape = self.check(proto, None)
        if proto.data_location != TensorProto.EXTERNAL:
            return
        tensor = self._external(proto, dtype, shape)
        self.nested += tensor.nbytes
        if self.nested > MAX_NESTED:
            raise Flaw("external data of attributes and subgraphs are too large")
        proto.raw_data = tensor.tobytes()
        proto.ClearField("external_data")
        proto.ClearField("data_location")

    def check(self, proto: TensorProto, payload: ir.Array | None) -> tuple[ir.DataType, list[int]]:
        """Dtype and shape of a tensor whose data fit them."""
        check_element_type(proto.data_type)
        dtype, shape = ir.DataType(proto.data_type), list(proto.dims)
        check_dims(shape)
        size = math.prod(shape) if dtype == ir.DataType.STRING else nbytes(dtype, shape)
        if size >= _BYTES_LIMIT:
            raise Flaw(f"shape {shape} is too large for any memory")
        if proto.HasField("segment"):
            raise Flaw("it is stored in segments, which nothing can read")
        if proto.data_location == TensorProto.EXTERNAL:
            if dtype == ir.DataType.STRING:
                raise Flaw("strings cannot be external data")
            return dtype, shape
        given = [field for field in DATA_FIELDS if len(getattr(proto, field))]
        raw = payload.nbytes if payload is not None else None
        if raw is None and proto.HasField("raw_data"):
            raw = len(proto.raw_data)
        if len(given) + (raw is not None) > 1:
            raise Flaw("its data are given twice")
        if raw is not None:
            if dtype == ir.DataType.STRING:
                raise Flaw("strings cannot be raw data")
            if raw != size:
                raise Flaw(f"{dtype.name} {shape} needs {size} bytes, not {raw}")
            if dtype.bitwidth == 6 and size:
                _check_padding(
                    int(payload[-1]) if payload is not None else proto.raw_data[-1], shape
                )
            return dtype, shape
        own = _OWN_FIELD.get(proto.data_type, "int32_data")
        if given and given[0] != own:
            raise Flaw(f"{dtype.name} data stand in {given[0]}")
        _check_count(proto, own, size, dtype, shape)
        return dtype, shape

    def _external(self, proto: TensorProto, dtype: ir.DataType, shape: list[int]) -> FileTensor:
        if self.folder is None:
            raise Flaw("external data need a model that is loaded from its file")
        entries = {entry.key: entry.value for entry in proto.external_data}
        if len(entries) < len(proto.external_data):
            raise Flaw("external data have a key twice")
        tensor = self.folder.tensor(entries, dtype, shape, proto.name)
        if dtype.bitwidth == 6 and tensor.nbytes:
            _check_padding(int(tensor.bytes()[-1]), shape)
        return tensor

    def densify(self, sparse: SparseTensorProto) -> TensorProto:
        """A sparse tensor written out, as every consumer of it sees it.

        Raises:
            Flaw: external data, indices outside the shape, or one too large densely.
        """
        values, indices, shape = sparse.values, sparse.indices, list(sparse.dims)
        for part in (values, indices):
            if part.data_location == TensorProto.EXTERNAL:
                raise Flaw("sparse tensors with external data are refused")
        dtype, value_shape = self.check(values, None)
        _, index_shape = self.check(indices, None)
        check_dims(shape)
        if dtype == ir.DataType.STRING or dtype.bitwidth < 8:
            raise Flaw(f"sparse tensors of {dtype.name} are not supported")
        if nbytes(dtype, shape) > MAX_DENSE:
            raise Flaw(f"sparse tensor of shape {shape} is too large")
        if indices.data_type != TensorProto.INT64 or len(value_shape) != 1:
            raise Flaw("sparse tensor has indices or values of another form than defined")
        where = ir.serde.TensorProtoTensor(indices).numpy()
        dense = np.zeros(shape, dtype.numpy())
        try:
            if len(index_shape) == 2:
                where = np.ravel_multi_index(tuple(where.T), shape)
            elif where.size and (where.min() < 0 or where.max() >= dense.size):
                raise ValueError
            dense.reshape(-1)[where] = ir.serde.TensorProtoTensor(values).numpy()
        except (ValueError, IndexError):
            raise Flaw("sparse tensor has indices outside its shape") from None
        return TensorProto(
            name=values.name, data_type=values.data_type, dims=shape, raw_data=dense.tobytes()
        )

    def densify_attribute(self, attribute: AttributeProto) -> None:
        """Make a Constant's sparse value a dense one."""
        attribute.t.CopyFrom(self.densify(attribute.sparse_tensor))
        attribute.ClearField("sparse_tensor")
        attribute.name = "value"
        attribute.type = AttributeProto.TENSOR


def check_element_type(number: int) -> None:
    """Raise Flaw for an element type that a tensor cannot have."""
    if number not in _KNOWN:
        raise Flaw(f"element type {number} is unknown")


def check_dims(shape: list[int]) -> None:
    """Raise Flaw for a tensor's negative dimension, or too many dimensions."""
    if len(shape) > MAX_RANK:
        raise Flaw(f"it has {len(shape)} dimensions")
    if any(dim < 0 for dim in shape):
        raise Flaw(f"shape {shape} has a negative dimension")


def _check_count(
    proto: TensorProto, own: str, size: int, dtype: ir.DataType, shape: list[int]
) -> None:
    """Compare the number of elements in a tensor's own field with its shape."""
    elements = math.prod(shape)
    if proto.data_type in _PAIRED:
        elements *= 2
    elif dtype != ir.DataType.STRING and dtype.bitwidth in (2, 4):
        elements = size
    found = len(getattr(proto, own))
    if found != elements:
        raise Flaw(f"{dtype.name} {shape} needs {elements} elements, not {found}")
    if (
        dtype != ir.DataType.STRING
        and dtype.bitwidth == 6
        and max(proto.int32_data, default=0) > 63
    ):
        raise Flaw(f"{dtype.name} has an element of more than six bits")


def _check_padding(last: int, shape: list[int]) -> None:
    """Six-bit elements leave bits unused behind the last one: onnx-ir insists that they are 0."""
    used = math.prod(shape) * 6 % 8
    if used and last >> used:
        raise Flaw("its last byte has bits behind the last element")
