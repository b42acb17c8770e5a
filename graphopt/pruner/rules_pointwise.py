"""Rules of operators that work element by element, reduce, pool, or quantize."""

from __future__ import annotations

from collections.abc import Sequence

from graphopt import ir
from graphopt.pruner.atoms import fixed
from graphopt.pruner.rules_linear import optional
from graphopt.pruner.tracing import Axes, Rule, Trace, Unknown

__all__ = ["POINTWISE", "integers"]

_ZERO_KEEPING = (
    *("Abs", "Asin", "Asinh", "Atan", "Atanh", "Cast", "Ceil", "Celu", "Clip", "Dropout", "Elu"),
    *("Erf", "Floor", "Gelu", "HardSwish", "Identity", "LeakyRelu", "Mish", "Neg", "Relu"),
    *("Round", "Selu", "Shrink", "Sign", "Sin", "Sinh", "Softsign", "Sqrt", "Swish", "Tan"),
    *("Tanh", "ThresholdedRelu", "CastLike"),
)
_OTHER_UNARY = (
    *("Acos", "Acosh", "Cos", "Cosh", "Exp", "HardSigmoid", "IsInf", "IsNaN", "Log", "Not"),
    *("Reciprocal", "Sigmoid", "Softplus", "BitwiseNot", "Affine"),
)
_NARY = (
    *("Add", "And", "BitShift", "BitwiseAnd", "BitwiseOr", "BitwiseXor", "Div", "Equal"),
    *("Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Max", "Mean", "Min", "Mod", "Mul"),
    *("Or", "PRelu", "Pow", "Sub", "Sum", "Where", "Xor"),
)
_ALL_ZERO = frozenset(("Add", "Max", "Mean", "Min", "Sub", "Sum", "BiasGelu", "FastGelu"))
_ANY_ZERO = frozenset(("And", "Mul"))
_FIRST_ZERO = frozenset(("Div", "Mod", "PRelu", "Pow"))


def integers(trace: Trace, node: ir.Node, name: str, index: int | None) -> list[int] | None:
    """A list of numbers given as an attribute or, in later opsets, as an input; None if neither.

    Raises Unknown for an input that is not known.
    """
    attr = node.attributes.get(name)
    if attr is not None and not attr.is_ref():
        return [attr.as_int()] if attr.type == ir.AttributeType.INT else list(attr.as_ints())
    value = None if index is None else optional(node, index)
    if value is None:
        return None
    known = trace.shapes.values(value)
    array = ir.array(value) if known is None else known
    if array is None or not all(isinstance(item, int) for item in array.ravel().tolist()):
        raise Unknown(f"{name} are not constant")
    return [int(item) for item in array.ravel().tolist()]


def _unary(trace: Trace, node: ir.Node) -> Sequence[Axes]:
    source = node.inputs[0]
    if node.op_type in _ZERO_KEEPING and source in trace.vanishing:
        trace.vanishing.add(node.outputs[0])
    axes = trace.of(source)
    return [list(axes) for _ in node.outputs]


def _nary(trace: Trace, node: ir.Node) -> Sequence[Axes]:
    operands = [value for value in node.inputs if value is not None]
    for value in operands:
        trace.rank(value)
    found = trace.broadcast([trace.of(value) for value in operands], node)
    axis = max(found, key=lambda a: len(a) if trace.atoms.live(a) else 0, default=fixed(1))
    op = node.op_type
    zeros = [trace.vanishes(value, axis) for value in operands]
    if (
        (op in _ALL_ZERO and all(zeros))
        or (op in _ANY_ZERO and any(zeros))
        or (op in _FIRST_ZERO and zeros[0])
        or (op == "Where" and all(zeros[1:]))
    ):
        trace.vanishing.add(node.outputs[0])
    return [found]


def _reduce(trace: Trace, node: ir.Node) -> Sequence[Axes]:
    """Means and sums over prunable axes change their value; extremes freeze them."""
    x = trace.of(node.inputs[0])
    rank = trace.rank(node.inputs[0])
    axes = integers(trace, node, "axes", 1)
    if not axes:
        axes = [] if ir.attribute(node, "noop_with_empty_axes", 0) else list(range(rank))
    reduced = {axis % rank for axis in axes}
    keep = bool(ir.attribute(node, "keepdims", 1))
    additive = node.op_type not in ("ReduceMax", "ReduceMin", "ReduceProd", "ReduceLogSumExp")
    mean = node.op_type in ("ReduceMean", "ReduceLogSum")
    for axis in reduced:
        if not additive:
            trace.atoms.freeze(x[axis], f"reduced by {ir.label(node)}")
        elif mean or not trace.vanishes(node.inputs[0], x[axis]):
            trace.atoms.doubt(x[axis])
    if node.inputs[0] in trace.vanishing and node.op_type != "ReduceLogSum":
        trace.vanishing.add(node.outputs[0])
    return [[fixed(1) if i in reduced else a for i, a in enumerate(x) if keep or i not in reduced]]


