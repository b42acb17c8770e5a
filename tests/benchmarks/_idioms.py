"""Idioms that passes look for, as snippets of graphs, with the ways in which they nearly are one.

A snippet takes a `Sketch` and a value and returns a value of the same kind. What a snippet asks of
the sketch (a constant, an axis, the order of two operands) is now and then not what it asked for:
these are the near misses. Values are `rows` [n, s, 8] or `images` [n, 4, 6, 6].
"""

from __future__ import annotations

import importlib
import itertools
import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

onnx: Any = importlib.import_module("onnx")
TensorProto, helper, numpy_helper = onnx.TensorProto, onnx.helper, onnx.numpy_helper
Value = str
Snippet = Callable[["Sketch", Value], Value]

WIDTH, CHANNELS, SIDE = 8, 4, 6


class Sketch:
    """A graph in the making; `miss` is the chance that something is not as it should be."""

    def __init__(self, rng: random.Random, opset: int, dtype: Any, miss: float) -> None:
        self.rng, self.opset, self.dtype, self.miss = rng, opset, dtype, miss
        self.numbers = np.random.default_rng(rng.randrange(1 << 30))
        self.nodes: list[Any] = []
        self.initializers: list[Any] = []
        self.free: list[Any] = []
        """Constants that are graph inputs instead."""
        self.count = 0

    @property
    def missing(self) -> bool:
        """Whether something goes wrong here."""
        return self.rng.random() < self.miss

    def name(self) -> str:
        """A name that is not taken."""
        self.count += 1
        return f"v{self.count}"

    def op(self, op_type: str, *inputs: Value, n: int = 1, domain: str = "", **attrs: Any) -> Any:
        """A node; its output's name, or a list of them. Commutative operands come in any order."""
        operands = list(inputs)
        if op_type in ("Add", "Mul", "Max", "Min") and self.rng.random() < 0.3:
            operands.reverse()
        outputs = [self.name() for _ in range(n)]
        self.nodes.append(helper.make_node(op_type, operands, outputs, domain=domain, **attrs))
        return outputs[0] if n == 1 else outputs

    def const(self, array: Any, dtype: Any = None) -> Value:
        """A constant: an initializer or a Constant node."""
        array = np.asarray(array, dtype)
        name = self.name()
        tensor = numpy_helper.from_array(array, name)
        if self.rng.random() < 0.7:
            self.initializers.append(tensor)
        else:
            self.nodes.append(helper.make_node("Constant", [], [name], value=tensor))
        return name

    def scalar(self, value: float) -> Value:
        """A number in one of its shapes; a near miss is another number, shape, or no constant."""
        if self.missing:
            value = self.rng.choice([value * 1.01, -value, value + 1, 0.0, 1.0, 2.0])
        array = np.asarray(value, self.dtype).reshape(self.rng.choice([(), (1,), (1, 1)]))
        if self.missing:
            array = np.full((WIDTH if self.rng.random() < 0.5 else 1,), value, self.dtype)
        return self.const(array)

    def ints(self, *values: int) -> Value:
        """A vector of int64."""
        return self.const(np.asarray(values, np.int64))

    def weight(self, *shape: int, scale: float = 0.5) -> Value:
        """A random constant; a near miss is a graph input."""
        array = (self.numbers.standard_normal(shape) * scale).astype(self.dtype)
        if self.missing and self.rng.random() < 0.5:
            name = self.name()
            self.free.append((name, array))
            return name
        return self.const(array)

    def axes(self, op_type: str, x: Value, axes: Sequence[int], **attrs: Any) -> Value:
        """An operator with axes, as an attribute or an input; a near miss is another axis."""
        axes = [self.rng.choice([-1, 1, -2]) if self.missing else axis for axis in axes]
        since = 13 if op_type in ("ReduceSum", "Squeeze", "Unsqueeze") else 18
        if self.opset >= since:
            return self.op(op_type, x, self.ints(*axes), **attrs)
        return self.op(op_type, x, axes=list(axes), **attrs)

    def mean(self, x: Value) -> Value:
        """Over the last axis, kept."""
        return self.axes("ReduceMean", x, [-1], keepdims=1)


