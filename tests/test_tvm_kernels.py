"""TVM's kernels one by one: rows of softmax, weights loaded ahead, against numpy."""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from graphopt import backends, compilation, ir
from graphopt.target import Target
from tests._models import parse
from tests.test_tvm import CPU, agree, expected, needs_tvm, random, with_weights


def lowered(model: ir.Model, target: Target = CPU) -> tuple[Any, Any, Any]:
    """The scheduled kernels of a model, the target in TVM's terms, and what became of each."""
    compiler, link, importer, kernels, loops, tiles = (
        importlib.import_module(f"graphopt.backends._tvm_{name}")
        for name in ("compile", "link", "import", "kernels", "loops", "tiles")
    )
    machine = loops.Machine(tiles.Registers.of(target), 1)
    aim = link.tvm_target(target, 1)
    module = importer.import_model(model, {})
    found, log = compiler.lower(module, aim, machine, kernels.Kernels(machine.registers))
    return found, aim, log


@needs_tvm
@pytest.mark.parametrize("shape", [(3, 16), (2, 5, 48), (1, 12, 40, 128), (7, 8), (1, 32)])
def test_softmax_row_by_row(tmp_path: Path, shape: tuple[int, ...]) -> None:
    model = parse(f"g (float{list(shape)} x) => (float y) {{ y = Softmax <axis = -1> (x) }}")
    x = 5 * random(*shape)
    agree(model, {"x": x}, tmp_path / "a", "rows", tolerance=1e-6)
    found = compilation.load(tmp_path / "a", trust=True).run({"x": x})["y"]
    assert isinstance(found, np.ndarray)
    powers = np.exp(x - x.max(-1, keepdims=True), dtype=np.float64)
    np.testing.assert_allclose(found, powers / powers.sum(-1, keepdims=True), rtol=1e-6)


@needs_tvm
@pytest.mark.parametrize(
    ("rows", "columns", "ahead"), [(64, 400, True), (64, 16, False), (1, 4000, False)]
)
def test_weights_are_loaded_ahead(rows: int, columns: int, ahead: bool) -> None:
    """Unless there is no next block of them, or nothing to do meanwhile."""
    text = f"g (float[{rows},96] x, float[] w) => (float y) {{ y = MatMul (x, w) }}"
    kernels, _, _ = lowered(with_weights(text, w=random(96, columns)))
    assert ("llvm.prefetch" in kernels.script()) == ahead


@needs_tvm
@pytest.mark.parametrize(
    ("channels", "size", "window", "attributes", "in_place"),
    [
        (48, (14, 14), 3, "pads = [1, 1, 1, 1]", True),
        (32, (13, 27), 3, "strides = [2, 2], pads = [1, 1, 1, 1]", True),
        (24, (9, 11), 5, "strides = [1, 2], pads = [2, 0, 1, 3]", True),
        (72, (7, 7), 3, "dilations = [2, 2], pads = [2, 2, 2, 2]", True),
        (16, (3, 2), 3, "pads = [1, 1, 1, 1]", True),
        (100, (9, 11), 3, "pads = [1, 1, 1, 1]", False),
    ],
)
def test_depthwise_reads_its_input_in_place(
    tmp_path: Path,
    channels: int,
    size: tuple[int, int],
    window: int,
    attributes: str,
    in_place: bool,
) -> None:
    """A copy with a border costs as much as the convolution."""
    high, wide = size
    text = f"g (float[2,{channels},{high},{wide}] x, float[] w) => (float y) "
    text += f"{{ c = Conv <group = {channels}, {attributes}> (x, w) y = Relu (c) }}"
    model = with_weights(text, w=random(channels, 1, window, window))
    kernels, _, _ = lowered(model)
    assert ("padded" in kernels.script()) != in_place
    agree(model, {"x": random(2, channels, *size)}, tmp_path / "a", "product", tolerance=1e-5)


@needs_tvm
def test_copies_for_depthwise_are_made_in_bands() -> None:
    """With one thread as well: a few rows stay in the cache, an image does not."""
    text = "g (float[1,100,40,40] x, float[] w) => (float y) "
    text += "{ y = Conv <group = 100, pads = [1, 1, 1, 1]> (x, w) }"
    kernels, _, _ = lowered(with_weights(text, w=random(100, 1, 3, 3)))
    assert "T.grid(T.int64(1), T.int64(10), T.int64(42), T.int64(7))" in kernels.script()


