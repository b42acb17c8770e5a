"""Quantization from samples to a model: sketches, ranges, placement, choice, budgets, checks."""

from __future__ import annotations

import importlib
import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from graphopt import files, ir
from graphopt.context import Context
from graphopt.errors import GateError, InputError
from graphopt.losses import measure_loss
from graphopt.optimization import optimize
from graphopt.passes.quantize_static import QuantizeStatic
from graphopt.quantization import Quantization, quantize
from graphopt.quantizer.budget import search
from graphopt.quantizer.calibration import calibrate
from graphopt.quantizer.checking import check_quantized
from graphopt.quantizer.grids import Grid
from graphopt.quantizer.kernels import count_kernels
from graphopt.quantizer.placement import TABLES, plan
from graphopt.quantizer.ranges import METHODS, Ranges, noise
from graphopt.quantizer.scoring import score
from graphopt.quantizer.sketch import Sketch, Sketches
from graphopt.samples import open_samples
from graphopt.shapes import Shapes
from graphopt.target import Target
from tests._architectures import vit
from tests._command import run
from tests._models import images, network, normal, parse
from tests._text import proto

onnx: Any = importlib.import_module("onnx")

Array = npt.NDArray[Any]


def sketch(*parts: Array) -> Sketch:
    """What is kept of arrays."""
    made = Sketch()
    for part in parts:
        made.add(part)
    return made


def test_sketches_merge_by_addition() -> None:
    parts = [np.abs(normal(5000, 1)) * 3, normal(7000, 2), normal(100, 3) * 40, np.zeros(9, "f4")]
    whole, merged = sketch(*parts), Sketch()
    for part in parts:
        merged.merge(sketch(part))
    assert np.array_equal(whole.counts, merged.counts)
    assert (whole.exponent, whole.start, whole.zeros) == (merged.exponent, merged.start, 9)
    together = np.concatenate(parts)
    assert whole.low == together.min() and whole.high == together.max()
    assert whole.total == together.size == whole.counts.sum()
    assert np.isclose(whole.power, np.mean(together.astype(float) ** 2), rtol=1e-4)
    expected = np.histogram(together, whole.edges())[0]
    assert np.abs(expected - whole.counts).max() <= 2  # a value on a border


def test_non_finite_values_are_named() -> None:
    with pytest.raises(InputError, match="'conv1' are not all finite"):
        Sketch().add(np.array([1.0, np.nan], np.float32), "conv1")
    model = parse("g (float[1,4] x) => (float[1,4] y) { a = Log (x)  y = Exp (a) }")
    with pytest.raises(InputError, match="'a' are not all finite"):
        calibrate(model, ["a"], open_samples({"x": np.zeros((3, 4), np.float32)}, model))


def test_squares_beyond_float32_are_finite() -> None:
    assert np.isclose(sketch(np.full(4, 1e30, np.float32)).power, 1e60)


def test_one_outlier_does_not_set_the_range() -> None:
    values = normal(1_000_000)
    values[5] = 40
    seen = sketch(values)
    found = {method: Ranges(method).choose(seen) for method in METHODS}
    assert found["minmax"][1] == 40
    assert 4 < found["entropy"][1] < 6
    assert 3.5 < found["percentile"][1] < 4.5
    assert found["mse"][1] < 25
    assert all(low < 0 < high for low, high in found.values())
    low, high = Ranges("mse").choose(seen, symmetric=True)
    assert low == -high


def test_the_error_is_that_of_rounding() -> None:
    values = np.maximum(normal(100_000, 4), 0)
    seen = sketch(values)
    grid = Grid(ir.DataType.UINT8)
    for method in ("minmax", "mse", "lp"):
        low, high = Ranges(method).choose(seen)
        scale, zero = grid.parameters(low, high)
        rounded = (grid.quantize(values, scale, zero).numpy().astype(float) - zero) * scale
        assert np.isclose(noise(seen, low, high), np.mean((rounded - values) ** 2), rtol=0.1)
    best = noise(seen, *Ranges("mse").choose(seen))
    assert all(best <= noise(seen, *Ranges(m).choose(seen)) * 1.001 for m in METHODS)