def _gelu(s: Sketch, x: Value) -> Value:
    erf = s.op("Erf", s.op("Div", x, s.scalar(2**0.5)))
    inner = s.op("Add", erf, s.scalar(1.0))
    if s.rng.random() < 0.5:
        return s.op("Mul", s.op("Mul", x, inner), s.scalar(0.5))
    return s.op("Mul", s.op("Mul", x, s.scalar(0.5)), inner)


def _tanh_gelu(s: Sketch, x: Value) -> Value:
    cube = (
        s.op("Mul", s.op("Mul", x, x), x) if s.rng.random() < 0.5 else s.op("Pow", x, s.scalar(3.0))
    )
    inner = s.op("Add", x, s.op("Mul", cube, s.scalar(0.044715)))
    tanh = s.op("Tanh", s.op("Mul", inner, s.scalar((2 / np.pi) ** 0.5)))
    return s.op("Mul", s.op("Mul", x, s.scalar(0.5)), s.op("Add", tanh, s.scalar(1.0)))


def _quick_gelu(s: Sketch, x: Value) -> Value:
    return s.op("Mul", x, s.op("Sigmoid", s.op("Mul", x, s.scalar(1.702))))


def _swish(s: Sketch, x: Value) -> Value:
    return s.op("Mul", x, s.op("Sigmoid", x))


def _mish(s: Sketch, x: Value) -> Value:
    soft = s.op("Log", s.op("Add", s.op("Exp", x), s.scalar(1.0)))
    return s.op("Mul", x, s.op("Tanh", soft if s.rng.random() < 0.5 else s.op("Softplus", x)))


def _hard_swish(s: Sketch, x: Value) -> Value:
    gate = s.op("Clip", s.op("Add", x, s.scalar(3.0)), s.const(0, s.dtype), s.const(6, s.dtype))
    if s.rng.random() < 0.5:
        return s.op("Mul", x, s.op("Div", gate, s.scalar(6.0)))
    return s.op("Div", s.op("Mul", x, gate), s.scalar(6.0))


def _leaky(s: Sketch, x: Value) -> Value:
    if s.rng.random() < 0.5:
        return s.op("Max", x, s.op("Mul", x, s.scalar(0.1)))
    negative = s.op("Mul", s.op("Sub", x, s.op("Abs", x)), s.scalar(0.05))
    return s.op("Add", s.op("Relu", x), negative)


def _softmax(s: Sketch, x: Value) -> Value:
    if s.rng.random() < 0.5:
        x = s.op("Sub", x, s.axes("ReduceMax", x, [-1], keepdims=1))
    e = s.op("Exp", x)
    soft = s.op("Div", e, s.axes("ReduceSum", e, [-1], keepdims=1))
    return s.op("Log", soft) if s.rng.random() < 0.2 else soft


def _layer_norm(s: Sketch, x: Value) -> Value:
    d = s.op("Sub", x, s.mean(x))
    d2 = s.op("Sub", x, s.mean(x)) if s.rng.random() < 0.2 else d
    square = s.op("Pow", d2, s.scalar(2.0)) if s.rng.random() < 0.6 else s.op("Mul", d2, d2)
    root = s.op("Sqrt", s.op("Add", s.mean(square), s.scalar(1e-5)))
    normal = s.op("Div", d, root)
    return s.op("Add", s.op("Mul", normal, s.weight(WIDTH)), s.weight(WIDTH))


def _rms_norm(s: Sketch, x: Value) -> Value:
    root = s.op("Sqrt", s.op("Add", s.mean(s.op("Mul", x, x)), s.scalar(1e-6)))
    if s.rng.random() < 0.5:
        return s.op("Mul", s.op("Mul", x, s.op("Reciprocal", root)), s.weight(WIDTH))
    return s.op("Mul", s.op("Div", x, root), s.weight(WIDTH))


def _lp_norm(s: Sketch, x: Value) -> Value:
    norm = s.axes("ReduceL2", x, [-1], keepdims=1)
    return s.op("Div", x, s.op("Max", norm, s.scalar(1e-12)))


