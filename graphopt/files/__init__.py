"""Models from files and to files: safely, whole or not at all, without copying weights.

A model's weights stay where they are: those of external data files stay memory-mapped, and
saving copies their file ranges.
"""

from __future__ import annotations

import graphlib
import io
import os
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import onnx
from google.protobuf.message import DecodeError
from onnx import ValueInfoProto

from graphopt import atomic, ir
from graphopt.errors import Flaw, GraphoptError, InputError
from graphopt.files import container, wire, writing
from graphopt.files.checks import quote, show
from graphopt.files.external import FileTensor, Folder
from graphopt.files.tensors import DATA_FIELDS, TensorReader
from graphopt.files.validate import Validator
from graphopt.files.writing import EXTERNAL, SIGNATURE, TYPES


class Exported(Protocol):
    """What `torch.onnx.export` returns (an `ONNXProgram`): it holds the model."""

    @property
    def model(self) -> ir.Model: ...


ModelLike = str | os.PathLike[str] | bytes | onnx.ModelProto | ir.Model | Exported

EXTERNAL_BYTES = 1_800_000_000
"""Total bytes of weights from which they are saved beside the model, not in it."""
_TENSORS = (ir.AttributeType.TENSOR, ir.AttributeType.TENSORS)


def load(source: ModelLike, *, keep_signature: bool = False) -> ir.Model:
    """A model from a file, its bytes, or a model in memory, which is left as it is.

    Initializers that a file of IR version 3 must also list as inputs become constants, and the
    IR version 4; `keep_signature` lists them again when the model is saved. Sparse initializers
    become dense, and nodes are sorted where they are not.

    Raises:
        InputError: not a model, an invalid one, or one with unsafe external data.
    """
    if isinstance(source, ir.Model):
        return copy(source)
    if isinstance(source, onnx.ModelProto):
        return _build(*wire.split(source), "model", None, keep_signature)
    if not isinstance(source, str | os.PathLike | bytes):
        held = getattr(source, "model", None)
        if not isinstance(held, ir.Model):
            raise InputError(f"{type(source).__name__}: no model, nor a path or the bytes of one")
        return copy(held)
    if isinstance(source, bytes):
        return _read(io.BytesIO(source), len(source), "model", None, keep_signature)
    path = Path(source)
    try:
        with _open_regular(path) as stream:
            if stream.peek(len(container.MAGIC)).startswith(container.MAGIC):
                return _unpacked(path, keep_signature)
            size = os.fstat(stream.fileno()).st_size
            return _read(stream, size, show(path), path, keep_signature)
    except OSError as error:
        raise InputError(f"{show(path)}: cannot be read ({error.strerror})") from None
    except ValueError as error:  # a null character in the name
        raise InputError(f"{show(path)}: {error}") from None


def _unpacked(path: Path, keep_signature: bool) -> ir.Model:
    """A compressed model; its weights stay mapped to a file that has no name any more."""
    with tempfile.TemporaryDirectory(prefix="graphopt-") as folder:
        inner = container.unpack(path, Path(folder))
        with inner.open("rb") as stream:
            return _read(stream, inner.stat().st_size, show(path), inner, keep_signature)


def _open_regular(path: Path) -> io.BufferedReader:
    """Open a file without waiting for the other end of a pipe."""
    flags = os.O_RDONLY
    for name in ("O_NONBLOCK", "O_CLOEXEC", "O_BINARY"):
        flags |= getattr(os, name, 0)
    stream = os.fdopen(os.open(path, flags), "rb")
    if not stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
        stream.close()
        raise InputError(f"{show(path)}: not a file")
    return stream


def _read(
    stream: io.BytesIO | io.BufferedReader,
    size: int,
    name: str,
    path: Path | None,
    keep_signature: bool,
) -> ir.Model:
    if size == 0:
        raise InputError(f"{name}: not an ONNX model (it is empty)")
    if size > wire.MAX_FILE:
        raise InputError(f"{name}: not an ONNX model (larger than 2 GB: use external data)")
    try:
        data, payloads = wire.read(stream, size)
        skeleton = onnx.ModelProto.FromString(data)
    except (wire.WireError, DecodeError) as error:
        stream.seek(0)
        why = str(error)
        if isinstance(error, DecodeError):
            why = "it is nested too deeply" if "MaxDepth" in why else "it is damaged"
        why = wire.guess(stream.read(512)) or why
        raise InputError(f"{name}: not an ONNX model ({why})") from None
    return _build(skeleton, payloads, name, path, keep_signature)


def _build(
    skeleton: onnx.ModelProto,
    payloads: dict[int, wire.Bytes],
    name: str,
    path: Path | None,
    keep_signature: bool,
) -> ir.Model:
    """The model of a skeleton and its payloads, checked; the skeleton is used up."""
    folder = Folder(path.parent) if path is not None else None
    reader = TensorReader(folder)
    validator = Validator(skeleton, name, reader)
    validator.run()
    tensors: dict[str, ir.TensorProtocol] = {}
    for index, proto in enumerate(skeleton.graph.initializer):
        try:
            tensors[proto.name] = reader.read(proto, payloads.pop(index, None))
        except Flaw as flaw:
            raise InputError(f"{name}: initializer {quote(proto.name)}: {flaw}") from None
    external = any(isinstance(tensor, FileTensor) for tensor in tensors.values())
    skeleton.ir_version = max(skeleton.ir_version, 4)
    with ir.paused_gc():
        model = _deserialize(skeleton, tensors, name)
    if validator.unsorted:
        _sort(model, name)
    meta = model.graph.meta
    meta[TYPES] = validator.types
    meta[EXTERNAL] = external
    if keep_signature and validator.signature:
        meta[SIGNATURE] = [
            (data, tensors.get(ValueInfoProto.FromString(data).name))
            for data in validator.signature
        ]
    return model


