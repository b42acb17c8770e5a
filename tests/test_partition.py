"""Cutting a model by what a backend takes: few pieces, in order, and right together."""

from __future__ import annotations

from typing import Any

import numpy as np

from graphopt import ir
from graphopt.feeds import random_feeds
from graphopt.partition import Piece, Steered, cut
from graphopt.runner import Runner
from graphopt.shapes import Shapes
from tests._text import model


def pieces(text: str, *refused: str) -> tuple[list[list[str]], dict[str, str]]:
    """Labels of each piece (in brackets those that fall back), after checking what they compute."""
    whole = model(text)
    found, reasons = cut(whole, dict.fromkeys(refused, "why"))
    feeds = random_feeds(whole, Shapes(whole))
    values: dict[str, Any] = dict(feeds)
    for piece in found:
        assert isinstance(piece, Piece)
        runner = Runner(piece.model)
        values |= runner.run({name: values[name] for name in runner.inputs})
        for value in (*piece.model.graph.inputs, *piece.model.graph.outputs):
            assert value.type is not None
    for name, expected in Runner(whole).run(feeds).items():
        np.testing.assert_allclose(values[name], expected, rtol=1e-4, atol=1e-5)
    return named(found), reasons


def named(found: list[Piece | Steered]) -> list[list[str]]:
    """Labels of each piece: `-` falls back, `*` is steered by the host."""
    return [
        [f"*{piece.label}"]
        if isinstance(piece, Steered)
        else [("" if piece.native else "-") + label for label in piece.labels]
        for piece in found
    ]


DIAMOND = """
net (float[n,4] x) => (float[n,4] y) <float[4,4] w = {1,2,3,4,5,6,7,8,9,8,7,6,5,4,3,2}> {
  [a] a = MatMul (x, w)
  [b] b = Sin (a)
  [c] c = MatMul (a, w)
  [d] d = Add (b, c)
  [e] e = MatMul (d, w)
  [f] y = Neg (e)
}
"""


def test_branches_that_do_not_wait_share_a_piece() -> None:
    found, reasons = pieces(DIAMOND, "b")
    assert found == [["a", "c"], ["-b"], ["d", "e", "f"]]
    assert reasons == {"b": "why"}


def test_nothing_refused_is_one_piece() -> None:
    assert pieces(DIAMOND)[0] == [["a", "b", "c", "d", "e", "f"]]


def test_everything_refused_is_one_piece() -> None:
    assert pieces(DIAMOND, *"abcdef")[0] == [["-a", "-b", "-c", "-d", "-e", "-f"]]


def test_what_is_too_small_goes_along() -> None:
    found, reasons = pieces(DIAMOND, "e")
    assert found == [["a", "b", "c", "d"], ["-e", "-f"]]
    assert "stands alone" in reasons["f"]


IF = """
    net (float[n,4] x, bool k) => (float[n,4] y)
    <float[4,4] w = {1,2,3,4,5,6,7,8,9,8,7,6,5,4,3,2}> {
      [a] a = MatMul (x, w)
      [if] b = If (k) <
        then_branch = t () => (float[n,4] p) { [inner] p = Sin (a) },
        else_branch = f () => (float[n,4] q) { [other] q = %s }
      >
      [c] y = MatMul (b, w)
    }
"""


def test_branches_and_functions_stand_for_their_node() -> None:
    found, reasons = pieces(IF % "Neg (a)", "inner")
    assert found == [["a"], ["-if"], ["c"]]
    assert reasons == {"if": "inner in it: why"}


def test_control_flow_with_work_in_it_is_steered() -> None:
    whole = model(IF % "MatMul (a, w)")
    found, reasons = cut(whole, {"inner": "why"})
    assert named(found) == [["a"], ["*if"], ["c"]]
    assert reasons == {"if": "inner in it: why"}
    steered = found[1]
    assert isinstance(steered, Steered)
    assert steered.opened.inputs == ("k", "a") and steered.opened.outputs == ("b",)
    assert [named([piece]) for piece in steered.pieces] == [[["-inner"]], [["-other"]]]
    assert [len(piece.model.graph.initializers) for piece in steered.pieces] == [0, 1]
    assert named(cut(whole, {"inner": "why"}, closed=["if"])[0]) == [["a"], ["-if"], ["c"]]


def test_control_flow_on_text_stays_whole() -> None:
    text = """
    net (float[n,4] x, bool k, string[n] s) => (float[n,4] y, string[n] z)
    <float[4,4] w = {1,2,3,4,5,6,7,8,9,8,7,6,5,4,3,2}> {
      [if] y, z = If (k) <
        then_branch = t () => (float[n,4] p, string[n] r) { p = MatMul (x, w) r = Identity (s) },
        else_branch = f () => (float[n,4] q, string[n] u) { q = MatMul (x, w) u = Identity (s) }
      >
    }
    """
    found, reasons = cut(model(text), {"if": "why"})
    assert named(found) == [["-if"]]
    assert reasons == {"if": "why; s is text"}


def test_constants_go_where_they_are_used() -> None:
    text = """
    net (float[n,4] x) => (float[n,4] y, float[1] k) {
      k = Constant <value_floats = [2.0]> ()
      j = Constant <value_floats = [3.0]> ()
      [a] a = Mul (x, j) [b] b = Mul (a, a) [c] c = Mul (b, j)
      [d] d = Sin (c)
      [e] e = Mul (d, j) [f] f = Mul (e, k) [g] y = Mul (f, j)
    }
    """
    found, _ = pieces(text, "d")
    assert [len(labels) for labels in found] == [4, 1, 3]


def test_a_value_of_unknown_type_does_not_enter() -> None:
    text = """
    <ir_version: 9, opset_import: ["" : 20, "acme" : 1]>
    net (float[n,4] x) => (float[n,4] y)
    <float[4,4] w = {1,2,3,4,5,6,7,8,9,8,7,6,5,4,3,2}> {
      [a] a = MatMul (x, w)
      [odd] b = acme.Twist (a)
      [c] y = MatMul (b, w)
    }
    """
    whole = model(text)
    found, reasons = cut(whole, {"odd": "unknown"})
    assert [piece.native for piece in found] == [True, False]
    assert "not known" in reasons["c"]


def test_the_models_values_get_names_and_nothing_else_changes() -> None:
    whole = model(DIAMOND)
    before = [ir.label(node) for node in whole.graph]
    cut(whole, {"b": "why"})
    assert [ir.label(node) for node in whole.graph] == before
