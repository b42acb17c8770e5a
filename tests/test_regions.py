"""Regions: the cut between two models, and its claims checked on real and on random values."""

from __future__ import annotations

import numpy as np
import pytest

from graphopt import files, ir
from graphopt.cutting import Cut, close, extract, whole
from graphopt.feeds import random_feeds
from graphopt.regions import Mode, Options, compare_regions
from graphopt.report import Comparison
from graphopt.runner import Runner
from graphopt.shapes import Shapes
from tests._text import model

CHAIN = """
net (float[n,4] x) => (float[n,4] y) <float[4] w = {1, -2, 3, 0.5}, float two = {2}> {
  a = Mul (x, w)
  b = Add (a, two)
  c = Mul (b, two)
  d = Tanh (c)
  e = Mul (d, two)
  y = Relu (e)
}
"""


def regions(one: ir.Model, other: ir.Model, *modes: Mode) -> Comparison:
    shapes = Shapes(one)
    options = Options(random_feeds(one, shapes), modes=modes)
    return compare_regions(Cut(one, other), options, shapes)


def test_what_is_computed_alike_needs_no_claim() -> None:
    renamed = CHAIN.replace("c =", "other =").replace("(c)", "(other)")
    assert Cut(model(CHAIN), model(renamed)).claims == []


def test_a_change_is_one_claim_and_a_small_part() -> None:
    one, other = model(CHAIN), model(CHAIN.replace("c = Mul (b, two)", "c = Add (b, b)"))
    cut = Cut(one, other)
    assert [claim.name for claim in cut.claims] == ["c"]
    part = cut.before(cut.claims, ())
    assert [node.op_type for node in part.nodes] == ["Mul"]
    assert [value.name for value in part.inputs] == ["b"]
    assert cut.share() == 1 / 6


def test_an_eliminated_node_is_compared_with_what_took_its_place() -> None:
    one = model(CHAIN.replace("y = Relu (e)", "f = Relu (e)\n y = Identity (f)"))
    cut = Cut(one, model(CHAIN))
    (claim,) = cut.claims
    assert claim.twin is not None and claim.twin.name == "f"
    assert not cut.after([claim]).nodes


def test_folded_constants_are_claims_without_inputs() -> None:
    text = "net (float[2] x) => (float[2] y) <float a = {2}> { b = Mul (a, a)\n y = Add (x, b) }"
    folded = "net (float[2] x) => (float[2] y) <float b = {4}> { y = Add (x, b) }"
    assert [claim.name for claim in Cut(model(text), model(folded)).claims] == ["b"]
    assert regions(model(text), model(folded), "real").ok
    wrong = folded.replace("{4}", "{5}")
    assert regions(model(text), model(wrong), "real").different


@pytest.mark.parametrize("mode", ["real", "random"])
def test_both_ways_find_a_fault(mode: Mode) -> None:
    right = CHAIN.replace("c = Mul (b, two)", "c = Add (b, b)")
    wrong = CHAIN.replace("c = Mul (b, two)", "c = Mul (b, b)")
    found = regions(model(CHAIN), model(right), mode)
    assert found.ok and found.how == "regions"
    assert found.notes == [f"1 regions were compared on {mode} values"]
    assert regions(model(CHAIN), model(wrong), mode).different


def test_a_name_used_again_is_no_fault() -> None:
    moved = CHAIN.replace("c = Mul (b, two)\n  d = Tanh (c)", "k = Mul (b, two)\n  d = Tanh (k)")
    moved = moved.replace("e = Mul (d, two)\n  y = Relu (e)", "c = Mul (d, two)\n  y = Relu (c)")
    assert regions(model(CHAIN), model(moved), "real").ok


def test_inputs_that_belong_together_are_computed_together() -> None:
    """A Relu of a Relu may go only because its input is never negative."""
    text = """
    net (float[8] x) => (float[8] y, float[8] z) {
      a = Relu (x)
      z = Neg (a)
      y = Relu (a)
      u = Abs (z)
    }
    """
    one, other = model(text), model(text.replace("y = Relu (a)", "y = Abs (z)"))
    cut = Cut(one, other)
    (claim,) = cut.claims
    part = cut.before([claim], [v for v in one.graph.outputs if v.name == "z"])
    assert {value.name for value in part.inputs} == {"a", "z"}
    assert close(part, one.graph, 10)
    assert [value.name for value in part.inputs] == ["a"]
    assert not close(cut.before([claim], [*one.graph.outputs]), one.graph, 0)
    assert regions(one, other, "random", "real").ok


def test_regions_without_the_unrunnable_rest() -> None:
    text = """
    <ir_version: 10, opset_import: ["" : 20, "vendor" : 1]>
    net (float[2,4] x) => (float[2,4] y) <float two = {2}> {
      a = vendor.Magic (x)
      b = Mul (a, two)
      y = Relu (b)
    }
    """
    one = model(text)
    for node in one.graph:  # what another tool recorded: ours cannot know
        node.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
        node.outputs[0].shape = ir.Shape([2, 4])
    other = files.copy(one)
    add = next(node for node in other.graph if node.op_type == "Mul")
    add.op_type = "Add"
    add.replace_input_with(1, add.inputs[0])
    assert regions(one, other, "real", "random").ok
    add.op_type = "Sub"
    assert regions(one, other, "real", "random").different


def test_known_sizes_are_fed_as_they_are() -> None:
    text = """
    net (float[n,4,m] x) => (float[n,k] y) <int64[1] last = {-1}> {
      s = Shape <end = 1> (x)
      t = Concat <axis = 0> (s, last)
      y = Reshape (x, t)
    }
    """
    simple = """
    net (float[n,4,m] x) => (float[n,k] y) <int64[2] t = {0, -1}> { y = Reshape (x, t) }
    """
    found = regions(model(text), model(simple), "random")
    assert found.ok and not found.unchecked


def test_parts_are_models_of_their_own() -> None:
    one = model(CHAIN)
    values = {value.name: value for node in one.graph for value in node.outputs}
    part = whole([values["c"]])
    alone = extract(one, part, [values["c"]], {})
    x = np.ones((1, 4), np.float32)
    result = Runner(alone).run({"x": x})["c"]
    np.testing.assert_allclose(result, [[6, 0, 10, 5]])
    assert len(one.graph) == 6 and len(alone.graph) == 3


def test_subgraphs_are_part_of_their_node() -> None:
    text = """
    net (float[4] x, bool p) => (float[4] y) <float two = {2}> {
      a = Abs (x)
      y = If (p) <
        then_branch = yes () => (float[4] u) { u = Mul (a, two) },
        else_branch = no () => (float[4] v) { v = Neg (a) }
      >
    }
    """
    assert Cut(model(text), model(text)).claims == []
    right = text.replace("u = Mul (a, two)", "u = Add (a, a)")
    wrong = text.replace("v = Neg (a)", "v = Exp (a)")
    assert regions(model(text), model(right), "random", "real").ok
    one, other = model(text), model(wrong)
    shapes = Shapes(one)
    for p in (True, False):
        feeds = {"x": np.ones(4, np.float32), "p": np.asarray(p)}
        found = compare_regions(Cut(one, other), Options(feeds, modes=("real",)), shapes)
        assert found.different is not p
