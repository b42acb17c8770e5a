"""Replace the arithmetic of shapes by what it comes to.

Why: exporters compute each target shape from Shape, Gather and Concat, though most of it is known;
a Reshape to constants, 0 and -1 needs none of it, and passes and kernels see its shape.
Numerics: exact; a Reshape by -1 fails where another dimension that is free turns out to be 0.
Needs: what is known of shapes, symbolically.
"""

from __future__ import annotations

import numpy as np

from graphopt import ir
from graphopt.dims import Dim, DimLike
from graphopt.passes._views import reshape_target
from graphopt.rewriting import Op, rewrite

_ARITHMETIC = (
    *("Shape", "Size", "Gather", "Slice", "Concat", "Split", "Squeeze", "Unsqueeze", "Reshape"),
    *("Cast", "Add", "Sub", "Mul", "Div", "Mod", "Neg", "Abs", "Sign", "Min", "Max", "Pow"),
    *("Floor", "Ceil", "Round", "Sqrt", "Reciprocal", "Range", "ConstantOfShape", "Expand"),
    *("Tile", "Where", "Equal", "Less", "LessOrEqual", "Greater", "GreaterOrEqual", "Not", "And"),
    *("Or", "Xor", "ReduceProd", "ReduceSum", "ReduceMax", "ReduceMin", "GatherElements"),
    *("GatherND", "ScatterElements", "ScatterND", "Flatten", "Transpose", "SequenceLength"),
    *("Identity", "If", "CumSum", "TopK", "ArgMax", "ArgMin", "NonZero", "OptionalHasElement"),
)
"""Operators whose results `Shapes` may know without their being constants."""


@rewrite.on(*_ARITHMETIC)
def known_elements(op: Op, node: ir.Node) -> list[ir.Value | None] | None:
    """A small tensor whose elements are proven is a constant."""
    found: list[ir.Value | None] = []
    for output in node.outputs:
        array = _known(op, output) if op.uses(output) else None
        found.append(None if array is None else op.initializer(array, "value"))
    return found if any(found) else None


def _known(op: Op, value: ir.Value) -> ir.Array | None:
    """The elements of a small tensor, where they are all known numbers."""
    elements, dtype = op.values(value), op.dtype(value)
    if elements is None or dtype is None or any(isinstance(e, Dim) for e in elements.flat):
        return None
    array: ir.Array = elements.astype(dtype.numpy())
    return array


@rewrite.on("Reshape")
def constant_target(op: Op, node: ir.Node) -> ir.Value | None:
    """Reshape to a computed shape of which at most one dimension has to be left open."""
    value, target = node.inputs
    if value is None or target is None or ir.constant(target) is not None:
        return None
    before, after = op.shape(value), op.shape(node.outputs[0])
    if before is None or after is None:
        return None
    sizes = reshape_target(before, after)
    return None if sizes is None else op.Reshape(value, sizes)


@rewrite.on("Expand")
def constant_expansion(op: Op, node: ir.Node) -> ir.Value | None:
    """Expand to a computed shape whose free dimensions are those that the input has already."""
    value, target = node.inputs
    if value is None or target is None or ir.constant(target) is not None:
        return None
    before, after = op.shape(value), op.shape(node.outputs[0])
    if before is None or after is None or len(before) > len(after):
        return None
    aligned: list[DimLike] = [*[1] * (len(after) - len(before)), *before]
    pairs = zip(after, aligned, strict=True)
    if any(isinstance(size, Dim) and size != have for size, have in pairs):
        return None
    return op.Expand(value, [1 if isinstance(size, Dim) else size for size in after])


@rewrite.on("Slice")
def slice_to_the_end(op: Op, node: ir.Node) -> ir.Value | None:
    """Slice up to a computed end that is the dimension itself."""
    if op.opset < 10 or len(node.inputs) < 3:
        return None
    value, starts, ends, axes, steps = (*node.inputs, None, None)[:5]
    if value is None or starts is None or ends is None or ir.constant(ends) is not None:
        return None
    shape, bounds = op.shape(value), op.values(ends)
    chosen = None if axes is None else op.const(axes)
    order = np.ones(1) if steps is None else op.const(steps)
    if shape is None or bounds is None or order is None or (axes is not None and chosen is None):
        return None
    positions = range(len(bounds)) if chosen is None else chosen.tolist()
    dtype = op.dtype(ends)
    if dtype is None or any(step < 0 for step in order.tolist()):
        return None
    last = int(np.iinfo(dtype.numpy()).max)
    found: list[int] = []
    for axis, end in zip(positions, bounds.tolist(), strict=True):
        if not isinstance(end, Dim):
            found.append(end)
        elif end == shape[axis]:
            found.append(last)
        else:
            return None
    made = op.initializer(np.asarray(found, dtype.numpy()), "ends")
    return op.Slice(value, starts, made, axes, steps)


@rewrite.on("Resize")
def resize_by_factor(op: Op, node: ir.Node) -> ir.Value | None:
    """Resize to computed sizes that are whole multiples of the input's."""
    if op.opset < 11 or len(node.inputs) < 4:
        return None
    value, roi, _, sizes = node.inputs
    if value is None or sizes is None or ir.constant(sizes) is not None:
        return None
    if "axes" in node.attributes or "keep_aspect_ratio_policy" in node.attributes:
        return None
    before, after = op.shape(value), op.shape(node.outputs[0])
    if before is None or after is None:
        return None
    factors = [_factor(a, b) for a, b in zip(before, after, strict=True)]
    if any(factor is None for factor in factors):
        return None
    scales = op.initializer(np.asarray(factors, np.float32), "scales")
    inputs = [value, roi, scales]
    return op.build("Resize", inputs, dict(node.attributes))[0]


def _factor(before: DimLike, after: DimLike) -> int | None:
    """How often one size goes into another one, where that is the same for all sizes."""
    if before == after:
        return 1
    if isinstance(before, int) and isinstance(after, int):
        return after // before if before and after % before == 0 else None
    for factor in (2, 3, 4, 8, 16, 32):
        if before * factor == after:
            return factor
    return None
