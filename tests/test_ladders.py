"""Budgets: sensitivity from kept prefixes, rungs between 8 bits and floats, weights, the page."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from graphopt import files, ir, optimization
from graphopt.cli import main
from graphopt.context import Context
from graphopt.errors import InputError
from graphopt.ir import Array
from graphopt.passes.quantize_dynamic import QuantizeDynamic
from graphopt.passes.quantize_static import QuantizeStatic
from graphopt.passes.quantize_weights import QuantizeWeights
from graphopt.quantization import Quantization, quantize
from graphopt.quantizer.placement import TABLES
from graphopt.quantizer.ranges import Ranges
from graphopt.quantizer.scoring import score
from graphopt.quantizer.sensitivity import sensitivity
from graphopt.quantizer.static import Static
from graphopt.runner import Runner
from graphopt.samples import open_samples
from tests._models import images, network, parse


def distance(model: ir.Model) -> Callable[[Any, Any], float]:
    """A metric: how close outputs are to a model's own, negative."""
    runner = Runner(model)
    truth = np.concatenate([runner.run(f)["y"] for f in open_samples(images(), model)])

    def metric(outputs: Any, labels: Any) -> float:
        values = np.concatenate([o["y"] for o in outputs])
        return -float(np.square(values - truth).mean())

    return metric


def constant(value: Any) -> Callable[[Any, Any], Any]:
    """A metric that looks at nothing."""

    def metric(outputs: Any, labels: Any) -> Any:
        return value

    return metric


def drop(channels: int = 16, **how: Any) -> tuple[Quantization, ir.Model]:
    """The report and the result of a quantization of `network`."""
    report = Quantization()
    result = quantize(network(channels), images(), force=True, seconds=0, report=report, **how)
    return report, result


def test_sensitivity_is_that_of_whole_runs() -> None:
    base = optimization.optimize(network(), level=2)
    samples = open_samples(images(6), base)
    static = Static(base, TABLES["ort-x86"], samples, Ranges("minmax"))
    names = [ir.label(n) for n in static.plan(base, Context(base).shapes).linear]

    def alone(name: str) -> ir.Model:
        context = Context(files.copy(base))
        static.insert(context, set(names) - {name})
        return context.model

    floats = Runner(base, optimize=True)
    whole = {name: score(floats, alone(name), samples).noise for name in names}
    for limit in (1, 1 << 28):
        found = dict(sensitivity(base, names, alone, samples, memory_limit=limit))
        assert list(found) == names
        assert np.allclose(list(found.values()), list(whole.values()), rtol=1e-2)


@pytest.mark.parametrize(
    ("fallback", "kind", "target"),
    [
        ("int16", "UINT16", "cpu"),
        ("float16", "FLOAT16", "cpu"),
        ("bfloat16", "BFLOAT16", "cuda:sm_80"),
    ],
)
def test_rungs(fallback: Any, kind: str, target: str) -> None:
    metric = distance(network())
    plain, _ = drop(metric=metric, max_drop=1e9, target=target)
    limit = plain.tried[0][2] * 0.7
    report, result = drop(metric=metric, max_drop=limit, fallback=fallback, target=target)
    assert report.rung == fallback and report.kept
    assert report.score is not None and report.score.after is not None
    assert -report.score.after <= limit
    types = {tensor.dtype.name for tensor in ir.constants(result)}
    assert {kind, "INT8"} <= types
    assert [rung for rung, _, _ in report.tried].count(fallback) >= 2


def test_bfloat16_is_for_targets_that_run_it() -> None:
    """Weights that were bfloat16 go back to it; a runtime without kernels for it is an error."""
    for target in ("cpu", "cuda:sm_75"):
        with pytest.raises(InputError, match="has no bfloat16 kernels"):
            drop(fallback="bfloat16", target=target, max_drop=1.0)
    short = optimization.optimize(network(), passes="convert-bfloat16", verify="off")
    report = Quantization()
    metric = distance(network())
    quantize(
        short, images(), metric=metric, max_drop=1e-6, target="cuda:sm_80", seconds=0, report=report
    )
    assert report.tried[1][0] == "bfloat16"


@pytest.mark.parametrize("options", [QuantizeStatic, QuantizeWeights])
def test_patterns_keep_what_they_fit(options: Any) -> None:
    """Operators by type and by pattern, and nothing of what these fit becomes integers."""
    _, whole = drop(64, options=options())
    _, less = drop(64, options=options(keep=("Conv", "Gem*->y")))
    kinds = [{t.dtype.name for t in ir.constants(model) if t.size > 64} for model in (whole, less)]
    assert kinds[0] & {"INT8", "UINT4"} and kinds[1] <= {"FLOAT"}, kinds


def test_names_that_fit_nothing_are_errors() -> None:
    with pytest.raises(InputError, match="no node is named 'nothing'"):
        drop(options=QuantizeStatic(keep=("nothing",)))
    with pytest.raises(InputError, match="fall back to"):
        drop(fallback="int7")
    with pytest.raises(InputError, match="the metric gives str, no number"):
        drop(metric=constant("good"))
    with pytest.raises(InputError, match="the metric gives nan"):
        drop(metric=constant(float("nan")))


