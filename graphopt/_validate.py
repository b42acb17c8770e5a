"""What a file must fulfil before it becomes a model: names, scopes, operators, types and sizes.

The protobuf skeleton is walked once, in graph order; what a pass could trip over is refused.
"""

from __future__ import annotations

import graphlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NoReturn

import onnx
from onnx import AttributeProto, FunctionProto, GraphProto, NodeProto, TypeProto, ValueInfoProto

from graphopt import _operators
from graphopt._operators import type_name
from graphopt._tensors import TensorReader
from graphopt.errors import Flaw, InputError

_MAX_DIM = 2**63 - 1
FunctionId = tuple[str, str, str]


@dataclass
class Scope:
    """The names of a graph: those that exist so far, and all that it will have."""

    seen: dict[str, int | None]
    """With the element type, where it is known for certain."""
    all: set[str]
    domains: dict[str, int]
    in_function: bool
    outer: Scope | None

    def find(self, name: str) -> Scope | None:
        """The innermost scope in which a name exists by now."""
        scope: Scope | None = self
        while scope is not None and name not in scope.seen:
            scope = scope.outer
        return scope

    def will_have(self, name: str) -> bool:
        """Whether a name is produced later, here or further out."""
        return name in self.all or (self.outer is not None and self.outer.will_have(name))


