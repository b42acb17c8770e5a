"""Fuse rotary position embeddings into RotaryEmbedding.

Why: seven to ten kernels over the same tensor, most of them copies, become one.
Numerics: rounding.
Needs: opset 23; cosines and sines that are proven to be the same for both halves.
"""

from __future__ import annotations

from typing import Any

from graphopt import ir
from graphopt.passes._rotary import halved, halves_of, joined_halves, rotation_of, table
from graphopt.rewriting import Op, Refuse, rewrite

_TYPES = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


@rewrite.on("Add", benefit=6)
def fuse_rotary(op: Op, node: ir.Node) -> ir.Value | None:
    """x cos + rotated(x) sin, the halves (a, b) of x rotated being (-b, a)."""
    for straight, turned in (node.inputs, node.inputs[::-1]):
        for rotated, sine in _factors(op, turned):
            found = rotation_of(op, rotated)
            if found is None:
                continue
            x, interleaved = found
            cosine = next((c for v, c in _factors(op, straight) if v is x), None)
            if cosine is None or op.uses(rotated or x) != 1:
                continue
            return _rotary(op, x, cosine, sine, interleaved)
    return None


def _rotary(
    op: Op, x: ir.Value, cosine: ir.Value, sine: ir.Value, interleaved: bool
) -> ir.Value | None:
    if op.opset < 23:
        raise Refuse("needs opset 23")
    tables = [halved(op, value, interleaved) for value in (cosine, sine)]
    if None in tables:
        raise Refuse("cosines and sines are not proven to be the same for both halves")
    return _embedded(op, x, tables, interleaved)


@rewrite.on("Concat", "Reshape", benefit=8)
def fuse_rotary_halves(op: Op, node: ir.Node) -> ir.Value | None:
    """The halves (a, b) of x as (a cos - b sin, b cos + a sin)."""
    joined = joined_halves(op, node.outputs[0])
    if joined is None:
        return None
    minus, plus = joined[0].producer(), joined[1].producer()
    if minus is None or plus is None or (minus.op_type, plus.op_type) != ("Sub", "Add"):
        return None
    for first, cosine in _factors(op, minus.inputs[0]):
        for second, sine in _factors(op, minus.inputs[1]):
            halves = halves_of(op, first, second)
            if halves is None or halves[1] != joined[2]:
                continue
            for a, b in (plus.inputs, plus.inputs[::-1]):
                if (second, cosine) in _factors(op, a) and (first, sine) in _factors(op, b):
                    if op.opset < 23:
                        raise Refuse("needs opset 23")
                    return _embedded(op, halves[0], [cosine, sine], joined[2])
    return None


def _factors(op: Op, value: ir.Value | None) -> list[tuple[ir.Value, ir.Value]]:
    """The two ways to see a product as (tensor, table); empty where a value is none."""
    node = None if value is None else value.producer()
    if value is None or node is None or node.op_type != "Mul" or node.domain:
        return []
    a, b = node.inputs
    return [] if a is None or b is None else [(a, b), (b, a)]


def _embedded(op: Op, x: ir.Value, tables: list[Any], interleaved: bool) -> ir.Value | None:
    shape, dtype = op.shape(x), op.dtype(x)
    if shape is None or len(shape) != 4 or not isinstance(shape[3], int):
        return None
    if dtype not in _TYPES or any(op.dtype(value) != dtype for value in tables):
        return None
    if any((op.shape(value) or (0,))[-1] != shape[3] // 2 for value in tables):
        return None
    attributes: dict[str, Any] = {"interleaved": 1} if interleaved else {}
    for heads in (1, 2):
        caches = [table(op, value, shape[0], heads, x) for value in tables]
        if None in caches:
            continue
        if heads == 1:
            return op.build("RotaryEmbedding", [x, *caches], attributes)[0]
        if not isinstance(shape[2], int):
            break
        flat = op.Reshape(x, [0, 0, shape[2] * shape[3]])
        attributes["num_heads"] = shape[2]
        turned = op.build("RotaryEmbedding", [flat, *caches], attributes)[0]
        return op.Reshape(turned, [0, 0, shape[2], shape[3]])
    raise Refuse("cosines and sines are not proven to be those of batch and positions")


@rewrite.on("Concat", benefit=2)
def rotate_part(op: Op, node: ir.Node) -> ir.Value | None:
    """A rotated first part of the last axis and the rest as it is."""
    if len(node.inputs) != 2 or op.attr(node, "axis", 0) not in (-1, 3):
        return None
    turned, rest = node.inputs
    rotary = None if turned is None else turned.producer()
    if turned is None or rotary is None or rotary.op_type != "RotaryEmbedding" or rotary.domain:
        return None
    part = rotary.inputs[0]
    cut = None if part is None else part.producer()
    size, shape = op.shape(turned), op.shape(node.outputs[0])
    if part is None or cut is None or rest is None or size is None or op.uses(turned) != 1:
        return None
    if (
        len(size) != 4
        or not isinstance(size[3], int)
        or "rotary_embedding_dim" in rotary.attributes
    ):
        return None
    if cut.op_type != "Split" or cut.domain or list(cut.outputs) != [part, rest]:
        return None
    x = cut.inputs[0]
    if x is None or op.attr(cut, "axis", 0) not in (-1, 3) or op.shape(x) != shape:
        return None
    attributes = {**rotary.attributes, "rotary_embedding_dim": size[3]}
    return op.build("RotaryEmbedding", [x, *rotary.inputs[1:]], attributes)[0]
