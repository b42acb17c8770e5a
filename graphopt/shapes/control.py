"""Inference through control flow, function calls, sequences and optionals."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from graphopt import ir
from graphopt.dims import Dim, DimLike, maximum
from graphopt.shapes.call import NOTHING, Call, Fact, Shape, Unknown, axis_of

if TYPE_CHECKING:
    from graphopt.shapes import Shapes

FactRule = Callable[[Call], Sequence[Fact]]

_ROUNDS = 8  # of widening a loop's carried shapes, before all is given up
_MAX_DEPTH = 64  # calls of functions within functions within ...


def element_of(kind: ir.SequenceType | ir.OptionalType) -> Fact:
    """What a file's sequence or optional type says of the members."""
    inner = kind.elem_type
    if isinstance(inner, ir.SequenceType | ir.OptionalType):
        return Fact(None, None, element=element_of(inner))
    return Fact(inner.dtype, None)


def _graph(call: Call, name: str) -> ir.Graph:
    attr = call.node.attributes.get(name)
    if attr is None or attr.is_ref():
        raise Unknown
    return attr.as_graph()


def if_(call: Call) -> list[Fact]:
    """The branch that a known condition takes, or what both have in common."""
    condition = call.inputs[0].values if call.inputs and call.inputs[0] else None
    taken = None
    if condition is not None and condition.size == 1:
        taken = "then_branch" if condition.item() else "else_branch"
    branches: dict[str, list[Fact]] = {}
    for name in ("then_branch", "else_branch"):
        graph = _graph(call, name)
        certain = name == taken
        call.shapes.conditional += not certain
        try:
            call.shapes.infer_graph(graph, call.root)
        finally:
            call.shapes.conditional -= not certain
        branches[name] = [call.shapes.fact(value) for value in graph.outputs]
    if taken is not None:
        return branches[taken]
    pairs = zip(branches["then_branch"], branches["else_branch"], strict=True)
    return [_common(call, a, b, i) for i, (a, b) in enumerate(pairs)]


def _common(call: Call, a: Fact, b: Fact, output: int) -> Fact:
    """What holds of both facts: sizes that differ become one unknown size."""
    dtype = a.dtype if a.dtype == b.dtype else None
    element = None
    if a.element is not None and b.element is not None:
        element = _member(a.element, b.element)
    if a.shape is None or b.shape is None or len(a.shape) != len(b.shape):
        return Fact(dtype, None, element=element)
    pairs = enumerate(zip(a.shape, b.shape, strict=True))
    shape = tuple([x if x == y else call.fresh(axis, output) for axis, (x, y) in pairs])
    values = None
    if a.values is not None and b.values is not None and a.values.tolist() == b.values.tolist():
        values = a.values
    return Fact(dtype, shape, values, element=element)


def _member(a: Fact, b: Fact) -> Fact:
    """What holds of every member of a sequence, given two of them."""
    dtype = a.dtype if a.dtype == b.dtype else None
    element = _member(a.element, b.element) if a.element and b.element else None
    return Fact(dtype, a.shape if a.shape == b.shape else None, element=element)


def infer_bodies(call: Call) -> None:
    """The bodies of an operator that no rule covers, their inputs unknown."""
    shapes = call.shapes
    outer = shapes.body
    shapes.conditional += 1
    try:
        for body in ir.subgraphs(call.node):
            shapes.body = body
            shapes.infer_graph(body, call.root)
    finally:
        shapes.body = outer
        shapes.conditional -= 1


def _iterate(call: Call, body: ir.Graph, start: int, state: list[Fact], given: list[Fact]) -> None:
    """Infer a body whose carried values keep their facts from one iteration to the next.

    `given` are the facts of the body's first `start` inputs and of what follows the carried ones.
    Carried facts are widened until the body gives back what it was given.
    """
    shapes = call.shapes
    outer = shapes.body
    shapes.body = body
    shapes.conditional += 1
    first = 1 if start else 0  # Loop's condition comes before the carried outputs
    try:
        for value, fact in zip(
            [*body.inputs[:start], *body.inputs[start + len(state) :]], given, strict=True
        ):
            shapes.facts[value] = fact
        for _ in range(_ROUNDS):
            if not shapes.spend(len(body)):
                break
            for value, fact in zip(body.inputs[start:], state, strict=False):
                shapes.facts[value] = fact
            shapes.infer_graph(body, call.root)
            changed = False
            for i, fact in enumerate(state):
                value = body.inputs[start + i]
                wider = _widen(call, value, fact, shapes.fact(body.outputs[first + i]), body)
                if wider is not fact:
                    state[i], changed = wider, True
            if not changed:
                return
        state[:] = [NOTHING] * len(state)
        for value in body.inputs[start : start + len(state)]:
            shapes.facts[value] = NOTHING
        shapes.infer_graph(body, call.root)
    finally:
        shapes.body = outer
        shapes.conditional -= 1