@dataclass
class Validator:
    """Checks a skeleton; afterwards `unsorted` says whether its nodes have to be sorted."""

    model: onnx.ModelProto
    file: str
    tensors: TensorReader
    unsorted: bool = False
    signature: list[bytes] = field(default_factory=list[bytes])
    """Inputs as a file of IR version 3 lists them, initializers among them (ValueInfoProtos)."""
    types: dict[str, bytes] = field(default_factory=dict[str, bytes])
    """Types of inputs and outputs of the model that onnx-ir cannot hold (TypeProtos)."""
    functions: dict[FunctionId, FunctionProto] = field(
        default_factory=dict[FunctionId, FunctionProto]
    )
    _calls: dict[FunctionId, set[FunctionId]] = field(
        default_factory=dict[FunctionId, set[FunctionId]]
    )

    def run(self) -> None:
        """Raise InputError for the first thing that is wrong."""
        model, graph = self.model, self.model.graph
        self._header()
        if model.ir_version < 3 and not model.opset_import:
            model.opset_import.add(domain="", version=1)
        domains = self._imports(model.opset_import, "")
        for function in model.functions:
            key = (function.domain, function.name, function.overload)
            if key in self.functions:
                self.fail(f"function {quote(function.name)} is defined twice")
            self.functions[key] = function
        for key, function in self.functions.items():
            self._function(key, function)
        try:
            graphlib.TopologicalSorter(self._calls).prepare()
        except graphlib.CycleError as error:
            self.fail(f"function {quote(error.args[1][0][1])} calls itself")
        if not graph.output:
            self.fail("the graph has no outputs")
        self._graph(graph, domains, None, in_function=False)

    def fail(self, why: str) -> NoReturn:
        """Raise InputError with the file's name."""
        raise InputError(f"{self.file}: {why}")

    def _header(self) -> None:
        model = self.model
        if not model.HasField("graph"):
            self.fail("not an ONNX model (it has no graph)")
        if not 1 <= model.ir_version <= onnx.IR_VERSION:
            self.fail(
                f"IR version {model.ir_version} is not known to onnx {onnx.__version__} "
                f"(1 to {onnx.IR_VERSION})"
            )
        if model.training_info:
            self.fail("it holds training_info, which would be lost: export it for inference")
        texts = (model.producer_name, model.producer_version, model.domain, model.doc_string)
        self._texts(texts, "the model")
        self._metadata(model.metadata_props, "the model")

    def _texts(self, texts: Iterable[str], owner: str) -> None:
        # Protobuf hands out text that is not UTF-8 as bytes.
        for text in texts:
            if isinstance(text, bytes):
                self.fail(f"{owner} has text that is not UTF-8: {quote(text)}")

    def _metadata(self, entries: Iterable[onnx.StringStringEntryProto], owner: str) -> None:
        for entry in entries:
            self._texts((entry.key, entry.value), owner)

    def _imports(self, imports: Iterable[onnx.OperatorSetIdProto], owner: str) -> dict[str, int]:
        domains: dict[str, int] = {}
        for entry in imports:
            self._texts((entry.domain,), owner or "the model")
            domain = "" if entry.domain == "ai.onnx" else entry.domain
            if entry.version < 1 or domains.setdefault(domain, entry.version) != entry.version:
                self.fail(f"{owner}opset import of {quote(domain or 'ai.onnx')} is invalid")
        newest = _operators.newest_opset()
        if domains.get("", 1) > newest:
            self.fail(
                f"{owner}opset {domains['']} is newer than onnx {onnx.__version__} knows ({newest})"
            )
        return domains

    def _function(self, key: FunctionId, function: FunctionProto) -> None:
        owner = f"function {quote(function.name)}"
        texts = (*key, function.doc_string, *function.input, *function.output, *function.attribute)
        self._texts(texts, owner)
        self._metadata(function.metadata_props, owner)
        if len(set(function.input)) < len(function.input):
            self.fail(f"{owner} lists an input twice")
        domains = self._imports(function.opset_import, f"{owner}: ")
        self._value_infos(function.value_info, owner)
        scope = Scope(dict.fromkeys(function.input), set(), domains, True, None)
        for attribute in function.attribute_proto:
            self._attribute(attribute, scope, owner)
        self._nodes(function.node, scope)
        for name in function.output:
            if name not in scope.seen:
                self.fail(f"{owner}: output {quote(name)} is produced by nothing")
        self._calls[key] = {
            called
            for node in function.node
            if (called := (node.domain, node.op_type, node.overload)) in self.functions
        }

    def _graph(
        self, graph: GraphProto, domains: dict[str, int], outer: Scope | None, *, in_function: bool
    ) -> None:
        owner = f"graph {quote(graph.name)}"
        self._texts((graph.name, graph.doc_string), owner)
        self._metadata(graph.metadata_props, owner)
        scope = Scope({}, set(), domains, in_function, outer)
        self._densify(graph)
        if self.model.ir_version < 4:
            self._drop_initialized_inputs(graph, main=outer is None)
        for info in graph.input:
            self._define(info.name, self._type(info, "input"), scope, "input")
        self._initializers(graph, scope)
        self._value_infos(graph.value_info, owner)
        for annotation in graph.quantization_annotation:
            self._texts((annotation.tensor_name,), owner)
            self._metadata(annotation.quant_parameter_tensor_names, owner)
        self._nodes(graph.node, scope)
        listed: set[str] = set()
        for info in graph.output:
            self._type(info, "output")
            if info.name not in scope.seen:
                hint = ""
                if outer is not None and outer.find(info.name):
                    hint = " in the subgraph: put an Identity before it"
                self.fail(f"output {quote(info.name)} is produced by nothing{hint}")
            if info.name in listed and outer is None:
                self.fail(f"output {quote(info.name)} is listed twice")
            listed.add(info.name)

    def _define(self, name: str, element: int | None, scope: Scope, what: str) -> None:
        """Take a name: in a scope and those around it, each stands for one value (SSA)."""
        self._texts((name,), what)
        if not name:
            self.fail(f"{what} has no name")
        if scope.find(name) is not None:
            self.fail(f"{what} {quote(name)} has a name that exists already")
        scope.seen[name] = element

    def _densify(self, graph: GraphProto) -> None:
        for sparse in graph.sparse_initializer:
            name = sparse.values.name
            try:
                graph.initializer.add().CopyFrom(self.tensors.densify(sparse))
            except Flaw as flaw:
                self.fail(f"initializer {quote(name)}: {flaw}")
        graph.ClearField("sparse_initializer")

    def _drop_initialized_inputs(self, graph: GraphProto, *, main: bool) -> None:
        """Make initializers constants: before IR version 4 they had to be listed as inputs."""
        initialized = {tensor.name for tensor in graph.initializer}
        inputs = list(graph.input)
        kept = [info for info in inputs if info.name not in initialized]
        if len(kept) < len(inputs):
            if main:
                self.signature = [info.SerializeToString() for info in inputs]
            copies = [ValueInfoProto.FromString(info.SerializeToString()) for info in kept]
            del graph.input[:]
            graph.input.extend(copies)

    def _initializers(self, graph: GraphProto, scope: Scope) -> None:
        """Check initializers; those of the main graph are read later and not here."""
        inputs = {info.name: info for info in graph.input}
        listed: set[str] = set()
        for tensor in graph.initializer:
            if tensor.name not in inputs:
                self._define(tensor.name, tensor.data_type, scope, "initializer")
            elif tensor.name in listed:
                self.fail(f"initializer {quote(tensor.name)} is there twice")
            else:
                declared = inputs[tensor.name].type.tensor_type.elem_type
                if declared not in (0, tensor.data_type):
                    self.fail(
                        f"input {quote(tensor.name)} is declared {type_name(declared)}, "
                        f"its initializer is {type_name(tensor.data_type)}"
                    )
            listed.add(tensor.name)
            self._texts((tensor.doc_string,), f"initializer {quote(tensor.name)}")
            self._metadata(tensor.metadata_props, f"initializer {quote(tensor.name)}")
            if scope.outer is not None:
                try:
                    self.tensors.embed(tensor)
                except Flaw as flaw:
                    self.fail(f"initializer {quote(tensor.name)}: {flaw}")

    def _value_infos(self, infos: Iterable[ValueInfoProto], owner: str) -> None:
        for info in infos:
            self._texts((info.name,), owner)
            self._type(info, "value")

    def _type(self, info: ValueInfoProto, what: str) -> int | None:
        """The element type of a tensor; checks any type, and makes dimensions of -1 unknown."""
        self._texts((info.doc_string,), f"{what} {quote(info.name)}")
        self._metadata(info.metadata_props, f"{what} {quote(info.name)}")
        kind = info.type
        problem = _type_problem(kind)
        if problem:
            self.fail(f"{what} {quote(info.name)} {problem}")
        if has_map(kind):
            self.types[info.name] = kind.SerializeToString(deterministic=True)
            info.ClearField("type")
        return kind.tensor_type.elem_type or None if kind.HasField("tensor_type") else None

    def _nodes(self, nodes: Sequence[NodeProto], scope: Scope) -> None:
        for node in nodes:
            for name in node.output:
                if name in scope.all:
                    self.fail(f"{self._label(node)}: output {quote(name)} exists already")
                if name:
                    scope.all.add(name)
        for node in nodes:
            try:
                self._node(node, scope)
            except Flaw as flaw:
                self.fail(f"{self._label(node)}: {flaw}")

    def _label(self, node: NodeProto) -> str:
        name = node.name or next((name for name in node.output if name), "")
        return f"node {quote(name)} ({quote(node.op_type)[1:-1]})"

    def _node(self, node: NodeProto, scope: Scope) -> None:
        texts = (node.name, node.op_type, node.domain, node.overload, node.doc_string)
        self._texts((*texts, *node.input, *node.output), self._label(node))
        self._metadata(node.metadata_props, self._label(node))
        types: list[int | None] = []
        for name in node.input:
            found = scope.find(name) if name else None
            if found is None and name:
                if not scope.will_have(name):
                    raise Flaw(f"input {quote(name)} is produced by nothing")
                self.unsorted = True
            types.append(found.seen[name] if found is not None else None)
        names: set[str] = set()
        for attribute in node.attribute:
            self._texts((attribute.name, attribute.doc_string, attribute.ref_attr_name), "it")
            if attribute.name in names:
                raise Flaw(f"attribute {quote(attribute.name)} is there twice")
            names.add(attribute.name)
            self._attribute(attribute, scope, "it")
        self._check_operator(node, scope, types)
        for name in node.output:
            if name:
                self._define(name, None, scope, "output")

    def _check_operator(self, node: NodeProto, scope: Scope, types: Sequence[int | None]) -> None:
        domain = "" if node.domain == "ai.onnx" else node.domain
        version = scope.domains.get(domain)
        if version is None:
            raise Flaw(f"no opset of {quote(domain or 'ai.onnx')} is imported")
        function = self.functions.get((node.domain, node.op_type, node.overload))
        if function is not None:
            if len(node.input) > len(function.input) or len(node.output) > len(function.output):
                raise Flaw("it has more inputs or outputs than the function it calls")
            return
        operator = _operators.operator(domain, node.op_type, version)
        if operator is None:
            return
        operator.check(node, types)
        if domain == "":
            _check_special(node)

    def _attribute(self, attribute: AttributeProto, scope: Scope, owner: str) -> None:
        kind = attribute.type
        if kind == AttributeProto.UNDEFINED:
            raise Flaw(f"attribute {quote(attribute.name)} has no type")
        if attribute.ref_attr_name:
            if not scope.in_function:
                raise Flaw(f"attribute {quote(attribute.name)} refers to no function's")
            return
        if kind == AttributeProto.SPARSE_TENSOR and attribute.name == "sparse_value":
            self.tensors.densify_attribute(attribute)
        elif kind in (AttributeProto.SPARSE_TENSOR, AttributeProto.SPARSE_TENSORS):
            raise Flaw(f"attribute {quote(attribute.name)}: sparse tensors are not supported")
        elif kind == AttributeProto.STRINGS:
            for text in attribute.strings:
                check_utf8(text, attribute.name)
        elif kind == AttributeProto.TENSOR or kind == AttributeProto.TENSORS:
            for tensor in (attribute.t,) if kind == AttributeProto.TENSOR else attribute.tensors:
                self._texts((tensor.name, tensor.doc_string), owner)
                self.tensors.embed(tensor)
        elif kind == AttributeProto.GRAPH or kind == AttributeProto.GRAPHS:
            for graph in (attribute.g,) if kind == AttributeProto.GRAPH else attribute.graphs:
                self._graph(graph, scope.domains, scope, in_function=scope.in_function)
        elif kind == AttributeProto.TYPE_PROTO or kind == AttributeProto.TYPE_PROTOS:
            one = kind == AttributeProto.TYPE_PROTO
            for proto in (attribute.tp,) if one else attribute.type_protos:
                problem = _type_problem(proto) or ("has a map type" if has_map(proto) else "")
                if problem:
                    raise Flaw(f"attribute {quote(attribute.name)} {problem}")


