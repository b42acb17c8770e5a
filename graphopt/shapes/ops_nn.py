"""Shape rules of the operators that compute: convolution, pooling, products, recurrence."""

from __future__ import annotations

from graphopt.dims import Dim, DimLike, bounds, broadcast, ceil_div, floor_div
from graphopt.shapes.call import Call, Shape, ShapeRule, Unknown, axis_of, number, static


def _spread(c: Call, name: str, rank: int, default: int) -> list[int]:
    """A per-axis attribute, or the default for each axis."""
    values = c.attr_ints(name)
    if not values:
        return [default] * rank
    if len(values) < rank:
        raise Unknown
    return values


def _windows(c: Call, sizes: Shape, kernel: Shape, ceil_mode: bool = False) -> Shape:
    """Output sizes of a sliding window (the formulas of ONNX's Conv and MaxPool)."""
    rank = len(sizes)
    strides = _spread(c, "strides", rank, 1)
    dilations = _spread(c, "dilations", rank, 1)
    padding = c.attr("auto_pad", str, "NOTSET")
    pads = _spread(c, "pads", 2 * rank, 0) if padding in ("NOTSET", "") else [0] * (2 * rank)
    result: list[DimLike] = []
    for i, size in enumerate(sizes):
        if padding.startswith("SAME"):
            result.append(ceil_div(size, strides[i]))
            continue
        window = (kernel[i] - 1) * dilations[i] + 1
        free = size + pads[i] + pads[i + rank] - window
        if ceil_mode:
            result.append(_ceil_windows(c, size + pads[i], free, strides[i], 2 + i))
        else:
            result.append(floor_div(free, strides[i]) + 1)
    return tuple(result)


def _ceil_windows(c: Call, end: DimLike, free: DimLike, stride: int, axis: int) -> DimLike:
    """Rounded up, less a last window that would begin in the padding behind the axis."""
    count = ceil_div(free, stride) + 1
    last = (count - 1) * stride
    if not isinstance(last, Dim) and not isinstance(end, Dim):
        return number(count) - (last >= end)
    # the last window begins less than `stride` behind free, and may not reach the end
    return count if bounds(free + stride - 1 - end)[1] < 0 else c.fresh(axis)


def _conv(c: Call, x: Shape, w: Shape) -> list[Shape | None]:
    kernel = c.attr_ints("kernel_shape")
    c.require(x[1], w[1] * c.attr("group", int, 1))
    return [(x[0], w[0], *_windows(c, x[2:], tuple(kernel or w[2:])))]


def conv(c: Call) -> list[Shape | None]:
    """X [N, C, ...], W [M, C/group, ...] -> [N, M, ...]."""
    w = c.shape(1)
    x = c.fact(0).shape
    if x is None:  # of W's rank
        return [tuple([w[0] if axis == 1 else c.fresh(axis) for axis in range(len(w))])]
    return _conv(c, x, w)


def qlinear_conv(c: Call) -> list[Shape | None]:
    """As Conv, with the weight after the input's scale and zero point."""
    return _conv(c, c.shape(0), c.shape(3))


def conv_transpose(c: Call) -> list[Shape | None]:
    """X [N, C, ...], W [C, M/group, ...] -> [N, M, ...]."""
    x, w = c.shape(0), c.shape(1)
    rank = len(x) - 2
    channels = w[1] * c.attr("group", int, 1)
    c.require(x[1], w[0])
    given = c.attr_ints("output_shape")
    if given:
        return [(x[0], channels, *given[-rank:])]
    kernel = tuple(c.attr_ints("kernel_shape") or w[2:])
    strides, dilations = _spread(c, "strides", rank, 1), _spread(c, "dilations", rank, 1)
    extra = _spread(c, "output_padding", rank, 0)
    padding = c.attr("auto_pad", str, "NOTSET")
    pads = _spread(c, "pads", 2 * rank, 0) if padding in ("NOTSET", "") else [0] * (2 * rank)
    sizes: list[DimLike] = []
    for i, size in enumerate(x[2:]):
        if padding.startswith("SAME"):
            sizes.append(size * strides[i])
            continue
        window = (kernel[i] - 1) * dilations[i] + 1
        sizes.append(strides[i] * (size - 1) + extra[i] + window - pads[i] - pads[i + rank])
    return [(x[0], channels, *sizes)]


