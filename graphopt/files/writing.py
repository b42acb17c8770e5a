"""Saving: the model's bytes with weights written straight from where they are, atomically."""

from __future__ import annotations

import os
import re
import secrets
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
import onnx

from graphopt import ir
from graphopt.errors import InputError
from graphopt.files import wire
from graphopt.files.checks import show
from graphopt.files.external import DataFile, FileTensor, copy_range

# What a graph's `meta` remembers of the file that it came from.
SIGNATURE, EXTERNAL, TYPES = "graphopt.signature", "graphopt.external", "graphopt.types"

EXTERNAL_TENSOR_BYTES = 1024
"""Bytes from which a weight goes to the data file, where there is one."""
_ALIGNMENT = 4096
_CHUNK = 1 << 20

Initializers = list[tuple[onnx.TensorProto, ir.TensorProtocol | None]]


def remembered(graph: ir.Graph, key: str) -> Any:
    """What a graph's `meta` says under one of these keys; None where it says nothing."""
    meta: Any = graph.meta
    return meta.get(key)


def weight_bytes(model: ir.Model) -> int:
    """Bytes of all initializers of the main graph."""
    values = model.graph.initializers.values()
    return sum(v.const_value.nbytes for v in values if v.const_value is not None)


def skeleton(model: ir.Model) -> tuple[onnx.ModelProto, Initializers]:
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
        cast(ir.Graph, view),  # onnx-ir documents that a model may be made of a view
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
    tensors = [
        (_head(name, value.const_value), value.const_value)
        for name, value in graph.initializers.items()
        if value.const_value is not None
    ]
    _annotate(proto.graph, graph)
    _restore_types(proto.graph, remembered(graph, TYPES) or {})
    tensors += _restore_signature(proto.graph, graph)
    return proto, [
        (head, None if tensor.dtype == ir.DataType.STRING else tensor) for head, tensor in tensors
    ]


def _head(name: str, tensor: ir.TensorProtocol) -> onnx.TensorProto:
    head = onnx.TensorProto(name=name, dims=tensor.shape.numpy(), data_type=tensor.dtype.value)
    if tensor.doc_string:
        head.doc_string = tensor.doc_string
    for key, text in sorted(tensor.metadata_props.items()):
        head.metadata_props.add(key=key, value=text)
    if tensor.dtype == ir.DataType.STRING:
        head.string_data.extend(np.asarray(tensor.numpy(), object).ravel().tolist())
    return head


def _annotate(proto: onnx.GraphProto, graph: ir.Graph) -> None:
    """Add the quantization annotations of initializers, which the view did not have."""
    there = {annotation.tensor_name for annotation in proto.quantization_annotation}
    for name, value in graph.initializers.items():
        meta: Any = value.meta
        annotation: dict[str, str] | None = meta.get("quant_parameter_tensor_names")
        if annotation and name not in there:
            entry = proto.quantization_annotation.add(tensor_name=name)
            for key in sorted(annotation):
                entry.quant_parameter_tensor_names.add(key=key, value=annotation[key])


def _restore_types(proto: onnx.GraphProto, types: dict[str, bytes]) -> None:
    for info in [*proto.input, *proto.output]:
        if info.name in types and not info.HasField("type"):
            info.type.ParseFromString(types[info.name])


def _restore_signature(
    proto: onnx.GraphProto, graph: ir.Graph
) -> list[tuple[onnx.TensorProto, ir.TensorProtocol]]:
    """List initializers as inputs again, in their old places; returns those that have gone."""
    listed: Sequence[tuple[bytes, ir.TensorProtocol | None]] = remembered(graph, SIGNATURE) or ()
    if not listed:
        return []
    current = {info.name: info.SerializeToString() for info in proto.input}
    gone: list[tuple[onnx.TensorProto, ir.TensorProtocol]] = []
    del proto.input[:]
    for data, tensor in listed:
        info = proto.input.add()
        info.ParseFromString(data)
        if info.name in current:
            info.ParseFromString(current.pop(info.name))
        elif info.name in graph.initializers:
            value = graph.initializers[info.name]
            info.CopyFrom(ir.serde.serialize_value(value))
        elif tensor is not None:
            gone.append((_head(info.name, tensor), tensor))
    for data in current.values():
        proto.input.add().ParseFromString(data)
    return gone


