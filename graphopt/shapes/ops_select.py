"""Shape rules of the operators that choose, count or resample: TopK, NonZero, Range, Resize."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np

from graphopt.dims import Dim, DimLike, bounds, ceil_div, floor_div, product
from graphopt.shapes.call import (
    Call,
    Scalar,
    Shape,
    ShapeRule,
    Unknown,
    axis_of,
    dim,
    number,
)
from graphopt.shapes.ops_data import positive
from graphopt.shapes.values import nonzero_indices

_NO_AXIS = 1 << 31  # stands for an absent axis attribute


def range_(c: Call) -> list[Shape | None]:
    """As many steps of `delta` as fit between start and limit."""
    try:
        return [(_steps(c, *[c.elements(i).item() for i in range(3)]),)]
    except Unknown:
        return [(c.fresh(0),)]


def _steps(c: Call, start: Scalar, limit: Scalar, delta: Scalar) -> DimLike:
    """How often delta fits; floats are numbers, whole ones beside a size."""
    if isinstance(start, float) and isinstance(limit, float) and isinstance(delta, float):
        return max(math.ceil((limit - start) / delta), 0)
    first, last, step = (
        dim(int(n) if isinstance(n, float) and n.is_integer() else n) for n in (start, limit, delta)
    )
    span = last - first
    if bounds(step)[0] > 0:
        return positive(c, ceil_div(span, step))
    return positive(c, ceil_div(-span, -number(step)))


def nonzero(c: Call) -> list[Shape | None]:
    """A column of indices per element that is not 0."""
    rank = c.rank(0)
    if rank == 0:
        raise Unknown
    try:
        return [nonzero_indices(c).shape]
    except Unknown:
        return [(rank, c.fresh(1))]


def one_hot(c: Call) -> list[Shape | None]:
    """The indices' shape with an axis of size depth."""
    shape = c.shape(0)
    axis = axis_of(c.attr("axis", int, -1), len(shape) + 1)
    try:
        depth = c.elements(1).ravel()[0]
        size = int(depth) if isinstance(depth, float) else dim(depth)
    except Unknown:
        size = c.fresh(axis)
    return [(*shape[:axis], size, *shape[axis:])]


def topk(c: Call) -> list[Shape | None]:
    """k along the axis; k is an attribute in opset 1."""
    shape = c.shape(0)
    axis = axis_of(c.attr("axis", int, -1), len(shape))
    attribute = c.attr("k", int, -1)
    if attribute >= 0:
        size: DimLike = attribute
    else:
        try:
            size = c.vector(1)[0]
        except Unknown:
            size = c.fresh(axis)
    return [(*shape[:axis], size, *shape[axis + 1 :])] * 2


def unique(c: Call) -> list[Shape | None]:
    """How many are distinct is not known; the inverse has an index per element."""
    axis = c.attr("axis", int, _NO_AXIS)
    count = c.fresh(0)
    if axis == _NO_AXIS:
        return [(count,), (count,), (product(c.shape(0)),), (count,)]
    shape = c.shape(0)
    axis = axis_of(axis, len(shape))
    rows = (*shape[:axis], count, *shape[axis + 1 :])
    return [rows, (count,), (shape[axis],), (count,)]


def compress(c: Call) -> list[Shape | None]:
    """What the condition keeps is not known."""
    axis = c.attr("axis", int, _NO_AXIS)
    if axis == _NO_AXIS:
        return [(c.fresh(0),)]
    shape = c.shape(0)
    axis = axis_of(axis, len(shape))
    return [(*shape[:axis], c.fresh(axis), *shape[axis + 1 :])]


def stft(c: Call) -> list[Shape | None]:
    """signal [N, length, 1 or 2] -> [N, frames, bins, 2]."""
    batch, length = c.shape(0)[:2]
    size = c.vector(3)[0] if c.has(3) else c.shape(2)[0]
    bins = floor_div(size, 2) + 1 if c.attr("onesided", int, 1) else size
    return [(batch, floor_div(length - size, c.vector(1)[0]) + 1, bins, 2)]


def depth_to_space(c: Call) -> list[Shape | None]:
    """Channels become blocks of pixels."""
    n, channels, height, width = c.shape(0)
    block = c.attr("blocksize", int, 0)
    return [(n, floor_div(channels, block * block), height * block, width * block)]


def space_to_depth(c: Call) -> list[Shape | None]:
    """Blocks of pixels become channels."""
    n, channels, height, width = c.shape(0)
    block = c.attr("blocksize", int, 0)
    return [(n, channels * block * block, floor_div(height, block), floor_div(width, block))]


def _scaled(size: DimLike, scale: object) -> DimLike:
    """floor(size * scale), in the float32 arithmetic of ONNX Runtime where the size is a number."""
    if not isinstance(scale, float | int):
        raise Unknown
    if not isinstance(size, Dim):
        return math.floor(np.float32(size) * np.float32(scale))
    ratio = Fraction(scale)
    if ratio.denominator > 64:
        raise Unknown
    return floor_div(size * ratio.numerator, ratio.denominator)


def resize(c: Call) -> list[Shape | None]:
    """By scales or to sizes, for all axes or for some."""
    shape = list(c.shape(0))
    attribute = c.attr("scales", tuple, ()) if c.opset < 9 else ()
    axes = c.attr_ints("axes") or list(range(len(shape)))
    stretches = c.attr("keep_aspect_ratio_policy", str, "stretch") == "stretch"
    scales_at = 1 if c.opset < 11 else 2
    for i, axis in enumerate(axes):
        axis = axis_of(axis, len(shape))
        try:
            if not stretches:
                raise Unknown
            if c.has(3) and c.opset >= 11:
                shape[axis] = c.vector(3)[i]
            else:
                factors = attribute or c.values(scales_at).ravel().tolist()
                shape[axis] = _scaled(shape[axis], factors[i])
        except Unknown:
            shape[axis] = c.fresh(axis)
    return [tuple(shape)]


def crop(c: Call) -> list[Shape | None]:
    """Crop, of ONNX's first releases: borders of the last two axes go, or a size is given."""
    shape = c.shape(0)
    left, top, right, bottom = c.attr_ints("border") or (0, 0, 0, 0)
    scale = c.attr_ints("scale")
    if scale:
        return [(*shape[:-2], *scale)]
    return [(*shape[:-2], shape[-2] - top - bottom, shape[-1] - left - right)]


def center_crop_pad(c: Call) -> list[Shape | None]:
    """The sizes asked for, on the axes that are named."""
    shape = list(c.shape(0))
    axes = c.attr_ints("axes") or list(range(len(shape)))
    for axis, size in zip(axes, c.vector(1), strict=True):
        shape[axis_of(axis, len(shape))] = size
    return [tuple(shape)]


RULES: dict[str, ShapeRule] = {
    "CenterCropPad": center_crop_pad,
    "Compress": compress,
    "Crop": crop,
    "DepthToSpace": depth_to_space,
    "NonZero": nonzero,
    "OneHot": one_hot,
    "Range": range_,
    "Resize": resize,
    "STFT": stft,
    "SpaceToDepth": space_to_depth,
    "TopK": topk,
    "Unique": unique,
    "Upsample": resize,
}
