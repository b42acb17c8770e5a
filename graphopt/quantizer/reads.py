"""Tensors that linear operators read, what samples say of their channels, and where scales can go.

A channel can be divided by a number where it is made, if whatever reads it is multiplied by that:
what SmoothQuant and AWQ have in common.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from graphopt import ir
from graphopt.context import Context
from graphopt.errors import InputError
from graphopt.gram import weight_matrix
from graphopt.quantizer.channels import Channels, Ids
from graphopt.quantizer.constants import constant_value
from graphopt.quantizer.equalization import apply_scales, scale_layer
from graphopt.samples import Samples
from graphopt.taps import groups, tap

__all__ = ["Read", "Region", "Weights", "rescale"]

Floats = npt.NDArray[np.float64]

_FREE = 0.95  # of the noise: what must be gained where nothing is added to the graph
_MULTIPLIED = 0.5  # and where a multiplication is that takes no time
_PRODUCTS = 90  # of integers, that take as long as a multiplication of the element in floats


@dataclass
class Weights:
    """One linear operator that reads a tensor."""

    node: ir.Node
    size: Floats
    """The largest weight for each output and input channel [groups, out, in / groups]."""
    energy: Floats
    """Squared weights that read a channel, added up [in]."""
    kernel: int
    """How many weights lie behind each element of `size`."""


@dataclass
class Read:
    """A tensor that linear operators read, and what samples say of its channels."""

    value: ir.Value
    layers: list[Weights]
    axis: int
    """Of the channels, counted from the end."""
    low: list[Floats] = field(default_factory=list[Floats])
    """For each sample the lowest value of each channel [in], or 0."""
    high: list[Floats] = field(default_factory=list[Floats])
    squares: Floats | float = 0.0
    count: int = 0

    def add(self, x: npt.NDArray[Any]) -> None:
        """Count one sample's tensor in."""
        if not x.size:
            return
        others = tuple(a for a in range(x.ndim) if a != x.ndim + self.axis)
        squares: Floats = np.square(x).sum(axis=others, dtype=np.float64)
        if not np.isfinite(squares).all():
            raise InputError(f"{self.value.name!r} holds values that are not finite")
        self.low.append(np.minimum(x.min(axis=others), 0).astype(np.float64))
        self.high.append(np.maximum(x.max(axis=others), 0).astype(np.float64))
        self.squares = self.squares + squares
        self.count += x.size // x.shape[self.axis]

    def close(self, *, dynamic: bool) -> None:
        """The samples are over. Fixed ranges are those of all of them."""
        if not dynamic:
            self.low = [np.min(self.low, axis=0)]
            self.high = [np.max(self.high, axis=0)]

    @property
    def outputs(self) -> int:
        """How many results each element has a part in: of all layers together."""
        return sum(math.prod(each.size.shape[:2]) for each in self.layers)

    @property
    def reach(self) -> Floats:
        """The largest magnitude of each channel."""
        reach: Floats = np.maximum(np.max(self.high, axis=0), -np.min(self.low, axis=0))
        return reach

    @property
    def power(self) -> Floats:
        """The mean square of each channel."""
        return np.asarray(self.squares, np.float64) / max(self.count, 1)

    @property
    def weight(self) -> Floats:
        """The largest weight that reads each channel."""
        largest: Floats = np.max([w.size.max(axis=1).reshape(-1) for w in self.layers], axis=0)
        return largest


@dataclass
class Region:
    """Channels that are scaled together, and the tensors that hold them."""

    members: list[tuple[Read, Ids]]
    """With the place of each channel's scale in the region's."""
    classes: Ids
    """Of `Channels`."""

    @classmethod
    def of(cls, read: Read) -> Region:
        """Of one tensor alone."""
        ids = np.arange(len(read.reach))
        return cls([(read, ids)], ids)

    def largest(self, figure: Callable[[Read], Floats]) -> Floats:
        """The largest of what a figure is for each channel of the members [classes]."""
        found = np.zeros(len(self.classes))
        for read, ids in self.members:
            np.maximum.at(found, ids, figure(read))
        return found


