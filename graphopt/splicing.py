"""Parts of graphs: what computes some values, without what stands before others; what joins two.

Every function changes the model that it is given, which is the caller's own copy.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import onnx

from graphopt import ir
from graphopt.cutting import operands
from graphopt.dims import Dim, DimLike
from graphopt.errors import GraphoptError, InputError
from graphopt.files import writing
from graphopt.shapes import Shapes

_NEAREST = 5
_SMALL = 1 << 12
_checker: Any = onnx.checker


def values_by_name(model: ir.Model) -> dict[str, ir.Value]:
    """The values of the main graph: inputs, constants, results of nodes."""
    graph = model.graph
    made = [value for node in graph for value in node.outputs]
    found = [*graph.inputs, *graph.initializers.values(), *made]
    return {value.name: value for value in found if value.name}


def find(values: Mapping[str, ir.Value], name: str) -> ir.Value:
    """A value by its name.

    Raises:
        InputError: there is none; the message has names that are close.
    """
    if name in values:
        return values[name]
    import difflib

    near = difflib.get_close_matches(name, values, _NEAREST, 0.5)
    near = near or [n for n in values if name.lower() in n.lower()][:_NEAREST]
    hint = f"; there are {', '.join(near)}" if near else "; `graphopt inspect --nodes` lists them"
    raise InputError(f"no tensor of the main graph is named {name!r}{hint}")


def declare(value: ir.Value, shapes: Shapes) -> None:
    """Write down type and shape of a value, as inputs and outputs need them.

    Raises:
        InputError: its type is not known.
    """
    dtype, shape = shapes.dtype(value), shapes.shape(value)
    if value.type is None and dtype is None:
        raise InputError(f"the type of {value.name!r} is not known, so it cannot be an output")
    if dtype is not None and not isinstance(value.type, ir.SequenceType | ir.OptionalType):
        value.type = ir.TensorType(dtype)
    if value.shape is None and shape is not None:
        value.shape = ir.Shape([_plain(dim) for dim in shape])


def _plain(dim: DimLike) -> int | str | None:
    """A dimension as a file has it: a number, a symbol's name, or nothing."""
    if not isinstance(dim, Dim):
        return dim
    atom = dim.atom()
    return atom.name if atom is not None and atom.op == "symbol" else None


def needed(outputs: Iterable[ir.Value]) -> set[ir.Node]:
    """The nodes of the outputs' graph that compute them."""
    found: set[ir.Node] = set()
    stack = list(outputs)
    while stack:
        node = stack.pop().producer()
        if node is not None and node not in found:
            found.add(node)
            stack += operands(node)
    return found


def prune(model: ir.Model) -> None:
    """Remove nodes and constants of the main graph that no output needs."""
    graph = model.graph
    keep = needed(graph.outputs)
    gone = [node for node in graph if node not in keep]
    for node in gone:
        _release(node)
    graph.remove(gone)
    used = {value for node in graph for value in operands(node)} | set(graph.outputs)
    for name, value in list(graph.initializers.items()):
        if value not in used and not value.is_graph_input():
            del graph.initializers[name]


def _release(node: ir.Node) -> None:
    """Let a node, and those in its bodies, use nothing any more."""
    for body in ir.subgraphs(node):
        for inner in body:
            _release(inner)
    for index in range(len(node.inputs)):
        node.replace_input_with(index, None)


def _drop_input(graph: ir.Graph, value: ir.Value) -> None:
    graph.inputs.remove(value)
    if value.name is not None and value.is_initializer() and not ir.use_count(value):
        del graph.initializers[value.name]


def restrict(model: ir.Model, inputs: Sequence[str] | None, outputs: Sequence[str] | None) -> None:
    """Leave of a model what computes `outputs` from `inputs`; None means those that it has.

    Inputs of the model that are not listed may be left out where nothing needs them.

    Raises:
        InputError: no such tensor, one listed twice or as both, or an input that is missing.
    """
    graph, values, shapes = model.graph, values_by_name(model), Shapes(model)
    for names, kind in ((inputs, "inputs"), (outputs, "outputs")):
        if names is not None and (not names or len(set(names)) < len(names)):
            raise InputError(f"{kind}: name at least one tensor, and each once")
    if outputs is not None:
        made = [find(values, name) for name in outputs]
        for value in made:
            if ir.constant(value) is not None or value.is_graph_input():
                raise InputError(f"{value.name!r} is computed by nothing, so it is no output")
            if not value.is_graph_output():
                declare(value, shapes)
        graph.outputs[:] = made
    if inputs is not None:
        fed = [_fed(graph, find(values, name), shapes) for name in inputs]
        prune(model)
        _check_fed(graph, fed)
        for value in [v for v in graph.inputs if v not in fed]:
            _drop_input(graph, value)
        graph.inputs[:] = fed
    prune(model)
    if inputs is None:
        used = {value for node in graph for value in operands(node)} | set(graph.outputs)
        for value in [value for value in graph.inputs if value not in used]:
            _drop_input(graph, value)


def _fed(graph: ir.Graph, value: ir.Value, shapes: Shapes) -> ir.Value:
    """An input of the graph in the place of a value."""
    if value.is_graph_input():
        return value
    if value.is_graph_output():
        raise InputError(f"{value.name!r} is listed as both input and output")
    if ir.constant(value) is not None:
        raise InputError(f"{value.name!r} is a constant, so it cannot be an input")
    declare(value, shapes)
    new = ir.Value(name=value.name, type=value.type, shape=value.shape)
    value.replace_all_uses_with(new)
    value.name = f"{value.name}.computed"
    return new


