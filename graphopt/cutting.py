"""Where two models differ, and the parts of them that have to be run to compare just that.

Values that are computed alike in both (`graphopt.numbering`) need no check. Where the second model
has a value of the same name that is computed in another way, the two are *taken* to be equal: a
claim that has to be checked. What follows is compared as if the claim held, so the differences
fall into regions, each between the values that both models have and one claim.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from graphopt import ir
from graphopt.execute import captured
from graphopt.numbering import Numbering, Numbers

Types = Mapping[ir.Value, ir.TypeProtocol]
"""Types of values at the edge of a part, where the model does not declare them."""


@dataclass(frozen=True)
class Claim:
    """Two values, one of each model, that are taken to be equal and have to be checked."""

    before: ir.Value
    after: ir.Value
    twin: ir.Value | None = None
    """The original's value that `after` is computed like, where there is one."""

    @property
    def name(self) -> str:
        """The name that both bear."""
        return self.after.name or ""


@dataclass
class Part:
    """A piece of a model: what computes some outputs from `inputs` and constants."""

    nodes: set[ir.Node] = field(default_factory=set[ir.Node])
    inputs: dict[ir.Value, None] = field(default_factory=dict[ir.Value, None])
    constants: dict[ir.Value, None] = field(default_factory=dict[ir.Value, None])

    def computes(self, value: ir.Value) -> bool:
        """Whether a node of the part makes the value."""
        return value.producer() in self.nodes

    def add(self, node: ir.Node, inputs: Callable[[ir.Value], bool]) -> list[ir.Value]:
        """Take a node in; returns the operands that are neither constants nor `inputs`."""
        self.nodes.add(node)
        further: list[ir.Value] = []
        for value in operands(node):
            if inputs(value):
                self.inputs[value] = None
            elif value.is_initializer() and not value.is_graph_input():
                self.constants[value] = None
            elif value.producer() is None:
                self.inputs[value] = None
            else:
                further.append(value)
        return further

    def settle(self) -> None:
        """Take from the inputs what a node of the part makes."""
        for value in [value for value in self.inputs if self.computes(value)]:
            del self.inputs[value]


class Cut:
    """Two models, laid side by side; names in `dropped` are not taken to mean the same in both."""

    def __init__(self, a: ir.Model, b: ir.Model, dropped: frozenset[str] = frozenset()) -> None:
        self.a, self.b, self.dropped = a, b, dropped
        table = Numbering()
        self._numbers_a = table.of(a)
        names: dict[str | None, ir.Value] = {v.name: v for v in _values(a.graph) if v.name}
        self._value_of: dict[int, ir.Value] = {}
        for value in names.values():
            self._value_of.setdefault(self._numbers_a[value], value)
        own: Numbers = {}

        def adopt(value: ir.Value, number: int) -> int:
            same = None if value.name in dropped else names.get(value.name)
            if same is None or self._numbers_a[same] == number or not _may_equal(same, value):
                return number
            own[value] = number
            return self._numbers_a[same]

        self._numbers_b = table.of(b, adopt)
        live = _ancestors(b.graph.outputs)
        self.claims = [self._claim(names[v.name], v, own[v]) for v in own if v in live]
        """What has to be checked, in the order of the second model's nodes."""
        for value in b.graph.outputs:
            same = names.get(value.name)
            number = self._numbers_b.get(value)
            if same is not None and number != self._numbers_a[same]:
                self.claims.append(self._claim(same, value, number))
        self._common = {*self._numbers_b.values(), *own.values()}

    def share(self) -> float:
        """The share of the original's nodes that have to be run to check all claims."""
        return len(self.before(self.claims, ()).nodes) / max(1, len(self.a.graph))

    def _claim(self, before: ir.Value, after: ir.Value, number: int | None) -> Claim:
        twin = None if number is None else self._value_of.get(number)
        return Claim(before, after, twin)

    def twin(self, value: ir.Value) -> ir.Value | None:
        """The original's value that one of the second model is (taken to be) equal to."""
        number = self._numbers_b.get(value)
        return None if number is None else self._value_of.get(number)

    def after(self, claims: Iterable[Claim]) -> Part:
        """The second model's part up to the claims; its inputs all have a `twin`, or are the
        graph's own."""

        def known(value: ir.Value) -> bool:
            twin = self.twin(value)
            if twin is None:
                return False
            return ir.constant(twin) is None or ir.constant(value) is None

        return _part([claim.after for claim in claims if claim.twin is None], known)

    def before(self, claims: Iterable[Claim], wanted: Iterable[ir.Value]) -> Part:
        """The original's part from what both models have up to the claims.

        Wanted values that the part does not compute on the way are among its inputs.
        """

        def known(value: ir.Value) -> bool:
            return ir.constant(value) is None and self._numbers_a.get(value) in self._common

        part = _part([claim.before for claim in claims], known)
        part.inputs.update((v, None) for v in wanted if ir.constant(v) is None)
        part.settle()
        return part


