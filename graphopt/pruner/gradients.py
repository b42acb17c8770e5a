"""Reverse mode over the common operators: gradients of a model's outputs by its constants.

ONNX Runtime computes the values, numpy goes back through them. Each rule gives the gradients of a
node's inputs from those of its output (Griewank and Walther 2008, Evaluating derivatives).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from graphopt import files, ir
from graphopt.errors import InputError
from graphopt.gram import padding
from graphopt.runner import BATCH_SECONDS, Runner

__all__ = ["Tape", "unknown", "with_inputs"]

Array = npt.NDArray[Any]
Values = Mapping[str, Array]
Gradients = Sequence[Array | None]
Rule = Callable[[ir.Node, list[Array], Array, Array], Gradients]
"""Node, its inputs, its output, the gradient of that → the gradients of the inputs."""


class Tape:
    """A model whose chosen constants are inputs, with all values that going back takes.

    Raises InputError where an operator between these constants and the outputs has no rule.
    """

    def __init__(self, model: ir.Model, names: Sequence[str]) -> None:
        self._nodes = _path(model, set(names))
        strange = unknown(model, names)
        if strange is not None:
            raise InputError(f"no gradient is known of {strange.op_type} ({ir.label(strange)})")
        self.outputs = [value.name or "" for value in model.graph.outputs]
        self._constants = {
            name: array
            for name, value in model.graph.initializers.items()
            if (array := ir.array(value)) is not None and name not in names
        }
        copy = with_inputs(model, names)
        graph = copy.graph
        known = {v.name: v for node in graph for v in node.outputs if v.name}
        wanted = dict.fromkeys(
            value.name
            for node in self._nodes
            for value in (*node.inputs, *node.outputs[:1])
            if value is not None and value.name in known
        )
        shown = {value.name for value in graph.outputs}
        graph.outputs.extend(known[name] for name in wanted if name not in shown)
        self._runner = Runner(copy, seconds=BATCH_SECONDS)

    def forward(self, feeds: Values, parameters: Values) -> dict[str, Array]:
        """All values by name."""
        found = self._runner.run({**feeds, **parameters})
        return {**self._constants, **feeds, **parameters, **cast("dict[str, Array]", found)}

    def backward(self, values: Values, slopes: Values, names: Sequence[str]) -> dict[str, Array]:
        """Gradients by these constants, given those by the outputs."""
        known: dict[str, Array] = dict(slopes)
        for node in reversed(self._nodes):
            name = node.outputs[0].name or ""
            slope = known.pop(name, None) if name not in names else known.get(name)
            if slope is None:
                continue
            inputs = [values[v.name or ""] for v in node.inputs if v is not None]
            found = _RULES[node.op_type](node, inputs, values[name], slope)
            for value, gradient in zip(node.inputs, found, strict=False):
                if value is None or gradient is None or value.name is None:
                    continue
                earlier = known.get(value.name)
                known[value.name] = gradient if earlier is None else earlier + gradient
        return {name: known[name] for name in names if name in known}


def unknown(model: ir.Model, names: Sequence[str]) -> ir.Node | None:
    """A node between constants and the outputs whose gradient is not known, where there is one."""
    for node in _path(model, set(names)):
        if node.domain not in ("", "ai.onnx") or node.op_type not in _RULES:
            return node
    return None


def with_inputs(model: ir.Model, names: Sequence[str]) -> ir.Model:
    """A copy in which constants are inputs."""
    copy = files.copy(model)
    for name in names:
        value = copy.graph.initializers.pop(name)
        value.const_value = None
        copy.graph.inputs.append(value)
    return copy


def _path(model: ir.Model, names: set[str]) -> list[ir.Node]:
    """The nodes between the constants and the outputs, in order."""
    reached: set[ir.Value] = {
        value for name, value in model.graph.initializers.items() if name in names
    }
    forward: list[ir.Node] = []
    for node in model.graph:
        if node.op_type in ("Shape", "Size"):
            continue  # sizes do not answer to values
        if any(value in reached for value in node.inputs if value is not None):
            forward.append(node)
            reached.update(node.outputs)
    needed = set(model.graph.outputs)
    path: list[ir.Node] = []
    for node in reversed(forward):
        if any(value in needed for value in node.outputs):
            path.append(node)
            needed.update(value for value in node.inputs if value is not None)
    return path[::-1]


def _fit(gradient: Array, shape: tuple[int, ...]) -> Array:
    """A gradient summed over what was broadcast."""
    extra = gradient.ndim - len(shape)
    if extra:
        gradient = gradient.sum(tuple(range(extra)))
    axes = tuple(i for i, size in enumerate(shape) if size == 1 and gradient.shape[i] != 1)
    return gradient.sum(axes, keepdims=True) if axes else gradient


def _add(node: ir.Node, x: list[Array], y: Array, g: Array) -> Gradients:
    second = -g if node.op_type == "Sub" else g
    return [_fit(g, x[0].shape), _fit(second, x[1].shape)]


def _mul(node: ir.Node, x: list[Array], y: Array, g: Array) -> Gradients:
    if node.op_type == "Div":
        return [_fit(g / x[1], x[0].shape), _fit(-g * y / x[1], x[1].shape)]
    return [_fit(g * x[1], x[0].shape), _fit(g * x[0], x[1].shape)]


def _pow(node: ir.Node, x: list[Array], y: Array, g: Array) -> Gradients:
    return [_fit(g * x[1] * np.power(x[0], x[1] - 1), x[0].shape), None]


def _numbers(node: ir.Node, name: str, default: Sequence[int]) -> list[int]:
    attr = node.attributes.get(name)
    return list(default) if attr is None else list(attr.as_ints())


def _integer(node: ir.Node, name: str, default: int) -> int:
    return int(str(ir.attribute(node, name, default)))


def _real(node: ir.Node, name: str, default: float) -> float:
    return float(str(ir.attribute(node, name, default)))


def _conv(node: ir.Node, x: list[Array], y: Array, g: Array) -> Gradients:
    """A product for each place of the kernel, so that no columns are laid out."""
    source, weights = x[0], x[1]
    rank = weights.ndim - 2
    groups, batch = _integer(node, "group", 1), len(source)
    steps = _numbers(node, "strides", [1] * rank)
    wide = _numbers(node, "dilations", [1] * rank)
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
        window = (slice(None), slice(None), *_window(spots, steps, g.shape[2:]))
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


def _gemm(node: ir.Node, x: list[Array], y: Array, g: Array) -> Gradients:
    alpha, beta = _real(node, "alpha", 1.0), _real(node, "beta", 1.0)
    a = x[0].T if _integer(node, "transA", 0) else x[0]
    b = x[1].T if _integer(node, "transB", 0) else x[1]
    first, second = alpha * g @ b.T, alpha * a.T @ g
    first = first.T if _integer(node, "transA", 0) else first
    second = second.T if _integer(node, "transB", 0) else second
    return [first, second, *([_fit(beta * g, x[2].shape)] if len(x) > 2 else [])]


def _matmul(node: ir.Node, x: list[Array], y: Array, g: Array) -> Gradients:
    a, b = x
    if a.ndim == 1 or b.ndim == 1:
        raise InputError(f"no gradient is known of vectors' products ({ir.label(node)})")
    if b.ndim == 2:
        flat = a.reshape(-1, a.shape[-1]).T @ g.reshape(-1, g.shape[-1])
        return [g @ b.T, flat]
    return [
        _fit(np.matmul(g, b.swapaxes(-1, -2)), a.shape),
        _fit(np.matmul(a.swapaxes(-1, -2), g), b.shape),
    ]


def _relu(node: ir.Node, x: list[Array], y: Array, g: Array) -> Gradients:
    return [np.where(y > 0, g, 0).astype(g.dtype, copy=False)]


def _leaky(node: ir.Node, x: list[Array], y: Array, g: Array) -> Gradients:
    slope = x[1] if len(x) > 1 else _real(node, "alpha", 0.01)
    return [np.where(x[0] > 0, g, g * slope).astype(g.dtype, copy=False), None]


def _clip(node: ir.Node, x: list[Array], y: Array, g: Array) -> Gradients:
    return [np.where(y == x[0], g, 0).astype(g.dtype, copy=False)]


def _sigmoid(node: ir.Node, x: list[Array], y: Array, g: Array) -> Gradients:
    return [g * y * (1 - y)]


def _tanh(node: ir.Node, x: list[Array], y: Array, g: Array) -> Gradients:
    return [g * (1 - y * y)]


def _sqrt(node: ir.Node, x: list[Array], y: Array, g: Array) -> Gradients:
    return [g / (2 * y)]


def _exp(node: ir.Node, x: list[Array], y: Array, g: Array) -> Gradients:
    return [g * y]


def _log(node: ir.Node, x: list[Array], y: Array, g: Array) -> Gradients:
    return [g / x[0]]


def _extreme(node: ir.Node, x: list[Array], y: Array, g: Array) -> Gradients:
    """Max and Min: to whichever it is."""
    return [_fit(np.where(part == y, g, 0).astype(g.dtype, copy=False), part.shape) for part in x]


def _erf(node: ir.Node, x: list[Array], y: Array, g: Array) -> Gradients:
    return [g * (2 / math.sqrt(math.pi)) * np.exp(-x[0] * x[0])]


def _gelu(node: ir.Node, x: list[Array], y: Array, g: Array) -> Gradients:
    """By differences: y holds x times the bell's integral, so that is y / x away from zero."""
    step = x[0].dtype.type(1.0)
    bell = np.exp(-x[0] * x[0] / 2) / math.sqrt(2 * math.pi)
    safe = np.where(np.abs(x[0]) < 1e-3, step, x[0])
    part = np.where(np.abs(x[0]) < 1e-3, 0.5 + x[0] / math.sqrt(2 * math.pi), y / safe)
    return [(g * (part + x[0] * bell)).astype(g.dtype, copy=False)]


