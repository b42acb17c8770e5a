"""`graphopt prune`, `graphopt.prune` and the passes: figures, limits, recovery, bad input."""

from __future__ import annotations

import importlib
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from click.testing import CliRunner

import graphopt
from graphopt import files, ir, models
from graphopt.cli import main
from graphopt.errors import GateError, InputError
from graphopt.pruner.gradients import Tape
from graphopt.pruner.groups import find_groups
from graphopt.pruner.preparing import prepare
from graphopt.pruner.pruning import Options, prune_once
from graphopt.pruner.records import record_of
from graphopt.pruner.recovery import Recovery, recover
from graphopt.pruner.sensitivity import gap
from graphopt.pruner.slopes import by_changes, by_gradients
from graphopt.pruning import PruneReport, prune
from graphopt.report import Report
from graphopt.runner import Runner
from graphopt.samples import Samples, open_samples
from tests._architectures import ARCHITECTURES
from tests._models import normal, parse
from tests._text import proto

onnx: Any = importlib.import_module("onnx")

CNN = models.path("digits_cnn")
TEST = CNN.parent / "digits_test.npz"
FITTED = Recovery(epochs=0)


def digits() -> dict[str, ir.Array]:
    """Inputs and labels of the test set that comes with the project."""
    with np.load(TEST) as arrays:
        return {name: arrays[name] for name in arrays.files}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first half of the digits, without labels."""
    arrays = digits()
    arrays.pop("labels")
    path = tmp_path_factory.mktemp("data") / "calibration.npz"
    halves: dict[str, Any] = {name: array[: len(array) // 2] for name, array in arrays.items()}
    np.savez(path, **halves)
    return path


def accuracy(model: ir.Model) -> float:
    """On the other half of the digits."""
    arrays = digits()
    labels = arrays.pop("labels")
    half = len(labels) // 2
    runner = Runner(model)
    (name,) = runner.inputs
    scores: npt.NDArray[np.float32] = runner.run({name: arrays[name][half:]})[runner.outputs[0]]
    hits = scores.reshape(len(labels) - half, -1).argmax(1) == labels[half:]
    return float(np.count_nonzero(hits)) / len(hits)


def test_recovery_brings_accuracy_back(data: Path) -> None:
    """Half the channels of the digits' network, on data without labels."""
    whole = accuracy(files.load(CNN))
    raw = accuracy(prune(CNN, ratio=0.5, benchmark=False))
    report = PruneReport()
    model = prune(CNN, ratio=0.5, data=data, recover=FITTED, benchmark=False, report=report)
    assert accuracy(model) > max(raw, whole - 0.03)
    assert report.fits
    assert all(fit.after <= fit.before for fit in report.fits)
    assert report.masked_error is not None
    assert report.masked_error < 1e-5
    assert report.loss is not None


def test_training_comes_closer(data: Path) -> None:
    """A few epochs on the original's outputs lower the error; nothing is worse afterwards."""
    report = PruneReport()
    how = Recovery(epochs=2)
    prune(CNN, ratio=0.6, data=data, recover=how, benchmark=False, report=report)
    assert report.training is not None
    assert report.training[1] <= report.training[0]


@pytest.mark.parametrize("scope", ["uniform", "sensitivity"])
def test_budgets(scope: str, data: Path, tmp_path: Path) -> None:
    """What is asked for is met, and barely so."""
    for budget in ("params", "flops", "size"):
        report = PruneReport()
        scan = str(tmp_path / "scan.json")
        prune(
            CNN,
            scope=scope,
            data=data,
            benchmark=False,
            report=report,
            scan=scan,
            round_to=1,
            **{budget: 0.6},  # type: ignore[arg-type]
        )
        assert report.before is not None
        assert report.after is not None
        name = {"params": "parameters", "size": "bytes"}.get(budget, budget)
        assert 0.45 < getattr(report.after, name) / getattr(report.before, name) <= 0.6
    if scope == "sensitivity":
        assert json.loads((tmp_path / "scan.json").read_text())["curves"]
        (tmp_path / "scan.json").write_text("{}")
        with pytest.raises(InputError, match="holds no sensitivity scan"):
            prune(CNN, scope=scope, data=data, scan=str(tmp_path / "scan.json"), benchmark=False)


