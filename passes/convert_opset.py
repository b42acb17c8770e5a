"""Convert a model to another version of the operator set.

Why: a runtime asks for the versions it knows; a newer one has operators that others are fused to.
Numerics: exact.
Needs: a conversion of each operator that changed in between; where one is missing the model stays
as it is, and the operator and the reason are told. Other domains keep their versions.

Each operator that changed is converted by itself, by onnx's converter, as a model of one node that
has its small constants and the types of its other inputs. So weights are not touched, and names,
metadata, functions and subgraphs, which that converter drops or does not enter, are kept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx
import onnx.version_converter

from graphopt import files, ir
from graphopt.context import Context
from graphopt.dims import DimLike
from graphopt.driver import is_used, remove, replace_value
from graphopt.errors import InputError
from graphopt.pass_manager import Pass
from graphopt.passes._opset_steps import differs, misfit, superfluous

_SMALL = 1024
"""Elements of the constants that a conversion may look at: axes, bounds, pads, scales."""
_OLDEST = 7

_UNRUN = 22
"""A version that only added types to these operators; ONNX Runtime has none of them in it."""
_UNRUN_TYPES = frozenset(
    (
        *("RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Bernoulli"),
        *("Multinomial", "RoiAlign", "MaxRoiPool", "GlobalLpPool"),
    )
)


@dataclass(frozen=True)
class ConvertOpset(Pass):
    """Converts main graph and functions one version at a time; all of it or nothing."""

    version: int = 0
    """The version of the default domain to convert to; 0 leaves the model as it is."""
    at_least: bool = False
    """Leave alone what follows that version or a newer one, and stay below what cannot be run."""

    def run(self, context: Context) -> None:
        newest = onnx.defs.onnx_opset_version()
        version = self.version
        if not version:
            return
        if not _OLDEST <= version <= newest:
            raise InputError(f"no opset {version}: there are {_OLDEST} to {newest}")
        if self.at_least and any(_is_unrun(node) for node in ir.all_nodes(context.model)):
            version = min(version, _UNRUN - 1)
        before = {ir.opset(root) for root in _roots(context.model)} - {0, version}
        if self.at_least:
            before = {older for older in before if older < version}
        if not before or context.exhausted or _tells_unknown(context, newest):
            return
        work = Context(files.copy(context.model), deadline=context.deadline)
        work.record = context.record
        roots = [root for root in _roots(work.model) if ir.opset(root) in before]
        converted = [_Conversion(work, root).to(version) for root in roots]
        if not all(converted):
            return
        imports = [onnx.helper.make_opsetid("", version)]
        needed = onnx.helper.find_min_ir_version_for(imports, ignore_unknown=True)
        work.model.ir_version = max(work.model.ir_version, needed)
        context.model = work.model
        context.refresh()
        names = [f"opset {older}" for older in sorted(before)]
        context.changed("converted_opset", names, [f"opset {version}"])


def _is_unrun(node: ir.Node) -> bool:
    return node.op_type in _UNRUN_TYPES and not node.domain


def _tells_unknown(context: Context, newest: int) -> bool:
    """Refuse a model with an operator that only its runtime knows, in versions that it knows."""
    for node in ir.all_nodes(context.model):
        if not node.domain and not onnx.defs.has(node.op_type, newest, ""):
            context.record.refuse(node, f"{node.op_type} is no operator of ONNX's")
            return True
    return False


_NORMALIZING = ("Softmax", "LogSoftmax", "Hardmax")

_TYPED = ("Clip", "Pad")
"""Operators with float attributes that became inputs of the first input's type."""


def _flatten(context: Context, node: ir.Node) -> str:
    """Softmax over one axis is that over all from that axis on, as it was, if it is the last."""
    shape, axis = context.shapes.shape(node.outputs[0]), ir.attribute(node, "axis", -1)
    if not shape or axis not in (-1, len(shape) - 1):
        return "its axis is not the last one"
    node.attributes["axis"] = ir.Attr("axis", ir.AttributeType.INT, len(shape) - 1)
    return ""


def _pin(node: ir.Node, graph: ir.Graph) -> bool:
    """Say in a Resize of opset 11 what one of 10 means; False where that cannot be known.

    Version 11 has other defaults, which onnx's converter leaves in place. To the nearest, ONNX
    Runtime rounds down where a Resize of version 10 enlarges and up where it shrinks.
    """
    scales = ir.constant(node.inputs[1])
    rounding = "floor"
    if ir.attribute(node, "mode", "nearest") == "nearest":
        values = np.ones(0) if scales is None else scales.numpy()
        if not values.size or (np.any(values < 1) and np.any(values > 1)):
            return False
        rounding = "ceil" if np.any(values < 1) else "floor"
    for resize in graph:
        if resize.op_type == "Resize":
            words = {"coordinate_transformation_mode": "asymmetric", "nearest_mode": rounding}
            for name, word in words.items():
                resize.attributes[name] = ir.Attr(name, ir.AttributeType.STRING, word)
    return True


