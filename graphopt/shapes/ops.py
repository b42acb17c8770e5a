"""The tables of shape inference: which rule an operator follows, and its outputs' types.

An operator without an entry is left to onnx's own inference (see `graphopt.shapes`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from graphopt import ir
from graphopt.shapes import ops_data, ops_nn, ops_select, ops_vendor
from graphopt.shapes.call import Call, Shape, ShapeRule, Unknown
from graphopt.shapes.ops_nn import join

__all__ = ["SHAPES", "TYPES", "TypeRule"]

TypeRule = (
    int | ir.DataType | tuple[int | ir.DataType, ...] | Callable[[Call], list[ir.DataType | None]]
)
"""An output type: that of input n, a fixed one, one of these per output, or a function's."""


def same(c: Call) -> list[Shape | None]:
    """Every output is shaped as the first input."""
    return [c.fact(0).shape] * len(c.node.outputs)


def broadcast_inputs(c: Call) -> list[Shape | None]:
    """All inputs under numpy's broadcasting; before opset 7 the first decides."""
    shape = c.shape(0)
    if c.opset < 7 and not c.node.domain and c.node.op_type not in _VARIADIC:
        return [shape]
    for index in range(1, len(c.inputs)):
        other = c.shape(index)
        if not other or other == shape:
            continue
        try:
            shape = join(shape, other)
        except OverflowError:  # too many symbols meet on an axis
            shape = tuple([c.fresh(axis) for axis in range(max(len(shape), len(other)))])
    return [shape]


def scalar(c: Call) -> list[Shape | None]:
    """A tensor without axes."""
    return [()] * len(c.node.outputs)


def _words(text: str) -> list[str]:
    return text.split()


_VARIADIC = frozenset({"Max", "Mean", "Min", "Sum"})
_SAME = _words(
    "Abs Acos Acosh Asin Asinh Atan Atanh Bernoulli BitwiseNot Cast CastLike Ceil Celu "
    "Clip Cos Cosh CumProd CumSum DequantizeLinear Dropout Elu Erf Exp EyeLike Floor "
    "Gelu GroupNormalization HardSigmoid HardSwish Hardmax Identity "
    "InstanceNormalization IsInf IsNaN LRN LeakyRelu Log LogSoftmax LpNormalization "
    "MeanVarianceNormalization Mish Neg Not PRelu QuantizeLinear RMSNormalization "
    "RandomNormalLike RandomUniformLike Reciprocal Relu ReverseSequence RotaryEmbedding "
    "Round Scatter ScatterElements ScatterND Selu Shrink Sigmoid Sign Sin Sinh Softmax "
    "Softplus Softsign Sqrt Swish Tan Tanh TensorScatter ThresholdedRelu Trilu"
)
_BROADCAST = _words(
    "Add And BitShift BitwiseAnd BitwiseOr BitwiseXor Div Equal Greater GreaterOrEqual "
    "Less LessOrEqual Max Mean Min Mod Mul Or Pow Sub Sum Where Xor"
)
_MICROSOFT_SAME = _words(
    "FastGelu Gelu QLinearLeakyRelu QLinearSigmoid QLinearSoftmax QuickGelu "
    "RotaryEmbedding QuantizeLinear DequantizeLinear"
)
# Experiments of ONNX's first releases that ONNX Runtime still runs.
_EARLY_SAME = _words("Affine ImageScaler ParametricSoftplus Scale ScaledTanh")
_ML_SAME = ("Binarizer", "CategoryMapper", "Imputer", "LabelEncoder", "Normalizer", "Scaler")

SHAPES: Mapping[str, Mapping[str, ShapeRule]] = {
    "": {
        **dict.fromkeys((*_SAME, *_EARLY_SAME), same),
        **dict.fromkeys(_BROADCAST, broadcast_inputs),
        **ops_data.RULES,
        **ops_nn.RULES,
        **ops_select.RULES,
        "Size": scalar,
    },
    "com.microsoft": {
        **dict.fromkeys(_MICROSOFT_SAME, same),
        **ops_vendor.MICROSOFT,
    },
    "ai.onnx.ml": {
        **dict.fromkeys(_ML_SAME, same),
        **ops_vendor.ML,
    },
}


def _attribute_type(name: str, default: ir.DataType) -> TypeRule:
    return lambda c: [ir.DataType(c.attr(name, int, int(default)))]


def _like(c: Call) -> list[ir.DataType | None]:
    """The type of the attribute, else that of the input."""
    given = c.attr("dtype", int, 0)
    return [ir.DataType(given) if given else c.dtype(0)]


def _filled(c: Call) -> list[ir.DataType | None]:
    """The type of the attribute's tensor, float32 without it."""
    attr = c.node.attributes.get("value")
    if attr is None:
        return [ir.DataType.FLOAT]
    if attr.is_ref():
        raise Unknown
    return [attr.as_tensor().dtype]