def test_calibration_in_groups_and_from_the_cache(tmp_path: Path) -> None:
    model, names = network(), ["x", "a", "r", "s", "y"]
    samples = open_samples(images(), model)
    whole = calibrate(model, names, samples)
    parts = calibrate(model, names, samples, memory_limit=1 << 14, cache=tmp_path)
    merged = Sketches()
    for index in range(3):
        calibrate(model, names, samples.part(index, 3)).save(tmp_path / f"part{index}")
        merged.merge(Sketches.load(tmp_path / f"part{index}"))
    again = calibrate(model, names, samples, memory_limit=1 << 14, cache=tmp_path)
    assert whole.samples == parts.samples == merged.samples == again.samples == 24
    for name in names:
        for found in (parts, merged, again):
            assert np.array_equal(found.tensors[name].counts, whole.tensors[name].counts), name
    file = tmp_path / "s.npz"
    whole.save(file)
    loaded = Sketches.load(file)
    assert loaded.tensors["s"].low == whole.tensors["s"].low
    file.write_bytes(b"nothing")
    with pytest.raises(InputError):
        Sketches.load(file)


def test_calibration_goes_on_where_it_was_cut_off(tmp_path: Path) -> None:
    model = network()
    samples = open_samples(images(), model)
    calibrate(model, ["a"], samples, cache=tmp_path)
    (file,) = tmp_path.iterdir()
    cut = calibrate(model, ["a"], samples.take(10))
    cut.save(file)
    seen: list[str] = []
    result = calibrate(model, ["a"], samples, cache=tmp_path, progress=seen.append)
    assert len(seen) == 14
    assert result.tensors["a"].batches == 24


_CALIBRATES = """
import sys, time
from pathlib import Path
from graphopt.quantizer import calibration
from graphopt.samples import open_samples
from tests._models import images, network
calibration._SAVE_SECONDS = 0.0

def tell(text):
    print(text, flush=True)
    time.sleep(0.02)

model = network()
calibration.calibrate(
    model, ["a"], open_samples(images(400), model), cache=Path(sys.argv[1]), progress=tell
)
"""


def test_a_killed_calibration_goes_on(tmp_path: Path) -> None:
    command = [sys.executable, "-c", _CALIBRATES, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=Path(__file__).parents[1]) as child:
        assert child.stdout is not None
        for _ in range(20):
            assert child.stdout.readline()
        child.send_signal(signal.SIGKILL)
    model = network()
    samples = open_samples(images(400), model)
    seen: list[str] = []
    result = calibrate(model, ["a"], samples, cache=tmp_path, progress=seen.append)
    assert 0 < len(seen) <= 400 - 19
    whole = calibrate(model, ["a"], samples)
    assert np.array_equal(result.tensors["a"].counts, whole.tensors["a"].counts)
    assert result.samples == whole.samples == 400


def test_placement() -> None:
    model = network()
    made = plan(model, Shapes(model), TABLES["ort-x86"])
    assert len(made.linear) == 5
    assert sorted(n.op_type for n in made.others) == [
        *("Add", "Flatten", "GlobalAveragePool", "MaxPool"),
    ]
    shared = [sorted(v.name or "" for v in g) for g in made.groups if len(g) > 1]
    assert shared == [["m", "t"], ["f", "p"]]
    assert {v.name for v in made.bounds} == {"r", "k", "t"}
    kept = plan(model, Shapes(model), TABLES["ort-x86"], [ir.label(n) for n in list(made.linear)])
    assert not kept.linear and not kept.groups
    inputs = plan(model, Shapes(model), TABLES["tensorrt"])
    names = {v.name for v in inputs.tensors}
    assert names == {"x", "r", "k", "m", "f"} and not inputs.made


