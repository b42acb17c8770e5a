"""Cross-layer equalization: channels scaled so that neighbouring layers share the range.

Source: Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction",
2019.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import numpy as np
import numpy.typing as npt

from graphopt import ir
from graphopt.context import Context
from graphopt.driver import remove, replace_value
from graphopt.gram import weight_matrix, weight_tensor
from graphopt.quantizer.channels import Channels, Ids, Layer, Part
from graphopt.quantizer.constants import replace_constant
from graphopt.rewriting import Op

__all__ = ["apply_scales", "equalize", "scale_layer"]

Floats = npt.NDArray[np.float64]

_SWEEPS = 300
_CONVERGED = 1e-3
_WORTH = float(np.log(1.1))  # smaller steps change nothing that anybody could measure
_BOUND = float(np.log(1e8))


@dataclass
class _Side:
    """One layer's largest weights [groups, out, in], and its classes in the same order."""

    layer: Layer
    size: Floats
    inputs: Ids | None
    outputs: Ids | None

    def rows(self, logs: Floats) -> Floats:
        """The largest weight of each output channel [groups, out], its own scale left out."""
        scaled = self.size
        if self.inputs is not None:
            scaled = scaled * np.exp(logs[self.inputs])[:, None, :]
        return cast(Floats, scaled.max(axis=2))

    def columns(self, logs: Floats) -> Floats:
        """The largest weight that reads each input channel [groups, in], likewise."""
        scaled = self.size
        if self.outputs is not None:
            scaled = scaled / np.exp(logs[self.outputs])[:, :, None]
        return cast(Floats, scaled.max(axis=1))


@dataclass
class _Region:
    """Classes that the same layers make, with the layers that make and that read them."""

    ids: Ids
    makers: list[_Side]
    readers: list[_Side]


def equalize(context: Context, *, clips: bool = False) -> int:
    """Scale channels between linear operators so that the ranges on both sides are alike.

    The model computes the same, up to rounding. A channel is divided by the square root of the
    largest weight that makes it over the largest that reads it, found by sweeps over the model.
    `clips` lets channels through Clip with an upper bound, which becomes a Min per channel. Works
    on the main graph; returns how many channels were scaled, and records the layers in the context.
    """
    found = Channels.of(context, clips=clips)
    for node, reason in found.reasons.items():
        context.record.refuse(node, reason)
    count = len(found.frozen)
    regions = _regions(found)
    logs = np.zeros(count)
    for _ in range(_SWEEPS):
        moved = 0.0
        for region in regions:
            new = _scales(region, logs)
            moved = max(moved, float(np.abs(new - logs[region.ids]).max()))
            logs[region.ids] = new
        if moved < _CONVERGED:
            break
    for region in regions:
        if np.abs(logs[region.ids]).max() < _WORTH:
            logs[region.ids] = 0
    return apply_scales(context, found, np.exp(logs)) if logs.any() else 0


def _regions(found: Channels) -> list[_Region]:
    """The free classes, in groups; in the order of the layers that make them."""
    sides = [_side(layer) for layer in found.layers]
    group = np.arange(len(found.frozen))
    made = [ids for s in sides if (ids := s.layer.outputs) is not None]
    changed = True
    while changed:  # the smallest class of all that are made together
        before = group.copy()
        for ids in made:
            group[ids] = group[ids].min()
        changed = not np.array_equal(before, group)
    regions: list[_Region] = []
    for first in dict.fromkeys(int(group[ids[0]]) for ids in made if len(ids)):
        free = (group == first) & ~found.frozen
        makers = [s for s in sides if s.outputs is not None and free[s.outputs].any()]
        readers = [s for s in sides if s.inputs is not None and free[s.inputs].any()]
        ids = np.flatnonzero(free & np.isin(np.arange(len(free)), np.concatenate(made)))
        if readers and len(ids):
            regions.append(_Region(ids, makers, readers))
    return regions


