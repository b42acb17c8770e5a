"""Residual streams that are rotated: the same function, and less noise once it is quantized."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from graphopt import files, ir, optimize, quantize
from graphopt.context import Context
from graphopt.quantization import Quantization
from graphopt.quantizer.rotation import rotate, rotation
from graphopt.quantizer.scoring import score
from graphopt.samples import open_samples
from tests._text import proto

_IDS = np.random.default_rng(0).integers(0, 60, (64, 1, 8))

_LAYER = (
    "n0 = LayerNormalization (h, g0, b0) "
    "q = MatMul (n0, wq) k = MatMul (n0, wk) v = MatMul (n0, wv) "
    "kt = Transpose <perm = [0, 2, 1]> (k) s = MatMul (q, kt) p = Softmax (s) a = MatMul (p, v) "
    "o = MatMul (a, wo) ob = Add (o, bo) r = Add (h, ob) n1 = LayerNormalization (r, g1, b1) "
    "u = MatMul (n1, wu) e = Erf (u) d = MatMul (e, wd) t = Add (r, d) "
)
_RMS = (
    "s{0} = Pow ({1}, two) m{0} = ReduceMean <keepdims = 1> (s{0}, last) e{0} = Add (m{0}, eps) "
    "d{0} = Sqrt (e{0}) f{0} = Div ({1}, d{0}) n{0} = Mul (f{0}, g{0}) "
)


def decoder(kind: str, outlier: float) -> ir.Model:
    """A layer of a transformer whose residual stream has a few channels that are larger."""
    if kind == "layer":
        body = _LAYER + "n2 = LayerNormalization (t, g2, b2) "
    else:
        body = _RMS.format(0, "h") + _LAYER[_LAYER.index("q =") : _LAYER.index("n1 =")]
        body += _RMS.format(1, "r") + _LAYER[_LAYER.index("u =") :] + _RMS.format(2, "t")
    made: Any = proto(
        "net (int64[N,8] ids) => (float[N,8,60] y) <float two = {2}, float eps = {0.00001}, "
        "int64[1] last = {-1}> { w = Gather (table, ids) h = Add (w, place) "
        + body
        + "y = MatMul (n2, head) }"
    )
    rng = np.random.default_rng(1)
    large = np.where(np.arange(48) % 16 == 3, outlier, 1.0)
    arrays = {
        "table": rng.standard_normal((60, 48)) * large,
        "place": rng.standard_normal((1, 8, 48)) * 0.1 * large,
        **{name: rng.standard_normal((48, 48)) / 7 for name in ("wq", "wv")},
        "wk": rng.standard_normal((48, 48)) / 49,
        "wo": rng.standard_normal((48, 48)) / 7 * large,
        "bo": rng.standard_normal(48) * 0.1 * large,
        "wu": rng.standard_normal((48, 96)) / 7,
        "wd": rng.standard_normal((96, 48)) / 7 * large,
        "head": rng.standard_normal((48, 60)),
        **{f"g{i}": rng.uniform(0.5, 1.5, 48) for i in range(3)},
        **{f"b{i}": rng.standard_normal(48) * 0.1 for i in range(3)},
    }
    used = {name for node in made.graph.node for name in node.input}
    for name, array in arrays.items():
        if name in used:
            made.graph.initializer.append(
                ir.to_proto(ir.tensor(array.astype(np.float32), name=name))
            )
    return files.load(made)


def decibels(model: ir.Model, other: ir.Model) -> float:
    found = score(model, other, open_samples({"ids": _IDS}, model)).sqnr_db
    assert found is not None
    return found


@pytest.mark.parametrize("width", [16, 32, 40, 48, 128, 7])
@pytest.mark.parametrize("centred", [True, False])
def test_rotations(width: int, centred: bool) -> None:
    """Orthogonal; where means stay, a vector of ones stays; channels are spread."""
    matrix = rotation(width, centred=centred)
    assert np.allclose(matrix @ matrix.T, np.eye(width))
    assert np.allclose(np.ones(width) @ matrix, np.ones(width)) or not centred
    assert np.abs(matrix).max() < 1
    assert np.array_equal(matrix, rotation(width, centred=centred))


@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_outliers_are_spread(kind: str) -> None:
    """The same function without the factors of norms; weights and activations lose less."""
    model = decoder(kind, 40.0)
    turned = optimize(model, passes="rotate-residual", verify="off")
    assert decibels(model, turned) > 100
    assert len(list(turned.graph)) == len(list(model.graph)) - (3 if kind == "rms" else 0)
    for text in ("quantize-dynamic", "quantize-static", "quantize-static{placement=tensorrt}"):
        found = [
            decibels(model, optimize(m, passes=text, data={"ids": _IDS}, verify="off"))
            for m in (model, turned)
        ]
        assert found[1] > found[0] + 6


def test_quantize_rotates_where_that_helps() -> None:
    """Judged on samples that calibrate nothing, unless somebody says yes or no."""
    model, data = decoder("layer", 30.0), {"ids": _IDS}
    found: dict[bool | None, Quantization] = {}
    for wanted in (None, False, True):
        report = found[wanted] = Quantization()
        quantize(model, data, target="cuda", rotate=wanted, seconds=0, report=report)
    best, plain, turned = (each.score.sqnr_db for each in found.values() if each.score is not None)
    assert best is not None and plain is not None and best == turned
    assert best > plain + 2
    firsts = [each.steps[0].partition("{")[0] for each in found.values()]
    assert firsts == ["rotate-residual", "smooth-activations", "rotate-residual"]


def test_what_does_not_gain_or_cannot_turn_stays() -> None:
    """Even channels; a stream that is an output, with a reason; and that is said when asked for."""
    context = Context(decoder("layer", 1.0))
    assert rotate(context) == 0
    assert "no channel stands out" in context.record.refusals
    assert rotate(context, always=True) == 1
    model = decoder("rms", 40.0)
    residual = next(n for n in model.graph if n.op_type == "Div").inputs[0]
    assert residual is not None
    model.graph.outputs.append(residual)
    report = Quantization()
    quantize(
        model, {"ids": _IDS}, method="dynamic", rotate=True, force=True, seconds=0, report=report
    )
    assert any("it is an output of the model" in note for note in report.notes)


def test_outliers_that_only_samples_show() -> None:
    """One unit of a hidden layer is large, and the weights that read it are not."""
    model = decoder("rms", 1.0)
    wide = model.graph.initializers["wd"]
    assert wide.const_value is not None
    weights = wide.const_value.numpy().copy()
    weights[5] = np.where(np.arange(48) == 7, 0.8, 0.0)
    wide.const_value = ir.tensor(weights, name="wd")
    scale = next(n for n in model.graph if n.op_type == "Erf")
    large = np.where(np.arange(96) == 5, 60.0, 1.0).astype(np.float32)
    factor = ir.Value(name="large", const_value=ir.tensor(large, name="large"))
    factor.shape, factor.type = ir.Shape([96]), ir.TensorType(ir.DataType.FLOAT)
    model.graph.register_initializer(factor)
    node = ir.Node("", "Mul", [scale.outputs[0], factor], name="enlarge")
    node.outputs[0].name = "enlarged"
    scale.outputs[0].replace_all_uses_with(node.outputs[0])
    node.replace_input_with(0, scale.outputs[0])
    model.graph.insert_after(scale, node)
    assert rotate(Context(files.copy(model))) == 0
    samples = open_samples({"ids": _IDS}, model)
    context = Context(files.copy(model), samples=samples)
    assert rotate(context) == 1
    assert decibels(model, context.model) > 100
    assert rotate(Context(context.model, samples=samples)) == 0
