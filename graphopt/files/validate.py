"""What a file must fulfil before it becomes a model: names, scopes, operators, types and sizes.

The protobuf skeleton is walked once, in graph order; what a pass could trip over is refused.
"""

from __future__ import annotations

import graphlib
from collections.abc import Generator, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NoReturn

import onnx
from onnx import AttributeProto, FunctionProto, GraphProto, NodeProto, ValueInfoProto

from graphopt.errors import Flaw, InputError
from graphopt.files import operators
from graphopt.files.checks import (
    check_metadata,
    check_texts,
    check_type,
    check_utf8,
    check_value_info,
    has_map,
    quote,
)
from graphopt.files.operators import type_name
from graphopt.files.tensors import TensorReader, check_element_type

FunctionId = tuple[str, str, str]


@dataclass
class Scope:
    """The names of a graph: those that exist so far, and all that it will have."""

    seen: dict[str, int | None]
    """With the element type, where it is known for certain."""
    all: set[str]
    domains: dict[str, int]
    function: FunctionId | None
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

    def define(self, name: str, element: int | None) -> None:
        """Take a name: here and in the scopes around, each stands for one value (SSA)."""
        if not name:
            raise Flaw("it has no name")
        if self.find(name) is not None:
            raise Flaw("another value has this name")
        self.seen[name] = element


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
    _functions: dict[FunctionId, FunctionProto] = field(
        default_factory=dict[FunctionId, FunctionProto]
    )
    _calls: dict[FunctionId, set[FunctionId]] = field(
        default_factory=dict[FunctionId, set[FunctionId]]
    )

    def run(self) -> None:
        """Raise InputError for the first thing that is wrong."""
        model, graph = self.model, self.model.graph
        with self._in(""):
            self._header()
            domains = _imports(model.opset_import)
        for function in model.functions:
            key = (function.domain, function.name, function.overload)
            if key in self._functions:
                self.fail(f"function {quote(function.name)} is defined twice")
            self._functions[key] = function
        for key, function in self._functions.items():
            self._function(key, function)
        try:
            graphlib.TopologicalSorter(self._calls).prepare()
        except graphlib.CycleError as error:
            self.fail(f"function {quote(error.args[1][0][1])} calls itself")
        if not graph.output:
            self.fail("the graph has no outputs")
        self._graph(graph, domains, None, None)

    def fail(self, why: str) -> NoReturn:
        """Raise InputError with the file's name."""
        raise InputError(f"{self.file}: {why}") from None

    @contextmanager
    def _in(self, what: str, name: str = "") -> Generator[None]:
        """Say in which part of the file a flaw is."""
        try:
            yield
        except Flaw as flaw:
            self.fail(f"{what} {quote(name)}: {flaw}" if what else str(flaw))

    def _header(self) -> None:
        model = self.model
        if not model.HasField("graph"):
            raise Flaw("not an ONNX model (it has no graph)")
        if not 1 <= model.ir_version <= onnx.IR_VERSION:
            raise Flaw(
                f"IR version {model.ir_version} is not known to onnx {onnx.__version__} "
                f"(1 to {onnx.IR_VERSION})"
            )
        if model.training_info:
            raise Flaw("it holds training_info, which would be lost: export it for inference")
        check_texts(model.producer_name, model.producer_version, model.domain, model.doc_string)
        check_metadata(model.metadata_props)
        for configuration in model.configuration:
            check_texts(configuration.name, *configuration.device)
        if model.ir_version < 3 and not model.opset_import:
            model.opset_import.add(domain="", version=1)

    def _function(self, key: FunctionId, function: FunctionProto) -> None:
        with self._in("function", function.name):
            names = (*function.input, *function.output, *function.attribute)
            check_texts(*key, function.doc_string, *names)
            check_metadata(function.metadata_props)
            domains = _imports(function.opset_import)
            scope = Scope({}, set(), domains, key, None)
            for name in function.input:
                scope.define(name, None)
            for info in function.value_info:
                self._value_info(info)
            for attribute in function.attribute_proto:
                self._attribute(attribute, scope)
            self._calls[key] = set()
            self._nodes(function.node, scope)
            for name in function.output:
                if name not in scope.seen:
                    raise Flaw(f"output {quote(name)} is produced by nothing")

    def _graph(
        self,
        graph: GraphProto,
        domains: dict[str, int],
        function: FunctionId | None,
        outer: Scope | None,
    ) -> None:
        scope = Scope({}, set(), domains, function, outer)
        with self._in("graph", graph.name):
            check_texts(graph.name, graph.doc_string)
            check_metadata(graph.metadata_props)
            for annotation in graph.quantization_annotation:
                check_texts(annotation.tensor_name)
                check_metadata(annotation.quant_parameter_tensor_names)
        self._densify(graph)
        if self.model.ir_version < 4:
            self._drop_initialized_inputs(graph, main=outer is None)
        for info in graph.input:
            with self._in("input", info.name):
                scope.define(info.name, self._value_info(info))
        self._initializers(graph, scope)
        for info in graph.value_info:
            try:
                self._value_info(info)
            except Flaw as flaw:
                self.fail(f"value {quote(info.name)}: {flaw}")
        self._nodes(graph.node, scope)
        listed: set[str] = set()
        for info in graph.output:
            with self._in("output", info.name):
                self._value_info(info)
                if info.name not in scope.seen:
                    passed = outer is not None and outer.find(info.name) is not None
                    hint = " in the subgraph: it needs an Identity" if passed else ""
                    raise Flaw(f"it is produced by nothing{hint}")
                if info.name in listed and outer is None:
                    raise Flaw("it is listed twice")
                listed.add(info.name)

    def _value_info(self, info: ValueInfoProto) -> int | None:
        element = check_value_info(info)
        if element is None and has_map(info.type):
            self.types[info.name] = info.type.SerializeToString(deterministic=True)
            info.ClearField("type")
        return element

    def _densify(self, graph: GraphProto) -> None:
        for sparse in graph.sparse_initializer:
            with self._in("initializer", sparse.values.name):
                graph.initializer.add().CopyFrom(self.tensors.densify(sparse))
        graph.ClearField("sparse_initializer")

    def _drop_initialized_inputs(self, graph: GraphProto, *, main: bool) -> None:
        """Make initializers constants: before IR version 4 they had to be listed as inputs."""
        initialized = {tensor.name for tensor in graph.initializer}
        listed = {info.name: info.SerializeToString() for info in graph.input}
        if initialized.isdisjoint(listed) or len(listed) < len(graph.input):
            return
        if main:
            self.signature = list(listed.values())
        del graph.input[:]
        for name, data in listed.items():
            if name not in initialized:
                graph.input.add().ParseFromString(data)

    def _initializers(self, graph: GraphProto, scope: Scope) -> None:
        """Check initializers; the data of those of the main graph are checked as they are read."""
        inputs = {info.name: info.type.tensor_type.elem_type for info in graph.input}
        for tensor in graph.initializer:
            with self._in("initializer", tensor.name):
                check_element_type(tensor.data_type)
                check_texts(tensor.name, tensor.doc_string)
                check_metadata(tensor.metadata_props)
                if tensor.name in inputs:
                    declared = inputs.pop(tensor.name)
                    if declared not in (0, tensor.data_type):
                        given = type_name(tensor.data_type)
                        raise Flaw(f"it is {given}, as an input {type_name(declared)}")
                else:
                    scope.define(tensor.name, tensor.data_type)
                if scope.outer is not None:
                    self.tensors.embed(tensor)

    def _nodes(self, nodes: Sequence[NodeProto], scope: Scope) -> None:
        for node in nodes:
            scope.all.update(node.output)
        scope.all.discard("")
        for node in nodes:
            try:
                self._node(node, scope)
            except Flaw as flaw:
                name = node.name or next((name for name in node.output if name), "")
                self.fail(f"node {quote(name)} ({quote(node.op_type)[1:-1]}): {flaw}")

    def _node(self, node: NodeProto, scope: Scope) -> None:
        inputs, outputs = node.input, node.output
        check_texts(node.name, node.op_type, node.domain, node.overload, *inputs, *outputs)
        check_texts(node.doc_string)
        if node.metadata_props:
            check_metadata(node.metadata_props)
        if node.device_configurations:
            _check_devices(node)
        types: list[int | None] = []
        for name in inputs:
            found = scope.find(name) if name else None
            if found is not None:
                types.append(found.seen[name])
                continue
            if name and not scope.will_have(name):
                raise Flaw(f"input {quote(name)} is produced by nothing")
            self.unsorted |= bool(name)
            types.append(None)
        if node.attribute:
            self._attributes(node, scope)
        self._check_operator(node, scope, types)
        for name in outputs:
            if name:
                if scope.find(name) is not None:
                    raise Flaw(f"another value has the name of output {quote(name)}")
                scope.seen[name] = None

    def _check_operator(self, node: NodeProto, scope: Scope, types: Sequence[int | None]) -> None:
        domain = "" if node.domain == "ai.onnx" else node.domain
        version = scope.domains.get(domain)
        if version is None:
            raise Flaw(f"no opset of {quote(domain or 'ai.onnx')} is imported")
        if self._functions:
            key = (node.domain, node.op_type, node.overload)
            function = self._functions.get(key)
            if function is not None:
                most = len(function.input), len(function.output)
                if len(node.input) > most[0] or len(node.output) > most[1]:
                    raise Flaw("it has more inputs or outputs than the function it calls")
                if scope.function is not None:
                    self._calls[scope.function].add(key)
                return
        operator = operators.operator(domain, node.op_type, version)
        if operator is not None:
            operator.check(node, types)

    def _attributes(self, node: NodeProto, scope: Scope) -> None:
        names: set[str] = set()
        for attribute in node.attribute:
            check_texts(attribute.name, attribute.doc_string, attribute.ref_attr_name)
            if attribute.name in names:
                raise Flaw(f"attribute {quote(attribute.name)} is there twice")
            names.add(attribute.name)
            try:
                self._attribute(attribute, scope)
            except Flaw as flaw:
                raise Flaw(f"attribute {quote(attribute.name)}: {flaw}") from None

    def _attribute(self, attribute: AttributeProto, scope: Scope) -> None:
        kind = attribute.type
        if kind == AttributeProto.UNDEFINED:
            raise Flaw("it has no type")
        if attribute.ref_attr_name:
            if scope.function is None:
                raise Flaw("it refers to the attribute of a function outside of any")
        elif kind == AttributeProto.STRINGS:
            for text in attribute.strings:
                check_utf8(text)
        elif kind == AttributeProto.TENSOR or kind == AttributeProto.TENSORS:
            for tensor in (attribute.t,) if kind == AttributeProto.TENSOR else attribute.tensors:
                check_texts(tensor.name, tensor.doc_string)
                self.tensors.embed(tensor)
        elif kind == AttributeProto.GRAPH or kind == AttributeProto.GRAPHS:
            for graph in (attribute.g,) if kind == AttributeProto.GRAPH else attribute.graphs:
                self._graph(graph, scope.domains, scope.function, scope)
        elif kind == AttributeProto.SPARSE_TENSOR or kind == AttributeProto.SPARSE_TENSORS:
            if attribute.name != "sparse_value":
                raise Flaw("sparse tensors are not supported")
            self.tensors.densify_attribute(attribute)
        elif kind == AttributeProto.TYPE_PROTO or kind == AttributeProto.TYPE_PROTOS:
            one = kind == AttributeProto.TYPE_PROTO
            for proto in (attribute.tp,) if one else attribute.type_protos:
                check_type(proto)
                if has_map(proto):
                    raise Flaw("map types are not supported")


def _imports(imports: Iterable[onnx.OperatorSetIdProto]) -> dict[str, int]:
    """Versions by domain, as a model or a function imports them."""
    domains: dict[str, int] = {}
    for entry in imports:
        check_texts(entry.domain)
        domain = "" if entry.domain == "ai.onnx" else entry.domain
        if (
            not 1 <= entry.version < 2**31
            or domains.setdefault(domain, entry.version) != entry.version
        ):
            raise Flaw(f"opset import of {quote(domain or 'ai.onnx')} is invalid")
    newest = operators.newest_opset()
    if domains.get("", 1) > newest:
        known = f"onnx {onnx.__version__} knows ({newest})"
        raise Flaw(f"opset {domains['']} of ai.onnx is newer than {known}")
    return domains


def _check_devices(node: NodeProto) -> None:
    """Raise Flaw for a device configuration that cannot be written again."""
    for configuration in node.device_configurations:
        check_texts(configuration.configuration_id)
        names = [spec.tensor_name for spec in configuration.sharding_spec]
        check_texts(*names)
        if not configuration.configuration_id or not all(names):
            raise Flaw("its device configuration is incomplete")