def test_operations_are_those_of_the_samples() -> None:
    """Of a model with free sizes, which a strided layer would shrink to nothing if they were 1."""
    made: Any = proto(
        "net (float[N,3,H,W] x) => (float[N,2] y) {"
        "  a = Conv <strides = [4, 4]> (x, w)  b = Relu (a)  c = Conv <strides = [2, 2]> (b, v)"
        "  p = GlobalAveragePool (c)  f = Flatten (p)  y = MatMul (f, m) }"
    )
    shapes = {"w": (16, 3, 4, 4), "v": (16, 16, 2, 2), "m": (16, 2)}
    for seed, (name, shape) in enumerate(shapes.items()):
        array = normal(math.prod(shape), seed).reshape(shape)
        made.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    counted: list[int] = []
    for size in (16, 32):
        report = PruneReport()
        data = {"x": normal(8 * 3 * size * size).reshape(8, 1, 3, size, size)}
        prune(made, flops=0.6, scope="sensitivity", data=data, benchmark=False, report=report)
        assert report.before is not None and report.after is not None
        assert report.after.flops <= 0.6 * report.before.flops
        counted.append(report.before.flops)
    assert counted[1] > 3.5 * counted[0]


def test_sizes_that_another_tensor_lends() -> None:
    """Resized to the shape of a tensor that had as many channels, and has fewer now."""
    made: Any = proto(
        "net (float[1,3,H,W] x) => (float[1,2,H,W] y) {"
        "  a = Conv (x, w)  p = MaxPool <kernel_shape = [2, 2], strides = [2, 2]> (x)"
        "  b = Conv (p, v)  s = Shape (a)  r = Resize (b, , , s)  c = Concat <axis = 1> (a, r)"
        "  y = Conv (c, m) }"
    )
    shapes = {"w": (8, 3, 1, 1), "v": (8, 3, 1, 1), "m": (2, 16, 1, 1)}
    for seed, (name, shape) in enumerate(shapes.items()):
        array = normal(math.prod(shape), seed).reshape(shape)
        made.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    thin = prune(made, ratio=0.5, ignore=["v"], benchmark=False)
    found = Runner(thin).run({"x": normal(3 * 48).reshape(1, 3, 6, 8)})
    assert found["y"].shape == (1, 2, 6, 8)


def test_layers_become_two(data: Path) -> None:
    """A budget with recovery may take ranks; what is left is counted right and accurate."""
    report = PruneReport()
    how: dict[str, Any] = {"data": data, "recover": FITTED, "benchmark": False, "report": report}
    model = prune(CNN, params=0.5, **how)
    assert report.ranks
    assert all(rank < full for full, rank in report.ranks.values())
    assert report.before is not None
    assert report.after is not None
    assert report.after.parameters <= 0.5 * report.before.parameters
    held = [value.const_value for value in model.graph.initializers.values()]
    size = sum(t.size for t in held if t is not None and t.dtype == ir.DataType.FLOAT)
    assert size == pytest.approx(report.after.parameters, rel=0.02)
    assert accuracy(model) > accuracy(files.load(CNN)) - 0.02
    record = record_of(model)
    assert record is not None
    assert not record.ranks
    left = PruneReport()
    how["report"] = left
    prune(CNN, params=0.8, **how, ignore=["block2*"])
    assert not any(name.startswith("block2") for name in left.ranks)


@pytest.mark.parametrize("criterion", ["activation", "apoz", "hessian", "reconstruction", "taylor"])
def test_criteria_on_data(criterion: str, data: Path) -> None:
    """All of them choose, from what the data do."""
    report = PruneReport()
    prune(CNN, criterion=criterion, data=data, benchmark=False, report=report, ratio=0.3)
    assert report.masked_error is not None
    assert report.masked_error < 1e-5


def test_gradients_rank_as_changes_do(data: Path) -> None:
    """What a group's loss does by first order is what a small change of it does."""
    model = files.load(CNN)
    prepare(model)
    groups = find_groups(model)
    samples = open_samples(str(data), model)
    one = by_gradients(groups, samples.take(160), lambda text: None)
    other = by_changes(groups, samples.take(48), lambda text: None)
    for family in groups.families:
        ranks = [np.argsort(np.argsort(scores[family.roots])) for scores in (one, other)]
        correlation: np.ndarray[Any, Any] = np.corrcoef(ranks)
        assert correlation[0, 1] > 0.8


