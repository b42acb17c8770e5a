"""The fixture driver's own parts: how cases are read, and which models count as the same."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from graphopt import files, ir
from tests._canonical import Canonical
from tests._fixtures import Case, cases


def read(tmp_path: Path, text: str) -> Case:
    """The single case of a fixture."""
    file = tmp_path / "fuse_this.onnxtxt"
    file.write_text(text, encoding="utf-8")
    (case,) = cases(file)
    return case


def canonical(tmp_path: Path, body: str) -> Canonical:
    """A model's canonical form, from its text without header."""
    case = read(tmp_path, f"# title: t\n# unchanged: true\n{body}")
    return Canonical.of(files.load(case.model(case.before)))


def test_headers(tmp_path: Path) -> None:
    """Titles, options and arrays; an initializer is made where its name occurs."""
    case = read(
        tmp_path,
        "# title: a case\n# options: a=1\n# random: w float16[2,3] positive\n"
        "# value: b int4[2] -1, 7\n# computed: v float[2]\n# feed: x float[2] 1, 2\n"
        "net (float[2] x) => (float[2] y) { y = This (x, w, b) }\n=>\n"
        "net (float[2] x) => (float[2] y) { y = That (x, v) }\n",
    )
    assert case.id == "fuse-this::a case"
    assert case.pipeline == "fuse-this{a=1}"
    before = ir.serde.deserialize_model(case.model(case.before)).graph.initializers
    assert list(before) == ["w", "b"]
    w, b = before["w"].const_value, before["b"].const_value
    assert w is not None and b is not None
    assert w.dtype == ir.DataType.FLOAT16 and bool((w.numpy() > 0).all())
    assert b.dtype == ir.DataType.INT4 and b.numpy().tolist() == [-1, 7]
    assert list(ir.serde.deserialize_model(case.expected()).graph.initializers) == ["v"]
    assert case.free == {"v"}
    assert case.feeds()["x"].tolist() == [1, 2]


@pytest.mark.parametrize(
    "text",
    [
        "net (float x) => (float y) { y = Relu (x) }",
        "# title: t\nnet (float x) => (float y) { y = Relu (x) }",
        "# title: t\n# unchnaged: true\nnet (float x) => (float y) { y = Relu (x) }",
        "# title: t\n# random: w float\n# random: w 3\nnet () => () { }\n=>\nnet () => () { }",
    ],
)
def test_mistakes_in_a_fixture(tmp_path: Path, text: str) -> None:
    """No title, neither after nor unchanged, an unknown header, an array without a type."""
    with pytest.raises((AssertionError, KeyError)):
        read(tmp_path, text)


def test_names_and_order_do_not_matter(tmp_path: Path) -> None:
    """Renamed values, another order, a Constant in place of an initializer."""
    a = (
        "net (float[2] x) => (float[2] y) <float s = {2}> "
        "{ p = Exp (x) q = Mul (x, s) y = Add (p, q) }"
    )
    b = (
        "net (float[2] x) => (float[2] y) { c = Constant <value_float: float = 2.0> () "
        "v = Mul (x, c) u = Exp (x) y = Add (u, v) }"
    )
    assert canonical(tmp_path, a).text == canonical(tmp_path, b).text


@pytest.mark.parametrize(
    "body",
    [
        "y = Gemm <alpha = 2.0> (x, w)",
        "y = Gemm <transB = 1> (x, w)",
        "y = Gemm (w, x)",
        "y = Gemm (x, w, w)",
        "y = MatMul (x, w)",
        "y = Gemm (x, w) z = Relu (y)",
        "v = Identity (w) y = Gemm (x, v)",
    ],
)
def test_what_differs(tmp_path: Path, body: str) -> None:
    """An attribute, an order of inputs, one more input, an operator, dead code, one more node."""
    text = "net (float[2,2] x) => (float[2,2] y) <float[2,2] w = {{1, 2, 3, 4}}> {{ {} }}"
    one, other = (canonical(tmp_path, text.format(b)) for b in ("y = Gemm (x, w)", body))
    assert one.text != other.text


def test_constants_are_compared_by_value(tmp_path: Path) -> None:
    """Rounding is forgiven, another value is not, unless the case leaves it free."""
    text = "net (float[2] x) => (float[2] y) <float[2] w = {{1, {}}}> {{ y = Add (x, w) }}"
    one, near, far = (canonical(tmp_path, text.format(v)) for v in ("2", "2.000001", "2.1"))
    assert one.text == near.text == far.text
    assert one.difference(near, frozenset()) == ""
    assert "'w'" in one.difference(far, frozenset())
    assert one.difference(far, frozenset({"w"})) == ""


def test_equal_constants_stay_apart(tmp_path: Path) -> None:
    """Sharing a weight is a change, or merging weights could not be shown."""
    text = (
        "net (float x) => (float y) <float a = {{1}}, float b = {{1}}> "
        "{{ p = Add (x, a) q = Mul (p, {}) y = Sub (q, b) }}"
    )
    assert canonical(tmp_path, text.format("a")).text != canonical(tmp_path, text.format("b")).text


def test_subgraphs_and_functions(tmp_path: Path) -> None:
    """Branches and function bodies are read with the values that they take from outside."""
    text = (
        '<ir_version: 10, opset_import: ["" : 20, "own" : 1]>\n'
        "net (bool c, float[2] x) => (float[2] y) {{ o = Exp (x) "
        "t = If (c) <then_branch = a () => (float[2] p) {{ p = Relu ({0}) }}, "
        "else_branch = b () => (float[2] q) {{ q = Neg (o) }}> y = own.F (t) }}\n"
        '<domain: "own", opset_import: ["" : 20]> F (u) => (v) {{ v = {1} (u) }}'
    )
    plain = canonical(tmp_path, text.format("o", "Abs"))
    assert "function own.F" in plain.text
    assert plain.text != canonical(tmp_path, text.format("x", "Abs")).text
    assert plain.text != canonical(tmp_path, text.format("o", "Sin")).text


def test_random_arrays_are_steady(tmp_path: Path) -> None:
    """The same name and shape give the same values, another name others."""
    headers = "# title: t\n# unchanged: true\n# random: w float[9]\n# random: v float[9]\n"
    text = headers + "net () => () { }"
    first, second = read(tmp_path, text), read(tmp_path, text)
    values = [fill.array() for case in (first, second) for fill in case.filled]
    assert np.array_equal(values[0], values[2])
    assert not np.array_equal(values[0], values[1])
