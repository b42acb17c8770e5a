"""Gradients of convolutions, products, normalizations and pools."""

from __future__ import annotations

import math

import numpy as np

from graphopt import ir
from graphopt.errors import InputError
from graphopt.gram import padding
from graphopt.pruner.backward import (
    Array,
    Gradients,
    Rule,
    fit,
    integer,
    numbers,
    real,
    window_of,
)

__all__ = ["LINEAR"]


def _conv(node: ir.Node, x: list[Array], y: Array, g: Array) -> Gradients:
    """A product for each place of the kernel, so that no columns are laid out."""
    source, weights = x[0], x[1]
    rank = weights.ndim - 2
    groups, batch = integer(node, "group", 1), len(source)
    steps = numbers(node, "strides", [1] * rank)
    wide = numbers(node, "dilations", [1] * rank)
    spans = [d * (k - 1) + 1 for k, d in zip(weights.shape[2:], wide, strict=True)]
    pads = list(zip(*padding(node, source.shape[2:], spans, steps), strict=True))
    inner, outer = weights.shape[1], weights.shape[0] // groups
    flat = g.reshape(batch, groups, outer, -1)
    bias = [flat.sum((0, 3)).ravel()] if len(x) > 2 else []
    if groups == 1 and max(spans) == max(steps) == 1 and g.shape[2:] == source.shape[2:]:
        points, matrix = source.reshape(batch, inner, -1), weights.reshape(outer, inner)
        change = np.matmul(flat[:, 0], points.transpose(0, 2, 1)).sum(0)
        returned = np.matmul(matrix.T, flat[:, 0])
        return [returned.reshape(source.shape), change.reshape(weights.shape), *bias]
    padded = np.pad(source, [(0, 0), (0, 0), *pads])
    back = np.zeros_like(padded)
    slope = np.zeros_like(weights)
    every = "bcxyzuvw"[: rank + 2]
    for place in np.ndindex(weights.shape[2:]):
        spots = [p * d for p, d in zip(place, wide, strict=True)]
        window = (slice(None), slice(None), *window_of(spots, steps, g.shape[2:]))
        part = padded[window]
        kernel = weights[(slice(None), slice(None), *place)]
        if inner == outer == 1:
            slope[(slice(None), 0, *place)] = np.einsum(f"{every},{every}->c", g, part)
            back[window] += g * kernel.reshape(-1, *[1] * rank)
            continue
        rows, kernel = part.reshape(batch, groups, inner, -1), kernel.reshape(groups, outer, inner)
        change = np.matmul(flat, rows.transpose(0, 1, 3, 2)).sum(0)
        returned = np.matmul(kernel.transpose(0, 2, 1)[None], flat)
        slope[(slice(None), slice(None), *place)] = change.reshape(-1, inner)
        back[window] += returned.reshape(part.shape)
    inside = tuple(slice(a, a + n) for (a, _), n in zip(pads, source.shape[2:], strict=True))
    return [back[(slice(None), slice(None), *inside)], slope, *bias]


def _conv_transpose(node: ir.Node, x: list[Array], y: Array, g: Array) -> Gradients:
    """What a convolution with the same kernel makes of the gradient."""
    source, weights = x[0], x[1]
    rank = weights.ndim - 2
    groups, batch = integer(node, "group", 1), len(source)
    inner, outer = len(weights) // groups, weights.shape[1]
    steps = numbers(node, "strides", [1] * rank)
    wide = numbers(node, "dilations", [1] * rank)
    if (
        str(ir.attribute(node, "auto_pad", "NOTSET")) != "NOTSET"
        or "output_shape" in node.attributes
    ):
        raise InputError(f"no gradient is known of such a ConvTranspose ({ir.label(node)})")
    begins = numbers(node, "pads", [0] * 2 * rank)[:rank]
    sizes = zip(source.shape[2:], steps, wide, weights.shape[2:], begins, g.shape[2:], strict=True)
    full = [max((n - 1) * s + d * (k - 1) + 1, b + m) for n, s, d, k, b, m in sizes]
    whole = np.zeros((batch, groups * outer, *full), g.dtype)
    inside = tuple(slice(b, b + n) for b, n in zip(begins, g.shape[2:], strict=True))
    whole[(slice(None), slice(None), *inside)] = g
    rows = source.reshape(batch, groups, inner, -1)
    back, slope = np.zeros_like(rows), np.zeros_like(weights)
    for place in np.ndindex(weights.shape[2:]):
        spots = [p * d for p, d in zip(place, wide, strict=True)]
        part = whole[(slice(None), slice(None), *window_of(spots, steps, source.shape[2:]))]
        flat = part.reshape(batch, groups, outer, -1)
        kernel = weights[(slice(None), slice(None), *place)].reshape(groups, inner, outer)
        back += np.matmul(kernel, flat)
        change = np.matmul(rows, flat.transpose(0, 1, 3, 2)).sum(0)
        slope[(slice(None), slice(None), *place)] = change.reshape(-1, outer)
    bias = [g.sum((0, *range(2, g.ndim)))] if len(x) > 2 else []
    return [back.reshape(source.shape), slope, *bias]


