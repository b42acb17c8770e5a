"""The TVM backend: kernels against ONNX Runtime, symbolic sizes, targets, faults."""

from __future__ import annotations

import dataclasses
import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from graphopt import artifact, backends, compilation, files, ir
from graphopt.backends import Array
from graphopt.backends._tvm_tiles import Registers, ranked
from graphopt.errors import GraphoptError, InputError, MissingError
from graphopt.target import Target
from tests._models import parse

BACKEND = backends.get("tvm")
MISSING = BACKEND.is_available()
needs_tvm = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))
CPU = Target.parse("cpu")


def random(*shape: int, dtype: Any = np.float32) -> Array:
    """Numbers around zero, the same each time."""
    array: Array = np.random.default_rng(len(shape)).standard_normal(shape).astype(dtype)
    return array


def with_weights(text: str, **weights: Array) -> ir.Model:
    """A model from its text, with initializers that the text only names."""
    model = parse(text, opset=18)
    for value in [v for v in model.graph.inputs if v.name in weights]:
        value.const_value = ir.Tensor(weights[value.name or ""], name=value.name)
        model.graph.inputs.remove(value)
        model.graph.initializers[value.name or ""] = value
    return model


def expected(model: ir.Model, feeds: dict[str, Array]) -> list[Any]:
    """What ONNX Runtime makes of it."""
    ort: Any = importlib.import_module("onnxruntime")
    data = files.to_proto(model).SerializeToString()
    session = ort.InferenceSession(data, providers=["CPUExecutionProvider"])
    results: list[Any] = session.run(None, feeds)
    return results


def agree(
    model: ir.Model, feeds: dict[str, Array], folder: Path, rule: str = "", tolerance: float = 1e-4
) -> None:
    """Compile, run, compare; the kernels of a name have the rule, and none is unscheduled."""
    if folder.exists():
        folder = folder / "again"
    compilation.compile(model, CPU, folder, backend="tvm", level=0, verify="off")
    assert not artifact.read(folder).fallback
    notes = json.loads((folder / "kernels.json").read_text())
    assert not notes["unscheduled"]
    if rule:
        assert rule in notes["rules"].values(), notes["rules"]
    found = compilation.load(folder, trust=True).run(feeds)
    for value, wanted in zip(found.values(), expected(model, feeds), strict=True):
        assert isinstance(value, np.ndarray)
        assert value.dtype == wanted.dtype
        np.testing.assert_allclose(value, wanted, rtol=tolerance, atol=tolerance)


@needs_tvm
@pytest.mark.parametrize(
    ("shape", "kernel", "attributes"),
    [
        ((1, 16, 14, 14), (32, 16, 1, 1), ""),
        ((1, 8, 13, 13), (30, 8, 1, 1), ""),
        ((2, 3, 23, 29), (16, 3, 3, 3), "strides = [2, 2], pads = [1, 1, 1, 1]"),
        ((1, 16, 11, 17), (24, 16, 3, 3), "pads = [1, 1, 1, 1]"),
        ((1, 16, 9, 9), (16, 16, 3, 3), "dilations = [2, 2], pads = [2, 2, 2, 2]"),
        ((1, 24, 15, 14), (24, 1, 3, 3), "group = 24, pads = [1, 1, 1, 1]"),
        ((1, 32, 13, 26), (32, 1, 3, 3), "group = 32, pads = [1, 1, 1, 1]"),
        ((1, 20, 15, 14), (20, 1, 5, 5), "group = 20, strides = [2, 2], pads = [2, 2, 2, 2]"),
        ((1, 16, 8, 8), (32, 4, 3, 3), "group = 4, pads = [0, 1, 0, 1]"),
        ((1, 6, 40), (5, 6, 7), "strides = [3], pads = [3, 3]"),
        ((2, 6, 40, 1), (5, 6, 7, 1), "strides = [3, 1], pads = [3, 0, 2, 0]"),
        ((2, 6, 40, 1), (5, 6, 7, 1), "pads = [0, 1, 0, 1]"),
        ((1, 4, 12, 12), (7, 4, 3, 3), "pads = [0, 0, 1, 1]"),
    ],
)
def test_convolutions(
    tmp_path: Path, shape: tuple[int, ...], kernel: tuple[int, ...], attributes: str
) -> None:
    dims = ",".join(map(str, shape))
    text = f"g (float[{dims}] x, float[] w, float[] b) => (float y) "
    text += f"{{ c = Conv <{attributes}> (x, w, b) y = Relu (c) }}".replace(" <>", "")
    model = with_weights(text, w=random(*kernel), b=random(kernel[0]))
    agree(model, {"x": random(*shape)}, tmp_path / "a", "product")


