"""Reading and writing ONNX files without a second copy of the weights.

A file is a protobuf message. Its large weights are read straight into arrays of their own, and
protobuf parses what is left, the skeleton; on the way out they are written straight after it.
Field numbers are those of onnx.proto.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Protocol

import numpy as np
import numpy.typing as npt
import onnx
from google.protobuf.message import Message

PAYLOAD = 1024  # bytes from which a weight is taken out of the skeleton
MAX_NODES = 1_000_000  # nodes of a file: ten times the largest models known
MAX_FILE = 2**31 - 1  # bytes that a protobuf message may have

Bytes = npt.NDArray[np.uint8]

_GRAPH, _NODE, _INITIALIZER, _RAW_DATA = 7, 1, 5, 9
_VARINT, _FIXED64, _DELIMITED, _FIXED32 = 0, 1, 2, 5


_Field = Callable[[bytes, int], bytes]


class Payload(Protocol):
    """A tensor's data, to be written in its place."""

    @property
    def nbytes(self) -> int: ...

    def tobytes(self) -> bytes: ...


class WireError(ValueError):
    """The bytes are no protobuf message that could be a model."""


class _Reader:
    """Takes a stream apart, keeping the skeleton's bytes and the payloads."""

    def __init__(self, stream: io.BytesIO | io.BufferedReader, size: int) -> None:
        self.stream = stream
        self.size = size
        self.position = 0
        self.nodes = 0
        self.initializers = 0
        self.payloads: dict[int, Bytes] = {}

    def take(self, count: int, end: int) -> bytes:
        """The next `count` bytes, which must lie before `end`."""
        if count > end - self.position:
            raise WireError("it is cut short or damaged")
        data = self.stream.read(count)
        if len(data) != count:
            raise WireError("it is cut short")
        self.position += count
        return data

    def varint(self, end: int) -> tuple[int, bytes]:
        """The next variable-length integer and its bytes."""
        value = shift = 0
        raw = b""
        while True:
            byte = self.take(1, end)
            raw += byte
            value |= (byte[0] & 0x7F) << shift
            if byte[0] < 0x80:
                return value, raw
            shift += 7
            if shift > 63:
                raise WireError("it is no protobuf message")

    def message(self, end: int, nested: Mapping[int, _Field]) -> bytes:
        """The bytes up to `end`, with the fields of `nested` replaced by what they return."""
        parts: list[bytes] = []
        while self.position < end:
            tag, raw = self.varint(end)
            field, kind = tag >> 3, tag & 7
            if field == 0:
                raise WireError("it is no protobuf message")
            if kind == _DELIMITED:
                length, raw_length = self.varint(end)
                if length > end - self.position:
                    raise WireError("it is cut short or damaged")
                if field in nested:
                    parts.append(nested[field](raw, length))
                else:
                    parts += [raw, raw_length, self.take(length, end)]
            elif kind == _VARINT:
                parts += [raw, self.varint(end)[1]]
            elif kind in (_FIXED32, _FIXED64):
                parts += [raw, self.take(8 if kind == _FIXED64 else 4, end)]
            else:
                raise WireError("it is no protobuf message")
        return b"".join(parts)

    def model(self) -> bytes:
        return self.message(self.size, {_GRAPH: self.graph})

    def graph(self, tag: bytes, length: int) -> bytes:
        nested: dict[int, _Field] = {_NODE: self.node, _INITIALIZER: self.initializer}
        body = self.message(self.position + length, nested)
        return tag + varint(len(body)) + body

    def node(self, tag: bytes, length: int) -> bytes:
        self.nodes += 1
        if length == 0:
            raise WireError("it has an empty node")
        if self.nodes > MAX_NODES:
            raise WireError(f"it has more than {MAX_NODES:,} nodes")
        return tag + varint(length) + self.take(length, self.position + length)

    def initializer(self, tag: bytes, length: int) -> bytes:
        index, self.initializers = self.initializers, self.initializers + 1

        def raw_data(tag: bytes, length: int) -> bytes:
            if index in self.payloads:
                raise WireError("it has a tensor with its data given twice")
            if length < PAYLOAD:
                return tag + varint(length) + self.take(length, self.position + length)
            array = np.empty(length, np.uint8)
            if self.stream.readinto(array.data) != length:
                raise WireError("it is cut short")
            self.position += length
            self.payloads[index] = array
            return b""

        body = self.message(self.position + length, {_RAW_DATA: raw_data})
        return tag + varint(len(body)) + body