@needs_tvm
@pytest.mark.parametrize(
    ("shape", "outer", "pads", "tail"),
    [
        ((1, 16, 12, 12), 32, [1, 1, 1, 1], "y = Relu (c)"),
        ((2, 24, 13, 9), 48, [1, 1, 1, 1], "a = Add (c, r) y = Relu (a)"),
        ((1, 32, 8, 11), 16, [0, 0, 0, 0], "y = Sigmoid (c)"),
        ((1, 16, 5, 14), 64, [2, 0, 1, 3], "s = Mul (c, g) y = Add (s, r)"),
        ((1, 512, 14, 14), 32, [1, 1, 1, 1], "y = Neg (c)"),
        ((1, 16, 32, 6), 32, [1, 1, 1, 1], "m = GlobalAveragePool (c) y = Mul (c, m)"),
    ],
)
@pytest.mark.parametrize("threads", [1, 2])
def test_squares_of_outputs(
    tmp_path: Path, shape: tuple[int, ...], outer: int, pads: list[int], tail: str, threads: int
) -> None:
    """Winograd's way is as exact as sums in order, at any edge, with what is fused to it."""
    n, inner, high, wide = shape
    full = [n, outer, high + pads[0] + pads[2] - 2, wide + pads[1] + pads[3] - 2]
    text = f"g (float{list(shape)} x, float{full} r, float[{outer},1,1] g, float[] w, float[] b) "
    text += f"=> (float y) {{ c = Conv <pads = {pads}> (x, w, b) {tail} }}"
    weights = random(outer, inner, 3, 3) / np.float32(inner**0.5)
    model = with_weights(text, w=weights, b=random(outer))
    feeds = {"x": random(*shape), "r": random(*full), "g": random(outer, 1, 1)}
    kernels, _, _ = lowered(model)
    assert 'sblock("winograd_update")' in kernels.script()
    options = {"threads": threads}
    compilation.compile(model, CPU, tmp_path, backend="tvm", options=options, level=0, verify="off")
    notes = json.loads((tmp_path / "kernels.json").read_text())
    assert all("(" not in rule for rule in notes["rules"].values()), notes["rules"]
    (found,) = compilation.load(tmp_path, trust=True).run(feeds).values()
    (wanted,) = expected(model, feeds)
    assert isinstance(found, np.ndarray)
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)


@needs_tvm
def test_squares_of_any_batch(tmp_path: Path) -> None:
    text = "g (float[N,16,9,10] x, float[] w) => (float y) "
    text += "{ c = Conv <pads = [1, 1, 1, 1]> (x, w) y = Relu (c) }"
    model = with_weights(text, w=random(32, 16, 3, 3))
    kernels, _, _ = lowered(model)
    assert 'sblock("winograd_update")' in kernels.script()
    agree(model, {"x": random(3, 16, 9, 10)}, tmp_path / "a", "product")


@needs_tvm
@pytest.mark.parametrize("way", ["half_pixel", "pytorch_half_pixel", "align_corners", "asymmetric"])
@pytest.mark.parametrize("body", ["r = Neg (x)", "r = Conv (x, w)"])
def test_linear_interpolation(tmp_path: Path, way: str, body: str) -> None:
    """From tables, in both layouts, up and down, by any factor."""
    sizes = {"a": (14, 18), "b": (3, 5), "c": (7, 20), "d": (1, 1)}
    outputs = ", ".join(f"float y{name}" for name in sizes)
    constants = ", ".join(
        f"int64[4] {name} = {{2, 16, {h}, {w}}}" for name, (h, w) in sizes.items()
    )
    how = f'mode = "linear", coordinate_transformation_mode = "{way}"'
    nodes = " ".join(f"y{name} = Resize <{how}> (r, , , {name})" for name in sizes)
    text = f"g (float[2,16,7,9] x, float[] w) => ({outputs}) <{constants}> {{ {body} {nodes} "
    model = with_weights(text + "}", w=random(16, 16, 1, 1))
    kernels, _, _ = lowered(model)
    assert 'sblock("down")' in kernels.script()
    agree(model, {"x": random(2, 16, 7, 9)}, tmp_path / "a", tolerance=1e-5)