def _widen(call: Call, value: ir.Value, before: Fact, after: Fact, body: ir.Graph) -> Fact:
    """`before` where it holds for `after` too, else the narrowest fact that holds for both."""
    element = before.element
    if element is not None:
        element = _member(element, after.element or NOTHING)
    dtype = before.dtype if before.dtype == after.dtype else None
    shape = before.shape
    if shape is not None:
        if after.shape is None or len(after.shape) != len(shape):
            shape = None
        else:
            pairs = enumerate(zip(shape, after.shape, strict=True))
            shape = tuple(
                [x if x == y else call.shapes.mint(value, "fresh", axis) for axis, (x, y) in pairs]
            )
    if shape == before.shape and dtype == before.dtype:
        same = element is None or (
            before.element is not None
            and (element.shape, element.dtype) == (before.element.shape, before.element.dtype)
        )
        if same:
            return before
    return Fact(dtype, shape, element=element)


def _outside(call: Call, body: ir.Graph, fact: Fact, output: int) -> Fact:
    """A carried value after the loop: what speaks of one iteration only is an unknown size."""
    shape = fact.shape
    if shape is not None:
        shape = tuple(
            [
                call.fresh(axis, output) if call.shapes.is_local(size, body) else size
                for axis, size in enumerate(shape)
            ]
        )
    element = fact.element
    if element is not None:
        element = Fact(element.dtype, _closed(call, body, element.shape), element=element.element)
    return Fact(fact.dtype, shape, element=element)


def _closed(call: Call, body: ir.Graph, shape: Shape | None) -> Shape | None:
    if shape is None or any(call.shapes.is_local(size, body) for size in shape):
        return None
    return shape


def loop(call: Call) -> list[Fact]:
    """Carried values keep what every iteration keeps; stacked ones get the trip count in front."""
    body = _graph(call, "body")
    carried = [call.fact(i).without_values() for i in range(2, len(call.inputs))]
    counter, flag = Fact(ir.DataType.INT64, ()), Fact(ir.DataType.BOOL, ())
    _iterate(call, body, 2, carried, [counter, flag])
    facts = [_outside(call, body, fact, i) for i, fact in enumerate(carried)]
    trips = _trips(call, body)
    for i, value in enumerate(body.outputs[1 + len(carried) :], len(carried)):
        fact = call.shapes.fact(value)
        shape = fact.shape
        if shape is not None:
            inner = _outside(call, body, Fact(fact.dtype, (0, *shape)), i).shape or ()
            shape = (call.fresh(0, i) if trips is None else trips, *inner[1:])
        facts.append(Fact(fact.dtype, shape))
    return facts


def _trips(call: Call, body: ir.Graph) -> DimLike | None:
    """The number of iterations where nothing ends the loop early."""
    if not call.has(0):
        return None
    if call.has(1):
        start = call.fact(1).values
        if start is None or start.item() is not True:
            return None
    goes_on = body.outputs[0]
    flag = call.shapes.fact(goes_on).values
    always = flag is not None and flag.item() is True
    producer = goes_on.producer()
    if producer is not None and producer.op_type == "Identity":
        goes_on = producer.inputs[0] or goes_on
    if not always and goes_on is not body.inputs[1]:
        return None
    count = call.vector(0)[0]
    return count if call.nonnegative(count) else maximum(count, 0)


def scan(call: Call) -> list[Fact]:
    """Scanned inputs lose an axis inside, scanned outputs gain it (opset 9 and later)."""
    if call.opset < 9:
        infer_bodies(call)
        raise Unknown
    body = _graph(call, "body")
    scanned = call.attr("num_scan_inputs", int, 0)
    states = len(call.inputs) - scanned
    axes = call.attr_ints("scan_input_axes") or [0] * scanned
    given: list[Fact] = []
    length: DimLike | None = None
    for i, axis in enumerate(axes):
        fact = call.fact(states + i)
        shape = fact.shape
        if shape is not None:
            axis = axis_of(axis, len(shape))
            length = shape[axis] if length is None or isinstance(length, Dim) else length
            shape = shape[:axis] + shape[axis + 1 :]
        given.append(Fact(fact.dtype, shape))
    state = [call.fact(i).without_values() for i in range(states)]
    _iterate(call, body, 0, state, given)
    facts = [_outside(call, body, fact, i) for i, fact in enumerate(state)]
    out_axes = call.attr_ints("scan_output_axes")
    for i, value in enumerate(body.outputs[states:]):
        fact = call.shapes.fact(value)
        inner = fact.shape
        if inner is not None:
            axis = axis_of(out_axes[i] if out_axes else 0, len(inner) + 1)
            stacked = (*inner[:axis], 0, *inner[axis:])
            inner = _outside(call, body, Fact(fact.dtype, stacked), states + i).shape or ()
            steps = call.fresh(axis, states + i) if length is None else length
            inner = (*inner[:axis], steps, *inner[axis + 1 :])
        facts.append(Fact(fact.dtype, inner))
    return facts