def write(model: ir.Model, target: Path, *, overwrite: bool, external: bool) -> None:
    """Write a model file, and a data file where `external` asks for one and weights are large.

    Raises:
        InputError: a file exists, the target is none, or the model exceeds 2 GB.
        OSError: it cannot be written; files that were there are as before.
    """
    proto, tensors = skeleton(model)
    places = _layout(tensors) if external else {}
    data = target.with_name(f"{target.name}.data")
    for path in (target, data) if places else (target,):
        _check_target(path, overwrite=overwrite)
    if not places:
        with _Files() as files:
            files.publish(files.model(target, proto, tensors), target)
    else:
        _write_both(target, data, proto, tensors, places)


def _check_target(path: Path, *, overwrite: bool) -> None:
    try:
        status = path.stat()
    except FileNotFoundError:
        if not path.parent.is_dir():
            raise InputError(f"{show(path)}: its folder does not exist") from None
        return
    if not stat.S_ISREG(status.st_mode):
        raise InputError(f"{show(path)}: exists and is not a file")
    if not overwrite:
        raise InputError(f"{show(path)}: exists; overwriting has to be allowed")


def _layout(tensors: Initializers) -> dict[int, int]:
    """Offsets in the data file, by index; weights that share their data share their place."""
    places: dict[int, int] = {}
    known: dict[object, int] = {}
    end = 0
    for index, (_, tensor) in enumerate(tensors):
        if tensor is None or tensor.nbytes < EXTERNAL_TENSOR_BYTES:
            continue
        key: object = (id(getattr(tensor, "raw", tensor)), tensor.dtype)
        if isinstance(tensor, FileTensor):
            key = tensor.place
        if key not in known:
            known[key] = end
            end = _aligned(end + tensor.nbytes)
        places[index] = known[key]
    return places


