"""Checks of protobuf fields by themselves: text, and the types of values."""

from __future__ import annotations

import os
from collections.abc import Sequence

from onnx import StringStringEntryProto, TensorProto, TypeProto, ValueInfoProto

from graphopt.errors import Flaw

_ELEMENT_TYPES = frozenset(TensorProto.DataType.values())
_MAX_SIZE = 2**63 - 1
MAX_RANK = 64
"""Dimensions that a numpy array may have."""


def quote(text: str | bytes) -> str:
    """A name in quotes, on one line and of bounded length."""
    shown = repr(text.decode("utf-8", "backslashreplace") if isinstance(text, bytes) else text)
    return shown if len(shown) <= 120 else f"{shown[:100]}…{shown[-1]}"


def show(path: str | os.PathLike[str]) -> str:
    """A path as messages name it: on one line, whatever it holds."""
    text = os.fspath(path)
    return text if text.isprintable() else repr(text)


def check_texts(*texts: str) -> None:
    """Raise Flaw for text that is not UTF-8, which protobuf hands out as bytes."""
    if bytes in map(type, texts):
        wrong = next(text for text in texts if isinstance(text, bytes))
        raise Flaw(f"it has text that is not UTF-8: {quote(wrong)}")


def check_metadata(entries: Sequence[StringStringEntryProto]) -> None:
    """Raise Flaw for metadata that are not UTF-8."""
    for entry in entries:
        check_texts(entry.key, entry.value)


def check_utf8(text: bytes) -> None:
    """Raise Flaw for an attribute's text that is not UTF-8."""
    try:
        text.decode()
    except UnicodeDecodeError:
        raise Flaw(f"it has text that is not UTF-8: {quote(text)}") from None


def check_value_info(info: ValueInfoProto) -> int | None:
    """The element type of a tensor, None for other types; raises Flaw for a wrong type."""
    check_texts(info.name, info.doc_string)
    if info.metadata_props:
        check_metadata(info.metadata_props)
    if not info.HasField("type"):
        return None
    check_type(info.type)
    if not info.type.HasField("tensor_type"):
        return None
    element = info.type.tensor_type.elem_type
    if element == TensorProto.UNDEFINED:
        info.ClearField("type")  # a shape alone could not be written again
    return element or None


def check_type(proto: TypeProto) -> None:
    """Raise Flaw for a wrong type. Dimensions of -1, which some use for unknown, become unknown."""
    leaf = _leaf(proto)
    check_texts(leaf.denotation)
    if leaf.HasField("tensor_type"):
        tensor: TypeProto.Tensor | TypeProto.SparseTensor = leaf.tensor_type
    elif leaf.HasField("sparse_tensor_type"):
        tensor = leaf.sparse_tensor_type
    elif leaf is not proto and leaf.WhichOneof("value") is None:
        raise Flaw("its type is incomplete")
    else:
        return
    if tensor.elem_type not in _ELEMENT_TYPES:
        raise Flaw(f"element type {tensor.elem_type} is unknown")
    if len(tensor.shape.dim) > MAX_RANK:
        raise Flaw(f"it has {len(tensor.shape.dim)} dimensions")
    size = 1
    for dim in tensor.shape.dim:
        check_texts(dim.dim_param, dim.denotation)
        count = dim.dim_value
        if count < 0:
            if count != -1:
                raise Flaw(f"it has the negative dimension {count}")
            dim.ClearField("dim_value")
        elif count:
            size *= count
    if size > _MAX_SIZE:
        raise Flaw("its shape is too large for any memory")


def has_map(proto: TypeProto) -> bool:
    """Whether a type is beyond onnx-ir: a map, a sequence of maps, or opaque."""
    return _leaf(proto).WhichOneof("value") in ("map_type", "opaque_type")


def _leaf(proto: TypeProto) -> TypeProto:
    """What a type holds, below sequences and optionals."""
    while True:
        if proto.HasField("sequence_type"):
            proto = proto.sequence_type.elem_type
        elif proto.HasField("optional_type"):
            proto = proto.optional_type.elem_type
        else:
            return proto
