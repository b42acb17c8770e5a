"""What changed about an operator between two versions of the operator set, as its schemas say."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import numpy as np
import onnx

from graphopt import ir
from graphopt.shapes import Shapes

_Schema = onnx.defs.OpSchema
_OPTION = _Schema.FormalParameterOption

_CHANGED = {
    ("Dropout", 10),  # the mask is boolean
    ("GroupNormalization", 21),  # scale and bias are per channel, not per group
    ("RoiAlign", 16),  # the new attribute's default is another mode
    ("Split", 18),  # equal parts have to be asked for
    *((name, 8) for name in ("Max", "Min", "Mean", "Sum")),  # they broadcast
}
"""(operator, version) whose schema looks as if it only allowed more, but means something else."""

_NEW_WORDS = {
    ("Pad", 19): ("mode", "wrap"),
    ("Resize", 19): ("coordinate_transformation_mode", "half_pixel_symmetric"),
    ("ScatterElements", 18): ("reduction", "max min"),
    ("ScatterND", 18): ("reduction", "max min"),
}
"""Values of an attribute that a version added."""

_INDEXED = ("Gather", "GatherElements", "OneHot", "ScatterElements")
"""Operators with indices, which may be negative since version 11."""


def differs(op_type: str, version: int) -> bool:
    """Whether a version has another schema of an operator than the one before it."""
    return _schema(op_type, version) is not _schema(op_type, version - 1)


def misfit(nodes: Iterable[ir.Node], version: int) -> str:
    """Why nodes are not what a version knows, or an empty text: onnx's converter is careless."""
    for node in nodes:
        schema = _schema(node.op_type, version)
        if schema is None or schema.deprecated:
            return f"there is no {node.op_type}"
        unknown = [name for name in node.attributes if name not in schema.attributes]
        if unknown:
            return f"{node.op_type} has no attribute {unknown[0]!r}"
        if version < 11 and _counts_backwards(node):
            return f"{node.op_type} has no negative axes"
    return ""


def superfluous(node: ir.Node, version: int, *, up: bool, shapes: Shapes) -> list[str] | None:
    """Attributes to drop for a node to mean in one version what it means in the next.

    `version` is the newer of the two versions, `up` tells whether it is the one to go to. None
    where dropping attributes, which are at their defaults, does not make it so.
    """
    older, newer = _schema(node.op_type, version - 1), _schema(node.op_type, version)
    if older is None or newer is None or newer.deprecated or version <= 7:
        return None
    if (node.op_type, version) in _CHANGED or not _extends(older, newer):
        return None
    if up:
        return []
    if not _fits(node, older, shapes) or not _says_old_words(node, version, shapes):
        return None
    added = set(newer.attributes) - set(older.attributes)
    dropped = [name for name in node.attributes if name in added]
    defaults: Any = newer.attributes
    for name in dropped:
        default = defaults[name].default_value
        if not default.type or ir.from_proto(default) != node.attributes[name]:
            return None
    return dropped


@functools.cache
def _schema(op_type: str, version: int) -> _Schema | None:
    try:
        schema = onnx.defs.get_schema(op_type, version, "")
    except onnx.defs.SchemaError:
        return None
    return _unique(op_type, schema.since_version)


@functools.cache
def _unique(op_type: str, since: int) -> _Schema:
    return onnx.defs.get_schema(op_type, since, "")


@functools.cache
def _extends(older: _Schema, newer: _Schema) -> bool:
    """Whether whatever one schema allows the other one allows, with the same defaults."""
    for name, attribute in older.attributes.items():
        other = newer.attributes.get(name)
        if other is None or other.type != attribute.type:
            return False
        if attribute.default_value != other.default_value:
            return False
    for before, after in ((older.inputs, newer.inputs), (older.outputs, newer.outputs)):
        if len(before) > len(after):
            return False
        if any(new.option != _OPTION.Optional for new in after[len(before) :]):
            return False
        for old, new in zip(before, after, strict=False):
            if new.option not in (old.option, _OPTION.Optional):
                return False
    return True


def _fits(node: ir.Node, schema: _Schema, shapes: Shapes) -> bool:
    """Whether a node has the operands that an older schema asks for, and their types."""
    for values, formals in ((node.inputs, schema.inputs), (node.outputs, schema.outputs)):
        last = formals[-1] if formals else None
        for position, value in enumerate(values):
            absent = value is None or not value.name
            if position >= len(formals):
                if absent:
                    continue
                if last is None or last.option != _OPTION.Variadic:
                    return False
            formal = formals[min(position, len(formals) - 1)]
            if absent or value is None:
                if formal.option == _OPTION.Single:
                    return False
                continue
            if _type_name(value, shapes) not in formal.types:
                return False
        needed = [f for f in formals[len(values) :] if f.option == _OPTION.Single]
        if needed:
            return False
    return True


def _type_name(value: ir.Value, shapes: Shapes) -> str:
    """A value's type as schemas write it."""
    dtype = shapes.dtype(value)
    if dtype is not None:
        return f"tensor({dtype.name.lower()})"
    kind, words = value.type, list[str]()
    while isinstance(kind, ir.SequenceType | ir.OptionalType):
        words.append("seq" if isinstance(kind, ir.SequenceType) else "optional")
        kind = kind.elem_type
    element = "unknown" if kind is None else ir.DataType(kind.dtype).name.lower()
    return "(".join([*words, f"tensor({element}"]) + ")" * (len(words) + 1)


def _says_old_words(node: ir.Node, version: int, shapes: Shapes) -> bool:
    """Whether a node does without values that only the newer version knows."""
    name, words = _NEW_WORDS.get((node.op_type, version), ("", ""))
    if name and str(ir.attribute(node, name, "")) in words.split():
        return False
    if (node.op_type, version) == ("Mod", 28) and not ir.attribute(node, "fmod", 0):
        dtype = shapes.dtype(node.outputs[0])
        return dtype is not None and dtype.is_integer()
    if version != 11:
        return True
    if _counts_backwards(node):
        return False
    if node.op_type in _INDEXED:
        indices = ir.array(node.inputs[0 if node.op_type == "OneHot" else 1])
        return indices is not None and not bool((indices.astype(float) < 0).any())
    return True


def _counts_backwards(node: ir.Node) -> bool:
    values: list[Any] = [ir.attribute(node, name, 0) for name in ("axis", "axes")]
    return any(bool(np.any(np.asarray(value) < 0)) for value in values)