@pytest.mark.parametrize(("value", "together"), [(0.0, True), (-9.0, False)])
def test_zeros_beside_a_tensor_share_its_scale(value: float, *, together: bool) -> None:
    made: Any = proto(
        "net (float[1,4,8,8] x) => (float[1,8,4,4] y) {"
        "  a = Conv <kernel_shape = [1, 1]> (x, w)"
        "  b = Conv <kernel_shape = [1, 1], strides = [2, 2]> (a, v)"
        "  s = MaxPool <kernel_shape = [1, 1], strides = [2, 2]> (a)"
        "  p = Pad (s, pads, value)  c = Add (b, p)"
        "  y = Conv <kernel_shape = [1, 1]> (c, u) }"
    )
    constants: dict[str, Array] = {
        "w": normal(16).reshape(4, 4, 1, 1),
        "v": normal(32, 1).reshape(8, 4, 1, 1),
        "u": normal(64, 2).reshape(8, 8, 1, 1),
        "pads": np.array([0, 2, 0, 0, 0, 2, 0, 0]),
        "value": np.array(value, np.float32),
    }
    made.graph.initializer.extend(onnx.numpy_helper.from_array(a, n) for n, a in constants.items())
    model = files.load(made)
    report = Quantization()
    data = {"x": normal(24 * 256, 7).reshape(24, 1, 4, 8, 8)}
    result = quantize(model, data, force=True, seconds=0, report=report)
    assert not check_quantized(result, TABLES["ort-x86"])
    shared = plan(model, Shapes(model), TABLES["ort-x86"]).groups
    assert any({v.name for v in group} >= {"s", "p"} for group in shared) == together
    assert report.score is not None and report.score.sqnr_db is not None
    assert report.score.sqnr_db > 30


def upsampler() -> ir.Model:
    """A transposed convolution with two groups between convolutions, one in branches of an If."""
    made: Any = proto(
        "net (float[1,4,6,6] x, bool flag) => (float[1,4,12,12] y, float[1,4,6,6] z) {"
        "  a = Conv (x, w)"
        "  b = ConvTranspose <group = 2, strides = [2, 2]> (a, v)"
        "  y = Conv (b, w)"
        "  z = If (flag) <then_branch = yes () => (float[1,4,6,6] p) { p = Conv (x, u) },"
        "    else_branch = no () => (float[1,4,6,6] q) { q = Neg (x) }> }"
    )
    shapes = {"w": (4, 4, 1, 1), "u": (4, 4, 1, 1), "v": (4, 2, 2, 2)}
    for seed, (name, shape) in enumerate(shapes.items()):
        array = normal(int(np.prod(shape)), seed).reshape(shape)
        made.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    return files.load(made)


def upsampled() -> dict[str, Array]:
    """Samples for it."""
    x = normal(12 * 144, 9).reshape(12, 1, 4, 6, 6)
    return {"x": x, "flag": np.array([i % 2 == 0 for i in range(12)])}


@pytest.mark.parametrize("placement", ["ort-x86", "tensorrt"])
def test_transposed_convolutions_and_bodies(placement: str) -> None:
    report = Quantization()
    options = QuantizeStatic(placement=placement)
    result = quantize(
        upsampler(), upsampled(), options=options, force=True, seconds=0, report=report
    )
    assert not check_quantized(result, TABLES[placement])
    (node,) = (n for n in result.graph if n.op_type == "ConvTranspose")
    source = node.inputs[1] and node.inputs[1].producer()
    assert (source is not None) == (placement == "tensorrt")  # ONNX Runtime has no such kernel
    assert any("1 of its operators are in bodies of If or Loop" in note for note in report.notes)
    assert report.score is not None and (report.score.sqnr_db or 0) > 30


def test_no_options() -> None:
    report = Quantization()
    model = network()
    result = quantize(model, images(), force=True, seconds=0.05, report=report)
    assert report.method == "static" and report.placement == "ort-x86"
    assert report.score is not None and report.score.sqnr_db is not None
    assert report.score.sqnr_db > 25
    assert report.kernels is not None
    assert (report.kernels.integer, report.kernels.floats) == (5, ())
    assert not check_quantized(result, TABLES["ort-x86"])
    assert check_quantized(result, TABLES["tensorrt"])
    assert [v.name for v in result.graph.inputs] == ["x"]
    assert [v.name for v in result.graph.outputs] == ["y"]
    assert report.bytes_after < report.bytes_before / 2
    assert json.dumps(report.to_dict(), allow_nan=False)
    assert "QuantizeLinear" not in {n.op_type for n in model.graph}


