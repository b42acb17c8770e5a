"""Nodes that a narrower floating point type would spoil, by operator, by constants and by data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np

from graphopt import feeds, ir
from graphopt.context import Context
from graphopt.errors import GraphoptError, InputError
from graphopt.passes._precision import LIMITS, MOVING, Precision
from graphopt.taps import groups, tap
from graphopt.wildcards import fits

_UNSAFE = frozenset(
    {
        *("CumSum", "ReduceSumSquare", "ReduceL2", "ReduceProd", "ReduceLogSum", "Mod", "Det"),
        *("ReduceLogSumExp", "LpNormalization", "MeanVarianceNormalization", "DFT", "STFT"),
        *("GridSample", "AffineGrid", "RoiAlign", "MaxRoiPool", "Sin", "Cos", "Tan", "Range"),
    }
)
"""Sums of squares and long sums overflow inside; coordinates and angles need digits."""
_EXACT = frozenset(
    {
        *("Mul", "Div", "Add", "Sub", "Floor", "Ceil", "Round", "Neg", "Abs", "Min", "Max", "Clip"),
        *("Concat", "Slice", "Gather", "Unsqueeze", "Squeeze", "Reshape", "Transpose", "Expand"),
        *("Cast", "Split", "Range", "Pow", "Sqrt", "Reciprocal", "Tile", "Flatten", "Mod"),
        *("Identity", "Where"),
    }
)
"""What positions, sizes and angles are computed with on their way to where digits count."""
_ANGLES = ("Sin", "Cos", "Tan")
_MASKING = MOVING | {"Add", "Sub", "Mul", "Where", "Min", "Max", "Clip", "Equal", "Softmax"}
_FILL = 1e8
"""Numbers from here on mean minus or plus infinity in masks."""
_SCALAR = 16
_LOSS = 0.05
"""Relative error of a small constant's largest element from which it counts as lost."""
_QUANTIZED = ("QuantizeLinear", "DequantizeLinear")
SAMPLES = 16
"""How many samples are run to see how large values get."""


@dataclass(frozen=True)
class _Limits:
    most: float
    least: float
    """The smallest number with all its digits."""


def keep_nodes(precision: Precision, keep: Sequence[str], *, data: bool) -> dict[ir.Node, str]:
    """Nodes that must keep their type, with the reason.

    `keep` holds patterns of operator types and node names. With `data` values are
    looked at on the context's samples, on random inputs where there are none.

    Raises:
        InputError: an entry of `keep` that fits no node.
    """
    kept = _asked(precision, keep)
    name = precision.to.name.lower()
    limits = _Limits(*LIMITS[precision.to])
    for node in precision.nodes:
        reason = _reason(precision, node, limits)
        if reason is not None:
            kept.setdefault(node, reason)
    for node in _exact(precision):
        kept.setdefault(node, "it computes positions, sizes or angles, which need more digits")
    if data:
        for node, reason in _observed(precision, limits).items():
            kept.setdefault(node, reason)
    movable = {n: r for n, r in kept.items() if precision.movable(n) or any(precision.floats(n))}
    return {node: f"stays as it is: {text.format(to=name)}" for node, text in movable.items()}


def _asked(precision: Precision, keep: Sequence[str]) -> dict[ir.Node, str]:
    kept: dict[ir.Node, str] = {}
    for pattern in keep:
        found = [node for node in precision.nodes if fits([pattern], node.op_type, ir.label(node))]
        if not found:
            raise InputError(f"keep={pattern!r} fits no operator type and no node's name")
        kept.update(dict.fromkeys(found, "asked for"))
    return kept


def _reason(precision: Precision, node: ir.Node, limits: _Limits) -> str | None:
    """What is known without data."""
    if not any(precision.floats(node)):
        return None
    if not precision.movable(node):
        plain = node.op_type in ("Constant", "Cast") and not node.domain
        version = precision.context.opset(node, node.domain)
        return None if plain else f"{node.op_type} of opset {version} does not take {{to}}"
    if node.op_type in _UNSAFE:
        return f"{node.op_type} is not safe in {{to}}"
    if node.op_type in _QUANTIZED or _quantized(node):
        return "it is quantized"
    if node.op_type == "Cast" and not precision.is_source(node.outputs[0]):
        return None
    for value in node.inputs:
        tensor = ir.constant(value)
        if value is not None and tensor is not None and precision.is_source(value):
            reason = _constant(node, tensor.numpy(), limits)
            if reason:
                return f"constant {value.name} {reason}"
    return None


