"""Scales and shifts folded into the constant weights of Conv, ConvTranspose, Gemm and MatMul.

All of it is computed in float64 and rounded once to the type of the weights. Also, which of these
operators take the same tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from graphopt import ir
from graphopt.rewriting import Op, Refuse

Floats = npt.NDArray[np.float64]
B = TypeVar("B")

_SMALLEST_NORMAL = {
    ir.DataType.FLOAT16: 2.0**-14,
    ir.DataType.BFLOAT16: 2.0**-126,
    ir.DataType.FLOAT: 2.0**-126,
}

LINEAR = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})

_MOST_USES = 64  # each sibling looks at all others


def narrowed(values: Floats, dtype: ir.DataType | None) -> ir.Array:
    """Values in the dtype of a model's weights.

    Raises:
        Refuse: a value overflows that dtype, or all of them vanish below its normal range.
    """
    if dtype is None or not dtype.is_floating_point():
        raise Refuse("its weights are no floats")
    kind = dtype.numpy()
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        cast = values.astype(kind)
    if not np.all(np.isfinite(cast.astype(np.float64))):
        raise Refuse("a folded weight is not finite")
    largest = float(np.max(np.abs(values), initial=0.0))
    if 0 < largest < _SMALLEST_NORMAL.get(dtype, 0.0):
        raise Refuse("the folded weights are too small for their type")
    return cast


def floats(op: Op, value: ir.Value | None) -> Floats | None:
    """A constant of floating point as float64, or None."""
    tensor = ir.constant(value)
    if tensor is None or not tensor.dtype.is_floating_point():
        return None
    return tensor.numpy().astype(np.float64)


def linear_producer(op: Op, value: ir.Value | None) -> ir.Node | None:
    """The linear operator that makes a value which nothing else uses."""
    node = None if value is None else value.producer()
    if value is None or node is None or node.op_type not in LINEAR or node.domain:
        return None
    return node if op.uses(value) == 1 else None


def batchnorm_factors(op: Op, node: ir.Node) -> tuple[Floats, Floats]:
    """Scale and shift per channel of a BatchNormalization at inference.

    Raises:
        Refuse: training mode, or statistics that are not constant.
    """
    used = [v for v in node.outputs[1:] if v.uses() or v.is_graph_output()]
    if op.attr(node, "training_mode", 0) or used:
        raise Refuse("it is in training mode")
    if op.opset < 9 and op.attr(node, "spatial", 1) == 0:
        raise Refuse("its statistics are per element, not per channel")
    if op.opset < 7 and not op.attr(node, "is_test", 0):
        raise Refuse("it is in training mode")
    scale, bias, mean, variance = (floats(op, v) for v in node.inputs[1:5])
    if scale is None or bias is None or mean is None or variance is None:
        raise Refuse("its scale or statistics are not constant")
    with np.errstate(divide="ignore", invalid="ignore"):
        factor = scale / np.sqrt(variance + op.attr(node, "epsilon", 1e-5))
        shift = bias - mean * factor
    if not (np.isfinite(factor).all() and np.isfinite(shift).all()):
        raise Refuse("its scale is not finite")
    return factor, shift


def siblings(
    op: Op,
    node: ir.Node,
    read: Callable[[Op, ir.Node], B | None],
    alike: Callable[[B, B], bool],
) -> list[B]:
    """What `read` makes of a node and of those like it that take its first operand too.

    Empty where it makes nothing of the node itself, or where too many nodes take the operand.
    """
    x, own = node.inputs[0], read(op, node)
    if x is None or own is None or op.uses(x) > _MOST_USES:
        return []
    users = (user for user in dict.fromkeys(x.consumers()) if user.graph is node.graph)
    return [b for user in users if (b := read(op, user)) is not None and alike(own, b)]


def channel_axis(op: Op, node: ir.Node) -> int | None:
    """Which axis of a linear operator's result its output channels are.

    None without a rank, and for the product with a vector, which has none.
    """
    rank, weight = op.rank(node.outputs[0]), node.inputs[1]
    if rank is None or weight is None or op.rank(weight) in (None, 1):
        return None
    return 1 if node.op_type.startswith("Conv") else rank - 1


def channels(op: Op, node: ir.Node) -> int | None:
    """The number of output channels of a linear operator, or None."""
    shape, axis = op.shape(node.outputs[0]), channel_axis(op, node)
    if shape is None or axis is None or not 0 <= axis < len(shape):
        return None
    count = shape[axis]
    return count if isinstance(count, int) else None


def along(values: Floats, rank: int, axis: int, count: int) -> Floats | None:
    """An operand as one number per channel; None where it varies along another axis.

    `rank` and `axis` are those of the tensor that it is broadcast to.
    """
    if values.ndim > rank:
        return None
    full = values.reshape((1,) * (rank - values.ndim) + values.shape)
    if full.shape[axis] not in (1, count) or full.size != full.shape[axis]:
        return None
    return np.broadcast_to(full.reshape(-1), (count,))


def rescaled(op: Op, node: ir.Node, scale: Floats | None, shift: Floats | None) -> ir.Value:
    """scale * node + shift per output channel, as one node of the same operator.

    Raises:
        Refuse: the weights that would have to change are not constant, or overflow.
    """
    if node.op_type == "Gemm":
        return _rescaled_gemm(op, node, scale, shift)
    weight = node.inputs[1]
    dtype = None if weight is None else op.dtype(weight)
    if scale is not None and not np.all(scale == 1):
        weights = floats(op, weight)
        if weights is None:
            raise Refuse("its weights are not constant")
        weight = op.initializer(narrowed(_scale_outputs(op, node, weights, scale), dtype), "weight")
    if node.op_type == "MatMul":
        if shift is not None:
            raise Refuse("MatMul has no bias")
        return op.MatMul(node.inputs[0], weight)
    bias = _bias(op, node, 2, scale, shift)
    if bias is not None:
        operand: Any = op.initializer(narrowed(bias, dtype), "bias")
        return op.build(node.op_type, [node.inputs[0], weight, operand], node.attributes)[0]
    return op.build(node.op_type, [node.inputs[0], weight], node.attributes)[0]


def _bias(
    op: Op, node: ir.Node, index: int, scale: Floats | None, shift: Floats | None
) -> Floats | None:
    """The bias after scaling and shifting, None where there is none."""
    value = node.inputs[index] if len(node.inputs) > index else None
    bias = floats(op, value)
    if bias is None and value is not None:
        raise Refuse("its bias is not constant")
    if bias is not None and scale is not None:
        bias = bias * scale
    if shift is None:
        return bias
    return shift if bias is None else bias + shift


def _scale_outputs(op: Op, node: ir.Node, weights: Floats, scale: Floats) -> Floats:
    if node.op_type == "MatMul":
        return weights * scale
    if node.op_type == "Conv":
        return weights * scale.reshape(-1, *[1] * (weights.ndim - 1))
    groups = op.attr(node, "group", 1)  # ConvTranspose: (in, out / groups, ...)
    split = weights.reshape(groups, -1, *weights.shape[1:])
    factors = scale.reshape(groups, 1, -1, *[1] * (weights.ndim - 2))
    return (split * factors).reshape(weights.shape)


def _rescaled_gemm(op: Op, node: ir.Node, scale: Floats | None, shift: Floats | None) -> ir.Value:
    weight = node.inputs[1]
    dtype = None if weight is None else op.dtype(weight)
    alpha, beta = op.attr(node, "alpha", 1.0), op.attr(node, "beta", 1.0)
    attributes: dict[str, Any] = {**node.attributes}
    changes = scale is not None and not np.all(scale == 1)
    addend: Any = node.inputs[2] if len(node.inputs) > 2 else None
    if changes and scale is not None:
        weights = floats(op, weight)
        if weights is not None:
            columns = scale.reshape(-1, 1) if op.attr(node, "transB", 0) else scale
            weight = op.initializer(narrowed(weights * columns, dtype), "weight")
        elif np.all(scale == scale[0]):
            attributes["alpha"] = alpha * float(scale[0])
        else:
            raise Refuse("its weights are not constant")
    if shift is not None or (changes and addend is not None):
        bias = _bias(op, node, 2, None, None)
        total = np.zeros(1) if bias is None else bias * beta
        total = total if scale is None else total * scale
        total = total if shift is None else total + shift
        attributes.pop("beta", None)
        addend = op.initializer(narrowed(total, dtype), "bias")
    inputs = [node.inputs[0], weight] + ([] if addend is None else [addend])
    return op.build("Gemm", inputs, attributes)[0]


def prescaled(op: Op, node: ir.Node, source: ir.Value, scale: Floats, shift: Floats) -> ir.Value:
    """The linear operator applied to scale * source + shift per input channel, as one node.

    Raises:
        Refuse: weights that are not constant, padding that the shift does not reach, overflow.
    """
    weights, dtype = (
        floats(op, node.inputs[1]),
        op.dtype(node.inputs[1]) if node.inputs[1] else None,
    )
    if weights is None:
        raise Refuse("its weights are not constant")
    shifts = bool(np.any(shift != 0))
    if shifts and node.op_type == "MatMul":
        raise Refuse("MatMul has no bias")
    if shifts and node.op_type in ("Conv", "ConvTranspose") and not _unpadded(op, node):
        raise Refuse("its padding would have to be shifted too")
    groups = op.attr(node, "group", 1)
    spread = [1] * (weights.ndim - 2)
    added: Floats
    attributes: dict[str, Any] = {**node.attributes}
    if node.op_type == "Conv":
        split = weights.reshape(groups, -1, *weights.shape[1:])
        new = (split * scale.reshape(groups, 1, -1, *spread)).reshape(weights.shape)
        added = (split * shift.reshape(groups, 1, -1, *spread)).reshape(weights.shape)
        added = added.sum(axis=tuple(range(1, weights.ndim)))
    elif node.op_type == "ConvTranspose":
        new = weights * scale.reshape(-1, 1, *spread)
        each = (weights * shift.reshape(-1, 1, *spread)).reshape(groups, -1, *weights.shape[1:])
        added = each.sum(axis=(1, *range(3, each.ndim))).reshape(-1)
    else:
        rows = not op.attr(node, "transB", 0)
        new = weights * (scale.reshape(-1, 1) if rows else scale)
        summed = np.tensordot(shift, weights, (0, 0 if rows else 1)) if shifts else np.zeros(1)
        added = summed * op.attr(node, "alpha", 1.0)
    inputs: list[Any] = [source, op.initializer(narrowed(new, dtype), "weight"), *node.inputs[2:]]
    if shifts:
        beta = op.attr(node, "beta", 1.0)
        bias = _bias(op, node, 2, np.asarray([beta], np.float64), added)
        attributes.pop("beta", None)
        inputs[2:] = [op.initializer(narrowed(added if bias is None else bias, dtype), "bias")]
    return op.build(node.op_type, inputs, attributes)[0]


def _unpadded(op: Op, node: ir.Node) -> bool:
    """Whether each output reads nothing but inputs, and all those of its window."""
    mode = op.attr(node, "auto_pad", "NOTSET")
    if mode not in ("NOTSET", "VALID"):
        return False
    if node.op_type == "ConvTranspose":  # several windows meet in an output, fewer at the border
        weight = node.inputs[1]
        kernel = (op.shape(weight) or () if weight is not None else ())[2:]
        moves = (*kernel, *(op.attr(node, "strides") or ()))
        if not kernel or any(size != 1 for size in moves):
            return False
        return not any((*(op.attr(node, "pads") or ()), *(op.attr(node, "output_padding") or ())))
    return mode == "VALID" or not any(op.attr(node, "pads") or [0])


def input_channels(op: Op, node: ir.Node) -> tuple[int, int] | None:
    """(axis, count) of the input channels of a linear operator's first operand, or None."""
    value = node.inputs[0]
    shape = None if value is None else op.shape(value)
    if shape is None or (node.op_type == "Gemm" and op.attr(node, "transA", 0)):
        return None
    axis = 1 if node.op_type.startswith("Conv") else len(shape) - 1
    weight = floats(op, node.inputs[1])
    if weight is None or weight.ndim < 2 or not 0 <= axis < len(shape):
        return None
    if node.op_type == "Conv":
        return axis, weight.shape[1] * int(op.attr(node, "group", 1))
    if node.op_type == "Gemm":
        return axis, weight.shape[1 if op.attr(node, "transB", 0) else 0]
    return axis, weight.shape[0 if node.op_type == "ConvTranspose" else -2]
