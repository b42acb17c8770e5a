"""Shape rules of the operators that move data: reshape, slice, gather, pad, resize and the like."""

from __future__ import annotations

from graphopt.dims import (
    Dim,
    DimLike,
    bounds,
    broadcast,
    ceil_div,
    floor_div,
    less,
    maximum,
    minimum,
    product,
)
from graphopt.shapes.call import (
    Call,
    Shape,
    ShapeRule,
    Unknown,
    axis_of,
    number,
    static,
)

_HUGE = 2**31 - 1  # exporters write "to the end" as the largest int32 or int64


def _target(c: Call) -> list[DimLike]:
    """The requested shape of Reshape: an input, an attribute in opset 1."""
    attribute = c.attr_ints("shape")
    return c.vector(1) if attribute is None else list(attribute)


def _count(c: Call, index: int) -> int:
    """The length of an input that is a vector."""
    (length,) = static(c.shape(index))
    return length


def _unknown(c: Call, rank: int) -> Shape:
    """A shape of unknown sizes."""
    if not 0 <= rank <= 64:
        raise Unknown
    return tuple([c.fresh(axis) for axis in range(rank)])


def reshape(c: Call) -> list[Shape | None]:
    """0 copies a size, -1 is what remains.

    A symbolic element is taken for the size it asks for. That is the whole truth but for one
    degenerate run, in which two symbolic elements are 0 at once and 0 means "copy".
    """
    try:
        target = _target(c)
    except Unknown:
        return [_unknown(c, _count(c, 1))]
    source = c.fact(0).shape
    copies = not c.attr("allowzero", int, 0)
    result: list[DimLike | None] = []
    rest: int | None = None
    for axis, size in enumerate(target):
        if isinstance(size, Dim):
            result.append(size if c.nonnegative(size) else None)
        elif size == -1:
            rest = axis
            result.append(None)
        elif size == 0 and copies:
            result.append(None if source is None else source[axis])
        else:
            result.append(size)
    holes = [axis for axis, size in enumerate(result) if size is None]
    if len(holes) == 1 and source is not None:
        known = product([size for size in result if size is not None])
        if rest is not None or bounds(known)[0] > 0:
            if known == 0:
                raise Unknown
            result[holes[0]] = floor_div(product(source), known)
    return [tuple([c.fresh(i) if size is None else size for i, size in enumerate(result)])]


def flatten(c: Call) -> list[Shape | None]:
    """Two axes: what comes before `axis`, and the rest."""
    shape = c.shape(0)
    axis = c.attr("axis", int, 1)
    if axis < 0:
        axis += len(shape)
    return [(product(shape[:axis]), product(shape[axis:]))]


def _axes(c: Call, index: int = 1) -> list[int] | None:
    """The axes, from the attribute or the input; None where neither is given."""
    axes = c.attr_ints("axes")
    if axes is None and c.has(index):
        axes = c.ints(index)
    return axes


def squeeze(c: Call) -> list[Shape | None]:
    """The axes of size 1, or those that are named, go."""
    shape = c.shape(0)
    try:
        axes = _axes(c)
    except Unknown:
        return [_unknown(c, len(shape) - _count(c, 1))]
    if axes is None:
        return [tuple([size for size in static(shape) if size != 1])]
    gone = {axis_of(axis, len(shape)) for axis in axes}
    for axis in gone:
        c.require(shape[axis], 1)
    return [tuple([size for axis, size in enumerate(shape) if axis not in gone])]


def unsqueeze(c: Call) -> list[Shape | None]:
    """Axes of size 1 come in; they count in the result."""
    shape = iter(c.shape(0))
    try:
        axes = _axes(c)
    except Unknown:
        return [_unknown(c, c.rank(0) + _count(c, 1))]
    if axes is None:
        raise Unknown
    rank = c.rank(0) + len(axes)
    new = {axis_of(axis, rank) for axis in axes}
    return [tuple([1 if axis in new else next(shape) for axis in range(rank)])]