@needs_tvm
@pytest.mark.parametrize(
    ("axes", "attributes"),
    [
        (2, "strides = [2, 2]"),
        (2, "strides = [2, 2], pads = [1, 1, 1, 1], output_padding = [1, 1]"),
        (2, "strides = [2, 3], pads = [0, 1, 1, 2], dilations = [2, 1]"),
        (2, "strides = [2, 2], output_shape = [14, 14]"),
        (2, "group = 2"),
        (1, "strides = [3], pads = [1, 2], output_padding = [2], dilations = [2]"),
        (1, "strides = [2], output_shape = [14]"),
    ],
)
def test_transposed_convolutions(tmp_path: Path, axes: int, attributes: str) -> None:
    text = f"g (float{[1, 8, *[6] * axes]} x, float[] w) => (float y) "
    text += f"{{ y = ConvTranspose <{attributes}> (x, w) }}"
    model = with_weights(text, w=random(8, 4, *[3] * axes))
    agree(model, {"x": random(1, 8, *[6] * axes)}, tmp_path / "a", "product")


@needs_tvm
@pytest.mark.parametrize(
    ("left", "right", "constant"),
    [
        ((1, 64), (64, 100), True),
        ((17, 30), (30, 33), True),
        ((2, 16, 32), (32, 48), True),
        ((128, 64), (64, 64), True),
        ((2, 3, 16, 8), (2, 3, 8, 32), False),
        ((3, 7, 5), (3, 5, 9), False),
    ],
)
def test_products(
    tmp_path: Path, left: tuple[int, ...], right: tuple[int, ...], constant: bool
) -> None:
    x, y = random(*left), random(*right)
    text = f"g (float{list(left)} x, float{list(right)} w) => (float z) "
    text += "{ m = MatMul (x, w) z = Tanh (m) }"
    model = with_weights(text, **({"w": y} if constant else {}))
    agree(model, {"x": x} if constant else {"x": x, "w": y}, tmp_path / "a", "product")


@needs_tvm
@pytest.mark.parametrize(
    "body",
    [
        "y = Exp (x)",
        "y = Erf (x)",
        "y = Sigmoid (x)",
        "y = Tanh (x)",
        "y = Softmax <axis = -1> (x)",
        "y = Softmax <axis = 1> (x)",
        "y = LeakyRelu <alpha = 0.1> (x)",
        "y = Transpose <perm = [0, 3, 1, 2]> (x)",
        "y = Concat <axis = 3> (x, x, x)",
        "y = GlobalAveragePool (x)",
        "y = MaxPool <kernel_shape = [3, 3], strides = [2, 2], pads = [1, 1, 1, 1]> (x)",
        "y = AveragePool <kernel_shape = [2, 2], strides = [2, 2]> (x)",
        "a = Abs (x) s = Sqrt (a) y = Add (s, x)",
        "y = ArgMax <axis = 3> (x)",
    ],
)
def test_other_kernels(tmp_path: Path, body: str) -> None:
    kind = "int64" if "ArgMax" in body else "float"
    model = parse(f"g (float[1,6,20,37] x) => ({kind} y) {{ {body} }}", opset=18)
    agree(model, {"x": 3 * random(1, 6, 20, 37)}, tmp_path / "a")


@needs_tvm
def test_functions_over_their_range(tmp_path: Path) -> None:
    x = np.concatenate([np.linspace(-100, 90, 4001), np.linspace(-1e-3, 1e-3, 99), [0]])
    x = x.astype(np.float32)
    for index, op in enumerate(("Exp", "Erf", "Sigmoid", "Tanh")):
        model = parse(f"g (float[{x.size}] x) => (float y) {{ y = {op} (x) }}")
        folder = tmp_path / str(index)
        if op == "Exp":
            x = np.minimum(x, np.float32(87))
        agree(model, {"x": x}, folder, tolerance=2e-6)


