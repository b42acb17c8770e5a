"""Changes of a model that users ask for by name: parts of it, its signature, what is around it.

Every function leaves its argument as it is and returns a legal model: ONNX's checker has accepted
it, unless it did not accept the original either.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, get_args, get_type_hints

from graphopt import attachments, files, ir, rebatching, splicing
from graphopt.cutting import operands
from graphopt.errors import InputError
from graphopt.files import ModelLike
from graphopt.optimization import optimize
from graphopt.shapes import Shapes
from graphopt.splicing import checked, flaw

__all__ = [
    "add_outputs",
    "attach",
    "drop_outputs",
    "extract",
    "freeze_dims",
    "merge",
    "rename",
    "rename_dims",
    "set_batch",
    "split",
    "strip_metadata",
]

_OPSET = 13  # what attachments are written for; older models are converted


def extract(
    model: ModelLike,
    inputs: Sequence[str] | None = None,
    outputs: Sequence[str] | None = None,
) -> ir.Model:
    """The part of a model that computes some tensors from others, by name.

    Args:
        model: as `graphopt.load` takes it.
        inputs: tensors of the main graph that become the inputs, in this order; by default the
            model's own, as far as they are needed.
        outputs: tensors that become the outputs; by default the model's own.

    Raises:
        InputError: no such tensor, or an input that the outputs need too is not listed.
    """
    original = files.load(model)
    result = files.copy(original)
    splicing.restrict(result, inputs, outputs)
    return checked(result, original)


def add_outputs(model: ModelLike, names: Sequence[str]) -> ir.Model:
    """Put out further tensors of the main graph; those that are outputs already stay as they are.

    Raises:
        InputError: no such tensor, an input or constant, or one of unknown type.
    """
    original = files.load(model)
    result = files.copy(original)
    values, shapes = splicing.values_by_name(result), Shapes(result)
    for name in names:
        value = splicing.find(values, name)
        if value.producer() is None:
            raise InputError(f"{name!r} is computed by nothing, so it is no output")
        if not value.is_graph_output():
            splicing.declare(value, shapes)
            result.graph.outputs.append(value)
    return checked(result, original)


def drop_outputs(model: ModelLike, names: Sequence[str]) -> ir.Model:
    """Leave outputs out, and what only they need; inputs stay, even where nothing uses them now.

    Raises:
        InputError: no such output, or none is left.
    """
    original = files.load(model)
    result = files.copy(original)
    there = [value.name for value in result.graph.outputs]
    missing = [name for name in names if name not in there]
    if missing:
        raise InputError(f"no output is named {missing[0]!r}; there are {there}")
    left = [value for value in result.graph.outputs if value.name not in names]
    if not left:
        raise InputError("no output would be left")
    result.graph.outputs[:] = left
    splicing.prune(result)
    return checked(result, original)


def freeze_dims(model: ModelLike, sizes: Mapping[str, int]) -> ir.Model:
    """Give symbolic dimensions a number, wherever their name stands.

    Raises:
        InputError: no dimension of that name, or a number that is no size.
    """
    for name, size in sizes.items():
        if size < 0:
            raise InputError(f"dimension {name!r} cannot be {size}")
    return _redimension(model, dict(sizes))


def rename_dims(model: ModelLike, names: Mapping[str, str]) -> ir.Model:
    """Give symbolic dimensions other names; two that get the same name must be equal from then on.

    Raises:
        InputError: no dimension of that name, or an empty name.
    """
    if not all(names.values()):
        raise InputError("a dimension's name cannot be empty")
    return _redimension(model, dict(names))


def _redimension(model: ModelLike, new: Mapping[str, int | str]) -> ir.Model:
    original = files.load(model)
    result = files.copy(original)
    found: dict[str, None] = {}
    for value in _values(result):
        if value.shape is None:
            continue
        dims: list[int | str | None] = []
        for dim in value.shape:
            name = None if isinstance(dim, int) else dim.value
            if isinstance(name, str):
                found[name] = None
            dims.append(dim if isinstance(dim, int) else new.get(name or "", name))
        value.shape = ir.Shape(dims)
    missing = [name for name in new if name not in found]
    if missing:
        known = ", ".join(found) or "none"
        raise InputError(f"no dimension is named {missing[0]!r}; there are {known}")
    return checked(result, original)


def _values(model: ir.Model) -> Iterator[ir.Value]:
    for graph in ir.graphs(model):
        yield from graph.inputs
        yield from graph.outputs
        for node in graph:
            yield from (value for value in node.outputs if not value.is_graph_output())


def rename(model: ModelLike, names: Mapping[str, str]) -> ir.Model:
    """Give tensors of the main graph, inputs and outputs among them, other names.

    Raises:
        InputError: no such tensor, an empty name or one that is taken.
    """
    original = files.load(model)
    result = files.copy(original)
    values = splicing.values_by_name(result)
    chosen = [(splicing.find(values, old), new) for old, new in names.items()]
    taken = {value.name for value in _values(result)} | set(result.graph.initializers)
    taken -= set(names)
    for value, new in chosen:
        if not new or new in taken:
            raise InputError(f"{new!r} is no free name for {value.name!r}")
        taken.add(new)
    for value, _ in chosen:
        value.name = f"{value.name}.renamed"
    for value, new in chosen:
        value.name = new
    return checked(result, original)


def set_batch(
    model: ModelLike,
    batch: int | str,
    *,
    axes: Mapping[str, int] | None = None,
    verify: bool = True,
) -> ir.Model:
    """Change the batch size to a number, or to a symbol, which makes it free.

    Constants inside that say the old size are rewritten where that is provable. The result is
    compared with runs of the original, batch for batch.

    Args:
        model: as `graphopt.load` takes it.
        batch: the new size, or the name of the new dimension.
        axes: the batch axis by input name; by default axis 0 of each input that has the same size
            there as the first one.
        verify: whether to run both.

    Raises:
        InputError: no batch axis, or a node, which is named, that insists on the old size.
    """
    if isinstance(batch, int) and batch < 1:
        raise InputError(f"a batch of {batch} is none")
    original = files.load(model)
    result = files.copy(original)
    found, old = rebatching.batch_axes(result, axes)
    if isinstance(old, str):
        if not old.startswith("?"):
            return _redimension(original, {old: batch})
        for value in result.graph.inputs:
            if value.name in found and value.shape is not None:
                value.shape = ir.Shape(
                    [
                        batch if axis == found[value.name] else dim
                        for axis, dim in enumerate(value.shape)
                    ]
                )
        return checked(result, original)
    if batch == old:
        return result
    rebatching.rebatch(result, found, old, batch)
    found_flaw = flaw(result)
    if found_flaw and not flaw(original):
        raise InputError(f"cannot change the batch: {found_flaw}")
    if verify:
        rebatching.compare(original, result, found, old, batch)
    return result


def strip_metadata(model: ModelLike) -> ir.Model:
    """Remove documentation, metadata and the producer's name; what is computed stays."""
    result = files.load(model)
    result.doc_string = result.producer_name = result.producer_version = None
    result.metadata_props.clear()
    for function in result.functions.values():
        function.doc_string = None
        function.metadata_props.clear()
    for graph in ir.graphs(result):
        graph.doc_string = None
        graph.metadata_props.clear()
        for node in graph:
            node.doc_string = None
            node.metadata_props.clear()
        made = (value for node in graph for value in node.outputs)
        for value in (*graph.inputs, *graph.initializers.values(), *made):
            value.doc_string = None
            value.metadata_props.clear()
    return result


