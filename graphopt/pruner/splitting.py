"""Layers that become two thinner ones: which can, what is saved by it, and how it is done."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from graphopt import ir
from graphopt.lowrank import Truncation, can_split, halves, is_plane, sides
from graphopt.pruner.adjusting import constant, free
from graphopt.pruner.fitting import augmented, can_fit, put
from graphopt.wildcards import fits, names

__all__ = ["layers", "rank_of", "saving", "split", "truncation", "weight_shape"]

Floats = npt.NDArray[np.float64]

_WORTH = 0.9
"""Two layers do at most this share of one layer's work, or they are not worth a second kernel."""


def layers(
    model: ir.Model, ignore: Sequence[str] = (), only: Sequence[str] = ()
) -> dict[str, ir.Node]:
    """The layers of the main graph that could become two, by a name for each.

    `ignore` are patterns of nodes and weights that stay, `only` of those beside which all stay.
    """
    found: dict[str, ir.Node] = {}
    for node in model.graph:
        if not can_split(node) or not can_fit(model, node):
            continue
        weights = node.inputs[1]
        assert weights is not None
        if not fits(ignore, *names(weights)) and (fits(only, *names(weights)) or not only):
            found[f"rank of {weights.name}"] = node
    return found


def weight_shape(node: ir.Node) -> tuple[int, ...]:
    """The shape of a layer's constant weights."""
    tensor = ir.constant(node.inputs[1])
    assert tensor is not None
    return tuple(tensor.shape.numpy())


def rank_of(node: ir.Node, shape: Sequence[int], share: float) -> int:
    """The rank at which a share of a layer's weights [...] goes, or more: in round numbers."""
    each = sum(sides(node, shape, plane=is_plane(node, shape)))
    rank = max(int((1 - share) * math.prod(shape) / each + 1e-9), 1)
    unit = max(n for n in (1, 2, 4, 8) if n == 1 or n <= rank // 4)
    return rank - rank % unit


def saving(node: ir.Node, shape: Sequence[int], rank: int) -> tuple[float, float] | None:
    """The shares of a layer's weights and of its work that go; None where it is not worth it."""
    plane = is_plane(node, shape)
    first, second = sides(node, shape, plane=plane)
    strides = node.attributes.get("strides")
    across = strides.as_ints()[1] if plane and strides is not None else 1
    size = max(math.prod(shape), 1)
    kept, work = rank * (first + second) / size, rank * (first * across + second) / size
    return (1 - kept, 1 - work) if max(kept, work) <= _WORTH else None


def truncation(node: ir.Node, moment: Floats | None) -> Truncation:
    """A layer's approximations, given the mean of xxᵀ of its columns with a 1 appended."""
    array = ir.array(node.inputs[1])
    assert array is not None
    plane = is_plane(node, array.shape)
    return Truncation(array.shape, augmented(node, array)[0], moment, plane=plane)


def split(model: ir.Model, node: ir.Node, rank: int, moment: Floats | None) -> bool:
    """Make two layers of one, in place, the node being the second; False where it saves nothing.

    `moment` is as for `truncation`.
    """
    weights, array = node.inputs[1], ir.array(node.inputs[1])
    assert weights is not None and array is not None and node.graph is not None
    if saving(node, array.shape, rank) is None:
        return False
    first, second, bias = truncation(node, moment).factors(rank)
    made = halves(node, array.dtype, first, second, plane=is_plane(node, array.shape))
    one, other = (constant(node, half, "thin") for half in made.weights)
    new = ir.Node("", node.op_type, [node.inputs[0], one], made.attributes[0])
    new.name = f"{node.name}__thin" if node.name else None
    new.meta[ir.SOURCES] = ir.sources(node)
    value = new.outputs[0]
    value.name, value.type = free(node.graph, f"{node.outputs[0].name}__thin"), one.type
    node.graph.insert_before(node, new)
    node.replace_input_with(0, value)
    node.replace_input_with(1, other)
    node.attributes.clear()
    node.attributes.update({attr.name: attr for attr in made.attributes[1]})
    if not weights.uses():
        model.graph.initializers.pop(weights.name or "", None)
    whole = np.concatenate([augmented(node, made.weights[1])[0, :, :-1], bias[:, None]], axis=1)
    put(model, node, whole[None])
    return True