@needs_tvm
@pytest.mark.parametrize(
    ("body", "size"),
    [
        ("y = MatMul (x, w)", 24),
        ("m = MatMul (x, w) y = Sigmoid (m)", 24),
        ("t = Transpose <perm = [0, 2, 1]> (x) s = MatMul (x, t) y = Softmax <axis = -1> (s)", 24),
        ("y = ReduceMean (x)", 24),
        ("z = Shape (x) r = Expand (x, z) y = Relu (r)", 5),
        (
            "z = Shape (x) i = Constant <value_int = 1> () s = Gather (z, i) "
            "c = Cast <to = 1> (s) y = Mul (x, c)",
            5,
        ),
        (
            "i = Constant <value = int64[1] {0}> () q = Gather <axis = 1> (x, i) "
            "c = Concat <axis = 1> (x, q) t = Transpose <perm = [0, 2, 1]> (c) "
            "s = MatMul (q, t) p = Softmax <axis = -1> (s) y = MatMul (p, c)",
            16,
        ),
    ],
)
def test_symbolic_sizes(tmp_path: Path, body: str, size: int) -> None:
    text = f"g (float[batch,seq,{size}] x, float[] w) => (float y) {{ {body} }}"
    model = with_weights(text, w=random(size, 40))
    folder = tmp_path / "a"
    compilation.compile(model, CPU, folder, backend="tvm", level=0, verify="off")
    assert not json.loads((folder / "kernels.json").read_text())["unscheduled"]
    executable = compilation.load(folder, trust=True)
    for shape in ((1, 1), (2, 7), (3, 16)):
        feeds = {"x": random(*shape, size)}
        found = executable.run(feeds)["y"]
        assert isinstance(found, np.ndarray)
        np.testing.assert_allclose(found, expected(model, feeds)[0], rtol=1e-4, atol=1e-4)


@needs_tvm
@pytest.mark.parametrize("op", ["LSTM", "GRU", "RNN"])
@pytest.mark.parametrize("direction", ["forward", "bidirectional"])
def test_recurrent_layers(tmp_path: Path, op: str, direction: str) -> None:
    gates, ways = {"LSTM": 4, "GRU": 3, "RNN": 1}[op], 1 + (direction != "forward")
    text = f"""
        g (float[3,2,5] x, float[] w, float[] r, float[] b) => (float y, float h)
        {{ y, h = {op} <hidden_size = 8, direction = "{direction}"> (x, w, r, b) }}
    """
    model = with_weights(
        text,
        w=random(ways, 8 * gates, 5),
        r=random(ways, 8 * gates, 8),
        b=random(ways, 16 * gates),
    )
    agree(model, {"x": random(3, 2, 5)}, tmp_path / "a")


@needs_tvm
def test_blocked_weights(tmp_path: Path) -> None:
    model = parse("""
        g (float[2,8] x) => (float[2,4] y)
        <int8[8,4] w = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21,
                        22, 23, 24, 25, 26, 27, 28, 29, 30, 31, 32},
         float[2,4] s = {0.5, 0.25, 1, 2, 1, 1, 0.5, 0.125}>
        { d = DequantizeLinear <axis = 0, block_size = 4> (w, s) y = MatMul (x, d) }
    """, opset=21)  # fmt: skip
    agree(model, {"x": random(2, 8)}, tmp_path / "a")


@needs_tvm
def test_indices_out_of_range(tmp_path: Path) -> None:
    model = parse("""
        g (float[5,3] x, int64[n] i) => (float[n,3] y, float[n,3] z)
        <int64 one = {1}>
        { j = Cast <to = 7> (i) y = Gather (x, j) k = Add (i, one) z = Gather (x, k) }
    """)
    compilation.compile(model, CPU, tmp_path / "a", backend="tvm", level=0, verify="off")
    executable = compilation.load(tmp_path / "a", trust=True)
    x = random(5, 3)
    found = executable.run({"x": x, "i": np.array([-1, 0, 3])})
    np.testing.assert_array_equal(found["y"], x[[-1, 0, 3]])
    for wrong in (5, -6, 1 << 60):
        with pytest.raises(GraphoptError, match="not below 5"):
            executable.run({"x": x, "i": np.array([0, wrong])})


