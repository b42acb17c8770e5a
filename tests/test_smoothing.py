"""Outliers of activations moved into weights: noise foretold, and noise measured."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from graphopt import files, ir, optimize, quantize
from graphopt.context import Context
from graphopt.errors import InputError
from graphopt.losses import measure_loss
from graphopt.passes.smooth_activations import SmoothActivations
from graphopt.quantization import Quantization
from graphopt.samples import open_samples
from tests._text import proto

_RNG = np.random.default_rng(0)
_X = _RNG.standard_normal((24, 1, 6, 32)).astype(np.float32)


def block(outlier: float) -> ir.Model:
    """A gated block of a transformer; one channel in eight is larger where that is wanted."""
    made: Any = proto(
        "net (float[N,6,32] x) => (float[N,6,32] y) { n = LayerNormalization (x, g, b) "
        "a = MatMul (n, wa) s = Sigmoid (a) h = Mul (a, s) u = MatMul (n, wu) m = Mul (h, u) "
        "d = MatMul (m, wd) e = Neg (d) f = Sigmoid (e) y = MatMul (f, wf) }"
    )
    rng = np.random.default_rng(1)
    large = np.where(np.arange(64) % 8 == 3, outlier, 1.0)
    arrays = {
        "g": large[:32],
        "b": rng.standard_normal(32) * 0.1,
        "wa": rng.standard_normal((32, 64)) / 8 / large[:32, None],
        "wu": rng.standard_normal((32, 64)) / 8 / large[:32, None] * large,
        "wd": rng.standard_normal((64, 32)) / 8 / large[:, None],
        "wf": rng.standard_normal((32, 32)),
    }
    for name, array in arrays.items():
        tensor = ir.tensor(array.astype(np.float32), name=name)
        made.graph.initializer.append(ir.to_proto(tensor))
    return files.load(made)


def loss(model: ir.Model, other: ir.Model) -> float:
    """SQNR in dB."""
    found = measure_loss("test", model, other, open_samples({"x": _X}, model)).sqnr_db
    assert found is not None
    return found


@pytest.mark.parametrize("dynamic", [True, False])
def test_outliers_are_made_up_for(dynamic: bool) -> None:
    """A block with outliers ends where the one without them does; the function is the same."""
    text = "quantize-dynamic" if dynamic else "quantize-static{placement=tensorrt}"
    first = f"smooth-activations{{dynamic={str(dynamic).lower()}}}"
    rough = block(100.0)
    smoothed = optimize(rough, passes=first, data={"x": _X}, verify="off")
    assert loss(rough, smoothed) > 110
    found = [
        loss(rough, optimize(m, passes=text, data={"x": _X}, verify="off"))
        for m in (rough, smoothed, block(1.0))
    ]
    assert found[0] + 8 < found[1] and found[1] > found[2] - 2


def test_quantize_smooths_by_itself() -> None:
    report = Quantization()
    model = block(100.0)
    quantize(model, {"x": _X}, method="dynamic", force=True, seconds=0, report=report)
    assert report.steps == ["smooth-activations{dynamic=True,multiply=True}", "quantize-dynamic"]
    assert report.score is not None and report.score.sqnr_db is not None
    assert report.score.sqnr_db > 30
    assert all(layer.sqnr_db is None or layer.sqnr_db > 20 for layer in report.layers)


def test_salient_weights_are_rounded_more_finely() -> None:
    """Where a tenth of the channels is far larger than the others."""
    model = block(1.0)
    gamma = next(iter(model.graph)).inputs[1]
    assert gamma is not None
    sizes = np.where(np.arange(32) % 10 == 0, 20.0, 0.5).astype(np.float32)
    gamma.const_value = ir.tensor(sizes, name=gamma.name)
    text = "quantize-weights{bits=4,block=0,method=rtn}"
    found = [
        loss(model, optimize(model, passes=passes, data={"x": _X}, verify="off", target="cpu"))
        for passes in (text, f"scale-salient{{block=0}},{text}")
    ]
    assert found[1] > found[0] + 2
    with pytest.raises(InputError, match="2 to 8 bits"):
        optimize(model, passes="scale-salient{bits=9}", data={"x": _X})


def test_nothing_to_do_and_bad_input() -> None:
    model = block(1.0)
    with pytest.raises(InputError, match="needs data"):
        SmoothActivations().run(Context(model))
    samples = open_samples({"x": np.full((2, 1, 6, 32), np.inf, np.float32)}, model)
    with pytest.raises(InputError, match="not finite"):
        SmoothActivations().run(Context(files.copy(model), samples=samples))
