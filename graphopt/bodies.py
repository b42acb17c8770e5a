"""The body of a Loop or Scan and the branches of an If as models of their own.

What they read of the values around them becomes inputs, save constants, which become their own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from graphopt import ir
from graphopt.artifact import Axis
from graphopt.cutting import extract, whole
from graphopt.execute import captured
from graphopt.shapes import Shapes

_SCAN = 9
"""The opset from which a Scan has no batches."""
_FOREVER = np.array(np.iinfo(np.int64).max)
_BRANCHES = ("then_branch", "else_branch")
_NUMBERS = "biuf"
"""Kinds of numpy's dtypes that files of arrays have by name."""


class Unfit(Exception):
    """Why a Loop, a Scan or an If cannot be taken apart."""


@dataclass(frozen=True)
class Body:
    """A body or branch; see `artifact.Block`."""

    inputs: tuple[str, ...]
    outputs: tuple[ir.Value, ...]
    """With the types and shapes that are known of them."""
    constants: Mapping[str, ir.Array]
    """Those of its outputs that are constants, by name."""
    model: ir.Model
    """What computes the others, each once, from those of the inputs that it needs."""
    taken: Mapping[str, ir.Value]
    """The inputs of `model` by name, as the values that they stand for in the model around it."""


@dataclass(frozen=True)
class Opened:
    """A Loop, a Scan or an If that was taken apart; see `artifact.Flow`."""

    kind: Literal["If", "Loop", "Scan"]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    constants: Mapping[str, ir.Array]
    """Those of its inputs that are constants, by name."""
    bodies: tuple[Body, ...]
    carried: int = 0
    scanned: tuple[Axis, ...] = ()
    stacked: tuple[Axis, ...] = ()


def taken_apart(node: ir.Node, model: ir.Model, shapes: Shapes) -> Opened:
    """The bodies of a Loop, a Scan or an If of the main graph; the model is left as it is.

    Raises:
        Unfit: it handles what is no tensor of numbers, or of which the type is not known.
    """
    read = list(captured(node))
    around = [value for value in read if ir.constant(value) is None]
    inputs, constants = _given([*node.inputs, *around], node)
    outputs = tuple(value.name or "" for value in node.outputs)
    count = len(node.inputs)

    def body(name: str, takes: int, gives: int = 0) -> Body:
        graph = node.attributes[name].as_graph()
        if len(graph.inputs) != takes or len(graph.outputs) != gives + len(outputs):
            raise Unfit("its body takes or gives another number of values")
        return _body(graph, read, model, shapes, loop=node.op_type == "Loop")

    if node.op_type == "If":
        bodies = tuple(body(name, 0) for name in _BRANCHES)
        return Opened("If", inputs, outputs, constants, bodies)
    only = (body("body", count, int(node.op_type == "Loop")),)
    if node.op_type == "Loop":
        return Opened("Loop", inputs, outputs, constants, only, count - 2)
    if ir.opset(model.graph) < _SCAN:
        raise Unfit("in old opsets a Scan has batches")
    slices = node.attributes["num_scan_inputs"].as_int()
    carried = count - slices
    sides = _axes(node, "input", slices), _axes(node, "output", len(outputs) - carried)
    return Opened("Scan", inputs, outputs, constants, only, carried, *sides)


def _axes(node: ir.Node, side: str, count: int) -> tuple[Axis, ...]:
    axes, directions = (
        list(node.attributes[name].as_ints()) if name in node.attributes else [0] * count
        for name in (f"scan_{side}_axes", f"scan_{side}_directions")
    )
    return tuple(Axis(a, bool(d)) for a, d in zip(axes, directions, strict=True))


