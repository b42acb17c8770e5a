"""TVM's kernels for quantized models: sums of integers are exact, on every kind of CPU."""

from __future__ import annotations

import dataclasses
import importlib
from typing import Any

import numpy as np
import pytest

from graphopt import ir
from graphopt.backends import Array
from graphopt.backends._tvm_dots import best, dots
from graphopt.target import Target
from tests.test_tvm import CPU, expected, needs_tvm, random, with_weights
from tests.test_tvm_kernels import lowered

LEVELS = {
    # features of x86-64, the widest last
    "sse": {"sse4_2"},
    "avx2": {"sse4_2", "avx", "avx2", "fma", "f16c"},
    "avx_vnni": {"sse4_2", "avx", "avx2", "fma", "f16c", "avx_vnni"},
    "avx512": {
        "sse4_2",
        "avx",
        "avx2",
        "fma",
        "f16c",
        *(f"avx512{x}" for x in ("f", "bw", "dq", "vl")),
    },
}


def integers(*shape: int, dtype: Any) -> Array:
    """Integers over the whole range of a dtype, the same each time."""
    info = np.iinfo(dtype)
    numbers = np.random.default_rng(sum(shape)).integers(info.min, info.max + 1, shape)
    array: Array = numbers.astype(dtype)
    return array


def quantized(op: str, x: Array, zero: int, weights: Array, offset: int = 0) -> ir.Model:
    """An operator between integers whose scales are 1, so that its sums come out as they are."""
    kind, wide = (str(array.dtype) for array in (x, weights))
    text = f"""
        g ({kind}{list(x.shape)} x, float[] one, {kind}[] zero, {wide}[] w, {wide}[] offset)
            => (float y)
        {{ a = DequantizeLinear (x, one, zero) b = DequantizeLinear (w, one, offset) {op} }}
    """
    return with_weights(
        text,
        one=np.array(1, np.float32),
        zero=np.array(zero, x.dtype),
        w=weights,
        offset=np.array(offset, weights.dtype),
    )


def on(level: str) -> Target:
    """A CPU like this one with fewer features."""
    if level == "own":
        return CPU
    if CPU.arch != "x86_64" or not LEVELS[level] <= CPU.isa:
        pytest.skip(f"this CPU has no {level}")
    return dataclasses.replace(CPU, name=f"cpu-{level}", isa=frozenset(LEVELS[level]))


def run(model: ir.Model, *inputs: Array, level: str = "own") -> tuple[Array, Any]:
    """What a model makes of inputs, compiled in this process, and what became of its kernels."""
    tvm, vm = (importlib.import_module(name) for name in ("tvm", "tvm.runtime.vm"))
    kernels, aim, log = lowered(model, on(level))
    code = importlib.import_module("graphopt.backends._tvm_compile").generate(kernels, aim)
    machine: Any = vm.VirtualMachine(code, tvm.cpu())
    (result,) = machine["main"](*(tvm.runtime.tensor(array) for array in inputs))
    return result.numpy(), log


def exact(model: ir.Model, x: Array, level: str = "own") -> str:
    """Compare sums with those of floats that hold them exactly; returns the kernel's name."""
    found, log = run(model, x, level=level)
    np.testing.assert_array_equal(found, expected(model, {"x": x})[0])
    assert "product" in log.rules.values(), log.rules
    return " ".join(log.kernels.values())


@needs_tvm
@pytest.mark.parametrize("level", ["own", *LEVELS])
@pytest.mark.parametrize(
    ("data", "zero", "weights", "offset"),
    [
        ("uint8", 0, "int8", 0),
        ("uint8", 131, "int8", 0),
        ("int8", -7, "int8", 0),
        ("uint8", 3, "uint8", 120),
    ],
)
def test_convolutions(level: str, data: str, zero: int, weights: str, offset: int) -> None:
    x, w = integers(1, 5, 9, 7, dtype=data), integers(20, 5, 3, 3, dtype=weights)
    model = quantized("y = Conv <pads = [1, 1, 0, 1]> (a, b)", x, zero, w, offset)
    assert f"{data} {'int16' if offset else 'int8'}" in exact(model, x, level)