def pool(c: Call) -> list[Shape | None]:
    """Every output of a pooling operator: values, and MaxPool's indices."""
    x = c.shape(0)
    kernel = tuple(c.attr_ints("kernel_shape") or ())
    sizes = _windows(c, x[2:], kernel, bool(c.attr("ceil_mode", int, 0)))
    return [(*x[:2], *sizes)] * 2


def max_unpool(c: Call) -> list[Shape | None]:
    """The sizes that MaxPool was given, or those asked for."""
    if c.has(2):
        return [tuple(c.vector(2))]
    x = c.shape(0)
    rank = len(x) - 2
    kernel = _spread(c, "kernel_shape", rank, 1)
    strides, pads = _spread(c, "strides", rank, 1), _spread(c, "pads", 2 * rank, 0)
    sizes = [
        (size - 1) * strides[i] - pads[i] - pads[i + rank] + kernel[i]
        for i, size in enumerate(x[2:])
    ]
    return [(*x[:2], *sizes)]


def global_pool(c: Call) -> list[Shape | None]:
    """All spatial axes become 1."""
    x = c.shape(0)
    return [x[:2] + (1,) * (len(x) - 2)]


def max_roi_pool(c: Call) -> list[Shape | None]:
    """X [N, C, H, W], rois [R, 5] -> [R, C, h, w]."""
    return [(c.shape(1)[0], c.shape(0)[1], *(c.attr_ints("pooled_shape") or ()))]


def roi_align(c: Call) -> list[Shape | None]:
    """X [N, C, H, W], rois [R, 4] -> [R, C, h, w]."""
    height, width = c.attr("output_height", int, 1), c.attr("output_width", int, 1)
    return [(c.shape(1)[0], c.shape(0)[1], height, width)]


def grid_sample(c: Call) -> list[Shape | None]:
    """X [N, C, ...], grid [N, ..., r] -> [N, C, ...]."""
    return [c.shape(0)[:2] + c.shape(1)[1:-1]]


def matrix_product(c: Call, a: Shape, b: Shape) -> Shape:
    """The shape of numpy's matmul."""
    if not a or not b:
        raise Unknown
    c.require(a[-1], b[-2:][0])
    batch = join(a[:-2], b[:-2])
    rows, columns = a[-2:-1], b[-1:] if len(b) > 1 else ()
    return (*batch, *rows, *columns)


def join(a: Shape, b: Shape) -> Shape:
    """The shape of two operands under numpy's broadcasting."""
    if len(a) < len(b):
        a, b = b, a
    extra = len(a) - len(b)
    tail: list[DimLike] = []
    for x, y in zip(a[extra:], b, strict=True):
        tail.append(x if x == y else broadcast(x, y))
    return (*a[:extra], *tail)


def matmul(c: Call) -> list[Shape | None]:
    """numpy's matmul."""
    return [matrix_product(c, c.shape(0), c.shape(1))]


def qlinear_matmul(c: Call) -> list[Shape | None]:
    """As MatMul, with the second factor after the first's scale and zero point."""
    return [matrix_product(c, c.shape(0), c.shape(3))]


def gemm(c: Call) -> list[Shape | None]:
    """Both factors are matrices, each transposed on request."""
    rows, inner = c.shape(0)[:: -1 if c.attr("transA", int, 0) else 1]
    depth, columns = c.shape(1)[:: -1 if c.attr("transB", int, 0) else 1]
    c.require(inner, depth)
    return [(rows, columns)]


