"""Biases: those that quantization asks to be corrected, and those that are handed on."""

from __future__ import annotations

import numpy as np
import pytest

from graphopt import files, ir, optimize
from graphopt.context import Context
from graphopt.errors import InputError
from graphopt.losses import measure_loss
from graphopt.passes.correct_biases import CorrectBiases
from graphopt.passes.quantize_static import QuantizeStatic
from graphopt.quantizer.bias_correction import correct_biases
from graphopt.runner import Runner
from graphopt.samples import open_samples
from tests._architectures import Net


def depthwise() -> ir.Model:
    """Separable convolutions: those in depth add up nine products."""
    net = Net(5)
    x = net.unit("x", 3, 16, 3)
    for _ in range(3):
        x = net.unit(net.unit(x, 16, 16, 3, group=16), 16, 16)
    made = files.load(net.model(net.head(x, 16), 1, 3, 12, 12))
    return optimize(made, level=2, verify="off")


DATA = {"x": np.random.default_rng(0).standard_normal((48, 1, 3, 12, 12)).astype(np.float32)}
ROUGH = "quantize-static{weights=int4,rounding=nearest}"


def test_noise_falls_on_other_samples() -> None:
    model = depthwise()
    others = open_samples({"x": DATA["x"][24:]}, model)
    half = {"x": DATA["x"][:24]}
    found: list[float] = []
    for text in (ROUGH, f"{ROUGH},correct-biases"):
        result = optimize(model, passes=text, data=half, verify="off")
        loss = measure_loss("biases", model, result, others).sqnr_db
        assert loss is not None
        found.append(loss)
    assert found[1] > found[0] + 2


def test_means_are_those_of_the_floats() -> None:
    """The last layer's, whose bias is an integer, to half of its step."""
    model = depthwise()
    samples = open_samples(DATA, model)
    context = Context(files.copy(model), samples=samples)
    QuantizeStatic(weights="int4", rounding="nearest").run(context)
    assert correct_biases(context, model, samples) == 8
    name = model.graph.outputs[0].name or ""
    means = [
        np.mean([Runner(m).run(s)[name] for s in samples], axis=0) for m in (model, context.model)
    ]
    step = np.ptp(means[0])
    assert float(np.abs(means[0] - means[1]).max()) < 0.02 * step


def test_it_needs_data() -> None:
    model = depthwise()
    context = Context(files.copy(model), samples=open_samples(DATA, model))
    QuantizeStatic(rounding="nearest").run(context)
    context.samples = None
    with pytest.raises(InputError, match="needs data"):
        CorrectBiases().run(context)


def test_high_biases_are_handed_on() -> None:
    """A tensor whose channels lie far above 0 has its steps for what varies in it."""
    net = Net(7)
    high = net.const(np.where(np.arange(16) % 4 == 0, 30.0, 0.0))
    x = net.op("Relu", net.op("Conv", "x", net.rand(16, 3, 1, 1), high))
    x = net.op("Conv", x, net.rand(16, 16, 1, 1), net.rand(16))
    model = files.load(net.model(x, 1, 3, 12, 12))
    others = open_samples({"x": DATA["x"][24:]}, model)
    text = "quantize-static{ranges=minmax}"
    found: list[float] = []
    for passes in (text, f"absorb-biases,{text}"):
        result = optimize(model, passes=passes, data={"x": DATA["x"][:24]}, verify="off")
        loss = measure_loss("biases", model, result, others).sqnr_db
        assert loss is not None
        found.append(loss)
    assert found[1] > found[0] + 1