@needs_tvm
@pytest.mark.parametrize(
    ("shape", "kernel", "attributes"),
    [
        ((1, 16, 6, 6), (32, 16, 1, 1), ""),
        ((2, 6, 5, 7), (10, 6, 1, 1), ""),
        ((1, 8, 9, 9), (24, 8, 3, 3), "strides = [2, 2], pads = [1, 1, 1, 1]"),
        ((1, 8, 9, 9), (8, 8, 3, 3), "dilations = [2, 2], pads = [2, 2, 2, 2]"),
        ((1, 24, 9, 8), (24, 1, 3, 3), "group = 24, pads = [1, 1, 1, 1]"),
        ((1, 10, 9, 8), (20, 1, 5, 5), "group = 10, pads = [2, 2, 2, 2], strides = [2, 2]"),
        ((1, 16, 8, 8), (32, 4, 3, 3), "group = 4"),
        ((1, 6, 20), (5, 6, 7), "pads = [3, 3], strides = [3]"),
    ],
)
def test_shapes_of_convolutions(
    shape: tuple[int, ...], kernel: tuple[int, ...], attributes: str
) -> None:
    x, w = integers(*shape, dtype="uint8"), integers(*kernel, dtype="int8")
    op = f"y = Conv <{attributes}> (a, b)".replace(" <>", "")
    exact(quantized(op, x, 77, w), x)


@needs_tvm
@pytest.mark.parametrize(
    ("op", "left", "right"),
    [
        ("y = MatMul (a, b)", (1, 64), (64, 100)),
        ("y = MatMul (a, b)", (17, 30), (30, 33)),
        ("y = MatMul (a, b)", (2, 16, 32), (32, 48)),
        ("y = Gemm (a, b)", (3, 20), (20, 10)),
        ("y = Gemm <transB = 1, alpha = 2.0> (a, b, b)", (4, 4), (4, 4)),
    ],
)
def test_products(op: str, left: tuple[int, ...], right: tuple[int, ...]) -> None:
    x, w = integers(*left, dtype="uint8"), integers(*right, dtype="int8")
    exact(quantized(op, x, 128, w), x)


@needs_tvm
@pytest.mark.parametrize("body", ["y = MatMul (a, b)", "y = Conv <pads = [1, 1]> (a, b)"])
def test_symbolic_sizes(body: str) -> None:
    shape = (12, 20) if "MatMul" in body else (20, 12, 3)
    names = "batch,seq,12" if "MatMul" in body else "batch,12,seq"
    x, w = integers(1, 1, dtype="uint8"), integers(*shape, dtype="int8")
    model = quantized(body, x, 9, w)
    model.graph.inputs[0].shape = ir.Shape([int(n) if n.isdigit() else n for n in names.split(",")])
    for batch, seq in ((1, 1), (2, 7), (3, 16)):
        sizes = {"batch": batch, "seq": seq}
        x = integers(*(sizes.get(n) or int(n) for n in names.split(",")), dtype="uint8")
        exact(model, x)


@needs_tvm
def test_rounding_and_saturation() -> None:
    """Halves go to the even number, before the zero point is added."""
    x = np.array([-1e9, -130, -2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 3.3, 126.5, 127.5, 300, 1e9], "f")
    for dtype, zero in (("uint8", 3), ("int8", -5), ("uint8", 0)):
        text = f"g (float[13] x, float[] s, {dtype}[] z) => ({dtype} y)"
        text += "{ y = QuantizeLinear (x, s, z) }"
        model = with_weights(text, s=np.array(1, np.float32), z=np.array(zero, dtype))
        found, _ = run(model, x)
        info = np.iinfo(dtype)
        wanted = np.clip(np.round(x.astype(float)) + zero, info.min, info.max).astype(dtype)
        np.testing.assert_array_equal(found, wanted)


