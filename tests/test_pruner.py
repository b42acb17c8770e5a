"""The dependency graph: a pruned model is the original with what went set to zero."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from graphopt import files, ir
from graphopt.context import Context
from graphopt.errors import GraphoptError, InputError
from graphopt.pass_manager import PassManager, parse_pipeline
from graphopt.passes import PIPELINES
from graphopt.pruner.atoms import Atoms, fixed
from graphopt.pruner.groups import find_groups
from graphopt.pruner.preparing import prepare
from graphopt.pruner.pruning import Options, Pruning, prune_once
from graphopt.random_inputs import required_inputs
from graphopt.runner import Runner
from graphopt.samples import open_samples
from tests._architectures import ARCHITECTURES
from tests._models import parse
from tests._shared import shared

HALF = Options(ratio=0.5, round_to=1)
EXACT = Options(ratio=0.5, round_to=1, exact=True)
ZOO_NAMES = (
    *("resnet18", "resnet50", "resnext50", "densenet121", "shufflenet_v2", "mobilenet_v2"),
    *("squeezenet1_1", "swin_t", "vit_b_16", "convnext_tiny"),
)


def share(done: Pruning) -> float:
    """Of parameters that are left."""
    return done.after.parameters / done.before.parameters


def test_atoms() -> None:
    """Groups grow together, in whatever order, and carry what is said of any of them."""
    atoms = Atoms()
    a, b, c = (atoms.fresh(4) for _ in range(3))
    atoms.freeze(a[:1], "kept")
    atoms.unite(b, c, "")
    atoms.unite(a, b[::-1], "")
    assert np.array_equal(atoms.roots(a), atoms.roots(c[::-1]))
    assert (atoms.frozen(c) > 0).tolist() == [False, False, False, True]
    assert atoms.reasons[int(atoms.frozen(c[3:])[0])] == "kept"
    atoms.unite(a[1:2], fixed(1), "fixed")
    assert (atoms.frozen(c) > 0).tolist() == [False, False, True, True]
    atoms.doubt(c[:1])
    assert atoms.inexact(a).tolist() == [False, False, False, True]
    with pytest.raises(ValueError, match="3 and 4"):
        atoms.unite(a[:3], b, "")


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_architecture(name: str) -> None:
    """Half the channels leave about a quarter of the parameters; the rest computes the same."""
    build, most, exact = ARCHITECTURES[name]
    model = files.load(build())
    done = prune_once(files.copy(model), HALF)
    assert share(done) <= most
    assert not done.groups.unknown
    assert (done.error is not None) == exact
    strict = done if exact else prune_once(model, EXACT)
    assert strict.error is not None
    assert strict.error < 1e-5
    assert sum(a - b for a, b in strict.counts.values()) > 0


@pytest.mark.parametrize("name", ZOO_NAMES)
def test_zoo(name: str, tmp_path: Path) -> None:
    """As above of what torch exports, of full width and few layers, at least as well as the bars.

    The classifier, whose outputs stay, is a larger part of these than of the whole networks.
    """
    pytest.importorskip("torch")
    zoo: Any = importlib.import_module("tests.benchmarks._zoo")
    zoo.export(name, tmp_path / "net.onnx", small=True)
    done = prune_once(files.load(tmp_path / "net.onnx"), HALF)
    assert share(done) <= zoo.ZOO[name][3] + (0.04 if name == "resnext50" else 0.035)
    assert not done.groups.unknown
    assert done.error is None or done.error < 1e-5


CORPUS = shared("corpus/models")
BARS = {
    "yolox_nano": 0.27,
    "gesture_lstm": 0.28,
    "mobilenet_v2_10_224_fp32": 0.35,
    "squeezenet_fp32": 0.36,
}
NOTHING = {
    # Recurrent states that are inputs, normalized features, trees: all of it is fixed.
    *("dtln_1", "oww_hey_jarvis", "sk_diabetes_rf_reg", "sk_digits_rf_zipmap", "sk_rf_iris"),
    *("sk_predictable_tsne", "sk_wine_svc"),
}
SLOW = {"deeplabv3_mnv2_dm05_fp32", "style_candy"}


@pytest.mark.parametrize("folder", sorted(CORPUS.iterdir()), ids=lambda folder: folder.name)
def test_corpus(folder: object) -> None:
    """Every model of the corpus: masked is pruned, and something is pruned."""
    path = CORPUS / str(getattr(folder, "name", ""))
    if path.name in SLOW:
        pytest.skip("takes minutes: python -m tests.benchmarks.pruning --only masked")
    clean = parse_pipeline(",".join(PIPELINES[1]))
    model = PassManager(clean).run(Context(files.load(path / "model.onnx")))
    if path.name in NOTHING:
        with pytest.raises(InputError, match="nothing can be pruned"):
            prune_once(model, EXACT)
        return
    with np.load(path / "inputs.npz") as arrays:
        feeds = {value.name: arrays[value.name] for value in required_inputs(model)}
    done = prune_once(model, EXACT, open_samples([feeds], model))
    assert done.error is not None
    assert done.error < 1e-5
    assert sum(a - b for a, b in done.counts.values()) > 0
    if path.name in BARS:
        assert share(done) <= BARS[path.name]


def test_unknown_operators_are_named() -> None:
    """What has no rule holds back what it touches, and is told."""
    model = parse(
        "net (float[1,2,4,4] x) => (float[1,1,4,4] y)"
        "<float[4,2,1,1] w = {1,2,3,4,5,6,7,8}, float[1,4,1,1] v = {1,2,3,4}>"
        "{ a = Conv(x, w) b = com.example.Odd(a) y = Conv(b, v) }"
    )
    model.graph.opset_imports["com.example"] = 1
    with pytest.raises(InputError, match=r"no rule for com\.example\.Odd"):
        prune_once(model, HALF)


def test_ignored() -> None:
    """What is named stays; a name of nothing is an error."""
    build, _, _ = ARCHITECTURES["crnn"]
    model = files.load(build())
    prepare(model)
    everything = {family.name for family in find_groups(model).families}
    left = {family.name for family in find_groups(model, ignore=["w0"]).families}
    assert everything - left == {"w0"}
    only = find_groups(model, only=["w0", "w5"]).families
    assert {family.name for family in only} == {"w0"}
    with pytest.raises(InputError, match="no node or weight is named 'nix'"):
        find_groups(model, ignore=["nix"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ratio": 1.5}, "ratio is at least 0 and less than 1"),
        ({"ratio": -0.1}, "ratio is at least 0"),
        ({"params": 2.0}, "params is the share to keep"),
        ({"scope": "some"}, "scope is uniform, global or sensitivity"),
        ({"criterion": "l0x"}, "no criterion is named 'l0x'"),
        ({"criterion": "bn-scale"}, "no BatchNormalization"),
        ({"criterion": "taylor"}, "needs data"),
        ({"scope": "sensitivity"}, "needs data"),
        ({"ratios": {"nix*": 0.5}}, "no weight that can be pruned is named"),
        ({"params": 0.001}, "cannot be met"),
        ({"round_to": -1}, "round_to"),
        ({"least": 1.0}, "least"),
    ],
)
def test_bad_options(options: dict[str, object], message: str) -> None:
    """Each gets one line."""
    model = files.load(ARCHITECTURES["upscaler"][0]())
    with pytest.raises(InputError, match=message) as caught:
        prune_once(model, Options(**options))  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("criterion", ["l1", "lp:3", "median", "bn-scale", "random"])
@pytest.mark.parametrize("scope", ["uniform", "global"])
def test_criteria(criterion: str, scope: str) -> None:
    """All of them choose, and what they leave is sound."""
    model = files.load(ARCHITECTURES["resnet"][0]())
    done = prune_once(model, Options(criterion=criterion, scope=scope, params=0.6))
    assert share(done) <= 0.6
    assert done.error is not None
    assert done.error < 1e-5


def test_rounding() -> None:
    """Counts are multiples, by default of 2 to 8, if a family does not stay whole."""
    model = files.load(ARCHITECTURES["vit"][0]())
    done = prune_once(model, Options(ratio=0.3, round_to=16))
    for family in done.groups.families:
        left = done.counts[family.name][1] * family.width
        assert left % 16 == 0 or done.counts[family.name][0] == done.counts[family.name][1]


def test_overridable_weights() -> None:
    """Weights that are listed as inputs become constants, and that is said."""
    proto = ARCHITECTURES["crnn"][0]()
    for tensor in proto.graph.initializer:
        value = proto.graph.input.add(name=tensor.name)
        value.type.tensor_type.elem_type = tensor.data_type
        for size in tensor.dims:
            value.type.tensor_type.shape.dim.add(dim_value=size)
    done = prune_once(files.load(proto), HALF)
    assert any("listed as inputs" in note for note in done.notes)
    assert share(done) < 0.3


def test_bodies() -> None:
    """Channels go through the branches of an If and around a Loop."""
    model = parse(
        "net (float[1,4] x, bool c, int64 n) => (float[1,1] y)"
        "<float[4,6] w = {1,2,3,4,5,6,7,8,9,1,2,3,4,5,6,7,8,9,1,2,3,4,5,6},"
        " float[6] b = {1,2,3,4,5,6}, float[6,1] v = {1,2,3,4,5,6}, bool go = {1}>"
        "{ a = MatMul(x, w)"
        "  d = If (c) <then_branch = t () => (float[1,6] e) { e = Relu(a) },"
        "              else_branch = f () => (float[1,6] g) { g = Mul(a, b) }>"
        "  h = Loop (n, go, d) <body = l (int64 i, bool p, float[1,6] s) => (bool q, float[1,6] r)"
        "    { q = Identity(p) r = Mul(s, b) }>"
        "  y = MatMul(h, v) }"
    )
    done = prune_once(files.copy(model), HALF)
    assert list(done.counts.values()) == [(6, 3)]
    feeds = {
        "x": np.ones((1, 4), np.float32),
        "c": np.asarray(False),
        "n": np.asarray(2, np.int64),
    }
    assert Runner(done.model).run(feeds)["y"].shape == (1, 1)
    assert done.error is not None
    assert done.error < 1e-5


ATTENTION = {
    "queries of groups": "q = MatMul(x, float_32_64) k = MatMul(x, float_32_16)"
    " v = MatMul(x, float_32_16_) a = Attention <q_num_heads = 8, kv_num_heads = 2> (q, k, v)",
    "a packed bias": "q = MatMul(x, float_32_64) k = MatMul(x, float_32_64_)"
    " v = MatMul(x, float_32_64__)"
    " a = com.microsoft.MultiHeadAttention <num_heads = 8> (q, k, v, float_192)",
    "one matrix": "a = com.microsoft.Attention <num_heads = 8> (x, float_32_192, float_192)",
    "three sizes": "a = com.microsoft.Attention <num_heads = 4, qkv_hidden_sizes = [32, 32, 64]>"
    " (x, float_32_128, float_128)",
}


@pytest.mark.parametrize("body", ATTENTION.values(), ids=ATTENTION)
def test_attention(body: str) -> None:
    """Heads go, with what belongs to them in matrices and biases that hold several."""
    wanted = {*re.findall(r"float(?:_\d+)+_*", body), "float_64_4"}
    inputs = ", ".join(
        f"float[{','.join(re.findall(r'[0-9]+', name))}] {name}" for name in sorted(wanted)
    )
    text = f"net (float[2,5,32] x, {inputs}) => (float[2,5,4] y) {{ {body}"
    model = parse(text + " y = MatMul(a, float_64_4) }")
    model.graph.opset_imports.update({"": 23, "com.microsoft": 1})
    rng = np.random.default_rng(0)
    for value in list(model.graph.inputs)[1:]:
        shape = [int(str(size)) for size in value.shape or ()]
        array = rng.standard_normal(shape).astype(np.float32)
        value.const_value = ir.tensor(array, name=value.name)
        model.graph.inputs.remove(value)
        model.graph.register_initializer(value)
    done = prune_once(model, HALF)
    assert not done.groups.unknown
    assert share(done) == pytest.approx(0.5, abs=0.01)
    assert done.error is not None and done.error < 1e-5


def test_rounds_of_computed_sizes() -> None:
    """A size that is computed at run time is patched in each round, under a name of its own."""
    numbers = ",".join(str(index % 7 + 1) for index in range(32))
    model = parse(
        "net (float[N,T,4] x) => (float[N,T,1] y)"
        f"<float[4,8] w = {{{numbers}}}, float[8,1] v = {{1,2,3,4,5,6,7,8}}, int64[1] c = {{8}}>"
        "{ a = MatMul(x, w) s = Shape <start = 0, end = 2> (x) k = Concat <axis = 0> (s, c)"
        "  r = Reshape(a, k) y = MatMul(r, v) }"
    )
    for left in (6, 5):
        done = prune_once(model, Options(ratio=0.3, round_to=1))
        assert [count for _, count in done.counts.values()] == [left]
        assert done.error is not None
        assert done.error < 1e-5
        model = done.model


def test_original_is_left_alone() -> None:
    """The model that was pruned a copy of still computes what it did."""
    model = files.load(ARCHITECTURES["detector"][0]())
    before = [t.numpy().shape for t in ir.constants(model)]
    prune_once(files.copy(model), HALF)
    assert [t.numpy().shape for t in ir.constants(model)] == before
    assert issubclass(InputError, GraphoptError)