@needs_tvm
def test_sums_are_not_on_the_heap() -> None:
    """Those of a tile may take more than TVM leaves on the stack by itself."""
    text = "g (float[64,96] x, float[] w) => (float y) { y = MatMul (x, w) }"
    kernels, aim, _ = lowered(with_weights(text, w=random(96, 400)))
    compiler = importlib.import_module("graphopt.backends._tvm_compile")
    library = compiler.generate(kernels, aim).mod.imports[0]
    code = library.inspect_source("ll")
    assert "llvm.prefetch" in code
    assert "TVMBackendAllocWorkspace" not in code


@needs_tvm
@pytest.mark.parametrize(
    ("shape", "order"),
    [
        ((2, 16, 7, 48), [0, 3, 1, 2]),
        ((1, 13, 13, 32), [0, 3, 1, 2]),
        ((5, 64, 12), [0, 2, 1]),
        ((3, 8, 64), [2, 0, 1]),
        ((100, 100), [1, 0]),
    ],
)
def test_transpositions(tmp_path: Path, shape: tuple[int, ...], order: list[int]) -> None:
    text = f"g (float{list(shape)} x) => (float y, float z) "
    text += f"{{ y = Transpose <perm = {order}> (x) n = Tanh (x) "
    text += f"z = Transpose <perm = {order}> (n) }}"
    agree(parse(text), {"x": random(*shape)}, tmp_path / "a", "stages", tolerance=1e-6)


@needs_tvm
def test_a_gate_is_computed_once(tmp_path: Path) -> None:
    """Not with every position of the map that it is multiplied into, all of them unrolled."""
    text = """
        g (float[2,1,1,24] x, float[2,9,9,32] z, float[] w) => (float y) {
            d = MatMul (x, w) s = Sigmoid (d) y = Mul (z, s)
        }"""
    weights = random(24, 32)
    kernels, _, _ = lowered(with_weights(text, w=weights))
    unrolled = re.findall(r"T\.unroll\(T\.int64\((\d+)\)\)", kernels.script())
    assert unrolled and max(map(int, unrolled)) <= 4
    feeds = {"x": random(2, 1, 1, 24), "z": random(2, 9, 9, 32)}
    agree(with_weights(text, w=weights), feeds, tmp_path / "a", "product")


@needs_tvm
def test_operators_before_a_branch_are_fused(tmp_path: Path) -> None:
    text = """
        g (float[2,24] x, float[] w) => (float[2,32] y) {
            m = MatMul (x, w) r = Relu (m) s = ReduceMax <keepdims = 0> (r) one = Cast <to = 9> (s)
            y = If (one) <then_branch = a () => (float[2,32] t) { t = Neg (r) },
                          else_branch = b () => (float[2,32] e) { e = Exp (r) }>
        }"""
    model, x = with_weights(text, w=random(24, 32)), random(2, 24)
    _, _, log = lowered(model)
    assert "fused_relu_max" in log.rules
    for sign, name in ((1, "a"), (0, "b")):
        agree(model, {"x": sign * x}, tmp_path / name, "product")


@needs_tvm
def test_division_by_constants(tmp_path: Path) -> None:
    text = "g (float[3,40] x, float[] c) => (float y) { y = Div (x, c) }"
    for name, divisor in (("plain", [3.0]), ("zero", [0.0]), ("tiny", [1e-42])):
        x = np.abs(random(3, 40)) + np.float32(0.5)
        model = with_weights(text, c=np.array(divisor, np.float32))
        agree(model, {"x": x}, tmp_path / name, tolerance=1e-6)
        assert json.loads((tmp_path / name / "kernels.json").read_text())["rules"]


@needs_tvm
def test_rows_of_an_odd_length(tmp_path: Path) -> None:
    model = parse("g (float[4,37] x) => (float y) { y = Softmax <axis = -1> (x) }")
    agree(model, {"x": random(4, 37)}, tmp_path / "a", "stages", tolerance=1e-6)