def _side(layer: Layer) -> _Side:
    weights = ir.array(layer.node.inputs[1])
    assert weights is not None
    matrix = np.abs(weight_matrix(layer.node, weights)).astype(np.float64)
    conv = layer.node.op_type.startswith("Conv")
    kernel = int(np.prod(weights.shape[2:])) if conv else 1
    groups, out, k = matrix.shape
    size = matrix.reshape(groups, out, k // kernel, kernel).max(axis=3)
    inputs = None if layer.inputs is None else layer.inputs.reshape(groups, -1)
    outputs = None if layer.outputs is None else layer.outputs.reshape(groups, -1)
    return _Side(layer, size, inputs, outputs)


def _scales(region: _Region, logs: Floats) -> Floats:
    """The best scales (logarithms) of a region, all others as they are."""
    made, read = np.zeros(len(logs)), np.zeros(len(logs))
    for side in region.makers:
        assert side.outputs is not None
        np.maximum.at(made, side.outputs, side.rows(logs))
    for side in region.readers:
        assert side.inputs is not None
        np.maximum.at(read, side.inputs, side.columns(logs))
    made, read = made[region.ids], read[region.ids]
    known = (made > 0) & (read > 0)
    new = np.zeros(len(region.ids))
    new[known] = (np.log(made[known]) - np.log(read[known])) / 2
    return np.clip(new, -_BOUND, _BOUND)


def apply_scales(context: Context, found: Channels, scales: Floats, rule: str = "equalize") -> int:
    """Divide channels by the scale of their class: in weights, biases and what stands between.

    Whatever reads a channel multiplies it again. Returns how many classes were scaled, and records
    the nodes.
    """
    for layer in found.layers:
        inputs = None if layer.inputs is None else scales[layer.inputs]
        outputs = None if layer.outputs is None else scales[layer.outputs]
        inputs = None if inputs is None or np.all(inputs == 1) else inputs
        outputs = None if outputs is None or np.all(outputs == 1) else outputs
        if inputs is not None or outputs is not None:
            scale_layer(context, layer.node, inputs, outputs)
            context.changed(rule, [layer.node], [layer.node])
    for part in found.parts:
        factors = scales[part.ids]
        if not np.all(factors == 1):
            _scale_part(context, part, factors)
            context.changed(rule, [part.node], [part.node])
    return int((scales != 1).sum())


def scale_layer(
    context: Context, node: ir.Node, inputs: Floats | None, outputs: Floats | None
) -> None:
    """Weights times the scale of what they read, divided by that of what they make."""
    weights = ir.array(node.inputs[1])
    assert weights is not None
    matrix = weight_matrix(node, weights).astype(np.float64)
    groups, out, k = matrix.shape
    if inputs is not None:
        split = inputs.reshape(groups, 1, -1)
        matrix *= np.repeat(split, k // split.shape[2], axis=2)
    if outputs is not None:
        matrix /= outputs.reshape(groups, out, 1)
        if len(node.inputs) > 2 and node.inputs[2] is not None:
            bias = ir.array(node.inputs[2])
            assert bias is not None
            replace_constant(context, node, 2, bias.astype(np.float64) / outputs)
    replace_constant(context, node, 1, weight_tensor(node, matrix, weights.shape))


def _scale_part(context: Context, part: Part, scales: Floats) -> None:
    node = part.node
    if part.kind == "clip":
        _scale_clip(context, part, scales)
        return
    for index, value in enumerate(node.inputs):
        constant = ir.array(value)
        if constant is not None and (part.kind != "norm" or index > 0):
            replace_constant(
                context, node, index, constant.astype(np.float64) / _along(part, scales)
            )


def _along(part: Part, scales: Floats) -> Floats:
    """Scales in the shape in which they are broadcast to a node's result."""
    return scales.reshape(-1, *[1] * part.behind)


def _scale_clip(context: Context, part: Part, scales: Floats) -> None:
    """Clip as Max and Min with a bound per channel; a lower bound of 0 stays a Relu."""
    node = part.node
    op = Op(context, node)
    value = node.inputs[0]
    assert value is not None
    bounds = [ir.array(v) for v in (*node.inputs[1:], None, None)][:2]
    for bound, op_type in zip(bounds, ("Max", "Min"), strict=True):
        if bound is None:
            continue
        if op_type == "Max" and not bound.any():
            value = op.Relu(value)
            continue
        limit = (bound.astype(np.float64) / _along(part, scales)).astype(bound.dtype)
        value = op.build(op_type, [value, op.initializer(limit, "bound")])[0]
    graph = node.graph
    assert graph is not None
    for made in op.created:
        made.name = context.unique_node(f"{ir.label(node)}_{made.op_type}")
        made.meta[ir.SOURCES] = ir.sources(node)
    graph.insert_before(node, op.created)
    replace_value(context, node.outputs[0], value, fresh=True)
    remove(context, node)