def _check_fed(graph: ir.Graph, fed: Sequence[ir.Value]) -> None:
    """Every input that what is left of the graph uses is listed, or has a default."""
    for output in graph.outputs:
        for node in needed([output]):
            for value in operands(node):
                if value.is_graph_input() and value not in fed and not value.is_initializer():
                    raise InputError(
                        f"output {output.name!r} needs input {value.name!r} too, "
                        f"which is not among the inputs listed"
                    )


def join(first: ir.Model, second: ir.Model, wires: Mapping[str, str], prefix: str) -> None:
    """Append the second model to the first: `wires` are its inputs with what feeds each of them.

    That is an output of the first model, which then is none any more, or an input of it, which
    both share. Names that both have are changed in the second: its inputs and outputs get the
    prefix then. Both follow the same opsets.

    Raises:
        InputError: no such output or input, types that do not fit, or functions that differ.
    """
    graph, other = first.graph, second.graph
    sources = {v.name or "": v for v in (*graph.inputs, *graph.outputs)}
    inputs = {v.name or "": v for v in other.inputs}
    for into, out in wires.items():
        if out not in sources:
            raise InputError(f"the first model has no output {out!r}; it has {_listed(graph)}")
        if into not in inputs:
            raise InputError(f"the second model has no input {into!r}; it has {', '.join(inputs)}")
        _check_fit(sources[out], inputs[into])
    _merge_functions(first, second)
    tied = [(inputs[into], sources[out]) for into, out in wires.items()]
    free = [value for name, value in inputs.items() if name not in wires]
    fed = {new for _, new in tied}
    ends = [v for v in graph.outputs if v not in fed] + list(other.outputs)
    _rename_clashes(first, second, {value for value, _ in tied}, prefix)
    other.outputs.clear()
    other.inputs.clear()
    nodes = list(other)
    other.remove(nodes)
    constants = list(other.initializers.values())
    other.initializers.clear()
    for value, new in tied:
        value.replace_all_uses_with(new)
    graph.extend(nodes)
    for value in constants:
        graph.register_initializer(value)
    graph.inputs.extend(free)
    graph.outputs[:] = ends
    for key, text in second.metadata_props.items():
        first.metadata_props.setdefault(key, text)


def _listed(graph: ir.Graph) -> str:
    return ", ".join(str(value.name) for value in graph.outputs)


def _check_fit(out: ir.Value, into: ir.Value) -> None:
    where = f"output {out.name!r} cannot feed input {into.name!r}"
    if out.type is not None and into.type is not None and out.type != into.type:
        raise InputError(f"{where}: it is {out.type}, not {into.type}")
    if out.shape is None or into.shape is None:
        return
    same = len(out.shape) == len(into.shape) and all(
        a == b or not isinstance(a, int) or not isinstance(b, int)
        for a, b in zip(out.shape, into.shape, strict=True)
    )
    if not same:
        raise InputError(f"{where}: it has shape {out.shape}, not {into.shape}")


def _merge_functions(first: ir.Model, second: ir.Model) -> None:
    for key, function in second.functions.items():
        if key not in first.functions:
            first.functions[key] = function
        elif _text(first.functions[key]) != _text(function):
            raise InputError(f"both models define a function {key[0]}.{key[1]}, differently")


def _text(function: ir.Function) -> bytes:
    return ir.serde.serialize_function(function).SerializeToString(deterministic=True)


def _rename_clashes(first: ir.Model, second: ir.Model, tied: set[ir.Value], prefix: str) -> None:
    """Give what bears a name of the first model another one in the second."""
    names, own = _names(first), _names(second)
    taken, nodes = names[0] | own[0], names[1] | own[1]
    for graph in ir.graphs(second):
        if any(graph is function.graph for function in second.functions.values()):
            continue
        values = [*graph.inputs, *graph.initializers.values()]
        values += [value for node in graph for value in node.outputs]
        for value in values:
            if value.name and value.name in names[0]:
                if value in tied:
                    continue
                value.name = _unique(f"{prefix}{value.name}", taken)
        for node in graph:
            if node.name and node.name in names[1]:
                node.name = _unique(f"{prefix}{node.name}", nodes)


def _names(model: ir.Model) -> tuple[set[str], set[str]]:
    values, nodes = set[str](), set[str]()
    for graph in ir.graphs(model):
        values.update(v.name for v in graph.inputs if v.name)
        values.update(graph.initializers)
        for node in graph:
            values.update(v.name for v in node.outputs if v.name)
            nodes.add(node.name or "")
    return values, nodes


def _unique(name: str, taken: set[str]) -> str:
    number, found = 1, name
    while found in taken:
        number += 1
        found = f"{name}_{number}"
    taken.add(found)
    return found


def checked(model: ir.Model, original: ir.Model) -> ir.Model:
    """The model, once ONNX's checker has accepted it, weights of more than 4 KB left aside.

    Raises:
        GraphoptError: the checker rejects it, though it accepts the original.
    """
    found = flaw(model)
    if found and not flaw(original):
        raise GraphoptError(f"the result is no legal model: {found}")
    return model


def flaw(model: ir.Model) -> str:
    """What ONNX's checker has against a model, on one line; empty where nothing."""
    proto, tensors = writing.skeleton(model)
    listed = {info.name for info in proto.graph.input}
    for head, tensor in tensors:
        if tensor is None or tensor.nbytes <= _SMALL:
            added = proto.graph.initializer.add()
            added.CopyFrom(head)
            if tensor is not None:
                added.raw_data = tensor.tobytes()
        elif head.name not in listed:
            proto.graph.input.append(
                onnx.helper.make_tensor_value_info(head.name, head.data_type, list(head.dims))
            )
    try:
        _checker.check_model(proto, full_check=True)
    except (
        *(_checker.ValidationError, onnx.shape_inference.InferenceError),
        *(RuntimeError, ValueError),
    ) as error:
        return " ".join(str(error).split())[:300]
    return ""