def _quantized(c: Call) -> list[ir.DataType | None]:
    """The zero point's type, else the attribute's, else uint8."""
    if c.has(2):
        return [c.dtype(2)]
    return [ir.DataType(c.attr("output_dtype", int, 0) or int(ir.DataType.UINT8))]


def _dequantized(c: Call) -> list[ir.DataType | None]:
    """The attribute's type, else the scale's."""
    given = c.attr("output_dtype", int, 0)
    return [ir.DataType(given) if given else c.dtype(1)]


def _layer_normalized(c: Call) -> list[ir.DataType | None]:
    """The statistics have a type of their own, float32 unless an attribute says otherwise."""
    stash = ir.DataType(c.attr("stash_type", int, int(ir.DataType.FLOAT)))
    return [c.dtype(0), stash, stash]


def _classified(c: Call) -> list[ir.DataType | None]:
    """Labels are integers or strings, by the attribute that lists them."""
    names = ("classlabels_strings", "classlabels_int64s")
    text = bool(c.attr(names[0], tuple, ())) and not c.attr(names[1], tuple, ())
    return [ir.DataType.STRING if text else ir.DataType.INT64, ir.DataType.FLOAT]


def _labelled(c: Call) -> list[ir.DataType | None]:
    """LabelEncoder: the type of the table of results."""
    for ending, kind in _LABELS.items():
        if f"values_{ending}" in c.node.attributes:
            return [kind]
    return [c.node.attributes["values_tensor"].as_tensor().dtype]


def _dropped(c: Call) -> list[ir.DataType | None]:
    """The mask is boolean from opset 10 on."""
    return [c.dtype(0), ir.DataType.BOOL if c.opset >= 10 else c.dtype(0)]


def _mapped(c: Call) -> list[ir.DataType | None]:
    """CategoryMapper: strings become integers, integers strings."""
    return [ir.DataType.INT64 if c.dtype(0) == ir.DataType.STRING else ir.DataType.STRING]


_LABELS = {
    "floats": ir.DataType.FLOAT,
    "int64s": ir.DataType.INT64,
    "strings": ir.DataType.STRING,
}
_BOOL, _FLOAT, _INT32, _INT64 = (
    ir.DataType.BOOL,
    ir.DataType.FLOAT,
    ir.DataType.INT32,
    ir.DataType.INT64,
)
_COMPARISONS = _words("And Equal Greater GreaterOrEqual IsInf IsNaN Less LessOrEqual Not Or Xor")
_COUNTS = _words("ArgMax ArgMin NonMaxSuppression NonZero Shape Size")

# What is not listed has the type of the first input.
TYPES: Mapping[str, Mapping[str, TypeRule]] = {
    "": {
        **dict.fromkeys(_COMPARISONS, _BOOL),
        **dict.fromkeys(_COUNTS, _INT64),
        **dict.fromkeys(("ConvInteger", "MatMulInteger"), _INT32),
        **dict.fromkeys(("QLinearConv", "QLinearMatMul"), 7),
        **dict.fromkeys(("RandomNormalLike", "RandomUniformLike", "Bernoulli", "EyeLike"), _like),
        **dict.fromkeys(("RandomNormal", "RandomUniform"), _attribute_type("dtype", _FLOAT)),
        **dict.fromkeys(
            ("BlackmanWindow", "HammingWindow", "HannWindow"),
            _attribute_type("output_datatype", _FLOAT),
        ),
        "BatchNormalization": (0, 3, 4, 3, 4),
        "Cast": _attribute_type("to", ir.DataType.UNDEFINED),
        "CastLike": 1,
        "ConstantOfShape": _filled,
        "DequantizeLinear": _dequantized,
        "Dropout": _dropped,
        "DynamicQuantizeLinear": (ir.DataType.UINT8, _FLOAT, ir.DataType.UINT8),
        "LayerNormalization": _layer_normalized,
        "MaxPool": (0, _INT64),
        "Multinomial": _attribute_type("dtype", _INT32),
        "OneHot": 2,
        "QuantizeLinear": _quantized,
        "TopK": (0, _INT64),
        "Unique": (0, _INT64, _INT64, _INT64),
        "Where": 1,
    },
    "com.microsoft": {
        "DequantizeLinear": 1,
        "EmbedLayerNormalization": (2, _INT32, 2),
        "DynamicQuantizeMatMul": _FLOAT,
        "MatMulIntegerToFloat": _FLOAT,
        "QLinearConcat": 1,
        "QuantizeLinear": 2,
        "SkipLayerNormalization": (0, _FLOAT, _FLOAT, 0),
        "SkipSimplifiedLayerNormalization": (0, _FLOAT, _FLOAT, 0),
    },
    "ai.onnx.ml": {
        **dict.fromkeys(
            ("LinearClassifier", "SVMClassifier", "TreeEnsembleClassifier"), _classified
        ),
        **dict.fromkeys(("LinearRegressor", "SVMRegressor", "TreeEnsembleRegressor"), _FLOAT),
        "CategoryMapper": _mapped,
        "LabelEncoder": _labelled,
        "Normalizer": _FLOAT,
        "Scaler": _FLOAT,
    },
}