def _softmax(trace: Trace, node: ir.Node) -> Sequence[Axes]:
    """Mixes one axis; before opset 13 that one and all behind it."""
    x = trace.of(node.inputs[0])
    rank = trace.rank(node.inputs[0])
    old = ir.opset(trace.model.graph) < 13 and node.op_type != "LpNormalization"
    start = int(str(ir.attribute(node, "axis", 1 if old else -1))) % rank
    for axis in x[start : rank if old else start + 1]:
        trace.atoms.freeze(axis, f"mixed by {ir.label(node)}")
    return [list(x)]


def _cumulate(trace: Trace, node: ir.Node) -> Sequence[Axes]:
    x = trace.of(node.inputs[0])
    known = integers(trace, node, "axis", 1) or [0]
    trace.atoms.freeze(x[known[0]], f"mixed by {ir.label(node)}")
    return [list(x)]


def _best(trace: Trace, node: ir.Node) -> Sequence[Axes]:
    """TopK, ArgMax, ArgMin: positions along an axis are results."""
    x = trace.of(node.inputs[0])
    rank = trace.rank(node.inputs[0])
    axis = int(str(ir.attribute(node, "axis", -1 if node.op_type == "TopK" else 0))) % rank
    trace.atoms.freeze(x[axis], f"positions are results of {ir.label(node)}")
    keep = node.op_type == "TopK" or bool(ir.attribute(node, "keepdims", 1))
    free = trace.fixed(node.outputs[0]) or [fixed(0)] * rank
    made = [free[i] if i == axis else a for i, a in enumerate(x) if keep or i != axis]
    return [list(made) for _ in node.outputs]


def _lrn(trace: Trace, node: ir.Node) -> Sequence[Axes]:
    x = trace.of(node.inputs[0])
    trace.atoms.freeze(x[1], f"mixed by {ir.label(node)}")
    return [list(x)]


def _pool(trace: Trace, node: ir.Node) -> Sequence[Axes]:
    x = trace.of(node.inputs[0])
    if node.inputs[0] in trace.vanishing:
        trace.vanishing.update(node.outputs)
    for axis in x[2:]:
        trace.atoms.freeze(axis, f"a spatial axis of {ir.label(node)}")
    return [
        [x[0], x[1], *(trace.fixed(value) or [fixed(0)] * len(x))[2:]] for value in node.outputs
    ]


def _quantize(trace: Trace, node: ir.Node) -> Sequence[Axes]:
    """QuantizeLinear, DequantizeLinear: scale and zero point per tensor, per axis, or in blocks."""
    x = trace.of(node.inputs[0])
    rank = len(x)
    axis = int(str(ir.attribute(node, "axis", 1)))
    for value in node.inputs[1:3]:
        own = [] if value is None else trace.of(value)
        if not own or all(len(a) == 1 for a in own):
            continue
        if ir.attribute(node, "block_size", 0) or len(own) != 1:
            raise Unknown("blocks of one scale each")
        trace.unite(own[0], x[axis % rank], node)
    if node.inputs[0] in trace.vanishing or ir.constant(node.inputs[0]) is not None:
        trace.vanishing.add(node.outputs[0])
    return [list(x) for _ in node.outputs]


def _shape(trace: Trace, node: ir.Node) -> Sequence[Axes]:
    """Sizes of what it is given: they are right after pruning, too."""
    return []


POINTWISE: dict[tuple[str, str], Rule] = {
    **{("", op): _unary for op in (*_ZERO_KEEPING, *_OTHER_UNARY)},
    **{("", op): _nary for op in _NARY},
    **{
        ("", f"Reduce{op}"): _reduce
        for op in (
            *("L1", "L2", "LogSum", "LogSumExp", "Max", "Mean", "Min", "Prod", "Sum"),
            "SumSquare",
        )
    },
    **{("", op): _softmax for op in ("Softmax", "LogSoftmax", "Hardmax", "LpNormalization")},
    **{("", op): _best for op in ("ArgMax", "ArgMin", "TopK")},
    ("", "CumSum"): _cumulate,
    **{
        ("", op): _pool
        for op in (
            *("AveragePool", "GlobalAveragePool", "GlobalLpPool", "GlobalMaxPool", "LpPool"),
            "MaxPool",
        )
    },
    ("", "LRN"): _lrn,
    ("", "DequantizeLinear"): _quantize,
    ("", "QuantizeLinear"): _quantize,
    ("", "Shape"): _shape,
    ("", "Size"): _shape,
    ("", "ConstantOfShape"): _shape,
    ("", "Constant"): _shape,
    ("", "Range"): _shape,
    ("", "RandomNormalLike"): _unary,
    **{("com.microsoft", op): _nary for op in ("BiasGelu", "FastGelu")},
    **{("com.microsoft", op): _unary for op in ("Gelu", "QuickGelu")},
    ("com.microsoft", "DequantizeLinear"): _quantize,
    ("com.microsoft", "QuantizeLinear"): _quantize,
}