def rescale(
    context: Context,
    nodes: Sequence[ir.Node],
    samples: Samples,
    search: Callable[[Region], tuple[Floats, float]],
    *,
    rule: str,
    dynamic: bool,
    multiply: bool,
    progress: Callable[[str], None] | None = None,
) -> int:
    """Scale what linear operators read as a search finds best; how many tensors were scaled.

    `search` finds the scales of a region and the share of the noise that they leave. See `smooth`
    for the other arguments and what is raised; `rule` is what the record calls it.
    """
    found = Channels.of(context, norms=True)
    known = _reads(context, nodes)
    _measure(context, known, samples, progress)
    known = [read for read in known if read.count]
    for read in known:
        read.close(dynamic=dynamic)
    free, alone = _regions(found, known)
    scales = np.ones(len(found.frozen))
    done = 0
    for region in free:
        best, share = search(region)
        if share < _FREE:
            scales[region.classes] = best
            done += len(region.members)
    if done:
        apply_scales(context, found, scales, rule)
    products = [r for r in alone if all(w.node.op_type != "Conv" for w in r.layers)]
    for read in products if multiply else ():
        best, share = search(Region.of(read))
        cost = 2 * _PRODUCTS / read.outputs if dynamic else 0.0
        if share < _MULTIPLIED * (1 - cost):
            _multiply(context, read, best, rule)
            done += 1
    return done


def _reads(context: Context, nodes: Iterable[ir.Node]) -> list[Read]:
    """What the operators read, each tensor once."""
    reads: dict[tuple[ir.Value, int], Read] = {}
    for node in nodes:
        value, weights = node.inputs[0], node.inputs[1]
        array = ir.array(weights)
        if value is None or weights is None or array is None:
            continue
        if node.op_type not in ("Conv", "Gemm", "MatMul") or ir.use_count(weights) > 1:
            context.record.refuse(node, "its weights are used elsewhere, or it takes no scale")
            continue
        matrix = np.abs(weight_matrix(node, array)).astype(np.float64)
        kernel = math.prod(array.shape[2:])
        groups_, out, k = matrix.shape
        split = matrix.reshape(groups_, out, k // kernel, kernel)
        energy = np.square(split).sum(axis=(1, 3)).reshape(-1)
        axis = 1 - array.ndim if node.op_type == "Conv" else -1
        read = reads.setdefault((value, axis), Read(value, [], axis))
        read.layers.append(Weights(node, split.max(axis=3), energy, kernel))
    return list(reads.values())


def _measure(
    context: Context,
    reads: Sequence[Read],
    samples: Samples,
    progress: Callable[[str], None] | None,
) -> None:
    """Run the model on samples, once for each part of the tensors that fits into memory."""
    named: dict[str, list[Read]] = {}
    for read in reads:
        named.setdefault(read.value.name or "", []).append(read)
    parts = groups(context.model, list(named), next(iter(samples))) if named else []
    for part in parts:
        context.check_time()
        if progress is not None:
            progress("ranges of channels")
        for tensors in tap(context.model, part, samples):
            for name, x in tensors.items():
                for read in named[name]:
                    read.add(x)


def _regions(found: Channels, reads: Sequence[Read]) -> tuple[list[Region], list[Read]]:
    """Tensors whose channels can be scaled where they are made, and those that need a Mul."""
    layers = {layer.node: layer.inputs for layer in found.layers}
    free: list[tuple[Read, Ids]] = []
    alone: list[Read] = []
    for read in reads:
        ids = [layers.get(each.node) for each in read.layers]
        first = ids[0]
        if first is None or any(i is None for i in ids) or found.frozen[first].any():
            alone.append(read)
        else:
            free.append((read, first))
    group = np.arange(len(found.frozen))
    changed = True
    while changed:  # the smallest class of all that tensors share
        before = group.copy()
        for _, ids_ in free:
            group[ids_] = group[ids_].min()
        changed = not np.array_equal(before, group)
    regions: dict[int, list[tuple[Read, Ids]]] = {}
    for read, ids_ in free:
        regions.setdefault(int(group[ids_[0]]), []).append((read, ids_))
    result: list[Region] = []
    for members in regions.values():
        classes = np.unique(np.concatenate([ids_ for _, ids_ in members]))
        places = [(read, np.searchsorted(classes, ids_)) for read, ids_ in members]
        result.append(Region(places, classes))
    return result, alone


def _multiply(context: Context, read: Read, scales: Floats, rule: str) -> None:
    """Divide a tensor by scales for some of its readers, whose weights take them."""
    value, graph = read.value, context.model.graph
    factor = constant_value(context, graph, (1 / scales).astype(np.float32), f"{value.name}_factor")
    node = ir.Node("", "Mul", [value, factor])
    node.name = context.unique_node(f"{value.name}_smooth")
    smoothed = node.outputs[0]
    smoothed.name = context.unique(f"{value.name}_smooth")
    producer = value.producer()
    if producer is None:
        graph.insert_before(next(iter(graph)), node)
    else:
        node.meta[ir.SOURCES] = ir.sources(producer)
        graph.insert_after(producer, node)
    context.shapes.update(node, graph)
    for each in read.layers:
        scale_layer(context, each.node, scales, None)
        each.node.replace_input_with(0, smoothed)
        context.changed(rule, [each.node], [node, each.node])
