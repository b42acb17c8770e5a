"""Fuse activation functions from their parts.

Relu, Sigmoid, Tanh, Softsign, Softplus, Mish, LeakyRelu, PRelu, Elu, Selu, HardSigmoid and
HardSwish.

Why: exporters without the operator write it as three to six kernels over the same tensor.
Numerics: rounding.
Needs: opset 14 for HardSwish, 18 for Mish; float32 or float16 for HardSigmoid and HardSwish.
"""

from __future__ import annotations

import numpy as np

from graphopt import ir
from graphopt._match import rtol
from graphopt.passes._algebra import Reader
from graphopt.passes.fuse_matmul_add import broadcasts_into
from graphopt.rewriting import Attribute, Const, Op, Refuse, rewrite

_RELU = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE)
_LINEAR_FROM = 16.0
"""From here on, softplus(x) is x to the last bit of a float32."""


@rewrite
def fuse_sigmoid(op: Op, x: ir.Value) -> ir.Value:
    """1 / (1 + exp(-x))"""
    return op.Div(1.0, op.Add(op.Exp(op.Neg(x)), 1.0))


@fuse_sigmoid.spelling
def _(op: Op, x: ir.Value) -> ir.Value:
    return op.Reciprocal(op.Add(op.Exp(op.Neg(x)), 1.0))


@fuse_sigmoid.spelling
def _(op: Op, x: ir.Value) -> ir.Value:
    return op.Div(1.0, op.Add(op.Exp(op.Mul(x, -1.0)), 1.0))


@fuse_sigmoid.spelling
def _(op: Op, x: ir.Value) -> ir.Value:
    return op.Add(op.Mul(op.Tanh(op.Mul(x, 0.5)), 0.5), 0.5)


@fuse_sigmoid.spelling
def _(op: Op, x: ir.Value) -> ir.Value:
    return op.Mul(op.Add(op.Tanh(op.Mul(x, 0.5)), 1.0), 0.5)


@fuse_sigmoid.spelling
def _(op: Op, x: ir.Value) -> ir.Value:
    return op.Mul(op.Add(op.Tanh(op.Div(x, 2.0)), 1.0), 0.5)


@fuse_sigmoid.spelling
def _(op: Op, x: ir.Value) -> ir.Value:
    power = op.Exp(x)
    return op.Div(power, op.Add(power, 1.0))


@fuse_sigmoid.replace
def _(op: Op, x: ir.Value) -> ir.Value:
    return op.Sigmoid(x)


@rewrite
def fuse_gate(op: Op, x: ir.Value) -> ir.Value:
    """x / (1 + exp(-x))"""
    return op.Div(x, op.Add(op.Exp(op.Neg(x)), 1.0))


@fuse_gate.replace
def _(op: Op, x: ir.Value) -> ir.Value:
    return op.Mul(x, op.Sigmoid(x))


@rewrite
def fuse_tanh(op: Op, x: ir.Value) -> ir.Value:
    """(exp(x) - exp(-x)) / (exp(x) + exp(-x))"""
    up, down = op.Exp(x), op.Exp(op.Neg(x))
    return op.Div(op.Sub(up, down), op.Add(up, down))


@fuse_tanh.spelling
def _(op: Op, x: ir.Value) -> ir.Value:
    return op.Sub(op.Mul(op.Sigmoid(op.Mul(x, 2.0)), 2.0), 1.0)


@fuse_tanh.spelling
def _(op: Op, x: ir.Value) -> ir.Value:
    return op.Add(op.Mul(op.Sigmoid(op.Mul(x, 2.0)), 2.0), -1.0)


@fuse_tanh.replace
def _(op: Op, x: ir.Value) -> ir.Value:
    return op.Tanh(x)


@rewrite
def fuse_softsign(op: Op, x: ir.Value) -> ir.Value:
    """x / (1 + |x|)"""
    return op.Div(x, op.Add(op.Abs(x), 1.0))


@fuse_softsign.replace
def _(op: Op, x: ir.Value) -> ir.Value:
    _not_double(op, x)
    return op.Softsign(x)