@pytest.mark.parametrize("placement", sorted(TABLES))
def test_every_placement_passes_its_own_check(placement: str) -> None:
    from graphopt import optimize

    model = network()
    text = f"quantize-static{{placement={placement},rounding=nearest}}"
    result = optimize(model, passes=text, data=images(), verify="off")
    assert not check_quantized(result, TABLES[placement])
    found = score(model, result, open_samples(images(), model)).sqnr_db
    assert found is not None and found > 20


@pytest.mark.parametrize(
    ("activations", "weights", "least"),
    [
        *(("uint16", "int8", 30), ("int16", "int16", 40), ("uint8", "int4", 5)),
        *(("e4m3", "e4m3", 20), ("e5m2", "e5m2", 14), ("uint8", "e5m2", 20)),
    ],
)
def test_types(activations: str, weights: str, least: float) -> None:
    from graphopt import optimize

    model = network()
    text = f"quantize-static{{activations={activations},weights={weights}}}"
    result = optimize(model, passes=text, data=images(), verify="off")
    # With ONNX Runtime's optimizations, and without any.
    assert (score(model, result, open_samples(images(), model)).sqnr_db or 0) > least
    found = measure_loss("types", model, result, open_samples(images(), model)).sqnr_db
    assert found is not None and found > least


def test_no_runtime_multiplies_by_two_bits() -> None:
    with pytest.raises(InputError, match="store them so by quantize-weights"):
        quantize(network(), images(), options=QuantizeStatic(weights="int2"))


@pytest.mark.parametrize("activations", ["", "int16"])
def test_scales_are_powers_of_two(activations: str) -> None:
    report = Quantization()
    options = QuantizeStatic(power_of_two=True, activations=activations)
    result = quantize(network(), images(), options=options, force=True, seconds=0, report=report)
    table = options.table(Context(result, target=Target.parse("cpu"))).powers_of_two()
    assert "power-of-two" not in {v.rule for v in check_quantized(result, table)}
    assert report.score is not None and (report.score.sqnr_db or 0) > 20
    plain = quantize(network(), images(), force=True, seconds=0)
    assert {v.rule for v in check_quantized(plain, TABLES["ort-x86"].powers_of_two())} == {
        "power-of-two"
    }


def test_a_large_model_goes_one_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("graphopt.quantizer.measuring._LARGE", 0)
    report = Quantization()
    quantize(network(), images(), force=True, seconds=0.01, report=report)
    assert report.steps == ["quantize-static"]
    assert report.ratio is not None  # read from files
    assert any("more than 1 GB" in note for note in report.notes)
    assert report.score is not None and (report.score.sqnr_db or 0) > 20


def test_slower_is_refused() -> None:
    chain = " ".join(f"t{i} = Tanh (h{i})  h{i + 1} = MatMul (t{i}, w)" for i in range(20))
    made: Any = proto(
        f"net (float[1,4] x) => (float[1,4] y) {{ h0 = Neg (x)  {chain}  y = Neg (h20) }}"
    )
    made.graph.initializer.append(onnx.numpy_helper.from_array(normal(16).reshape(4, 4), "w"))
    model = files.load(made)
    report = Quantization()
    result = quantize(model, {"x": normal(64).reshape(16, 4)}, report=report, seconds=0.1)
    assert "not faster" in report.refused and report.ratio is not None
    assert "QuantizeLinear" not in {n.op_type for n in result.graph}
    with pytest.raises(InputError, match="a method is one of"):
        quantize(model, {"x": normal(64).reshape(16, 4)}, method="other")  # pyright: ignore


def test_floats_of_16_bits_are_widened_first() -> None:
    half = optimize(network(), passes="convert-float16{keep_io=False}")
    assert half.graph.inputs[0].dtype == ir.DataType.FLOAT16
    data = {name: array.astype(np.float16) for name, array in images().items()}
    report = Quantization()
    result = quantize(half, data, force=True, seconds=0, report=report)
    assert "QuantizeLinear" in {node.op_type for node in result.graph}
    assert result.graph.inputs[0].dtype == ir.DataType.FLOAT16
    assert report.score is not None and (report.score.sqnr_db or 0) > 20
    assert any("16 bits are float32 first" in note for note in report.notes)
    data = {name: array[:2] for name, array in data.items()}
    left = quantize(half, data, method="dynamic", seconds=0)
    weights = {ir.constant(n.inputs[1]) for n in left.graph if n.op_type == "Conv"}
    assert {tensor.dtype for tensor in weights if tensor is not None} == {ir.DataType.FLOAT16}


