"""Rules of operators that move elements: their outputs' axes are rearrangements of atoms."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from graphopt import ir
from graphopt.dims import DimLike, equal
from graphopt.pruner.atoms import Axis, fixed
from graphopt.pruner.rules_linear import optional
from graphopt.pruner.rules_pointwise import integers
from graphopt.pruner.tracing import Axes, Rule, Trace, Unknown

__all__ = ["MOVES", "slices"]

_FEW = 4  # parts of a split axis: so few are rather shuffled groups than heads


def _follow(trace: Trace, node: ir.Node) -> None:
    """Zeros stay zeros where they are only moved."""
    values = [value for value in node.inputs if value is not None]
    data = values if node.op_type == "Concat" else values[:1]
    if all(v in trace.vanishing or ir.constant(v) is not None for v in data):
        trace.vanishing.update(node.outputs)


def _concat(trace: Trace, node: ir.Node) -> Sequence[Axes]:
    operands = [trace.of(value) for value in node.inputs]
    rank = max(trace.rank(value) for value in node.inputs)
    axis = int(str(ir.attribute(node, "axis", 1))) % rank
    made: Axes = []
    for index in range(rank):
        column = [item[index] for item in operands]
        if index != axis:
            for other in column[1:]:
                trace.unite(column[0], other, node)
            made.append(max(column, key=len))
            continue
        if any(not part.size for part in column):
            for part in column:
                trace.atoms.freeze(part, f"joined with a free axis at {ir.label(node)}")
            made.append(fixed(0))
            continue
        made.append(np.concatenate(column))
    _follow(trace, node)
    return [made]


def _split(trace: Trace, node: ir.Node) -> Sequence[Axes]:
    x = trace.of(node.inputs[0])
    axis = int(str(ir.attribute(node, "axis", 0))) % trace.rank(node.inputs[0])
    sizes = [trace.size(value, axis) for value in node.outputs]
    if not x[axis].size or sum(sizes) != len(x[axis]):
        raise Unknown("the sizes are unknown")
    parts = np.split(x[axis], np.cumsum(sizes)[:-1])
    _follow(trace, node)
    return [[part if i == axis else a for i, a in enumerate(x)] for part in parts]


def slices(trace: Trace, node: ir.Node) -> list[tuple[int, int, int, int]]:
    """The axis, start, end and step of each slice, as they are given. Raises Unknown."""
    rank = trace.rank(node.inputs[0])
    starts = integers(trace, node, "starts", 1)
    ends = integers(trace, node, "ends", 2)
    axes = integers(trace, node, "axes", 3)
    steps = integers(trace, node, "steps", 4)
    if starts is None or ends is None:
        raise Unknown("the bounds are missing")
    axes = [axis % rank for axis in axes or range(len(starts))]
    return list(zip(axes, starts, ends, steps or [1] * len(starts), strict=True))


def _slice(trace: Trace, node: ir.Node) -> Sequence[Axes]:
    x = list(trace.of(node.inputs[0]))
    try:
        parts = slices(trace, node)
    except Unknown:
        axes = integers(trace, node, "axes", 3)
        if axes is None:
            raise
        free = trace.fixed(node.outputs[0])
        for axis in axes:
            trace.atoms.freeze(x[axis], f"cut at computed bounds by {ir.label(node)}")
            x[axis] = free[axis] if free else fixed(0)
        return [x]
    for axis, start, end, step in parts:
        if not x[axis].size:
            continue
        if step != 1:
            trace.atoms.freeze(x[axis], f"cut with a step by {ir.label(node)}")
        stop = None if step < 0 and end < -len(x[axis]) else end
        x[axis] = x[axis][slice(start, stop, step)]
    _follow(trace, node)
    return [x]


def _gather(trace: Trace, node: ir.Node) -> Sequence[Axes]:
    """Constant indices of an activation pick atoms; of a table every row stays."""
    x = trace.of(node.inputs[0])
    axis = int(str(ir.attribute(node, "axis", 0))) % trace.rank(node.inputs[0])
    indices = ir.array(node.inputs[1])
    _follow(trace, node)
    if indices is not None and indices.ndim == 1 and x[axis].size:
        return [[*x[:axis], x[axis][indices.astype(np.int64)], *x[axis + 1 :]]]
    trace.atoms.freeze(x[axis], f"rows are picked by {ir.label(node)}")
    picked = [fixed(size) for size in indices.shape] if indices is not None else None
    made = trace.of(node.inputs[1]) if picked is None else picked
    return [[*x[:axis], *made, *x[axis + 1 :]]]


def _transpose(trace: Trace, node: ir.Node) -> Sequence[Axes]:
    x = trace.of(node.inputs[0])
    order = integers(trace, node, "perm", None) or list(range(trace.rank(node.inputs[0])))[::-1]
    _follow(trace, node)
    return [[x[axis] for axis in order]]


def _squeeze(trace: Trace, node: ir.Node) -> Sequence[Axes]:
    x = trace.of(node.inputs[0])
    rank = trace.rank(node.inputs[0])
    axes = integers(trace, node, "axes", 1)
    if axes is None:
        axes = [index for index, axis in enumerate(x) if len(axis) == 1]
        if any(not axis.size for axis in x):
            raise Unknown("axes of unknown size")
    gone = {axis % rank for axis in axes}
    _follow(trace, node)
    return [[axis for index, axis in enumerate(x) if index not in gone]]


def _unsqueeze(trace: Trace, node: ir.Node) -> Sequence[Axes]:
    x = trace.of(node.inputs[0])
    axes = integers(trace, node, "axes", 1)
    if axes is None:
        raise Unknown("the axes are missing")
    rank = trace.rank(node.inputs[0]) + len(axes)
    new = {axis % rank for axis in axes}
    rest = iter(x)
    _follow(trace, node)
    return [[fixed(1) if index in new else next(rest) for index in range(rank)]]


def _expand(trace: Trace, node: ir.Node) -> Sequence[Axes]:
    x = trace.of(node.inputs[0])
    made = trace.fixed(node.outputs[0])
    if len(made) < len(x):
        raise Unknown("the rank is unknown")
    for back in range(1, len(x) + 1):
        if x[-back].size and len(made[-back]) == len(x[-back]):
            made[-back] = x[-back]
        else:
            trace.atoms.freeze(x[-back], f"repeated by {ir.label(node)}")
    _follow(trace, node)
    return [made]


def _tile(trace: Trace, node: ir.Node) -> Sequence[Axes]:
    x = trace.of(node.inputs[0])
    repeats = integers(trace, node, "repeats", 1)
    if repeats is None:
        raise Unknown("the repeats are missing")
    _follow(trace, node)
    return [[np.tile(axis, count) for axis, count in zip(x, repeats, strict=True)]]


def _pad(trace: Trace, node: ir.Node) -> Sequence[Axes]:
    """What is padded is pruned like the rest: fewer elements are put there then."""
    x = list(trace.of(node.inputs[0]))
    rank = trace.rank(node.inputs[0])
    pads = integers(trace, node, "pads", 1)
    axes = integers(trace, node, "", 3) or list(range(rank))
    if pads is None:
        raise Unknown("the pads are missing")
    constant = str(ir.attribute(node, "mode", "constant")) == "constant"
    for index, axis in enumerate(axes):
        before, after = pads[index], pads[index + len(axes)]
        if not (before or after) or not x[axis].size:
            continue
        if not constant or before < 0 or after < 0:
            trace.atoms.freeze(x[axis], f"padded by {ir.label(node)}")
            x[axis] = trace.fixed(node.outputs[0])[axis]
        elif trace.atoms.live(x[axis]):
            news = trace.atoms.fresh(max(before + after, 2))
            x[axis] = np.concatenate([news[:before], x[axis], news[before : before + after]])
        else:
            x[axis] = fixed(len(x[axis]) + before + after)
    value = optional(node, 2)
    filler = ir.array(value) if value is not None else np.asarray(ir.attribute(node, "value", 0.0))
    if filler is not None and not filler.any():
        _follow(trace, node)
    return [x]


def _resize(trace: Trace, node: ir.Node) -> Sequence[Axes]:
    x = trace.of(node.inputs[0])
    made = trace.fixed(node.outputs[0])
    if len(made) != trace.rank(node.inputs[0]):
        raise Unknown("the rank is unknown")
    before, after = trace.shape(node.inputs[0]), trace.shape(node.outputs[0])
    for axis in range(len(x)):
        if before is not None and after is not None and equal(before[axis], after[axis]):
            made[axis] = x[axis]
        else:
            trace.atoms.freeze(x[axis], f"resized by {ir.label(node)}")
    _follow(trace, node)
    return [made]


def _depth_to_space(trace: Trace, node: ir.Node) -> Sequence[Axes]:
    x = trace.of(node.inputs[0])
    block = int(str(ir.attribute(node, "blocksize", 1)))
    free = trace.fixed(node.outputs[0])
    if node.op_type == "SpaceToDepth":
        made = np.tile(x[1], block * block)
    else:
        parts = x[1].reshape(block * block, -1)
        if str(ir.attribute(node, "mode", "DCR")) == "CRD":
            parts = x[1].reshape(-1, block * block).T
        made = np.ascontiguousarray(parts[0])
        for part in parts[1:]:
            trace.unite(made, np.ascontiguousarray(part), node)
    for axis in x[2:]:
        trace.atoms.freeze(axis, f"a spatial axis of {ir.label(node)}")
    _follow(trace, node)
    return [[x[0], made, *free[2:]]]


def _reshape(trace: Trace, node: ir.Node) -> Sequence[Axes]:
    """Axes merge and split within bundles of equal size."""
    x = trace.of(node.inputs[0])
    made = trace.fixed(node.outputs[0])
    before, after = trace.shape(node.inputs[0]), trace.shape(node.outputs[0])
    if before is None or after is None or len(x) != len(before):
        raise Unknown("a rank is unknown")
    for sources, results in _bundles(before, after):
        if len(sources) == len(results) == 1:
            made[results[0]] = x[sources[0]]
            continue
        wide = [axis for axis in sources if before[axis] != 1]
        out = [axis for axis in results if after[axis] != 1]
        live = [axis for axis in wide if trace.atoms.live(x[axis])]
        static = all(isinstance(before[axis], int) for axis in wide)
        static = static and all(isinstance(after[axis], int) for axis in out)
        if not live or not static:
            for axis in live:
                trace.atoms.freeze(x[axis], f"merged with a free axis by {ir.label(node)}")
            continue
        _rearrange(trace, node, [x[axis] for axis in wide], made, out)
    _follow(trace, node)
    return [made]


def _bundles(
    before: Sequence[DimLike], after: Sequence[DimLike]
) -> Iterator[tuple[list[int], list[int]]]:
    """Groups of neighbouring axes of as many elements: the shortest ones, from either side."""
    left = list(_match(before, after))
    used = (sum(len(a) for a, _ in left), sum(len(b) for _, b in left))
    yield from left
    rest_before, rest_after = before[used[0] :], after[used[1] :]
    right = list(_match(rest_before[::-1], rest_after[::-1]))
    for sources, results in right:
        yield (
            sorted(len(before) - 1 - axis for axis in sources),
            sorted(len(after) - 1 - axis for axis in results),
        )
    middle = len(before) - sum(len(a) for a, _ in right), len(after) - sum(len(b) for _, b in right)
    if middle[0] > used[0] or middle[1] > used[1]:
        yield list(range(used[0], middle[0])), list(range(used[1], middle[1]))


def _match(
    before: Sequence[DimLike], after: Sequence[DimLike]
) -> Iterator[tuple[list[int], list[int]]]:
    """Bundles from the first axis on, until one would hold a size that is not known."""
    a = b = 0
    while a < len(before) and b < len(after):
        first, second = a, b
        p, q = before[a], after[b]
        a, b = a + 1, b + 1
        while not equal(p, q):
            if not isinstance(p, int) or not isinstance(q, int) or not p or not q:
                return
            if p < q and a < len(before):
                p, a = p * before[a], a + 1
            elif q < p and b < len(after):
                q, b = q * after[b], b + 1
            else:
                return
        if a == len(before) and all(equal(size, 1) for size in after[b:]):
            b = len(after)
        if b == len(after) and all(equal(size, 1) for size in before[a:]):
            a = len(before)
        yield list(range(first, a)), list(range(second, b))


def _rearrange(trace: Trace, node: ir.Node, x: list[Axis], made: Axes, out: list[int]) -> None:
    """The atoms of one live axis, repeated over the others of its bundle, in the new shape."""
    live = [index for index, axis in enumerate(x) if trace.atoms.live(axis)]
    for index in live[1:]:
        trace.atoms.freeze(x[index], f"merged with another axis by {ir.label(node)}")
    sizes = [len(axis) for axis in x]
    turned = [1] * len(x)
    turned[live[0]] = sizes[live[0]]
    grid = np.broadcast_to(x[live[0]].reshape(turned), sizes)
    table = grid.reshape([len(made[axis]) for axis in out])
    if len(out) == 1:
        made[out[0]] = table.ravel()
        return
    roots = trace.atoms.roots(table.ravel()).reshape(table.shape)
    whole = len(np.unique(roots))
    ranked: list[tuple[int, tuple[int, int], int]] = []
    for index in range(table.ndim):
        rows = np.moveaxis(roots, index, 0).reshape(table.shape[index], -1)
        if (rows == rows[:1]).all():
            continue  # the atoms do not vary along it
        pairs = np.arange(len(rows))[:, None] * len(trace.atoms) + rows
        kinds = len(np.unique(pairs))  # as many as rows: nothing new belongs together
        cost = 0 if kinds == len(rows) == whole else 1 if kinds == whole else 2
        ranked.append((cost, _preference(table.shape, index), index))
    candidates = [index for _, _, index in sorted(ranked)]
    index = trace.choices.get(node, candidates[0] if candidates else 0)
    rows = np.moveaxis(table, index, 0).reshape(table.shape[index], -1)
    for column in range(1, rows.shape[1]):
        trace.unite(np.ascontiguousarray(rows[:, 0]), np.ascontiguousarray(rows[:, column]), node)
    made[out[index]] = np.ascontiguousarray(rows[:, 0])
    if len(candidates) > 1:
        trace.chosen[node] = (index, candidates, made[out[index]])


def _preference(shape: tuple[int, ...], axis: int) -> tuple[int, int]:
    """Heads of [3, heads, size] and [heads, size]; channels of [few groups, channels]."""
    wanted = 1 if len(shape) == 3 or shape[0] <= _FEW else 0
    return (axis != wanted, -shape[axis])


def _identity(trace: Trace, node: ir.Node) -> Sequence[Axes]:
    _follow(trace, node)
    return [list(trace.of(node.inputs[0]))]


_ALONG: dict[str, Rule] = {
    "Concat": _concat,
    "DepthToSpace": _depth_to_space,
    "Expand": _expand,
    "Flatten": _reshape,
    "Gather": _gather,
    "Pad": _pad,
    "Reshape": _reshape,
    "Resize": _resize,
    "ReverseSequence": _identity,
    "Slice": _slice,
    "SpaceToDepth": _depth_to_space,
    "Split": _split,
    "Squeeze": _squeeze,
    "Tile": _tile,
    "Transpose": _transpose,
    "Trilu": _identity,
    "Unsqueeze": _unsqueeze,
    "Upsample": _resize,
}
MOVES: dict[tuple[str, str], Rule] = {("", op): rule for op, rule in _ALONG.items()}