def test_limits(data: Path) -> None:
    """A drop is kept to, or it fails as a gate does."""
    report = PruneReport()
    told: list[str] = []
    how: dict[str, Any] = {"recover": FITTED, "benchmark": False, "progress": told.append}
    prune(CNN, max_drop=0.1, data=data, report=report, **how)
    assert report.drop is not None
    assert report.drop <= 0.1
    assert report.source == str(CNN)
    assert sum(text.startswith("trying ratio") for text in told) > 1
    assert told.count("ranking by reconstruction") == 1
    with pytest.raises(GateError, match="more than"):
        prune(CNN, flops=0.3, max_drop=0.001, data=data, benchmark=False)
    with pytest.raises(GateError, match="latency of 1% cannot be reached"):
        prune(CNN, latency=0.01, least=0.6)


def test_rounds(data: Path) -> None:
    """Two rounds end where one does; what is left is known by the first model's numbers."""
    report = PruneReport()
    model = prune(CNN, ratio=0.5, iterations=2, data=data, recover=FITTED, benchmark=False)
    prune(CNN, ratio=0.5, iterations=2, data=data, benchmark=False, report=report)
    record = record_of(model)
    assert record is not None
    assert report.after is not None
    assert report.before is not None
    assert report.after.parameters < 0.5 * report.before.parameters
    for name, axes in record.kept.items():
        value = model.graph.initializers.get(name)
        if value is not None and value.const_value is not None:
            for axis, positions in axes.items():
                assert value.const_value.shape.numpy()[axis] == len(positions)


def test_passes(data: Path) -> None:
    """Pruning and recovery in one pipeline with fusion and quantization; each is measured."""
    report = Report()
    text = (
        "fold-shapes,prune-channels{ratio=0.5},recover{samples=200,epochs=1},"
        "fuse-conv-batchnorm,quantize-static"
    )
    model = graphopt.optimize(CNN, passes=text, data=str(data), report=report)
    assert [loss.name for loss in report.losses][:2] == ["prune-channels", "recover"]
    first, whole = report.losses[0].sqnr_db, report.losses[-1].sqnr_db
    assert report.losses[-1].name == "all"
    assert first is not None
    assert whole is not None
    assert whole > first
    assert accuracy(model) > 0.8
    assert any(node.op_type == "QuantizeLinear" for node in model.graph)


def test_recovery_needs_data() -> None:
    """Said before any work."""
    for arguments in ({"recover": True}, {"scope": "sensitivity"}, {"criterion": "apoz"}):
        with pytest.raises(InputError, match="needs data"):
            prune(CNN, benchmark=False, **arguments)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="needs data"):
        graphopt.optimize(CNN, passes="prune-channels,recover")


@pytest.mark.parametrize("name", ["resnet", "detector", "vit", "convnext", "upscaler"])
def test_refitting_any_architecture(name: str) -> None:
    """Layers of all kinds are refitted, in place, and the results come closer."""
    model = files.load(ARCHITECTURES[name][0]())
    (value,) = model.graph.inputs
    assert value.shape is not None
    rng = np.random.default_rng(0)
    rows = [rng.standard_normal(value.shape.numpy()).astype(np.float32) for _ in range(24)]
    samples = open_samples([{value.name: row} for row in rows], model)
    done = prune_once(files.copy(model), Options(ratio=0.3))
    record = record_of(done.model)
    assert record is not None
    before = error(model, done.model, samples)
    fits = recover(done.model, record, samples, Recovery())
    assert sum(fit.after for fit in fits) < sum(fit.before for fit in fits)
    assert error(model, done.model, samples) < before


@pytest.mark.parametrize("method", ["bias", "statistics"])
def test_less_than_weights_is_refitted(method: str) -> None:
    """Biases, or statistics, by themselves bring results closer; what layers share stays."""
    model = files.load(ARCHITECTURES["resnet"][0]())
    (value,) = model.graph.inputs
    assert value.shape is not None
    rng = np.random.default_rng(0)
    rows = [rng.standard_normal(value.shape.numpy()).astype(np.float32) for _ in range(8)]
    samples = open_samples([{value.name: row} for row in rows], model)
    done = prune_once(files.copy(model), Options(ratio=0.3)).model
    record = record_of(done)
    assert record is not None
    norms = [node for node in done.graph if node.op_type == "BatchNormalization"]
    mean = norms[0].inputs[3]
    assert mean is not None
    twin = next(n for n in norms[1:] if n.inputs[3] is not None and n.inputs[3].shape == mean.shape)
    twin.replace_input_with(3, mean)
    held, before = ir.array(mean), error(model, done, samples)
    recover(done, record, samples, Recovery(method=method))
    assert error(model, done, samples) < before
    found = ir.array(mean)
    assert held is not None
    assert found is not None
    assert np.array_equal(found, held)


