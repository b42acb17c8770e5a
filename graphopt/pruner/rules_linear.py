"""Rules of operators that multiply by weights: convolutions, products, recurrent layers, norms."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from graphopt import ir
from graphopt.pruner.atoms import Axis, fixed
from graphopt.pruner.tracing import Axes, Rule, Trace, Unknown

__all__ = ["LINEAR", "is_depthwise", "optional"]

GATES = {"RNN": 1, "GRU": 3, "LSTM": 4}


def optional(node: ir.Node, index: int) -> ir.Value | None:
    """An input, or None where it is left out."""
    return node.inputs[index] if index < len(node.inputs) else None


def is_depthwise(group: int, channels: int, weight_inputs: int) -> bool:
    """Whether each group of a convolution has one input channel."""
    return group > 1 and group == channels and weight_inputs == 1


def _conv(x: int, weight: int, bias: int) -> Rule:
    """Y [N, M, ...] of X [N, C, ...] and W [M, C/group, ...], at these inputs."""

    def rule(trace: Trace, node: ir.Node) -> Sequence[Axes]:
        source, weights = trace.of(node.inputs[x]), trace.of(node.inputs[weight])
        group = int(str(ir.attribute(node, "group", 1)))
        for axis in (*weights[2:], *source[2:]):
            trace.atoms.freeze(axis, f"a spatial axis of {ir.label(node)}")
        channels, inner, outer = source[1], weights[1], weights[0]
        if group == 1:
            trace.unite(channels, inner, node)
        elif is_depthwise(group, len(channels), len(inner)):
            trace.unite(np.repeat(channels, len(outer) // group), outer, node)
        else:
            _grouped(trace, channels, inner, outer, group, node)
        _bias(trace, node, bias, outer)
        return [_spatial(trace, node, source[0], outer)]

    return rule


def _grouped(
    trace: Trace, channels: Axis, inner: Axis, outer: Axis, group: int, node: ir.Node
) -> None:
    """Each group loses the same positions, so that the number of groups stays."""
    if not channels.size or len(channels) != group * len(inner):
        raise Unknown("the number of channels is unknown")
    trace.unite(channels, np.tile(inner, group), node)
    size = len(outer) // group
    trace.unite(outer[size:], np.tile(outer[:size], group - 1), node)


def _conv_transpose(trace: Trace, node: ir.Node) -> Sequence[Axes]:
    """Y [N, M, ...] of X [N, C, ...] and W [C, M/group, ...]."""
    source, weights = trace.of(node.inputs[0]), trace.of(node.inputs[1])
    group = int(str(ir.attribute(node, "group", 1)))
    for axis in (*weights[2:], *source[2:]):
        trace.atoms.freeze(axis, f"a spatial axis of {ir.label(node)}")
    channels, inner, outer = source[1], weights[0], weights[1]
    trace.unite(channels, inner, node)
    made = outer
    if is_depthwise(group, len(channels), len(outer)):
        made = inner
    elif group > 1:
        size = len(inner) // group
        trace.unite(inner[size:], np.tile(inner[:size], group - 1), node)
        made = np.tile(outer, group)
    _bias(trace, node, 2, made)
    return [_spatial(trace, node, source[0], made)]


def _bias(trace: Trace, node: ir.Node, index: int, channels: Axis) -> None:
    bias = optional(node, index)
    if bias is not None:
        trace.unite(trace.of(bias)[0], channels, node)
    trace.vanishing.add(node.outputs[0])


def _spatial(trace: Trace, node: ir.Node, batch: Axis, channels: Axis) -> Axes:
    rank = len(trace.of(node.inputs[0]))
    free = trace.fixed(node.outputs[0]) or [fixed(0)] * rank
    return [batch, channels, *free[2:]]


def _gemm(trace: Trace, node: ir.Node) -> Sequence[Axes]:
    a, b = trace.of(node.inputs[0]), trace.of(node.inputs[1])
    a = a[::-1] if ir.attribute(node, "transA", 0) else a
    b = b[::-1] if ir.attribute(node, "transB", 0) else b
    _contract(trace, node, a[1], b[0])
    bias = optional(node, 2)
    if bias is not None and trace.of(bias):
        trace.broadcast([[a[0], b[1]], trace.of(bias)], node)
    if bias is None or trace.vanishes(bias, b[1]):
        trace.vanishing.add(node.outputs[0])
    return [[a[0], b[1]]]


def _contract(trace: Trace, node: ir.Node, a: Axis, b: Axis) -> None:
    """Two axes that are multiplied and summed over; of activations one must be zero there."""
    trace.unite(a, b, node)
    left, right = node.inputs[0], node.inputs[1]
    if not (trace.vanishes(left, a) or trace.vanishes(right, b)):
        trace.atoms.doubt(a)


def _matmul(trace: Trace, node: ir.Node) -> Sequence[Axes]:
    """A [..., m, k] times B [..., k, n]; FusedMatMul may transpose the last two of each."""
    a, b = list(trace.of(node.inputs[0])), list(trace.of(node.inputs[1]))
    if not a or not b:
        raise Unknown("a rank is unknown")
    if ir.attribute(node, "transBatchA", 0) or ir.attribute(node, "transBatchB", 0):
        raise Unknown("batch axes are transposed")
    if ir.attribute(node, "transA", 0):
        a[-2:] = a[:-3:-1]
    if ir.attribute(node, "transB", 0):
        b[-2:] = b[:-3:-1]
    _contract(trace, node, a[-1], b[-2] if len(b) > 1 else b[0])
    batch = trace.broadcast([a[:-2], b[:-2]], node)
    trace.vanishing.add(node.outputs[0])
    return [[*batch, *a[-2:-1], *(b[-1:] if len(b) > 1 else [])]]


def _qlinear_matmul(trace: Trace, node: ir.Node) -> Sequence[Axes]:
    """QLinearMatMul(a, scale, zero, b, scale, zero, ...): the products' axes, scales per tensor."""
    a, b = trace.of(node.inputs[0]), trace.of(node.inputs[3])
    for index in (1, 2, 4, 5, 6, 7):
        trace.freeze(node.inputs[index], f"a scale of {ir.label(node)}")
    trace.unite(a[-1], b[-2], node)
    return [[*trace.broadcast([a[:-2], b[:-2]], node), a[-2], b[-1]]]


