"""Rounding of weights: each method against the one before it; formats in the runtime; budgets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

import graphopt
from graphopt import files, ir
from graphopt.cli import main
from graphopt.context import Context
from graphopt.errors import InputError
from graphopt.gram import weight_matrix
from graphopt.quantizer.rounding import (
    Codes,
    Scheme,
    descend,
    gptq,
    hqq,
    loss,
    nearest,
    refit,
)
from graphopt.quantizer.storage import matmul_nbits, pack
from graphopt.quantizer.weights import average_bits, choose, spend
from graphopt.runner import Runner
from tests._architectures import Net
from tests._models import network
from tests._text import proto

onnx: Any = pytest.importorskip("onnx")


def problem(groups: int = 2, out: int = 24, k: int = 40) -> tuple[Any, Any]:
    """Weights, and XᵀX of inputs that depend on each other."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((groups, 400, k)) @ rng.standard_normal((groups, k, k)) ** 3
    return rng.standard_normal((groups, out, k)), x.transpose(0, 2, 1) @ x


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("block", [0, 16])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_methods(bits: int, block: int, symmetric: bool) -> None:
    """A search beats the full range, GPTQ the nearest codes, descent and new scales GPTQ."""
    weights, xtx = problem()
    scheme = Scheme(bits, symmetric, block)
    plain, searched = nearest(weights, scheme, search=False), nearest(weights, scheme)

    def squared(codes: Codes) -> float:
        return float(((codes.values - weights) ** 2).sum())

    def moved(codes: Codes) -> float:
        return float(loss(weights, codes.values, xtx).sum())

    assert squared(searched) <= squared(plain) * 1.0001
    assert squared(hqq(weights, scheme)) < squared(plain) * 1.3
    found = gptq(weights, xtx, scheme)
    assert moved(found) < 0.8 * moved(searched)
    lower = descend(weights, xtx, found)
    assert moved(lower) <= moved(found) * 1.02  # it descends on the damped loss
    assert moved(descend(weights, xtx, refit(weights, xtx, lower))) < 0.8 * moved(searched)
    for codes in (plain, searched, found, lower):
        assert codes.codes.min() >= scheme.lowest
        assert codes.codes.max() <= scheme.highest
        assert np.array_equal(codes.scale, codes.scale.astype(np.float32))