def _linear(s: Sketch, x: Value) -> Value:
    y = s.op("MatMul", x, s.weight(WIDTH, WIDTH))
    for _ in range(s.rng.randrange(3)):
        y = s.op(
            s.rng.choice(["Add", "Mul", "Sub"]), y, s.rng.choice([s.weight(WIDTH), s.scalar(2.0)])
        )
    return y


def _gemm(s: Sketch, x: Value) -> Value:
    flat = s.op("Reshape", x, s.ints(-1, WIDTH))
    for _ in range(s.rng.randrange(1, 3)):
        trans = s.rng.randrange(2)
        inputs = [flat, s.weight(WIDTH, WIDTH)] + (
            [s.weight(WIDTH)] if s.rng.random() < 0.7 else []
        )
        flat = s.op("Gemm", *inputs, transB=trans, alpha=1.0 if not s.missing else 0.5)
    return s.op("Reshape", flat, s.op("Shape", x))


def _branches(s: Sketch, x: Value) -> Value:
    """Matrix products on one input, as queries, keys and values are."""
    parts = [s.op("MatMul", x, s.weight(WIDTH, WIDTH)) for _ in range(3)]
    if s.rng.random() < 0.5:
        parts = [s.op("Add", part, s.weight(WIDTH)) for part in parts]
    return s.op("Add", s.op("Mul", parts[0], parts[1]), parts[2])