def _aligned(offset: int) -> int:
    return -(-offset // _ALIGNMENT) * _ALIGNMENT


def _write_both(
    target: Path,
    data: Path,
    proto: onnx.ModelProto,
    tensors: Initializers,
    places: dict[int, int],
) -> None:
    """Write data and model files so that at any moment the model file has the data it needs.

    Two files cannot be replaced at once. Where both exist and the data change, the new model
    first refers to new data under another name, and moves to the usual name once that is new.
    """
    with _Files() as files:
        new_model = files.model(target, proto, _located(tensors, places, data.name))
        if data.exists() and _holds(data, tensors, places):
            files.publish(new_model, target)
            return
        new_data = files.data(data, tensors, places)
        if target.exists() and data.exists():
            spare = data.with_name(f"{target.name}.{secrets.token_hex(4)}.data")
            spare_data = files.copy(new_data)
            between = files.model(target, proto, _located(tensors, places, spare.name))
            files.publish(spare_data, spare)
            files.publish(between, target)
            files.publish(new_data, data)
            files.publish(new_model, target)
            # Nothing refers to other names any more, nor to those of a process that was killed.
            for path in target.parent.iterdir():
                if re.fullmatch(re.escape(target.name) + r"\.[0-9a-f]{8}\.data", path.name):
                    path.unlink(missing_ok=True)
        else:
            files.publish(new_data, data)
            files.publish(new_model, target)


def _holds(data: Path, tensors: Initializers, places: dict[int, int]) -> bool:
    """Whether a data file has exactly these weights already."""
    ends = [offset + _payload(tensors, index).nbytes for index, offset in places.items()]
    if data.stat().st_size != max(ends):
        return False
    with data.open("rb") as stream:
        for index, offset in places.items():
            stream.seek(offset)
            for chunk in _chunks(_payload(tensors, index)):
                if stream.read(len(chunk)) != chunk:
                    return False
    return True


def _payload(tensors: Initializers, index: int) -> ir.TensorProtocol:
    tensor = tensors[index][1]
    assert tensor is not None
    return tensor


def _chunks(tensor: ir.TensorProtocol) -> Iterator[bytes]:
    """A tensor's bytes, of which only a part is in memory at a time."""
    view = _bytes_of(tensor)
    for start in range(0, len(view), _CHUNK):
        yield view[start : start + _CHUNK].tobytes()


def _bytes_of(tensor: wire.Payload) -> ir.Array:
    """A tensor's bytes as they are saved, without a copy where they are so in memory."""
    if isinstance(tensor, FileTensor):
        return tensor.bytes()
    if isinstance(tensor, ir.Tensor) and tensor.dtype.bitwidth >= 8:
        return np.ascontiguousarray(tensor.numpy()).reshape(-1).view(np.uint8)
    return np.frombuffer(tensor.tobytes(), np.uint8)


def _located(tensors: Initializers, places: dict[int, int], location: str) -> Initializers:
    """The heads with where their data are, for those that have them in the data file."""
    located: Initializers = []
    for index, (head, tensor) in enumerate(tensors):
        if index not in places or tensor is None:
            located.append((head, tensor))
            continue
        outside = onnx.TensorProto()
        outside.CopyFrom(head)
        outside.data_location = onnx.TensorProto.EXTERNAL
        entries = {"location": location, "offset": places[index], "length": tensor.nbytes}
        for key, value in entries.items():
            outside.external_data.add(key=key, value=str(value))
        located.append((outside, None))
    return located


class _Files:
    """Files that are written beside their targets, and are gone unless they are published."""

    def __init__(self) -> None:
        self._written: list[Path] = []

    def __enter__(self) -> _Files:
        return self

    def __exit__(self, *_: object) -> None:
        for path in self._written:
            path.unlink(missing_ok=True)

    def _new(self, target: Path) -> BinaryIO:
        path = target.with_name(f".graphopt-{secrets.token_hex(6)}.tmp")
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
        descriptor = os.open(path, flags, 0o666)
        self._written.append(path)
        return os.fdopen(descriptor, "w+b", buffering=_CHUNK)

    def model(self, target: Path, proto: onnx.ModelProto, tensors: Initializers) -> Path:
        """Write a model file for a target."""
        chunks = list(wire.model_chunks(proto, tensors))
        size = sum(len(c) if isinstance(c, bytes) else c.nbytes for c in chunks)
        if size > wire.MAX_FILE:
            raise InputError(f"{show(target)}: more than 2 GB in one file: use external data")
        with self._new(target) as stream:
            for chunk in chunks:
                if isinstance(chunk, bytes):
                    stream.write(chunk)
                else:
                    _write_tensor(chunk, stream)
            return self._finish(stream, target)

    def data(self, target: Path, tensors: Initializers, places: dict[int, int]) -> Path:
        """Write a data file for a target."""
        with self._new(target) as stream:
            end = 0
            for index, offset in places.items():
                tensor = _payload(tensors, index)
                if offset < end:
                    continue  # shares its place with an earlier one
                stream.write(bytes(offset - end))
                _write_tensor(tensor, stream)
                end = offset + tensor.nbytes
            return self._finish(stream, target)

    def copy(self, path: Path) -> Path:
        """Write a copy of a file beside it."""
        with self._new(path) as stream:
            copy_range(DataFile(path, hold=True), 0, path.stat().st_size, stream)
            return self._finish(stream, path)

    def _finish(self, stream: BinaryIO, target: Path) -> Path:
        stream.flush()
        if target.exists():
            self._written[-1].chmod(stat.S_IMODE(target.stat().st_mode))
        os.fsync(stream.fileno())
        return self._written[-1]

    def publish(self, path: Path, target: Path) -> None:
        """Put a written file in its target's place, for good."""
        path.replace(target)
        self._written.remove(path)
        if hasattr(os, "O_DIRECTORY"):
            folder = os.open(target.parent, os.O_RDONLY | os.O_DIRECTORY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)


def _write_tensor(tensor: wire.Payload, stream: BinaryIO) -> None:
    if isinstance(tensor, FileTensor):
        copy_range(*tensor.place, stream)
    else:
        stream.write(_bytes_of(tensor).data)