@rewrite.on("Clip", "Max", benefit=1)
def fuse_relu(op: Op, node: ir.Node) -> ir.Value | None:
    """max(x, 0)"""
    x, *bounds = node.inputs
    if node.op_type == "Max":
        pairs = (node.inputs, node.inputs[::-1]) if len(node.inputs) == 2 else ()
        x = next((one for one, zero in pairs if op.scalar(zero) == 0), None)
    elif op.opset >= 11:
        low, high = [*bounds, None, None][:2]
        x = x if op.scalar(low) == 0 and high is None else None
    else:
        alone = op.attr(node, "min") == 0 and "max" not in node.attributes
        x = x if alone else None
    if x is None or op.dtype(x) not in _RELU or op.shape(x) != op.shape(node.outputs[0]):
        return None
    return op.Relu(x)


@rewrite
def fuse_stable_softplus(op: Op, x: ir.Value) -> ir.Value:
    """max(x, 0) + log(exp(-|x|) + 1), the second term being fused already"""
    return op.Add(op.Relu(x), op.Softplus(op.Neg(op.Abs(x))))


@fuse_stable_softplus.replace
def _(op: Op, x: ir.Value) -> ir.Value:
    return op.Softplus(x)


@rewrite
def fuse_softplus(op: Op, x: ir.Value) -> ir.Value:
    """log(exp(x) + 1)"""
    return op.Log(op.Add(op.Exp(x), 1.0))


@fuse_softplus.replace
def _(op: Op, x: ir.Value) -> ir.Value:
    _not_double(op, x)
    return op.Softplus(x)


@rewrite
def fuse_softplus_of_gate(op: Op, x: ir.Value) -> ir.Value:
    """-log(sigmoid(-x))"""
    return op.Neg(op.Log(op.Sigmoid(op.Neg(x))))


@fuse_softplus_of_gate.replace
def _(op: Op, x: ir.Value) -> ir.Value:
    _not_double(op, x)
    return op.Softplus(x)


@rewrite.on("Where", benefit=2)
def softplus_without_threshold(op: Op, node: ir.Node) -> ir.Value | None:
    """x where k x is above a threshold, else softplus(k x) / k, as torch has it."""
    condition, x, soft = node.inputs
    above = None if condition is None else condition.producer()
    if above is None or above.op_type not in ("Greater", "GreaterOrEqual") or x is None:
        return None
    reader = Reader(op, node)
    scale, tensors = reader.factors(soft)
    softplus = reader.take(tensors[0], "Softplus") if len(tensors) == 1 else None
    inner = None if softplus is None else reader.polynomial(softplus.inputs[0], x)
    compared = reader.polynomial(above.inputs[0], x)
    limit = reader.number(above.inputs[1])
    if inner is None or compared is None or inner.keys() != {1} or inner != compared:
        return None
    if limit is None or limit < _LINEAR_FROM or not reader.near(inner[1] * scale, 1.0, None):
        return None
    return soft if op.dtype(x) in _RELU[:3] else None


def _not_double(op: Op, x: ir.Value) -> None:
    if op.dtype(x) == ir.DataType.DOUBLE:
        raise Refuse("ONNX Runtime does not have it in double precision")


@rewrite
def fuse_mish(op: Op, x: ir.Value) -> ir.Value:
    """x tanh(softplus(x))"""
    return op.Mul(x, op.Tanh(op.Softplus(x)))


@fuse_mish.replace
def _(op: Op, x: ir.Value) -> ir.Value:
    if op.opset < 18:
        raise Refuse("needs opset 18")
    return op.Mish(x)


@rewrite
def fuse_leaky_relu(op: Op, x: ir.Value, slope: Const) -> ir.Value:
    """max(x, slope x)"""
    return op.Max(x, op.Mul(x, slope))


@fuse_leaky_relu.replace
def _(op: Op, x: ir.Value, slope: Const) -> ir.Value | None:
    slopes = op.const(slope)
    if slopes is None or not np.all(slopes.astype(np.float64) <= 1):
        return None
    return leaky(op, x, slope)


@rewrite
def fuse_leaky_where(op: Op, x: ir.Value, slope: Const) -> ir.Value:
    """x where it is positive, else slope x"""
    return op.Where(op.Greater(x, 0.0), x, op.Mul(x, slope))


@fuse_leaky_where.spelling
def _(op: Op, x: ir.Value, slope: Const) -> ir.Value:
    return op.Where(op.GreaterOrEqual(x, 0.0), x, op.Mul(x, slope))