def concat(c: Call) -> list[Shape | None]:
    """Sizes add up along the axis; all others must be equal."""
    shapes = [c.fact(i).shape for i in range(len(c.inputs))]
    known = [shape for shape in shapes if shape is not None]
    if not known:
        raise Unknown
    rank = len(known[0])
    axis = axis_of(c.attr("axis", int, 1), rank)
    result = list(known[0])
    for shape in known[1:]:
        for i, size in enumerate(shape):
            if i != axis and size != result[i]:
                c.require(result[i], size)
                if isinstance(result[i], Dim) and not isinstance(size, Dim):
                    result[i] = size
    if len(known) < len(shapes):
        result[axis] = c.fresh(axis)
    elif axis < rank:
        total: DimLike = 0
        for shape in known:
            total = total + shape[axis]
        result[axis] = total
    return [tuple(result)]


def split(c: Call) -> list[Shape | None]:
    """Sizes from the attribute or the input; equal parts otherwise, the last the smallest."""
    shape = c.shape(0)
    axis = axis_of(c.attr("axis", int, 0), len(shape))
    count = len(c.node.outputs)
    sizes: list[DimLike]
    given = c.attr_ints("split")
    if given is not None:
        sizes = list(given)
    elif c.has(1):
        try:
            sizes = c.vector(1)
        except Unknown:
            sizes = [c.fresh(axis, i) for i in range(count)]
    elif c.opset >= 18:
        part = ceil_div(shape[axis], c.attr("num_outputs", int, count))
        sizes = [part] * (count - 1) + [shape[axis] - part * (count - 1)]
    else:
        sizes = [floor_div(shape[axis], count)] * count
    return [(*shape[:axis], sizes[i], *shape[axis + 1 :]) for i in range(count)]


def slice_(c: Call) -> list[Shape | None]:
    """Attributes in opset 1, inputs from opset 10; ends are clamped to the axis."""
    shape = list(c.shape(0))
    if "starts" in c.node.attributes:
        starts: list[DimLike] = list(c.attr_ints("starts") or ())
        ends: list[DimLike] = list(c.attr_ints("ends") or ())
        axes = c.attr_ints("axes")
        steps: list[DimLike] = [1] * len(starts)
    else:
        try:
            axes = c.ints(3) if c.has(3) else None
        except Unknown:
            return [_unknown(c, len(shape))]
        count = _count(c, 1) if axes is None else len(axes)
        starts, ends = bound(c, 1, count), bound(c, 2, count)
        steps = bound(c, 4, count) if c.has(4) else [1] * count
    for i, axis in enumerate(range(len(starts)) if axes is None else axes):
        axis = axis_of(axis, len(shape))
        size = slice_size(c, shape[axis], starts[i], ends[i], steps[i])
        shape[axis] = c.fresh(axis) if size is None else size
    return [tuple(shape)]


def bound(c: Call, index: int, count: int) -> list[DimLike]:
    """Starts, ends or steps; a value that nothing is known of where they are unknown."""
    try:
        return c.vector(index)
    except Unknown:
        value = c.node.inputs[index]
        assert value is not None
        return [c.shapes.mint(value, "value", i) for i in range(count)]


def _python(size: int, start: int, end: int, step: int) -> tuple[int, int | None, int]:
    """ONNX's bounds as Python's: an end that stays negative means before the first element."""
    if step < 0 and end < -size:
        return start, None, step
    return start, end, step


def slice_size(
    c: Call, size: DimLike, start: DimLike, end: DimLike, step: DimLike
) -> DimLike | None:
    """Elements that start:end:step takes of an axis; None where that is not decided."""
    if isinstance(step, Dim) or step == 0:
        return None
    if step < 0 and not isinstance(end, Dim) and end >= _HUGE:
        return None  # nothing, by the standard; ONNX Runtime takes all down to the first element
    if not isinstance(size, Dim) and not isinstance(start, Dim) and not isinstance(end, Dim):
        return len(range(*slice(*_python(size, start, end, step)).indices(size)))
    if step < 0:
        whole = start == -1 or (not isinstance(start, Dim) and start >= _HUGE)
        if whole and not isinstance(end, Dim) and end <= -_HUGE:
            return ceil_div(size, -step)
        return None
    length = _span(c, size, start, end)
    return None if length is None else ceil_div(length, step)