def _heads(s: Sketch, x: Value, parts: int = 2) -> Value:
    split = s.op("Reshape", x, s.ints(0, 0, parts, WIDTH // parts))
    return s.op("Transpose", split, perm=[0, 2, 1, 3] if not s.missing else [0, 1, 2, 3])


def _attention(s: Sketch, x: Value) -> Value:
    q, k, v = (_heads(s, s.op("MatMul", x, s.weight(WIDTH, WIDTH))) for _ in range(3))
    scores = s.op("MatMul", q, s.op("Transpose", k, perm=[0, 1, 3, 2]))
    scores = (
        s.op("Div", scores, s.scalar(2.0))
        if s.rng.random() < 0.5
        else s.op("Mul", scores, s.scalar(0.5))
    )
    mixed = s.op("MatMul", s.op("Softmax", scores, axis=-1 if s.opset >= 13 else 3), v)
    back = s.op("Transpose", mixed, perm=[0, 2, 1, 3])
    return s.op("Reshape", back, s.ints(0, 0, WIDTH))


def _rotary(s: Sketch, x: Value) -> Value:
    low = s.op("Slice", x, s.ints(0), s.ints(WIDTH // 2), s.ints(-1))
    high = s.op("Slice", x, s.ints(WIDTH // 2), s.ints(2**63 - 1), s.ints(2))
    turned = s.op("Concat", s.op("Neg", high), low, axis=-1)
    angle = s.weight(1, 1, WIDTH)
    return s.op("Add", s.op("Mul", x, s.op("Cos", angle)), s.op("Mul", turned, s.op("Sin", angle)))


def _glu(s: Sketch, x: Value) -> Value:
    gate = s.op("MatMul", x, s.weight(WIDTH, WIDTH))
    return s.op("Mul", _swish(s, gate), s.op("MatMul", x, s.weight(WIDTH, WIDTH)))


def _einsum(s: Sketch, x: Value) -> Value:
    text = s.rng.choice(["bsd,de->bse", "bsd,ed->bse"])
    if s.opset < 12:
        return s.op("MatMul", x, s.weight(WIDTH, WIDTH))
    return s.op("Einsum", x, s.weight(WIDTH, WIDTH), equation=text)


def _no_op(s: Sketch, x: Value) -> Value:
    kind = s.rng.randrange(9)
    if kind == 0:
        return s.op(s.rng.choice(["Add", "Sub"]), x, s.scalar(0.0))
    if kind == 1:
        return s.op(s.rng.choice(["Mul", "Div", "Pow"]), x, s.scalar(1.0))
    if kind == 2:
        return s.op("Neg", s.op("Neg" if not s.missing else "Abs", x))
    if kind == 3:
        return s.op("Relu", s.op("Relu", x))
    if kind == 4:
        return s.op("Dropout", x)
    if kind == 5:
        return s.op("Slice", x, s.ints(0), s.ints(2**62), s.ints(1))
    if kind == 6:
        return s.op("Add", x, s.op("Mul", s.op("Sub", x, x), s.scalar(3.0)))
    if kind == 7:
        wide = TensorProto.DOUBLE if not s.missing else TensorProto.INT32
        own = helper.np_dtype_to_tensor_dtype(np.dtype(s.dtype))
        return s.op("Cast", s.op("Cast", x, to=wide), to=own)
    return s.op("Identity", x)


def _algebra(s: Sketch, x: Value) -> Value:
    kind = s.rng.randrange(6)
    if kind == 0:
        return s.op("Add", s.op("Add", x, s.scalar(1.5)), s.scalar(2.0))
    if kind == 1:
        return s.op("Mul", s.op("Div", x, s.scalar(3.0)), s.scalar(0.7))
    if kind == 2:
        return s.op("Reciprocal", s.op("Sqrt", s.op("Add", s.op("Abs", x), s.scalar(1.0))))
    if kind == 3:
        low, high = s.const(-1, s.dtype), s.const(1 if not s.missing else -2, s.dtype)
        return s.op("Clip", s.op("Min", s.op("Max", x, low), high), low, s.const(0.5, s.dtype))
    if kind == 4:
        return s.op("Log", s.op("Exp", x))
    return s.op("Sqrt", s.op("Pow", x, s.scalar(2.0)))


def _views(s: Sketch, x: Value) -> Value:
    kind = s.rng.randrange(5)
    if kind == 0:
        y = s.op("Reshape", s.op("Reshape", x, s.ints(0, -1)), s.ints(-1, WIDTH))
        return s.op("Reshape", y, s.op("Shape", x))
    if kind == 1:
        return s.axes("Squeeze", s.axes("Unsqueeze", x, [1]), [1])
    if kind == 2:
        shape = s.op("Shape", x)
        first = s.op("Gather", shape, s.const(np.asarray(0, np.int64)))
        vector = (
            s.axes("Unsqueeze", first, [0]) if not s.missing else s.op("Reshape", first, s.ints(1))
        )
        return s.op("Reshape", x, s.op("Concat", vector, s.ints(-1), s.ints(WIDTH), axis=0))
    if kind == 3:
        y = s.op("Transpose", x, perm=[0, 2, 1])
        y = s.op(s.rng.choice(["Relu", "Tanh", "Exp"]), y)
        return s.op("Transpose", y, perm=[0, 2, 1])
    return s.op("Expand", x, s.op("Shape", x))


def _pieces(s: Sketch, x: Value) -> Value:
    kind = s.rng.randrange(5)
    if kind == 0:
        bounds = [0, 3, WIDTH] if not s.missing else [0, 4, WIDTH]
        pairs = itertools.pairwise(bounds)
        parts = [s.op("Slice", x, s.ints(a), s.ints(b), s.ints(2)) for a, b in pairs]
        return s.op("Concat", *parts, axis=2)
    if kind == 1:
        numbers: dict[str, Any] = {"num_outputs": 2} if s.opset >= 18 else {}
        a, b = s.op("Split", x, n=2, axis=2, **numbers)
        return s.op("Concat", *((a, b) if not s.missing else (b, a)), axis=2)
    if kind == 2:
        rows = [s.op("Gather", x, s.const(np.asarray(k, np.int64)), axis=2) for k in range(WIDTH)]
        last = s.ints(-1)
        rows = [
            s.op("Unsqueeze", r, last) if s.opset >= 13 else s.axes("Unsqueeze", r, [2])
            for r in rows
        ]
        return s.op("Concat", *rows, axis=2)
    if kind == 3:
        inner = s.op("Concat", x, x, axis=2 if not s.missing else 1)
        whole = s.op("Concat", inner, s.op("Neg", x), axis=2) if not s.missing else inner
        return s.op("Slice", whole, s.ints(0), s.ints(WIDTH), s.ints(2))
    y = s.op("Slice", x, s.ints(1), s.ints(7), s.ints(2))
    y = s.op("Slice", y, s.ints(0), s.ints(-1), s.ints(2))
    return s.op("Concat", y, s.op("Slice", x, s.ints(0), s.ints(3), s.ints(2)), axis=2)


def _quantized(s: Sketch, x: Value) -> Value:
    if s.dtype != np.float32:
        return s.op("Relu", x)
    kind = np.uint8 if s.rng.random() < 0.5 else np.int8
    scale, zero = s.const(0.05, np.float32), s.const(3, kind)
    q = s.op("DequantizeLinear", s.op("QuantizeLinear", x, scale, zero), scale, zero)
    move = s.rng.randrange(4)
    if move == 0:
        q = s.op("Transpose", s.op("Transpose", q, perm=[1, 0, 2]), perm=[1, 0, 2])
    elif move == 1:
        q = s.op("Concat", q, s.op("Relu", q), axis=2)
        q = s.op("Slice", q, s.ints(0), s.ints(WIDTH), s.ints(2))
    other = s.const(0.05 if not s.missing else 0.04, np.float32)
    return s.op("DequantizeLinear", s.op("QuantizeLinear", q, other, zero), other, zero)


def _reduce(s: Sketch, x: Value) -> Value:
    op_type = s.rng.choice(["ReduceMean", "ReduceMax", "ReduceSum"])
    y = s.axes(op_type, s.op("Transpose", x, perm=[0, 2, 1]), [1], keepdims=1)
    return s.op("Add", x, s.op("Transpose", y, perm=[0, 2, 1]))


def _table(s: Sketch, x: Value) -> Value:
    """A condition, a mask and a fill."""
    mask = s.op("Greater", x, s.scalar(0.0))
    if s.rng.random() < 0.5:
        mask = s.op("Not", s.op("Not", mask) if not s.missing else mask)
    return s.op("Where", mask, x, s.scalar(-1.0) if s.rng.random() < 0.5 else s.op("Neg", x))


ROWS: tuple[Snippet, ...] = (
    *(_gelu, _tanh_gelu, _quick_gelu, _swish, _mish, _hard_swish, _leaky, _softmax, _layer_norm),
    *(_rms_norm, _lp_norm, _linear, _gemm, _branches, _attention, _rotary, _glu, _einsum, _no_op),
    *(_algebra, _views, _pieces, _quantized, _reduce, _table),
)


def _conv(s: Sketch, x: Value, side: int = 3, group: int = 1) -> Value:
    weight = s.weight(CHANNELS, CHANNELS // group, side, side, scale=0.3)
    bias = [s.weight(CHANNELS)] if s.rng.random() < 0.5 else []
    pad = side // 2
    return s.op("Conv", x, weight, *bias, pads=[pad] * 4, group=group)


def _norm(s: Sketch, x: Value) -> Value:
    variance = s.const(np.abs(s.numbers.standard_normal(CHANNELS)) + 0.5, s.dtype)
    return s.op("BatchNormalization", x, *(s.weight(CHANNELS) for _ in range(3)), variance)


def _conv_norm(s: Sketch, x: Value) -> Value:
    first = s.rng.random() < 0.3
    y = _norm(s, x) if first else _conv(s, x, s.rng.choice([1, 3]))
    y = _conv(s, y, s.rng.choice([1, 3])) if first else _norm(s, y)
    return s.op("Relu", y) if s.rng.random() < 0.5 else y


def _conv_affine(s: Sketch, x: Value) -> Value:
    y = _conv(s, x)
    for _ in range(s.rng.randrange(1, 3)):
        shape = s.rng.choice([(CHANNELS, 1, 1), (1, CHANNELS, 1, 1), (1,), ()])
        if s.missing:
            shape = (SIDE,)
        y = s.op(s.rng.choice(["Add", "Mul", "Sub", "Div"]), y, s.weight(*shape))
    return y


def _pad_conv(s: Sketch, x: Value) -> Value:
    pads = s.ints(0, 0, 1, 1, 0, 0, 1, 1) if not s.missing else s.ints(0, 0, 0, 1, 0, 0, 2, 1)
    value = [s.const(0.0 if not s.missing else 1.0, s.dtype)] if s.rng.random() < 0.6 else []
    y = s.op("Pad", x, pads, *value)
    return s.op("Conv", y, s.weight(CHANNELS, CHANNELS, 3, 3, scale=0.3))


def _parallel(s: Sketch, x: Value) -> Value:
    """A re-parameterised block: 3x3, 1x1 and identity."""
    parts = [_conv(s, x, 3), _conv(s, x, 1)]
    parts = [_norm(s, part) for part in parts] if s.rng.random() < 0.5 else parts
    y = s.op("Add", *parts)
    return s.op("Add", y, x) if s.rng.random() < 0.5 else y


def _shuffle(s: Sketch, x: Value) -> Value:
    y = s.op("Reshape", x, s.ints(0, 2, CHANNELS // 2, SIDE, SIDE))
    y = s.op("Transpose", y, perm=[0, 2, 1, 3, 4] if not s.missing else [0, 1, 2, 4, 3])
    return s.op("Reshape", y, s.ints(0, CHANNELS, SIDE, SIDE))


def _space_depth(s: Sketch, x: Value) -> Value:
    y = s.op("Reshape", x, s.ints(0, CHANNELS, SIDE // 2, 2, SIDE // 2, 2))
    y = s.op("Transpose", y, perm=[0, 3, 5, 1, 2, 4])
    y = s.op("Reshape", y, s.ints(0, 4 * CHANNELS, SIDE // 2, SIDE // 2))
    return s.op("DepthToSpace", y, blocksize=2, mode="DCR" if not s.missing else "CRD")


def _layout(s: Sketch, x: Value) -> Value:
    y = s.op("Transpose", x, perm=[0, 2, 3, 1])
    y = s.op(s.rng.choice(["Add", "Mul"]), y, s.weight(CHANNELS))
    y = s.op(s.rng.choice(["Relu", "Sigmoid"]), y)
    return s.op("Transpose", y, perm=[0, 3, 1, 2] if not s.missing else [0, 3, 2, 1])


def _squeeze_excite(s: Sketch, x: Value) -> Value:
    pool = (
        s.axes("ReduceMean", x, [2, 3], keepdims=1) if s.missing else s.op("GlobalAveragePool", x)
    )
    gate = s.op("Sigmoid", _conv(s, pool, 1))
    return s.op("Mul", x, gate)


def _pool(s: Sketch, x: Value) -> Value:
    op_type = s.rng.choice(["MaxPool", "AveragePool"])
    value = [s.const(0.0, s.dtype)] if s.rng.random() < 0.5 else []
    y = s.op("Pad", x, s.ints(0, 0, 1, 1, 0, 0, 1, 1), *value) if s.rng.random() < 0.5 else None
    extra: dict[str, Any] = {"pads": [1, 1, 1, 1]} if y is None else {}
    if op_type == "AveragePool" and s.rng.random() < 0.5:
        extra["count_include_pad"] = 1
    return s.op(op_type, y or x, kernel_shape=[3, 3], **extra)


def _instance_norm(s: Sketch, x: Value) -> Value:
    d = s.op("Sub", x, s.axes("ReduceMean", x, [2, 3], keepdims=1))
    variance = s.axes("ReduceMean", s.op("Mul", d, d), [2, 3], keepdims=1)
    y = s.op("Div", d, s.op("Sqrt", s.op("Add", variance, s.scalar(1e-5))))
    return s.op("Add", s.op("Mul", y, s.weight(CHANNELS, 1, 1)), s.weight(CHANNELS, 1, 1))


def _residual(s: Sketch, x: Value) -> Value:
    return s.op("Relu", s.op("Add", _conv_norm(s, x), x))


IMAGES: tuple[Snippet, ...] = (
    *(_conv_norm, _conv_affine, _pad_conv, _parallel, _shuffle, _space_depth, _layout, _pool),
    *(_squeeze_excite, _instance_norm, _residual, _swish, _hard_swish, _leaky, _gelu),
)
