"""Files that are broken, hostile or merely not models: one line that names the cause, no more."""

from __future__ import annotations

import errno
import os
import random
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from onnx import AttributeProto, TensorProto, helper

from graphopt import files, ir
from graphopt.errors import GraphoptError, InputError
from graphopt.files.wire import varint
from tests.test_files import externalize, small, weighted

HEAD = '<ir_version: 8, opset_import: ["" : 17, "custom" : 1]>\n'


def refuse(source: Any, why: str) -> str:
    """Load what must be refused: one line, soon, with the cause."""
    start = time.process_time()
    with pytest.raises(InputError, match=why) as caught:
        files.load(source)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 1000
    assert time.process_time() - start < 2
    if isinstance(source, Path):
        assert message.startswith(str(source))
    return message


CONTENTS: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "empty"),
    "text": (b"Hello, this is no model.\n" * 40, "a text file"),
    "web page": (b"<!DOCTYPE html><html></html>", "web page"),
    "git lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
    "torch": (b"PK\x03\x04" + bytes(100), "zip archive"),
    "ort": (b"\x18\0\0\0ORTM" + bytes(100), "ORT format"),
    "zeros": (bytes(1000), "not an ONNX model"),
    "random": (random.Random(0).randbytes(5000), "not an ONNX model"),
    "truncated": (weighted(np.zeros(9000, np.float32)).SerializeToString()[:-5000], "cut short"),
    "no graph": (onnx.ModelProto(ir_version=8).SerializeToString(), "no graph"),
    "endless varint": (b"\xff" * 50, "no protobuf"),
    "length beyond the end": (b"\x3a\xff\xff\xff\xff\x07abc", "cut short"),
    "a million empty nodes": (b"\x08\x08\x3a\x80\x89\x7a" + b"\x0a\x00" * 1_000_000, "empty node"),
    "weight given twice": (
        b"\x08\x08\x3a\x8e\x10\x2a\x8b\x10" + 2 * (b"\x4a\x82\x08" + bytes(1026)) + b"\x08\x01\x10",
        "not an ONNX model",
    ),
}


@pytest.mark.parametrize("content", CONTENTS)
def test_no_model(content: str, tmp_path: Path) -> None:
    data, why = CONTENTS[content]
    path = tmp_path / "m.onnx"
    path.write_bytes(data)
    refuse(path, why)
    refuse(data, why)


