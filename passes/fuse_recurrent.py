"""Fuse recurrent cells into LSTM, GRU and RNN: unrolled ones, and those in a Loop or Scan.

Why: what takes ten to fifteen kernels for each step of a sequence is one kernel for all of them.
Numerics: rounding.
Needs: float32, constant weights that all steps share, steps in order of one sequence, and a
sequence that is known to have a step, as ONNX Runtime's kernels fail or forget the state without
one; level 3 takes a sequence of free length to have one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from graphopt import ir
from graphopt.dims import DimLike, bounds
from graphopt.pass_manager import RewritePass
from graphopt.passes._cells import Cell, Reader
from graphopt.passes._recurrent import Layer, Weights
from graphopt.passes._slices import END, Span, sliced, split
from graphopt.passes._steps import Leaf, Step
from graphopt.passes._views import axes_arguments
from graphopt.passes.eliminate_zero_state import is_zero
from graphopt.rewriting import Op, Refuse, Rule, rewrite

_FEW_ROWS, _MANY_STEPS = 4, 8


def _require_faster(op: Op, cell: Cell, steps: int) -> None:
    """Raises Refuse where ONNX Runtime 1.32 is no faster with the operator on a CPU.

    Measured with 16 to 256 numbers a state: two LSTM or GRU cells in a row take 0.55 to 0.88 of
    the time as an operator, sixteen 0.19 to 0.75; one GRU cell 0.85 to 0.96, from 8 rows on 1.18
    to 1.27; one LSTM cell 0.94 to 1.03. RNN takes 0.43 to 0.9 with one row and sixteen steps,
    else up to 2.7.
    """
    rows = (op.shape(cell.hidden) or (None,))[0]
    few = isinstance(rows, int) and rows <= _FEW_ROWS
    if op.target.device != "cpu" or (cell.kind == "LSTM" and steps > 1):
        return
    if cell.kind == "LSTM" or (cell.kind == "GRU" and steps == 1 and not few):
        raise Refuse("ONNX Runtime is no faster with it on a CPU")
    if cell.kind == "RNN" and (rows != 1 or steps < _MANY_STEPS):
        raise Refuse("ONNX Runtime is slower with it on a CPU")


@dataclass(frozen=True)
class FuseRecurrent(RewritePass):
    """The rules; `nonempty` takes the word of the user that no sequence has length 0."""

    nonempty: bool = False

    def rules(self) -> Sequence[Rule]:
        nonempty = self.nonempty

        @rewrite.on("Mul", "Add", "Tanh", "Relu", benefit=12)
        def fuse_unrolled(op: Op, node: ir.Node) -> dict[ir.Value, ir.Value] | None:
            """A chain of equal cells over the steps of a sequence; the root is the last one."""
            return _unrolled(op, node)

        @rewrite.on("Loop", "Scan", benefit=12)
        def fuse_iterated(op: Op, node: ir.Node) -> dict[ir.Value, ir.Value] | None:
            """A body that is a cell."""
            return _iterated(op, node, nonempty)

        return fuse_unrolled, fuse_iterated


def _unrolled(op: Op, node: ir.Node) -> dict[ir.Value, ir.Value] | None:
    reader = Reader(op)
    last = reader.cell(node.outputs[0])
    if last is None or _goes_on(last):
        return None
    cells, steps = list[Cell](), list[Leaf]()
    weights: Weights | None = None
    cell, before = last, _previous(reader, last)
    while before is not None:
        others = _others(cell, before.hidden)
        found = Weights.of(cell, others[0], before.hidden) if len(others) == 1 else None
        if found is None or (weights is not None and not weights.equal(found)):
            break
        cells.insert(0, cell)
        steps.insert(0, *others)
        weights = weights or found
        cell, before = before, _previous(reader, before)
    if weights is None:
        return _single(op, last)
    start = None if before is not None else _first_step(cell, weights)
    if start is None:
        return _replaced(op, cells, steps, weights, cell.hidden, cells[0].before)
    first, hidden = start
    return _replaced(op, [cell, *cells], [first, *steps], weights, hidden, cell.before)


def _single(op: Op, cell: Cell) -> dict[ir.Value, ir.Value] | None:
    """A cell by itself, as a sequence of one step."""
    if cell.kind == "RNN" or cell.before is None:
        return None
    for h in list(_leaves(cell)):
        others = [leaf for leaf in _leaves(cell) if leaf is not h]
        if not isinstance(h, ir.Value) or op.shape(h) != op.shape(cell.hidden) or len(others) != 1:
            continue
        weights = Weights.of(cell, others[0], h)
        if weights is not None and (cell.kind == "LSTM" or h is cell.before):
            return _replaced(op, [cell], others, weights, h, cell.before)
    return None


def _leaves(cell: Cell) -> dict[Leaf, None]:
    """The step and the state that a cell reads, in the order in which it does."""
    gates = cell.gates if cell.linear_before_reset or cell.kind != "GRU" else cell.gates[:3]
    found = {leaf: None for gate in gates if gate is not None for leaf in gate.weights}
    return found | ({cell.before: None} if cell.kind == "GRU" and cell.before else {})


def _others(cell: Cell, state: ir.Value) -> list[Leaf]:
    return [leaf for leaf in _leaves(cell) if leaf is not state]


def _previous(reader: Reader, cell: Cell) -> Cell | None:
    """The cell whose state a cell goes on from."""
    values = [leaf for leaf in _leaves(cell) if isinstance(leaf, ir.Value)]
    if cell.kind == "GRU":
        values = [] if cell.before is None else [cell.before]
    for value in values:
        found = reader.cell(value)
        if found is None or found.kind != cell.kind or found.activation != cell.activation:
            continue
        if found.before is not None and found.linear_before_reset != cell.linear_before_reset:
            continue
        if cell.kind == "RNN" and not _shares_weights(cell, found):
            continue  # a layer below
        if cell.kind != "LSTM" or (found.state is cell.before and found.state is not None):
            return found
    return None


def _shares_weights(cell: Cell, other: Cell) -> bool:
    own, known = (
        [w for gate in c.gates if gate is not None for w in gate.weights.values()]
        for c in (other, cell)
    )
    return all(any(a is b or np.array_equal(a, b) for b in known) for a in own)


def _goes_on(cell: Cell) -> bool:
    """Whether another step uses the hidden state with the same weights."""
    own = {v for n in cell.nodes if n.op_type in ("Gemm", "MatMul") for v in n.inputs[1:2]}
    users = list(cell.hidden.consumers())
    users += [u for n in users if n.op_type == "Concat" for u in n.outputs[0].consumers()]
    if cell.kind == "GRU" and not cell.linear_before_reset:
        users += [u for n in users if n.op_type == "Mul" for u in n.outputs[0].consumers()]
    return any(
        u.op_type in ("Gemm", "MatMul") and u.inputs[1] in own and u not in cell.nodes
        for u in users
    )


def _first_step(cell: Cell, weights: Weights) -> tuple[Leaf, ir.Value | None] | None:
    """(step, hidden state or None for zeros) of the first cell of a chain, or None."""
    leaves = list(_leaves(cell))
    pairs: list[tuple[Leaf, Leaf | None]] = [(leaf, None) for leaf in leaves[:1]]
    if len(leaves) == 2:
        pairs = [(leaves[0], leaves[1]), (leaves[1], leaves[0])]
    for x, h in pairs if len(leaves) <= 2 else ():
        found = Weights.of(cell, x, h)
        if found is not None and weights.equal(found, first=h is None):
            return (x, h) if h is None or isinstance(h, ir.Value) else None
    return None


def _replaced(
    op: Op,
    cells: Sequence[Cell],
    steps: Sequence[Leaf],
    weights: Weights,
    hidden: ir.Value | None,
    state: ir.Value | None,
) -> dict[ir.Value, ir.Value]:
    """The states that something else uses, from the operator."""
    inner = {node: None for cell in cells for node in cell.nodes}
    last = cells[-1]
    kept = {last.state, *(cell.hidden for cell in cells)}
    for value in (v for node in inner for v in node.outputs if v not in kept):
        if _needed(value, inner):
            raise Refuse(f"{value.name!r} is used elsewhere")
    _require_faster(op, last, len(cells))
    sequence, reverse = _sequence(op, steps)
    states, *ends = Layer(last, weights, sequence, hidden, state, reverse).build(op)
    mapping: dict[ir.Value, ir.Value] = {}
    if last.state is not None and _needed(last.state, inner):
        mapping[last.state] = ends[1]
    in_time = [cell.hidden for cell in (reversed(cells) if reverse else cells)]
    stack = _stack_of(op, in_time)
    if stack is not None:
        value, axis, views = stack
        mapping[value] = op.Transpose(states, perm=[1, 0, 2]) if axis else states
        inner |= dict.fromkeys(views)
    used = [value for value in in_time if _needed(value, inner)]
    if used == [last.hidden]:
        return mapping | {last.hidden: ends[0]}
    parts = split(op, states, 0, [1] * len(cells)) if used else []
    axes, attributes = axes_arguments(op, [0])
    for value in used:
        mapping[value] = op.Squeeze(parts[in_time.index(value)], *axes, **attributes)
    return mapping


def _needed(value: ir.Value, inner: dict[ir.Node, None]) -> bool:
    return value.is_graph_output() or any(user not in inner for user in value.consumers())


def _stack_of(op: Op, values: Sequence[ir.Value]) -> tuple[ir.Value, int, set[ir.Node]] | None:
    """(result, axis 0 or 1, nodes before it) of a Concat that stacks all values in order."""
    for view in values[0].consumers():
        joins = view.outputs[0].consumers() if view.op_type in ("Unsqueeze", "Reshape") else ()
        for join in joins:
            views = [None if v is None else v.producer() for v in join.inputs]
            sources = [None if v is None else v.inputs[0] for v in views]
            if join.op_type != "Concat" or sources != list(values):
                continue
            before, after = op.shape(values[0]), op.shape(view.outputs[0])
            axis = op.attr(join, "axis", 0) % 3
            shapes = {op.shape(v) for v in join.inputs if v is not None}
            if before is None or axis > 1 or after != (*before[:axis], 1, *before[axis:]):
                continue
            if shapes == {after}:
                return join.outputs[0], axis, {v for v in views if v is not None}
    return None


def _sequence(op: Op, steps: Sequence[Leaf]) -> tuple[ir.Value, bool]:
    """(the sequence [T, B, in] whose steps these are, whether they are those from its end on).

    Raises:
        Refuse: they are no steps of one sequence, nor matrices of one shape.
    """
    first = steps[0]
    if isinstance(first, Step) and isinstance(first.place, int):
        places = [s.place for s in steps if isinstance(s, Step) and isinstance(s.place, int)]
        rising = places == [first.place + i for i in range(len(steps))]
        falling = places == [first.place - i for i in range(len(steps))]
        same = all(
            isinstance(s, Step) and (s.source, s.axis) == (first.source, first.axis) for s in steps
        )
        if same and (rising or falling):
            return _in_time(op, first, min(places), max(places) + 1), falling
    shapes = [op.shape(s) for s in steps if isinstance(s, ir.Value)]
    if len(shapes) != len(steps) or shapes[0] is None or any(s != shapes[0] for s in shapes):
        raise Refuse("its steps are not those of one sequence in order")
    axes, attributes = axes_arguments(op, [0])
    parts = [op.Unsqueeze(s, *axes, **attributes) for s in steps if isinstance(s, ir.Value)]
    return op.Concat(*parts, axis=0), False


def _in_time(op: Op, step: Step, start: int, end: int | None) -> ir.Value:
    """Steps of a sequence along the first axis."""
    source, axis, shape = step.source, step.axis, op.shape(step.source)
    if shape is None or len(shape) != 3 or axis > 1:
        raise Refuse("the sequence has other axes")
    if start or (end is not None and shape[axis] != end):
        source = sliced(op, source, {axis: Span(start, END if end is None else end, 1)})
    return op.Transpose(source, perm=[1, 0, 2]) if axis else source


def _iterated(op: Op, node: ir.Node, nonempty: bool) -> dict[ir.Value, ir.Value] | None:
    body = next(ir.subgraphs(node), None)
    count = op.attr(node, "num_scan_inputs", 0)
    if body is None or len(body.inputs) != len(node.inputs) or op.opset < 9:
        return None
    loop = node.op_type == "Loop"
    first, offset = (2, 1) if loop else (0, 0)
    states = len(node.inputs) - first - count
    outputs = [ir.behind_identities(value) for value in body.outputs]
    if states not in (1, 2) or (loop and not _goes_through(op, node, body, outputs[0])):
        return None
    axes = op.attr(node, "scan_input_axes", [0] * count)
    scanned = {
        inner: Step(outer, axis, body.inputs[-1])
        for inner, outer, axis in zip(
            body.inputs[first + states :], node.inputs[first + states :], axes, strict=True
        )
        if outer is not None and axis >= 0
    }
    entries = body.inputs[first : first + states]
    results = outputs[offset:]
    place = body.inputs[0] if loop else body.inputs[-1]
    reader = Reader(op, scanned)
    for index in range(states):
        cell = reader.cell(results[index])
        leaves = [] if cell is None else _others(cell, entries[index])
        x = next(iter(leaves), None)
        if cell is None or len(leaves) != 1 or not isinstance(x, Step) or x.place is not place:
            continue
        weights = Weights.of(cell, x, entries[index])
        pair = cell.state is results[1 - index] and cell.before is entries[1 - index]
        if weights is None or x.source.graph is body or states != 1 + (cell.kind == "LSTM"):
            continue
        if (states == 2 and not pair) or any(v is not cell.hidden for v in results[states:]):
            continue
        first_states = [node.inputs[first + i] for i in (index, 1 - index)[:states]]
        length = _length(op, node, x, nonempty)
        _require_faster(op, cell, length or _MANY_STEPS)
        return _layer_of(op, node, cell, weights, x, first_states, length, index)
    return None


def _goes_through(op: Op, node: ir.Node, body: ir.Graph, condition: ir.Value) -> bool:
    """Whether a Loop runs as often as its trip count says."""
    started = node.inputs[1] is None or op.scalar(node.inputs[1]) is True
    return started and (condition is body.inputs[1] or op.scalar(condition) is True)


def _length(op: Op, node: ir.Node, x: Step, nonempty: bool) -> int | None:
    """How many steps a Loop takes from the first on, None for all.

    Raises:
        Refuse: that is not known, or may be none.
    """
    size = (op.shape(x.source) or ())[x.axis]
    length: DimLike = size
    if node.op_type == "Loop":
        trips = None if node.inputs[0] is None else op.values(node.inputs[0])
        if trips is None or trips.size != 1:
            raise Refuse("how often it runs is not known")
        length = trips.item()
    both = isinstance(length, int) and isinstance(size, int) and length <= size
    if length != size and not both:
        raise Refuse("how often it runs is not proven to be the length of the sequence")
    if not nonempty and (length if isinstance(length, int) else bounds(length)[0]) < 1:
        raise Refuse("the sequence may have no step")
    if length == 0:
        raise Refuse("it never runs")
    return length if isinstance(length, int) else None


def _layer_of(
    op: Op,
    node: ir.Node,
    cell: Cell,
    weights: Weights,
    x: Step,
    first: Sequence[ir.Value | None],
    length: int | None,
    index: int,
) -> dict[ir.Value, ir.Value]:
    """The outputs of a Loop or Scan of a cell, whose hidden state is output `index`."""
    states = len(first)
    scans = list(node.outputs)[states:]
    reverse = 1 in op.attr(node, "scan_input_directions", [])
    directions = op.attr(node, "scan_output_directions", [0] * len(scans))
    if any(bool(direction) != reverse for direction in directions):
        raise Refuse("its outputs are in another order than its inputs")
    zeros = [None if v is None or is_zero(op, v) else v for v in first]
    hidden, state = [*zeros, None][:2]
    sequence = _in_time(op, x, 0, length)
    made = Layer(cell, weights, sequence, hidden, state, reverse).build(op)
    mapping = {node.outputs[index]: made[1]}
    if states == 2:
        mapping[node.outputs[1 - index]] = made[2]
    for value, axis in zip(scans, op.attr(node, "scan_output_axes", [0] * len(scans)), strict=True):
        if axis not in (0, 1):
            raise Refuse("its outputs are along another axis")
        mapping[value] = op.Transpose(made[0], perm=[1, 0, 2]) if axis else made[0]
    return mapping