def products() -> ir.Model:
    """Two products with their biases, and one without that is an output."""
    rng = np.random.default_rng(0)
    sizes = {"w": (4, 8), "v": (8, 3), "u": (8, 3), "t": (8, 3)}
    held = [
        f"float{list(size)} {name} = {{{','.join(map(str, rng.standard_normal(size).ravel()))}}}"
        for name, size in sizes.items()
    ]
    return parse(
        "net (float[1,4] x) => (float[1,3] y, float[1,3] z, float[1,3] o)"
        f"<{', '.join(held)}, float[3] b = {{0,0,0}}, float[3] c = {{0,0,0}}>"
        "{ a = MatMul(x, w) r = Relu(a) m = MatMul(r, v) y = Add(m, b)"
        "  n = MatMul(r, u) z = Add(n, c) o = MatMul(r, t) }"
    )


def test_training_with_a_sum_before_all_weights() -> None:
    """What no weight changes is not trained; one row at a time becomes many, scores are seen."""
    rng = np.random.default_rng(0)
    sizes = {"w": (4, 16), "v": (16, 3)}
    held = [
        f"float{list(size)} {name} = {{{','.join(map(str, rng.standard_normal(size).ravel()))}}}"
        for name, size in sizes.items()
    ]
    model = parse(
        f"net (float[1,4] x) => (float[1,3] y) <{', '.join(held)}>"
        "{ p = Relu(x) q = Abs(x) s = Add(p, q) a = MatMul(s, w) r = Relu(a)"
        "  m = MatMul(r, v) y = Softmax(m) }"
    )
    rows = [rng.standard_normal((1, 4)).astype(np.float32) for _ in range(96)]
    report = PruneReport()
    how = Recovery(epochs=8)
    data = [{"x": row} for row in rows]
    result = prune(model, ratio=0.4, data=data, recover=how, benchmark=False, report=report)
    assert report.training is not None
    assert report.training[1] < report.training[0]
    assert [dim for value in result.graph.inputs if value.shape for dim in value.shape] == [1, 4]


@pytest.mark.parametrize("shared", [False, True])
def test_biases_are_refitted_once(shared: bool) -> None:
    """A bias behind a product is refitted, not added up; outputs keep their names."""
    model = products()
    rng = np.random.default_rng(1)
    rows = [rng.standard_normal((1, 4)).astype(np.float32) + 1 for _ in range(64)]
    samples = open_samples([{"x": row} for row in rows], model)
    done = prune_once(files.copy(model), Options(ratio=0.5, round_to=1)).model
    if shared:  # as after merging what is equal
        for use in list(done.graph.initializers["c"].uses()):
            use.node.replace_input_with(use.idx, done.graph.initializers["b"])
    record = record_of(done)
    assert record is not None
    sums: list[float] = []
    for _ in range(3):
        fits = recover(done, record, samples, Recovery())
        assert len(fits) == 3
        assert [value.name for value in done.graph.outputs] == ["y", "z", "o"]
        sums.append(sum(error(model, done, samples, name) for name in "yzo"))
    assert sums[1] < 1.001 * sums[0]
    assert sums[2] < 1.001 * sums[1]


def error(model: ir.Model, other: ir.Model, samples: Samples, name: str = "") -> float:
    """Mean squared difference of an output, else of the first."""
    first, second = Runner(model), Runner(other)
    total = 0.0
    for feeds in samples:
        gap: npt.NDArray[np.float32] = first.run(feeds)[name or first.outputs[0]]
        gap = gap - second.run(feeds)[name or second.outputs[0]]
        total += float(np.mean(np.square(gap)))
    return total