def _given(
    values: Sequence[ir.Value | None], node: ir.Node
) -> tuple[tuple[str, ...], dict[str, ir.Array]]:
    """The names of a node's operands, with the constants among them and what absent ones mean."""
    names: list[str] = []
    constants: dict[str, ir.Array] = {}
    for index, value in enumerate(values):
        if value is None:
            names.append(f"{ir.label(node)}:{index}")
            constants[names[-1]] = np.array(True) if index else _FOREVER
            continue
        names.append(value.name or "")
        if ir.constant(value) is not None:
            constants[names[-1]] = _numbers(value)
    return tuple(names), constants


def _numbers(value: ir.Value) -> ir.Array:
    array = ir.array(value)
    if array is None or array.dtype.kind not in _NUMBERS:
        raise Unfit(f"the constant {value.name} is of a type that files of arrays have not")
    return array


def _body(
    graph: ir.Graph, read: Sequence[ir.Value], model: ir.Model, shapes: Shapes, *, loop: bool
) -> Body:
    """A body or branch; `read` are the values around it that it may use."""
    around = [value for value in read if ir.constant(value) is None]
    given = [*graph.inputs, *around]
    for value in (*given, *graph.outputs):
        dtype = shapes.dtype(value)
        if dtype is None or not isinstance(value.type, ir.TensorType | None):
            raise Unfit(f"{value.name} is no tensor, or one of an unknown type")
        if dtype == ir.DataType.STRING:
            raise Unfit(f"{value.name} is text")
    inner = _as_model(graph, around, [v for v in read if ir.constant(v) is not None], model)
    stands = dict(zip(inner.graph.inputs, given, strict=True))
    for new, old in stands.items():
        declare(new, old, shapes)
    names = [value.name or "" for value in stands]
    if loop:
        if len(graph.inputs[0].shape or ()):
            raise Unfit("its body counts in a tensor that is no scalar")
        # its condition holds while the body runs
        del names[1]
        _set_true(inner.graph, inner.graph.inputs[1])
    found = Shapes(inner)
    outputs = [ir.behind_identities(value) for value in inner.graph.outputs]
    for value in outputs:
        declare(value, value, found)
    constants = {v.name or "": _numbers(v) for v in outputs if ir.constant(v) is not None}
    made = [v for v in dict.fromkeys(outputs) if v.name not in constants and v not in stands]
    part = whole(made)
    taken = {value.name or "": stands[value] for value in part.inputs}
    return Body(tuple(names), tuple(outputs), constants, extract(inner, part, made, {}), taken)


def _as_model(
    graph: ir.Graph, around: Sequence[ir.Value], constants: Sequence[ir.Value], model: ir.Model
) -> ir.Model:
    """A copy of a body with what it reads of the values around it as inputs behind its own."""
    names = {value.name for node in graph for value in node.outputs} | set(graph.initializers)
    for value in (*around, *constants):
        if value.name in names:
            raise Unfit(f"{value.name} is the name of two values")
    makers = (value.producer() for value in constants)
    view = ir.onnx_ir.GraphView(
        [*graph.inputs, *around],
        graph.outputs,
        nodes=[*(maker for maker in makers if maker is not None), *graph],
        initializers=[
            *graph.initializers.values(),
            *(value for value in constants if value.is_initializer()),
        ],
        opset_imports=dict(model.graph.opset_imports),
        name=graph.name,
    )
    functions = [function.clone() for function in model.functions.values()]
    return ir.Model(view.clone(), ir_version=model.ir_version, functions=functions)


def declare(new: ir.Value, old: ir.Value, shapes: Shapes) -> None:
    """Give a value the type, where it has none, and the shape that are known of another one."""
    dtype, shape = shapes.dtype(old), shapes.shape(old)
    if new.type is None and dtype is not None:
        new.type = ir.TensorType(dtype)
    if shape is not None:
        new.shape = ir.Shape([d if isinstance(d, int) else str(d) for d in shape])


def _set_true(graph: ir.Graph, value: ir.Value) -> None:
    """Make an initializer of an input."""
    graph.inputs.remove(value)
    value.const_value = ir.tensor(np.full((1,) * len(value.shape or ()), True), name=value.name)
    graph.register_initializer(value)