def quote(text: str | bytes) -> str:
    """A name in quotes, of one line and bounded length."""
    shown = repr(text.decode("utf-8", "backslashreplace") if isinstance(text, bytes) else text)
    return shown if len(shown) <= 120 else f"{shown[:100]}…{shown[-1]}"


def check_utf8(text: bytes, owner: str) -> None:
    """Raise Flaw for an attribute's text that is not UTF-8."""
    try:
        text.decode()
    except UnicodeDecodeError:
        raise Flaw(f"attribute {quote(owner)} has text that is not UTF-8") from None


def leaf_type(proto: TypeProto) -> TypeProto:
    """What a type holds, below sequences and optionals."""
    while True:
        kind = proto.WhichOneof("value")
        if kind == "sequence_type":
            proto = proto.sequence_type.elem_type
        elif kind == "optional_type":
            proto = proto.optional_type.elem_type
        else:
            return proto


def has_map(proto: TypeProto) -> bool:
    """Whether a type is beyond onnx-ir: a map, a sequence of maps, or opaque."""
    return leaf_type(proto).WhichOneof("value") in ("map_type", "opaque_type")


def _type_problem(proto: TypeProto) -> str:
    """What is wrong with a type, "" for nothing. Dimensions of -1, used for unknown, become so."""
    leaf = leaf_type(proto)
    kind = leaf.WhichOneof("value")
    if kind is None:
        return "" if leaf is proto else "has an incomplete type"
    if kind not in ("tensor_type", "sparse_tensor_type"):
        return ""
    tensor = leaf.tensor_type if kind == "tensor_type" else leaf.sparse_tensor_type
    if tensor.elem_type not in onnx.TensorProto.DataType.values():
        return f"has the unknown element type {tensor.elem_type}"
    size = 1
    for dim in tensor.shape.dim:
        if isinstance(dim.dim_param, bytes):
            return "has text that is not UTF-8"
        if dim.dim_value == -1:
            dim.ClearField("value")
        elif dim.dim_value < 0:
            return f"has the negative dimension {dim.dim_value}"
        size *= dim.dim_value or 1
    return "" if size <= _MAX_DIM else "has a shape too large for any memory"


def _check_special(node: NodeProto) -> None:
    """What schemas do not say of a Constant and of nodes with subgraphs."""
    graphs = {a.name: a.g for a in node.attribute if a.type == AttributeProto.GRAPH}
    if node.op_type == "Constant" and len(node.attribute) != 1:
        raise Flaw("a constant needs one value")
    if node.op_type == "If":
        for name, graph in graphs.items():
            if len(graph.input) or len(graph.output) != len(node.output):
                raise Flaw(f"{name} has other inputs or outputs than the node")
    if node.op_type == "Loop" and "body" in graphs:
        body = graphs["body"]
        if len(body.input) != max(2, len(node.input)) or len(body.output) != len(node.output) + 1:
            raise Flaw("body has other inputs or outputs than the node")