@pytest.mark.parametrize(
    ("body", "method", "reason"),
    [
        ("y = Tanh (x)", "static", "no convolutions and no products with weights"),
        ("d = Cast <to = 11> (x) p = MatMul (d, w) y = Cast <to = 1> (p)", "static", "are DOUBLE"),
        ("h = Cast <to = 1> (w) y = MatMul (x, h)", "dynamic", "dynamic takes none of its weights"),
    ],
)
def test_why_nothing_is_quantized(body: str, method: Any, reason: str) -> None:
    made: Any = proto(f"net (float[1,4] x) => (float[1,4] y) {{ {body} }}")
    weights = normal(16).reshape(4, 4).astype(np.float64)
    made.graph.initializer.append(onnx.numpy_helper.from_array(weights, "w"))
    report = Quantization()
    data = {"x": normal(16).reshape(4, 1, 4)}
    quantize(files.load(made), data, method=method, seconds=0, report=report)
    assert reason in report.refused


def test_scores_as_maps_and_rows_of_biases() -> None:
    """What converters of scikit-learn write: biases [1, n], and a ZipMap at the end."""
    made: Any = onnx.parser.parse_model("""
        <ir_version: 10, opset_import: ["" : 20, "ai.onnx.ml" : 1]>
        net (float[N,4] x) => (seq(map(int64, float)) scores) <float[1,3] b = {1, 2, 3}> {
          h = MatMul (x, w)  a = Add (h, b)  p = Softmax (a)
          scores = ai.onnx.ml.ZipMap <classlabels_int64s = [0, 1, 2]> (p)
        }""")
    weights = normal(12).reshape(4, 3)
    made.graph.initializer.append(onnx.numpy_helper.from_array(weights, "w"))
    report = Quantization()
    data = {"x": normal(64).reshape(16, 1, 4)}
    result = quantize(files.load(made), data, method="static", force=True, seconds=0, report=report)
    assert "QuantizeLinear" in {node.op_type for node in result.graph}
    assert "p" in {layer.name for layer in report.layers}


def test_a_tiny_transformer_is_quantized_only_where_it_gains() -> None:
    """At 17 tokens of 16 channels rounding costs what integers gain: floats stay, with figures."""
    report = Quantization()
    model = files.load(vit(16))
    result = quantize(model, {"x": normal(8 * 768).reshape(8, 1, 3, 16, 16)}, report=report)
    assert report.ratio is not None
    integers = any(node.op_type == "MatMulInteger" for node in result.graph)
    assert integers == (not report.refused) == (report.ratio < 0.97)
    assert integers or (f"floats {report.milliseconds_before:.3g} ms" in report.refused)


def test_budget() -> None:
    assert search("abcdef", lambda kept: len(kept) >= 3) == ["a", "b", "c"]
    assert search("abc", lambda kept: True) == []
    assert search("abc", lambda kept: False) is None
    model, data = network(), images()

    def metric(outputs: Any, labels: Any) -> float:
        """Close to the float model: its own answers are the truth."""
        values = np.concatenate([next(iter(o.values())) for o in outputs])
        return -float(np.abs(values - truth).mean())

    samples = open_samples(data, model)
    from graphopt.runner import Runner

    runner = Runner(model)
    truth = np.concatenate([runner.run(f)["y"] for f in samples])
    plain = Quantization()
    quantize(model, data, metric=metric, force=True, seconds=0, report=plain)
    assert plain.score is not None and plain.score.after is not None
    limit = -plain.score.after * 0.8
    report = Quantization()
    quantize(model, data, metric=metric, max_drop=limit, force=True, seconds=0, report=report)
    assert report.kept and report.score is not None and report.score.after is not None
    assert -report.score.after <= limit
    assert list(report.sensitivity.values()) == sorted(report.sensitivity.values(), reverse=True)
    with pytest.raises(GateError, match="bytes"):
        quantize(model, data, max_size=100, force=True, seconds=0)
    with pytest.raises(GateError, match="was not measured"):
        quantize(model, data, max_latency=1e-6, force=True, seconds=0)


