"""Model surgery: parts, signatures, batches, work around a model, merging and splitting."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from graphopt import files, ir, models, surgery
from graphopt.cli import main
from graphopt.errors import InputError
from graphopt.feeds import workable_feeds
from graphopt.runner import Runner
from graphopt.shapes import Shapes
from tests._text import model

onnx: Any = importlib.import_module("onnx")

NET = """net (float[batch,4] x, float[batch,4] z) => (float[batch,4] y, float[batch,4] s)
    <float[4] b = {1, 2, 3, 4}> {
  m = Mul (x, b)
  r = Relu (m)
  s = Sigmoid (r)
  a = Add (r, z)
  y = Neg (a)
}"""
FIXED = """net (float[1,2,4] x) => (float[1,8] y, float[2,4] v)
    <int64[2] t = {1, 8}, int64[2] u = {2, 4}, int64[3] e = {1, 2, 4}, float c = {3.0}> {
  k = Expand (c, e)
  a = Add (x, k)
  f = Reshape (a, t)
  y = Relu (f)
  g = Reshape (a, u)
  v = Neg (g)
}"""
LSTM = """net (float[3,1,2] x) => (float[3,1,1,4] y) <float[1,1,4] h = {0, 0, 0, 0}> {
  y = LSTM <hidden_size = 4> (x, w, r, , , h)
}"""
IMAGE = """net (float[1,3,4,4] image) => (float[1,6] scores) <int64[2] t = {0, -1}> {
  p = GlobalAveragePool (image)
  f = Reshape (p, t)
  scores = Concat <axis = 1> (f, f)
}"""


def names(values: Any) -> list[str]:
    """Names of values."""
    return [value.name for value in values]


def run(source: ir.Model, **feeds: Any) -> Any:
    """The outputs of a model; inputs that are not given are made up."""
    made = workable_feeds(source, Shapes(source))
    return Runner(source).run({**made, **feeds})


def legal(source: ir.Model) -> ir.Model:
    """The model, which the checker and ONNX Runtime accept, and whose argument was not changed."""
    onnx.checker.check_model(files.to_proto(source), full_check=True)
    run(source)
    return source


def test_extract() -> None:
    source = model(NET)
    part = legal(surgery.extract(source, ["r", "z"], ["y"]))
    assert (names(part.graph.inputs), names(part.graph.outputs)) == (["r", "z"], ["y"])
    assert [node.op_type for node in part.graph] == ["Add", "Neg"]
    assert str(part.graph.inputs[0].shape) == "[batch,4]"
    assert [node.op_type for node in source.graph] == ["Mul", "Relu", "Sigmoid", "Add", "Neg"]
    head = legal(surgery.extract(source, outputs=["r"]))
    assert names(head.graph.inputs) == ["x"]
    assert list(head.graph.initializers) == ["b"]


@pytest.mark.parametrize(
    ("inputs", "outputs", "why"),
    [
        (["r"], ["y"], "needs input 'z' too"),
        (["x"], ["nothing"], "no tensor of the main graph is named 'nothing'"),
        (["x"], ["x"], "computed by nothing"),
        (["b"], ["r"], "is a constant"),
        (["r"], ["r"], "both input and output"),
        ([], ["r"], "name at least one"),
        (["x", "x"], ["r"], "each once"),
    ],
)
def test_extract_refuses(inputs: list[str], outputs: list[str], why: str) -> None:
    with pytest.raises(InputError, match=why):
        surgery.extract(model(NET), inputs, outputs)


def test_outputs() -> None:
    more = legal(surgery.add_outputs(model(NET), ["r"]))
    assert names(more.graph.outputs) == ["y", "s", "r"]
    less = legal(surgery.drop_outputs(more, ["y", "r"]))
    assert names(less.graph.outputs) == ["s"]
    assert names(less.graph.inputs) == ["x", "z"]
    assert "Add" not in {node.op_type for node in less.graph}
    for names_, why in ((["y", "s"], "no output would be left"), (["q"], "no output is named")):
        with pytest.raises(InputError, match=why):
            surgery.drop_outputs(model(NET), names_)


def test_dimensions() -> None:
    frozen = legal(surgery.freeze_dims(model(NET), {"batch": 3}))
    assert [str(v.shape) for v in (*frozen.graph.inputs, *frozen.graph.outputs)] == ["[3,4]"] * 4
    renamed = legal(surgery.rename_dims(model(NET), {"batch": "n"}))
    assert str(renamed.graph.outputs[0].shape) == "[n,4]"
    for change in ({"q": 3}, {"batch": -1}):
        with pytest.raises(InputError, match=r"no dimension is named 'q'|cannot be -1"):
            surgery.freeze_dims(model(NET), change)


def test_names() -> None:
    source = model(NET)
    renamed = legal(surgery.rename(source, {"x": "pixels", "y": "logits", "r": "x"}))
    assert names(renamed.graph.inputs) == ["pixels", "z"]
    assert names(renamed.graph.outputs) == ["logits", "s"]
    with pytest.raises(InputError, match="no free name"):
        surgery.rename(source, {"x": "z"})


@pytest.mark.parametrize("batch", [4, "n"])
def test_batch(batch: int | str) -> None:
    """Targets of Reshape and Expand that say 1 follow; the rest of the shape stays."""
    result = legal(surgery.set_batch(model(FIXED), batch))
    assert [v.shape[0] if v.shape else None for v in result.graph.inputs] == [batch]
    x = np.arange(32, dtype=np.float32).reshape(4, 2, 4) - 9
    got = run(result, x=x)
    assert np.array_equal(got["y"], np.maximum(x + 3, 0).reshape(4, 8))
    assert np.array_equal(got["v"], -(x + 3).reshape(8, 4))


def test_batch_elsewhere() -> None:
    numbers = np.random.default_rng(0).standard_normal(96).round(2).tolist()
    w, r = (", ".join(map(str, part)) for part in (numbers[:32], numbers[32:]))
    source = model(
        LSTM.replace("<float", f"<float[1,16,2] w = {{{w}}}, float[1,16,4] r = {{{r}}}, float", 1)
    )
    result = legal(surgery.set_batch(source, 3, axes={"x": 1}))
    assert str(result.graph.outputs[0].shape) == "[3,1,3,4]"
    with pytest.raises(InputError, match="initial state"):
        surgery.set_batch(source, "n", axes={"x": 1})


@pytest.mark.parametrize(
    ("text", "batch", "why"),
    [
        (FIXED, 0, "is none"),
        ("g (float[2,3] x) => (float[3,2] y) { y = Transpose (x) }", 4, ""),
        ("g (float[2,3] x) => (float[3] y) { y = ReduceSum <keepdims=0> (x, a) }", 4, "mixes"),
        ("g (float x) => (float y) { y = Neg (x) }", 4, "no input has a batch axis"),
    ],
)
def test_batch_refuses(text: str, batch: int, why: str) -> None:
    source = text.replace("=> (float[3] y)", "=> (float[3] y) <int64[1] a = {0}>")
    if why:
        with pytest.raises(InputError, match=why):
            surgery.set_batch(model(source), batch)
    else:
        legal(surgery.set_batch(model(source), batch))


def test_rows_that_depend_on_each_other_are_refused() -> None:
    text = "g (float[1,3] x) => (float[1,3] y) { y = Softmax <axis = 0> (x) }"
    with pytest.raises(InputError, match="rows of a batch depend on each other"):
        surgery.set_batch(model(text), "n")


def test_metadata() -> None:
    source = files.load(models.path("digits_cnn"))
    source.metadata_props["who"] = "me"
    source.graph[0].doc_string = "secret"
    bare = legal(surgery.strip_metadata(source))
    assert not bare.metadata_props and not bare.graph[0].doc_string and not bare.producer_name
    assert source.metadata_props == {"who": "me"}


def test_normalize() -> None:
    options = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4], "scale": 1 / 255}
    result = surgery.attach(model(IMAGE), "normalize", {**options, "uint8": True, "nhwc": True})
    assert str(legal(result).graph.inputs[0].shape) == "[1,4,4,3]"
    image = np.random.default_rng(0).integers(0, 256, (1, 4, 4, 3)).astype(np.uint8)
    wanted = (image / 255 - [0.5, 0.4, 0.3]) / [0.2, 0.3, 0.4]
    got = run(result, image=image)["scores"]
    assert np.allclose(got[0, :3], wanted.mean((0, 1, 2)), atol=1e-4)


@pytest.mark.parametrize("opset", [11, 13, 20])
def test_resize(opset: int) -> None:
    source = model(f'<ir_version: 8, opset_import: ["" : {opset}]>\n{IMAGE}')
    result = legal(surgery.attach(source, "resize", {"mode": "nearest"}))
    assert str(result.graph.inputs[0].shape) == "[1,3,height,width]"
    flat = np.full((1, 3, 9, 5), 2.5, np.float32)
    assert np.allclose(run(result, image=flat)["scores"], 2.5)


def test_after_the_outputs() -> None:
    scores = np.asarray([[1, 5, 2, 4, 3, 0]], np.float32)
    source = model("g (float[1,6] x) => (float[1,6] y) { y = Identity (x) }")
    top = legal(surgery.attach(source, "topk", {"k": 2}))
    assert names(top.graph.outputs) == ["y", "y_indices"]
    assert run(top, x=scores)["y_indices"].tolist() == [[1, 3]]
    assert run(legal(surgery.attach(source, "argmax", {})), x=scores)["y"].tolist() == [1]
    chances = run(legal(surgery.attach(source, "softmax", {})), x=scores)["y"]
    assert np.isclose(chances.sum(), 1)


def test_suppression() -> None:
    source = model(
        "g (float[1,3,4] p, float[1,3,2] q) => (float[1,3,4] boxes, float[1,3,2] scores) "
        "{ boxes = Identity (p) scores = Identity (q) }"
    )
    result = legal(surgery.attach(source, "nms", {"classes_last": True}))
    boxes = np.asarray([[[0, 0, 1, 1], [0, 0, 1, 0.9], [2, 2, 3, 3]]], np.float32)
    scores = np.asarray([[[0.9, 0], [0.8, 0], [0.1, 0.7]]], np.float32)
    assert run(result, p=boxes, q=scores)["selected"].tolist() == [[0, 0, 0], [0, 1, 2]]


@pytest.mark.parametrize(
    ("what", "options", "why"),
    [
        ("blur", {}, "nothing is named 'blur'"),
        ("normalize", {"sigma": 1}, "no option 'sigma'"),
        ("normalize", {}, "nothing to do"),
        ("normalize", {"mean": [1, 2]}, "2 numbers, the input 3 channels"),
        ("normalize", {"std": 0.0}, "a 0 in it"),
        ("topk", {"k": "x"}, "is int, not 'x'"),
        ("topk", {"k": 9}, "has 6 scores"),
        ("resize", {"mode": "wild"}, "mode is"),
        ("softmax", {"output": "q"}, "no output is named 'q'"),
        ("nms", {}, "no tensor of the main graph is named 'boxes'"),
    ],
)
def test_attachments_refuse(what: str, options: dict[str, Any], why: str) -> None:
    with pytest.raises(InputError, match=why):
        surgery.attach(model(IMAGE), what, options)


def test_split_and_merge_are_inverse() -> None:
    source = model(NET)
    first, second = map(legal, surgery.split(source, ["a"]))
    assert names(first.graph.outputs) == ["a", "r"]  # which the second needs for s
    assert names(second.graph.inputs) == ["a", "r"]
    whole = legal(surgery.merge(first, second))
    feeds = workable_feeds(source, Shapes(source))
    expected, got = Runner(source).run(feeds), Runner(whole).run(feeds)
    assert all(np.array_equal(expected[name], got[name]) for name in ("y", "s"))


def test_split_leaves_outputs_where_they_are_computed() -> None:
    first, second = map(legal, surgery.split(model(NET), ["s", "r"]))
    assert names(first.graph.outputs) == ["s", "r"]
    assert names(second.graph.inputs) == ["r", "z"]
    for tensors, why in (
        (["x"], "nothing to split"),
        (["y", "s"], "nothing is left"),
        (["q"], "'q'"),
    ):
        with pytest.raises(InputError, match=why):
            surgery.split(model(NET), tensors)


def test_merge_reconciles() -> None:
    """Opsets, clashing names, and inputs that both have."""
    old = model(
        '<ir_version: 7, opset_import: ["" : 11]>\n'
        "g (float[2,4] x) => (float[2,4] y) { m = Neg (x) y = Softmax <axis = 1> (m) }"
    )
    new = model("h (float[2,4] u, float[2,4] x) => (float[2,4] v) { m = Exp (u) v = Add (m, x) }")
    with pytest.raises(InputError, match="both models have 'x'"):
        surgery.merge(old, new, {"y": "u"})
    apart = legal(surgery.merge(old, new, {"y": "u"}, prefix="b_"))
    assert names(apart.graph.inputs) == ["x", "b_x"]
    shared_ = legal(surgery.merge(old, new, {"y": "u"}, share=True))
    assert names(shared_.graph.inputs) == ["x"]
    assert shared_.graph.opset_imports[""] == 20
    assert shared_.ir_version == 10


@pytest.mark.parametrize(
    ("wires", "why"),
    [
        ({}, "say what to connect"),
        ({"q": "u"}, "no output 'q'"),
        ({"y": "q"}, "no input 'q'"),
        ({"y": "w"}, "it is FLOAT, not INT64"),
        ({"y": "u"}, "it has shape"),
    ],
)
def test_merge_refuses(wires: dict[str, str], why: str) -> None:
    one = model("g (float[2,4] x) => (float[2,4] y) { y = Neg (x) }")
    two = model(
        "h (float[2,5] u, int64[2,4] w) => (float[2,5] v) { c = Cast <to=1> (w) v = Exp (u) }"
    )
    with pytest.raises(InputError, match=why):
        surgery.merge(one, two, wires)


@pytest.fixture
def net(tmp_path: Path) -> Path:
    path = tmp_path / "net.onnx"
    files.save(model(NET), path)
    return path


COMMANDS: dict[str, tuple[Callable[[Path], list[str]], str]] = {
    "extract nothing": (lambda n: ["extract", f"{n}", "-o", "{out}"], "name --inputs"),
    "extract unknown": (lambda n: ["extract", f"{n}", "-o", "{out}", "--outputs", "q"], "'q'"),
    "edit nothing": (lambda n: ["edit", f"{n}", "-o", "{out}"], "say what to change"),
    "edit itself": (lambda n: ["edit", f"{n}", "-o", f"{n}", "--strip-metadata"], "is the input"),
    "edit form": (lambda n: ["edit", f"{n}", "-o", "{out}", "--freeze-dim", "a"], "NAME=VALUE"),
    "edit size": (lambda n: ["edit", f"{n}", "-o", "{out}", "--freeze-dim", "batch=x"], "whole"),
    "edit axis": (lambda n: ["edit", f"{n}", "-o", "{out}", "--batch-axis", "x=0"], "set-batch"),
    "edit append": (lambda n: ["edit", f"{n}", "-o", "{out}", "--append", "resize"], "named 'resi"),
    "merge form": (lambda n: ["merge", f"{n}", f"{n}", "-o", "{out}", "--connect", "y"], "OUTPUT:"),
    "split twice": (lambda n: ["split", f"{n}", "{out}", "{out}", "--at", "r"], "both parts"),
    "no folder": (lambda n: ["edit", f"{n}", "-o", "{out}/a/b", "--strip-metadata"], "no folder"),
}


@pytest.mark.parametrize("case", COMMANDS)
def test_commands_refuse(case: str, net: Path, tmp_path: Path) -> None:
    arguments, why = COMMANDS[case]
    out = str(tmp_path / "out.onnx")
    result = CliRunner().invoke(main, [a.replace("{out}", out) for a in arguments(net)])
    assert (result.exit_code, result.output.count("\n")) == (2, 1), result.output
    assert why in result.output
    assert not Path(out).exists()


def test_commands(net: Path, tmp_path: Path) -> None:
    a, b, c = (str(tmp_path / f"{name}.onnx") for name in "abc")
    edited = ["edit", str(net), "-o", c, "--rename-dim", "batch=n", "--add-output", "r"]
    commands = [
        ["split", str(net), a, b, "--at", "a"],
        ["merge", a, b, "-o", c],
        ["extract", str(net), "-o", a, "--inputs", "r,z", "--outputs", "y", "--overwrite"],
        [*edited, "--rename", "x=pixels", "--append", "softmax{output=y}", "--overwrite"],
    ]
    written: list[Any] = []
    for command in commands:
        result = CliRunner().invoke(main, [*command, "--json", "-"])
        assert result.exit_code == 0, result.output
        written = json.loads(result.output)["written"]
        for entry in written:
            assert names(files.load(entry["file"]).graph.inputs) == [
                port["name"] for port in entry["inputs"]
            ]
    assert [port["name"] for port in written[0]["inputs"]] == ["pixels", "z"]