def recurrent(c: Call) -> list[Shape | None]:
    """RNN, GRU, LSTM: Y [T, D, N, H], Y_h and Y_c [D, N, H]; batch first with layout 1."""
    x = c.fact(0).shape
    first, second = (c.fresh(0), c.fresh(2)) if x is None else x[:2]
    hidden: DimLike = c.attr("hidden_size", int, 0) or c.shape(2)[-1]
    directions = 2 if c.attr("direction", str, "forward") == "bidirectional" else 1
    if c.attr("layout", int, 0):
        state: Shape = (first, directions, hidden)
        return [(first, second, directions, hidden), state, state]
    state = (directions, second, hidden)
    return [(first, directions, second, hidden), state, state]


def attention(c: Call) -> list[Shape | None]:
    """ONNX's Attention: Q, K, V [N, heads, T, H], or [N, T, heads*H] with the heads as attributes.

    Outputs Y as Q but with V's head size, the present keys and values, and the scores.
    """
    q, k, v = c.shape(0), c.shape(1), c.shape(2)
    if len(q) == 3:
        q_heads: DimLike = c.attr("q_num_heads", int, 0)
        kv_heads: DimLike = c.attr("kv_num_heads", int, 0)
        steps, total = q[1], k[1]
        k_size, v_size = floor_div(k[2], kv_heads), floor_div(v[2], kv_heads)
        result: Shape = (q[0], q[1], q_heads * v_size)
    else:
        q_heads, kv_heads = q[1], k[1]
        steps, total, k_size, v_size = q[2], k[2], k[3], v[3]
        result = (*q[:3], v_size)
    if c.has(4):
        total = total + c.shape(4)[2]
    batch = q[0]
    keys, values = (batch, kv_heads, total, k_size), (batch, kv_heads, total, v_size)
    return [result, keys, values, (batch, q_heads, steps, total)]


def einsum(c: Call) -> list[Shape | None]:
    """Letters name axes; an ellipsis in every operand stands for axes that broadcast."""
    equation = c.attr("equation", str, "").replace(" ", "")
    left, arrow, right = equation.partition("->")
    terms = left.split(",")
    if len(terms) != len(c.inputs):
        raise Unknown
    sizes: dict[str, DimLike] = {}
    rest: Shape = ()
    for i, term in enumerate(terms):
        shape = c.shape(i)
        before, dots, after = term.partition("...")
        count = len(shape) - len(before) - len(after)
        if count < 0 or (not dots and count):
            raise Unknown
        rest = join(rest, shape[len(before) : len(before) + count])
        tail = shape[len(shape) - len(after) :]
        for letter, size in zip(before + after, shape[: len(before)] + tail, strict=True):
            sizes[letter] = broadcast(sizes[letter], size) if letter in sizes else size
    if not arrow:
        letters = left.replace(",", "").replace(".", "")
        right = "..." * ("..." in left) + "".join(s for s in sorted(sizes) if letters.count(s) == 1)
    before, dots, after = right.partition("...")
    middle = rest if dots else ()
    return [(*[sizes[s] for s in before], *middle, *[sizes[s] for s in after])]


def batch_norm(c: Call) -> list[Shape | None]:
    """Y as X; the statistics as the scale's vector."""
    statistics = c.inputs[1].shape if c.has(1) and c.inputs[1] else None
    return [c.fact(0).shape, *[statistics] * 4]


def layer_norm(c: Call) -> list[Shape | None]:
    """Y as X; mean and deviation with the normalized axes 1."""
    shape = c.shape(0)
    axis = axis_of(c.attr("axis", int, -1), len(shape))
    reduced = shape[:axis] + (1,) * (len(shape) - axis)
    return [shape, reduced, reduced]


def det(c: Call) -> list[Shape | None]:
    """The matrices in the last two axes become numbers."""
    return [c.shape(0)[:-2]]


def affine_grid(c: Call) -> list[Shape | None]:
    """size [N, C, ...] -> [N, ..., r]."""
    batch, _, *sizes = c.vector(1)
    return [(batch, *sizes, len(sizes))]