def test_a_budget_of_dynamic_quantization() -> None:
    """Products with constant weights alone are ranked, and the worst of them stays in floats."""
    rng = np.random.default_rng(0)
    made: Any = proto(
        "net (float[N,64] x) => (float[N,32] y) "
        "{ a = MatMul(x, w) b = Transpose(a) c = MatMul(b, a) d = MatMul(a, c) y = MatMul(d, v) }"
    )
    for name, shape in (("w", (64, 64)), ("v", (64, 32))):
        weights = rng.standard_normal(shape) * np.exp(rng.standard_normal(shape))
        tensor = ir.tensor(weights.astype(np.float32), name=name)
        made.graph.initializer.append(ir.to_proto(tensor))
    x = normal(64 * 64).reshape(64, 64)
    report = Quantization()
    found = quantize(
        files.load(made), x, method="dynamic", max_drop=0.0, force=True, seconds=0, report=report
    )
    assert len(report.sensitivity) == 2 and report.kept
    assert sum(node.op_type == "MatMulInteger" for node in found.graph) == 2 - len(report.kept)


def test_kernels_are_the_runtimes() -> None:
    found = count_kernels(network())
    assert found.integer == 0 and found.total == 5


def test_command(tmp_path: Path) -> None:
    files.save(network(), tmp_path / "m.onnx")
    np.savez(tmp_path / "d.npz", x=images()["x"], labels=np.zeros(24, np.int64))
    out = tmp_path / "q.onnx"
    base = ["quantize", tmp_path / "m.onnx", "--data", tmp_path / "d.npz", "--no-cache"]
    code, text = run(*base, "-o", out, "--force", "--seconds", 0.05)
    assert code == 0 and "integer kernels" in text and "5 of 5" in text and out.exists()
    assert "metric" in text and "layers with the most noise" in text
    code, text = run(*base, "-o", out)
    assert code == 2 and "exists" in text
    code, text = run(*base, "--dry-run", "--force", "--seconds", 0, "--json", "-")
    assert code == 0 and json.loads(text)["kernels"]["integer"] == 5
    assert run(*base)[0] == 2
    assert run("check", out)[0] == 0
    code, text = run("check", out, "--target", "cuda")
    assert code == 1 and "activation-type" in text
    code, text = run("check", out, "--placement", "nothing")
    assert code == 2 and "ort-x86" in text
    for bad in (["--ranges", "x"], ["--weights", "x"], ["--metric", "nothing.py:f"]):
        code, text = run(*base, "-o", tmp_path / "n.onnx", *bad)
        assert code == 2, (bad, text)
    code, text = run("quantize", tmp_path / "m.onnx", "--data", "nothing", "--dry-run")
    assert code == 2 and "does not exist" in text


def test_command_for_powers_of_two(tmp_path: Path) -> None:
    files.save(network(), tmp_path / "m.onnx")
    np.savez(tmp_path / "d.npz", x=images()["x"])
    out = tmp_path / "q.onnx"
    base = ["quantize", tmp_path / "m.onnx", "--data", tmp_path / "d.npz", "--no-cache"]
    base += ["--seconds", 0, "--force", "--overwrite", "-o", out]
    assert run(*base, "--power-of-two")[0] == 0
    assert "power-of-two" not in run("check", out, "--power-of-two")[1]
    assert run(*base)[0] == 0
    code, text = run("check", out, "--power-of-two")
    assert code == 1 and "its scale is no power of two" in text
    code, text = run(*base, "--method", "weights", "--power-of-two")
    assert code == 2 and "--power-of-two is not for --method weights" in text


def test_repair_command(tmp_path: Path) -> None:
    from graphopt import optimize

    text = "quantize-static{placement=tensorrt,rounding=nearest}"
    foreign = optimize(network(), passes=text, data=images(), verify="off")
    files.save(foreign, tmp_path / "t.onnx")
    before = len(check_quantized(foreign, TABLES["ort-x86"]))
    run("check", tmp_path / "t.onnx", "--repair", tmp_path / "r.onnx")
    repaired = files.load(tmp_path / "r.onnx")
    assert len(check_quantized(repaired, TABLES["ort-x86"])) < before / 2
    assert count_kernels(repaired).integer > count_kernels(foreign).integer