def whole(outputs: Iterable[ir.Value]) -> Part:
    """All that computes some values, from the graph's inputs on."""
    return _part(outputs, lambda _: False)


def close(part: Part, graph: ir.Graph, most: int) -> bool:
    """Enlarge a part until no input of it depends on another one; False beyond `most` nodes.

    What lies between two inputs comes to belong to the part. So values for the inputs can be
    chosen freely, and none contradicts another.
    """
    while True:
        after = set(part.inputs)
        before = _ancestors(part.inputs)
        between: list[ir.Node] = []
        for node in graph:
            if any(value in after for value in operands(node)):
                after.update(node.outputs)
                if node not in part.nodes and any(value in before for value in node.outputs):
                    between.append(node)
        if not between:
            return True
        if len(part.nodes) + len(between) > most:
            return False
        for node in between:
            constants = part.add(node, lambda value: ir.constant(value) is None)
            part.nodes.update(p for v in constants if (p := v.producer()) is not None)
        part.settle()


def operands(node: ir.Node) -> Iterator[ir.Value]:
    """Everything that a node uses: its inputs, and what its subgraphs take from outside."""
    yield from (value for value in node.inputs if value is not None)
    yield from captured(node)


def extract(model: ir.Model, part: Part, outputs: Sequence[ir.Value], types: Types) -> ir.Model:
    """A model of its own of a part; tensors are shared, nodes and values are new.

    Its inputs are those of the part, in order. One that the part makes itself is given another
    name, and what uses it in the part takes what is fed. Inputs get no shape but a declared one:
    told sizes, ONNX Runtime refuses branches that are not taken and do not fit.
    """
    made = [value for value in part.inputs if part.computes(value)]
    view = ir.onnx_ir.GraphView(
        [value for value in part.inputs if value not in made],
        [*outputs, *made],
        nodes=[node for node in model.graph if node in part.nodes],
        initializers=list(part.constants),
        opset_imports=dict(model.graph.opset_imports),
        name=model.graph.name,
    )
    graph = view.clone()
    fed = dict(zip(view.inputs, graph.inputs, strict=True))
    for old, new in zip(made, graph.outputs[len(outputs) :], strict=True):
        fed[old] = ir.Value(name=f"{new.name}.fed", type=new.type, shape=new.shape)
        for use in tuple(new.uses()):
            use.node.replace_input_with(use.idx, fed[old])
    del graph.outputs[len(outputs) :]
    graph.inputs[:] = [fed[value] for value in part.inputs]
    for old, new in fed.items():
        new.const_value = None
        new.type = types.get(old, new.type)
    functions = [function.clone() for function in model.functions.values()]
    return ir.Model(graph, ir_version=model.ir_version, functions=functions)


def _part(outputs: Iterable[ir.Value], known: Callable[[ir.Value], bool]) -> Part:
    """What computes some values, back to what is `known`; an output itself is never known."""
    part = Part()
    stack = list(outputs)
    while stack:
        node = stack.pop().producer()
        if node is not None and node not in part.nodes:
            stack += part.add(node, known)
    return part


def _ancestors(values: Iterable[ir.Value]) -> set[ir.Value]:
    """The values, and all that they are computed from."""
    found = set(values)
    stack = list(found)
    while stack:
        node = stack.pop().producer()
        if node is not None:
            new = [value for value in operands(node) if value not in found]
            found.update(new)
            stack += new
    return found


def _values(graph: ir.Graph) -> Iterator[ir.Value]:
    yield from graph.inputs
    yield from graph.initializers.values()
    for node in graph:
        yield from node.outputs


def _may_equal(a: ir.Value, b: ir.Value) -> bool:
    """False where declared types or ranks show that two values of one name are not the same."""
    if a.type is not None and b.type is not None and a.type != b.type:
        return False
    return a.shape is None or b.shape is None or len(a.shape) == len(b.shape)
