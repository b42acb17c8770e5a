"""Fuse Conv, a residual sum and an activation into FusedConv.

Why: the activation costs no pass over the tensor. ONNX Runtime does the same when it loads a
model with all optimizations on; written down, it holds for every session.
Numerics: exact.
Needs: ONNX Runtime's CPU (com.microsoft), float.
"""

from __future__ import annotations

from typing import Any

from graphopt import ir
from graphopt.passes._vendor import MICROSOFT, require_cpu_kernel
from graphopt.rewriting import Op, Refuse, rewrite

_PLAIN = frozenset({"Relu", "Sigmoid", "Tanh"})
_BLOCKED = frozenset({"Conv", "FusedConv", "MaxPool", "AveragePool", "GlobalAveragePool"})


@rewrite.on("Relu", "Sigmoid", "Tanh", "LeakyRelu", "HardSigmoid", "Clip", benefit=2)
def fuse_conv_activation(op: Op, node: ir.Node) -> ir.Value | None:
    """act(Conv(x, w, b)) -> FusedConv; Relu(Conv(x, w, b) + z) too."""
    value = node.inputs[0]
    before = None if value is None else value.producer()
    if value is None or before is None or before.domain:
        return None
    if before.op_type == "Add" and node.op_type == "Relu":
        return _residual(op, node, value, before)
    if before.op_type != "Conv":
        return None
    parameters = _parameters(op, node)
    if parameters is None:
        return None
    if op.uses(value) != 1:
        raise Refuse(f"{value.name!r} is used elsewhere")
    return _fused(op, before, list(before.inputs), node.op_type, parameters)


def _parameters(op: Op, node: ir.Node) -> list[float] | None:
    """`activation_params`; None where the activation is none that the kernel has."""
    if node.op_type in _PLAIN:
        return []
    if node.op_type == "LeakyRelu":
        return [op.attr(node, "alpha", 0.01)]
    if node.op_type == "HardSigmoid":
        return [op.attr(node, "alpha", 0.2), op.attr(node, "beta", 0.5)]
    low, high = op.attr(node, "min", -_MOST), op.attr(node, "max", _MOST)
    for index, bound in enumerate(node.inputs[1:]):
        if bound is None:
            continue
        number = op.scalar(bound)
        if number is None:
            return None
        low, high = (number, high) if index == 0 else (low, number)
    return [float(low), float(high)]


_MOST = 3.4028234663852886e38
"""The largest float, which the kernel takes for no bound."""


def _residual(op: Op, node: ir.Node, total: ir.Value, add: ir.Node) -> ir.Value | None:
    """Only beside the blocked layout, in which ONNX Runtime fuses sums by itself."""
    for value, other in (add.inputs, reversed(add.inputs)):
        conv = None if value is None else value.producer()
        if conv is None or conv.op_type != "Conv" or conv.domain or value is None or other is None:
            continue
        if op.uses(value) != 1 or op.uses(total) != 1:
            raise Refuse("the convolution or the sum is used elsewhere")
        if op.shape(value) is None or op.shape(value) != op.shape(other):
            raise Refuse("the sum broadcasts, or its shape is unknown")
        source = conv.inputs[0]
        neighbours = [v.producer() for v in (source, other) if v is not None]
        neighbours += list(node.outputs[0].consumers())
        if any(n is not None and (n.op_type in _BLOCKED or _activates(n)) for n in neighbours):
            raise Refuse("between convolutions ONNX Runtime fuses it in its blocked layout")
        bias = conv.inputs[2] if len(conv.inputs) > 2 else None
        return _fused(op, conv, [*conv.inputs[:2], bias, other], "Relu", [])
    return None


def _activates(node: ir.Node) -> bool:
    value = node.inputs[0] if node.inputs else None
    before = None if value is None else value.producer()
    return before is not None and before.op_type in _BLOCKED


def _fused(
    op: Op, conv: ir.Node, inputs: list[Any], activation: str, parameters: list[float]
) -> ir.Value:
    require_cpu_kernel(op, conv.outputs[0])
    weight = None if conv.inputs[1] is None else conv.inputs[1].producer()
    if weight is not None and weight.op_type == "DequantizeLinear":
        raise Refuse("its weights are quantized, for which there are other kernels")
    attributes: dict[str, Any] = {**conv.attributes, "activation": activation}
    if parameters:
        attributes["activation_params"] = parameters
    return op.build("FusedConv", inputs, attributes, domain=MICROSOFT)[0]