NETS = {
    "convolution": "a = Conv <strides = [2, 2], pads = [1, 1, 1, 1]> (x, w, b) z = Relu(a)"
    " p = MaxPool <kernel_shape = [2, 2]> (z) f = Flatten(p) y = Gemm <transB = 1> (f, m, c)",
    "grouped": 'a = Conv <group = 2, auto_pad = "SAME_UPPER"> (x, g) z = Sigmoid(a)'
    " p = GlobalAveragePool(z) f = Flatten(p) y = MatMul(f, n)",
    "bounds": "a = Conv (x, w, b) h = Tanh(a) d = Exp(h) l = Log(d) k = Max(a, l)"
    " t = Min(k, d)"
    " p = GlobalAveragePool(t) f = Flatten(p) y = MatMul(f, n)",
    "transposed": "a = ConvTranspose <strides = [2, 2], pads = [1, 0, 1, 1],"
    " output_padding = [1, 0]> (x, w, b) e = Elu(a) p = GlobalAveragePool(e)"
    " f = Flatten(p) y = MatMul(f, n)",
    "grouped transposed": "a = ConvTranspose <group = 2, dilations = [2, 1]> (x, g) z = Softplus(a)"
    " p = GlobalMaxPool(z) f = Flatten(p) y = MatMul(f, n)",
    "parts": "a = Conv (x, w, b) h, l = Split <axis = 1, num_outputs = 2> (a)"
    " t, u = Split <axis = 1, num_outputs = 2> (h) q = Concat <axis = 1> (l, t, t) r = Swish(q)"
    " p = GlobalAveragePool(r) f = Flatten(p) y = MatMul(f, n)",
    "gathered": "i = Constant <value = int64[5] {3, 0, 0, 2, -1}> () j = Constant <value = int64[4]"
    " {1, 1, 2, 1}> () k = Constant <value = int64[2] {2, 3}> () a = Conv (x, w, b)"
    " t = Gather <axis = 2> (a, i) u = Tile (t, j) d = ReduceMax <keepdims = 0> (u, k)"
    " z = Constant <value = float[1] {0.0}> () o = Greater (d, z) v = Neg (d) r = Where (o, d, v)"
    " y = MatMul (r, n)",
    "resized": "k = Constant <value = float[4] {1.0, 1.0, 2.0, 1.5}> () a = Conv (x, w, b)"
    ' q = Resize <mode = "linear"> (a, , k) j = Constant <value = int64[4] {2, 4, 5, 12}> ()'
    ' r = Resize <mode = "nearest"> (q, , , j) z = Abs (r) p = GlobalAveragePool(z) f = Flatten(p)'
    " y = MatMul(f, n)",
    "more norms": "a = Conv (x, w, b) i = InstanceNormalization (a, s, s)"
    " h = GroupNormalization <num_groups = 2> (i, s, b) r = RMSNormalization (h, s) d = Mul(r, a)"
    " l = LogSoftmax <axis = 1> (d) p = GlobalAveragePool(l) f = Flatten(p) y = MatMul(f, n)",
    "more activations": "a = Conv (x, w, b) d = Selu(a) e = Celu<alpha = 0.7>(d) f = Softsign(e)"
    " h = Mish(f) i = Sin(h) j = Cos(i) k = Sign(e) l = Mul(k, j) p = GlobalAveragePool(l)"
    " q = Flatten(p) y = MatMul(q, n)",
    "blocks": "a = Conv (x, w, b) d = DepthToSpace <blocksize = 2> (a)"
    " e = SpaceToDepth <blocksize = 2> (d) f = Mul(e, a)"
    ' h = DepthToSpace <blocksize = 2, mode = "CRD"> (f) i = SpaceToDepth <blocksize = 4> (h)'
    " o = Constant <value_ints = [2, 3]> () p = ReduceL2 <keepdims = 0> (i, o) y = MatMul(p, m2)",
    "sums": "a = Conv (x, w, b) o = Constant <value_int = 2> () d = CumSum(a, o)"
    " t = Constant <value_int = 3> () e = CumSum <exclusive = 1, reverse = 1> (d, t)"
    " f = CumSum <exclusive = 1> (e, t) h = Tanh(f) i = Constant <value_ints = [2, 3]> ()"
    " j = ReduceLogSumExp <keepdims = 0> (h, i) k = ReduceSumSquare <keepdims = 0> (h, i)"
    " l = ReduceL1 <keepdims = 0> (h, i) q = Sum(j, k, l) y = MatMul(q, n)",
    "norms": "a = Conv (x, w, b) l = LayerNormalization <axis = -1> (a, s, s) e = Gelu(l)"
    " q = Softmax(e) z = Mul(q, l) p = GlobalAveragePool(z) f = Flatten(p) y = MatMul(f, n)",
}