@needs_tvm
def test_quotients_are_not_products_with_inverses() -> None:
    """Which would lie beside a half where the quotient is one, and round the other way."""
    x, scale = np.arange(-60, 60).astype("f") * np.float32(0.05), np.array(0.1, np.float32)
    text = "g (float[120] x, float[] s, int8[] z) => (int8 y) { y = QuantizeLinear (x, s, z) }"
    found, _ = run(with_weights(text, s=scale, z=np.array(0, np.int8)), x)
    np.testing.assert_array_equal(found, np.rint(x / scale).astype(np.int8))
    text = "g (float[6] x) => (uint8 y) { y, s, z = DynamicQuantizeLinear (x) }"
    found, _ = run(with_weights(text), x := np.array([0, 2, -3, -2.5, 1.34, 0.5], np.float32))
    np.testing.assert_array_equal(found, [153, 255, 0, 26, 221, 179])


@needs_tvm
def test_a_block_of_a_network() -> None:
    """Bias, activation, rounding and the sum with another tensor are one kernel with the sums."""
    model = with_weights(
        """
        g (float[1,16,8,8] x, float[] s, uint8[] z, int8[] w, float[] t, int8[] none, float[] b)
            => (float y)
        {
            q = QuantizeLinear (x, s, z) a = DequantizeLinear (q, s, z)
            v = DequantizeLinear <axis = 0> (w, t, none)
            c = Conv <pads = [1, 1, 1, 1]> (a, v, b) r = Relu (c) p = QuantizeLinear (r, s, z)
            d = DequantizeLinear (p, s, z) e = Add (d, a) f = QuantizeLinear (e, s, z)
            y = DequantizeLinear (f, s, z)
        }
        """,
        s=np.array(0.03, np.float32),
        z=np.array(120, np.uint8),
        w=integers(16, 16, 3, 3, dtype="int8"),
        t=np.abs(random(16)) / 500,
        none=np.zeros(16, np.int8),
        b=random(16),
    )
    x = random(1, 16, 8, 8)
    found, log = run(model, x)
    np.testing.assert_allclose(found, expected(model, {"x": x})[0], atol=0.0301)
    (name,) = [name for name, rule in log.rules.items() if rule == "product"]
    assert name.count("minimum") == 2


@needs_tvm
@pytest.mark.parametrize(
    ("body", "shape", "kernel", "kind"),
    [
        ("y = MatMulInteger (x, w, zero)", (2, 5, 24), (24, 10), "int32"),
        ("y = ConvInteger <pads = [1, 1, 1, 1]> (x, w, zero)", (1, 6, 7, 7), (9, 6, 3, 3), "int32"),
        ("y = ConvInteger <group = 6> (x, w, zero)", (1, 6, 7, 7), (6, 1, 3, 3), "int32"),
        ("y = QLinearMatMul (x, s, zero, w, s, none, t, zero)", (5, 24), (24, 10), "uint8"),
        (
            "y = QLinearConv <strides = [2, 2]> (x, s, zero, w, s, none, t, zero, b)",
            (1, 6, 7, 7),
            (9, 6, 3, 3),
            "uint8",
        ),
    ],
)
def test_integer_operators(
    body: str, shape: tuple[int, ...], kernel: tuple[int, ...], kind: str
) -> None:
    """Zero points of run time are for those that are named so; the others' are constants."""
    text = f"""
        g (uint8{list(shape)} x, uint8[] zero, int8[] w, float[] s, float[] t, int8[] none,
            int32[] b) => ({kind} y) {{ {body} }}
    """
    constants: dict[str, Array] = {"w": integers(*kernel, dtype="int8")}
    constants |= {"s": np.array(0.04, np.float32), "t": np.array(3.7, np.float32)}
    constants |= {
        "none": np.array(0, np.int8),
        "b": integers(kernel[0], dtype="int16").astype("i4"),
    }
    zero, x = np.array(99, np.uint8), integers(*shape, dtype="uint8")
    for known in (True, False) if "Integer" in body else (True,):
        model = with_weights(text, **constants, **({"zero": zero} if known else {}))
        for value in model.graph.inputs[1:]:
            value.shape = ir.Shape([])
        found, log = run(model, x, *([] if known else [zero]))
        wanted = expected(model, {"x": x} if known else {"x": x, "zero": zero})[0]
        assert found.dtype == wanted.dtype
        np.testing.assert_allclose(found.astype("i8"), wanted.astype("i8"), atol=kind == "uint8")
        assert "product" in log.rules.values(), log.rules


