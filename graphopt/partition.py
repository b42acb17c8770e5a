"""A model that a backend takes only in part, cut into pieces that run one after the other.

Nodes are numbered by how often the runtime changes on the way to them: a node that takes a value
from the other runtime comes one step later than that value. Equal numbers make a piece, so no two
pieces wait for each other, and there are as few of them as a chain of dependences allows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from graphopt import ir, profiles
from graphopt.cutting import Part, extract, operands
from graphopt.shapes import Shapes

_HEAVY = frozenset(
    (
        *("Attention", "Conv", "ConvTranspose", "ConvInteger", "Einsum", "Gemm", "GRU", "LSTM"),
        *("MatMul", "MatMulInteger", "QLinearConv", "QLinearMatMul", "RNN"),
        *("TreeEnsemble", "TreeEnsembleClassifier", "TreeEnsembleRegressor"),
    )
)
_FEWEST = 3
_SMALL = "it stands alone between nodes that the backend does not take"


@dataclass(frozen=True)
class Piece:
    """A part of a model as a model of its own; its inputs and outputs bear the whole's names."""

    native: bool
    """True for the backend, False for what falls back."""
    model: ir.Model
    labels: tuple[str, ...]
    """Of its nodes."""
    profiles: str
    """The ranges of sizes of its inputs, see `graphopt.profiles`; empty where all are fixed."""


def cut(
    model: ir.Model, refused: Mapping[str, str], ranges: str = ""
) -> tuple[list[Piece], dict[str, str]]:
    """The pieces of a model in the order in which they run, and why nodes are no backend's.

    `refused` has the nodes that the backend does not take, by label, with the reason; those of
    branches and functions stand for the node that they are in. To these come nodes that would
    make a piece too small to be worth one, and those of whose inputs nothing is known. With
    nothing left for the backend there is one piece. `ranges` are the profiles of the model's
    inputs, from which those of the pieces follow. The argument is left as it is, save that values
    without a name get one.
    """
    _name_values(model)
    shapes = Shapes(model)
    reasons = {node: why for node in model.graph if (why := _reason(node, model, refused))}
    while True:
        stages = _stages(model.graph, reasons)
        more = _too_small(stages, reasons) or _unknown(stages, reasons, shapes)
        if not more:
            break
        reasons |= more
    number = {node: stage for stage, nodes in stages.items() for node in nodes}
    leaving = set(model.graph.outputs)
    for node in model.graph:
        for value in operands(node):
            maker = value.producer()
            if maker is not None and number.get(maker) != number.get(node):
                leaving.add(value)
    pieces: list[Piece] = []
    for stage, nodes in sorted(stages.items()):
        outputs = [value for node in nodes for value in node.outputs if value in leaving]
        if outputs:
            labels = tuple(ir.label(node) for node in nodes)
            inputs, piece = _extract(model, nodes, outputs, shapes)
            local = profiles.of_values(profiles.parse(ranges), model, shapes, inputs)
            pieces.append(Piece(stage % 2 == 0, piece, labels, profiles.text(local)))
    return pieces, {ir.label(node): why for node, why in reasons.items()}


def _reason(node: ir.Node, model: ir.Model, refused: Mapping[str, str]) -> str:
    """Why a node or something in its branches or function is not taken; empty where it is."""
    found = refused.get(ir.label(node), "")
    stack = list(ir.subgraphs(node))
    function = model.functions.get(node.op_identifier())
    inner = [*(function or ()), *(n for graph in stack for n in graph)]
    for each in inner:
        if found:
            break
        why = _reason(each, model, refused)
        found = f"{ir.label(each)} in it: {why}" if why else ""
    return found


def _stages(graph: ir.Graph, reasons: Mapping[ir.Node, str]) -> dict[int, list[ir.Node]]:
    """Nodes by number: even ones are the backend's, odd ones are not."""
    number: dict[ir.Node, int] = {}
    ends = set(graph.outputs)
    stages: dict[int, list[ir.Node]] = {}
    for node in graph:
        if node.op_type == "Constant" and not any(v in ends for v in node.outputs):
            continue  # it goes where it is used
        before = max((number.get(p, 0) for v in operands(node) if (p := v.producer())), default=0)
        number[node] = before + ((before % 2 == 1) != (node in reasons))
        stages.setdefault(number[node], []).append(node)
    return stages


def _too_small(
    stages: Mapping[int, list[ir.Node]], reasons: Mapping[ir.Node, str]
) -> dict[ir.Node, str]:
    """The nodes of the first piece of a backend that is not worth a change of the runtime."""
    if not reasons:
        return {}
    for number, nodes in sorted(stages.items()):
        light = not any(node.op_type in _HEAVY for node in nodes)
        if number % 2 == 0 and len(nodes) < _FEWEST and light:
            return dict.fromkeys(nodes, _SMALL)
    return {}


def _unknown(
    stages: Mapping[int, list[ir.Node]], reasons: Mapping[ir.Node, str], shapes: Shapes
) -> dict[ir.Node, str]:
    """Nodes of a backend's piece whose inputs from elsewhere have no known type or rank."""
    if not reasons:
        return {}
    found: dict[ir.Node, str] = {}
    for number, nodes in stages.items():
        inside = set(nodes)
        for node in nodes if number % 2 == 0 else ():
            for value in operands(node):
                if value.producer() in inside or ir.constant(value) is not None:
                    continue
                if shapes.dtype(value) is None or shapes.shape(value) is None:
                    found[node] = f"type or rank of its input {value.name} are not known before"
    return found


def _extract(
    model: ir.Model, nodes: list[ir.Node], outputs: list[ir.Value], shapes: Shapes
) -> tuple[dict[str, ir.Value], ir.Model]:
    """Nodes as a model of their own, whose inputs and outputs have types, and shapes if known.

    With it the model's values that are its inputs, by name.
    """
    part = Part()
    inside = set(nodes)
    stack = list(nodes)
    while stack:
        node = stack.pop()
        part.nodes.add(node)
        for value in operands(node):
            maker = value.producer()
            if maker in inside:
                continue
            if maker is not None and maker.op_type == "Constant":
                stack.append(maker)
            elif value.is_initializer() and not value.is_graph_input():
                part.constants[value] = None
            else:
                part.inputs[value] = None
    made = extract(model, part, outputs, {})
    news = [*made.graph.inputs, *made.graph.outputs]
    for old, new in zip([*part.inputs, *outputs], news, strict=True):
        dtype, shape = shapes.dtype(old), shapes.shape(old)
        if new.type is None and dtype is not None:
            new.type = ir.TensorType(dtype)
        if shape is not None:
            new.shape = ir.Shape([d if isinstance(d, int) else str(d) for d in shape])
    return {value.name or "": value for value in part.inputs}, made


def _name_values(model: ir.Model) -> None:
    """Give names to values of the main graph that have none."""
    taken = {value.name for node in model.graph for value in node.outputs}
    for index, node in enumerate(model.graph):
        for place, value in enumerate(node.outputs):
            if not value.name and value.uses():
                name = f"{node.op_type}_{index}_{place}"
                while name in taken:
                    name += "_"
                value.name = name
