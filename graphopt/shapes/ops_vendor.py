"""Shape rules of com.microsoft and ai.onnx.ml: what exporters and ONNX Runtime write most."""

from __future__ import annotations

from graphopt.dims import DimLike, floor_div, product
from graphopt.shapes.call import Call, Shape, ShapeRule, Unknown, axis_of
from graphopt.shapes.ops_nn import conv, gemm, join, matmul, matrix_product


def skip_layer_norm(c: Call) -> list[Shape | None]:
    """com.microsoft: Y as X, mean and deviation, and the sum that was normalized."""
    shape = c.shape(0)
    reduced = (*shape[:-1], 1)
    return [shape, reduced, reduced, shape]


def fused_matmul(c: Call) -> list[Shape | None]:
    """com.microsoft: MatMul with transposed factors."""
    a, b = c.shape(0), c.shape(1)
    if c.attr("transBatchA", int, 0) or c.attr("transBatchB", int, 0):
        raise Unknown
    if c.attr("transA", int, 0) and len(a) > 1:
        a = (*a[:-2], a[-1], a[-2])
    if c.attr("transB", int, 0) and len(b) > 1:
        b = (*b[:-2], b[-1], b[-2])
    return [matrix_product(c, a, b)]


def cdist(c: Call) -> list[Shape | None]:
    """com.microsoft CDist: points [M, K] and [N, K] -> distances [M, N]."""
    return [(c.shape(0)[0], c.shape(1)[0])]


def matmul_nbits(c: Call) -> list[Shape | None]:
    """com.microsoft: [..., K] times packed weights -> [..., N]."""
    return [(*c.shape(0)[:-1], c.attr("N", int, 0))]


def embed_layer_norm(c: Call) -> list[Shape | None]:
    """com.microsoft: ids [N, T] -> [N, T, H], the mask's lengths [N], the sum."""
    ids, table = c.shape(0), c.shape(2)
    result = (*ids, table[-1])
    return [result, ids[:1], result]


def packed_attention(c: Call) -> list[Shape | None]:
    """com.microsoft Attention: X [N, T, _], bias [3H] -> [N, T, H]; the present is not followed."""
    x = c.shape(0)
    if c.attr_ints("qkv_hidden_sizes"):
        raise Unknown
    return [(*x[:2], floor_div(c.shape(2)[0], 3)), None]


def multi_head_attention(c: Call) -> list[Shape | None]:
    """com.microsoft: query [N, T, H], value [N, S, V] -> [N, T, V]; the present is not followed."""
    query = c.shape(0)
    if len(query) != 3 or not c.has(2) or len(c.shape(2)) != 3:
        raise Unknown
    return [(*query[:2], c.shape(2)[2]), None, None]


def qlinear_global_pool(c: Call) -> list[Shape | None]:
    """com.microsoft QLinearGlobalAveragePool: channels second or last."""
    x = c.shape(0)
    ones = (1,) * (len(x) - 2)
    return [(x[0], *ones, x[-1]) if c.attr("channels_last", int, 0) else (*x[:2], *ones)]


def qlinear_concat(c: Call) -> list[Shape | None]:
    """com.microsoft QLinearConcat: tensors at every third input from the third on."""
    shapes = [c.shape(i) for i in range(2, len(c.inputs), 3)]
    axis = axis_of(c.attr("axis", int, 0), len(shapes[0]))
    total: DimLike = 0
    for shape in shapes:
        total = total + shape[axis]
    return [(*shapes[0][:axis], total, *shapes[0][axis + 1 :])]


def biased(c: Call) -> list[Shape | None]:
    """com.microsoft BiasGelu and the like: the longer of the operands' shapes."""
    return [join(c.shape(0), c.shape(1))]


def qlinear_binary(c: Call) -> list[Shape | None]:
    """com.microsoft QLinearAdd, QLinearMul: operands at inputs 0 and 3."""
    return [join(c.shape(0), c.shape(3))]


def rows(c: Call) -> list[Shape | None]:
    """ai.onnx.ml: one row per sample, of a width that the attributes hide."""
    shape = c.shape(0)
    return [(shape[0] if len(shape) > 1 else 1, c.fresh(1))]


def classes(c: Call) -> list[Shape | None]:
    """ai.onnx.ml classifiers: a label per sample, and its scores."""
    (scores,) = rows(c)
    assert scores is not None
    return [scores[:1], (scores[0], c.fresh(1, 1))]


def picked(c: Call) -> list[Shape | None]:
    """ai.onnx.ml ArrayFeatureExtractor: elements of the last axis, as many as there are indices."""
    shape = c.shape(0)
    rows = shape[:-1] if len(shape) > 1 else (1,)
    return [(*rows, product(c.shape(1)))]


MICROSOFT: dict[str, ShapeRule] = {
    **dict.fromkeys(("BiasGelu", "BiasAdd"), biased),
    **dict.fromkeys(("QLinearAdd", "QLinearMul"), qlinear_binary),
    "Attention": packed_attention,
    "CDist": cdist,
    "DynamicQuantizeMatMul": matmul,
    "EmbedLayerNormalization": embed_layer_norm,
    "FusedConv": conv,
    "FusedGemm": gemm,
    "FusedMatMul": fused_matmul,
    "MatMulIntegerToFloat": matmul,
    "MatMulNBits": matmul_nbits,
    "MultiHeadAttention": multi_head_attention,
    "QLinearConcat": qlinear_concat,
    "QLinearGlobalAveragePool": qlinear_global_pool,
    "SkipLayerNormalization": skip_layer_norm,
    "SkipSimplifiedLayerNormalization": skip_layer_norm,
}

ML: dict[str, ShapeRule] = {
    **dict.fromkeys(("LinearClassifier", "SVMClassifier", "TreeEnsembleClassifier"), classes),
    **dict.fromkeys(("LinearRegressor", "SVMRegressor", "TreeEnsembleRegressor"), rows),
    "ArrayFeatureExtractor": picked,
}