def reduce(c: Call) -> list[Shape | None]:
    """All forms of Reduce*: axes as attribute or input, or none."""
    shape = c.shape(0)
    keep = c.attr("keepdims", int, 1)
    axes = c.attr_ints("axes")
    if axes is None and c.has(1):
        try:
            axes = c.ints(1)
        except Unknown:
            rank = len(shape)
            if not keep:
                (count,) = static(c.shape(1))
                if not count:  # none means all, or none
                    raise
                rank -= count
            return [tuple([c.fresh(axis) for axis in range(rank)])]
    if not axes:
        if c.attr("noop_with_empty_axes", int, 0):
            return [shape]
        axes = list(range(len(shape)))
    return [_reduced(shape, {axis_of(axis, len(shape)) for axis in axes}, keep)]


def _reduced(shape: Shape, axes: set[int], keep: int) -> Shape:
    if keep:
        return tuple([1 if axis in axes else size for axis, size in enumerate(shape)])
    return tuple([size for axis, size in enumerate(shape) if axis not in axes])


def arg_reduce(c: Call) -> list[Shape | None]:
    """ArgMax and ArgMin: one axis goes, or becomes 1."""
    shape = c.shape(0)
    axis = axis_of(c.attr("axis", int, 0), len(shape))
    return [_reduced(shape, {axis}, c.attr("keepdims", int, 1))]


def shape_of(c: Call) -> list[Shape | None]:
    """The number of axes between start and end."""
    if c.fact(0).shape is None:
        return [(c.fresh(0),)]
    rank = c.rank(0)
    end = c.attr("end", int, rank)
    return [(len(range(rank)[c.attr("start", int, 0) : end]),)]


def window(c: Call) -> list[Shape | None]:
    """The length is the input's number."""
    return [(c.vector(0)[0],)]


def from_shape_attr(c: Call) -> list[Shape | None]:
    """The shape is an attribute."""
    return [tuple(c.attr_ints("shape") or ())]


def multinomial(c: Call) -> list[Shape | None]:
    """[N, classes] -> [N, samples]."""
    return [(c.shape(0)[0], c.attr("sample_size", int, 1))]


def max_suppression(c: Call) -> list[Shape | None]:
    """NonMaxSuppression: how many boxes are kept is not known."""
    return [(c.fresh(0), 3)]


def linear_quantized(c: Call) -> list[Shape | None]:
    """DynamicQuantizeLinear: the tensor, and a scale and zero point for all of it."""
    return [c.shape(0), (), ()]


_REDUCTIONS = [
    f"Reduce{kind}"
    for kind in (
        *("L1", "L2", "LogSum", "LogSumExp", "Max", "Mean", "Min", "Prod", "Sum"),
        "SumSquare",
    )
]

RULES: dict[str, ShapeRule] = {
    "AffineGrid": affine_grid,
    "ArgMax": arg_reduce,
    "ArgMin": arg_reduce,
    "Attention": attention,
    "AveragePool": pool,
    "BatchNormalization": batch_norm,
    "BlackmanWindow": window,
    "Conv": conv,
    "ConvInteger": conv,
    "ConvTranspose": conv_transpose,
    "Det": det,
    "DynamicQuantizeLinear": linear_quantized,
    "Einsum": einsum,
    "GRU": recurrent,
    "Gemm": gemm,
    "GlobalAveragePool": global_pool,
    "GlobalLpPool": global_pool,
    "GlobalMaxPool": global_pool,
    "GridSample": grid_sample,
    "HammingWindow": window,
    "HannWindow": window,
    "LSTM": recurrent,
    "LayerNormalization": layer_norm,
    "LpPool": pool,
    "MatMul": matmul,
    "MatMulInteger": matmul,
    "MaxPool": pool,
    "MaxRoiPool": max_roi_pool,
    "MaxUnpool": max_unpool,
    "Multinomial": multinomial,
    "NonMaxSuppression": max_suppression,
    "QLinearConv": qlinear_conv,
    "QLinearMatMul": qlinear_matmul,
    "RNN": recurrent,
    "RandomNormal": from_shape_attr,
    "RandomUniform": from_shape_attr,
    "RoiAlign": roi_align,
    "Shape": shape_of,
    **dict.fromkeys(_REDUCTIONS, reduce),
}
