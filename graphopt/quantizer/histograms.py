"""Histograms of weights and activations with the ranges that quantization gave them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from graphopt import ir
from graphopt.quantizer.checking import Pair, pair_of, scales_of
from graphopt.quantizer.sketch import Sketch

__all__ = ["Histogram", "histograms"]

_BINS = 128


@dataclass(frozen=True)
class Histogram:
    """How often values come, and the range that they are quantized in."""

    name: str
    kind: str
    """`activation` or `weight`."""
    edges: list[float]
    """One more than counts."""
    counts: list[int]
    low: float | None = None
    """The lowest value of the range, of the widest channel; None where run time decides."""
    high: float | None = None


def histograms(
    floats: ir.Model, result: ir.Model, sketches: Mapping[str, Sketch]
) -> list[Histogram]:
    """Those of the main graph: activations by their sketches, then the weights that changed.

    `floats` is the model that was quantized; its tensors are found by their names.
    """
    return [*_activations(result, sketches), *_weights(floats, result)]


def _activations(result: ir.Model, sketches: Mapping[str, Sketch]) -> Iterator[Histogram]:
    for node in result.graph:
        pair = scales_of(node) if node.op_type == "QuantizeLinear" else None
        source = node.inputs[0] if node.inputs else None
        if pair is None or source is None or not pair.per_tensor:
            continue
        names = [source.name, *(v.name for use in node.outputs[0].uses() for v in use.node.outputs)]
        name = next((n for n in names if n in sketches), None)
        if name is None or not sketches[name].total:
            continue
        edges, counts = _coarse(sketches[name])
        yield Histogram(name, "activation", edges, counts, *pair.reach())


def _coarse(sketch: Sketch) -> tuple[list[float], list[int]]:
    """The filled part of a sketch in at most so many bins as a picture has use for."""
    filled = np.flatnonzero(sketch.counts)
    first, last = int(filled[0]), int(filled[-1]) + 1
    step = -(-(last - first) // _BINS)
    starts = np.arange(first, last, step)
    counts = np.add.reduceat(sketch.counts[:last], starts)
    edges = sketch.edges()[[*starts.tolist(), min(last, int(starts[-1]) + step)]]
    return edges.tolist(), counts.tolist()


def _weights(floats: ir.Model, result: ir.Model) -> Iterator[Histogram]:
    made = {ir.label(node): node for node in result.graph}
    seen: set[ir.Value] = set()
    kept = set(result.graph.initializers)
    for node in floats.graph:
        for index, value in enumerate(node.inputs[:3]):
            tensor = ir.constant(value)
            if value is None or tensor is None or value in seen or len(tensor.shape) < 2:
                continue
            if tensor.dtype != ir.DataType.FLOAT or value.name in kept:
                continue
            seen.add(value)
            array = tensor.numpy()
            counts, edges = np.histogram(array, _BINS)
            twin = made.get(ir.label(node))
            pair = (
                None if twin is None or len(twin.inputs) <= index else pair_of(twin.inputs[index])
            )
            ends = (None, None) if pair is None else _reach(pair)
            yield Histogram(value.name or "", "weight", edges.tolist(), counts.tolist(), *ends)


def _reach(pair: Pair) -> tuple[float, float]:
    """The lowest and the highest value over all scales."""
    scale: npt.NDArray[Any] = pair.scale.astype(np.float64)
    lowest, highest = pair.limits
    zero = pair.zero.astype(np.float64)
    return float(((lowest - zero) * scale).min()), float(((highest - zero) * scale).max())