def attach(model: ModelLike, what: str, options: Mapping[str, Any]) -> ir.Model:
    """Put work before the inputs (`normalize`, `resize`) or after the outputs into the model.

    What there is, and its options, are the functions of `graphopt.attachments`: `softmax`,
    `argmax`, `topk` and `nms` come after the outputs.

    Raises:
        InputError: no such work or option, or a model that it does not fit.
    """
    known = attachments.BEFORE | attachments.AFTER
    if what not in known:
        raise InputError(f"nothing is named {what!r}; there are {', '.join(known)}")
    hints = get_type_hints(known[what])
    code = known[what].__code__
    accepted = code.co_varnames[1 : code.co_argcount]
    for name, option in options.items():
        if name not in accepted:
            raise InputError(f"{what} has no option {name!r}: it has {', '.join(accepted)}")
        kinds = [kind for kind in (bool, int, float, str) if kind in _members(hints[name])]
        numbers = type(option) in (list, tuple) and hints[name] == attachments.Numbers
        if not numbers and type(option) not in kinds and (type(option), kinds) != (int, [float]):
            raise InputError(f"option {name!r} of {what} is {kinds[0].__name__}, not {option!r}")
    original = files.load(model)
    result = files.copy(original)
    if ir.opset(result.graph) < _OPSET:
        result = optimize(result, passes=f"convert-opset{{version={_OPSET}}}", verify="off")
    known[what](result, **options)
    return checked(result, original)


def _members(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) or (hint,)