@needs_tvm
def test_ranges_of_run_time() -> None:
    text = """
        g (float[4,24] x, int8[] w) => (float y)
        {
            q, s, z = DynamicQuantizeLinear (x) i = MatMulInteger (q, w, z)
            f = Cast <to = 1> (i) y = Mul (f, s)
        }
    """
    model = with_weights(text, w=integers(24, 10, dtype="int8"))
    for x in (random(4, 24), np.zeros((4, 24), np.float32), np.abs(random(4, 24)) + 1):
        found, log = run(model, x)
        wanted = expected(model, {"x": x})[0]
        np.testing.assert_allclose(found, wanted, atol=max(np.abs(wanted).max() / 500, 1e-6))
        assert "dense [4, 24] 10 uint8 int8" in log.kernels.values()


@needs_tvm
@pytest.mark.parametrize(
    "weights",
    ["d = DequantizeLinear <axis = 0> (w, t)", "d = DequantizeLinear <axis = 1> (w, s)"],
)
def test_scales_along_the_sum_are_floats(weights: str) -> None:
    text = f"""
        g (uint8[3,8] x, float[] one, int8[] w, float[] t, float[] s) => (float y)
        {{ a = DequantizeLinear (x, one) {weights} y = MatMul (a, d) }}
    """
    model = with_weights(
        text,
        one=np.array(1, np.float32),
        w=integers(8, 4, dtype="int8"),
        t=np.abs(random(8)),
        s=np.abs(random(4)),
    )
    x = integers(3, 8, dtype="uint8")
    factors = np.abs(random(8))[:, None] if "axis = 0" in weights else np.abs(random(4))
    found, log = run(model, x)
    weights_ = integers(8, 4, dtype="int8") * factors
    np.testing.assert_allclose(found, x.astype(np.float32) @ weights_, rtol=1e-4, atol=1e-2)
    assert ("float32" in str(log.kernels)) == ("axis = 0" in weights)


@pytest.mark.parametrize(
    ("target", "data", "weights", "instruction"),
    [
        ("arm64", "int8", "int8", ""),
        ("arm64:cortex-a76", "int8", "int8", "sdot"),
        ("arm64:cortex-a76", "uint8", "int8", "sdot"),
        ("arm64:neoverse-v1", "uint8", "int8", "usdot"),
        ("arm64:neoverse-v1", "int8", "int8", "sdot"),
        ("arm64:neoverse-v1", "uint8", "int16", ""),
    ],
)
def test_instructions_of_arm(target: str, data: str, weights: str, instruction: str) -> None:
    found = best(dots(Target.parse(target)), data, weights)
    assert found.intrinsic.removeprefix("llvm.aarch64.neon.").partition(".")[0] == instruction


@needs_tvm
@pytest.mark.parametrize(
    ("target", "instruction"),
    [("arm64", "smlal"), ("arm64:cortex-a76", "sdot"), ("arm64:neoverse-n2", "usdot")],
)
def test_code_for_arm(target: str, instruction: str) -> None:
    x, w = integers(3, 20, dtype="uint8"), integers(20, 16, dtype="int8")
    kernels, aim, _ = lowered(quantized("y = MatMul (a, b)", x, 5, w), Target.parse(target))
    compiler = importlib.import_module("graphopt.backends._tvm_compile")
    code = compiler.generate(kernels, aim).mod.imports[0].inspect_source("s")
    assert f"\t{instruction}\t" in code