@fuse_leaky_where.spelling
def _(op: Op, x: ir.Value, slope: Const) -> ir.Value:
    return op.Where(op.Less(x, 0.0), op.Mul(x, slope), x)


@fuse_leaky_where.spelling
def _(op: Op, x: ir.Value, slope: Const) -> ir.Value:
    return op.Where(op.LessOrEqual(x, 0.0), op.Mul(x, slope), x)


@fuse_leaky_where.spelling
def _(op: Op, x: ir.Value, slope: Const) -> ir.Value:
    return op.Sub(op.Relu(x), op.Mul(op.Relu(op.Neg(x)), slope))


@fuse_leaky_where.spelling
def _(op: Op, x: ir.Value, slope: Const) -> ir.Value:
    return op.Add(op.Relu(x), op.Mul(op.Min(x, 0.0), slope))


@fuse_leaky_where.spelling
def _(op: Op, x: ir.Value, slope: Const) -> ir.Value:
    return op.Add(op.Relu(x), op.Mul(op.Clip(x, None, 0.0), slope))


@fuse_leaky_where.spelling
def _(op: Op, x: ir.Value, slope: Const) -> ir.Value:
    return op.Add(op.Relu(x), op.Mul(op.Clip(x, max=0.0), slope))


@fuse_leaky_where.replace
def _(op: Op, x: ir.Value, slope: Const) -> ir.Value | None:
    return leaky(op, x, slope)


@rewrite
def fuse_leaky_sum(op: Op, x: ir.Value, slope: Const) -> ir.Value:
    """max(x, 0) + (x - |x|) slope / 2"""
    return op.Add(op.Relu(x), op.Mul(op.Sub(x, op.Abs(x)), slope))


@fuse_leaky_sum.replace
def _(op: Op, x: ir.Value, slope: Const) -> ir.Value | None:
    return _leaky_times(op, x, slope, 2.0)


@rewrite
def fuse_leaky_mean(op: Op, x: ir.Value, straight: Const, folded: Const) -> ir.Value:
    """a x + (1 - a) |x|, whose slope below zero is 2 a - 1"""
    return op.Add(op.Mul(x, straight), op.Mul(op.Abs(x), folded))


@fuse_leaky_mean.replace
def _(op: Op, x: ir.Value, straight: Const, folded: Const) -> ir.Value | None:
    a, b = op.scalar(straight), op.scalar(folded)
    if a is None or b is None or abs(a + b - 1) > rtol(op.dtype(x)):
        return None
    return leaky(op, x, op.initializer(np.asarray(a - b, np.float32), "slope"))


@rewrite
def fuse_leaky_negated(op: Op, x: ir.Value, slope: Const) -> ir.Value:
    """max(x, 0) - slope max(-x, 0), with the slope negated"""
    return op.Add(op.Relu(x), op.Mul(op.Relu(op.Neg(x)), slope))


@fuse_leaky_negated.replace
def _(op: Op, x: ir.Value, slope: Const) -> ir.Value | None:
    return _leaky_times(op, x, slope, -1.0)


def _leaky_times(op: Op, x: ir.Value, slope: ir.Value, factor: float) -> ir.Value | None:
    slopes = op.const(slope)
    if slopes is None:
        return None
    scaled = (slopes.astype(np.float64) * factor).astype(slopes.dtype)
    return leaky(op, x, op.initializer(scaled, "slope"))


def leaky(op: Op, x: ir.Value, slope: ir.Value) -> ir.Value | None:
    """LeakyRelu, or PRelu where the slope varies; None for what neither computes."""
    shape, dtype = op.shape(x), op.dtype(x)
    if shape is None or dtype is None or not dtype.is_floating_point():
        return None
    if not broadcasts_into(op.shape(slope), shape):
        raise Refuse("the slope does not broadcast to the tensor's shape")
    _not_double(op, x)
    alpha = op.scalar(slope)
    if alpha is not None:
        return op.LeakyRelu(x, alpha=float(alpha))
    return op.PRelu(x, slope) if op.opset >= 9 else None


@rewrite
def fuse_elu(op: Op, x: ir.Value, alpha: Const) -> ir.Value:
    """x where it is positive, else alpha (exp(x) - 1)"""
    return op.Where(op.Greater(x, 0.0), x, op.Mul(op.Sub(op.Exp(x), 1.0), alpha))