def _roots(model: ir.Model) -> list[ir.Graph]:
    return [model.graph, *(function.graph for function in model.functions.values())]


@dataclass
class _Conversion:
    """One root on its way to another version."""

    context: Context
    root: ir.Graph
    _known: dict[bytes, onnx.ModelProto | str] = field(
        default_factory=dict[bytes, onnx.ModelProto | str]
    )

    def to(self, version: int) -> bool:
        """Convert the nodes that change, step by step; False, with reasons told, if one cannot."""
        current = ir.opset(self.root)
        while current not in (0, version):
            following = current + (1 if current < version else -1)
            self.root.opset_imports[""] = following
            if not self._step(current, following):
                return False
            current = following
        return True

    def _step(self, before: int, after: int) -> bool:
        nodes: list[ir.Node] = []
        stack = [self.root]
        while stack:
            graph = stack.pop()
            nodes += graph
            stack += [sub for node in graph for sub in ir.subgraphs(node)]
        possible = True
        for node in nodes:
            if node.domain or not differs(node.op_type, max(before, after)):
                continue
            self.context.check_time()
            reason = self._convert(node, before, after)
            if reason:
                text = f"{node.op_type} cannot go from opset {before} to {after}: {reason}"
                self.context.record.refuse(node, text)
                possible = False
        return possible

    def _convert(self, node: ir.Node, before: int, after: int) -> str:
        """Make a node one of the next version; returns why that is impossible, or nothing."""
        dropped = superfluous(
            node, max(before, after), up=before < after, shapes=self.context.shapes
        )
        if dropped is not None:
            for name in dropped:
                del node.attributes[name]
            return ""
        if node.op_type in _NORMALIZING and after < 13 <= before:
            return _flatten(self.context, node)
        if any(True for _ in ir.subgraphs(node)):
            return "its body would have to change"
        if any(attr.is_ref() for attr in node.attributes.values()):
            return "an attribute is set by the function's caller"
        if node.op_type == "Dropout" and {before, after} == {9, 10} and len(node.outputs) > 1:
            if is_used(node.outputs[1]):
                return "its mask would be of another type"
            node.resize_outputs(1)
            return ""
        single = self._alone(node, before)
        if isinstance(single, str):
            return single
        key = single.SerializeToString(deterministic=True) + bytes([after])
        if key not in self._known:
            self._known[key] = _convert(single, after)
        known = self._known[key]
        if isinstance(known, str):
            return known
        graph = ir.from_proto(known).graph
        if node.op_type == "Resize" and (before, after) == (10, 11) and not _pin(node, graph):
            return "how it rounds depends on its scales, which are not constant"
        _replace(self.context, node, graph)
        return ""

    def _alone(self, node: ir.Node, before: int) -> onnx.ModelProto | str:
        """A model of one node: input and output k of the node are `ik` and `ok`."""
        shapes = self.context.shapes
        graph_inputs: list[onnx.ValueInfoProto] = []
        constants: list[onnx.TensorProto] = []
        names: list[str] = []
        for index, value in enumerate(node.inputs):
            names.append("" if value is None else f"i{index}")
            if value is None:
                continue
            tensor = ir.constant(value)
            if tensor is not None and tensor.size <= _SMALL:
                proto = ir.serde.to_proto(tensor)
                proto.name = names[-1]
                constants.append(proto)
            elif shapes.dtype(value) is None:
                return f"the type of its input {value.name!r} is unknown"
            else:
                graph_inputs.append(_info(names[-1], shapes.dtype(value), shapes.shape(value)))
        outputs = [f"o{i}" if v.name else "" for i, v in enumerate(node.outputs)]
        protos = [
            _info(f"o{i}", shapes.dtype(v), shapes.shape(v))
            for i, v in enumerate(node.outputs)
            if v.name
        ]
        single = ir.serde.to_proto(ir.Node("", node.op_type, [], list(node.attributes.values())))
        single.name = ""
        single.input[:], single.output[:] = names, outputs
        graph = onnx.helper.make_graph([single], "node", graph_inputs, protos, constants)
        imports = [onnx.helper.make_opsetid("", before)]
        return onnx.helper.make_model(graph, opset_imports=imports, ir_version=10)