def _deserialize(
    skeleton: onnx.ModelProto, tensors: dict[str, ir.TensorProtocol], name: str
) -> ir.Model:
    """Let onnx-ir read a skeleton, and give its values the tensors that were read from it."""
    for proto in skeleton.graph.initializer:
        for field in DATA_FIELDS:
            proto.ClearField(field)
    try:
        model = ir.serde.deserialize_model(skeleton)
    except (ir.serde.SerdeError, ValueError, TypeError, RecursionError) as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        if isinstance(cause, GraphoptError):  # a time limit that struck in the middle
            raise cause from None
        raise InputError(f"{name}: {' '.join(str(cause).split())[:300]}") from None
    for value in model.graph.initializers.values():
        assert value.name is not None
        tensor = tensors[value.name]
        value.const_value = tensor
        if not value.is_graph_input():
            value.type = ir.TensorType(tensor.dtype)
            value.shape = ir.Shape(tensor.shape.numpy())
    for graph in ir.graphs(model):
        if graph is not model.graph:
            for value in graph.initializers.values():
                if value.const_value is not None:
                    value.const_value = _detached(value.const_value)
        for node in graph:
            for key, attr in node.attributes.items():
                if not attr.is_ref() and attr.type in _TENSORS:
                    node.attributes[key] = _detached_attribute(attr)
    return model


def _detached_attribute(attr: ir.Attr) -> ir.Attr:
    if attr.type == ir.AttributeType.TENSOR:
        tensor = _detached(attr.as_tensor())
        return ir.Attr(attr.name, attr.type, tensor, doc_string=attr.doc_string)
    tensors = [_detached(tensor) for tensor in attr.as_tensors()]
    return ir.Attr(attr.name, attr.type, tensors, doc_string=attr.doc_string)


def _detached(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
    """A tensor that no longer holds on to the protobuf message, nor decodes it at each use."""
    detached: ir.TensorProtocol
    if isinstance(tensor, ir.onnx_ir.StringTensor):
        array = np.array(list(tensor.string_data()), object)
        detached = ir.onnx_ir.StringTensor(array.reshape(tensor.shape.numpy()))
    else:
        detached = ir.Tensor(tensor.numpy(), dtype=tensor.dtype)
    detached.name, detached.doc_string = tensor.name, tensor.doc_string
    detached.metadata_props.update(tensor.metadata_props)
    return detached


def _sort(model: ir.Model, name: str) -> None:
    try:
        model.graph.sort()
        for function in model.functions.values():
            function.sort()
    except ValueError:
        raise InputError(f"{name}: {_cycle(model)}") from None


def _cycle(model: ir.Model) -> str:
    """Which node waits for its own output."""
    for graph in ir.graphs(model):
        waits: dict[ir.Node, set[ir.Node]] = {}
        for node in graph:
            used = [value for inner in _with_nested(node) for value in inner.inputs]
            waits[node] = {p for v in used if v is not None and (p := v.producer()) is not None}
        try:
            graphlib.TopologicalSorter(waits).prepare()
        except graphlib.CycleError as error:
            return f"node {quote(ir.label(error.args[1][0]))} waits for its own output (a cycle)"
    return "the graph has a cycle"


def _with_nested(node: ir.Node) -> Iterator[ir.Node]:
    yield node
    for graph in ir.subgraphs(node):
        for inner in graph:
            yield from _with_nested(inner)


def copy(model: ir.Model) -> ir.Model:
    """A copy whose nodes and values are its own and whose tensors are shared; keeps lineage."""
    with ir.paused_gc():
        cloned = model.clone()
    meta: Any = cloned.meta
    meta.update(model.meta)
    return cloned


def to_proto(model: ir.Model) -> onnx.ModelProto:
    """The model as protobuf with all weights in it, which takes a copy of them."""
    proto, tensors = writing.skeleton(model)
    for head, tensor in tensors:
        added = proto.graph.initializer.add()
        added.CopyFrom(head)
        if tensor is not None:
            added.raw_data = tensor.tobytes()
    return proto


def save(
    model: ir.Model,
    path: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    external: bool | None = None,
) -> None:
    """Write a model file, whole or not at all: a file that it replaces stays until it is complete.

    `external` puts weights of 1 KB and more beside the file, in `PATH.data`; by default only where
    all weights exceed 1.8 GB, or the model came with external data. A PATH that ends in `.zst` is
    written compressed, as `load` reads it: one file, weights included.

    Raises:
        InputError: the file exists and `overwrite` is not set, or it cannot be written.
        MissingError: a compressed file is asked for and the `zstd` extra is not installed.
    """
    target = Path(path)
    if external is None:
        known = bool(writing.remembered(model.graph, EXTERNAL))
        external = known or writing.weight_bytes(model) > EXTERNAL_BYTES
    try:
        if target.suffix == container.SUFFIX:
            _pack(model, target, overwrite=overwrite, external=external)
        else:
            writing.write(model, target, overwrite=overwrite, external=external)
    except OSError as error:
        raise InputError(f"{show(target)}: cannot be written ({error.strerror})") from None
    except ValueError as error:  # a null character in the name
        raise InputError(f"{show(target)}: {error}") from None


def _pack(model: ir.Model, target: Path, *, overwrite: bool, external: bool) -> None:
    if target.exists() and not overwrite:
        raise InputError(f"{show(target)}: exists; overwriting has to be allowed")
    with tempfile.TemporaryDirectory(prefix=".graphopt-", dir=target.parent) as folder:
        inner = Path(folder) / container.MODEL
        writing.write(model, inner, overwrite=False, external=external)
        atomic.write(target, lambda file: container.pack(Path(folder), file))