def _hard(node: ir.Node, x: list[Array], y: Array, g: Array) -> Gradients:
    if node.op_type == "HardSigmoid":
        return [np.where((y > 0) & (y < 1), g * _real(node, "alpha", 0.2), 0).astype(g.dtype)]
    inside = np.abs(x[0]) < 3
    return [np.where(inside, g * (2 * x[0] + 3) / 6, np.where(x[0] >= 3, g, 0)).astype(g.dtype)]


def _softmax(node: ir.Node, x: list[Array], y: Array, g: Array) -> Gradients:
    """Of one axis; before opset 13 of that one and all behind it."""
    old = node.graph is not None and ir.opset(node.graph) < 13
    axis = _integer(node, "axis", 1 if old else -1) % y.ndim
    axes = tuple(range(axis, y.ndim if old else axis + 1))
    return [y * (g - (g * y).sum(axes, keepdims=True))]


def _batch_norm(node: ir.Node, x: list[Array], y: Array, g: Array) -> Gradients:
    source, scale, _, mean, variance = x
    shape = (1, -1, *[1] * (source.ndim - 2))
    deviation = np.sqrt(variance + _real(node, "epsilon", 1e-5)).reshape(shape)
    normal = (source - mean.reshape(shape)) / deviation
    axes = (0, *range(2, source.ndim))
    return [g * scale.reshape(shape) / deviation, (g * normal).sum(axes), g.sum(axes), None, None]