def _info(
    name: str, dtype: ir.DataType | None, shape: Sequence[DimLike] | None
) -> onnx.ValueInfoProto:
    dims = None if shape is None else [d if isinstance(d, int) else f"d{d}" for d in shape]
    return onnx.helper.make_tensor_value_info(name, int(dtype or 0), dims)


def _convert(model: onnx.ModelProto, version: int) -> onnx.ModelProto | str:
    """A model in another version, by onnx's converter, or why it has none."""
    try:
        converted = onnx.version_converter.convert_version(model, version)
    except (RuntimeError, ValueError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        return lines[-1].rpartition(" failed: ")[2] if lines else type(error).__name__
    return misfit(ir.from_proto(converted).graph, version) or converted


def _replace(context: Context, node: ir.Node, converted: ir.Graph) -> None:
    """Put a converted graph in the place of a node; the node stays where only attributes change."""
    assert node.graph is not None
    values: dict[str, ir.Value | None] = {f"i{i}": v for i, v in enumerate(node.inputs)}
    nodes = list(converted)
    if len(nodes) == 1 and _same_places(node, nodes[0]):
        node.attributes.clear()
        node.attributes.update(nodes[0].attributes)
        return
    made = _copies(context, node, nodes, values, converted)
    results = {output.name: values.get(output.name or "") for output in converted.outputs}
    node.graph.insert_before(node, made)
    for index, old in enumerate(node.outputs):
        new = results.get(f"o{index}")
        if new is not None and is_used(old):
            replace_value(context, old, new, fresh=new.producer() in made)
    made[-1].metadata_props.update(node.metadata_props)
    made[-1].doc_string = node.doc_string
    name = node.name
    remove(context, node)
    if name:
        made[-1].name = context.unique_node(name)


def _same_places(old: ir.Node, new: ir.Node) -> bool:
    """Whether a converted node is the same operator on the same operands."""
    names = [None if value is None else value.name for value in new.inputs]
    wanted = [None if v is None else f"i{i}" for i, v in enumerate(old.inputs)]
    outputs = [value.name for value in new.outputs]
    return (
        old.op_type == new.op_type
        and names == wanted
        and outputs == [f"o{i}" if v.name else "" for i, v in enumerate(old.outputs)]
    )


def _copies(
    context: Context,
    node: ir.Node,
    nodes: Sequence[ir.Node],
    values: dict[str, ir.Value | None],
    converted: ir.Graph,
) -> list[ir.Node]:
    """The nodes of a converted graph on the values of the model; `values` learns their outputs."""
    assert node.graph is not None
    made: list[ir.Node] = []
    hint = node.outputs[0].name or node.op_type
    first = node.inputs[0] if node.op_type in _TYPED else None
    dtype = None if first is None else context.shapes.dtype(first)
    for name, value in converted.initializers.items():
        tensor = value.const_value
        if name not in values and tensor is not None:
            made.append(_constant(tensor, dtype))
            values[name] = made[-1].outputs[0]
    for part in nodes:
        tensor = ir.constant(part.outputs[0])
        if tensor is not None:
            made.append(_constant(tensor, dtype))
            values[part.outputs[0].name or ""] = made[-1].outputs[0]
            continue
        inputs = [None if v is None else values[v.name or ""] for v in part.inputs]
        attributes: Mapping[str, ir.Attr] = part.attributes
        copy = ir.Node(
            "", part.op_type, inputs, list(attributes.values()), num_outputs=len(part.outputs)
        )
        for old, new in zip(part.outputs, copy.outputs, strict=True):
            new.type = old.type
            values[old.name or ""] = new
        made.append(copy)
    for copy in made:
        copy.meta[ir.SOURCES] = ir.sources(node)
        copy.name = context.unique_node(f"{node.name or node.op_type}_{copy.op_type}")
        for output in copy.outputs:
            output.name = context.unique(f"{hint}_{copy.op_type}")
        context.shapes.update(copy, context.root(node.graph))
    return made


def _constant(tensor: ir.TensorProtocol, dtype: ir.DataType | None) -> ir.Node:
    """A Constant; one that the converter made of a float attribute, in the type that is wanted."""
    plain = ir.Tensor(tensor.numpy(), dtype=tensor.dtype)
    if dtype is not None and tensor.dtype == ir.DataType.FLOAT:
        plain = ir.Tensor(tensor.numpy().astype(dtype.numpy()), dtype=dtype)
    return ir.Node("", "Constant", [], [ir.Attr("value", ir.AttributeType.TENSOR, plain)])