def merge(
    first: ModelLike,
    second: ModelLike,
    connect: Mapping[str, str] | None = None,
    *,
    prefix: str = "",
    share: bool = False,
) -> ir.Model:
    """Two models as one: outputs of the first feed inputs of the second.

    The newer opset of both is taken. Other inputs and outputs of both stay; tensors and nodes of
    the second whose names the first has too get other ones.

    Args:
        first: as `graphopt.load` takes it.
        second: likewise.
        connect: output names of the first by input names of the second: {output: input}; by
            default what has the same name, or the only output and the only input.
        prefix: put before names of the second that the first has too.
        share: inputs of the same name are one input of the result.

    Raises:
        InputError: nothing to connect, types that do not fit, inputs or outputs of one name, or
            opsets that cannot be converted.
    """
    one, two = files.load(first), files.load(second)
    wires = {into: out for out, into in (connect or _natural_wires(one, two)).items()}
    if share:
        named = {v.name: v.name for v in one.graph.inputs if v.name}
        wires = {v.name or "": named[v.name] for v in two.graph.inputs if v.name in named} | wires
    one, two = _same_opsets(one, two)
    ends = {v.name for v in (*one.graph.inputs, *one.graph.outputs)} - set(wires.values())
    others = [v.name for v in two.graph.outputs]
    others += [v.name for v in two.graph.inputs if v.name not in wires]
    twice = [name for name in others if name in ends]
    if twice and not prefix:
        hint = "; inputs of one name can be shared" if twice[0] in _inputs(two) else ""
        raise InputError(f"both models have {twice[0]!r}: give the second one a prefix{hint}")
    result = files.copy(one)
    splicing.join(result, files.copy(two), wires, prefix or "second.")
    result.ir_version = max(one.ir_version, two.ir_version)
    return checked(result, one)


def _inputs(model: ir.Model) -> list[str | None]:
    return [value.name for value in model.graph.inputs]


def _natural_wires(first: ir.Model, second: ir.Model) -> dict[str, str]:
    outputs = [v.name or "" for v in first.graph.outputs]
    inputs = [v.name or "" for v in second.graph.inputs if not v.is_initializer()]
    same = {name: name for name in outputs if name in inputs}
    if same:
        return same
    if len(outputs) == len(inputs) == 1:
        return {outputs[0]: inputs[0]}
    raise InputError(f"say what to connect: outputs {outputs} to inputs {inputs}")


def _same_opsets(first: ir.Model, second: ir.Model) -> tuple[ir.Model, ir.Model]:
    newest = max(ir.opset(first.graph), ir.opset(second.graph))
    converted: list[ir.Model] = []
    for model, which in ((first, "first"), (second, "second")):
        if ir.opset(model.graph) != newest:
            model = optimize(model, passes=f"convert-opset{{version={newest}}}", verify="off")
            if ir.opset(model.graph) != newest:
                raise InputError(f"the {which} model cannot be converted to opset {newest}")
        converted.append(model)
    imports = converted[0].graph.opset_imports
    for domain, version in converted[1].graph.opset_imports.items():
        if domain not in ("", "ai.onnx") and imports.setdefault(domain, version) != version:
            raise InputError(f"the models follow {domain} {imports[domain]} and {version}")
    return converted[0], converted[1]


def split(model: ModelLike, at: Sequence[str]) -> tuple[ir.Model, ir.Model]:
    """Two models that do the work of one: up to some tensors, and from these on.

    The first puts out the tensors, all others that the second needs of it, and those of the
    model's outputs that it computes; the second takes them, and inputs of the model that it needs.

    Raises:
        InputError: no such tensor, or nothing is left for the second model.
    """
    original = files.load(model)
    graph, values = original.graph, splicing.values_by_name(original)
    cut = [splicing.find(values, name) for name in dict.fromkeys(at)]
    for value in cut:
        if value.producer() is None:
            raise InputError(f"{value.name!r} is computed by nothing: there is nothing to split")
    head, every = splicing.needed(cut), splicing.needed(graph.outputs)
    tail = [node for node in graph if node in every and node not in head]
    if not tail:
        raise InputError("nothing is left after these tensors")
    tail = [node for node in tail if not _constant(node)]
    crossing = [v for node in tail for v in operands(node) if v.producer() in head]
    crossing = [v for v in crossing if ir.constant(v) is None]
    between = list(dict.fromkeys(v.name or "" for v in (*cut, *crossing)))
    done = [v.name or "" for v in graph.outputs if v.producer() in head and v.name not in between]
    later = [v.name or "" for v in graph.outputs if v.producer() not in head]
    used = {v.name for node in tail for v in operands(node)}
    inputs = [v.name or "" for v in graph.inputs if v.name in used and not v.is_initializer()]
    taken = [name for name in between if name in used]
    if not later or not taken:
        raise InputError("nothing is left after these tensors")
    first = extract(original, outputs=[*between, *done])
    return first, extract(original, inputs=[*taken, *inputs], outputs=later)


def _constant(node: ir.Node) -> bool:
    return all(ir.constant(value) is not None for value in node.outputs)