@needs_tvm
@pytest.mark.parametrize(
    ("body", "shape", "kernel"),
    [
        ("y = MatMul (x, w)", (17, 48), (48, 40)),
        ("c = Conv <pads = [1, 1, 1, 1]> (x, w) y = Relu (c)", (1, 16, 9, 11), (24, 16, 3, 3)),
        (
            "c = Conv <group = 16, pads = [1, 1, 1, 1]> (x, w) y = Sigmoid (c)",
            (1, 16, 9, 8),
            (16, 1, 3, 3),
        ),
        ("m = Mul (x, w) y = Softmax <axis = -1> (m)", (5, 64), (64,)),
        ("m = Mul (x, w) y = Erf (m)", (5, 33), (33,)),
        ("m = Mul (x, w) y = ReduceMean <keepdims = 0> (m)", (6, 128), (128,)),
    ],
)
def test_half_precision(
    tmp_path: Path, body: str, shape: tuple[int, ...], kernel: tuple[int, ...]
) -> None:
    text = f"g (float16{list(shape)} x, float16[] w) => (float16 y) {{ {body} }}"
    scale = float(np.sqrt(np.prod(kernel[1:]))) if len(kernel) > 1 else 1.0
    weights = (random(*kernel) / scale).astype(np.float16)
    agree(
        with_weights(text, w=weights),
        {"x": random(*shape, dtype=np.float16)},
        tmp_path / "a",
        tolerance=2e-2,
    )


@needs_tvm
@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("[a] c = Cast <to = 17> (x) y = Cast <to = 1> (c)", "numbers of type float8e4m3fn"),
    ],
)
def test_what_the_importer_gets_wrong(body: str, reason: str) -> None:
    outputs = "float y, float m" if " m " in body else "float y"
    model = with_weights(f"g (float[4,8] x, float[] w) => ({outputs}) {{ {body} }}", w=random(8))
    assert backends.get("tvm").supports(model, CPU)["a"] == reason


@needs_tvm
@pytest.mark.parametrize("reduction", ["ReduceMean", "ReduceMax", "ReduceSum", "ReduceL2"])
@pytest.mark.parametrize("shape", [(6, 128), (7,), (3, 5, 33)])
def test_reductions_to_a_number(tmp_path: Path, reduction: str, shape: tuple[int, ...]) -> None:
    text = f"g (float{list(shape)} x) => (float y) {{ y = {reduction} <keepdims = 0> (x) }}"
    agree(parse(text, opset=18), {"x": random(*shape)}, tmp_path / "a", tolerance=1e-5)


SPECIAL = np.array(
    [np.nan, np.inf, -np.inf, 100, -100, 89, 88.5, -104, 0, -0.0, 1e-40, 3e38, -3e38, 1.5, -0.5, 3],
    np.float32,
)


@needs_tvm
def test_numbers_that_are_none_or_infinite(tmp_path: Path) -> None:
    """As in ONNX Runtime: kept by maxima and bounds, and by functions that are polynomials."""
    names = ("Exp", "Tanh", "Sigmoid", "Erf", "Relu", "Elu", "Selu", "Softplus", "HardSigmoid")
    names += ("Sign", "ThresholdedRelu", "Cosh", "Sinh", "IsNaN")
    bodies = [f"{{}} = {name} (x)" for name in names]
    bodies += ["{} = Celu <alpha = 2.0> (x)", "{} = Max (x, r)", "{} = Min (x, r)"]
    bodies += ["{} = Clip (x, low, high)", "{} = Softmax <axis = 0> (x)"]
    bodies += ["{} = IsInf <detect_negative = 0> (x)"]
    text = " ".join(body.format(f"y{i}") for i, body in enumerate(bodies))
    kinds = ["bool" if "Is" in body else "float" for body in bodies]
    outputs = ", ".join(f"{kind} y{i}" for i, kind in enumerate(kinds))
    model = parse(
        f"g (float[16] x, float[16] r) => ({outputs}) <float low = {{-5}}, float high = {{6}}> "
        f"{{ {text} }}"
    )
    agree(model, {"x": SPECIAL, "r": SPECIAL[::-1].copy()}, tmp_path / "a")


@needs_tvm
def test_extremes_of_infinities(tmp_path: Path) -> None:
    model = parse("""
        g (float[4,16] x, bool[2,8] p) => (float a, float b, bool c, bool d, int64 e, int64 f)
        <int64[1] axes = {-1}>
        { a = ReduceMax (x, axes) b = ReduceMin <keepdims = 0> (x) c = ReduceMax (p, axes)
          d = ReduceMin (p, axes) e = ArgMax <axis = 1> (x) f = ArgMin <axis = -1> (x) }
    """)
    x = np.full((4, 16), -np.inf, np.float32)
    x[1], x[2, 3] = np.inf, 1
    agree(model, {"x": x, "p": np.eye(2, 8) > 0}, tmp_path / "a")