@contextmanager
def calling(shapes: Shapes, node: ir.Node) -> Generator[ir.Function]:
    """Within the context, `shapes` tells of a function's body what holds in this call of it."""
    function = shapes.model.functions[node.op_identifier()]
    outer = shapes.facts, shapes.arguments, shapes.site
    arguments = {name: attr for name, attr in function.attributes.items() if attr.value is not None}
    for name, attr in node.attributes.items():
        bound = shapes.bound(attr) if attr.is_ref() else attr
        if bound is not None:
            arguments[name] = bound
    inside: dict[ir.Value, Fact] = dict.fromkeys(function.inputs, NOTHING)
    for value, given in zip(function.inputs, node.inputs, strict=False):
        if given is not None:
            inside[value] = shapes.fact(given)
    shapes.facts, shapes.arguments, shapes.site = inside, arguments, (*shapes.site, node)
    try:
        if len(shapes.site) <= _MAX_DEPTH and shapes.spend(len(function.graph)):
            shapes.infer_graph(function.graph, function.graph)
        yield function
    finally:
        shapes.facts, shapes.arguments, shapes.site = outer


def call_function(call: Call) -> list[Fact]:
    """A function's outputs for these inputs; what is inferred inside is not kept."""
    with calling(call.shapes, call.node) as function:
        return [call.shapes.fact(value) for value in function.outputs]


def infer_functions(shapes: Shapes) -> None:
    """The functions' own bodies, with inputs of which nothing is known."""
    shapes.conditional += 1
    try:
        for function in shapes.model.functions.values():
            shapes.infer_graph(function.graph, function.graph)
    finally:
        shapes.conditional -= 1


def _sequence(call: Call) -> list[Fact]:
    """SequenceConstruct, SequenceInsert: what holds of all members."""
    members = [call.fact(i) for i in range(len(call.inputs))]
    if call.node.op_type == "SequenceInsert":
        element = members[0].element
        if element is None:
            raise Unknown
        members = members[1:2] if element.dtype is None else [element, members[1]]
    common = members[0].without_values()
    for member in members[1:]:
        common = _member(common, member)
    return [Fact(None, None, element=common)]


def _empty(call: Call) -> list[Fact]:
    """SequenceEmpty: nothing contradicts the first member that comes, but for its type."""
    dtype = ir.DataType(call.attr("dtype", int, int(ir.DataType.FLOAT)))
    return [Fact(None, None, element=Fact(dtype, None))]


def _at(call: Call) -> list[Fact]:
    """SequenceAt: any member."""
    element = call.fact(0).element
    return [NOTHING if element is None else element]


def _same(call: Call) -> list[Fact]:
    """SequenceErase: what holds of all members holds of those that stay."""
    return [call.fact(0)]


def _split_sequence(call: Call) -> list[Fact]:
    """SplitToSequence: members of one size, or of which the axis is not known."""
    fact = call.fact(0)
    shape = fact.shape
    if shape is None or call.has(1):
        return [Fact(None, None, element=Fact(fact.dtype, None))]
    axis = axis_of(call.attr("axis", int, 0), len(shape))
    kept = (1,) if call.attr("keepdims", int, 1) else ()
    return [Fact(None, None, element=Fact(fact.dtype, (*shape[:axis], *kept, *shape[axis + 1 :])))]


def _concat_sequence(call: Call) -> list[Fact]:
    """ConcatFromSequence: one axis is not known."""
    element = call.fact(0).element
    if element is None:
        raise Unknown
    shape = element.shape
    if shape is not None:
        new = call.attr("new_axis", int, 0)
        axis = axis_of(call.attr("axis", int, 0), len(shape) + new)
        shape = (*shape[:axis], call.fresh(axis), *shape[axis + (not new) :])
    return [Fact(element.dtype, shape)]


def _length(call: Call) -> list[Fact]:
    return [Fact(ir.DataType.INT64, ())]


def _optional(call: Call) -> list[Fact]:
    return [Fact(None, None, element=call.fact(0).without_values())]


def _optional_element(call: Call) -> list[Fact]:
    """OptionalGetElement: the member; from opset 18 a plain tensor stands for itself."""
    fact = call.fact(0)
    return [fact if fact.dtype is not None else fact.element or NOTHING]


def _has_element(call: Call) -> list[Fact]:
    return [Fact(ir.DataType.BOOL, ())]


RULES: dict[str, FactRule] = {
    "ConcatFromSequence": _concat_sequence,
    "If": if_,
    "Loop": loop,
    "Optional": _optional,
    "OptionalGetElement": _optional_element,
    "OptionalHasElement": _has_element,
    "Scan": scan,
    "SequenceAt": _at,
    "SequenceConstruct": _sequence,
    "SequenceEmpty": _empty,
    "SequenceErase": _same,
    "SequenceInsert": _sequence,
    "SequenceLength": _length,
    "SplitToSequence": _split_sequence,
}
