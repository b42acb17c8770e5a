"""Outliers of activations moved into weights, as far as that makes the noise of a layer smaller.

Source: Xiao et al., "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large
Language Models", 2022. An activation has one scale, so that a channel a hundred times larger than
the others leaves them no bits; weights have a scale for each output and bear such a channel well.
A channel is divided by s and the weights that read it are multiplied by s. Here s is r**a / w**b,
of the channel's largest activation r and the largest weight w that reads it; the exponents are
those, out of a grid, that make the noise at the layer's output smallest. That noise is known from
ranges and second moments alone: rounding to steps of d adds d**2 / 12 to each value.

The division goes into what makes the channels: a normalization's factors, or a linear operator
behind which the scale passes through everything (`graphopt.quantizer.channels`). Elsewhere it is a
multiplication of its own, which costs time and is put in only where it halves the noise.
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

__all__ = ["smooth"]

Floats = npt.NDArray[np.float64]

_ACTIVATIONS = np.linspace(0.1, 1.0, 10)  # exponents of the activations' ranges
_WEIGHTS = (0.2, 0.4)  # and of the weights', tried where the first one is best
_FREE = 0.95  # of the noise: what must be gained where nothing is added to the graph
_MULTIPLIED = 0.5  # and where a multiplication is
_BOUND = math.log(1e4)  # of a scale, against its region's middle


@dataclass
class _Weights:
    """One linear operator that reads a tensor."""

    node: ir.Node
    size: Floats
    """The largest weight for each output and input channel [groups, out, in / groups]."""
    energy: Floats
    """Squared weights that read a channel, added up [in]."""
    kernel: int
    """How many weights lie behind each element of `size`."""


@dataclass
class _Read:
    """A tensor that linear operators read, and what samples say of its channels."""

    value: ir.Value
    layers: list[_Weights]
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
    def reach(self) -> Floats:
        """The largest magnitude of each channel."""
        reach: Floats = np.maximum(np.max(self.high, axis=0), -np.min(self.low, axis=0))
        return reach

    @property
    def weight(self) -> Floats:
        """The largest weight that reads each channel."""
        largest: Floats = np.max([w.size.max(axis=1).reshape(-1) for w in self.layers], axis=0)
        return largest

    def noise(self, scales: Floats) -> float:
        """Noise over signal at the outputs, if the channels are divided by scales [in].

        Activations and weights are rounded to 8 bits, without a correlation between channels.
        """
        power = self.squares / max(self.count, 1)
        widest = (np.array(self.high) / scales).max(axis=1)
        lowest = (np.array(self.low) / scales).min(axis=1)
        steps: Floats = (widest - lowest) / 255
        rounding = float((steps**2).mean()) / 12
        noise = signal = 0.0
        for each in self.layers:
            split = scales.reshape(each.size.shape[0], 1, -1)
            noise += rounding * float((scales**2 * each.energy).sum())
            steps = (each.size * split).max(axis=2) / 127
            left = (power / scales**2).reshape(each.size.shape[0], -1).sum(axis=1) * each.kernel
            noise += float((steps**2 / 12 * left[:, None]).sum())
            signal += float((each.energy * power).sum())
        return noise / signal if signal > 0 else 0.0


@dataclass
class _Region:
    """Channels that are scaled together, and the tensors that hold them."""

    reads: list[tuple[_Read, Ids]] = field(default_factory=list[tuple[_Read, Ids]])
    """With the place of each channel's scale in the region's."""
    classes: Ids = field(default_factory=lambda: np.zeros(0, np.intp))

    def noise(self, scales: Floats) -> float:
        """Of all its tensors together."""
        return sum(read.noise(scales[ids]) for read, ids in self.reads)

    def search(self) -> tuple[Floats, float]:
        """The best scales, and the share of the noise that they leave."""
        reach, weight = np.zeros(len(self.classes)), np.zeros(len(self.classes))
        for read, ids in self.reads:
            np.maximum.at(reach, ids, read.reach)
            np.maximum.at(weight, ids, read.weight)
        known = (reach > 0) & (weight > 0)
        ones = np.ones(len(reach))
        now = self.noise(ones) if known.any() else 0.0
        if now <= 0:
            return ones, 1.0

        def scales(a: float, b: float) -> Floats:
            logs = np.zeros(len(reach))
            logs[known] = a * np.log(reach[known]) - b * np.log(weight[known])
            logs[known] -= np.median(logs[known])
            return np.exp(np.clip(logs, -_BOUND, _BOUND))

        least, best = min((self.noise(scales(a, 0.0)), float(a)) for a in _ACTIVATIONS)
        finer = [(self.noise(scales(best, b)), b) for b in _WEIGHTS]
        least, second = min([(least, 0.0), *finer])
        return scales(best, second), least / now


def smooth(
    context: Context,
    nodes: Iterable[ir.Node],
    samples: Samples,
    *,
    dynamic: bool,
    multiply: bool,
    progress: Callable[[str], None] | None = None,
) -> int:
    """Scale the channels of what linear operators read so that 8 bits hold them better.

    Args:
        context: its main graph is changed, and computes the same up to rounding.
        nodes: the operators that will be quantized (Conv, Gemm, MatMul with constant weights).
        samples: what the ranges are taken from.
        dynamic: ranges are those of each run; else one range holds for all samples.
        multiply: put a Mul where nothing else can take the scale and it halves the noise.
        progress: called with what is being done.

    Returns how many tensors were scaled.

    Raises:
        InputError: activations that are not finite, or samples that do not fit.
    """
    found = Channels.of(context, norms=True)
    reads = _reads(context, nodes)
    _measure(context, reads, samples, progress)
    reads = [read for read in reads if read.count]
    for read in reads:
        read.close(dynamic=dynamic)
    regions, alone = _regions(found, reads)
    scales = np.ones(len(found.frozen))
    done = 0
    for region in regions:
        best, share = region.search()
        if share < _FREE:
            scales[region.classes] = best
            done += len(region.reads)
    if done:
        apply_scales(context, found, scales, "smooth")
    products = [r for r in alone if all(w.node.op_type != "Conv" for w in r.layers)]
    for read in products if multiply else ():
        ids = np.arange(len(read.reach))
        best, share = _Region([(read, ids)], ids).search()
        if share < _MULTIPLIED:
            _multiply(context, read, best)
            done += 1
    return done


def _reads(context: Context, nodes: Iterable[ir.Node]) -> list[_Read]:
    """What the operators read, each tensor once."""
    reads: dict[tuple[ir.Value, int], _Read] = {}
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
        read = reads.setdefault((value, axis), _Read(value, [], axis))
        read.layers.append(_Weights(node, split.max(axis=3), energy, kernel))
    return list(reads.values())


def _measure(
    context: Context,
    reads: Sequence[_Read],
    samples: Samples,
    progress: Callable[[str], None] | None,
) -> None:
    """Run the model on samples, once for each part of the tensors that fits into memory."""
    named: dict[str, list[_Read]] = {}
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


def _regions(found: Channels, reads: Sequence[_Read]) -> tuple[list[_Region], list[_Read]]:
    """Tensors whose channels can be scaled where they are made, and those that need a Mul."""
    layers = {layer.node: layer.inputs for layer in found.layers}
    free: list[tuple[_Read, Ids]] = []
    alone: list[_Read] = []
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
    regions: dict[int, list[tuple[_Read, Ids]]] = {}
    for read, ids_ in free:
        regions.setdefault(int(group[ids_[0]]), []).append((read, ids_))
    result: list[_Region] = []
    for members in regions.values():
        classes = np.unique(np.concatenate([ids_ for _, ids_ in members]))
        places = [(read, np.searchsorted(classes, ids_)) for read, ids_ in members]
        result.append(_Region(places, classes))
    return result, alone


def _multiply(context: Context, read: _Read, scales: Floats) -> None:
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
        context.changed("smooth", [each.node], [node, each.node])