def _qlinear_conv(trace: Trace, node: ir.Node) -> Sequence[Axes]:
    for index in (4, 5):
        scale = trace.of(node.inputs[index])
        if scale and len(scale[0]) > 1:
            trace.unite(scale[0], trace.of(node.inputs[3])[0], node)
    return _conv(0, 3, 8)(trace, node)


def _einsum(trace: Trace, node: ir.Node) -> Sequence[Axes]:
    equation = str(ir.attribute(node, "equation", "")).replace(" ", "")
    left, arrow, right = equation.partition("->")
    if not arrow or "." in equation:
        raise Unknown(f"equation {equation!r}")
    letters: dict[str, Axis] = {}
    for term, value in zip(left.split(","), node.inputs, strict=True):
        if len(set(term)) != len(term):
            raise Unknown(f"equation {equation!r}")
        for letter, axis in zip(term, trace.of(value), strict=True):
            if letter not in letters:
                letters[letter] = axis
            else:
                trace.unite(letters[letter], axis, node)
    for letter, axis in letters.items():
        if letter not in right:
            operands = [v for t, v in zip(left.split(","), node.inputs, strict=True) if letter in t]
            if not any(trace.vanishes(value, axis) for value in operands):
                trace.atoms.doubt(axis)
    trace.vanishing.add(node.outputs[0])
    return [[letters[letter] for letter in right]]


def _recurrent(trace: Trace, node: ir.Node) -> Sequence[Axes]:
    """X [T, N, I], W [D, G*H, I], R [D, G*H, H], B [D, 2*G*H]; Y [T, D, N, H]."""
    x, w, r = (trace.of(node.inputs[i]) for i in range(3))
    layout = bool(ir.attribute(node, "layout", 0))
    hidden, gates = r[2], GATES[node.op_type]
    trace.unite(x[2], w[2], node)
    trace.unite(w[1], np.tile(hidden, gates), node)
    trace.unite(r[1], np.tile(hidden, gates), node)
    repeats = {3: 2 * gates, 7: 3}  # biases, peepholes
    for index, value in enumerate(node.inputs[3:], 3):
        if value is None or index == 4:
            continue
        axes = trace.of(value)
        count = repeats.get(index, 1)
        trace.unite(axes[-1], np.tile(hidden, count), node)
        trace.freeze(value, f"the directions of {ir.label(node)}", range(len(axes) - 1))
    for value in node.inputs[1:3]:
        trace.freeze(value, f"the directions of {ir.label(node)}", [0])
    steps, batch = (x[1], x[0]) if layout else (x[0], x[1])
    directions = fixed(len(w[0]))
    trace.vanishing.update(node.outputs)
    if layout:
        return [[batch, steps, directions, hidden], *[[batch, directions, hidden]] * 2]
    return [[steps, directions, batch, hidden], *[[directions, batch, hidden]] * 2]