def test_weights_alone() -> None:
    options = QuantizeWeights(bits=4, method="rtn")
    report, result = drop(32, options=options)
    assert report.method == "weights" and report.score is not None
    plain = report.score.sqnr_db
    metric = distance(network(32))
    report, _ = drop(32, options=options, metric=metric)
    assert report.score is not None and report.score.after is not None
    report, result = drop(32, options=options, metric=metric, max_drop=-report.score.after * 0.999)
    assert report.rung == "int8" and report.kept and report.score is not None
    assert plain is not None and (report.score.sqnr_db or 0) > plain
    assert {"UINT4", "UINT8"} <= {tensor.dtype.name for tensor in ir.constants(result)}


def test_the_page_shows_layers_ranges_and_sensitivity(tmp_path: Path) -> None:
    files.save(network(), tmp_path / "<m>.onnx")
    np.savez(tmp_path / "d.npz", x=images()["x"])
    page = tmp_path / "r.html"
    base = ["quantize", tmp_path / "<m>.onnx", "--data", tmp_path / "d.npz", "--no-cache"]
    how = ["-o", tmp_path / "q.onnx", "--force", "--seconds", "0", "--report", page]
    done = CliRunner().invoke(main, [*map(str, [*base, *how])])
    assert done.exit_code == 0, done.output
    text = page.read_text(encoding="utf-8")
    assert "<m>" not in text and "&lt;m&gt;" in text
    for title in ("Layers", "Sensitivity", "Activations and their ranges", "Weights and their"):
        assert title in text
    assert text.count("<svg") > 15 and not re.search(r"https?:|<script", text)
    assert len(re.findall(r">high [\d.]", text)) >= 10
    again = CliRunner().invoke(main, [*map(str, [*base, "--dry-run", "--report", page])])
    assert again.exit_code == 2 and "exists" in again.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "weights", "--weights", "int3"], "stored as int2"),
        (["--method", "weights", "--placement", "tvm"], "--placement is not for"),
        (["--method", "dynamic", "--ranges", "mse"], "--ranges is not for"),
        (["--keep", "nothing"], "no node is named"),
        (["--metric", "f.py:bad"], "f.py:bad: fails with ZeroDivisionError"),
    ],
)
def test_bad_options(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    files.save(network(), Path("m.onnx"))
    np.savez("d.npz", x=images(2)["x"])
    Path("f.py").write_text("def bad(outputs, labels):\n    return 1 / 0\n")
    base = ["quantize", "m.onnx", "--data", "d.npz", "--dry-run", "--no-cache", *arguments]
    done = CliRunner().invoke(main, base)
    assert done.exit_code == 2 and message in done.output, done.output
    assert done.output.count("\n") == 1


@pytest.mark.parametrize(
    ("method", "wanted"), [("static", "which stay as they are"), ("auto", "rounded to nearest")]
)
def test_what_stays_in_bodies_is_said(method: Any, wanted: str) -> None:
    made = parse(
        "net (bool c, float[1,4] x) => (float[1,4] y) {"
        " y = If (c) <then_branch = one () => (float[1,4] a) { w = Constant <value = float[4,4] {"
        f" {', '.join(['1'] * 16)} }}> () a = MatMul (x, w) }},"
        " else_branch = two () => (float[1,4] b) { b = Neg (x) }> }"
    )
    data = [{"c": np.array(True), "x": np.ones((1, 4), np.float32)}]
    report = Quantization()
    result = quantize(made, data, method=method, seconds=0, report=report)
    assert report.refused.startswith("1 of its operators are in bodies of If or Loop")
    assert wanted in report.refused
    assert [node.op_type for node in result.graph] == ["If"]


def a_loop() -> tuple[ir.Model, list[dict[str, Array]]]:
    """A product in a body, with the weights of the graph around it; samples."""
    weights = np.random.default_rng(1).standard_normal(1024) / 6
    made = parse(
        "net (int64 times, float[2,32] x) => (float[2,32] y) <float[32,32] w = {"
        f" {', '.join(f'{w:.4f}' for w in weights)} }}>"
        " { keep = Constant <value = bool {1}> () y = Loop (times, keep, x) <body = one"
        " (int64 i, bool c, float[2,32] s) => (bool d, float[2,32] t) { d = Identity (c)"
        " [inside] m = MatMul (s, w) t = Tanh (m) }> }"
    )
    x = np.random.default_rng(0).standard_normal((6, 2, 32)).astype(np.float32)
    return made, [{"times": np.array(3), "x": rows} for rows in x]


def test_what_is_kept_may_be_in_a_loop() -> None:
    made, data = a_loop()
    report = Quantization()
    options = QuantizeDynamic(keep=("inside",))
    quantize(made, data, method="dynamic", options=options, seconds=0, report=report)
    assert report.refused


@pytest.mark.parametrize("method", ["dynamic", "weights"])
def test_a_loop_is_quantized_inside(method: Any) -> None:
    """Products of a body, with the weights of a loop's own and of the graph around it."""
    made, data = a_loop()
    report = Quantization()
    result = quantize(made, data, method=method, force=True, seconds=0, report=report)
    kinds = {node.op_type for node in ir.nested_nodes(result)}
    assert "Loop" in kinds and kinds & {"MatMulInteger", "MatMulNBits"}
    assert report.bytes_after < 0.4 * report.bytes_before
    assert report.score is not None and (report.score.sqnr_db or 0) > (30, 6)[method == "weights"]