@fuse_elu.replace
def _(op: Op, x: ir.Value, alpha: Const) -> ir.Value | None:
    number = op.scalar(alpha)
    if number is None:
        return None
    _not_double(op, x)
    return op.Elu(x, alpha=float(number))


@rewrite
def fuse_plain_elu(op: Op, x: ir.Value) -> ir.Value:
    """x where it is positive, else exp(x) - 1"""
    return op.Where(op.Greater(x, 0.0), x, op.Sub(op.Exp(x), 1.0))


@fuse_plain_elu.replace
def _(op: Op, x: ir.Value) -> ir.Value | None:
    _not_double(op, x)
    return op.Elu(x)


@rewrite
def fuse_selu(op: Op, x: ir.Value, alpha: Attribute, gamma: Const) -> ir.Value:
    """gamma elu(x)"""
    return op.Mul(op.Elu(x, alpha=alpha), gamma)


@fuse_selu.replace
def _(op: Op, x: ir.Value, alpha: Attribute, gamma: Const) -> ir.Value | None:
    factor, shape = op.scalar(gamma), op.shape(x)
    if factor is None or not broadcasts_into(op.shape(gamma), shape or ()):
        return None
    _not_double(op, x)
    return op.Selu(x, alpha=float(alpha), gamma=float(factor))


@rewrite
def fuse_hard_swish(op: Op, x: ir.Value, alpha: Attribute, beta: Attribute) -> ir.Value:
    """x hardsigmoid(x)"""
    return op.Mul(x, op.HardSigmoid(x, alpha=alpha, beta=beta))


@fuse_hard_swish.replace
def _(op: Op, x: ir.Value, alpha: Attribute, beta: Attribute) -> ir.Value | None:
    close = rtol(op.dtype(x))
    if abs(alpha * 6 - 1) > close or abs(beta * 2 - 1) > close:
        return None
    if op.opset < 14:
        raise Refuse("needs opset 14")
    return op.HardSwish(x)


@rewrite.on("Mul", "Div", "Clip", benefit=3)
def fuse_hard_sigmoid(op: Op, node: ir.Node) -> ir.Value | None:
    """clip(a x + b, 0, m) / m, alone or multiplied by x."""
    for first in (0, 1):
        reader = Reader(op, node)
        scale, tensors = reader.factors(node.outputs[0])
        if node.op_type == "Clip":
            scale, tensors = 1.0, [node.outputs[0]]
        if not 1 <= len(tensors) <= 2 or first >= len(tensors):
            return None
        clip = reader.take(tensors[first], "Clip")
        line = None if clip is None else _clipped_line(op, reader, clip)
        if line is None:
            continue
        x, slope, offset, top = line
        multiplied = len(tensors) == 2
        if multiplied and tensors[1 - first] is not x:
            continue
        if not reader.near(top * scale, 1.0, op.dtype(x)) or len(reader.nodes) < 2:
            continue
        reader.require_unneeded()
        if op.dtype(x) not in _RELU[:2]:
            raise Refuse("needs float32 or float16")
        gate = op.HardSigmoid(x, alpha=slope * scale, beta=offset * scale)
        return op.Mul(x, gate) if multiplied else gate
    return None


def _clipped_line(
    op: Op, reader: Reader, clip: ir.Node
) -> tuple[ir.Value, float, float, float] | None:
    """(x, a, b, m) where a Clip is clip(a x + b, 0, m)."""
    low, high = op.attr(clip, "min"), op.attr(clip, "max")
    if op.opset >= 11:
        low, high = [op.scalar(v) for v in [*clip.inputs, None, None][1:3]]
    if low != 0 or not isinstance(high, int | float) or high <= 0:
        return None
    line = clip.inputs[0]
    x = _variable(op, line)
    found = None if x is None else reader.polynomial(line, x)
    if x is None or found is None or not found.keys() <= {0, 1} or 1 not in found:
        return None
    return x, found[1], found.get(0, 0.0), float(high)


def _variable(op: Op, value: ir.Value | None) -> ir.Value | None:
    """What a chain of additions and multiplications by numbers starts from."""
    while value is not None:
        node = value.producer()
        if node is None or node.op_type not in ("Add", "Sub", "Mul", "Div") or op.uses(value) != 1:
            return value
        numbers = [op.scalar(v) is not None for v in node.inputs]
        if numbers.count(True) != 1:
            return value
        value = node.inputs[numbers.index(False)]
    return None
