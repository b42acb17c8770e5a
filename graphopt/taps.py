"""Intermediate values of a model on samples, by ONNX Runtime on the CPU.

What is asked for becomes outputs of a copy of the model. `groups` cuts a list of values into
parts that fit into memory together; each is then tapped by a pass of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy.typing as npt

from graphopt import files, ir
from graphopt.errors import InputError
from graphopt.runner import RUN_SECONDS, Runner

__all__ = ["MEMORY_LIMIT", "groups", "sizes", "tap", "tapped"]

Array = npt.NDArray[Any]
Feeds = Mapping[str, Array]

MEMORY_LIMIT = 1 << 28
"""Bytes of values that one pass may hold for a sample."""


def tap(
    model: ir.Model,
    values: Sequence[ir.Value | str],
    samples: Iterable[Feeds],
    *,
    threads: int = 1,
    seconds: float = RUN_SECONDS,
) -> Iterator[dict[str, Array]]:
    """For each of the samples a dict of the values asked for, by name, in their order.

    Values are tensors of the main graph: inputs, constants, results of nodes. The model is not
    changed. Where all of them do not fit into memory at once, tap them by `groups`. A run may take
    `seconds`.

    Raises:
        InputError: no such value in the main graph.
        GraphoptError: ONNX Runtime cannot load or run the model.
    """
    names = [v if isinstance(v, str) else v.name or "" for v in values]
    if {v.name for v in model.graph.inputs}.issuperset(names):
        yield from ({name: feeds[name] for name in names} for feeds in samples)
        return
    runner = Runner(tapped(model, names), threads=threads, optimize=True, seconds=seconds)
    wanted = set(runner.inputs)
    for feeds in samples:
        results = runner.run({name: feed for name, feed in feeds.items() if name in wanted})
        yield {name: feeds[name] if name in feeds else results[name] for name in names}


def tapped(model: ir.Model, names: Sequence[str]) -> ir.Model:
    """A copy whose outputs are values of the main graph; tensors are shared.

    Graph inputs among the names are left out. Nodes that no output needs are removed. Raises
    InputError for a name that the graph does not have.
    """
    copy = files.copy(model)
    graph = copy.graph
    known = {v.name: v for node in graph for v in node.outputs if v.name}
    known.update(graph.initializers)
    inputs = {v.name for v in graph.inputs}
    missing = [name for name in names if name not in known and name not in inputs]
    if missing:
        raise InputError(f"the model's main graph computes no {missing[0]!r}")
    graph.outputs[:] = [known[name] for name in dict.fromkeys(names) if name not in inputs]
    _prune(graph)
    return copy


def _prune(graph: ir.Graph) -> None:
    """Remove the nodes that no output needs."""
    for node in reversed(list(graph)):
        if not any(v.uses() or v.is_graph_output() for v in node.outputs):
            graph.remove(node, safe=True)
    for name, value in list(graph.initializers.items()):
        unused = not value.uses() and not value.is_graph_output()
        if unused and not value.is_graph_input():
            del graph.initializers[name]


def groups(
    model: ir.Model,
    values: Sequence[ir.Value | str],
    feeds: Feeds,
    *,
    memory_limit: int = MEMORY_LIMIT,
) -> list[list[str]]:
    """Names of values, in order, in groups whose bytes for one sample fit into `memory_limit`.

    Sizes are measured by a run on `feeds`, in which none of the values is put out. A value that is
    too large by itself is a group of its own.
    """
    names = [v if isinstance(v, str) else v.name or "" for v in values]
    known = sizes(model, names, feeds)
    result: list[list[str]] = []
    room = 0
    for name in names:
        if known[name] > room or not result:
            result.append([])
            room = memory_limit
        result[-1].append(name)
        room -= known[name]
    return result


def sizes(model: ir.Model, names: Sequence[str], feeds: Feeds) -> dict[str, int]:
    """The bytes of each value in a run on `feeds`, taking elements of 4 bytes."""
    found = {name: feeds[name].nbytes for name in names if name in feeds}
    inner = [name for name in dict.fromkeys(names) if name not in found]
    if not inner:
        return found
    copy = tapped(model, inner)
    outputs = list(copy.graph.outputs)
    counted: list[ir.Value] = []
    for value in outputs:
        node = ir.Node("", "Size", [value])
        copy.graph.append(node)
        count = node.outputs[0]
        count.name, count.type = f"{value.name}.size", ir.TensorType(ir.DataType.INT64)
        count.shape = ir.Shape([])
        counted.append(count)
    copy.graph.outputs[:] = counted
    runner = Runner(copy)
    results = runner.run({n: f for n, f in feeds.items() if n in runner.inputs})
    for value, count in zip(outputs, counted, strict=True):
        found[value.name or ""] = 4 * int(results[count.name or ""])
    return found