def varint(value: int) -> bytes:
    """An unsigned integer as protobuf writes it."""
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def read(stream: io.BytesIO | io.BufferedReader, size: int) -> tuple[bytes, dict[int, Bytes]]:
    """Split a serialized ModelProto of `size` bytes into skeleton and payloads.

    Returns the message without the raw data of large initializers of the main graph, and these
    data by the index of their initializer. Raises WireError where the bytes are no protobuf.
    """
    reader = _Reader(stream, size)
    return reader.model(), reader.payloads


_FORMATS = (
    (0, b"version https://git-lfs", "a Git LFS pointer: run `git lfs pull`"),
    (0, b"PK\x03\x04", "a zip archive, as PyTorch checkpoints are: export it to ONNX"),
    (0, b"\x89HDF", "an HDF5 file, as Keras writes: export it to ONNX"),
    (4, b"ORTM", "a model in ORT format: give the ONNX file that it was made from"),
    (4, b"TFL3", "a TensorFlow Lite model: convert it to ONNX"),
    (0, b"<", "a web page or XML"),
)


def guess(start: bytes) -> str:
    """What a file that is no model might be, from its first bytes; "" for no idea."""
    for offset, magic, name in _FORMATS:
        if start[offset : offset + len(magic)] == magic:
            return name
    printable = bytes(range(32, 127)) + b"\t\n\r"
    return "" if start.translate(None, printable) else "a text file"


def split(model: onnx.ModelProto) -> tuple[onnx.ModelProto, dict[int, Bytes]]:
    """What `read` does for a file, for a model in memory: the original is left as it is."""
    skeleton = onnx.ModelProto()
    _copy_fields(model, skeleton, without="graph")
    if model.HasField("graph"):
        skeleton.graph.SetInParent()
        _copy_fields(model.graph, skeleton.graph, without="initializer")
    payloads: dict[int, Bytes] = {}
    for index, tensor in enumerate(model.graph.initializer):
        copied = skeleton.graph.initializer.add()
        data = tensor.raw_data
        if len(data) < PAYLOAD:
            copied.CopyFrom(tensor)
            continue
        _copy_fields(tensor, copied, without="raw_data")
        payloads[index] = np.frombuffer(data, np.uint8)
    return skeleton, payloads


def _copy_fields(source: Message, target: Message, *, without: str) -> None:
    for field, value in source.ListFields():
        if field.name == without:
            continue
        if isinstance(value, Message):
            getattr(target, field.name).CopyFrom(value)
        elif isinstance(value, int | float | str | bytes):
            setattr(target, field.name, value)
        else:
            getattr(target, field.name).MergeFrom(value)


def model_chunks(
    model: onnx.ModelProto, tensors: Iterable[tuple[onnx.TensorProto, Payload | None]]
) -> Iterator[bytes | Payload]:
    """The bytes of a file: `model`, whose main graph lists no initializers, with `tensors` in it.

    A payload is given back as it is, in its place: whoever writes the file writes its data.
    """
    graph = model.graph.SerializeToString(deterministic=True)
    heads: list[tuple[bytes, Payload | None]] = []
    size = len(graph)
    for tensor, payload in tensors:
        body = tensor.SerializeToString(deterministic=True)
        length = len(body)
        if payload is not None:
            body += varint(_RAW_DATA << 3 | _DELIMITED) + varint(payload.nbytes)
            length = len(body) + payload.nbytes
        head = varint(_INITIALIZER << 3 | _DELIMITED) + varint(length) + body
        heads.append((head, payload))
        size += len(head) + (payload.nbytes if payload is not None else 0)
    model = _without_graph(model)
    yield model.SerializeToString(deterministic=True)
    yield varint(_GRAPH << 3 | _DELIMITED) + varint(size) + graph
    for head, payload in heads:
        yield head
        if payload is not None:
            yield payload


def _without_graph(model: onnx.ModelProto) -> onnx.ModelProto:
    copied = onnx.ModelProto()
    _copy_fields(model, copied, without="graph")
    return copied
