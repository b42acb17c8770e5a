"""The bridge to onnx-graphsurgeon: for existing scripts, and functions on its graphs as passes.

Its graphs lack much of what a model holds: documentation, metadata, quantization annotations,
types other than tensors, inputs with defaults, some kinds of attributes, and float8 …fnuz. What
they lack is taken from the model that the graph was made from, by the names that are still there.
"""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import onnx
from onnx import AttributeProto, GraphProto, NodeProto

from graphopt import files, ir
from graphopt._foreign import ForeignPass
from graphopt.errors import InputError
from graphopt.files import writing
from graphopt.pass_manager import Pass

_HELD = {
    *(AttributeProto.FLOAT, AttributeProto.INT, AttributeProto.STRING, AttributeProto.TENSOR),
    *(AttributeProto.GRAPH, AttributeProto.FLOATS, AttributeProto.INTS, AttributeProto.STRINGS),
}
NodeKey = tuple[str, str, str]


def to_graphsurgeon(model: ir.Model) -> Any:
    """An `onnx_graphsurgeon.Graph` of a model, with a copy of its weights."""
    gs = _library("onnx_graphsurgeon")
    proto = files.to_proto(model)
    for graph in _graphs(proto):
        for info in (*graph.input, *graph.output, *graph.value_info):
            if info.type.WhichOneof("value") not in (None, "tensor_type"):
                info.ClearField("type")
        for node in graph.node:
            _drop_attributes(node)
    for function in proto.functions:
        for node in function.node:
            _drop_attributes(node)
    with _library("onnx_graphsurgeon.logger").G_LOGGER.suppress():
        converted: Any = gs.import_onnx(proto)
    for name, constant in _constants(converted):
        value = model.graph.initializers.get(name)
        if value is not None:
            constant._values.graphopt_tensor = value.const_value
    return converted


def from_graphsurgeon(graph: Any, like: ir.Model | None = None) -> ir.Model:
    """The model of an `onnx_graphsurgeon.Graph`.

    `like` is the model that the graph was made from: what the graph lacks is taken from it.

    Raises:
        InputError: the graph is no valid model.
    """
    gs = _library("onnx_graphsurgeon")
    untouched: dict[str, ir.TensorProtocol] = {}
    for name, constant in _constants(graph):
        tensor = getattr(constant._values, "graphopt_tensor", None)
        if tensor is not None:
            untouched[name] = tensor
    for inner in (graph, *graph.subgraphs(recursive=True), *graph.functions):
        for _, constant in _constants(inner):
            _spell_out(constant)
    try:
        with _library("onnx_graphsurgeon.logger").G_LOGGER.suppress():
            proto: onnx.ModelProto = gs.export_onnx(graph, do_type_check=False)
    except (gs.OnnxGraphSurgeonException, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"the graph cannot be written: {' '.join(str(error).split())}") from None
    _gather_initializers(proto.graph, like)
    if like is not None:
        _restore_unused(proto.graph, like)
        _restore(proto, writing.skeleton(like)[0])
    model = files.load(proto)
    for name, tensor in untouched.items():
        value = model.graph.initializers.get(name)
        if value is not None:
            value.const_value = tensor
    return model


def _library(name: str) -> Any:
    """A module of graphsurgeon, which has no types, imported when it is needed."""
    return importlib.import_module(name)


def _constants(graph: Any) -> Iterator[tuple[str, Any]]:
    """Names and constants of one graph."""
    for name, tensor in graph.tensors().items():
        if hasattr(tensor, "_values"):
            yield name, tensor


def _spell_out(constant: Any) -> None:
    """Give values of types that numpy lacks as a TensorProto: the exporter mistakes some."""
    values: object = constant._values
    array = cast(ir.Array, values) if isinstance(values, np.ndarray) else None
    if array is not None and array.dtype.kind == "V":
        proto = ir.to_proto(ir.tensor(array, name=constant.name))
        constant.values = _library("onnx_graphsurgeon.ir.tensor").LazyValues(proto)


def _graphs(proto: onnx.ModelProto) -> Iterator[GraphProto]:
    """The main graph and all subgraphs, those of functions too."""
    yield from _nested(proto.graph)
    for function in proto.functions:
        for node in function.node:
            yield from _subgraphs(node)


def _nested(graph: GraphProto) -> Iterator[GraphProto]:
    yield graph
    for node in graph.node:
        yield from _subgraphs(node)


def _subgraphs(node: NodeProto) -> Iterator[GraphProto]:
    for attribute in node.attribute:
        if attribute.type == AttributeProto.GRAPH:
            yield from _nested(attribute.g)


def _is_held(attribute: AttributeProto) -> bool:
    """Whether graphsurgeon can read an attribute and write it again; it loses empty lists."""
    kind = attribute.type
    if attribute.ref_attr_name:
        return True
    if kind == AttributeProto.STRING:
        return _is_text(attribute.s)
    if kind == AttributeProto.STRINGS:
        return len(attribute.strings) > 0
    if kind in (AttributeProto.INTS, AttributeProto.FLOATS):
        return len(attribute.ints) + len(attribute.floats) > 0
    return kind in _HELD