def _layer_norm(node: ir.Node, x: list[Array], y: Array, g: Array) -> Gradients:
    source, scale = x[0], x[1]
    axes = tuple(range(_integer(node, "axis", -1) % source.ndim, source.ndim))
    centred = source - source.mean(axes, keepdims=True)
    spread = np.square(centred).mean(axes, keepdims=True) + _real(node, "epsilon", 1e-5)
    normal = centred / np.sqrt(spread)
    inner = g * scale
    mean = inner.mean(axes, keepdims=True)
    along = (inner * normal).mean(axes, keepdims=True)
    bias = [_fit(g, x[2].shape)] if len(x) > 2 else []
    return [(inner - mean - normal * along) / np.sqrt(spread), _fit(g * normal, scale.shape), *bias]


def _reshape(node: ir.Node, x: list[Array], y: Array, g: Array) -> Gradients:
    return [g.reshape(x[0].shape)]


def _transpose(node: ir.Node, x: list[Array], y: Array, g: Array) -> Gradients:
    order = _numbers(node, "perm", range(x[0].ndim)[::-1])
    return [g.transpose(np.argsort(order))]


def _concat(node: ir.Node, x: list[Array], y: Array, g: Array) -> Gradients:
    axis = _integer(node, "axis", 0)
    return np.split(g, np.cumsum([part.shape[axis] for part in x])[:-1], axis)


def _mean(node: ir.Node, x: list[Array], y: Array, g: Array) -> Gradients:
    if node.op_type == "GlobalAveragePool":
        axes = list(range(2, x[0].ndim))
    else:
        axes = _numbers(node, "axes", x[1].tolist() if len(x) > 1 else range(x[0].ndim))
    axes = [axis % x[0].ndim for axis in axes]
    kept = [1 if axis in axes else size for axis, size in enumerate(x[0].shape)]
    share = math.prod(x[0].shape[axis] for axis in axes) if node.op_type != "ReduceSum" else 1
    return [np.broadcast_to(g.reshape(kept) / share, x[0].shape).astype(g.dtype, copy=False)]


