"""What onnx's schemas say of an operator, in a form that checks a node within microseconds."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import onnx.defs
from onnx import AttributeProto, NodeProto, TensorProto
from onnx.defs import OpSchema

from graphopt.errors import Flaw
from graphopt.files.checks import check_utf8

# Experiments of the first opsets, never standardized, that ONNX Runtime still has kernels for.
_EXPERIMENTS = {
    *("Affine", "ATen", "Crop", "DynamicSlice", "GivenTensorFill", "GRUUnit", "ImageScaler"),
    *("ParametricSoftplus", "Scale", "ScaledTanh"),
}
_STANDARD = ("", "ai.onnx")
_ATTRIBUTE_TYPES: dict[OpSchema.AttrType, int] = {
    getattr(OpSchema.AttrType, name): number
    for name, number in AttributeProto.AttributeType.items()
    if number != AttributeProto.UNDEFINED
}
_ELEMENT_TYPES = {
    f"tensor({name.lower()})": number for name, number in TensorProto.DataType.items()
}


@dataclass(frozen=True)
class Operator:
    """One version of an operator: how many inputs and outputs, of which types, and attributes."""

    inputs: tuple[int, int]
    outputs: tuple[int, int]
    required: tuple[int, ...]
    """Inputs that may not be left out."""
    types: tuple[frozenset[int], ...]
    """Element types that each formal input may have; the last one may repeat."""
    variables: tuple[str, ...]
    """The type variable of each formal input, "" where it has a type of its own."""
    attributes: dict[str, int]
    needed: frozenset[str]

    def check(self, node: NodeProto, types: Sequence[int | None]) -> None:
        """Raise Flaw unless a node, with known element types of inputs, fits."""
        for what, names, (least, most) in (
            ("inputs", node.input, self.inputs),
            ("outputs", node.output, self.outputs),
        ):
            if not least <= len(names) <= most:
                span = f"{least}" if least == most else f"{least} to {min(most, 999)}"
                raise Flaw(f"it has {len(names)} {what}, not {span}")
        for index in self.required:
            if not node.input[index]:
                raise Flaw(f"input {index} is left out")
        if any(types):
            self._check_types(types)
        if node.attribute or self.needed or node.op_type == "Constant":
            self._check_attributes(node)

    def _check_types(self, types: Sequence[int | None]) -> None:
        bound: dict[str, int] = {}
        for index, found in enumerate(types):
            if found is None or not self.types:
                continue
            formal = min(index, len(self.types) - 1)
            if found not in self.types[formal]:
                raise Flaw(f"input {index} may not be {type_name(found)}")
            variable = self.variables[formal]
            if variable and bound.setdefault(variable, found) != found:
                first = type_name(bound[variable])
                raise Flaw(f"inputs are both {first} and {type_name(found)}")

    def _check_attributes(self, node: NodeProto) -> None:
        missing = set(self.needed)
        for attribute in node.attribute:
            wanted = self.attributes.get(attribute.name)
            if wanted is not None and attribute.type != wanted:
                kind = AttributeProto.AttributeType.Name(attribute.type)
                needs = AttributeProto.AttributeType.Name(wanted)
                raise Flaw(f"attribute {attribute.name!r} is {kind}, not {needs}")
            if attribute.type == AttributeProto.STRING:
                check_utf8(attribute.s)
            missing.discard(attribute.name)
        if missing:
            raise Flaw(f"attribute {min(missing)!r} is missing")
        if node.op_type in ("Constant", "If", "Loop"):
            _check_structure(node)


def _check_structure(node: NodeProto) -> None:
    """What schemas do not say: of a Constant, and of bodies that must fit their node."""
    graphs = {a.name: a.g for a in node.attribute if a.type == AttributeProto.GRAPH}
    if node.op_type == "Constant" and len(node.attribute) != 1:
        raise Flaw("a constant needs one value")
    if node.op_type == "If":
        for name, graph in graphs.items():
            if graph.input or len(graph.output) != len(node.output):
                raise Flaw(f"{name} has other inputs or outputs than the node")
    if node.op_type == "Loop" and "body" in graphs:
        body = graphs["body"]
        if len(body.input) != max(2, len(node.input)) or len(body.output) != len(node.output) + 1:
            raise Flaw("body has other inputs or outputs than the node")


def type_name(number: int) -> str:
    """An element type as messages name it."""
    return TensorProto.DataType.Name(number).lower()


@functools.cache
def newest_opset() -> int:
    """The newest version of ai.onnx that the installed onnx knows."""
    return onnx.defs.onnx_opset_version()


@functools.cache
def known_domains() -> frozenset[str]:
    """Domains whose operators onnx defines: an operator it lacks there does not exist."""
    return frozenset(schema.domain for schema in onnx.defs.get_all_schemas())


@functools.cache
def operator(domain: str, op_type: str, version: int) -> Operator | None:
    """The operator that a domain has at a version; None for operators that onnx does not define.

    Raises:
        Flaw: the domain is onnx's and has no such operator at this version.
    """
    domain = "" if domain in _STANDARD else domain
    if domain not in known_domains() or (domain == "" and op_type in _EXPERIMENTS):
        return None
    try:
        return _from_schema(onnx.defs.get_schema(op_type, version, domain))
    except onnx.defs.SchemaError:
        where = f"{domain or 'ai.onnx'} version {version}"
        if not onnx.defs.has(op_type, domain):
            raise Flaw(f"{where} has no such operator") from None
        since = onnx.defs.get_schema(op_type, domain).since_version
        raise Flaw(f"{where} does not have this operator (last defined: {since})") from None


def _from_schema(schema: OpSchema) -> Operator:
    option = OpSchema.FormalParameterOption
    types: list[frozenset[int]] = []
    for formal in schema.inputs:
        numbers = (_ELEMENT_TYPES.get(text) for text in formal.types)
        types.append(frozenset(number for number in numbers if number is not None))
    constrained = {constraint.type_param_str for constraint in schema.type_constraints}
    return Operator(
        inputs=(schema.min_input, schema.max_input),
        outputs=(schema.min_output, schema.max_output),
        required=tuple(
            index
            for index, formal in enumerate(schema.inputs)
            if formal.option == option.Single and index < schema.min_input
        ),
        types=tuple(types),
        variables=tuple(
            formal.type_str if formal.type_str in constrained and formal.is_homogeneous else ""
            for formal in schema.inputs
        ),
        attributes={name: _ATTRIBUTE_TYPES[a.type] for name, a in schema.attributes.items()},
        needed=frozenset(name for name, a in schema.attributes.items() if a.required),
    )