@pytest.mark.parametrize(
    ("body", "width"),
    [("y = Softmax(a)", 4), ('y = Resize <mode = "linear"> (a, none, none, sizes)', 7)],
)
def test_gradients_of_old_operators(body: str, width: int) -> None:
    """Before opset 13 a Softmax is over all from axis 1 on; in 11 a Resize has empty operands."""
    model = parse(
        f"net (float[2,3,4] x) => (float[2,3,{width}] y) <float[4] w = {{1,2,3,4}}, "
        f"float[0] none = {{}}, int64[3] sizes = {{2,3,7}}> {{ a = Mul(x, w) {body} }}"
    )
    model.graph.opset_imports[""] = 11
    tape = Tape(model, ["w"])
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 3, 4)).astype(np.float32)
    slope = rng.standard_normal((2, 3, width)).astype(np.float32)
    w = np.arange(1, 5, dtype=np.float32)
    found = tape.backward(tape.forward({"x": x}, {"w": w}), {"y": slope}, ["w"])["w"]
    for index, step in enumerate(0.01 * np.eye(4, dtype=np.float32)):
        ends = [tape.forward({"x": x}, {"w": w + sign * step})["y"] for sign in (1, -1)]
        wanted = float(((ends[0] - ends[1]) * slope).sum()) / 0.02
        assert found[index] == pytest.approx(wanted, rel=0.01)


@pytest.mark.parametrize("body", NETS.values(), ids=NETS)
def test_gradients(body: str) -> None:
    """Slopes are what small changes of the weights do to the outputs."""
    model = parse(f"net (float[2,4,6,6] x) => (float[2,3] y) {{ {body} }}", opset=24)
    rng = np.random.default_rng(0)
    shapes = {
        **{"w": (4, 4, 3, 3), "b": (4,), "g": (4, 2, 3, 3), "m": (3, 16), "c": (3,)},
        **{"n": (4, 3), "s": (4,), "m2": (16, 3)},
    }
    held: dict[str, npt.NDArray[np.float32]] = {}
    for value in [v for node in model.graph for v in node.inputs if v is not None]:
        name = value.name or ""
        if name in shapes and name not in held:
            array = rng.standard_normal(shapes[name]).astype(np.float32)
            held[name] = array
            value.const_value = ir.tensor(array, name=value.name)
            value.shape, value.type = ir.Shape(array.shape), ir.TensorType(ir.DataType.FLOAT)
            model.graph.register_initializer(value)
    names = sorted(held)
    tape = Tape(model, names)
    x = rng.standard_normal((2, 4, 6, 6)).astype(np.float32)
    slope = rng.standard_normal((2, 3)).astype(np.float32)
    values = tape.forward({"x": x}, held)
    found = tape.backward(values, {"y": slope}, names)
    for name in names:
        step = (1e-3 * rng.standard_normal(shapes[name])).astype(np.float32)
        ends = [
            tape.forward({"x": x}, {**held, name: held[name] + sign * step})["y"]
            for sign in (1, -1)
        ]
        wanted = float(((ends[0] - ends[1]) / 2 * slope).sum())
        assert float((found[name] * step).sum()) == pytest.approx(wanted, rel=0.03, abs=1e-5)


def test_gradients_that_are_not_known() -> None:
    """The operator is named."""
    model = parse(
        "net (float[2,4] x) => (float[2,4] y) <float[4] w = {1,2,3,4}> { a = Add(x, w) y = Tan(a) }"
    )
    with pytest.raises(InputError, match="no gradient is known of Tan"):
        Tape(model, ["w"])


def test_a_layer_of_which_nothing_goes_stays_one() -> None:
    """Ranks are round numbers, and a layer's whole rank is not cut down to one by itself."""
    model = parse(
        "g (float[1,64] x) => (float[1,10] y) { a = MatMul(x, v) b = Relu(a) y = MatMul(b, w) }"
    )
    for seed, (name, shape) in enumerate({"v": (64, 96), "w": (96, 10)}.items()):
        array = normal(math.prod(shape), seed).reshape(shape)
        (value,) = {v for n in model.graph for v in n.inputs if v is not None and v.name == name}
        value.const_value = ir.tensor(array, name=name)
        value.shape, value.type = ir.Shape(shape), ir.TensorType(ir.DataType.FLOAT)
        model.graph.register_initializer(value)
    samples = open_samples({"x": normal(64 * 64, 2).reshape(64, 1, 64)}, model)
    options = Options(ratio=0.0, scope="sensitivity", ranks=True)
    assert not prune_once(model, options, samples).changed