def _span(c: Call, size: DimLike, start: DimLike, end: DimLike) -> DimLike | None:
    """Length of start:end on an axis of which something is symbolic."""
    to_end = end == size or (not isinstance(end, Dim) and end >= _HUGE)
    begin_negative, end_negative = less(start, 0), False if to_end else less(end, 0)
    if begin_negative is None and c.nonnegative(start):
        begin_negative = False
    if end_negative is None and c.nonnegative(end):
        end_negative = False
    if begin_negative is None or end_negative is None:
        return None
    if to_end:
        if begin_negative:
            return minimum(-start, size)
        return positive(c, size - start)
    if end_negative:
        end = positive(c, size + end)
        if start == 0:
            return end
    else:
        end = end if less(size, end) is False else minimum(end, size)
    start = positive(c, size + start) if begin_negative else minimum(start, size)
    return positive(c, end - start)


def positive(c: Call, value: DimLike) -> DimLike:
    """The number, or 0 where it is negative."""
    return value if c.nonnegative(value) else maximum(value, 0)


def gather(c: Call) -> list[Shape | None]:
    """The indices' shape takes the place of the axis."""
    shape = c.shape(0)
    axis = axis_of(c.attr("axis", int, 0), len(shape))
    return [shape[:axis] + c.shape(1) + shape[axis + 1 :]]


def gather_nd(c: Call) -> list[Shape | None]:
    """Index vectors in the last axis pick slices."""
    data, indices = c.shape(0), c.shape(1)
    depth = number(indices[-1]) + c.attr("batch_dims", int, 0)
    return [indices[:-1] + data[depth:]]


def second(c: Call) -> list[Shape | None]:
    """The result is shaped as the second input."""
    return [c.shape(1)]


def pad(c: Call) -> list[Shape | None]:
    """Each axis grows by what is put before and after it."""
    shape = list(c.shape(0))
    attribute = c.attr_ints("pads") or c.attr_ints("paddings")
    try:
        axes = c.ints(3) if c.has(3) else list(range(len(shape)))
    except Unknown:
        return [_unknown(c, len(shape))]
    if attribute is not None:
        amounts: list[DimLike] = list(attribute)
    else:
        amounts = bound(c, 1, 2 * len(axes))
    for i, axis in enumerate(axes):
        axis = axis_of(axis, len(shape))
        shape[axis] = shape[axis] + amounts[i] + amounts[i + len(axes)]
    return [tuple(shape)]


def tile(c: Call) -> list[Shape | None]:
    """Each axis is repeated; opset 1 repeats one axis."""
    shape = list(c.shape(0))
    if c.opset < 6:
        axis = c.ints(2)[0]
        shape[axis] = shape[axis] * c.ints(1)[0]
        return [tuple(shape)]
    repeats = bound(c, 1, len(shape))
    return [tuple([size * count for size, count in zip(shape, repeats, strict=True)])]


def expand(c: Call) -> list[Shape | None]:
    """Broadcast with a shape given as values."""
    try:
        target = c.vector(1)
    except Unknown:
        target = bound(c, 1, _count(c, 1))
    shape = c.shape(0)
    rank = max(len(shape), len(target))
    sizes = (1,) * (rank - len(shape)) + shape
    result: list[DimLike] = []
    for axis, wanted in enumerate([1] * (rank - len(target)) + target):
        size = sizes[axis]
        if isinstance(wanted, Dim) and not c.nonnegative(wanted):
            decided = not isinstance(size, Dim) and size > 1
            result.append(size if decided else c.fresh(axis))
        else:
            result.append(broadcast(size, wanted))
    return [tuple(result)]


def transpose(c: Call) -> list[Shape | None]:
    """Axes in the order of `perm`, reversed without one."""
    shape = c.shape(0)
    perm = c.attr_ints("perm")
    if perm is None:
        return [shape[::-1]]
    if sorted(perm) != list(range(len(shape))):
        raise Unknown
    return [tuple([shape[axis] for axis in perm])]


def constant_of_shape(c: Call) -> list[Shape | None]:
    """The shape that the input holds."""
    try:
        return [tuple(c.vector(0))]
    except Unknown:
        return [_unknown(c, _count(c, 0))]


RULES: dict[str, ShapeRule] = {
    "Concat": concat,
    "ConstantOfShape": constant_of_shape,
    "Expand": expand,
    "Flatten": flatten,
    "Gather": gather,
    "GatherElements": second,
    "GatherND": gather_nd,
    "Pad": pad,
    "Reshape": reshape,
    "Slice": slice_,
    "Split": split,
    "Squeeze": squeeze,
    "Tile": tile,
    "Transpose": transpose,
    "Unsqueeze": unsqueeze,
}