def _is_text(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


def _drop_attributes(node: NodeProto) -> None:
    held = [a.SerializeToString() for a in node.attribute if _is_held(a)]
    if len(held) < len(node.attribute):
        del node.attribute[:]
        for data in held:
            node.attribute.add().ParseFromString(data)


def _gather_initializers(graph: GraphProto, like: ir.Model | None) -> None:
    """Take from subgraphs the initializers of graphs around them, which the exporter puts there."""
    home = set(like.graph.initializers) if like is not None else set[str]()

    def visit(inner: GraphProto, outer: set[str]) -> None:
        kept: list[bytes] = []
        for tensor in inner.initializer:
            if tensor.name in home and tensor.name not in outer and inner is not graph:
                graph.initializer.add().CopyFrom(tensor)
                outer.add(tensor.name)
            if tensor.name not in outer:
                kept.append(tensor.SerializeToString())
        if len(kept) < len(inner.initializer):
            del inner.initializer[:]
            for data in kept:
                inner.initializer.add().ParseFromString(data)
        # Subgraphs add to the names of the main graph: all of them share that one set.
        own = {t.name for t in inner.initializer} | {info.name for info in inner.input}
        own = own.union(*(node.output for node in inner.node))
        if inner is graph:
            outer |= own
        names = outer if inner is graph else outer | own
        for node in inner.node:
            for attribute in node.attribute:
                if attribute.type == AttributeProto.GRAPH:
                    visit(attribute.g, names)

    visit(graph, set())


def _restore(new: onnx.ModelProto, old: onnx.ModelProto) -> None:
    """Put back into a model what graphsurgeon lost of the old one."""
    for name in ("domain", "model_version", "doc_string"):
        if old.HasField(name):
            setattr(new, name, getattr(old, name))
    if not new.metadata_props:
        new.metadata_props.extend(old.metadata_props)
    _restore_graph(new.graph, old.graph)
    functions = {(f.domain, f.name): f for f in old.functions}
    for function in new.functions:
        lost = functions.get((function.domain, function.name))
        if lost is not None:
            function.overload = lost.overload
            function.value_info.extend(lost.value_info)
            function.metadata_props.extend(lost.metadata_props)
            _restore_nodes(function, lost)


def _restore_graph(new: GraphProto, old: GraphProto) -> None:
    new.metadata_props.extend(old.metadata_props)
    _restore_nodes(new, old)
    _restore_defaults(new, old)
    infos = {info.name: info for info in (*old.input, *old.output, *old.value_info)}
    listed = {info.name for info in (*new.input, *new.output, *new.value_info)}
    produced = {name for node in new.node for name in node.output}
    for name in [name for name in infos if name in produced - listed]:
        new.value_info.add(name=name)
    for info in (*new.input, *new.output, *new.value_info):
        lost = infos.get(info.name)
        if lost is not None:
            if not info.type.WhichOneof("value"):
                info.type.CopyFrom(lost.type)
            info.doc_string = lost.doc_string
            info.metadata_props.extend(lost.metadata_props)
    names = produced | listed | {tensor.name for tensor in new.initializer}
    new.quantization_annotation.extend(
        annotation for annotation in old.quantization_annotation if annotation.tensor_name in names
    )


def _restore_defaults(new: GraphProto, old: GraphProto) -> None:
    """List initializers as inputs again, whose defaults they are, in their old places."""
    inputs = {info.name: info.SerializeToString() for info in new.input}
    initialized = {tensor.name for tensor in new.initializer}
    before = {info.name: info.SerializeToString() for info in old.input}
    defaults = [name for name in before if name in initialized and name not in inputs]
    if defaults:
        order = [name for name in before if name in inputs or name in initialized]
        del new.input[:]
        for name in [*order, *(name for name in inputs if name not in before)]:
            new.input.add().ParseFromString(inputs.get(name) or before[name])


def _restore_nodes(
    new: GraphProto | onnx.FunctionProto, old: GraphProto | onnx.FunctionProto
) -> None:
    by_output = {_key(node): node for node in old.node}
    by_name = {(node.op_type, node.domain, node.name): node for node in old.node if node.name}
    for node in new.node:
        lost = by_output.get(_key(node)) or by_name.get((node.op_type, node.domain, node.name))
        if lost is None:
            continue
        node.doc_string, node.overload = lost.doc_string, lost.overload
        node.metadata_props.extend(lost.metadata_props)
        node.device_configurations.extend(lost.device_configurations)
        there = {attribute.name: attribute for attribute in node.attribute}
        for attribute in lost.attribute:
            found = there.get(attribute.name)
            if found is None and not _is_held(attribute):
                node.attribute.add().CopyFrom(attribute)
            elif found is not None and found.type == attribute.type == AttributeProto.GRAPH:
                _restore_graph(found.g, attribute.g)
            if found is not None:
                found.doc_string = attribute.doc_string


def _restore_unused(graph: GraphProto, like: ir.Model) -> None:
    """Keep initializers that no node uses: annotations may name them, or the signature."""
    lists = [(info.name for info in graph.input), (tensor.name for tensor in graph.initializer)]
    taken = set(itertools.chain(*lists, *(node.output for node in graph.node)))
    for name, value in like.graph.initializers.items():
        used = bool(value.uses()) or value.is_graph_output()
        if not used and name not in taken and value.const_value is not None:
            graph.initializer.add().CopyFrom(ir.serde.serialize_tensor(value.const_value))
            graph.initializer[-1].name = name


def _key(node: NodeProto) -> NodeKey:
    return node.op_type, node.domain, next((name for name in node.output if name), "")


def graphsurgeon_pass(function: Callable[[Any], Any], name: str = "") -> Pass:
    """A pass from a function on an `onnx_graphsurgeon.Graph`, which changes it or returns another.

    `name`, by default the function's, is how reports call the pass. Running it raises
    GraphoptError where the function fails, leaves no valid model, or changes the signature.
    """
    return _GraphSurgeonPass(name or function.__name__.replace("_", "-"), function)


@dataclass(frozen=True)
class _GraphSurgeonPass(ForeignPass):
    function: Callable[[Any], Any]

    def result(self, model: ir.Model) -> ir.Model:
        graph = to_graphsurgeon(model)
        changed = self.function(graph)
        return from_graphsurgeon(graph if changed is None else changed, model)