@needs_tvm
def test_loading_needs_no_onnx(tmp_path: Path) -> None:
    model = parse("g (float[2] x) => (float[2] y) { y = Relu (x) }")
    folder = compilation.compile(model, CPU, tmp_path / "a", backend="tvm")
    script = (
        "import sys, numpy\nfrom graphopt import compilation\n"
        f"found = compilation.load({str(folder)!r}, trust=True).run("
        "{'x': numpy.array([-1, 2], 'f')})\n"
        "assert found['y'].tolist() == [0, 2]\n"
        "assert not {'onnx', 'onnx_ir'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)


@needs_tvm
def test_objects_are_linked_where_they_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from graphopt.backends import _tvm_link

    model, how = parse("g (float[2] x) => (float[2] y) { y = Relu (x) }"), {"format": "tar"}
    one, other = (
        compilation.compile(model, CPU, tmp_path / n, backend="tvm", options=how, cache=False)
        for n in ("a", "b")
    )
    assert (one / "model.tar").read_bytes() == (other / "model.tar").read_bytes()
    for _ in range(2):
        found = compilation.load(one).run({"x": np.array([-1, 2], np.float32)})
        assert np.asarray(found["y"]).tolist() == [0, 2]

    def nothing(arch: str) -> None:
        """No linker at all."""

    monkeypatch.setattr(_tvm_link, "linker", nothing)
    with pytest.raises(MissingError, match=r"model\.tar has to be linked, and there is no linker"):
        compilation.load(one)


@needs_tvm
def test_a_library_that_is_none(tmp_path: Path) -> None:
    model = parse("g (float[2] x) => (float[2] y) { y = Relu (x) }")
    folder = compilation.compile(model, CPU, tmp_path / "a", backend="tvm")
    (folder / "model.so").write_bytes(b"no library")
    with pytest.raises(InputError, match="changed"):
        compilation.load(folder, trust=True)
    manifest = artifact.read(folder)
    with pytest.raises(GraphoptError, match="tvm: ") as caught:
        BACKEND.load(folder, manifest)
    assert "\n" not in str(caught.value)


@needs_tvm
def test_a_manifest_that_lists_more_outputs(tmp_path: Path) -> None:
    model = parse("g (float[2] x) => (float[2] y) { y = Relu (x) }")
    folder = compilation.compile(model, CPU, tmp_path / "a", backend="tvm")
    manifest = artifact.read(folder)
    more = dataclasses.replace(manifest, outputs=(*manifest.outputs, *manifest.outputs))
    with pytest.raises(GraphoptError, match="has 1 outputs, its manifest lists 2"):
        BACKEND.load(folder, more).run({"x": np.zeros(2, np.float32)})


def test_without_tvm(monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(name: str) -> None:
        """No package is installed."""

    monkeypatch.setattr("importlib.util.find_spec", nothing)
    for reason in (BACKEND.is_available(), BACKEND.can_compile(CPU), BACKEND.can_run(CPU)):
        assert reason is not None
        assert "graphopt[tvm]" in reason
    with pytest.raises(MissingError, match=r"graphopt\[tvm\]"):
        BACKEND.supports(parse("g (float[2] x) => (float[2] y) { y = Relu (x) }"), CPU)


@pytest.mark.parametrize("target", ["cpu", "arm64", "arm64:cortex-a76"])
@pytest.mark.parametrize("rows", [None, 1, 3, 13, 49, 55, 128])
@pytest.mark.parametrize("columns", [1, 3, 10, 24, 64, 1000])
def test_tiles_fit_the_registers(target: str, rows: int | None, columns: int) -> None:
    registers = Registers.of(Target.parse(target))
    tile = ranked(rows, columns, registers, "float32")[0]
    assert tile.rows * tile.vectors + tile.vectors + 1 <= registers.count
    assert tile.lanes <= registers.lanes("float32")
    assert rows is None or tile.rows <= rows
    assert tile.columns < 2 * max(columns, 2)


@needs_tvm
@pytest.mark.parametrize("name", ["arm64", "arm64:cortex-a76", "arm64:neoverse-v1"])
def test_other_architectures(tmp_path: Path, name: str) -> None:
    target = Target.parse(name)
    reason = BACKEND.can_compile(target)
    if reason is not None:
        pytest.skip(reason)
    model = with_weights("g (float[3,8] x, float[] w) => (float[3,4] y) { y = MatMul (x, w) }",
                         w=random(8, 4))  # fmt: skip
    folder = compilation.compile(model, target, tmp_path / "a", backend="tvm")
    library = (folder / "model.so").read_bytes()
    assert library[18:20] == b"\xb7\x00"  # ELF's number for aarch64
    with pytest.raises(MissingError, match="cannot run here: it is for aarch64"):
        compilation.load(folder, trust=True)


@needs_tvm
def test_no_linker_for_another_architecture(monkeypatch: pytest.MonkeyPatch) -> None:
    from graphopt.backends import _tvm_link

    def nothing(arch: str) -> str | None:
        """No linker is there."""

    monkeypatch.setattr(_tvm_link, "linker", nothing)
    reason = BACKEND.can_compile(Target.parse("arm64"))
    how = "pip install 'graphopt[linker]', or apt install gcc-aarch64-linux-gnu"
    assert reason == f"no linker for aarch64: {how}"


@needs_tvm
@pytest.mark.gpu
def test_on_a_gpu(tmp_path: Path) -> None:
    target = Target.parse("cuda")
    reason = BACKEND.can_run(target)
    if reason is not None:
        pytest.skip(reason)
    text = "g (float[1,8,9,9] x, float[] w) => (float y) { c = Conv (x, w) y = Relu (c) }"
    model = with_weights(text, w=random(16, 8, 3, 3))
    compilation.compile(model, target, tmp_path / "a", backend="tvm", level=0)
    x = random(1, 8, 9, 9)
    found = compilation.load(tmp_path / "a", trust=True).run({"x": x})["y"]
    assert isinstance(found, np.ndarray)
    np.testing.assert_allclose(found, expected(model, {"x": x})[0], rtol=1e-3, atol=1e-3)


@needs_tvm
def test_a_loop_that_looks_up_what_it_wrote_before(tmp_path: Path) -> None:
    """A cache that grows, a token that is chosen by what is in it, and a branch on the way."""
    text = """g (int64[1] first, float[p, 8] past, int64 trips, float[8, 8] table, float[8, 8] w)
    => (int64[t, 1] tokens, float[q, 8] end) {
        last, end, tokens = Loop (trips, "", first, past) <body = step
        (int64 i, bool c, int64[1] token, float[n, 8] cache)
        => (bool on, int64[1] next, float[m, 8] grown, int64[1] told) {
            on = Identity (c)
            x = Gather (table, token)
            h = MatMul (x, w)
            grown = Concat <axis = 0> (cache, h)
            turned = Transpose <perm = [1, 0]> (grown)
            scores = MatMul (h, turned)
            soft = Softmax <axis = -1> (scores)
            read = MatMul (soft, grown)
            next = ArgMax <axis = 1, keepdims = 0> (read)
            told = Identity (next)
        }>
    }"""
    model = with_weights(text, table=random(8, 8), w=random(8, 8))
    folder = compilation.compile(model, CPU, tmp_path / "a", backend="tvm", options={"threads": 1})
    found = artifact.read(folder)
    assert not found.fallback
    assert [flow.kind for flow in artifact.flows(found.parts)] == ["Loop"]
    assert [step.backend for step in artifact.compiled(found.parts)] == ["tvm"]
    executable = compilation.load(folder)
    for trips, past in ((5, 2), (0, 3), (3, 1)):
        feeds = {
            "first": np.array([3]),
            "past": random(past, 8),
            "trips": np.array(trips),
        }
        results = executable.run(feeds)
        for value, wanted in zip(results.values(), expected(model, feeds), strict=True):
            np.testing.assert_allclose(np.asarray(value), wanted, rtol=1e-4, atol=1e-5)
    with pytest.raises(GraphoptError, match="has an index that is not below 8"):
        executable.run({"first": np.array([9]), "past": random(2, 8), "trips": np.array(1)})
    assert {row.calls for row in executable.profile(feeds, 2)} == {3.0}
