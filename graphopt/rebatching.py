"""Another batch size for a model whose inputs, and often constants inside, say an old one.

The batch axis is followed through the graph as a symbol. A Reshape whose target spells the old
size out is rewritten where the place of the batch among the new dimensions is certain: in row
order the elements before it are as many as before. What is not certain is refused by name.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, cast

import numpy as np

from graphopt import ir
from graphopt.closeness import Gauge
from graphopt.context import Context
from graphopt.dims import Dim, DimLike, atoms
from graphopt.errors import GraphoptError, InputError
from graphopt.feeds import random_feeds
from graphopt.runner import Runner
from graphopt.shapes import Shapes

_SYMBOL = "graphopt.batch"
_TOLERANCE = 1e-3


def batch_axes(model: ir.Model, axes: Mapping[str, int] | None) -> tuple[dict[str, int], int | str]:
    """The batch axis of each input that has one, and the old size.

    Without `axes`, axis 0 of each input that has the size that the first one has there.

    Raises:
        InputError: no such input or axis, or inputs with different sizes.
    """
    known = {v.name or "": v for v in model.graph.inputs if not v.is_initializer()}
    for name, axis in (axes or {}).items():
        shape = known[name].shape if name in known else None
        if shape is None or not 0 <= axis < len(shape):
            raise InputError(f"no input {name!r} with an axis {axis}; there are {', '.join(known)}")
    found: dict[str, int] = {}
    sizes: dict[str, int | str] = {}
    for name, value in known.items():
        axis = (axes or {}).get(name, 0 if axes is None else -1)
        if value.shape is None or axis < 0 or not len(value.shape):
            continue
        dim = value.shape[axis]
        size = dim if isinstance(dim, int) else str(dim.value or f"?{name}")
        first = next(iter(sizes.values()), size)
        if size == first:
            found[name], sizes[name] = axis, size
        elif axes is not None:
            raise InputError(f"input {name!r} has batch size {size}, another one {first}")
    if not found:
        raise InputError("no input has a batch axis: name it (INPUT=AXIS)")
    return found, next(iter(sizes.values()))


def rebatch(model: ir.Model, axes: Mapping[str, int], old: int, new: int | str) -> list[str]:
    """Change the batch size in place; returns the labels of the nodes that were rewritten.

    Outputs get the new size where they have a batch axis. Initial states of recurrent layers and
    targets of Expand and Resize are adapted too.

    Raises:
        InputError: a node that spells the old size out where it cannot be replaced for certain.
    """
    before = Shapes(model)
    old_shapes = {v: before.shape(v) for node in model.graph for v in node.outputs}
    old_shapes.update((v, before.shape(v)) for v in model.graph.inputs)
    for value in model.graph.inputs:
        if value.name is not None and value.name in axes and value.shape is not None:
            value.shape = _with(value.shape, axes[value.name], _SYMBOL)
    for graph in ir.graphs(model):
        for node in graph:
            for value in node.outputs:
                if not value.is_graph_output() or graph is not model.graph:
                    value.shape = None
    declared = {value: value.shape for value in model.graph.outputs}
    for value in model.graph.outputs:
        value.shape = None
    context = Context(model)
    changed: list[str] = []
    for node in list(model.graph):
        if not node.domain and node.op_type in _REWRITES:
            change = _REWRITES[node.op_type](context, node, old_shapes, old, new)
            if change:
                changed.append(ir.label(node))
        context.shapes.update(node, model.graph)
    for value in model.graph.outputs:
        shape = context.shapes.shape(value)
        value.shape = declared[value] if shape is None else _named(shape, declared[value], new)
    for value in model.graph.inputs:
        if value.name is not None and value.name in axes and value.shape is not None:
            value.shape = _with(value.shape, axes[value.name], new)
    return changed


def _with(shape: ir.Shape, axis: int, size: int | str) -> ir.Shape:
    dims: list[int | ir.SymbolicDim | str | None] = list(shape)
    dims[axis] = size
    return ir.Shape(dims)


def _named(shape: tuple[DimLike, ...], declared: ir.Shape | None, new: int | str) -> ir.Shape:
    dims: list[int | ir.SymbolicDim | str | None] = []
    for axis, dim in enumerate(shape):
        old = declared[axis] if declared is not None and len(declared) == len(shape) else None
        times = _times(dim)
        if times == 1:
            dims.append(new)
        elif times:
            dims.append(times * new if isinstance(new, int) else None)
        elif isinstance(dim, Dim):
            dims.append(None if isinstance(old, int) else old)
        else:
            dims.append(dim)
    return ir.Shape(dims)


def _times(dim: DimLike) -> int:
    """How many rows a sample takes along a dimension: k where it is k times the batch, else 0."""
    if not isinstance(dim, Dim) or len(dim.terms) != 1:
        return 0
    monomial, factor = dim.terms[0]
    plain = len(monomial) == 1 and monomial[0].name == _SYMBOL
    return int(factor) if plain else 0


def _has_batch(dim: DimLike) -> bool:
    return any(atom.name == _SYMBOL for atom in atoms(dim))


_Shapes = Mapping[ir.Value, tuple[DimLike, ...] | None]


def _reshape(
    context: Context, node: ir.Node, old_shapes: _Shapes, old: int, new: int | str
) -> bool:
    """Put -1 where a constant target has the batch."""
    data, target = node.inputs[0], node.inputs[1]
    wanted = ir.array(target)
    now = None if data is None else context.shapes.shape(data)
    if data is None or wanted is None or now is None or not any(map(_has_batch, now)):
        return False
    was, made = old_shapes.get(data), old_shapes.get(node.outputs[0])
    why = f"cannot change the batch: Reshape {ir.label(node)!r} has the target {wanted.tolist()}"
    place = next(axis for axis, dim in enumerate(now) if _has_batch(dim))
    times = _times(now[place])
    if was is None or made is None or not times or sum(map(_has_batch, now)) > 1:
        raise InputError(f"{why}, and where the batch is in its input is not known")
    axis = _place(was, made, place, old)
    if axis is None:
        raise InputError(f"{why}, which has no certain place for the batch")
    numbers = [int(number) for number in wanted.tolist()]
    if numbers[axis] == -1 or (numbers[axis] == 0 and axis == place):
        return False
    if (
        axis == place
        and times == 1
        and made[axis] == old
        and not ir.attribute(node, "allowzero", 0)
    ):
        numbers[axis] = 0
    elif all(isinstance(dim, int) for dim in made):
        numbers = [dim if isinstance(dim, int) else 0 for dim in made]
        numbers[axis] = -1
    elif -1 in numbers:
        raise InputError(f"{why}, and two of its sizes would be free")
    else:
        numbers[axis] = -1
    _replace(context, node, 1, np.asarray(numbers, np.int64))
    return True


def _place(was: tuple[DimLike, ...], made: tuple[DimLike, ...], place: int, old: int) -> int | None:
    """The new axis that holds the batch: as many elements stand before it, in row order."""
    before = was[:place]
    for axis, size in enumerate(made):
        ahead = made[:axis]
        fixed = all(isinstance(dim, int) for dim in (*before, *ahead))
        fits = not isinstance(size, int) or (size >= old and size % old == 0)
        if fits and (ahead == before or (fixed and _count(ahead) == _count(before))):
            return axis
    return None


def _count(dims: tuple[DimLike, ...]) -> int:
    return math.prod(dim for dim in dims if isinstance(dim, int))


def _expand(context: Context, node: ir.Node, old_shapes: _Shapes, old: int, new: int | str) -> bool:
    """An Expand, or a broadcast, to the old batch size is one to what is there."""
    data, target = node.inputs[0], node.inputs[1]
    wanted = ir.array(target)
    now = None if data is None else context.shapes.shape(data)
    if wanted is None or now is None or not any(map(_has_batch, now)):
        return False
    numbers = wanted.tolist()
    offset = len(numbers) - len(now)
    for axis, dim in enumerate(now):
        if _has_batch(dim) and axis + offset >= 0 and numbers[axis + offset] != 1:
            numbers[axis + offset] = 1
    if numbers == wanted.tolist():
        return False
    _replace(context, node, 1, np.asarray(numbers, np.int64))
    return True


def _resize(context: Context, node: ir.Node, old_shapes: _Shapes, old: int, new: int | str) -> bool:
    """Sizes of a Resize that name the batch."""
    data = node.inputs[0]
    sizes = ir.array(node.inputs[3]) if len(node.inputs) > 3 else None
    now = None if data is None else context.shapes.shape(data)
    if sizes is None or not sizes.size or now is None or not any(map(_has_batch, now)):
        return False
    listed = cast("tuple[int, ...]", ir.attribute(node, "axes", tuple(range(len(now)))))
    place = next(axis for axis, dim in enumerate(now) if _has_batch(dim))
    if place not in listed:
        return False
    if isinstance(new, str):
        raise InputError(
            f"cannot make the batch {new!r}: Resize {ir.label(node)!r} has constant sizes; "
            "a number can be put there"
        )
    numbers = sizes.copy()
    numbers[listed.index(place)] = new
    _replace(context, node, 3, numbers)
    return True


def _state(context: Context, node: ir.Node, old_shapes: _Shapes, old: int, new: int | str) -> bool:
    """Constant initial states of a recurrent layer."""
    done = False
    for index in (5, 6):
        value = node.inputs[index] if index < len(node.inputs) else None
        state = ir.array(value)
        if state is None or (node.op_type != "LSTM" and index == 6):
            continue
        axis = 0 if ir.attribute(node, "layout", 0) else 1
        row = state.take([0], axis)
        if isinstance(new, str) or not np.array_equal(
            np.repeat(row, state.shape[axis], axis), state
        ):
            raise InputError(
                f"cannot change the batch: {node.op_type} {ir.label(node)!r} has an initial state "
                f"of {state.shape[axis]} constant rows"
            )
        _replace(context, node, index, np.ascontiguousarray(np.repeat(row, new, axis)))
        done = True
    return done


_REWRITES = {
    "Reshape": _reshape,
    "Expand": _expand,
    "Resize": _resize,
    "LSTM": _state,
    "GRU": _state,
    "RNN": _state,
}


def _replace(context: Context, node: ir.Node, index: int, array: ir.Array) -> None:
    value = node.inputs[index]
    assert value is not None
    made = context.initializer(context.model.graph, ir.tensor(array), f"{value.name}_batch")
    node.replace_input_with(index, made)
    if value.is_initializer() and not ir.use_count(value) and not value.is_graph_output():
        assert value.name is not None
        del context.model.graph.initializers[value.name]


def compare(
    before: ir.Model, after: ir.Model, axes: Mapping[str, int], old: int, new: int | str
) -> None:
    """Run a model and its copy with another batch size on the same rows.

    Raises:
        InputError: a batch is not computed as its rows are by the original.
    """
    size = 2 * old if isinstance(new, str) else new
    rows = math.lcm(old, size)
    bindings = {new: size} if isinstance(new, str) else {}
    feeds = random_feeds(after, Shapes(after), bindings=bindings)
    for name, axis in axes.items():
        repeats = -(-rows // feeds[name].shape[axis])
        array = np.concatenate([feeds[name]] * repeats, axis).take(range(rows), axis)
        shuffled = np.random.default_rng(0).permutation(array.reshape(-1))
        feeds[name] = shuffled.reshape(array.shape)
    parts = [
        _in_parts(model, feeds, axes, rows, step) for model, step in ((before, old), (after, size))
    ]
    for value, declared in zip(after.graph.outputs, before.graph.outputs, strict=True):
        place = _batch_axis(declared, value)
        if place is None:
            _check_constant(
                value.name or "", [*parts[0][value.name or ""], *parts[1][value.name or ""]]
            )
            continue
        expected, got = (np.concatenate(part[value.name or ""], place) for part in parts)
        gauge = Gauge(value.name or "", relative=_TOLERANCE)
        gauge.add(expected, got)
        verdict = gauge.finish()
        if not verdict.ok:
            raise InputError(f"rows of a batch depend on each other: {verdict}")


def _check_constant(name: str, results: list[Any]) -> None:
    """An output without a batch axis must not depend on the rows."""
    if not all(np.array_equal(result, results[0]) for result in results):
        raise InputError(f"output {name!r} mixes the rows of a batch: it has no axis for them")


def _in_parts(
    model: ir.Model, feeds: Mapping[str, Any], axes: Mapping[str, int], rows: int, step: int
) -> dict[str, list[Any]]:
    try:
        runner = Runner(model)
        found: dict[str, list[Any]] = {name: [] for name in runner.outputs}
        for start in range(0, rows, step):
            part = {
                name: array.take(range(start, start + step), axes[name]) if name in axes else array
                for name, array in feeds.items()
            }
            for name, result in runner.run(part).items():
                found[name].append(result)
    except GraphoptError as error:
        raise InputError(f"a batch of {step} does not run: {error}") from error
    return found


def _batch_axis(before: ir.Value, after: ir.Value) -> int | None:
    """The axis along which an output's batches are put together; None where it has none."""
    now = after.shape
    if before.shape is None or now is None or len(before.shape) != len(now):
        return None
    changed = [k for k, (a, b) in enumerate(zip(before.shape, now, strict=True)) if a != b]
    return changed[0] if len(changed) == 1 else None
