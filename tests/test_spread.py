"""Models whose channels were spread over three decades are quantized as well as before."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from graphopt import files, ir, optimize, quantize
from graphopt.quantization import Quantization
from tests._architectures import Net
from tests._spread import spread


def squeezenet() -> Any:
    """Fire modules: a narrow Conv, and two wide ones behind it side by side."""
    net = Net(3)
    x = net.unit("x", 3, 16, 3, 2)
    for width, outer in ((16, 24), (24, 32)):
        inner = net.unit(x, width, 8)
        sides = [net.unit(inner, 8, outer // 2, k) for k in (1, 3)]
        x = net.op("Concat", *sides, axis=1)
    return net.model(net.head(x, 32), 1, 3, 16, 16)


def resnet() -> Any:
    """Basic blocks as CIFAR's ResNets have them."""
    net = Net(2)
    x = net.unit("x", 3, 16, 3)
    for inner, outer, step in ((16, 16, 1), (16, 32, 2), (32, 32, 1)):
        y = net.conv(net.unit(x, inner, outer, 3, step), outer, outer, 3)
        x = x if inner == outer else net.conv(x, inner, outer, 1, step)
        x = net.op("Relu", net.op("Add", x, y))
    return net.model(net.head(x, 32), 1, 3, 16, 16)


@pytest.mark.parametrize("make", [resnet, squeezenet])
def test_spread_channels_cost_nothing(make: Any) -> None:
    plain = optimize(files.load(make()), level=2, verify="off")
    wide, pairs = spread(plain)
    assert pairs >= 2
    rng = np.random.default_rng(0)
    data = {"x": rng.standard_normal((24, 1, 3, 16, 16)).astype(np.float32)}
    found: list[float] = []
    for model in (plain, wide):
        report = Quantization()
        quantize(model, data, force=True, seconds=0, report=report)
        assert report.score is not None and report.score.sqnr_db is not None
        found.append(report.score.sqnr_db)
    assert found[0] > 25 and found[1] > found[0] - 1.5


def test_the_spread_keeps_the_function() -> None:
    from graphopt.losses import measure_loss
    from graphopt.samples import open_samples

    plain: ir.Model = optimize(files.load(resnet()), level=2, verify="off")
    wide, _ = spread(plain)
    loss = measure_loss("spread", plain, wide, open_samples("random", plain, limit=3))
    assert loss.sqnr_db is None or loss.sqnr_db > 90