def _gemm(node: ir.Node, x: list[Array], y: Array, g: Array) -> Gradients:
    alpha, beta = real(node, "alpha", 1.0), real(node, "beta", 1.0)
    a = x[0].T if integer(node, "transA", 0) else x[0]
    b = x[1].T if integer(node, "transB", 0) else x[1]
    first, second = alpha * g @ b.T, alpha * a.T @ g
    first = first.T if integer(node, "transA", 0) else first
    second = second.T if integer(node, "transB", 0) else second
    return [first, second, *([fit(beta * g, x[2].shape)] if len(x) > 2 else [])]


def _matmul(node: ir.Node, x: list[Array], y: Array, g: Array) -> Gradients:
    a, b = x
    if a.ndim == 1 or b.ndim == 1:
        raise InputError(f"no gradient is known of vectors' products ({ir.label(node)})")
    if b.ndim == 2:
        flat = a.reshape(-1, a.shape[-1]).T @ g.reshape(-1, g.shape[-1])
        return [g @ b.T, flat]
    return [
        fit(np.matmul(g, b.swapaxes(-1, -2)), a.shape),
        fit(np.matmul(a.swapaxes(-1, -2), g), b.shape),
    ]


def _softmax(node: ir.Node, x: list[Array], y: Array, g: Array) -> Gradients:
    """Of one axis; before opset 13 of that one and all behind it."""
    axes = _softmax_axes(node, y)
    return [y * (g - (g * y).sum(axes, keepdims=True))]


def _softmax_axes(node: ir.Node, y: Array) -> tuple[int, ...]:
    old = node.graph is not None and ir.opset(node.graph) < 13
    axis = integer(node, "axis", 1 if old else -1) % y.ndim
    return tuple(range(axis, y.ndim if old else axis + 1))


def _log_softmax(node: ir.Node, x: list[Array], y: Array, g: Array) -> Gradients:
    axes = _softmax_axes(node, y)
    return [g - np.exp(y) * g.sum(axes, keepdims=True)]


def _batch_norm(node: ir.Node, x: list[Array], y: Array, g: Array) -> Gradients:
    source, scale, _, mean, variance = x
    shape = (1, -1, *[1] * (source.ndim - 2))
    deviation = np.sqrt(variance + real(node, "epsilon", 1e-5)).reshape(shape)
    normal = (source - mean.reshape(shape)) / deviation
    axes = (0, *range(2, source.ndim))
    return [g * scale.reshape(shape) / deviation, (g * normal).sum(axes), g.sum(axes), None, None]


def _layer_norm(node: ir.Node, x: list[Array], y: Array, g: Array) -> Gradients:
    source, scale = x[0], x[1]
    axes = tuple(range(integer(node, "axis", -1) % source.ndim, source.ndim))
    centred = source - source.mean(axes, keepdims=True)
    spread = np.square(centred).mean(axes, keepdims=True) + real(node, "epsilon", 1e-5)
    normal = centred / np.sqrt(spread)
    inner = g * scale
    mean = inner.mean(axes, keepdims=True)
    along = (inner * normal).mean(axes, keepdims=True)
    bias = [fit(g, x[2].shape)] if len(x) > 2 else []
    return [(inner - mean - normal * along) / np.sqrt(spread), fit(g * normal, scale.shape), *bias]


