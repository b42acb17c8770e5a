"""Fold BatchNormalization into the Conv, ConvTranspose, Gemm or MatMul beside it.

Why: at inference it is a scale and a shift per channel, which the weights and bias take up.
Numerics: rounding.
Needs: constant weights and statistics; for a shift before a Conv, no padding.
"""

from __future__ import annotations

from graphopt import ir
from graphopt.passes._linear import (
    LINEAR,
    Floats,
    batchnorm_factors,
    channel_axis,
    channels,
    input_channels,
    linear_producer,
    narrowed,
    prescaled,
    rescaled,
)
from graphopt.rewriting import Op, Refuse, rewrite


@rewrite.on("BatchNormalization")
def fuse_conv_batchnorm(op: Op, node: ir.Node) -> ir.Value | None:
    """Fold it into the operator before it."""
    producer = linear_producer(op, node.inputs[0])
    if producer is None:
        return None
    factors = batchnorm_factors(op, node)
    count = channels(op, producer)
    if channel_axis(op, producer) != 1 or count != len(factors[0]):
        raise Refuse("its channels are not those of the operator before it")
    if producer.op_type != "MatMul":
        return rescaled(op, producer, *factors)
    weight = producer.inputs[1]
    if weight is None or op.rank(weight) != 2:
        return None
    product = rescaled(op, producer, factors[0], None)
    made = product.producer()
    assert made is not None
    return op.Gemm(*made.inputs, op.initializer(_like(op, node, factors[1]), "bias"))


def _like(op: Op, node: ir.Node, values: Floats) -> ir.Array:
    value = node.inputs[0]
    return narrowed(values, None if value is None else op.dtype(value))


@rewrite.on(*sorted(LINEAR))
def fuse_batchnorm_conv(op: Op, node: ir.Node) -> ir.Value | None:
    """Fold it into the operator after it."""
    value = node.inputs[0]
    norm = None if value is None else value.producer()
    if value is None or norm is None or norm.op_type != "BatchNormalization" or norm.domain:
        return None
    place = input_channels(op, node)
    if op.uses(value) != 1 or place is None or norm.inputs[0] is None:
        return None
    scale, shift = batchnorm_factors(op, norm)
    if place != (1, len(scale)):
        raise Refuse("its channels are not those of the operator after it")
    return prescaled(op, node, norm.inputs[0], scale, shift)