def _channel_norm(trace: Trace, node: ir.Node) -> Sequence[Axes]:
    """BatchNormalization, InstanceNormalization: parameters per channel, axis 1."""
    x = trace.of(node.inputs[0])
    for value in node.inputs[1:]:
        trace.unite(trace.of(value)[0], x[1], node)
    if node.op_type == "InstanceNormalization":
        for axis in x[2:]:
            trace.atoms.freeze(axis, f"normalized over at {ir.label(node)}")
    trace.vanishing.add(node.outputs[0])
    return [list(x)]


def _layer_norm(trace: Trace, node: ir.Node) -> Sequence[Axes]:
    """Normalization over trailing axes: what is left has other statistics."""
    x = trace.of(node.inputs[0])
    skip = node.op_type.startswith("Skip")
    start = len(x) - 1 if skip else int(str(ir.attribute(node, "axis", -1))) % len(x)
    operands = list(node.inputs[1:])
    if skip:
        trace.broadcast([x, trace.of(operands[0])], node)
        operands = operands[1:]
    for value in operands:
        if value is not None:
            trace.broadcast([x, trace.of(value)], node)
    for axis in x[start:]:
        trace.atoms.doubt(axis)
    trace.vanishing.add(node.outputs[0])
    outputs: list[Axes] = [list(x)]
    for value in node.outputs[1:]:
        outputs.append(list(x) if skip else trace.fixed(value))
    return outputs


def _group_norm(trace: Trace, node: ir.Node) -> Sequence[Axes]:
    """Each group of channels loses the same positions."""
    x = trace.of(node.inputs[0])
    group = int(str(ir.attribute(node, "num_groups", 1)))
    size = len(x[1]) // group
    trace.unite(x[1][size:], np.tile(x[1][:size], group - 1), node)
    trace.atoms.doubt(x[1])
    for value in node.inputs[1:3]:
        axis = trace.of(value)[0]
        if len(axis) == len(x[1]):
            trace.unite(axis, x[1], node)
        else:
            trace.atoms.freeze(axis, f"a parameter per group of {ir.label(node)}")
    trace.vanishing.add(node.outputs[0])
    return [list(x)]


LINEAR: dict[tuple[str, str], Rule] = {
    ("", "BatchNormalization"): _channel_norm,
    ("", "Conv"): _conv(0, 1, 2),
    ("", "ConvInteger"): _conv(0, 1, 4),
    ("", "ConvTranspose"): _conv_transpose,
    ("", "Einsum"): _einsum,
    ("", "GRU"): _recurrent,
    ("", "Gemm"): _gemm,
    ("", "GroupNormalization"): _group_norm,
    ("", "InstanceNormalization"): _channel_norm,
    ("", "LSTM"): _recurrent,
    ("", "LayerNormalization"): _layer_norm,
    ("", "MatMul"): _matmul,
    ("", "MatMulInteger"): _matmul,
    ("", "QLinearConv"): _qlinear_conv,
    ("", "QLinearMatMul"): _qlinear_matmul,
    ("", "RMSNormalization"): _layer_norm,
    ("", "RNN"): _recurrent,
    ("", "SimplifiedLayerNormalization"): _layer_norm,
    ("com.microsoft", "FusedConv"): _conv(0, 1, 2),
    ("com.microsoft", "FusedGemm"): _gemm,
    ("com.microsoft", "FusedMatMul"): _matmul,
    ("com.microsoft", "SkipLayerNormalization"): _layer_norm,
    ("com.microsoft", "SkipSimplifiedLayerNormalization"): _layer_norm,
}