def test_gptq_makes_up_for_errors() -> None:
    """It is the textbook's column by column procedure, whatever the size of its blocks."""
    weights, xtx = problem(groups=1, out=3, k=150)
    scheme = Scheme(4)
    found = gptq(weights, xtx, scheme)
    start = nearest(weights, scheme, importance=np.einsum("gii->gi", xtx))
    hessian = xtx[0] + 0.01 * np.trace(xtx[0]) / 150 * np.eye(150)
    order = np.argsort(-np.diag(hessian), kind="stable")
    linalg: Any = np.linalg
    upper: Any = linalg.cholesky(linalg.inv(hessian[np.ix_(order, order)])).T
    left, codes = weights[0][:, order].copy(), np.zeros((3, 150))
    scale = start.scale[0, :, 0]
    for i in range(150):
        codes[:, i] = np.clip(np.rint(left[:, i] / scale), -8, 7)
        error = (left[:, i] - codes[:, i] * scale) / upper[i, i]
        left[:, i:] -= error[:, None] * upper[i, None, i:]
    assert np.mean(found.codes[0][:, order] == codes) > 0.99


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_packing(bits: int) -> None:
    """The first number in the lowest bits; rows end on a byte."""
    values = (np.arange(10).reshape(2, 5) % (1 << bits)).astype(np.uint8)
    packed = pack(values, bits)
    each = 8 // bits
    found = [
        [(int(row[i // each]) >> bits * (i % each)) % (1 << bits) for i in range(5)]
        for row in packed
    ]
    assert np.array_equal(found, values)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
def test_matmul_nbits(bits: int, symmetric: bool) -> None:
    """The runtime's operator computes with the values that the codes stand for; a bias stays."""
    text = "net (float[3,40] x) => (float[3,8] y) { y = Gemm <transB = 1> (x, w, b) }"
    made: Any = proto(text)
    rng = np.random.default_rng(1)
    for name, shape in (("w", (8, 40)), ("b", (8,))):
        array = rng.standard_normal(shape).astype(np.float32)
        made.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    model = files.load(made)
    context = Context(model)
    (node,) = model.graph
    weights, bias = ir.array(node.inputs[1]), ir.array(node.inputs[2])
    assert weights is not None and bias is not None
    codes = nearest(weight_matrix(node, weights), Scheme(bits, symmetric, 16))
    matmul_nbits(context, node, codes, accuracy_level=0)
    x = rng.standard_normal((3, 40)).astype(np.float32)
    expected = x @ codes.values[0].T + np.asarray(bias, np.float64)
    np.testing.assert_allclose(Runner(model).run({"x": x})["y"], expected, atol=1e-4)


def layered() -> tuple[ir.Model, list[dict[str, Any]]]:
    """Three products with Relu between them, and samples."""
    made: Any = proto(
        "net (float[4,64] x) => (float[4,16] y) { [a] c = Gemm (x, u) r = Relu (c) "
        "[b] d = Gemm (r, v) s = Relu (d) [c] y = Gemm (s, w) }"
    )
    rng = np.random.default_rng(2)
    for name, shape in (("u", (64, 64)), ("v", (64, 64)), ("w", (64, 16))):
        array = rng.standard_normal(shape).astype(np.float32)
        made.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    mix = rng.standard_normal((64, 64)) ** 3
    rows = [(rng.standard_normal((4, 64)) @ mix).astype(np.float32) for _ in range(40)]
    return files.load(made), [{"x": x} for x in rows]


def noise(model: ir.Model, other: ir.Model, samples: list[dict[str, Any]]) -> float:
    """Noise over signal in dB."""
    one, two = Runner(model), Runner(other)
    a = np.stack([one.run(feeds)["y"] for feeds in samples]).astype(np.float64)
    b = np.stack([two.run(feeds)["y"] for feeds in samples])
    return float(10 * np.log10(((a - b) ** 2).sum() / (a**2).sum()))


def test_reconstruction() -> None:
    """Going through the layers in order beats rounding each by itself."""
    model, samples = layered()
    found = {
        text: noise(
            model,
            graphopt.optimize(
                model, passes=f"quantize-weights{{{text}}}", data=samples[:30], verify="off"
            ),
            samples[30:],
        )
        for text in (
            "bits=4,block=0,method=rtn",
            "bits=4,block=0,method=gptq,sequential=false",
            "bits=4,block=0",
        )
    }
    rtn, apart, whole = found.values()
    assert apart < rtn - 2
    assert whole < apart - 1


def test_budget() -> None:
    """Bits go where they lower the noise most, and never beyond the average."""
    model, samples = layered()
    context = Context(model)
    layers = choose(context, Scheme(4, True, 0)).linear
    assert [s.bits for _, s in layers] == [4, 4, 4]
    spent = spend(context, layers, 6.5, samples[:8])
    assert average_bits(spent) <= 6.5
    assert 8 in [s.bits for _, s in spent]
    assert [s.bits for _, s in spend(context, layers, 4.0, samples[:8])] == [4, 4, 4]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("bits=3", "2, 4 or 8 bits"),
        ("method=best", "not by 'best'"),
        ("method=gptq", "needs data"),
        ("layers=[a=5]", "PATTERN="),
        ("average=3.0", "larger blocks"),
    ],
)
def test_mistakes(options: str, message: str) -> None:
    """What cannot be done is said in one line."""
    model, _ = layered()
    with pytest.raises(InputError, match=message):
        graphopt.optimize(model, passes=f"quantize-weights{{{options}}}")


@pytest.mark.parametrize("method", ["rtn", "mse", "hqq"])
def test_parts_are_rounded_as_the_whole(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    text = f"quantize-weights{{method={method},bits=4,block=16}}"
    whole = graphopt.optimize(network(32), passes=text, verify="off")
    monkeypatch.setattr("graphopt.passes.quantize_weights._PART", 300)
    parts = graphopt.optimize(network(32), passes=text, verify="off")
    tensors = [[t.tobytes() for t in ir.constants(model)] for model in (whole, parts)]
    assert tensors[0] == tensors[1]


def test_the_command_spends_an_average_of_bits(tmp_path: Path) -> None:
    """Some layers get 8 bits; together they stay within the average, scales included."""
    net = Net()
    x = net.unit(net.unit(net.unit("x", 3, 16, 3), 16, 32, 3), 32, 32, 3)
    model = files.load(net.model(net.head(x, 32), 1, 3, 12, 12))
    files.save(model, tmp_path / "m.onnx")
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "d.npz", x=rng.standard_normal((8, 1, 3, 12, 12)).astype(np.float32))
    out = tmp_path / "w.onnx"
    base = ["quantize", str(tmp_path / "m.onnx"), "--data", str(tmp_path / "d.npz"), "--no-cache"]
    chosen = [*base, "--average", "6.5", "--seconds", "0", "-q", "-o", str(out)]
    result = CliRunner().invoke(main, [*chosen, "--method", "weights"])
    assert result.exit_code == 0, result.output
    kinds = {t.dtype for t in ir.constants(files.load(out)) if t.size > 100}
    assert kinds >= {ir.DataType.UINT4, ir.DataType.UINT8}
    result = CliRunner().invoke(main, [*chosen, "--overwrite"])
    assert result.exit_code == 2 and "--average is not for --method auto" in result.output