def test_paths_that_are_no_files(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    refuse(tmp_path / "fifo", "not a file")
    refuse(tmp_path, "[Ii]s a directory|not a file")
    refuse(tmp_path / "missing.onnx", "No such file")
    refuse(tmp_path / ("x" * 500), "name too long")
    with pytest.raises(InputError, match="null"):
        files.load("a\0b")


GRAPHS: dict[str, tuple[str, str]] = {
    "unknown operator": ("(float[2] x) => (float[2] y) { y = Nonsense (x) }", "no such operator"),
    "operator of a later opset": ("(float[2] x) => (float[2] y) { y = Gelu (x) }", "version 17"),
    "unknown domain": (
        "(float[2] x) => (float[2] y) { y = other.Thing (x) }",
        "no opset of 'other' is imported",
    ),
    "dangling input": ("(float[2] x) => (float[2] y) { y = Add (x, gone) }", "'gone' is produced"),
    "dangling output": ("(float[2] x) => (float[2] z) { y = Relu (x) }", "output 'z'"),
    "no outputs": ("(float[2] x) => () { y = Relu (x) }", "no outputs"),
    "output twice": ("(float[2] x) => (float[2] y, float[2] y) { y = Relu (x) }", "listed twice"),
    "input twice": ("(float[2] x, float[2] x) => (float[2] y) { y = Relu (x) }", "input 'x'"),
    "name twice": ("(float[2] x) => (float[2] y) { y = Relu (x) \n y = Abs (x) }", "output 'y'"),
    "name of an input": ("(float[2] x) => (float[2] x) { x = Relu (x) }", "output 'x'"),
    "initializer twice": (
        "(float[1] x) => (float[1] y) <float[1] w = {1}, float[1] w = {2}> { y = Add (x, w) }",
        "initializer 'w'",
    ),
    "cycle": (
        "(float[2] x) => (float[2] y) { [one] y = Add (x, z) \n [two] z = Abs (y) }",
        "node '(one|two)' waits for its own output",
    ),
    "cycle through a subgraph": (
        """(float[2] x, bool c) => (float[2] y) {
            [outer] y = If (c) <
                then_branch = a () => (float[2] t) { t = Abs (late) },
                else_branch = b () => (float[2] u) { u = Abs (x) }>
            late = Neg (y)
        }""",
        "waits for its own output",
    ),
    "shadowed name": (
        """(float[2] x, bool c) => (float[2] y) { y = If (c) <
            then_branch = a () => (float[2] x) { x = Abs (x) },
            else_branch = b () => (float[2] u) { u = Abs (x) }> }""",
        "name of output 'x'",
    ),
    "value of an outer graph returned": (
        """(float[2] x, bool c) => (float[2] y) { y = If (c) <
            then_branch = a () => (float[2] x) { },
            else_branch = b () => (float[2] u) { u = Abs (x) }> }""",
        "needs an Identity",
    ),
    "too few inputs": ("(float[2] x) => (float[2] y) { y = Add (x) }", "has 1 inputs, not 2"),
    "left out input": ("(float[2] x) => (float[2] y) { y = Add (x, ) }", "inputs|left out"),
    "wrong attribute": (
        '(float[2] x) => (float[2] y) { y = Transpose <perm = "x"> (x) }',
        "'perm' is STRING, not INTS",
    ),
    "missing attribute": ("(float[2] x) => (float[2] y) { y = Cast (x) }", "'to' is missing"),
    "wrong-typed initializer": (
        "(float[2] x) => (float[2] y) <float[1] s = {2}> { y = Reshape (x, s) }",
        "input 1 may not be float",
    ),
    "mixed types": (
        "(float[2] x) => (float[2] y) <int64[1] w = {2}> { y = Add (x, w) }",
        "both float and int64",
    ),
    "negative dimension": ("(float[-7] x) => (float[2] y) { y = Relu (x) }", "negative dimension"),
    "enormous dimensions": (
        "(float[4611686018427387904, 8] x) => (float[2] y) { y = Relu (x) }",
        "too large for any memory",
    ),
    "reference outside a function": (
        "(float[2] x) => (float[2] y) { y = LeakyRelu <alpha : float = @a> (x) }",
        "outside of any",
    ),
    "constant without value": ("() => (float[2] y) { y = Constant () }", "one value"),
    "loop with a wrong body": (
        """(float[2] x, int64 n, bool c) => (float[2] y) { y = Loop (n, c, x) <
            body = b (int64 i, bool d) => (bool d, float[2] t) { t = Neg (x) }> }""",
        "body has other inputs",
    ),
}


@pytest.mark.parametrize("case", GRAPHS)
def test_invalid_graphs(case: str) -> None:
    text, why = GRAPHS[case]
    refuse(onnx.parser.parse_model(f"{HEAD}g {text}"), why)


def test_invalid_functions() -> None:
    body = "g (float[2] x) => (float[2] y) { y = custom.f (x) }\n"
    head = '<domain: "custom", opset_import: ["" : 17, "custom" : 1]>\n'
    for function, why in (
        ("f (a) => (b) { b = custom.f (a) }", "'f' calls itself"),
        ("f (a) => (b) { c = Neg (a) }", "output 'b' is produced by nothing"),
        ("f () => (b) { b = Constant <value_int = 1> () }", "more inputs"),
    ):
        refuse(onnx.parser.parse_model(HEAD + body + head + function), why)


def edited(edit: Callable[[onnx.ModelProto], object]) -> onnx.ModelProto:
    """A valid model after an edit."""
    model = weighted(np.arange(6, dtype=np.float32).reshape(2, 3))
    edit(model)
    return model


def w(model: onnx.ModelProto) -> TensorProto:
    """Its only initializer."""
    return model.graph.initializer[0]


EDITS: dict[str, tuple[Callable[[onnx.ModelProto], object], str]] = {
    "too little data": (lambda m: setattr(w(m), "raw_data", b"123"), "needs 24 bytes, not 3"),
    "no data": (lambda m: w(m).ClearField("raw_data"), "needs 6 elements, not 0"),
    "data twice": (lambda m: w(m).float_data.append(1), "given twice"),
    "data in a wrong field": (
        lambda m: (w(m).ClearField("raw_data"), w(m).int64_data.extend(range(6))),
        "FLOAT data stand in int64_data",
    ),
    "negative size": (lambda m: w(m).dims.__setitem__(0, -2), "negative dimension"),
    "enormous size": (lambda m: w(m).dims.extend([2**62, 2**62]), "too large"),
    "many dimensions": (lambda m: w(m).dims.extend([1] * 100_000), "100002 dimensions"),
    "unknown type": (lambda m: setattr(w(m), "data_type", 99), "element type 99 is unknown"),
    "undefined type": (lambda m: setattr(w(m), "data_type", 0), "element type 0 is unknown"),
    "no name": (lambda m: w(m).ClearField("name"), "no name"),
    "newer opset": (lambda m: setattr(m.opset_import[0], "version", 99), "opset 99 of ai.onnx"),
    "no opset": (lambda m: m.ClearField("opset_import"), "no opset of 'ai.onnx' is imported"),
    "newer IR": (lambda m: setattr(m, "ir_version", 99), "IR version 99"),
    "no IR version": (lambda m: m.ClearField("ir_version"), "IR version 0"),
    "attribute twice": (
        lambda m: m.graph.node[0].attribute.extend([helper.make_attribute("a", 1)] * 2),
        "'a' is there twice",
    ),
    "attribute without type": (
        lambda m: m.graph.node[0].attribute.append(AttributeProto(name="a", i=3)),
        "no type",
    ),
    "training": (lambda m: m.training_info.add(), "training_info"),
    "sparse too large": (
        lambda m: m.graph.sparse_initializer.append(
            helper.make_sparse_tensor(
                helper.make_tensor("s", TensorProto.FLOAT, [1], [1.0]),
                helper.make_tensor("i", TensorProto.INT64, [1], [5]),
                [1 << 30, 4],
            )
        ),
        "too large",
    ),
    "sparse index outside": (
        lambda m: m.graph.sparse_initializer.append(
            helper.make_sparse_tensor(
                helper.make_tensor("s", TensorProto.FLOAT, [1], [1.0]),
                helper.make_tensor("i", TensorProto.INT64, [1], [-5]),
                [3],
            )
        ),
        "outside its shape",
    ),
    "many dimensions of an input": (
        lambda m: m.graph.output[0].type.tensor_type.shape.dim.extend(
            [onnx.TensorShapeProto.Dimension()] * 100_000
        ),
        "100002 dimensions",
    ),
    "dimension in an output": (
        lambda m: setattr(m.graph.output[0].type.tensor_type.shape.dim[0], "dim_value", -(2**63)),
        "negative dimension",
    ),
}


@pytest.mark.parametrize("case", EDITS)
def test_invalid_models(case: str) -> None:
    edit, why = EDITS[case]
    refuse(edited(edit), why)


def place(**entries: str) -> Callable[[TensorProto], None]:
    """An edit that puts external data elsewhere."""

    def edit(tensor: TensorProto) -> None:
        found = {entry.key: entry.value for entry in tensor.external_data} | entries
        del tensor.external_data[:]
        for key, value in found.items():
            tensor.external_data.add(key=key, value=value)

    return edit


def arrange(kind: str, folder: Path, outside: Path) -> None:
    """Make the data file `there` of a kind that is refused."""
    there = folder / "there"
    if kind == "symbolic":
        there.symlink_to(outside)
    elif kind == "hard":
        there.hardlink_to(outside)
    elif kind == "fifo":
        os.mkfifo(there)
    elif kind == "folder":
        there.mkdir()
    elif kind == "short":
        there.write_bytes(bytes(3999))


PLACES: dict[str, tuple[str, Callable[[TensorProto], None], str]] = {
    "missing file": ("", place(location="there"), "No such file"),
    "short file": ("short", place(location="there"), "too short"),
    "symbolic link": ("symbolic", place(location="there"), "symbolic link"),
    "hard link": ("hard", place(location="there"), "hard link"),
    "pipe": ("fifo", place(location="there"), "no regular file"),
    "folder": ("folder", place(location="there"), "no regular file|directory"),
    "parent": ("", place(location="../outside.bin"), "leaves the model's folder"),
    "parent below": ("folder", place(location="there/../../outside.bin"), "leaves"),
    "parent of Windows": ("", place(location="..\\outside.bin"), "leaves"),
    "absolute": ("", place(location="/etc/passwd"), "not relative"),
    "absolute of Windows": ("", place(location="C:\\secret"), "not relative"),
    "memory address": ("", place(location="*/_ORT_MEM_ADDR_/"), "no path"),
    "no location": ("", place(location=""), "no path"),
    "null character": ("", place(location="a\0b"), "no path"),
    "unknown key": ("", place(__class__="x"), "unknown key '__class__'"),
    "key twice": ("", lambda t: t.external_data.append(t.external_data[0]), "key twice"),
    "negative offset": ("", place(offset="-4"), "not a number"),
    "enormous offset": ("", place(offset="9" * 19), "too short"),
    "wrong length": ("", place(length="17"), "17 bytes where dtype and shape need 4000"),
    "shape too large": ("", lambda t: t.dims.append(1 << 40), "need|too short"),
}


@pytest.mark.parametrize("case", PLACES)
@pytest.mark.parametrize("where", ["initializer", "attribute", "subgraph", "function"])
def test_unsafe_external_data(case: str, where: str, tmp_path: Path) -> None:
    kind, edit, why = PLACES[case]
    folder, outside = tmp_path / "model", tmp_path / "outside.bin"
    folder.mkdir()
    outside.write_bytes(bytes(4000))
    arrange(kind, folder, outside)
    model = weighted(np.zeros(1000, np.float32))
    path = externalize(model, folder / "m.onnx")
    edit(w(model))
    if where != "initializer":
        tensor = TensorProto()
        tensor.CopyFrom(w(model))
        tensor.name = "inner"
        w(model).CopyFrom(weighted(np.zeros(1000, np.float32)).graph.initializer[0])
        constant = helper.make_node("Constant", [], ["k"], value=tensor)
        if where == "attribute":
            model.graph.node.append(constant)
        elif where == "function":
            imports = [helper.make_opsetid("", 17)]
            model.functions.append(helper.make_function("f", "f", [], ["k"], [constant], imports))
        else:
            graph = onnx.GraphProto(name="body", initializer=[tensor])
            node = helper.make_node("Custom", [], ["z"], domain="custom", body=graph)
            model.graph.node.append(node)
            model.opset_import.add(domain="custom", version=1)
    path.write_bytes(model.SerializeToString())
    refuse(path, why)


def test_symbolic_link_to_a_folder(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    model = weighted(np.zeros(1000, np.float32))
    path = externalize(model, tmp_path / "m.onnx")
    (tmp_path / "weights.bin").rename(tmp_path / "real" / "weights.bin")
    place(location="link/weights.bin")(w(model))
    path.write_bytes(model.SerializeToString())
    refuse(path, "symbolic link")
    place(location="real/./weights.bin")(w(model))
    path.write_bytes(model.SerializeToString())
    files.load(path)


def test_external_data_without_a_file(tmp_path: Path) -> None:
    model = weighted(np.zeros(1000, np.float32))
    path = externalize(model, tmp_path / "m.onnx")
    refuse(model, "loaded from its file")
    refuse(path.read_bytes(), "loaded from its file")


def test_external_sparse_data(tmp_path: Path) -> None:
    model = weighted(np.zeros(1000, np.float32))
    path = externalize(model, tmp_path / "m.onnx")
    indices = helper.make_tensor("i", TensorProto.INT64, [1000], list(range(1000)))
    model.graph.sparse_initializer.append(helper.make_sparse_tensor(w(model), indices, [1000]))
    del model.graph.initializer[:]
    path.write_bytes(model.SerializeToString())
    refuse(path, "sparse tensors with external data")


def test_text_that_is_not_utf8() -> None:
    data = small().SerializeToString()
    for name in (b"named", b"twice", b"author", b"layer1", b"adds", b"Anything", b"unused"):
        message = refuse(data.replace(name, b"\xff\xfe" + name[2:]), "UTF-8|not an ONNX model")
        assert message.isprintable()


def test_names_that_are_long_or_odd(tmp_path: Path) -> None:
    for name in ("n" * 1_000_000, "new\nline \x1b[31m", "\N{PILE OF POO}", "<script>"):
        text = f"{HEAD}g (float[2] x) => (float[2] y) {{ y = Add (x, gone) }}"
        model = onnx.parser.parse_model(text)
        model.graph.node[0].input[1] = name
        message = refuse(model, "is produced by nothing")
        assert message.isprintable() and len(message) < 300
        model.graph.node[0].input[1] = "x"
        model.graph.node[0].name = model.graph.output[0].name = name
        model.graph.node[0].output[0] = name
        files.save(files.load(model), tmp_path / "m.onnx", overwrite=True)
        assert files.load(tmp_path / "m.onnx").graph.outputs[0].name == name


def nested(depth: int) -> onnx.ModelProto:
    """An If inside an If inside an If …"""
    x = helper.make_tensor_value_info("x", TensorProto.BOOL, [])
    node = helper.make_node("Not", ["x"], ["y0"])
    for level in range(depth):
        y = helper.make_tensor_value_info(f"y{level}", TensorProto.BOOL, [])
        branch = helper.make_graph([node], "b", [], [y])
        other = helper.make_graph(
            [helper.make_node("Not", ["x"], [f"z{level}"])],
            "o",
            [],
            [helper.make_tensor_value_info(f"z{level}", TensorProto.BOOL, [])],
        )
        node = helper.make_node(
            "If", ["x"], [f"y{level + 1}"], then_branch=branch, else_branch=other
        )
    y = helper.make_tensor_value_info(node.output[0], TensorProto.BOOL, [])
    graph = helper.make_graph([node], "g", [x], [y])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def test_deep_nesting() -> None:
    assert sum(1 for _ in ir.graphs(files.load(nested(25)))) == 51
    data = b"\x0a\x01x"
    for _ in range(5000):  # node -> attribute -> graph, without end
        data = b"\x2a" + _length(b"\x32" + _length(b"\x0a" + _length(data)))
    refuse(b"\x08\x08\x3a" + _length(b"\x0a" + _length(data)), "nested too deeply")


def _length(data: bytes) -> bytes:
    return varint(len(data)) + data


def test_values_that_are_odd_but_fine(tmp_path: Path) -> None:
    odd = np.array([np.nan, np.inf, -np.inf, -0.0, 1e-45], np.float32)
    model = files.load(weighted(odd, np.zeros((0, 3), np.float32), np.zeros((), np.int64)))
    files.save(model, tmp_path / "m.onnx")
    again = files.load(tmp_path / "m.onnx").graph.initializers
    found = ir.array(again["w0"])
    assert found is not None and found.tobytes() == odd.tobytes()
    empty = ir.array(again["w1"])
    assert empty is not None and empty.shape == (0, 3)
    text = f"{HEAD}g (float[-1, 0, N] x) => (float[-1, 0, N] y) {{ y = Relu (x) }}"
    shape = files.load(onnx.parser.parse_model(text)).graph.inputs[0].shape
    assert str(shape) == "[None,0,N]"


DATA = small().SerializeToString()


@settings(max_examples=400, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.tuples(st.integers(0, len(DATA) - 1), st.integers(0, 255)), max_size=4))
@example([(0, 8)])
def test_changed_bytes(changes: list[tuple[int, int]]) -> None:
    """A damaged file is a model or is refused; what was loaded can be saved and loaded."""
    data = bytearray(DATA)
    for position, value in changes:
        data[position] = value
    try:
        model = files.load(bytes(data))
    except GraphoptError as error:
        assert "\n" not in str(error)
    else:
        proto = files.to_proto(files.copy(model))
        assert files.to_proto(files.load(proto.SerializeToString())) == proto


@settings(max_examples=100)
@given(st.integers(0, len(DATA)), st.integers(0, len(DATA)), st.integers(0, 3))
def test_cut_and_repeated_bytes(start: int, stop: int, times: int) -> None:
    piece = DATA[min(start, stop) : max(start, stop)]
    try:
        files.load(DATA[: min(start, stop)] + piece * times + DATA[max(start, stop) :])
    except GraphoptError as error:
        assert "\n" not in str(error)


def left(folder: Path) -> list[str]:
    """Names of what is in a folder."""
    return sorted(path.name for path in folder.iterdir())


def test_targets_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = files.load(weighted(np.zeros(5000, np.float32)))
    (tmp_path / "folder.onnx").mkdir()
    (tmp_path / "file").touch()
    os.mkfifo(tmp_path / "fifo")
    before = left(tmp_path)
    for target, why in (
        (tmp_path / "none" / "m.onnx", "does not exist"),
        (tmp_path / "file" / "m.onnx", "Not a directory"),
        (tmp_path / "folder.onnx", "is not a file"),
        (tmp_path / "fifo", "is not a file"),
        (tmp_path / ("x" * 300), "name too long"),
        ("a\0b", "null"),
    ):
        for external in (False, True):
            with pytest.raises(InputError, match=why) as caught:
                files.save(model, target, overwrite=True, external=external)
            assert "\n" not in str(caught.value)

    def refuse_open(path: object, *_: object) -> int:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(os, "open", refuse_open)
    with pytest.raises(InputError, match="Permission denied"):
        files.save(model, tmp_path / "m.onnx")
    assert left(tmp_path) == before


@pytest.mark.parametrize("external", [False, True])
def test_full_target(external: bool, tmp_path: Path) -> None:
    old = files.load(weighted(np.ones(100, np.float32)))
    path = tmp_path / "m.onnx"
    files.save(old, path, external=external)
    before = {name: (tmp_path / name).read_bytes() for name in left(tmp_path)}
    new = files.load(weighted(np.ones(90_000, np.float32)))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        with pytest.raises(InputError, match="cannot be written"):
            files.save(new, path, overwrite=True, external=external)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert {name: (tmp_path / name).read_bytes() for name in left(tmp_path)} == before


def test_output_equal_to_input(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    files.save(files.load(small()), path)
    model, before = files.load(path), path.read_bytes()
    with pytest.raises(InputError, match="overwriting has to be allowed"):
        files.save(model, tmp_path / "." / "m.onnx")
    files.save(model, path, overwrite=True)
    assert path.read_bytes() == before


def test_paths_with_odd_names(tmp_path: Path) -> None:
    path = tmp_path / "new\nline.onnx"
    path.write_bytes(b"")
    with pytest.raises(InputError, match=r"new\\nline\.onnx': not an ONNX model") as caught:
        files.load(path)
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match=r"new\\nline\.onnx': exists"):
        files.save(files.load(small()), path)
