"""A model that a backend takes only in part, cut into pieces that run one after the other.

Nodes are numbered by how often the runtime changes on the way to them: a node that takes a value
from another runtime comes later than that value. Equal numbers make a piece, so no two pieces wait
for each other. A Loop, a Scan or an If that the backend does not take, and in which there is work
for it, is a piece of its own, whose bodies are models to be compiled in turn.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass

from graphopt import ir, profiles
from graphopt.bodies import Opened, Unfit, declare, taken_apart
from graphopt.cutting import Part, extract, operands
from graphopt.shapes import Shapes

_HEAVY = frozenset(
    (
        *("Attention", "Conv", "ConvTranspose", "ConvInteger", "Einsum", "Gemm", "GRU", "LSTM"),
        *("MatMul", "MatMulInteger", "QLinearConv", "QLinearMatMul", "RNN"),
        *("SVMClassifier", "SVMRegressor"),
        *("TreeEnsemble", "TreeEnsembleClassifier", "TreeEnsembleRegressor"),
    )
)
_FEWEST = 3
_MANY = 20
"""Nodes of a body that are worth a step by the host in each iteration, without heavy ones too."""
_BACKEND, _FALLBACK, _HOST = range(3)
"""What may run a node; the remainders of the numbers."""
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


@dataclass(frozen=True)
class Steered:
    """A Loop, a Scan or an If that the host steers."""

    label: str
    opened: Opened
    pieces: tuple[Piece, ...]
    """The models of its bodies, the fallback's as long as nobody compiled them."""
    native = True
    """That it has been taken apart means that there is work for the backend in it."""


def cut(
    model: ir.Model, refused: Mapping[str, str], ranges: str = "", closed: Container[str] = ()
) -> tuple[list[Piece | Steered], dict[str, str]]:
    """The pieces of a model in the order in which they run, and why nodes are no backend's.

    `refused` has the nodes that the backend does not take, by label, with the reason; those of
    branches and functions stand for the node that they are in. To these come nodes that would
    make a piece too small to be worth one, and those of whose inputs nothing is known. With
    nothing left for the backend there is one piece. `ranges` are the profiles of the model's
    inputs, from which those of the pieces follow; what is in `closed` is not taken apart. The
    argument is left as it is, save that values without a name get one.
    """
    _name_values(model)
    shapes = Shapes(model)
    reasons = {node: why for node in model.graph if (why := _reason(node, model, refused))}
    opened: dict[ir.Node, Opened] = {}
    for node, why in reasons.items():
        if _is_worth_it(node) and ir.label(node) not in closed:
            try:
                opened[node] = taken_apart(node, model, shapes)
            except Unfit as error:
                reasons[node] = f"{why}; {error}"
    while True:
        stages = _stages(model.graph, reasons, opened)
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
    given = profiles.parse(ranges)

    def piece(
        native: bool, part: ir.Model, nodes: Iterable[ir.Node], taken: Mapping[str, ir.Value]
    ) -> Piece:
        labels = tuple(ir.label(node) for node in nodes)
        local = profiles.of_values(given, model, shapes, taken)
        return Piece(native, part, labels, profiles.text(local))

    pieces: list[Piece | Steered] = []
    for stage, nodes in sorted(stages.items()):
        if stage % 3 == _HOST:
            for node in (node for node in nodes if leaving.intersection(node.outputs)):
                bodies = opened[node].bodies
                parts = tuple(piece(False, b.model, b.model.graph, b.taken) for b in bodies)
                pieces.append(Steered(ir.label(node), opened[node], parts))
            continue
        outputs = [value for node in nodes for value in node.outputs if value in leaving]
        if outputs:
            inputs, part = _extract(model, nodes, outputs, shapes)
            pieces.append(piece(stage % 3 == _BACKEND, part, nodes, inputs))
    return pieces, {ir.label(node): why for node, why in reasons.items()}


def _is_worth_it(node: ir.Node) -> bool:
    """Whether there is enough in a Loop, a Scan or an If for the host to steer it."""
    if node.op_type not in ("If", "Loop", "Scan") or node.domain:
        return False
    inner = [each for graph in ir.subgraphs(node) for each in graph.all_nodes()]
    light = [each for each in inner if each.op_type not in ("Constant", "Identity")]
    return len(light) >= _MANY or any(each.op_type in _HEAVY for each in inner)


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


def _stages(
    graph: ir.Graph, reasons: Mapping[ir.Node, str], opened: Container[ir.Node]
) -> dict[int, list[ir.Node]]:
    """Nodes by number, whose remainder by 3 says what runs them.

    What the host steers waits for all that it takes, others of its kind included.
    """
    number: dict[ir.Node, int] = {}
    ends = set(graph.outputs)
    stages: dict[int, list[ir.Node]] = {}
    for node in graph:
        if node.op_type == "Constant" and not any(v in ends for v in node.outputs):
            continue  # it goes where it is used
        runs = _HOST if node in opened else _FALLBACK if node in reasons else _BACKEND
        before = max((number.get(p, 0) for v in operands(node) if (p := v.producer())), default=0)
        number[node] = before + (runs - before) % 3
        if runs == _HOST and number[node] == before:
            number[node] += 3
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
        if number % 3 == _BACKEND and len(nodes) < _FEWEST and light:
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
        for node in nodes if number % 3 == _BACKEND else ():
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
        declare(new, old, shapes)
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