def _rms_norm(node: ir.Node, x: list[Array], y: Array, g: Array) -> Gradients:
    source, scale = x[0], x[1]
    axes = tuple(range(integer(node, "axis", -1) % source.ndim, source.ndim))
    size = np.sqrt(np.square(source).mean(axes, keepdims=True) + real(node, "epsilon", 1e-5))
    normal, inner = source / size, g * scale
    along = (inner * normal).mean(axes, keepdims=True)
    return [((inner - normal * along) / size).astype(g.dtype), fit(g * normal, scale.shape)]


def _group_norm(node: ir.Node, x: list[Array], y: Array, g: Array) -> Gradients:
    """InstanceNormalization too, whose groups have one channel each; scales by channel or group."""
    source, scale = x[0], x[1]
    groups = integer(node, "num_groups", source.shape[1])
    split = (len(source), groups, -1)
    each = source.reshape(split)
    centred = each - each.mean(2, keepdims=True)
    spread = np.square(centred).mean(2, keepdims=True) + real(node, "epsilon", 1e-5)
    normal = centred / np.sqrt(spread)
    by_channel = np.repeat(scale, source.shape[1] // len(scale))
    inner = (g * by_channel.reshape(1, -1, *[1] * (g.ndim - 2))).reshape(split)
    along = (inner * normal).mean(2, keepdims=True)
    back = (inner - inner.mean(2, keepdims=True) - normal * along) / np.sqrt(spread)
    scales = (g * normal.reshape(g.shape)).reshape(len(g), len(scale), -1).sum((0, 2))
    shifts = g.reshape(len(g), len(scale), -1).sum((0, 2))
    return [back.reshape(source.shape).astype(g.dtype), scales, shifts]


def _pool(node: ir.Node, x: list[Array], y: Array, g: Array) -> Gradients:
    """MaxPool: to all that are as large as the largest; AveragePool: in equal shares."""
    source = x[0]
    kernel = numbers(node, "kernel_shape", [])
    steps = numbers(node, "strides", [1] * len(kernel))
    if integer(node, "ceil_mode", 0) or any(d != 1 for d in numbers(node, "dilations", [])):
        raise InputError(f"no gradient is known of such pooling ({ir.label(node)})")
    pads = list(zip(*padding(node, source.shape[2:], kernel, steps), strict=True))
    largest = node.op_type == "MaxPool"
    filler = -np.inf if largest else 0.0
    padded = np.pad(source, [(0, 0), (0, 0), *pads], constant_values=filler)
    back = np.zeros_like(padded)
    share: Array = np.asarray(1.0 / math.prod(kernel))
    if not largest and not integer(node, "count_include_pad", 0):
        inside = np.pad(np.ones(source.shape[2:]), pads)
        places = [inside[window_of(p, steps, g.shape[2:])] for p in np.ndindex(*kernel)]
        share = 1.0 / np.sum(places, axis=0)
    for place in np.ndindex(*kernel):
        window = (slice(None), slice(None), *window_of(place, steps, g.shape[2:]))
        back[window] += g * (padded[window] == y) if largest else g * share
    area = tuple(slice(a, a + n) for (a, _), n in zip(pads, source.shape[2:], strict=True))
    return [back[(slice(None), slice(None), *area)]]


LINEAR: dict[str, Rule] = {
    "AveragePool": _pool,
    "BatchNormalization": _batch_norm,
    "Conv": _conv,
    "ConvTranspose": _conv_transpose,
    "Gemm": _gemm,
    "GroupNormalization": _group_norm,
    "InstanceNormalization": _group_norm,
    "LayerNormalization": _layer_norm,
    "LogSoftmax": _log_softmax,
    "MatMul": _matmul,
    "MaxPool": _pool,
    "RMSNormalization": _rms_norm,
    "Softmax": _softmax,
}
"""Rules by operator."""