def _quantized(node: ir.Node) -> bool:
    """Whether an operand comes from a DequantizeLinear: runtimes look for the group as it is."""
    makers = [v.producer() for v in node.inputs if v is not None]
    return any(p is not None and p.op_type == "DequantizeLinear" for p in makers)


def _constant(node: ir.Node, array: ir.Array, limits: _Limits) -> str:
    numbers = np.abs(np.asarray(array, np.float64))
    numbers = numbers[np.isfinite(numbers)]
    if not numbers.size:
        return ""
    largest = float(numbers.max())
    if largest > limits.most:
        beyond = numbers[numbers > limits.most]
        fill = float(beyond.min()) >= _FILL and node.op_type in _MASKING
        return "" if fill or node.op_type == "Clip" else "is beyond {to}"
    if not largest or largest >= limits.least:
        return ""
    step = limits.least * 2.0**-10 if limits.most < _FILL else limits.least
    lost = abs(round(largest / step) * step - largest) > _LOSS * largest
    return "vanishes in {to}" if lost or numbers.size > _SCALAR else ""


def _exact(precision: Precision) -> set[ir.Node]:
    """What leads to integers, to angles and to ports that are always of the old type."""
    stack: list[ir.Value] = []
    angles: set[ir.Value] = set()
    for node in precision.nodes:
        if node.op_type == "Cast" and not node.domain and precision.is_source(node.inputs[0]):
            kind = precision.context.shapes.dtype(node.outputs[0])
            if kind is not None and kind.is_integer():
                stack += [v for v in node.inputs if v is not None]
        elif node.op_type in _ANGLES and not node.domain:
            stack += [v for v in node.inputs if v is not None]
            angles.update(v for v in node.inputs if v is not None)
        elif precision.movable(node) and not any(True for _ in ir.subgraphs(node)):
            fixed = zip(node.inputs, precision.ports(node)[0], strict=True)
            stack += [v for v, moves in fixed if v is not None and not moves]
    found: set[ir.Node] = set()
    while stack:
        value = stack.pop()
        maker = value.producer()
        if maker is None or maker in found or maker.domain or not precision.is_source(value):
            continue
        if maker.op_type in _EXACT or (maker.op_type in ("MatMul", "Einsum") and value in angles):
            found.add(maker)
            operands = [v for v in maker.inputs if v is not None]
            stack += operands
            if value in angles:
                angles.update(operands)
    return found


def _observed(precision: Precision, limits: _Limits) -> dict[ir.Node, str]:
    """Makers and users of values that leave the new type's range in a run.

    What is inside of bodies of control flow cannot be looked at.
    """
    context = precision.context
    main = context.model.graph
    values = [v for v in feeds.required_inputs(context.model) if precision.is_source(v)]
    values += [v for node in main for v in node.outputs if v.name and precision.is_source(v)]
    values = [v for v in values if ir.constant(v) is None]
    highs = dict.fromkeys((v.name for v in values), 0.0)
    peaks = dict(highs)
    try:
        samples, where = _samples(context)
        for group in groups(context.model, values, samples[0]):
            context.check_time()
            for results in tap(context.model, group, samples):
                for name, array in results.items():
                    numbers = np.abs(np.asarray(array, np.float32))
                    numbers = numbers[np.isfinite(numbers)]
                    peaks[name] = max(peaks[name], float(numbers.max(initial=0)))
                    usual = numbers[numbers < _FILL]
                    highs[name] = max(highs[name], float(usual.max(initial=0)))
    except GraphoptError as error:
        context.record.refusals[f"ranges are not known: {error}"] = {"the whole model"}
        return {}
    kept: dict[ir.Node, str] = {}
    for value in values:
        reason = _range(value, peaks[value.name], highs[value.name], limits)
        if reason:
            text = f"{reason} ({where})"
            producer = value.producer()
            nodes = [] if producer is None else [producer]
            for node in (*nodes, *value.consumers()):
                kept.setdefault(node, text)
    return kept


def _range(value: ir.Value, peak: float, high: float, limits: _Limits) -> str:
    producer = value.producer()
    fill = producer is None or producer.op_type in _MASKING
    if high > limits.most or (peak > limits.most and not fill):
        return "its values leave the range of {to}"
    if 0 < peak < limits.least:
        return "its values vanish in {to}"
    return ""


def _samples(context: Context) -> tuple[list[dict[str, ir.Array]], str]:
    if context.samples is not None:
        samples = list(islice(context.samples, SAMPLES))
        return samples, f"seen on {len(samples)} samples"
    return [feeds.workable_feeds(context.model, context.shapes)], "seen on random inputs"