def test_losses_are_of_what_probabilities_are_made_of() -> None:
    """A sure answer hides a difference that its scores show; other outputs stay as they are."""
    text = "g (float[4,2] x) => (float[4,2] p, float[4,2] y) <float[1] s = {%s}>"
    text += " { y = Sigmoid(x) z = Mul(x, s) p = Softmax(z) }"
    one, other = parse(text % "1.0"), parse(text % "1.5")
    x = np.array([[[9, -9], [-9, 9], [8, -8], [9, -8]]], np.float32)
    assert gap(one, other, open_samples({"x": x}, one)) == pytest.approx(0.25, rel=0.1)


def run(*arguments: object) -> Any:
    """The command's result."""
    return CliRunner().invoke(main, ["prune", *map(str, arguments)])


def test_command(data: Path, tmp_path: Path) -> None:
    """Figures on the screen and as JSON; the file is written and runs."""
    out, figures = tmp_path / "small.onnx", tmp_path / "figures.json"
    how = ("--ratio", 0.5, "--data", data, "--recover", "--epochs", 1, "-v")
    done = run(CNN, *how, "-o", out, "--json", figures)
    assert done.exit_code == 0, done.output
    for word in ("parameters", "operations", "latency", "agreement", "proof", "refitted"):
        assert word in done.output
    assert json.loads(figures.read_text())["after"]["parameters"] < 30_000_000
    assert accuracy(files.load(out)) > 0.8
    for least, code in (("0.7", 0), ("1.0", 1)):  # what is expected of it can be a gate
        check = ("verify", CNN, out, "--data", data, "--min-agreement", least)
        assert CliRunner().invoke(main, list(map(str, check))).exit_code == code


def test_plot(data: Path, tmp_path: Path) -> None:
    """A curve for each family, and what is left of it; not over a file that is there."""
    page = tmp_path / "curves.html"
    how = ("--params", 0.6, "--data", data, "--scope", "sensitivity", "--no-benchmark")
    done = run(CNN, *how, "-o", tmp_path / "small.onnx", "--plot", page)
    assert done.exit_code == 0, done.output
    text = page.read_text(encoding="utf-8")
    assert text.count("<polyline") > 2
    assert "block1.conv1.weight" in text
    again = run(CNN, *how, "-o", tmp_path / "other.onnx", "--plot", page)
    assert again.exit_code == 2
    assert "exists" in again.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--ratio", "1.5"), "ratio is at least 0 and less than 1"),
        (("--ratio", "-1"), "ratio is at least 0"),
        (("--ignore", "nix*"), "no node or weight is named 'nix*'"),
        (("--ignore", "*"), "nothing can be pruned"),
        (("--recover",), "recovery needs data: --data"),
        (("--criterion", "taylor"), "needs data: --data"),
        (("--max-drop", "0.1"), "needs data: --data"),
        (("--max-drop", "7"), "max_drop is between 0 and 1"),
        (("--latency", "2"), "latency is the share"),
        (("--layer-ratio", "conv"), "PATTERN=0.3"),
        (("--iterations", "0"), "iterations are at least 1"),
        (("--epochs", "1"), "--epochs belongs to --recover"),
        (("--target", "moon"), "moon"),
        (("--data", "nowhere.npz", "--recover"), "nowhere.npz"),
    ],
)
def test_bad_input(arguments: tuple[str, ...], message: str, tmp_path: Path) -> None:
    """One clear line each, and nothing is written."""
    out = tmp_path / "small.onnx"
    done = run(CNN, *arguments, "-o", out, "--no-benchmark")
    assert done.exit_code == 2, done.output
    assert message in done.output
    assert done.output.count("\n") == 1
    assert not out.exists()


def test_output_is_asked_for(tmp_path: Path) -> None:
    """Before the work."""
    assert "say where" in run(CNN).output
    (tmp_path / "there.onnx").touch()
    assert "exists" in run(CNN, "-o", tmp_path / "there.onnx").output