@needs_tvm
def test_sums_of_half_precision_are_wide(tmp_path: Path) -> None:
    """4,000 numbers added up in float16 would be off by a hundredth."""
    model = with_weights(
        """
        g (float16[4,4000] x, float16[] w) => (float16 a, float16 b, float16 c, float16 d)
        <int64[1] axes = {1}, int64 one = {1}>
        { a = ReduceSum <keepdims = 0> (x, axes) b = MatMul (x, w) c = CumSum (x, one)
          d = ReduceMean (x, axes) }
        """,
        w=(random(4000, 24) / 63).astype(np.float16),
    )
    x = (random(4, 4000) + 0.5).astype(np.float16)
    compilation.compile(model, CPU, tmp_path / "a", backend="tvm", level=0, verify="off")
    found = compilation.load(tmp_path / "a", trust=True).run({"x": x})
    wide, weights = x.astype(np.float64), model.graph.initializers["w"].const_value
    assert weights is not None
    product = wide @ weights.numpy().astype(np.float64)
    wanted = (wide.sum(1), product, wide.cumsum(1), wide.mean(1, keepdims=True))
    for value, exact in zip(found.values(), wanted, strict=True):
        assert isinstance(value, np.ndarray)
        np.testing.assert_allclose(value, exact, rtol=1e-3, atol=1e-3)


@needs_tvm
def test_normalizations(tmp_path: Path) -> None:
    model = parse("""
        g (float[2,6,8] x, float[6] s, float[8] t, float[6,8] u)
          => (float a, float m, float i, float b, float mean, float v, float c, float d)
        <float[6] one = {1, 1, 1, 1, 1, 1}>
        { a, m, i = LayerNormalization (x, t, t)
          b, mean, v = BatchNormalization <training_mode = 1, momentum = 0.8> (x, s, s, s, one)
          c = LpNormalization <axis = 1, p = 1> (x) d = RMSNormalization <axis = 1> (x, u) }
    """, opset=23)  # fmt: skip
    feeds = {"x": random(2, 6, 8), "s": random(6), "t": random(8), "u": random(6, 8)}
    agree(model, feeds, tmp_path / "a", tolerance=1e-5)


@needs_tvm
def test_operators_by_their_parts(tmp_path: Path) -> None:
    """What the standard defines by other operators; splits of no size, tensors without elements."""
    model = parse("""
        g (float[1,2,5,16] q, int64[3] labels, float[3,5] x, int64[4] k)
          => (float a, float loss, float o, float c, float e, float s)
        <int64 depth = {5}, float[2] values = {-1, 2}, int64[3] sizes = {0, 2, 3},
         int64[2] shape = {0, 4}, float[0,5] none = {}>
        { a = Attention <is_causal = 1> (q, q, q)
          loss = SoftmaxCrossEntropyLoss (x, labels)
          o = OneHot <axis = 0> (k, depth, values)
          n, c, last = Split <axis = 1> (x, sizes)
          e = Concat <axis = 0> (none, x) f = ReduceSum (n) s = Add (f, loss) }
    """, opset=23)  # fmt: skip
    feeds = {"q": random(1, 2, 5, 16), "x": random(3, 5), "labels": np.array([1, 0, 4])}
    agree(model, {**feeds, "k": np.array([0, -1, 4, 7])}, tmp_path / "a")


@needs_tvm
@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("[a] y, m = Dropout (x, half, yes)", "dropout while training"),
        ("[a] t = Cast <to = 8> (x) y = Cast <to = 1> (t)", "text"),
        ("[a] t = SequenceConstruct (x) y = ConcatFromSequence <axis = 0> (t)", "sequences"),
    ],
)
def test_what_is_refused(body: str, reason: str) -> None:
    text = "g (float[4] x) => (float y) <float half = {0.5}, bool yes = {1}> { " + body + " }"
    assert backends.get("tvm").supports(parse(text), CPU)["a"].startswith(reason)


@needs_tvm
def test_one_row_by_a_matrix_of_free_width_is_not_copied_to_tiles(tmp_path: Path) -> None:
    """As a token's attention to what was before it."""
    text = "g (float[1,3,1,8] x, float[1,3,8,n] y) => (float[1,3,1,n] z) { z = MatMul (x, y) }"
    feeds = {"x": random(1, 3, 1, 8), "y": random(1, 3, 8, 21)}
    agree(parse(text, opset=18), feeds, tmp_path / "a", "stages")
