"""Smaller images inside a model as a way to meet a budget: chosen, judged, refused, told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from graphopt import files, ir
from graphopt.cli import main
from graphopt.pruner.records import record_of
from graphopt.pruner.recovery import Recovery
from graphopt.pruner.reporting import PruneReport
from graphopt.pruning import prune
from graphopt.resolution import Resolutions
from graphopt.runner import Runner
from graphopt.samples import Samples, open_samples
from tests._models import parse

_TEXT = """
net (float[N,3,32,32] x) => (float[N,6] y) <HELD> {
  a = Conv <pads = [1, 1, 1, 1]> (x, w)
  b = Relu (a)
  c = Conv <pads = [1, 1, 1, 1]> (b, v)
  d = Add (b, c)
  g = POOL (d)
  f = Flatten (g)
  y = Gemm (f, u)
}
"""


def network(pool: str = "GlobalAveragePool", head: int = 16) -> ir.Model:
    """A network with a residual block, all of whose channels count, for smooth images."""
    rng = np.random.default_rng(0)
    held: list[str] = []
    for name, shape in {"w": (16, 3, 3, 3), "v": (16, 16, 3, 3), "u": (head, 6)}.items():
        numbers = rng.normal(size=shape).ravel() / np.sqrt(np.prod(shape[1:]))
        held.append(f"float{list(shape)} {name} = {{{','.join(map(str, numbers))}}}")
    return parse(_TEXT.replace("POOL", pool).replace("HELD", ",".join(held)))


def images(model: ir.Model, count: int = 16) -> Samples:
    """Waves of low frequency, which lose nothing by interpolation."""
    rng = np.random.default_rng(1)
    rows, columns = np.mgrid[0:32, 0:32] / 32
    waves = rng.uniform(0.2, 1, (count, 3, 2, 1, 1))
    arrays = np.sin(4 * (waves[:, :, 0] * rows + waves[:, :, 1] * columns)) + waves[:, :, 0]
    return open_samples({"x": arrays[:, None].astype(np.float32)}, model)


def test_images_become_smaller() -> None:
    """Where channels cost more; inputs and outputs stay as they are."""
    model, report = network(), PruneReport()
    data = images(model)
    result = prune(model, flops=0.6, data=data, benchmark=False, report=report)
    assert report.resized == {"x": ("32x32", "24x24")}
    assert result.graph[0].op_type == "Resize"
    assert report.after is not None
    assert report.before is not None
    assert report.after.flops <= 0.6 * report.before.flops
    assert not [name for name, (old, new) in report.families.items() if new < old]
    assert report.drop is not None
    assert report.drop < 0.1
    for old, new in zip(model.graph.inputs, result.graph.inputs, strict=True):
        assert (old.name, old.shape) == (new.name, new.shape)
    prune(model, flops=0.6, data=data, benchmark=False, keep_resolution=True, report=report)
    assert not report.resized


@pytest.mark.parametrize(
    "options",
    [
        {"params": 0.6},
        {"ratio": 0.5},
        {"flops": 0.6, "only": ["*"]},
        {"flops": 0.6, "iterations": 2},
    ],
)
def test_what_asks_for_channels(options: dict[str, Any]) -> None:
    """Budgets and options that smaller images do not serve."""
    model, report = network(), PruneReport()
    prune(model, data=images(model), benchmark=False, report=report, least=0.05, **options)
    assert not report.resized


def test_noise_judges_no_resolution() -> None:
    """Random data say nothing of what an interpolation loses."""
    report = PruneReport()
    prune(network(), flops=0.6, data="random", benchmark=False, report=report)
    assert not report.resized


def test_training_on_smaller_images() -> None:
    """The original's results are what is trained on, its values on the way where they fit."""
    model, report = network(), PruneReport()
    how: dict[str, Any] = {"recover": Recovery(epochs=2), "least": 0.95}
    result = prune(model, flops=0.6, data=images(model), benchmark=False, report=report, **how)
    assert report.resized
    assert report.training is not None
    assert report.training[1] <= report.training[0]
    record = record_of(result)
    assert record is not None
    assert not any(node.op_type == "Resize" for node in record.teacher.graph)


def test_both_ways_at_once() -> None:
    """Half by smaller images, the rest by channels, refitted to the whole model at that size."""
    model, report = network(), PruneReport()
    half = Resolutions(model, images(model)).between(0.3)
    assert half is not None
    assert half.resized[0].after == "24x24"
    how = Recovery(epochs=0)
    result = prune(
        model, flops=0.2, data=images(model), recover=how, benchmark=False, report=report
    )
    assert report.resized["x"][1] in ("24x24", "20x20", "16x16")
    gone = [name for name, (old, new) in report.families.items() if new < old]
    assert bool(gone or report.ranks) == bool(report.fits)
    Runner(result).run(next(iter(images(model))))


def test_most_to_lose() -> None:
    """A limit on the drop is used up by images where that saves most."""
    model, report = network(), PruneReport()
    prune(model, max_drop=0.1, data=images(model), benchmark=False, report=report)
    assert report.resized
    assert report.drop is not None
    assert report.drop <= 0.1


def test_why_images_stay_as_large() -> None:
    """Weights that fit one size only are named."""
    model, report = network("Identity", 16 * 32 * 32), PruneReport()
    prune(model, flops=0.6, data=images(model), benchmark=False, report=report)
    assert not report.resized
    assert "does not run on smaller images" in report.frozen["x"]


def test_command(tmp_path: Path) -> None:
    """It is said plainly, and can be refused."""
    model = network()
    files.save(model, tmp_path / "net.onnx")
    arrays = np.stack([row["x"] for row in images(model)])
    np.savez(tmp_path / "data.npz", x=arrays)
    command = ["prune", str(tmp_path / "net.onnx"), "--data", str(tmp_path / "data.npz")]
    command += ["--flops", "0.6", "--no-benchmark"]
    runner = CliRunner()
    done = runner.invoke(main, [*command, "-o", str(tmp_path / "small.onnx")])
    assert "x resized from 32x32 to 24x24 inside" in done.output
    done = runner.invoke(main, [*command, "--keep-resolution", "-o", str(tmp_path / "thin.onnx")])
    assert done.exit_code == 0
    assert "resized" not in done.output
