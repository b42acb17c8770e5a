"""Gradients of what is computed element by element."""

from __future__ import annotations

import math

import numpy as np

from graphopt import ir
from graphopt.pruner.backward import Array, Gradients, Rule, fit, real

__all__ = ["POINTWISE"]

_ALPHA, _GAMMA = 1.6732632423543772, 1.0507009873554805
"""Defaults of Selu's attributes in ONNX's specification."""


def _add(node: ir.Node, x: list[Array], y: Array, g: Array) -> Gradients:
    second = -g if node.op_type == "Sub" else g
    return [fit(g, x[0].shape), fit(second, x[1].shape)]


def _mul(node: ir.Node, x: list[Array], y: Array, g: Array) -> Gradients:
    if node.op_type == "Div":
        return [fit(g / x[1], x[0].shape), fit(-g * y / x[1], x[1].shape)]
    return [fit(g * x[1], x[0].shape), fit(g * x[0], x[1].shape)]


def _pow(node: ir.Node, x: list[Array], y: Array, g: Array) -> Gradients:
    return [fit(g * x[1] * np.power(x[0], x[1] - 1), x[0].shape), None]


def _relu(node: ir.Node, x: list[Array], y: Array, g: Array) -> Gradients:
    return [np.where(y > 0, g, 0).astype(g.dtype, copy=False)]


def _leaky(node: ir.Node, x: list[Array], y: Array, g: Array) -> Gradients:
    slope = x[1] if len(x) > 1 else real(node, "alpha", 0.01)
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
    return [fit(np.where(part == y, g, 0).astype(g.dtype, copy=False), part.shape) for part in x]


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
        return [np.where((y > 0) & (y < 1), g * real(node, "alpha", 0.2), 0).astype(g.dtype)]
    inside = np.abs(x[0]) < 3
    return [np.where(inside, g * (2 * x[0] + 3) / 6, np.where(x[0] >= 3, g, 0)).astype(g.dtype)]


def _identity(node: ir.Node, x: list[Array], y: Array, g: Array) -> Gradients:
    return [g]


def _sum(node: ir.Node, x: list[Array], y: Array, g: Array) -> Gradients:
    return [fit(g, part.shape) for part in x]


def _negate(node: ir.Node, x: list[Array], y: Array, g: Array) -> Gradients:
    return [-g]


def _magnitude(node: ir.Node, x: list[Array], y: Array, g: Array) -> Gradients:
    return [g * np.sign(x[0])]


def _reciprocal(node: ir.Node, x: list[Array], y: Array, g: Array) -> Gradients:
    return [-g * y * y]


def _softplus(node: ir.Node, x: list[Array], y: Array, g: Array) -> Gradients:
    return [g * (1 - np.exp(-y))]


def _elu(node: ir.Node, x: list[Array], y: Array, g: Array) -> Gradients:
    return [np.where(x[0] > 0, g, g * (y + g.dtype.type(real(node, "alpha", 1.0))))]


def _celu(node: ir.Node, x: list[Array], y: Array, g: Array) -> Gradients:
    steep = g.dtype.type(real(node, "alpha", 1.0))
    return [np.where(x[0] > 0, g, g * (y / steep + 1))]


def _selu(node: ir.Node, x: list[Array], y: Array, g: Array) -> Gradients:
    gamma = real(node, "gamma", _GAMMA)
    below = y + g.dtype.type(real(node, "alpha", _ALPHA) * gamma)
    return [g * np.where(x[0] > 0, np.full_like(y, gamma), below)]


def _softsign(node: ir.Node, x: list[Array], y: Array, g: Array) -> Gradients:
    return [g * np.square(1 - np.abs(y))]


def _mish(node: ir.Node, x: list[Array], y: Array, g: Array) -> Gradients:
    inner = np.tanh(np.logaddexp(x[0], g.dtype.type(0)))
    gate = (1 + np.tanh(x[0] / 2)) / 2
    return [g * (inner + x[0] * (1 - inner * inner) * gate)]


def _wave(node: ir.Node, x: list[Array], y: Array, g: Array) -> Gradients:
    return [g * np.cos(x[0]) if node.op_type == "Sin" else -g * np.sin(x[0])]


def _swish(node: ir.Node, x: list[Array], y: Array, g: Array) -> Gradients:
    steep = g.dtype.type(real(node, "alpha", 1.0))
    gate = (1 + np.tanh(steep * x[0] / 2)) / 2
    return [g * (gate + steep * y * (1 - gate))]


def _where(node: ir.Node, x: list[Array], y: Array, g: Array) -> Gradients:
    zero = g.dtype.type(0)
    chosen, other = np.where(x[0], g, zero), np.where(x[0], zero, g)
    return [None, fit(chosen, x[1].shape), fit(other, x[2].shape)]


def _cast(node: ir.Node, x: list[Array], y: Array, g: Array) -> Gradients:
    return [g.astype(x[0].dtype) if x[0].dtype.kind == "f" else None]


POINTWISE: dict[str, Rule] = {
    "Abs": _magnitude,
    "Add": _add,
    "Cast": _cast,
    "Celu": _celu,
    "Clip": _clip,
    "Cos": _wave,
    "Div": _mul,
    "Dropout": _identity,
    "Elu": _elu,
    "Erf": _erf,
    "Exp": _exp,
    "Gelu": _gelu,
    "HardSigmoid": _hard,
    "HardSwish": _hard,
    "Identity": _identity,
    "LeakyRelu": _leaky,
    "Log": _log,
    "Max": _extreme,
    "Min": _extreme,
    "Mish": _mish,
    "Mul": _mul,
    "Neg": _negate,
    "PRelu": _leaky,
    "Pow": _pow,
    "Reciprocal": _reciprocal,
    "Relu": _relu,
    "Selu": _selu,
    "Sigmoid": _sigmoid,
    "Sin": _wave,
    "Softplus": _softplus,
    "Softsign": _softsign,
    "Sqrt": _sqrt,
    "Sub": _add,
    "Sum": _sum,
    "Swish": _swish,
    "Tanh": _tanh,
    "Where": _where,
}
"""Rules by operator."""