def _pool(node: ir.Node, x: list[Array], y: Array, g: Array) -> Gradients:
    """MaxPool: to all that are as large as the largest; AveragePool: in equal shares."""
    source = x[0]
    kernel = _numbers(node, "kernel_shape", [])
    steps = _numbers(node, "strides", [1] * len(kernel))
    if _integer(node, "ceil_mode", 0) or any(d != 1 for d in _numbers(node, "dilations", [])):
        raise InputError(f"no gradient is known of such pooling ({ir.label(node)})")
    pads = list(zip(*padding(node, source.shape[2:], kernel, steps), strict=True))
    largest = node.op_type == "MaxPool"
    filler = -np.inf if largest else 0.0
    padded = np.pad(source, [(0, 0), (0, 0), *pads], constant_values=filler)
    back = np.zeros_like(padded)
    share: Array = np.asarray(1.0 / math.prod(kernel))
    if not largest and not _integer(node, "count_include_pad", 0):
        inside = np.pad(np.ones(source.shape[2:]), pads)
        places = [inside[_window(p, steps, g.shape[2:])] for p in np.ndindex(*kernel)]
        share = 1.0 / np.sum(places, axis=0)
    for place in np.ndindex(*kernel):
        window = (slice(None), slice(None), *_window(place, steps, g.shape[2:]))
        back[window] += g * (padded[window] == y) if largest else g * share
    area = tuple(slice(a, a + n) for (a, _), n in zip(pads, source.shape[2:], strict=True))
    return [back[(slice(None), slice(None), *area)]]


def _window(place: Sequence[int], steps: Sequence[int], sizes: Sequence[int]) -> tuple[slice, ...]:
    return tuple(
        slice(p, p + (n - 1) * s + 1, s) for p, s, n in zip(place, steps, sizes, strict=True)
    )


def _pad(node: ir.Node, x: list[Array], y: Array, g: Array) -> Gradients:
    pads = _numbers(node, "pads", x[1].tolist() if len(x) > 1 else [])
    if len(x) > 3 or str(ir.attribute(node, "mode", "constant")) != "constant" or min(pads) < 0:
        raise InputError(f"no gradient is known of such padding ({ir.label(node)})")
    return [g[tuple(slice(a, a + n) for a, n in zip(pads, x[0].shape, strict=False))]]


def _slice(node: ir.Node, x: list[Array], y: Array, g: Array) -> Gradients:
    rank = x[0].ndim
    given = [list(value.tolist()) for value in x[1:]]
    starts = given[0] if given else _numbers(node, "starts", [])
    ends = given[1] if given else _numbers(node, "ends", [])
    axes = given[2] if len(given) > 2 else _numbers(node, "axes", range(len(starts)))
    steps = given[3] if len(given) > 3 else [1] * len(starts)
    where = [slice(None)] * rank
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        stop = None if step < 0 and end < -x[0].shape[axis] else end
        where[axis] = slice(start, stop, step)
    back = np.zeros_like(x[0])
    back[tuple(where)] = g
    return [back]


def _identity(node: ir.Node, x: list[Array], y: Array, g: Array) -> Gradients:
    return [g]


_RULES: dict[str, Rule] = {
    "Add": _add,
    "AveragePool": _pool,
    "BatchNormalization": _batch_norm,
    "Clip": _clip,
    "Concat": _concat,
    "Conv": _conv,
    "Div": _mul,
    "Dropout": _identity,
    "Erf": _erf,
    "Exp": _exp,
    "Flatten": _reshape,
    "Gelu": _gelu,
    "Gemm": _gemm,
    "GlobalAveragePool": _mean,
    "HardSigmoid": _hard,
    "HardSwish": _hard,
    "Identity": _identity,
    "LayerNormalization": _layer_norm,
    "LeakyRelu": _leaky,
    "Log": _log,
    "MatMul": _matmul,
    "Max": _extreme,
    "MaxPool": _pool,
    "Min": _extreme,
    "Mul": _mul,
    "PRelu": _leaky,
    "Pad": _pad,
    "Pow": _pow,
    "ReduceMean": _mean,
    "ReduceSum": _mean,
    "Relu": _relu,
    "Reshape": _reshape,
    "Sigmoid": _sigmoid,
    "Slice": _slice,
    "Softmax": _softmax,
    "Sqrt": _sqrt,
    "Squeeze": _reshape,
    "Sub": _add,
    "Tanh": _tanh,
    "Transpose": _transpose,
    "Unsqueeze": _reshape,
}
