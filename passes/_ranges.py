"""What is known of the numbers in a tensor from the operators that make it, NaN apart."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from graphopt import ir
from graphopt.rewriting import Op

Range = tuple[float, float]
"""No element is below the first number or above the second."""

_ALL: Range = (-math.inf, math.inf)
_BOUNDED: dict[str, Range] = {
    **dict.fromkeys(("Sigmoid", "HardSigmoid", "Softmax"), (0.0, 1.0)),
    **dict.fromkeys(("Tanh", "Sin", "Cos", "Erf", "Softsign", "Sign"), (-1.0, 1.0)),
    "Atan": (-1.571, 1.571),
}
_PASSING = frozenset(
    {
        *("Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose", "Identity", "Slice", "Gather"),
        *("MaxPool", "GlobalAveragePool", "GlobalMaxPool", "Expand", "Tile", "Split", "ReduceMean"),
        *("ReduceMax", "ReduceMin", "DepthToSpace", "SpaceToDepth", "Dropout", "LogSoftmax"),
    }
)
"""Operators whose result holds nothing but numbers of, or averages over, their first operand."""
_WHOLE = {
    ir.DataType.FLOAT: 2.0**127,
    ir.DataType.BFLOAT16: 2.0**127,
    ir.DataType.DOUBLE: 2.0**1023,
    ir.DataType.FLOAT16: 65504.0,
}
_SQUARED = 2.0**60
_DEPTH = 8


def never_negative(op: Op, value: ir.Value) -> bool:
    """Whether no element of a tensor can be below 0 (NaN apart)."""
    return limits(op, value)[0] >= 0


def finite(op: Op, value: ir.Value) -> bool:
    """Whether no element of a tensor can be infinite (NaN apart)."""
    dtype = op.dtype(value)
    if dtype is not None and dtype.is_integer():
        return True
    low, high = limits(op, value)
    return math.isfinite(low) and math.isfinite(high)


def limits(op: Op, value: ir.Value | None, depth: int = _DEPTH) -> Range:
    """The range of a tensor's elements, which is too wide rather than too narrow."""
    dtype = None if value is None else op.dtype(value)
    if value is None or dtype is None:
        return _ALL
    tensor = ir.constant(value)
    if tensor is not None:
        return _of_constant(tensor)
    if dtype == ir.DataType.BOOL:
        return 0.0, 1.0
    node = value.producer()
    known = node is not None and (value is node.outputs[0] or node.op_type == "Split")
    if node is None or node.domain or not depth or not known:
        return _ALL if not dtype.is_integer() else _of_type(dtype)
    low, high = _of_node(op, node, depth)
    if dtype.is_integer():
        low, high = _whole(low), _whole(high)  # quotients and casts round toward 0
        least, most = _of_type(dtype)
        return (low, high) if least <= low and high <= most else (least, most)
    most = _WHOLE.get(dtype, 0.0)
    return (-math.inf if low < -most else low), (math.inf if high > most else high)


def _of_constant(tensor: ir.TensorProtocol) -> Range:
    if tensor.dtype == ir.DataType.STRING or tensor.size == 0 or tensor.size > 1 << 16:
        return _ALL
    array = tensor.numpy().astype(np.float64)
    if np.any(np.isnan(array)):
        return _ALL
    return float(array.min()), float(array.max())


def _of_type(dtype: ir.DataType) -> Range:
    try:
        info = np.iinfo(dtype.numpy())
    except ValueError:
        return _ALL
    return float(info.min), float(info.max)


def _of_node(op: Op, node: ir.Node, depth: int) -> Range:
    kind = node.op_type
    if kind in _BOUNDED:
        return _BOUNDED[kind]
    first = limits(op, node.inputs[0], depth - 1) if node.inputs else _ALL
    if kind in _PASSING:
        return (-math.inf, 0.0) if kind == "LogSoftmax" else first
    if kind == "Cast":
        return first
    if kind == "ConstantOfShape":
        fill = node.attributes.get("value")
        return (0.0, 0.0) if fill is None else _of_constant(fill.as_tensor())
    if kind == "AveragePool":
        return min(first[0], 0.0), max(first[1], 0.0)
    if kind == "Clip":
        return _clipped(op, node, first)
    if kind in _MONOTONE:
        function = _MONOTONE[kind]
        return function(first[0]), function(first[1])
    if kind == "Abs":
        reach = max(abs(first[0]), abs(first[1]))
        return (0.0 if first[0] <= 0 <= first[1] else min(map(abs, first))), reach
    if (kind == "Mul" and node.inputs[0] is node.inputs[1]) or kind == "Pow":
        return _of_power(op, node, first)
    if first == _ALL and kind not in (*_NORMALIZATIONS, "Where", "Min", "Max"):
        return _ALL
    others = [first, *(limits(op, v, depth - 1) for v in node.inputs[1:])]
    if kind in _SUMS:
        return _of_sum(op, node, others)
    if kind in _NORMALIZATIONS:
        return _of_normalized(op, node, others)
    if kind == "Where":
        return min(others[1][0], others[2][0]), max(others[1][1], others[2][1])
    if kind in ("Concat", "Min", "Max", "Sum"):
        if kind == "Sum":
            return sum(r[0] for r in others), sum(r[1] for r in others)
        lows, highs = [r[0] for r in others], [r[1] for r in others]
        if kind == "Concat":
            return min(lows), max(highs)
        return (min(lows), min(highs)) if kind == "Min" else (max(lows), max(highs))
    return _arithmetic(kind, others)


