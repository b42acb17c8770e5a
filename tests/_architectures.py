"""Small networks of many architectures, with random weights, built the way exporters write them."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import numpy as np

onnx: Any = importlib.import_module("onnx")
helper: Any = importlib.import_module("onnx.helper")


class Net:
    """Nodes and initializers of a network that is being built; a value is its name."""

    def __init__(self, seed: int = 0) -> None:
        self.rng = np.random.default_rng(seed)
        self.nodes: list[Any] = []
        self.weights: list[Any] = []

    def op(self, kind: str, *inputs: str, outputs: int = 1, **attributes: Any) -> Any:
        """The output, or outputs, of a new node."""
        names = [f"v{len(self.nodes)}_{i}" for i in range(outputs)]
        self.nodes.append(helper.make_node(kind, inputs, names, **attributes))
        return names[0] if outputs == 1 else names

    def const(self, array: Any, dtype: Any = np.float32) -> str:
        """The name of a new initializer."""
        name = f"w{len(self.weights)}"
        self.weights.append(onnx.numpy_helper.from_array(np.asarray(array, dtype), name))
        return name

    def ints(self, *numbers: int) -> str:
        """A list of int64."""
        return self.const(numbers, np.int64)

    def rand(self, *shape: int, scale: float = 0.0) -> str:
        """Normal values, scaled by the number of inputs unless told otherwise."""
        fan = np.prod(shape[1:]) if len(shape) > 1 else 4
        return self.const(self.rng.standard_normal(shape) * (scale or fan**-0.5))

    def conv(
        self, x: str, inner: int, outer: int, kernel: int = 1, step: int = 1, group: int = 1
    ) -> str:
        """Convolution, BatchNormalization, not yet an activation."""
        w = self.rand(outer, inner // group, kernel, kernel)
        pad = [kernel // 2] * 4
        y = self.op(
            "Conv", x, w, strides=[step] * 2, pads=pad, group=group, kernel_shape=[kernel] * 2
        )
        uniform = [self.const(self.rng.uniform(0.5, 1.5, outer)) for _ in range(2)]
        rest = [self.rand(outer, scale=0.2) for _ in range(2)]
        return self.op("BatchNormalization", y, uniform[0], rest[0], rest[1], uniform[1])

    def unit(self, *args: int | str, **kwargs: int) -> str:
        """`conv` and Relu."""
        return self.op("Relu", self.conv(*args, **kwargs))  # type: ignore[arg-type]

    def linear(self, x: str, inner: int, outer: int) -> str:
        """A product by a matrix and a bias."""
        y = self.op("MatMul", x, self.const(self.rng.standard_normal((inner, outer)) * inner**-0.5))
        return self.op("Add", y, self.rand(outer))

    def norm(self, x: str, width: int) -> str:
        """LayerNormalization."""
        scale = self.const(self.rng.uniform(0.5, 1.5, width))
        return self.op("LayerNormalization", x, scale, self.rand(width), axis=-1)

    def head(self, x: str, width: int, classes: int = 10) -> str:
        """Average pool and classifier."""
        y = self.op("Flatten", self.op("GlobalAveragePool", x))
        return self.op("Gemm", y, self.rand(classes, width), self.rand(classes), transB=1)

    def model(self, outputs: list[str] | str, *shape: int) -> Any:
        """The ModelProto of opset 20."""
        names = [outputs] if isinstance(outputs, str) else outputs
        kind = onnx.TensorProto.FLOAT
        graph = helper.make_graph(
            self.nodes,
            "net",
            [helper.make_tensor_value_info("x", kind, shape)],
            [helper.make_tensor_value_info(name, kind, None) for name in names],
            self.weights,
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
        return onnx.shape_inference.infer_shapes(model)


def resnet() -> Any:
    """Bottlenecks, one of them grouped, with squeeze and excitation."""
    net = Net()
    x = net.unit("x", 3, 32, 3)
    for inner, outer, step in ((32, 64, 1), (64, 64, 1), (64, 128, 2)):
        y = net.unit(x, inner, 32)
        y = net.unit(y, 32, 32, 3, step, group=4)
        y = net.conv(y, 32, outer)
        gate = net.op("GlobalAveragePool", y)
        gate = net.op("Relu", net.op("Conv", gate, net.rand(16, outer, 1, 1), net.rand(16)))
        gate = net.op("Conv", gate, net.rand(outer, 16, 1, 1), net.rand(outer))
        y = net.op("Mul", y, net.op("Sigmoid", gate))
        x = x if inner == outer else net.conv(x, inner, outer, 1, step)
        x = net.op("Relu", net.op("Add", x, y))
    return net.model(net.head(x, 128), 1, 3, 16, 16)


def densenet() -> Any:
    """Each layer reads all earlier ones."""
    net = Net()
    x, width = net.unit("x", 3, 32, 3), 32
    for _ in range(6):
        y = net.unit(net.unit(x, width, 64), 64, 16, 3)
        x, width = net.op("Concat", x, y, axis=1), width + 16
    return net.model(net.head(net.unit(x, width, 64), 64), 1, 3, 12, 12)


def shufflenet() -> Any:
    """Channels split, and shuffled by Reshape, Transpose, Reshape."""
    net = Net()
    x = net.unit("x", 3, 48, 3)
    for _ in range(4):
        a, b = net.op("Split", x, net.ints(24, 24), outputs=2, axis=1)
        b = net.unit(b, 24, 24)
        b = net.unit(net.conv(b, 24, 24, 3, 1, group=24), 24, 24)
        x = net.op("Concat", a, b, axis=1)
        y = net.op("Reshape", x, net.ints(1, 2, 24, 12, 12))
        y = net.op("Transpose", y, perm=[0, 2, 1, 3, 4])
        x = net.op("Reshape", y, net.ints(1, 48, 12, 12))
    return net.model(net.head(net.unit(x, 48, 128), 128), 1, 3, 12, 12)


def _attend(net: Net, x: str, tokens: int, width: int, heads: int, lead: int) -> str:
    """Self-attention over [lead, tokens, width] with packed queries, keys and values."""
    size = width // heads
    qkv = net.linear(x, width, 3 * width)
    qkv = net.op("Reshape", qkv, net.ints(lead, tokens, 3, heads, size))
    qkv = net.op("Transpose", qkv, perm=[2, 0, 3, 1, 4])
    q, k, v = (net.op("Gather", qkv, net.const(i, np.int64), axis=0) for i in range(3))
    q = net.op("Mul", q, net.const(size**-0.5))
    scores = net.op("MatMul", q, net.op("Transpose", k, perm=[0, 1, 3, 2]))
    scores = net.op("Add", scores, net.rand(1, heads, tokens, tokens, scale=0.1))
    y = net.op("MatMul", net.op("Softmax", scores, axis=-1), v)
    y = net.op("Reshape", net.op("Transpose", y, perm=[0, 2, 1, 3]), net.ints(lead, tokens, width))
    return net.linear(y, width, width)


def _feed(net: Net, x: str, width: int) -> str:
    return net.linear(net.op("Gelu", net.linear(x, width, 4 * width)), 4 * width, width)


def vit(width: int = 64) -> Any:
    """Patches, a class token, pre-norm blocks."""
    net, tokens = Net(), 17
    x = net.op("Conv", "x", net.rand(width, 3, 4, 4), net.rand(width), strides=[4, 4])
    x = net.op("Transpose", net.op("Reshape", x, net.ints(1, width, 16)), perm=[0, 2, 1])
    x = net.op("Concat", net.rand(1, 1, width), x, axis=1)
    x = net.op("Add", x, net.rand(1, tokens, width, scale=0.1))
    for _ in range(2):
        x = net.op("Add", x, _attend(net, net.norm(x, width), tokens, width, 8, 1))
        x = net.op("Add", x, _feed(net, net.norm(x, width), width))
    x = net.op("Gather", net.norm(x, width), net.const(0, np.int64), axis=1)
    return net.model(net.linear(x, width, 10), 1, 3, 16, 16)


def swin() -> Any:
    """Windows shifted by Slice and Concat, and patches merged."""
    net, width, side = Net(), 32, 8
    x = net.op("Conv", "x", net.rand(width, 3, 4, 4), net.rand(width), strides=[4, 4])
    x = net.op("Transpose", x, perm=[0, 2, 3, 1])
    for shift in (0, 2):
        y = net.norm(x, width)
        if shift:
            ends = net.ints(shift), net.ints(99), net.ints(1)
            tail, front = (
                net.op("Slice", y, ends[0], ends[1], ends[2]),
                net.op("Slice", y, net.ints(0), ends[0], ends[2]),
            )
            y = net.op("Concat", tail, front, axis=1)
        y = net.op("Reshape", y, net.ints(1, 2, 4, 2, 4, width))
        y = net.op("Transpose", y, perm=[0, 1, 3, 2, 4, 5])
        y = _attend(net, net.op("Reshape", y, net.ints(4, 16, width)), 16, width, 4, 4)
        y = net.op("Reshape", y, net.ints(1, 2, 2, 4, 4, width))
        y = net.op("Transpose", y, perm=[0, 1, 3, 2, 4, 5])
        x = net.op("Add", x, net.op("Reshape", y, net.ints(1, side, side, width)))
        x = net.op("Add", x, _feed(net, net.norm(x, width), width))
    parts = [
        net.op("Slice", x, net.ints(i, j), net.ints(99, 99), net.ints(1, 2), net.ints(2, 2))
        for i in (0, 1)
        for j in (0, 1)
    ]
    x = net.norm(net.op("Concat", *parts, axis=3), 4 * width)
    x = net.op("MatMul", x, net.const(net.rng.standard_normal((4 * width, 2 * width)) / 8))
    x = net.op("ReduceMean", x, net.ints(1, 2), keepdims=0)
    return net.model(net.linear(x, 2 * width, 10), 1, 3, 32, 32)


def convnext() -> Any:
    """Depthwise convolutions, LayerNormalization on the last axis, layer scale."""
    net, width = Net(), 48
    x = net.op("Conv", "x", net.rand(width, 3, 2, 2), net.rand(width), strides=[2, 2])
    for _ in range(3):
        w = net.rand(width, 1, 5, 5)
        y = net.op("Conv", x, w, net.rand(width), group=width, pads=[2] * 4)
        y = _feed(net, net.norm(net.op("Transpose", y, perm=[0, 2, 3, 1]), width), width)
        y = net.op("Mul", net.op("Transpose", y, perm=[0, 3, 1, 2]), net.rand(width, 1, 1))
        x = net.op("Add", x, y)
    return net.model(net.head(x, width), 1, 3, 16, 16)


def detector() -> Any:
    """A feature pyramid whose Resize is told sizes, and heads that are transposed and joined."""
    net = Net()
    a = net.unit("x", 3, 32, 3, 2)
    b = net.unit(a, 32, 64, 3, 2)
    c = net.unit(b, 64, 64, 3, 2)
    levels = [net.unit(value, inner, 32) for value, inner in ((a, 32), (b, 64), (c, 64))]
    for low, size in ((1, 8), (0, 16)):
        up = net.op("Resize", levels[low + 1], "", "", net.ints(1, 32, size, size), mode="nearest")
        levels[low] = net.unit(net.op("Add", levels[low], up), 32, 32, 3)
    found: list[str] = []
    for value in levels:
        y = net.op("Conv", net.unit(value, 32, 32, 3), net.rand(8, 32, 1, 1), net.rand(8))
        y = net.op("Transpose", y, perm=[0, 2, 3, 1])
        found.append(net.op("Reshape", y, net.ints(1, -1, 4)))
    return net.model(net.op("Concat", *found, axis=1), 1, 3, 32, 32)


def crnn() -> Any:
    """Columns of an image read by a bidirectional LSTM."""
    net, hidden = Net(), 32
    x = net.unit(net.unit("x", 1, 32, 3, 2), 32, 64, 3, 2)
    x = net.op("ReduceMean", x, net.ints(2), keepdims=0)
    x = net.op("Transpose", x, perm=[2, 0, 1])
    for inner in (64, 2 * hidden):
        shapes = ((2, 4 * hidden, inner), (2, 4 * hidden, hidden), (2, 8 * hidden))
        weights = [net.rand(*shape, scale=0.2) for shape in shapes]
        x = net.op("LSTM", x, *weights, hidden_size=hidden, direction="bidirectional")
        x = net.op("Transpose", x, perm=[0, 2, 1, 3])
        x = net.op("Reshape", x, net.ints(0, 0, 2 * hidden))
    return net.model(net.linear(x, 2 * hidden, 10), 1, 1, 16, 32)


def upscaler() -> Any:
    """Transposed convolution, channels to pixels, padding of channels, a shared constant."""
    net = Net()
    zeros = net.const(np.zeros(32))
    x = net.op("Relu", net.op("Conv", "x", net.rand(32, 3, 3, 3), zeros, pads=[1] * 4))
    x = net.op("Relu", net.op("Conv", x, net.rand(32, 32, 3, 3), zeros, pads=[1] * 4))
    x = net.op("Pad", x, net.ints(0, 16, 0, 0, 0, 16, 0, 0))
    x = net.op("Add", x, net.op("Conv", "x", net.rand(64, 3, 1, 1), net.rand(64)))
    x = net.op("DepthToSpace", x, blocksize=2, mode="CRD")
    y = net.op("ConvTranspose", x, net.rand(16, 24, 2, 2), net.rand(24), strides=[2, 2])
    y = net.op("PRelu", y, net.rand(24, 1, 1))
    return net.model(net.op("Conv", y, net.rand(3, 24, 1, 1), net.rand(3)), 1, 3, 8, 8)


ARCHITECTURES: dict[str, tuple[Callable[[], Any], float, bool]] = {
    "resnet": (resnet, 0.29, True),
    "densenet": (densenet, 0.29, True),
    "shufflenet": (shufflenet, 0.50, True),
    "vit": (vit, 0.28, False),
    "swin": (swin, 0.29, False),
    "convnext": (convnext, 0.29, False),
    "detector": (detector, 0.29, True),
    "crnn": (crnn, 0.28, True),
    "upscaler": (upscaler, 0.40, True),
}
"""Builder, the most that half the channels may leave of the parameters, and whether it is exact."""
