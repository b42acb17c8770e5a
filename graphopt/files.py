"""Models from files and to files: safely, whole or not at all, without copying weights.

A model's weights stay where they are: those of external data files stay memory-mapped, and
saving copies their file ranges.
"""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
from google.protobuf.message import DecodeError

from graphopt import _wire, ir
from graphopt.errors import InputError

ModelLike = str | os.PathLike[str] | bytes | onnx.ModelProto | ir.Model

EXTERNAL_BYTES = 1_800_000_000
"""Total bytes of weights from which they are saved beside the model, not in it."""
EXTERNAL_TENSOR_BYTES = 1024
"""Bytes from which a weight goes to the data file, where there is one."""

_SIGNATURE, _SOURCE, _EXTERNAL = "graphopt.signature", "graphopt.source", "graphopt.external"


def load(source: ModelLike, *, keep_signature: bool = False) -> ir.Model:
    """A model from a file, its bytes, or a model in memory, which is left as it is.

    Initializers that a file of IR version 3 must also list as inputs become constants and the
    IR version 4; `keep_signature` lists them again when the model is saved.

    Raises:
        InputError: not a model, an invalid one, or one with unsafe external data.
    """
    if isinstance(source, ir.Model):
        return copy(source)
    if isinstance(source, onnx.ModelProto):
        return _from_skeleton(*_wire.split(source), "model", None, keep_signature)
    if isinstance(source, bytes):
        return _read(io.BytesIO(source), len(source), "model", None, keep_signature)
    path = Path(source)
    try:
        with path.open("rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            model = _read(stream, size, str(path), path, keep_signature)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None
    model.graph.meta[_SOURCE] = path.absolute()
    return model


def _read(
    stream: io.BytesIO | io.BufferedReader,
    size: int,
    name: str,
    path: Path | None,
    keep_signature: bool,
) -> ir.Model:
    try:
        data, payloads = _wire.read(stream, size)
        skeleton = onnx.ModelProto.FromString(data)
    except (_wire.WireError, DecodeError) as error:
        raise InputError(f"{name}: not an ONNX model ({error})") from None
    return _from_skeleton(skeleton, payloads, name, path, keep_signature)


def _from_skeleton(
    skeleton: onnx.ModelProto,
    payloads: dict[int, _wire.Bytes],
    name: str,
    path: Path | None,
    keep_signature: bool,
) -> ir.Model:
    types = _take_types(skeleton.graph)
    model = ir.serde.deserialize_model(skeleton)
    for index, data in payloads.items():
        proto = skeleton.graph.initializer[index]
        model.graph.initializers[proto.name].const_value = _tensor(proto, data)
    model.graph.meta.update(types)
    return model


def _tensor(proto: onnx.TensorProto, data: _wire.Bytes) -> ir.TensorProtocol:
    dtype = ir.DataType(proto.data_type)
    if dtype.bitwidth < 8:
        return ir.onnx_ir.PackedTensor(data, dtype, shape=ir.Shape(proto.dims), name=proto.name)
    array = data.view(dtype.numpy()).reshape(proto.dims)
    return ir.Tensor(array, dtype=dtype, name=proto.name, doc_string=proto.doc_string)


def copy(model: ir.Model) -> ir.Model:
    """A copy whose nodes and values are its own and whose tensors are shared; keeps lineage."""
    cloned = model.clone()
    cloned.meta.update(model.meta)
    return cloned


def to_proto(model: ir.Model) -> onnx.ModelProto:
    """The model as protobuf, with all weights in it."""
    proto, tensors = _to_skeleton(model)
    for head, payload in tensors:
        added = proto.graph.initializer.add()
        added.CopyFrom(head)
        if payload is not None:
            added.raw_data = payload.tobytes()
    return proto


def _to_skeleton(
    model: ir.Model,
) -> tuple[onnx.ModelProto, list[tuple[onnx.TensorProto, ir.TensorProtocol | None]]]:
    """The model without initializers, and these: heads, and the tensors whose data they lack."""
    graph = model.graph
    view = ir.onnx_ir.GraphView(
        graph.inputs,
        graph.outputs,
        nodes=graph,
        doc_string=graph.doc_string,
        opset_imports=graph.opset_imports,
        name=graph.name,
        metadata_props=graph.metadata_props,
    )
    shell = ir.Model(
        view,
        ir_version=model.ir_version,
        producer_name=model.producer_name,
        producer_version=model.producer_version,
        domain=model.domain,
        model_version=model.model_version,
        doc_string=model.doc_string,
        functions=list(model.functions.values()),
        metadata_props=model.metadata_props,
        device_configurations=model.device_configurations,
    )
    proto = ir.serde.serialize_model(shell)
    heads: list[tuple[onnx.TensorProto, ir.TensorProtocol | None]] = []
    for name, value in graph.initializers.items():
        tensor = value.const_value
        if tensor is None:
            continue
        head = onnx.TensorProto(
            name=name,
            dims=tensor.shape.numpy(),
            data_type=tensor.dtype.value,
            doc_string=tensor.doc_string or None,
        )
        if tensor.dtype == ir.DataType.STRING:
            head.string_data.extend(np.asarray(tensor.numpy(), object).ravel().tolist())
            heads.append((head, None))
        else:
            heads.append((head, tensor))
    _put_types(proto.graph, graph.meta)
    return proto, heads


def _take_types(graph: onnx.GraphProto) -> dict[str, bytes]:
    taken: dict[str, bytes] = {}
    for info in [*graph.input, *graph.output, *graph.value_info]:
        leaf = info.type
        while leaf.WhichOneof("value") in ("sequence_type", "optional_type"):
            leaf = getattr(leaf, leaf.WhichOneof("value") or "").elem_type
        if leaf.WhichOneof("value") in ("map_type", "opaque_type"):
            taken[f"graphopt.type.{info.name}"] = info.type.SerializeToString(deterministic=True)
            info.ClearField("type")
    return taken


def _put_types(graph: onnx.GraphProto, meta: dict[str, bytes]) -> None:
    for info in [*graph.input, *graph.output]:
        kept = meta.get(f"graphopt.type.{info.name}")
        if kept is not None and not info.HasField("type"):
            info.type.ParseFromString(kept)


def save(
    model: ir.Model,
    path: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    external: bool | None = None,
    source: Path | None = None,
) -> None:
    """Write a model file, complete or not at all.

    Raises:
        InputError: a file that exists, or cannot be written.
    """
    target = Path(path)
    if target.exists() and not overwrite:
        raise InputError(f"{target} exists; allow to overwrite it")
    try:
        with _replacing(target) as stream:
            for chunk in _wire.model_chunks(*_to_skeleton(model)):
                if isinstance(chunk, bytes):
                    stream.write(chunk)
                else:
                    stream.write(chunk.tobytes())
    except OSError as error:
        raise InputError(f"{target}: cannot be written ({error.strerror})") from None


@contextlib.contextmanager
def _replacing(target: Path) -> Iterator[io.BufferedWriter]:
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("xb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