_SUMS = ("ReduceSum", "MatMul", "Gemm", "Conv")
_NORMALIZATIONS = ("LayerNormalization", "InstanceNormalization", "GroupNormalization")


def _of_sum(op: Op, node: ir.Node, operands: list[Range]) -> Range:
    """Sums of as many terms as shapes tell."""
    x = node.inputs[0]
    shape = None if x is None else op.shape(x)
    if x is None or shape is None:
        return _ALL
    if node.op_type == "ReduceSum":
        sizes = [size for size in shape if isinstance(size, int)]
        low, high = operands[0]
        count = math.prod(sizes) if len(sizes) == len(shape) else math.inf
        return (low * count if low < 0 else 0.0), (high * count if high > 0 else 0.0)
    weights = node.inputs[1]
    dims = None if weights is None else op.shape(weights)
    if node.op_type == "Conv":
        sizes = [size for size in (dims or (None,))[1:] if isinstance(size, int)]
        count = math.prod(sizes) if dims is not None and len(sizes) == len(dims) - 1 else math.inf
    else:
        inner = shape[-1] if shape and not op.attr(node, "transA", 0) else None
        count = float(inner) if isinstance(inner, int) else math.inf
    reach = count
    for low, high in operands[:2]:
        reach *= max(abs(low), abs(high))
    reach *= abs(op.attr(node, "alpha", 1.0))
    if len(operands) > 2 and node.inputs[2] is not None:
        reach += max(map(abs, operands[2])) * abs(op.attr(node, "beta", 1.0))
    return (-reach, reach) if math.isfinite(reach) else _ALL


def _of_normalized(op: Op, node: ir.Node, operands: list[Range]) -> Range:
    """Of n numbers of variance 1 none is beyond the root of n."""
    x = node.inputs[0]
    shape = None if x is None else op.shape(x)
    if shape is None or not operands:
        return _ALL
    sizes = [size for size in shape[1:] if isinstance(size, int)]
    if node.op_type == "LayerNormalization":
        sizes = [s for s in shape[op.attr(node, "axis", -1) :] if isinstance(s, int)]
        whole = len(sizes) == len(shape[op.attr(node, "axis", -1) :])
    else:
        whole = len(sizes) == len(shape) - 1
    if not whole:
        return _ALL
    scale, shift = [*operands[1:], (0.0, 0.0)][:2]
    reach = math.sqrt(math.prod(sizes)) * max(map(abs, scale)) * 1.01 + max(map(abs, shift))
    return (-reach, reach) if math.isfinite(reach) else _ALL


def _of_power(op: Op, node: ir.Node, first: Range) -> Range:
    """Squares, and other even powers."""
    exponent = 2 if node.op_type == "Mul" else op.scalar(node.inputs[1])
    if not isinstance(exponent, int | float) or exponent not in (2, 4):
        return _ALL
    reach = max(map(abs, first))
    return 0.0, (reach ** int(exponent) if reach < _SQUARED else math.inf)


def _arithmetic(kind: str, operands: list[Range]) -> Range:
    if len(operands) != 2:
        return _ALL
    a, b = operands
    if kind == "Add":
        return a[0] + b[0], a[1] + b[1]
    if kind == "Sub":
        return a[0] - b[1], a[1] - b[0]
    if kind == "Div" and not b[0] <= 0 <= b[1]:
        b = (1 / b[1], 1 / b[0])
    elif kind != "Mul":
        return _ALL
    products = [x * y for x in a for y in b if x and y] + [0.0] * (0 in a or 0 in b)
    return min(products), max(products)


def _clipped(op: Op, node: ir.Node, first: Range) -> Range:
    low, high = op.attr(node, "min"), op.attr(node, "max")
    bounds = [*node.inputs, None, None][1:3]
    low = low if bounds[0] is None else op.scalar(bounds[0])
    high = high if bounds[1] is None else op.scalar(bounds[1])
    least = first[0] if low is None else max(first[0], low)
    most = first[1] if high is None else min(first[1], high)
    return min(least, most), max(least, most)


def _whole(x: float) -> float:
    return math.trunc(x) if math.isfinite(x) else x


def _exponential(x: float) -> float:
    return math.exp(min(x, 700.0)) if x <= 700 else math.inf


_MONOTONE: dict[str, Callable[[float], float]] = {
    "Relu": lambda x: max(x, 0.0),
    "Exp": _exponential,
    "Sqrt": lambda x: math.sqrt(max(x, 0.0)),
    "Softplus": lambda x: max(x, 0.0) + 0.7,
    "Floor": lambda x: math.floor(x) if math.isfinite(x) else x,
    "Ceil": lambda x: math.ceil(x) if math.isfinite(x) else x,
}
